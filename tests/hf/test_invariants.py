"""Methods that return nonsense and decoders that are built otherwise: an error that names layer, method and rule."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from models import TEXT, behind, cache_of, rope, seeded, tiny_qwen2, tiny_qwen2_vl, video_embeddings, video_prompt

import fftriton
from fftriton.methods import MethodState, VideoTokens

FRAMES, PATCHES, BEFORE, AFTER = 4, 5, 3, 4


def kept(tokens):
    """A sound reduction: without the last two video tokens."""
    return tokens.keep_top(-tokens.position.float(), tokens.num_video - 2)


def rows(tokens, index, num_video):
    index = torch.tensor([index])
    return tokens.keep(index, num_video)


def all_rows(tokens):
    return list(range(tokens.length))


def write_to(tokens):
    tokens.hidden.mul_(2)


def grown(tokens):
    twice = torch.cat([torch.arange(tokens.length)] * 2)[None]
    return tokens.keep(twice, 2 * tokens.num_video)


NONSENSE = {
    "a tuple": (
        lambda tokens: (tokens.hidden, tokens.position),
        TypeError,
        "must return VideoTokens, a list of them or None, got tuple",
    ),
    "text dropped": (
        lambda tokens: rows(tokens, all_rows(tokens)[:-2], tokens.num_video),
        RuntimeError,
        "must keep the 7 rows that are no video",
    ),
    "text merged": (
        lambda tokens: tokens.merge_groups(torch.zeros(1, tokens.length, dtype=torch.int64)),
        RuntimeError,
        "must keep the 7 rows that are no video|num_video must be from 0",
    ),
    "text for video": (
        lambda tokens: rows(tokens, all_rows(tokens)[:-2], tokens.num_video - 2),
        RuntimeError,
        "num_video must be the number of video rows",
    ),
    "a row twice": (
        lambda tokens: rows(tokens, [0, 1, 2, 3, 3, *range(5, tokens.length)], tokens.num_video),
        RuntimeError,
        "position must ascend",
    ),
    "descending": (
        lambda tokens: rows(tokens, [0, 1, 2, 4, 3, *range(5, tokens.length)], tokens.num_video),
        RuntimeError,
        "position must ascend",
    ),
    "more rows": (grown, RuntimeError, "must not leave more than the 27 rows"),
    "wrong num_video": (
        lambda tokens: replace(kept(tokens), num_video=tokens.num_video),
        RuntimeError,
        "must keep the 7 rows|num_video must be",
    ),
    "positions rewritten": (
        lambda tokens: replace(kept(tokens), position=kept(tokens).position + 1),
        RuntimeError,
        "position must hold places of rows that it was given|patch must stay",
    ),
    "patches rewritten": (
        lambda tokens: replace(kept(tokens), patch=kept(tokens).patch.clamp(max=1)),
        RuntimeError,
        "patch must stay as it was",
    ),
    "NaN": (
        lambda tokens: replace(kept(tokens), hidden=kept(tokens).hidden * torch.nan),
        RuntimeError,
        "hidden must not become NaN",
    ),
    "NaN in one row": (
        lambda tokens: replace(kept(tokens), hidden=kept(tokens).hidden.index_fill(1, torch.tensor([7]), torch.nan)),
        RuntimeError,
        "hidden must not become NaN",
    ),
    "another dtype": (
        lambda tokens: replace(kept(tokens), hidden=kept(tokens).hidden.double()),
        RuntimeError,
        r"hidden must be \[1, 25, 64\] of torch.float32",
    ),
    "hidden states of other rows": (
        lambda tokens: replace(kept(tokens), hidden=tokens.hidden),
        RuntimeError,
        r"hidden must be \[1, 25, 64\] .* got \[1, 27, 64\]",
    ),
    "no companions": (
        lambda tokens: replace(kept(tokens), companions=()),
        RuntimeError,
        "companions must be 2 tensors, got 0",
    ),
    "a list of a tuple": (
        lambda tokens: [kept(tokens), (tokens.hidden,)],
        TypeError,
        "must return VideoTokens, a list of them or None, got tuple",
    ),
    "nonsense in the first step": (
        lambda tokens: [replace(kept(tokens), num_video=3), kept(tokens)],
        RuntimeError,
        "must keep the 7 rows that are no video",
    ),
    "no hidden states": (
        lambda tokens: replace(kept(tokens), hidden=None),
        TypeError,
        "hidden must be a tensor, got NoneType",
    ),
    "a list of positions": (
        lambda tokens: replace(kept(tokens), position=[[0, 1]]),
        TypeError,
        "position must be a tensor, got list",
    ),
    "flat positions": (
        lambda tokens: replace(kept(tokens), position=torch.tensor(3)),
        RuntimeError,
        r"position must be \[1, rows\], got \[\]",
    ),
    "no patch": (lambda tokens: replace(kept(tokens), patch=None), TypeError, "patch must be a tensor, got NoneType"),
    "companions in a list": (
        lambda tokens: replace(kept(tokens), companions=list(kept(tokens).companions)),
        TypeError,
        "companions must be a tuple of tensors, got list",
    ),
    "no additions": (
        lambda tokens: replace(kept(tokens), additions=None),
        TypeError,
        "additions must be a tuple of tensors, got NoneType",
    ),
    "a tensor for num_video": (
        lambda tokens: replace(kept(tokens), num_video=torch.tensor(18)),
        TypeError,
        "num_video must be an integer, got Tensor",
    ),
    "roots for a merge": (
        lambda tokens: replace(kept(tokens), merge=tokens.position),
        TypeError,
        "merge must be a Merge or None, got Tensor",
    ),
    "an edit in place": (write_to, RuntimeError, "must not write to the tensors it is given"),
}


@dataclass(frozen=True)
class Nonsense(fftriton.Method):
    """Does this in one stage of one layer."""

    what: str
    stage: str
    layer: int

    def begin(self, prompt):
        return _NonsenseState(self, prompt)


class _NonsenseState(MethodState):
    def before_attention(self, layer, tokens):
        return self.answer("before_attention", layer, tokens)

    def after_attention(self, layer, tokens):
        return self.answer("after_attention", layer, tokens)

    def answer(self, stage, layer, tokens):
        method = self.method
        return NONSENSE[method.what][0](tokens) if (layer, stage) == (method.layer, method.stage) else None


@pytest.mark.parametrize("what", NONSENSE)
@pytest.mark.parametrize(("stage", "layer"), [("before_attention", 0), ("after_attention", 1)])
@torch.no_grad()
def test_what_a_method_returns(what, stage, layer):
    model, (video, layout) = tiny_qwen2(), video_embeddings(FRAMES, PATCHES, before=BEFORE, after=AFTER)
    _, error, rule = NONSENSE[what]
    with fftriton.reduce(model, Nonsense(what, stage, layer), layout) as reduction:
        cache = transformers.DynamicCache(config=model.config)
        with pytest.raises(error, match=f"Nonsense.*{stage} of layer {layer}: .*({rule})"):
            model(inputs_embeds=video, **behind(cache))
        assert cache.get_seq_length() == 0
        assert reduction.report is None


def test_hidden_states_that_are_not_a_number_already():
    """The model's own NaN is no fault of a method."""
    model, (video, layout) = tiny_qwen2(), video_embeddings(FRAMES, PATCHES)
    video[0, 6] = torch.nan
    with torch.no_grad(), fftriton.reduce(model, fftriton.FrameFusion(0.5, 0.9), layout) as reduction:
        assert model(inputs_embeds=video).logits.isnan().any()
    assert reduction.report.budget_achieved < 0.6


