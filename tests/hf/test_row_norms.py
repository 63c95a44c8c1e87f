"""The log-sum-exps of the model's own attention save a pass over the scores; only the right ones are taken."""

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, collate
from models import Listening, qwen2
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fftriton
from fftriton.hf import importance


@pytest.fixture
def norms(monkeypatch):
    """The lse of every column sum, on a CPU as on a GPU."""
    monkeypatch.setattr(importance, "_WHOLE_ROWS", ())
    seen, column_sum = [], importance.attention_column_sum

    def recorded(*args, lse=None, **kwargs):
        seen.append(lse)
        return column_sum(*args, lse=lse, **kwargs)

    monkeypatch.setattr(importance, "attention_column_sum", recorded)
    return seen


@torch.no_grad()
def scores(model, inputs, layout, attention="sdpa", **about):
    """What every layer hears of a prompt."""
    model.get_decoder().config._attn_implementation = attention
    listening = Listening(None)
    try:
        with fftriton.reduce(model, listening, layout):
            model(**inputs, **about)
    finally:
        model.get_decoder().config._attn_implementation = "sdpa"
    return list(listening.received.values())


@pytest.fixture
def replace_sdpa():
    """Puts a function of a user's in the place of transformers' for sdpa."""
    yield lambda function: AttentionInterface.register("sdpa", function)
    AttentionInterface.register("sdpa", sdpa_attention_forward)


def test_one_prompt_takes_them_from_sdpa(norms, monkeypatch):
    model, inputs, layout = qwen2()
    taken = scores(model, inputs, layout)
    assert norms
    assert all(lse is not None for lse in norms)
    monkeypatch.setattr(importance, "_FLASH_KERNELS", ())
    norms.clear()
    for mine, computed in zip(taken, scores(model, inputs, layout), strict=True):
        torch.testing.assert_close(mine, computed, rtol=1e-6, atol=1e-6)
    assert norms
    assert all(lse is None for lse in norms)


def test_a_cpu_does_without(monkeypatch):
    kept = []
    monkeypatch.setattr(importance._RowNorms, "__enter__", lambda self: kept.append(self))
    monkeypatch.setattr(importance._RowNorms, "__exit__", lambda *error: None)
    assert scores(*qwen2())
    assert not kept


def test_eager_attention_has_none(norms):
    scores(*qwen2(), "eager")
    assert norms
    assert all(lse is None for lse in norms)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_none(norms, side):
    family = FAMILIES["qwen2_vl"]
    batch = collate([family.inputs(videos=(4,)), family.inputs(videos=(2,), seed=1)], side)
    scores(family.model(), batch, None)
    assert norms
    assert all(lse is None for lse in norms)


def sharper(module, query, key, value, mask, scaling=None, **kwargs):
    """Attends with other queries than those it is given."""
    return sdpa_attention_forward(module, 2 * query, key, value, mask, scaling=scaling, **kwargs)


def rescaled(module, query, key, value, mask, scaling=None, **kwargs):
    """Attends with another scale than the one it is given."""
    return sdpa_attention_forward(module, query, key, value, mask, scaling=2 * scaling, **kwargs)


def twice(module, query, key, value, mask, scaling=None, **kwargs):
    """Attends to its keys, and to others."""
    sdpa_attention_forward(module, query, -key, value, mask, scaling=scaling, **kwargs)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)


def both_ways(module, query, key, value, mask, scaling=None, **kwargs):
    """Attends to later keys, too."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


@pytest.mark.parametrize("function", [sharper, rescaled, twice, both_ways])
def test_those_of_other_scores_are_not_taken(norms, function, replace_sdpa):
    replace_sdpa(function)
    scores(*qwen2())
    assert norms
    assert all(lse is None for lse in norms)


def test_other_attention_is_not_watched(norms):
    """A dispatch mode would change how it runs: compiled functions, for example."""
    AttentionInterface.register("a_users_own", sdpa_attention_forward)
    try:
        scores(*qwen2(), "a_users_own")
    finally:
        AttentionInterface._global_mapping.pop("a_users_own")
    assert norms
    assert all(lse is None for lse in norms)


def test_a_kernel_that_returns_something_else_is_not_believed(norms, monkeypatch):
    """A later PyTorch may return it in another layout, or another dtype."""
    model, inputs, layout = qwen2()
    keep = importance._RowNorms._causal_norm
    for change in (lambda lse: lse.transpose(1, 2), lambda lse: lse.double()):
        monkeypatch.setattr(
            importance._RowNorms, "_causal_norm",
            lambda self, given, out, change=change: keep(self, given, (out[0], change(out[1]))),
        )  # fmt: skip
        norms.clear()
        scores(model, inputs, layout)
        assert all(lse is None for lse in norms)
