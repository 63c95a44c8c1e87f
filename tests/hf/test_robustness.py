"""What can go wrong: the model is as it was, the cache is as it was or says that it is not, and nobody else notices."""

import copy
import pickle
import threading

import pytest
import torch
from by_hand import ByHand, Scripted, SeenPrompt, decoder_of, generate, patches
from families import FAMILIES
from models import (
    behind,
    cache_of,
    snapshot,
    tiny_qwen2,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    video_embeddings,
    video_prompt,
)
from transformers import DynamicCache

import fftriton
from fftriton.hf import importance, prefill
from fftriton.methods import fastv

METHOD = fftriton.FastV(0.6)
SCRIPT = Scripted()


def place_of(name, model):
    """What to break, and under which name it is called."""
    layer = decoder_of(model).layers[1]
    return {
        "attention": (layer.self_attn.o_proj, "forward"),
        "norm": (layer.post_attention_layernorm, "forward"),
        "feed-forward": (layer.mlp.down_proj, "forward"),
        "last norm": (decoder_of(model).norm, "forward"),
        "importance": (importance, "attention_column_sum"),
        "method": (fastv._FastVState, "after_attention"),
        "packing": (prefill.Prefill, "_pack"),
        "report": (prefill.Prefill, "finish"),
    }[name]


def break_off(model, place, error, arguments):
    """Run a forward that fails there."""

    def broken(*args, **kwargs):
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        patch.setattr(*place_of(place, model), broken)
        model(**arguments)


@pytest.mark.parametrize(
    "place", ["attention", "norm", "feed-forward", "last norm", "importance", "method", "packing", "report"]
)
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("turn", ["first", "second"])
@torch.no_grad()
def test_a_forward_that_fails_can_be_repeated(place, error, turn):
    model, (video, layout) = tiny_qwen2(), video_embeddings(4, 5)
    words = torch.tensor([[3, 4, 5]])
    turns = [{"input_ids": words}] if turn == "second" else []
    before, dense = snapshot(model), model(inputs_embeds=video).logits
    with fftriton.reduce(
        model, METHOD, lambda _, arguments: layout if "inputs_embeds" in arguments else []
    ) as reduction:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            for arguments in turns:
                model(**arguments, **behind(cache))
        expected = model(inputs_embeds=video, **behind(caches[0])).logits
        assert reduction.report is not None
        lengths = [layer.get_seq_length() for layer in caches[1].layers]
        break_off(model, place, error, {"inputs_embeds": video, **behind(caches[1])})
        if error is not KeyboardInterrupt:  # behind which torch calls no hook: the next forward sees to it
            assert [layer.get_seq_length() for layer in caches[1].layers] == lengths
        assert reduction.report is None
        assert torch.equal(model(inputs_embeds=video, **behind(caches[1])).logits, expected)
        break_off(model, place, error, {"inputs_embeds": video})
    assert snapshot(model) == before
    assert torch.equal(model(inputs_embeds=video).logits, dense)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.feature("exceptions")
@torch.no_grad()
def test_every_family_is_as_before(family, error):
    model, inputs = family.model(), family.inputs()
    dense, before = model(**inputs).logits, snapshot(model)
    with fftriton.reduce(model, SCRIPT):
        expected = model(**inputs).logits
        break_off(model, "feed-forward", error, inputs)
        assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(error), fftriton.reduce(model, SCRIPT):
        break_off(model, "last norm", error, inputs)
        raise error
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("family", ["qwen3_5", "minicpmv4_6"])
@torch.no_grad()
def test_recurrent_states_that_cannot_be_taken_back_are_refused(family):
    family = FAMILIES[family]
    model, inputs, words = family.model(), family.inputs(), torch.tensor([[3, 4, 5]])
    cache = DynamicCache(config=model.config.get_text_config())
    with fftriton.reduce(model, SCRIPT):
        break_off(model, "last norm", RuntimeError, inputs | {**behind(cache)})
        expected = model(**inputs).logits
        assert torch.equal(model(**inputs, **behind(cache)).logits, expected)  # it was empty, and is again
        break_off(model, "last norm", RuntimeError, {"input_ids": words, **behind(cache)})
        with pytest.raises(RuntimeError, match="from a forward that failed in the middle: reset it"):
            model(input_ids=words, **behind(cache))
        cache.reset()
        assert torch.equal(model(**inputs, **behind(cache)).logits, expected)


def test_an_installation_that_fails_is_taken_back(monkeypatch):
    model, inputs = tiny_qwen2_vl(), video_prompt()
    before = snapshot(model)

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(decoder_of(model)), "register_forward_hook", broken)
        fftriton.apply(model, METHOD)
    assert snapshot(model) == before
    with torch.no_grad(), fftriton.reduce(model, METHOD) as reduction:
        model(**inputs)
    assert reduction.report.budget_achieved < 0.7


