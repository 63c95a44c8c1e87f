"""The wrapper: right inside the block, and as if it had never been there behind it."""

import gc
from dataclasses import dataclass

import pytest
import torch
from by_hand import Scripted, check_by_hand, decoder_of, generate
from models import (
    Listening,
    behind,
    cache_of,
    snapshot,
    tiny_qwen2,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    video_embeddings,
    video_prompt,
)
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fftriton


def qwen2(attention="sdpa"):
    embeddings, layout = video_embeddings(6, 8)
    return tiny_qwen2(attention=attention), {"inputs_embeds": embeddings}, layout


def qwen2_vl(attention="sdpa"):
    return tiny_qwen2_vl(attention=attention), video_prompt(), None


def qwen2_5_vl(attention="sdpa"):
    return tiny_qwen2_5_vl(attention=attention), video_prompt(), None


FAMILIES = pytest.mark.parametrize("family", [qwen2, qwen2_vl, qwen2_5_vl])
BACKENDS = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@pytest.mark.feature("equals computation by hand")
@BACKENDS
@FAMILIES
def test_equals_a_recomputation_by_hand(family, attention):
    check_by_hand(*family(attention))


@pytest.mark.feature("keep-all bit-identical")
@BACKENDS
@FAMILIES
def test_keep_all_is_bit_identical(family, attention):
    model, inputs, layout = family(attention)
    tokens, logits = generate(model, inputs)
    with fftriton.reduce(model, fftriton.KeepAll(), layout) as reduction:
        kept_tokens, kept_logits = generate(model, inputs)
    assert torch.equal(kept_tokens, tokens)
    assert torch.equal(kept_logits, logits)
    assert reduction.report.budget_achieved == 1.0


@FAMILIES
def test_a_full_budget_is_bit_identical(family):
    model, inputs, layout = family()
    with torch.no_grad():
        dense = model(**inputs).logits
        with fftriton.reduce(model, fftriton.FrameFusion(1.0), layout):
            assert torch.equal(model(**inputs).logits, dense)


@FAMILIES
def test_without_cache_as_with_it(family):
    model, inputs, layout = family()
    with fftriton.reduce(model, fftriton.FrameFusion(0.3), layout):
        tokens, logits = generate(model, inputs)
        again, slow = generate(model, inputs, use_cache=False)
    assert torch.equal(tokens, again)
    assert (logits - slow).abs().max() < 1e-4


class Interrupted(BaseException):
    pass


@dataclass(frozen=True)
class Failing(fftriton.Method):
    """Raises in one stage of one layer."""

    stage: str = "before_attention"
    error: type = RuntimeError

    def begin(self, prompt):
        return _FailingState(self, prompt)


class _FailingState(fftriton.methods.MethodState):
    def wants_attention(self, layer):
        return True

    def before_attention(self, layer, tokens):
        if self.method.stage == "before_attention" and layer == 2:
            raise self.method.error
        return []

    def after_attention(self, layer, tokens):
        if self.method.stage == "after_attention" and layer == 2:
            raise self.method.error
        return []


@FAMILIES
@pytest.mark.parametrize("stage", ["nothing", "before_attention", "after_attention", "attention"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted], ids=lambda error: error.__name__)
def test_the_model_is_as_before(family, stage, error, monkeypatch):
    model, inputs, layout = family()
    with torch.no_grad():
        dense = model(**inputs).logits
    before = snapshot(model)

    def run(method):
        with torch.no_grad(), fftriton.reduce(model, method, layout):
            assert snapshot(model) != before
            model(**inputs)

    if stage == "nothing":
        run(fftriton.FrameFusion(0.3))
    elif stage == "attention":
        attention = decoder_of(model).layers[2].self_attn

        def broken(*args, **kwargs):
            raise error

        with pytest.raises(error), monkeypatch.context() as patch:
            patch.setattr(attention.o_proj, "forward", broken)
            run_inside(model, inputs, layout)
    else:
        with pytest.raises(error):
            run(Failing(stage, error))
    gc.collect()
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, dense)


