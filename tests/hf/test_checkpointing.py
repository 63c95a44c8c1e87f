"""Gradient checkpointing: a layer's second run repeats what the first one did, and the gradients are the same."""

import copy
import functools
from dataclasses import dataclass, field, replace

import pytest
import torch
from families import FAMILIES, collate
from models import behind, cache_of, snapshot, tiny_qwen2, video_embeddings
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.modeling_layers import GradientCheckpointingLayer

import fftriton
from fftriton.methods import MethodState

METHODS = {
    "framefusion": fftriton.FrameFusion(0.5, similarity_threshold=0.5),
    "fastv": fftriton.FastV(0.6, layer=1),
    "chain": fftriton.TemporalMerge(0.5) + fftriton.FastV(0.3, layer=2),
    "streaming": fftriton.StreamingLLM(0.5),
    "flashvid": fftriton.FlashVID(0.5, similarity_threshold=0.5) + fftriton.FastV(0.4, layer=2),
    "visionzip": fftriton.VisionZip(0.5) + fftriton.FastV(0.4, layer=2),
}
WAYS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
HOOKS_RUN_AGAIN = "__call__" in vars(GradientCheckpointingLayer)  # until 5.2x


def checkpointing(model, reentrant, **options):
    """Turn it on, and see to it that the embeddings need a gradient, as PEFT does."""
    new = getattr(model, "activation_checkpointing_enable", None)  # renamed in 5.24
    name = "gradient_checkpointing_kwargs" if new is None else "activation_checkpointing_kwargs"
    enable = new or model.gradient_checkpointing_enable
    enable(**{name: {"use_reentrant": reentrant}}, **options)
    model.enable_input_require_grads()


def qwen2():
    embeddings, layout = video_embeddings(6, 8)
    return tiny_qwen2(), {"inputs_embeds": embeddings.requires_grad_()}, layout


def of_family(name):
    return FAMILIES[name].model(), FAMILIES[name].inputs(), None


def padded():
    samples = [FAMILIES["qwen2_vl"].inputs(videos, seed=seed) for seed, videos in enumerate([(4, 4), (3,), (5,)])]
    return FAMILIES["qwen2_vl"].model(), collate(samples, "left"), None


PROMPTS = {name: functools.partial(of_family, name) for name in ("qwen2_vl", "qwen3_vl", "qwen3_5")}
PROMPTS |= {"qwen2": qwen2, "padded": padded}
CASES = [("qwen2", name) for name in METHODS] + [
    ("qwen2_vl", "framefusion"), ("qwen3_vl", "chain"), ("qwen3_5", "fastv"), ("padded", "framefusion"),
]  # fmt: skip


def train_step(model, inputs, method, layout):
    """Logits, gradients by name, and the report of one step whose backward pass comes after the block."""
    with fftriton.reduce(model, method, layout) as reduction:
        logits = model(**inputs).logits
    logits[:, -5:].logsumexp(-1).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logits.detach(), gradients, reduction.report