@dataclass(frozen=True)
class RewritesText(fftriton.methods.BeforeLayers):
    """Changes a text row, which only a thorough look finds."""

    budget: float = 0.95

    def shorten(self, tokens, prompt):
        left = kept(tokens)
        return replace(left, hidden=left.hidden.index_fill(1, torch.tensor([1]), 0.5))


@torch.no_grad()
def test_verify():
    model, inputs = tiny_qwen2_vl(), video_prompt()
    for method in (
        fftriton.FrameFusion(0.3, 0.9), fftriton.FastV(0.6), fftriton.KVTP(0.3), fftriton.RandomTokens(0.3, 0),
        fftriton.TemporalMerge(0.4) + fftriton.FastV(0.3, layer=1), fftriton.UniformFrames(0.4),
        fftriton.StreamingLLM(0.4), fftriton.KVTP(0.3, pruner="tome"), fftriton.KVTP(0.3, pruner="prumerge"),
        fftriton.EVS(0.4), fftriton.VidCom2(0.4), fftriton.DyCoke(0.4), fftriton.VisionZip(0.4),
        fftriton.FlashVID(0.4), fftriton.FastVID(0.4), fftriton.STSimDiff(0.4, 0.3),
    ):  # fmt: skip
        with fftriton.reduce(model, method) as reduction:
            expected = model(**inputs).logits
        with fftriton.reduce(model, method, verify=True):
            assert torch.equal(model(**inputs).logits, expected)
        assert reduction.report.budget_achieved < 0.7
    with fftriton.reduce(model, RewritesText()):
        model(**inputs)
    with pytest.raises(RuntimeError, match="hidden must stay as it was in text rows"):
        with fftriton.reduce(model, RewritesText(), verify=True):
            model(**inputs)
    with pytest.raises(TypeError, match="verify must be True or False, got 1"):
        fftriton.reduce(model, RewritesText(), verify=1)