def run_inside(model, inputs, layout):
    with torch.no_grad(), fftriton.reduce(model, Failing("nowhere"), layout):
        model(**inputs)


def test_apply_lasts_until_removed():
    model, inputs, layout = qwen2_vl()
    before = snapshot(model)
    handle = fftriton.apply(model, fftriton.FrameFusion(0.3), layout)
    with torch.no_grad():
        model(**inputs)
        reduced = model(**inputs).logits
    assert handle.report.budget_achieved < 0.35
    handle.remove()
    handle.remove()
    assert snapshot(model) == before
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, reduced)


def test_apply_framefusion_has_the_authors_parameters():
    model, inputs, layout = qwen2_vl()
    handle = fftriton.apply_framefusion(model, cost=0.4, similarity_lower_bound=0.7, ratio_lower_bound=0.2)
    assert handle.method == fftriton.FrameFusion(0.4, 0.7, 0.2, importance_queries=4)
    handle.remove()
    model, inputs, layout = qwen2()
    handle = fftriton.apply_framefusion(model, 0.4, 0.7, 0.2, layout=layout)
    assert handle.method == fftriton.FrameFusion(0.4, 0.7, 0.2, importance_queries=1)
    handle.remove()
    handle = fftriton.apply_framefusion(nn.ModuleList([qwen2_vl()[0]]))  # in a module without a config
    assert handle.method.importance_queries == 4
    handle.remove()
    with pytest.raises(TypeError, match="model must be a Hugging Face model, got str"):
        fftriton.apply_framefusion("model")
    handle = fftriton.apply(qwen2_vl()[0], fftriton.KeepAll(), verify=True)
    assert handle.verify
    handle.remove()


def test_nested_is_refused_and_leaves_the_outer_one_working():
    model, inputs, _ = qwen2_vl()
    with torch.no_grad(), fftriton.reduce(model, fftriton.FrameFusion(0.3)) as outer:
        with pytest.raises(RuntimeError, match="being reduced already"), fftriton.reduce(model, fftriton.KeepAll()):
            pass
        model(**inputs)
        assert outer.report.budget_achieved < 0.35


@FAMILIES
def test_report(family):
    model, inputs, layout = family()
    embeddings = inputs.get("inputs_embeds")
    before = None if embeddings is None else embeddings.clone()
    with (
        torch.no_grad(),
        fftriton.reduce(model, fftriton.FrameFusion(0.3, similarity_threshold=0.9), layout) as reduction,
    ):
        assert reduction.report is None
        model(**inputs)
    report = reduction.report
    video = torch.cat([layout.tokens for layout in report.layouts])
    length = (inputs["input_ids"] if embeddings is None else embeddings).shape[1]
    text = [place for place in range(length) if place not in video.tolist()]
    assert (report.num_tokens, report.num_video_tokens) == (length, len(video))
    assert report.tokens_per_layer == [len(kept) for kept in report.kept_positions]
    for kept, count in zip(report.kept_positions, report.vision_tokens_per_layer, strict=True):
        assert kept.dtype == torch.int64
        assert (kept.diff() > 0).all()
        assert torch.isin(torch.tensor(text), kept).all()
        assert int(torch.isin(kept, video).sum()) == count
    alive, counts = set(range(length)), []
    for step in report.merge_steps:
        assert step.tokens_before - step.tokens_after == len(step.merged) == len(step.into)
        assert set(step.merged.tolist()) <= alive
        alive -= set(step.merged.tolist())
        assert set(step.into.tolist()) <= alive
        counts.append(step.tokens_after)
    assert counts[0] == report.vision_tokens_per_layer[0]
    alive -= set(report.pruned.tolist())
    assert alive == set(report.kept_positions[-1].tolist())
    assert set(report.seconds) >= {"prefill", "merge"}
    assert all(seconds > 0 for seconds in report.seconds.values())
    if before is not None:
        assert torch.equal(embeddings, before)  # the caller's tensor is not written to