def test_two_threads_reduce_two_models():
    """Each gets what it gets alone, forward after forward."""
    jobs = [
        (tiny_qwen2_vl(), video_prompt(), fftriton.FrameFusion(0.4, 0.9)),
        (tiny_qwen2_5_vl(), video_prompt(seed=3), fftriton.FastV(0.6)),
    ]
    alone = []
    for model, inputs, method in jobs:
        with fftriton.reduce(model, method) as reduction:
            alone.append((*generate(model, inputs), reduction.report.kept_positions))
    results, start = {}, threading.Barrier(2)

    def run(index):
        model, inputs, method = jobs[index]
        start.wait()
        for _ in range(4):
            with fftriton.reduce(model, method) as reduction:
                tokens, logits = generate(model, inputs)
            results.setdefault(index, []).append((tokens, logits, reduction.report.kept_positions))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    before = [snapshot(model) for model, _, _ in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [snapshot(model) for model, _, _ in jobs] == before
    for index, (tokens, logits, kept) in enumerate(alone):
        assert len(results[index]) == 4
        for result in results[index]:
            assert torch.equal(result[0], tokens)
            assert torch.equal(result[1], logits)
            assert all(map(torch.equal, result[2], kept))


def test_one_model_is_reduced_once_at_a_time():
    """Nested, from another thread, and through another module that has the same decoder."""
    model, inputs = tiny_qwen2_vl(), video_prompt()
    before, errors = snapshot(model), []

    def enter(same):
        try:
            fftriton.apply(same, fftriton.KeepAll())
        except RuntimeError as error:
            errors.append(str(error))

    with torch.no_grad(), fftriton.reduce(model, METHOD) as reduction:
        thread = threading.Thread(target=enter, args=(model,))
        thread.start()
        thread.join()
        enter(model)
        with pytest.raises(RuntimeError, match="being reduced already"):
            reduction.install()
        model(**inputs)
        assert reduction.report.budget_achieved < 0.7
    assert len(errors) == 2
    assert all("the model is being reduced already" in error for error in errors)
    assert snapshot(model) == before


# ---- what cannot be right is refused


@torch.no_grad()
def test_a_reduced_cache_is_refused_outside():
    model, (video, layout) = tiny_qwen2(), video_embeddings(4, 5)
    with fftriton.reduce(model, SCRIPT, layout):
        cache = cache_of(model(inputs_embeds=video))
        shared = copy.deepcopy(cache)
        expected = model(input_ids=torch.tensor([[3]]), **behind(copy.deepcopy(cache))).logits
    for held in (cache, shared):
        with pytest.raises(RuntimeError, match="the KV cache holds a reduced prompt, which only a model that is being"):
            model(input_ids=torch.tensor([[3]]), **behind(held))
    with fftriton.reduce(model, fftriton.KeepAll(), []):  # any reduction reads it
        assert torch.equal(model(input_ids=torch.tensor([[3]]), **behind(cache)).logits, expected)
    cache.reset()
    assert torch.equal(model(inputs_embeds=video, **behind(cache)).logits, model(inputs_embeds=video).logits)


@torch.no_grad()
def test_masks_that_do_not_fit():
    model, (video, layout) = tiny_qwen2(), video_embeddings(4, 5)
    length = video.shape[1]
    before = snapshot(model)
    with fftriton.reduce(model, SCRIPT, layout):
        hiding = torch.ones(1, length, dtype=torch.int64)
        hiding[0, 5] = 0
        with pytest.raises(ValueError, match="attention_mask: must not hide video tokens, but does in sample 0"):
            model(inputs_embeds=video, attention_mask=hiding)
        cache = cache_of(model(inputs_embeds=video))
        square = torch.zeros(1, 1, 2, length + 2)
        with pytest.raises(
            ValueError, match="nothing can follow the reduced prompt .* attention_mask is not the two-dim"
        ):
            model(input_ids=torch.tensor([[3, 4]]), **behind(cache), attention_mask=square)
    assert snapshot(model) == before


def test_gradients_go_through_what_is_left():
    model, (video, layout) = tiny_qwen2(), video_embeddings(4, 5)
    given, by_hand = (video.clone().requires_grad_() for _ in range(2))
    with fftriton.reduce(model, SCRIPT, layout):
        model(inputs_embeds=given).logits[0, -1].logsumexp(0).backward()
    prompt = SeenPrompt(by_hand, torch.arange(video.shape[1])[None], ())
    ByHand(model, patches(layout, video.shape[1])).logits(prompt, SCRIPT)[-1].logsumexp(0).backward()
    assert by_hand.grad.abs().min() > 0
    torch.testing.assert_close(given.grad, by_hand.grad, atol=1e-5, rtol=1e-4)


# ---- where a forward may break off, and what is done next

WORD = {"input_ids": torch.tensor([[3]])}


def reducing(method):
    """A model that is reduced on prompts of embeddings; the prompt."""
    model, (video, layout) = tiny_qwen2(), video_embeddings(4, 5)
    rule = lambda _, given: layout if "inputs_embeds" in given else []  # noqa: E731
    return model, video, fftriton.reduce(model, method, rule)


def raising(error):
    def broken(*args, **kwargs):
        raise error

    return broken


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "step"])
@torch.no_grad()
def test_an_error_behind_the_decoder(error, prompt):
    model, video, reduction = reducing(SCRIPT)
    with reduction:
        cache = cache_of(model(inputs_embeds=video))
        given = {"inputs_embeds": video} if prompt else WORD
        expected = model(**given, **behind(copy.deepcopy(cache))).logits
        with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
            patch.setattr(model.lm_head, "forward", raising(error))
            model(**given, **behind(cache))
        assert torch.equal(model(**given, **behind(cache)).logits, expected)