# ---- decoders of another structure

SMALL = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"} | {"num_hidden_layers": 3}


def gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, head_dim=16, **rope(rope_theta=1e4)))


def granite():
    config = transformers.GraniteConfig(**SMALL, residual_multiplier=0.3, **rope(rope_theta=1e4))
    return transformers.GraniteForCausalLM(config)


def olmo2():
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SMALL))


def glm4v():
    text = TEXT | {"num_hidden_layers": 3, "head_dim": 16} | rope(rope_theta=1e4, mrope_section=[2, 3, 3])
    vision = {
        "depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 16, "patch_size": 4, "out_hidden_size": 64,
        "intermediate_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = transformers.Glm4vConfig(text_config=text, vision_config=vision)
    return transformers.Glm4vForConditionalGeneration(config)


@pytest.mark.parametrize("build", [gemma2, granite, glm4v])
def test_decoders_whose_layers_add_up_differently(build):
    layout = [fftriton.VideoLayout(torch.tensor([[3, 4]]))]
    with pytest.raises(TypeError, match="layer 0 of the decoder must be built as norm, attention, residual, norm"):
        fftriton.reduce(seeded(build()), fftriton.KeepAll(), layout)


def test_decoders_that_lack_a_norm():
    """Olmo2's layers have no norm before their attention."""
    with pytest.raises(TypeError, match="model must have a Qwen2-style decoder"):
        fftriton.reduce(olmo2(), fftriton.KeepAll(), [fftriton.VideoLayout(torch.tensor([[3, 4]]))])


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen3"])
@torch.no_grad()
def test_decoders_of_other_names_and_the_same_structure(kind):
    """Structure decides, not a list of names."""
    settings = SMALL | ({"sliding_window": None} if kind == "Mistral" else {})
    config = getattr(transformers, f"{kind}Config")(**settings, **rope(rope_theta=1e4))
    model, (video, layout) = seeded(getattr(transformers, f"{kind}ForCausalLM")(config)), video_embeddings(6, 8)
    dense = model(inputs_embeds=video).logits
    with fftriton.reduce(model, fftriton.KeepAll(), layout):
        assert torch.equal(model(inputs_embeds=video).logits, dense)
    with fftriton.reduce(model, fftriton.FastV(0.7, layer=1), layout) as reduction:
        model(inputs_embeds=video)
    assert reduction.report.budget_achieved == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("method", [fftriton.KeepAll(), fftriton.FastV(0.7, layer=1)], ids=str)
@torch.no_grad()
def test_the_first_prompt_shows_what_could_not_be_run_before(method, monkeypatch):
    """Weights that are not there yet, say: in a layer that is shortened, and in one that is not."""
    model, (video, layout) = seeded(gemma2()), video_embeddings(6, 8)
    forward = model.model.layers[0].forward
    monkeypatch.setattr(model.model.layers[0], "forward", lambda *args, **kwargs: forward(*args, **kwargs))
    monkeypatch.setattr("fftriton.hf.reduction.check_decoder", lambda decoder: next(iter(behind(None))))
    model.config.layer_types = ["full_attention"] * 3
    with fftriton.reduce(model, method, layout):
        with pytest.raises(TypeError, match="layer 0 of the decoder must be built as"):
            model(inputs_embeds=video)


def test_the_look_at_the_structure_leaves_no_trace():
    """No hook of the user's runs, nothing changes, no random number is drawn."""
    model, calls = copy.deepcopy(tiny_qwen2()).train(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fftriton.reduce(model, fftriton.KeepAll(), [fftriton.VideoLayout(torch.tensor([[3, 4]]))])
    assert torch.equal(torch.rand(1), expected)
    assert calls == []
    assert all(module.training for module in model.modules())


@dataclass(frozen=True)
class OneLess(fftriton.methods.BeforeLayers):
    """Drops one video token before the first layer."""

    budget: float = 0.9

    def shorten(self, tokens, prompt):
        return tokens.keep_top(tokens.hidden[..., 0], tokens.num_video - 1)


@pytest.mark.parametrize("given", [{"use_cache": False}, behind(transformers.DynamicCache())], ids=["no cache", "bare"])
@torch.no_grad()
def test_sliding_windows_run_unreduced(given):
    config = transformers.MistralConfig(**SMALL, sliding_window=6, **rope(rope_theta=1e4))
    model, (video, layout) = seeded(transformers.MistralForCausalLM(config)), video_embeddings(6, 8)
    dense = model(inputs_embeds=video, use_cache=False).logits
    with fftriton.reduce(model, OneLess(), layout) as reduction:
        with pytest.warns(UserWarning, match="without reduction, because .*sliding"):
            assert torch.equal(model(inputs_embeds=video, **given).logits, dense)
    assert reduction.report is None


@torch.no_grad()
def test_packed_sequences_are_refused():
    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    both = torch.cat([video, torch.ones(1, 12, 64)], 1)
    positions = torch.cat([torch.arange(video.shape[1]), torch.arange(12)])[None]
    with fftriton.reduce(model, OneLess(), layout):
        with pytest.raises(RuntimeError, match="position_ids must not start anew"):
            model(inputs_embeds=both, position_ids=positions, use_cache=False)
        model(inputs_embeds=both, use_cache=False)


@torch.no_grad()
def test_a_decoder_that_stops_early():
    model, (video, layout) = copy.deepcopy(tiny_qwen2()), video_embeddings(6, 8)
    model.config.num_hidden_layers = 3
    for use_cache in (False, True):
        with fftriton.reduce(model, OneLess(), layout):
            with pytest.raises(RuntimeError, match="must run each of its 5 layers, but ran 3"):
                model(inputs_embeds=video, use_cache=use_cache)


class Routed(torch.nn.Module):
    """A feed-forward block that returns its routing, too."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden), hidden


@torch.no_grad()
def test_feed_forward_blocks_that_return_a_tuple(monkeypatch):
    model, (video, layout) = copy.deepcopy(tiny_qwen2()), video_embeddings(6, 8)
    with fftriton.reduce(model, fftriton.FastV(0.6), layout):
        expected = model(inputs_embeds=video).logits
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp)

    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states = residual + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        fed, _ = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + fed

    def with_names(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        arguments = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        return forward(self, hidden_states, **arguments, **kwargs)

    monkeypatch.setattr(type(layer), "forward", with_names)
    with fftriton.reduce(model, fftriton.FastV(0.6), layout):
        assert (model(inputs_embeds=video).logits - expected).abs().max() < 1e-5


@dataclass(frozen=True)
class Answers(fftriton.Method):
    """Answers `begin` or `window` with this."""

    of: str
    answer: object

    def begin(self, prompt):
        return self.answer if self.of == "begin" else _AnswersState(self, prompt)


class _AnswersState(MethodState):
    def window(self, length):
        return self.method.answer if self.method.of == "window" else None


@pytest.mark.parametrize(("of", "answer"), [("begin", None), ("begin", 3), ("window", (4, 8)), ("window", 2)])
@torch.no_grad()
def test_answers_of_another_kind(of, answer):
    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    with fftriton.reduce(model, Answers(of, answer), layout):
        with pytest.raises(TypeError, match=f"Answers.*: {of} must return a "):
            model(inputs_embeds=video)


@pytest.mark.parametrize("values", [(-3, 4), (0, 0), (0.5, 4), (2, 4.5)])
def test_windows_that_cannot_be(values):
    with pytest.raises((TypeError, ValueError), match="Window: (sinks|recent) must be"):
        fftriton.methods.Window(*values)


# ---- failures that are noticed at the next call


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_decode_step_that_fails_can_be_repeated(error, attention):
    model, (video, layout) = tiny_qwen2(attention=attention), video_embeddings(6, 8)
    word = {"input_ids": torch.tensor([[3]])}

    def broken(*args, **kwargs):
        raise error

    with fftriton.reduce(model, fftriton.FastV(0.6), lambda _, given: layout if "inputs_embeds" in given else []):
        first, second = (cache_of(model(inputs_embeds=video)) for _ in range(2))
        expected = [model(**word, **behind(first)).logits for _ in range(2)]
        assert torch.equal(model(**word, **behind(second)).logits, expected[0])
        with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
            patch.setattr(model.model.layers[1].mlp.down_proj, "forward", broken)
            model(**word, **behind(second))
        assert torch.equal(model(**word, **behind(second)).logits, expected[1])


@torch.no_grad()
def test_a_cache_whose_layers_disagree_is_refused():
    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    with fftriton.reduce(model, fftriton.FastV(0.6), layout):
        cache = cache_of(model(inputs_embeds=video))
        cache.layers[2].crop(-1)
        with pytest.raises(RuntimeError, match=r"must stand for one sequence, but their lengths are \[55, 55, 54"):
            model(input_ids=torch.tensor([[3]]), **behind(cache))


@dataclass(frozen=True)
class Asks(fftriton.methods.BeforeLayers):
    """Calls the model while it is at work on it."""

    model: object
    budget: float = 0.5

    def shorten(self, tokens, prompt):
        self.model(input_ids=torch.tensor([[3, 4]]))


@torch.no_grad()
def test_a_model_that_is_called_from_within():
    model, (video, layout) = tiny_qwen2(), video_embeddings(6, 8)
    dense, dense_text = model(inputs_embeds=video).logits, model(input_ids=torch.tensor([[5, 6, 7]])).logits
    with fftriton.reduce(model, Asks(model), layout), pytest.raises(RuntimeError, match="must not call the model"):
        model(inputs_embeds=video)
    cache = transformers.DynamicCache(config=model.config)

    def call_again(*_):
        if not busy:
            busy.append(True)
            calls.append(model(input_ids=torch.tensor([[3, 4]])).logits)

    expected, calls = model(input_ids=torch.tensor([[3, 4]])).logits, []
    busy = []
    hook = model.model.layers[1].mlp.register_forward_hook(call_again)
    with fftriton.reduce(model, fftriton.FastV(0.6), lambda _, given: layout if "inputs_embeds" in given else []):
        with pytest.raises(RuntimeError, match="a hook must not call the model while a call of it is being reduced"):
            model(inputs_embeds=video, **behind(cache))
        assert cache.get_seq_length() == 0
        busy.clear()
        assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]])).logits, dense_text)
    assert torch.equal(calls[0], expected)  # where nothing is reduced it may
    hook.remove()
    assert torch.equal(model(inputs_embeds=video).logits, dense)


def test_tokens_have_the_fields_that_are_checked():
    """A field that joins them has to be looked at, too."""
    known = {"hidden", "position", "patch", "num_video", "companions", "additions", "sizes"}
    assert set(VideoTokens.__dataclass_fields__) - known == {"attention", "first_layers", "merge", "_links"}