@pytest.mark.feature("attention scores")
@FAMILIES
@pytest.mark.parametrize("queries", [None, 1, 4])
def test_attention_is_what_eager_computes(family, queries):
    listening = Listening(queries, layers=(0, 2))
    model, inputs, layout = family("sdpa")
    eager, _, _ = family("eager")
    with torch.no_grad():
        with fftriton.reduce(model, listening, layout):
            model(**inputs)
        attentions = eager(**inputs, output_attentions=True).attentions
    assert sorted(listening.received) == [0, 2]
    for layer, scores in listening.received.items():
        weights = attentions[layer][0].mean(0)  # [N, N]
        expected = weights.sum(0) if queries is None else weights[-queries:].sum(0)
        assert (scores - expected).abs().max() < 1e-5


@pytest.mark.parametrize("padding", [0, 3])
def test_attention_to_a_video_behind_a_first_turn(padding):
    listening = Listening()
    first = torch.randint(2, 140, (1, padding + 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(1, padding + 7, dtype=torch.int64)
    mask[:, :padding] = 0
    video, layout = video_embeddings(4, 5)
    new = video.shape[1]

    def turns(model):
        cache = cache_of(model(input_ids=first, attention_mask=mask, use_cache=True))
        both = torch.cat([mask, torch.ones(1, new, dtype=torch.int64)], 1)
        return model(inputs_embeds=video, attention_mask=both, **behind(cache), output_attentions=True)

    with torch.no_grad():
        with fftriton.reduce(tiny_qwen2(), listening, lambda model, arguments: layout_of(arguments, layout)):
            turns(tiny_qwen2())
        attentions = turns(tiny_qwen2(attention="eager")).attentions
    for scores, weights in zip(listening.received.values(), attentions, strict=True):
        assert (scores - weights[0].mean(0)[:, -new:].sum(0)).abs().max() < 1e-5


def layout_of(arguments, layout):
    return layout if arguments.get("inputs_embeds") is not None else []


def test_a_registered_attention_function_is_called_without_the_positions_of_the_full_prompt():
    seen = []

    def attend(module, query, key, value, mask, position_ids=None, **kwargs):
        seen.append((query.shape[2], position_ids))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    _, inputs, layout = qwen2("eager")
    # its layers get the prompt's position ids; a new one, because recorded attentions leave traces in transformers 4.57
    model = tiny_qwen2.__wrapped__(attention="eager")
    expected, _, _ = qwen2("sdpa")
    method = fftriton.FrameFusion(0.3)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "recorded", attend)
        patch.setattr(model.config, "_attn_implementation", "recorded")
        model(**inputs)
        with fftriton.reduce(model, method, layout) as reduction:
            reduced = model(**inputs).logits[0, -1]
        with fftriton.reduce(expected, method, layout):
            assert (expected(**inputs).logits[0, -1] - reduced).abs().max() < 1e-4
    depth = len(reduction.report.tokens_per_layer)
    assert all(position_ids is not None for _, position_ids in seen[:depth])  # dense
    for (rows, position_ids), expected_rows in zip(seen[depth:], reduction.report.tokens_per_layer, strict=True):
        assert rows == expected_rows
        assert position_ids is None  # ids with gaps would look like packed sequences


def test_an_interrupted_forward_does_not_spoil_the_next():
    model, inputs, layout = qwen2()
    attention = decoder_of(model).layers[0].self_attn
    before = snapshot(model)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def interrupt(times):
        for _ in range(times):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(attention.q_proj, "forward", interrupted)
                model(**inputs)

    handle = fftriton.apply(model, fftriton.FrameFusion(0.3, similarity_threshold=0.9), layout)
    with torch.no_grad():
        expected = model(**inputs).logits
        interrupt(2)
        assert torch.equal(model(**inputs).logits, expected)
        interrupt(2)
    handle.remove()
    assert snapshot(model) == before


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, inputs, _ = qwen2_vl()
    pad = 5

    def padded(tensor, value):
        filler = torch.full((1, pad), value, dtype=tensor.dtype)
        return torch.cat([filler, tensor] if side == "left" else [tensor, filler], 1)

    wide = dict(inputs)
    for name, value in {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0}.items():
        if name in wide:
            wide[name] = padded(inputs[name], value)
    method = fftriton.FrameFusion(0.3, similarity_threshold=0.9)
    last = -1 if side == "left" else -1 - pad
    for attention in ("sdpa", "eager"):
        with torch.no_grad(), fftriton.reduce(tiny_qwen2_vl(attention=attention), method) as reduction:
            narrow = tiny_qwen2_vl(attention=attention)(**inputs).logits[0, -1]
            kept = reduction.report.kept_positions
            logits = tiny_qwen2_vl(attention=attention)(**wide).logits[0, last]
        shift = pad if side == "left" else 0
        video = reduction.report.layouts[0].tokens
        for before, after in zip(kept, reduction.report.kept_positions, strict=True):
            assert torch.equal(before[torch.isin(before + shift, video)] + shift, after[torch.isin(after, video)])
        assert (logits - narrow).abs().max() < 1e-4


def test_a_batch_of_text_passes():
    model, _, _ = qwen2_vl()
    text = torch.randint(2, 140, (3, 7))
    with torch.no_grad(), fftriton.reduce(model, fftriton.FrameFusion(0.3)) as reduction:
        reduced = model(input_ids=text).logits
        assert reduction.report is None
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, reduced)


