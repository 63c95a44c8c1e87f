"""Several threads on one reduced model: each gets what it would get alone."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from by_hand import SPECIAL, Scripted
from models import behind, cache_of, snapshot, tiny_qwen2, tiny_qwen2_vl, video_embeddings, video_prompt

import fftriton
from fftriton.hf.invariants import Invariants
from fftriton.hf.layers import _Shared

METHODS = [fftriton.FrameFusion(0.4, 0.9), fftriton.FastV(0.6), Scripted(), fftriton.StreamingLLM(0.4, sinks=2)]
ARGUMENTS = {"do_sample": False, "suppress_tokens": SPECIAL, "return_dict_in_generate": True, "output_logits": True}
ROUNDS = 5


def prompts():
    """Of different lengths, with videos and without."""
    return [
        video_prompt(), video_prompt(((6, 4, 4),), image=False, seed=1), video_prompt(((3, 4, 6),), seed=2),
        {"input_ids": torch.arange(5, 40)[None]},
    ]  # fmt: skip


def needs_positions_of_its_own(model):
    """Before 5.0 the plain Qwen2-VL keeps a note of the last prompt that every thread's steps read."""
    if transformers.__version__ < "5":
        pytest.skip(f"transformers {transformers.__version__} is not for several threads itself")


def ask(model, inputs, reduction=None):
    out = model.generate(**inputs, max_new_tokens=5, **ARGUMENTS)
    report = None if reduction is None or reduction.report is None else reduction.report.kept_positions
    return out.sequences, torch.cat(out.logits), report


def same(one, other):
    kept = (one[2] is None) == (other[2] is None) and all(map(torch.equal, one[2] or (), other[2] or ()))
    return torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() < 1e-5 and kept


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_generate(method, attention):
    model = tiny_qwen2_vl(attention=attention)
    needs_positions_of_its_own(model)
    before = snapshot(model)
    with fftriton.reduce(model, method) as reduction:
        alone = [ask(model, inputs, reduction) for inputs in prompts()]
        with ThreadPoolExecutor(4) as pool:
            jobs = []
            for _ in range(ROUNDS):
                jobs += [(i, pool.submit(ask, model, prompts()[i], reduction)) for i in range(4)]
                pool.submit(model, **prompts()[3])  # forwards between the steps of generate
                pool.submit(model, **prompts()[1])
            assert all(same(job.result(), alone[i]) for i, job in jobs)
    assert snapshot(model) == before


@torch.no_grad()
def test_steps_of_ones_own():
    """Prompts and steps interleave as they come."""
    model, method = tiny_qwen2(), fftriton.FastV(0.6)
    cases = [video_embeddings(6, 8, seed=0), video_embeddings(6, 8, seed=1)]
    layout = cases[0][1]

    def run(video, start=None):
        if start is not None:
            start.wait()
        cache = cache_of(model(inputs_embeds=video))
        return torch.cat([model(input_ids=torch.tensor([[3 + i]]), **behind(cache)).logits for i in range(8)])

    with fftriton.reduce(model, method, lambda _, given: layout if "inputs_embeds" in given else []):
        alone = [run(video) for video, _ in cases]
        for _ in range(ROUNDS):
            start = threading.Barrier(2)
            with ThreadPoolExecutor(2) as pool:
                both = list(pool.map(lambda video, start=start: run(video, start), [video for video, _ in cases]))
            assert all(map(torch.equal, both, alone))


@torch.no_grad()
def test_asyncio():
    model = tiny_qwen2_vl()
    needs_positions_of_its_own(model)

    async def serve():
        jobs = [asyncio.to_thread(ask, model, inputs, reduction) for _ in range(2) for inputs in prompts()]
        return await asyncio.gather(*jobs)

    with fftriton.reduce(model, METHODS[0]) as reduction:
        alone = [ask(model, inputs, reduction) for inputs in prompts()]
        assert all(same(got, alone[i % 4]) for i, got in enumerate(asyncio.run(serve())))


@torch.no_grad()
def test_one_that_fails_leaves_the_others_alone():
    model, failing = tiny_qwen2_vl(), threading.local()
    needs_positions_of_its_own(model)

    def fail(*_):
        if getattr(failing, "now", False):
            raise torch.OutOfMemoryError

    def run(index):
        failing.now = index % 2 == 1
        try:
            return ask(model, prompts()[0], reduction)
        except torch.OutOfMemoryError:
            return None

    hook = model.model.language_model.layers[2].mlp.register_forward_hook(fail)
    try:
        with fftriton.reduce(model, METHODS[0]) as reduction:
            alone = ask(model, prompts()[0], reduction)
            with ThreadPoolExecutor(4) as pool:
                got = list(pool.map(run, range(12)))
    finally:
        hook.remove()
    assert all(same(result, alone) if index % 2 == 0 else result is None for index, result in enumerate(got))