@pytest.mark.parametrize("tokens", [[[3, 4, 5]], [[3]]], ids=["words", "a word"])
@torch.no_grad()
def test_a_text_prompt_that_fails(tokens):
    model, _, reduction = reducing(SCRIPT)
    words = {"input_ids": torch.tensor(tokens)}
    with reduction:
        expected, cache = model(**words).logits, DynamicCache(config=model.config)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(model.model.layers[2].mlp, "forward", raising(RuntimeError))
            model(**words, **behind(cache))
        assert cache.get_seq_length() == 0
        assert torch.equal(model(**words, **behind(cache)).logits, expected)


@torch.no_grad()
def test_what_is_refused_leaves_every_layer_alone():
    """Those before the first reduction, too: a crop into the video, and a use outside of a reduction."""
    model, video, reduction = reducing(Scripted((2,), (), ()))
    with reduction:
        cache = cache_of(model(inputs_embeds=video))
        expected = model(**WORD, **behind(copy.deepcopy(cache))).logits
        with pytest.raises(ValueError, match="crop: length must be at least"):
            cache.crop(10)
        assert torch.equal(model(**WORD, **behind(copy.deepcopy(cache))).logits, expected)
    with pytest.raises(RuntimeError, match="holds a reduced prompt"):
        model(**WORD, **behind(cache))
    with fftriton.reduce(model, fftriton.KeepAll(), []):
        assert torch.equal(model(**WORD, **behind(cache)).logits, expected)


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
@torch.no_grad()
def test_a_cache_can_be_cropped_after_an_interrupt(copied):
    model, video, reduction = reducing(SCRIPT)
    with reduction:
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.tensor([[3, 4, 5]]), **behind(cache))
        expected = model(inputs_embeds=video, **behind(copy.deepcopy(cache))).logits
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.model.norm, "forward", raising(KeyboardInterrupt))
            model(inputs_embeds=video, **behind(cache))
        cache = copy.deepcopy(cache) if copied else cache
        cache.crop(3)
        assert torch.equal(model(inputs_embeds=video, **behind(cache)).logits, expected)


@torch.no_grad()
def test_a_hook_that_calls_the_model_during_a_step():
    """The step has nothing to reduce, so that it may; both come out as they do alone."""
    model, video, reduction = reducing(SCRIPT)
    busy, inner = [], []

    def again(*_):
        if not busy:
            busy.append(True)
            inner.append(model(**WORD).logits)

    with reduction:
        cache = cache_of(model(inputs_embeds=video))
        expected, alone = model(**WORD, **behind(copy.deepcopy(cache))).logits, model(**WORD).logits
        hook = model.model.layers[2].register_forward_hook(again)
        assert torch.equal(model(**WORD, **behind(cache)).logits, expected)
        hook.remove()
    assert torch.equal(inner[0], alone)


@torch.no_grad()
def test_a_reduced_cache_is_for_models_that_are_being_reduced():
    """A pickle of it is refused, and so is its use by another model while the block is open."""
    model, video, reduction = reducing(SCRIPT)
    other = copy.deepcopy(model)
    with reduction:
        cache = cache_of(model(inputs_embeds=video))
        stored = pickle.dumps(cache)
        with pytest.raises(RuntimeError, match="holds a reduced prompt"):
            other(**WORD, **behind(copy.deepcopy(cache)))
        expected = model(**WORD, **behind(copy.deepcopy(cache))).logits
        assert torch.equal(model(**WORD, **behind(pickle.loads(stored))).logits, expected)
    with pytest.raises(RuntimeError, match="holds a reduced prompt"):
        model(**WORD, **behind(pickle.loads(stored)))