def test_other_caches_run_unreduced_with_one_warning():
    model, inputs, layout = qwen2()
    length = inputs["inputs_embeds"].shape[1]
    with torch.no_grad():
        dense = model(**inputs, **behind(StaticCache(model.config, max_cache_len=length + 4))).logits
        with fftriton.reduce(model, fftriton.FrameFusion(0.3), layout):
            with pytest.warns(UserWarning, match="without reduction, because only a plain DynamicCache .* StaticCache"):
                logits = model(**inputs, **behind(StaticCache(model.config, max_cache_len=length + 4))).logits
    assert torch.equal(logits, dense)


def test_the_cache_reports_the_whole_sequence_and_holds_the_kept_rows():
    model, inputs, layout = qwen2()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), fftriton.reduce(model, fftriton.FrameFusion(0.3, 0.9), layout) as reduction:
        model(**inputs, **behind(cache))
        length = inputs["inputs_embeds"].shape[1]
        for layer, rows in zip(cache.layers, reduction.report.tokens_per_layer, strict=True):
            assert layer.get_seq_length() == length
            assert layer.keys.shape[-2] == rows < length
        model(input_ids=torch.tensor([[3, 4]]), **behind(cache))
        assert cache.get_seq_length() == length + 2
        cache.crop(-6)  # and the four words behind the video
        assert cache.layers[-1].keys.shape[-2] == reduction.report.tokens_per_layer[-1] - 4
        with pytest.raises(ValueError, match=rf"length must be at least {length - 4}"):
            cache.crop(-1)


@pytest.mark.parametrize("chunk", [1, 3])
def test_tokens_behind_a_reduced_prompt(chunk):
    """A second turn: rows appended later see the kept rows, one at a time or several at once."""
    for attention in ("sdpa", "eager"):
        model, inputs, layout = qwen2(attention)
        more = torch.randint(2, 140, (1, 6), generator=torch.Generator().manual_seed(3))
        with torch.no_grad(), fftriton.reduce(model, Scripted(), layout):
            cache = cache_of(model(**inputs, use_cache=True))
            parts = [model(input_ids=part, **behind(cache)).logits for part in more.split(chunk, 1)]
            everything = torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(more)], 1)
            whole = model(inputs_embeds=everything).logits[:, -6:]
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


def test_layers_get_their_hooks_one_ahead():
    """So that a GPU is at work while they are made."""
    model, inputs, layout = qwen2()
    layers = model.model.layers
    hooks = []

    def count(*_):
        hooks.append([len(layer._forward_pre_hooks) for layer in layers])

    watches = [part.register_forward_pre_hook(count) for part in (layers[0].mlp, model.model.norm)]
    before = [len(layer._forward_pre_hooks) for layer in layers]
    with fftriton.reduce(model, fftriton.FrameFusion(0.5), layout), torch.no_grad():
        for _ in range(2):
            model(**inputs)
    for watch in watches:
        watch.remove()
    rest = len(layers) - 2
    assert before == [0] * len(layers)
    assert hooks == [[1, 1] + [0] * rest, [1] * len(layers)] * 2