def removal_waits(reduction, run, inside, go_on):
    """Take the reduction away while another thread is `inside` of `run`, where it stays until it may `go_on`."""
    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(30)
    leaving = threading.Thread(target=reduction.remove)
    leaving.start()
    leaving.join(0.3)
    assert leaving.is_alive()
    go_on.set()
    thread.join()
    leaving.join()


@torch.no_grad()
def test_leaving_the_block_waits_for_the_others():
    model, inputs = tiny_qwen2_vl(), prompts()[0]
    inside, go_on = threading.Event(), threading.Event()
    before, result = snapshot(model), []

    def pause(*_):
        inside.set()
        go_on.wait(30)

    with fftriton.reduce(model, METHODS[1]):
        expected = model(**inputs).logits
    reduction = fftriton.apply(model, METHODS[1])
    hook = model.model.language_model.layers[2].register_forward_hook(pause)
    removal_waits(reduction, lambda: result.append(torch.no_grad()(model)(**inputs).logits), inside, go_on)
    hook.remove()
    assert torch.equal(result[0], expected)
    assert snapshot(model) == before


@torch.no_grad()
def test_leaving_the_block_waits_for_one_that_waits_for_its_gpu(monkeypatch):
    """Its layers have run; what it holds is only checked then."""
    model, inputs = tiny_qwen2_vl(), prompts()[0]
    inside, go_on = threading.Event(), threading.Event()
    before, read, result = snapshot(model), Invariants.read, []
    with fftriton.reduce(model, METHODS[1]) as reduction:
        model(**inputs)
        expected = reduction.report.tokens_per_layer

    def pause(invariants):
        inside.set()
        go_on.wait(30)
        read(invariants)

    reduction = fftriton.apply(model, METHODS[1])
    monkeypatch.setattr(Invariants, "read", pause)

    def run():
        with torch.no_grad():
            cache = cache_of(model(**inputs, use_cache=True))
        result.append([layer.keys.shape[2] for layer in cache.layers])

    removal_waits(reduction, run, inside, go_on)
    assert result == [expected]
    assert snapshot(model) == before


@torch.no_grad()
def test_leaving_the_block_waits_for_what_follows_the_decoder():
    """Only then is the call noted as gone through: its report is there, and its KV cache can be continued."""
    model, inputs = tiny_qwen2_vl(), prompts()[0]
    inside, go_on, result = threading.Event(), threading.Event(), []

    def pause(*_):
        inside.set()
        go_on.wait(30)

    reduction = fftriton.apply(model, METHODS[1])
    hook = model.lm_head.register_forward_hook(pause)

    def run():
        with torch.no_grad():
            cache = cache_of(model(**inputs, use_cache=True))
        result.append((cache.get_seq_length(), reduction.report.num_tokens))

    removal_waits(reduction, run, inside, go_on)
    hook.remove()
    length = inputs["input_ids"].shape[1]
    assert result == [(length, length)]


@torch.no_grad()
def test_a_report_is_of_ones_own_thread():
    model = tiny_qwen2_vl()
    with fftriton.reduce(model, METHODS[0]) as reduction:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ask, model, prompts()[1]).result()
            other = reduction.report  # this thread has had no prompt: the last one of any
            assert other.num_tokens == prompts()[1]["input_ids"].shape[1]
            model(**prompts()[0])
            pool.submit(ask, model, prompts()[1]).result()
            assert reduction.report.num_tokens == prompts()[0]["input_ids"].shape[1]


@torch.no_grad()
def test_compiled_code_is_for_one_thread():
    model = copy.deepcopy(tiny_qwen2(2))
    inside, go_on = threading.Event(), threading.Event()

    def backend(graph, examples):
        def run(*args):
            inside.set()
            go_on.wait(30)
            return graph.forward(*args)

        return run

    model.forward = torch.compile(model.forward, backend=backend)
    words = {"input_ids": torch.tensor([[3, 4, 5]])}
    with fftriton.reduce(model, fftriton.FastV(0.7, layer=1), lambda *_: []), ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: torch.no_grad()(model)(**words).logits)
        inside.wait(60)
        with pytest.raises(RuntimeError, match="a compiled model must not be called by two threads at once"):
            model(**words)
        go_on.set()
        first.result()
    torch._dynamo.reset()


def test_hooks_that_an_interrupt_has_cut_short_come_back():
    made, interrupted = [], []

    def make(index, undo):
        made.append(index)
        undo.append(lambda: None)
        if interrupted == [index]:
            undo.append(interrupted.clear)
            raise KeyboardInterrupt
        undo.append(stop)

    def stop():
        if interrupted == ["leave"]:
            interrupted.clear()
            raise KeyboardInterrupt

    shared = _Shared(make)
    for index in (0, 1):
        shared.enter()
        shared.reach(0)
        interrupted.append(index + 1 if index == 0 else "leave")
        with pytest.raises(KeyboardInterrupt):
            shared.reach(1) if index == 0 else shared.leave()
        shared.leave()
    shared.enter()
    for index in (0, 1):
        shared.reach(index)
    shared.leave()
    assert made == [0, 1, 0, 0, 1]
    assert not shared.has_others()