def assert_same(given, expected):
    assert torch.equal(given[0], expected[0])
    assert given[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(given[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    for sample, other in zip(given[2].samples, expected[2].samples, strict=True):
        assert all(map(torch.equal, sample.kept_positions, other.kept_positions))


@WAYS
@pytest.mark.parametrize(("prompt", "method"), CASES)
def test_gradients_are_those_without_checkpointing(prompt, method, reentrant):
    (base, inputs, layout), method = PROMPTS[prompt](), METHODS[method]
    plain, checkpointed = copy.deepcopy(base).train(), copy.deepcopy(base).train()
    checkpointing(checkpointed, reentrant)
    before = snapshot(checkpointed)
    is_lost = reentrant and HOOKS_RUN_AGAIN and base.config.model_type == "qwen3_vl"
    if is_lost:
        with pytest.raises(ValueError, match="must use use_reentrant=False here"):
            train_step(checkpointed, inputs, method, layout)
    else:
        expected = train_step(plain, inputs, method, layout)
        rows = {len(kept) for sample in expected[2].samples for kept in sample.kept_positions}
        assert len(rows) > 1 or expected[2].samples[0].window is not None
        assert_same(train_step(checkpointed, inputs, method, layout), expected)
    assert snapshot(checkpointed) == before


@dataclass(frozen=True)
class Asked(fftriton.Method):
    """Drops every other token of the video in layer 1, and counts how often it was asked. adds: to what is left."""

    adds: float = 0.0
    calls: list = field(default_factory=list, compare=False)

    def begin(self, prompt):
        return _AskedState(self, prompt)


class _AskedState(MethodState):
    def after_attention(self, layer, tokens):
        self.method.calls.append(layer)
        if layer != 1:
            return []
        kept = ((tokens.patch[0] < 0) | (torch.arange(tokens.length) % 2 == 0)).nonzero()[:, 0]
        left = tokens.keep(kept[None], int((tokens.patch[0, kept] >= 0).sum()))
        return [replace(left, hidden=left.hidden + self.method.adds) if self.method.adds else left]


@WAYS
def test_the_method_is_asked_once(reentrant):
    model, inputs, layout = qwen2()
    model = copy.deepcopy(model).train()
    checkpointing(model, reentrant)
    train_step(model, inputs, method := Asked(), layout)
    assert method.calls == [0, 1, 2, 3, 4]


def test_a_method_that_changes_rows_cannot_be_repeated():
    model, inputs, layout = qwen2()
    model = copy.deepcopy(model).train()
    train_step(model, inputs, Asked(adds=1.0), layout)
    checkpointing(model, False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"must be off for Asked.*after_attention of layer 1 does more"):
        train_step(model, inputs, Asked(adds=1.0), layout)
    assert snapshot(model) == before


def test_some_layers_only():
    base, inputs, layout = qwen2()
    plain, checkpointed = copy.deepcopy(base).train(), copy.deepcopy(base).train()
    checkpointing(checkpointed, False)
    for layer in checkpointed.model.layers[::2]:
        layer.gradient_checkpointing = False
    method = METHODS["framefusion"]
    assert_same(train_step(checkpointed, inputs, method, layout), train_step(plain, inputs, method, layout))


def test_other_kinds_of_checkpointing_are_refused():
    model, inputs, layout = qwen2()
    wrapped = copy.deepcopy(model).train()
    for index, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[index] = checkpoint_wrapper(layer)
    with pytest.raises(TypeError, match="a decoder layer must not be within a CheckpointWrapper"):
        fftriton.reduce(wrapped, METHODS["fastv"], layout)


def test_layers_that_do_it_by_code_of_their_own_are_refused():
    """Remote code may call torch's checkpoint itself, as transformers' models once did."""
    model, inputs, layout = qwen2()
    old = copy.deepcopy(model).train()
    old.model.gradient_checkpointing = True
    for layer in old.model.layers:
        layer.__class__ = type("OldLayer", (torch.nn.Module,), {**vars(type(layer)), "gradient_checkpointing": False})
    with fftriton.reduce(old, METHODS["fastv"], layout):
        with pytest.raises(ValueError, match="must be that of transformers .* got layers of OldLayer"):
            old(**inputs)
        with torch.no_grad():
            old(**inputs)


def test_a_cache_is_not_filled():
    """Layers that run again do without one, so nothing may follow in it."""
    model, inputs, layout = qwen2()
    model = copy.deepcopy(model).train()
    checkpointing(model, False)
    with fftriton.reduce(model, METHODS["fastv"], layout):
        assert cache_of(model(**inputs, use_cache=True)) is None
        with torch.no_grad():
            cache = cache_of(model.eval()(**inputs))
        model.train()
        with pytest.raises(ValueError, match="the KV cache must be empty under gradient checkpointing"):
            model(input_ids=torch.tensor([[3, 4]]), **behind(cache))


def test_prompts_without_a_video_run_as_they_are():
    model = copy.deepcopy(FAMILIES["qwen2_vl"].model()).train()
    ids = torch.arange(2, 12)[None]
    expected = model(input_ids=ids).logits
    checkpointing(model, False)
    with fftriton.reduce(model, METHODS["fastv"]):
        logits = model(input_ids=ids).logits
        logits.sum().backward()
    assert torch.equal(logits, expected)