def test_a_layout_may_be_a_function_of_the_arguments():
    model, inputs, layout = qwen2()
    seen = []

    def rule(given, arguments):
        seen.append((given, set(arguments)))
        return layout if arguments.get("inputs_embeds") is not None and arguments["inputs_embeds"].shape[1] > 1 else []

    with fftriton.reduce(model, fftriton.FrameFusion(0.3), rule) as reduction:
        generate(model, inputs)
    assert reduction.report.budget_achieved < 0.35
    assert all(given is model for given, _ in seen)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (torch.tensor([[3, 4], [4, 5]]), ValueError, "they overlap"),
        (torch.tensor([[5, 4], [6, 7]]), ValueError, "they descend"),
        (torch.tensor([[-2, 4]]), ValueError, "-1 for a hole, got -2"),
        (torch.tensor([[-1, -1]]), ValueError, "only holes"),
        (torch.tensor([3, 4]), ValueError, r"shape \[F, P\].*got \[2\]"),
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, r"F, P >= 1, got \[0, 4\]"),
        (torch.tensor([[3.0]]), TypeError, "int64 tensor, got torch.float32"),
        ([[3, 4]], TypeError, "int64 tensor, got list"),
    ],
)
def test_layouts_that_cannot_be(positions, error, message):
    with pytest.raises(error, match=message):
        fftriton.VideoLayout(positions)


def test_layouts_that_do_not_fit_the_prompt():
    model, inputs, _ = qwen2()
    length = inputs["inputs_embeds"].shape[1]
    outside = [fftriton.VideoLayout(torch.tensor([[3, length]]))]
    twice = [fftriton.VideoLayout(torch.tensor([[3, 4]])), fftriton.VideoLayout(torch.tensor([[4, 5]]))]
    sample = [fftriton.VideoLayout(torch.tensor([[3, 4]]), sample=1)]
    for layout, message in [
        (outside, rf"this one gets positions 0 to {length - 1} of the sequence, and the video has 3 to {length}"),
        (twice, "must not overlap, but two of them hold position 4"),
        (sample, "sample must be below the batch size 1, got 1"),
    ]:
        with torch.no_grad(), fftriton.reduce(model, fftriton.FrameFusion(0.3), layout):
            with pytest.raises(ValueError, match=message):
                model(**inputs)


def test_ragged_layouts_with_holes():
    model, inputs, layout = qwen2()
    positions = layout[0].positions.clone()
    positions[1, 2] = positions[3, :4] = -1  # these tokens are text now
    ragged = [fftriton.VideoLayout(positions)]
    with torch.no_grad(), fftriton.reduce(model, fftriton.FrameFusion(0.4), ragged) as reduction:
        model(**inputs)
    report = reduction.report
    assert report.num_video_tokens == 43
    assert abs(report.budget_achieved - 0.4) <= 1 / 43
    text = layout[0].positions[positions < 0]
    assert all(torch.isin(text, kept).all() for kept in report.kept_positions)


def test_models_and_methods_that_cannot_be():
    layout = [fftriton.VideoLayout(torch.tensor([[3, 4]]))]
    method = fftriton.FrameFusion()
    for model in (torch.nn.Linear(2, 2), "a model"):
        with pytest.raises(TypeError, match="reduce: model must"):
            fftriton.reduce(model, method, layout)
    with pytest.raises(TypeError, match="layout must be given for Qwen2ForCausalLM"):
        fftriton.reduce(tiny_qwen2(), method)
    with pytest.raises(TypeError, match="method must be a fftriton.Method"):
        fftriton.reduce(tiny_qwen2(), 0.3, layout)
    with pytest.raises(TypeError, match="layout must be a list of VideoLayout"):
        fftriton.reduce(tiny_qwen2(), method, [[1, 2]])
