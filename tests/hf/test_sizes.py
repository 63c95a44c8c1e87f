"""Sizes in attention: a row that stands for n tokens counts as n of them, in every back end, batch, turn and step."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from attention_backends import BACKENDS, attention
from by_hand import ByHand, Scripted, patches, see_prompt
from by_hand import generate as generate_words
from families import FAMILIES, collate
from models import QWEN_FAMILIES, Listening, behind, cache_of, qwen2, snapshot, tiny_qwen2, video_embeddings
from transformers import DynamicCache

import fftriton
from fftriton.hf.sizes import Carriers
from fftriton.methods import KVTP, Chain, Method, OwnAttention
from fftriton.methods.base import Prompt, start
from fftriton.methods.tome import ToMe

SCRIPT = Scripted(proportional=True)
ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
FRAMES, PATCHES, BEFORE, AFTER = 4, 6, 3, 5
MERGING = {
    "framefusion": lambda **more: fftriton.FrameFusion(0.4, similarity_threshold=0.3, **more),
    "temporalmerge": lambda **more: fftriton.TemporalMerge(0.4, **more),
    "flashvid": lambda **more: fftriton.FlashVID(0.4, **more),
    "visionzip": lambda **more: fftriton.VisionZip(0.4, **more),
    "tome": lambda **more: KVTP(0.4, pruner=ToMe(**more)),
    "chain": lambda **more: fftriton.TemporalMerge(0.5, **more) + fftriton.FastV(0.3, layer=1),
}


# ---- off, or nothing merged


@QWEN_FAMILIES
@ALL_BACKENDS
@torch.no_grad()
def test_a_method_that_keeps_every_row_is_bit_identical_to_dense(family, backend):
    model, inputs, layout = family()
    with attention(model, backend):
        dense = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for method in (fftriton.FrameFusion(1.0, proportional=True), fftriton.TemporalMerge(1.0, proportional=True)):
            with fftriton.reduce(model, method, layout):
                out = model.generate(
                    **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
            assert torch.equal(torch.cat(out.logits), torch.cat(dense.logits))


@pytest.mark.parametrize("name", MERGING)
@torch.no_grad()
def test_sizes_change_the_answer_and_not_what_is_kept(name):
    model, inputs, layout = qwen2()
    logits, kept = [], []
    for proportional in (False, True):
        method = MERGING[name](proportional=proportional)
        assert method.proportional == proportional
        before = snapshot(model)
        with fftriton.reduce(model, method, layout) as reduction:
            logits.append(model(**inputs).logits[0, -1])
        kept.append(reduction.report.kept_positions[0])
        assert snapshot(model) == before
    assert torch.equal(*kept)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in MERGING if name != "framefusion"])
def test_sizes_add_up_to_the_tokens_of_the_prompt(name):
    embeddings, layouts = video_embeddings(FRAMES, PATCHES)
    method = MERGING[name](proportional=True)
    method = method.methods[0] if isinstance(method, Chain) else method
    tokens = tokens_of(embeddings, layouts)
    steps = start(method, Prompt(5, embeddings.shape[1], layouts)).before_attention(0, tokens)
    left = steps[1] if name == "flashvid" else steps  # its last step drops some
    assert left.length < tokens.length
    assert left.sizes.shape == left.position.shape
    assert left.sizes.sum() == tokens.length
    assert (left.sizes[left.patch < 0] == 1).all()
    dropped = left.keep_top(torch.arange(left.length)[None].float(), 3)
    assert torch.equal(dropped.sizes, left.sizes.gather(1, torch.searchsorted(left.position, dropped.position)))


def test_rows_have_no_sizes_until_some_merge():
    tokens = tokens_of(*video_embeddings(FRAMES, PATCHES))
    alone = torch.arange(tokens.length)[None]
    assert tokens.merge_groups(alone, proportional=True).sizes is None
    roots = alone.clone()
    roots[0, BEFORE + PATCHES] = BEFORE
    merged = tokens.merge_groups(roots, proportional=True)
    assert merged.sizes.flatten().tolist() == [2 if row == BEFORE else 1 for row in range(tokens.length - 1)]
    roots = torch.arange(merged.length)[None]
    roots[0, BEFORE] = BEFORE - 1
    assert (merged.merge_groups(roots).sizes == 1).all()  # the root's own
    assert merged.merge_groups(roots, proportional=True).sizes[0, BEFORE - 1] == 3


def tokens_of(embeddings, layouts):
    patch = torch.tensor([patches(layouts, embeddings.shape[1])])
    position = torch.arange(embeddings.shape[1])[None]
    return fftriton.methods.VideoTokens(embeddings, position, patch, int((patch >= 0).sum()))


# ---- n equal keys, and one of size n


def one_layer_without_positions(monkeypatch):
    model = copy.deepcopy(tiny_qwen2(1))
    rotary = model.model.rotary_emb.forward

    def nowhere(*args, **kwargs):
        cos, sin = rotary(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)

    monkeypatch.setattr(model.model.rotary_emb, "forward", nowhere)
    return model


def still_video():
    """Every frame shows the same."""
    embeddings, layouts = video_embeddings(FRAMES, PATCHES, before=BEFORE, after=AFTER)
    video = embeddings[:, BEFORE : BEFORE + PATCHES].repeat(1, FRAMES, 1)
    return torch.cat([embeddings[:, :BEFORE], video, embeddings[:, -AFTER:]], 1), layouts


@ALL_BACKENDS
@torch.no_grad()
def test_one_key_of_size_n_is_as_good_as_n_equal_keys(backend, monkeypatch):
    model, (embeddings, layout) = one_layer_without_positions(monkeypatch), still_video()
    more = [torch.tensor([[7, 8]]), torch.tensor([[9]])]
    outputs = {}
    with attention(model, backend):
        for name, proportional in (("dense", None), ("with", True), ("without", False)):
            keep = fftriton.KeepAll()
            method = keep if proportional is None else fftriton.TemporalMerge(1 / FRAMES, proportional=proportional)
            with fftriton.reduce(model, method, layout):
                first = model(inputs_embeds=embeddings, use_cache=True)
                cache, found = cache_of(first), [first.logits[0, -AFTER:]]
                found += [model(input_ids=ids, **behind(cache)).logits[0] for ids in more]
            outputs[name] = torch.cat(found)
    assert (outputs["with"] - outputs["dense"]).abs().max() < 1e-5
    assert (outputs["without"] - outputs["dense"]).abs().max() > 1e-2


@dataclass(frozen=True)
class MergeAndListen(Method):
    """TemporalMerge, and the attention that is received then."""

    listening: Listening
    budget: float = 1 / FRAMES
    proportional: bool = True

    def begin(self, prompt):
        merging = start(fftriton.TemporalMerge(self.budget, proportional=True), prompt)
        state = start(self.listening, prompt)
        state.before_attention = merging.before_attention
        return state


@ALL_BACKENDS
@torch.no_grad()
def test_a_key_of_size_n_receives_the_attention_of_n_keys(backend, monkeypatch):
    model, (embeddings, layout) = one_layer_without_positions(monkeypatch), still_video()
    dense, merged = Listening(AFTER), Listening(AFTER)
    with attention(model, backend):
        with fftriton.reduce(model, dense, layout):
            model(inputs_embeds=embeddings, use_cache=False)
        with fftriton.reduce(model, MergeAndListen(merged), layout):
            model(inputs_embeds=embeddings, use_cache=False)
    video = dense.received[0][BEFORE:-AFTER].view(FRAMES, PATCHES).sum(0)
    torch.testing.assert_close(merged.received[0][BEFORE:-AFTER], video, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_logarithm_is_exact_in_half_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 5, 7, generator=generator).to(dtype) for heads in (4, 2))
    sizes = torch.randint(1, 5000, (2, 5), generator=generator).float()
    wide_query, wide_key, value = Carriers.of(sizes.log(), 0.3, key).added_to(query, key, key[..., :3])
    assert wide_query.shape[-1] == wide_key.shape[-1] == 16  # a multiple of 8
    assert torch.equal(value[..., :3], key[..., :3])
    scores = 0.3 * (wide_query.double() @ wide_key.double().repeat_interleave(2, 1).mT)
    expected = 0.3 * (query.double() @ key.double().repeat_interleave(2, 1).mT) + sizes.double().log()[:, None, None]
    assert (scores - expected).abs().max() < (1e-6 if dtype == torch.float32 else 3e-4)


# ---- by hand: decode, beams, turns, chunks


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_decode_equals_a_computation_by_hand(family):
    model, inputs = FAMILIES[family].model(), FAMILIES[family].inputs()
    with fftriton.reduce(model, SCRIPT) as reduction:
        tokens, logits = generate_words(model, inputs)
    prompt = see_prompt(model, inputs)
    by_hand = ByHand(model, patches(reduction.report.layouts, prompt.embeddings.shape[1]))
    by_hand.check(prompt, SCRIPT, tokens, logits)
    with torch.no_grad():
        without = by_hand.logits(prompt, Scripted(), tokens[:-1])
    assert (logits - without).abs().max() > 1e-2


@ALL_BACKENDS
def test_every_back_end_equals_the_computation_by_hand(backend):
    model, inputs, layout = qwen2()
    with attention(model, backend), fftriton.reduce(model, SCRIPT, layout) as reduction:
        tokens, logits = generate_words(model, inputs)
    prompt = see_prompt(model, inputs)
    ByHand(model, patches(reduction.report.layouts, prompt.embeddings.shape[1])).check(prompt, SCRIPT, tokens, logits)


@torch.no_grad()
def test_beams():
    model, inputs = FAMILIES["qwen2_vl"].model(), FAMILIES["qwen2_vl"].inputs()
    with fftriton.reduce(model, SCRIPT) as reduction:
        out = model.generate(
            **inputs, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    prompt = see_prompt(model, inputs)
    by_hand = ByHand(model, patches(reduction.report.samples[0].layouts, prompt.embeddings.shape[1]))
    for sequence, score in zip(out.sequences[:, -6:], out.sequences_scores, strict=True):
        chosen = by_hand.logits(prompt, SCRIPT, sequence[:-1]).log_softmax(-1).gather(1, sequence[:, None])
        assert abs(chosen.sum() / 6 - score) < 1e-4


@pytest.mark.parametrize("video", [True, False], ids=["with a video", "of text"])
@torch.no_grad()
def test_second_turn_and_crop(video):
    family = FAMILIES["qwen2_vl"]
    model, first = family.model(), family.inputs((4,))
    second = family.inputs((4,) if video else (), image=False, seed=5)
    length = first["input_ids"].shape[1]
    del second["attention_mask"]
    if not video:
        second = {"input_ids": second["input_ids"]}
    cache = DynamicCache(config=model.config.get_text_config())
    with fftriton.reduce(model, SCRIPT) as reduction:
        model(**first, **behind(cache))
        patch = patches(reduction.report.layouts, length)
        model(input_ids=torch.tensor([[3, 4]]), **behind(cache))
        cache.crop(length)
        assert all(layer.log_sizes.shape[1] == layer.rows for layer in cache.layers)
        logits = model(**second, **behind(cache)).logits[0, -1:]
        if video:
            patch += patches(reduction.report.layouts, second["input_ids"].shape[1])
            sized = [index for index, layer in enumerate(cache.layers) if layer.log_sizes is not None]
            assert reduction.report.sized_layers == sized  # those of the first turn count in the second one
    prompt = see_prompt(model, first, second)
    expected = ByHand(model, patch, starts=(0, length)).logits(prompt, SCRIPT)
    assert (logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_a_later_block_without_sizes_honours_those_of_the_cache():
    model, inputs, layout = qwen2()
    ids = torch.tensor([[5, 6, 7]])
    answers = []
    for later in (fftriton.TemporalMerge(0.4, proportional=True), fftriton.KeepAll()):
        with fftriton.reduce(model, fftriton.TemporalMerge(0.4, proportional=True), layout):
            cache = copy.deepcopy(cache_of(model(**inputs, use_cache=True)))
        with fftriton.reduce(model, later, layout):
            answers.append(model(input_ids=ids, **behind(cache)).logits)
    assert torch.equal(*answers)


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_sizes_as_they_were():
    model, inputs, layout = qwen2()
    with fftriton.reduce(model, SCRIPT, layout):
        cache = cache_of(model(**inputs, use_cache=True))
        expected = model(input_ids=torch.tensor([[5]]), **behind(copy.deepcopy(cache))).logits
        hook = model.model.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(input_ids=torch.tensor([[5, 6]]), **behind(cache))
        hook.remove()
        assert torch.equal(model(input_ids=torch.tensor([[5]]), **behind(cache)).logits, expected)


def fail(*_):
    raise RuntimeError("on purpose")


@torch.no_grad()
def test_layers_with_the_same_sizes_share_them(monkeypatch):
    model, inputs, layout = qwen2()
    made, make = [], Carriers.of
    monkeypatch.setattr(Carriers, "of", lambda *given: made.append(given) or make(*given))
    with fftriton.reduce(model, fftriton.TemporalMerge(0.4, proportional=True), layout):
        cache = cache_of(model(**inputs, use_cache=True))
        assert len(made) == 1
        for steps in (2, 3):
            model(input_ids=torch.tensor([[7]]), **behind(cache))
            assert len(made) == steps
        sizes = [layer.log_sizes for layer in cache.layers]
        assert all(one is sizes[0] for one in sizes)
        cache.crop(-1)  # each layer for itself
        model(input_ids=torch.tensor([[7]]), **behind(cache))
        assert len(made) == 4
        assert all(torch.equal(layer.log_sizes, sizes[0]) for layer in cache.layers)


# ---- batches


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
@torch.no_grad()
def test_a_padded_batch_equals_its_samples(backend):
    family = FAMILIES["qwen2_vl"]
    model, method = family.model(), MERGING["framefusion"](proportional=True)
    samples = [family.inputs(videos=(4,)), family.inputs(videos=(4, 4), seed=1), family.inputs(videos=(), seed=2)]
    batch = collate(samples, "left")
    arguments = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with attention(model, backend), fftriton.reduce(model, method):
        together = torch.stack(model.generate(**batch, **arguments).logits, 1)
    for row, sample in enumerate(samples):
        with fftriton.reduce(model, method):
            alone = torch.cat(model.generate(**sample, **arguments).logits)
        assert (together[row] - alone).abs().max() < 1e-4
    with fftriton.reduce(model, MERGING["framefusion"](proportional=False)):
        without = torch.stack(model.generate(**batch, **arguments).logits, 1)
    assert (together[:2] - without[:2]).abs().amax((1, 2)).min() > 1e-3


@torch.no_grad()
def test_a_window_forgets_sizes_with_their_rows():
    """Chained with a method that restricts attention, as without a cache, where nothing is forgotten."""
    model, inputs, layout = qwen2()
    method = fftriton.TemporalMerge(0.5, proportional=True) + fftriton.StreamingLLM(0.4, sinks=4)
    more = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with fftriton.reduce(model, method, layout):
        cache = cache_of(model(**inputs, use_cache=True))
        assert all(layer.log_sizes.shape[1] == layer.rows for layer in cache.layers)
        assert any(bool(layer.log_sizes.any()) for layer in cache.layers)
        later = [model(inputs_embeds=part, **behind(cache)).logits[0, -1] for part in more.split(1, 1)]
        assert all(layer.log_sizes.shape[1] == layer.rows for layer in cache.layers)
    assert torch.stack(later).isfinite().all()


# ---- what cannot have sizes is refused


REFUSED = {
    "attn_logit_softcapping": (30.0, "whose scores are capped"),
    "head_dim": (256, "heads of more than 248 channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_have_sizes_is_refused(name, monkeypatch):
    model, _, layout = qwen2()
    value, message = REFUSED[name]
    monkeypatch.setattr(model.config, name, value, raising=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"reduce: proportional must be False for .*{message}"):
        fftriton.reduce(model, MERGING["chain"](proportional=True), layout)
    assert snapshot(model) == before
    with fftriton.reduce(model, MERGING["chain"](proportional=False), layout):
        pass


@pytest.mark.skipif("qwen3_5" not in FAMILIES, reason="not in this release")
def test_recurrent_layers_are_refused():
    with pytest.raises(ValueError, match=r"proportional must be False for .*, whose layer 0 is recurrent"):
        fftriton.reduce(FAMILIES["qwen3_5"].model(), MERGING["tome"](proportional=True))


@torch.no_grad()
def test_attention_that_does_not_take_the_sizes_is_an_error(monkeypatch):
    model, inputs, layout = qwen2()
    layer = model.model.layers[2].self_attn
    own = layer.forward

    def deaf(*args, **kwargs):  # asks its own note of the config
        noted, layer.config = layer.config, getattr(layer.config, "original", layer.config)
        try:
            return own(*args, **kwargs)
        finally:
            layer.config = noted

    monkeypatch.setattr(layer, "forward", deaf)
    with fftriton.reduce(model, SCRIPT, layout), pytest.raises(RuntimeError, match="attention of layer 2 has not got"):
        model(**inputs)


def test_gradient_checkpointing_is_refused():
    model, inputs, layout = copy.deepcopy(tiny_qwen2()), *qwen2()[1:]
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with fftriton.reduce(model, SCRIPT, layout), pytest.raises(ValueError, match="must be False under gradient check"):
        model(**inputs)
    with fftriton.reduce(model, Scripted(), layout):
        model(**inputs)


@dataclass(frozen=True)
class Sized(Method):
    """Gives rows sizes of its own."""

    sizes: object = None
    proportional: bool = True

    def begin(self, prompt):
        return SizedState(self, prompt)


class SizedState(fftriton.methods.MethodState):
    def before_attention(self, layer, tokens):
        if layer:
            return []
        left = tokens.keep_top(torch.arange(tokens.length)[None].float(), 10)
        return replace(left, sizes=self.method.sizes(left.length))


@pytest.mark.parametrize(
    ("sizes", "proportional", "message"),
    [
        (lambda n: torch.ones(1, n), False, "sizes must be None unless the method is proportional"),
        (lambda n: torch.ones(1, n + 1), True, "sizes must be .* of torch.float32"),
        (lambda n: torch.ones(1, n, dtype=torch.int64), True, "sizes must be .* of torch.float32"),
        (lambda n: torch.arange(n)[None].float(), True, "sizes must be above 0 and finite"),
        (lambda n: torch.full((1, n), torch.inf), True, "sizes must be above 0 and finite"),
        (lambda n: 3, True, "sizes must be a tensor or None, got int"),
    ],
)
@torch.no_grad()
def test_impossible_sizes_are_an_error(sizes, proportional, message):
    model, inputs, layout = qwen2()
    with (
        fftriton.reduce(model, Sized(sizes, proportional), layout),
        pytest.raises((RuntimeError, TypeError), match=message),
    ):
        model(**inputs)


class SizesAlone(SizedState):
    """Leaves all rows: as they are, or taken together anew."""

    anew = False

    def before_attention(self, layer, tokens):
        if layer:
            return []
        left = tokens.keep(torch.arange(tokens.length)[None], tokens.num_video) if self.anew else tokens
        return replace(left, sizes=self.method.sizes(left.length))


@torch.no_grad()
def test_a_method_may_set_sizes_and_nothing_else(monkeypatch):
    model, inputs, layout = qwen2()
    dense, logits = model(**inputs).logits, []
    monkeypatch.setattr(Sized, "begin", lambda method, prompt: SizesAlone(method, prompt))
    for anew in (False, True):
        monkeypatch.setattr(SizesAlone, "anew", anew)
        with fftriton.reduce(model, Sized(lambda n: torch.arange(1.0, n + 1)[None]), layout):
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)
    assert (logits[0] - dense).abs().max() > 1e-3


@torch.no_grad()
def test_attention_ahead_of_the_first_layer_has_the_sizes_in_every_layer(monkeypatch):
    model, inputs, layout = qwen2()
    calls, layers = [], len(model.model.layers)
    add = Carriers.added_to
    monkeypatch.setattr(Carriers, "added_to", lambda *given: calls.append(1) or add(*given))
    method = fftriton.TemporalMerge(0.5, proportional=True) + fftriton.KVTP(0.3, OwnAttention(2, layers - 1))
    with fftriton.reduce(model, method, layout):
        model(**inputs)
    assert layers > 3
    assert len(calls) == layers + layers


class Doubling(SizedState):
    def before_attention(self, layer, tokens):
        if layer:
            tokens.sizes.mul_(2)
        return super().before_attention(layer, tokens)


def test_sizes_that_are_written_to_are_an_error(monkeypatch):
    monkeypatch.setattr(Sized, "begin", lambda method, prompt: Doubling(method, prompt))
    model, inputs, layout = qwen2()
    with (
        torch.no_grad(),
        fftriton.reduce(model, Sized(lambda n: torch.ones(1, n)), layout),
        pytest.raises(RuntimeError, match="before_attention of layer 1: must not write to the tensors it is given"),
    ):
        model(**inputs)


@pytest.mark.parametrize("kind", [fftriton.FrameFusion, fftriton.TemporalMerge, fftriton.FlashVID, fftriton.VisionZip])
def test_proportional_is_a_bool(kind):
    with pytest.raises(TypeError, match="proportional must be True or False, got 1"):
        kind(0.3, proportional=1)
    assert fftriton.methods.parse(f"{kind.__name__.lower()}:proportional=True", budget=0.3).proportional


def test_a_serving_engine_is_told_that_it_cannot_count():
    for name in ("temporalmerge", "flashvid", "visionzip", "tome"):
        assert MERGING[name](proportional=True).count(4, 9) is None
        assert MERGING[name](proportional=False).count(4, 9) == 14
