"""Which methods can run inside vLLM, and what they do to one video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import VideoLayout
from ..methods import KVTP, Chain, Method
from ..methods.base import Prompt, VideoTokens, list_steps
from ..methods.own_attention import OwnAttention
from ..methods.text import from_dict
from . import KEY

_INSTEAD = "use TemporalMerge, which merges as FrameFusion does, but before the first layer and to an exact count"
_TRIED = ((1, 1), (1, 6), (5, 1), (4, 9), (7, 12))  # frames and patches for which a count is tried out


def method_of(config: Any) -> Method:
    """The method that `--hf-overrides` has put into a model's configuration.

    Raises:
        TypeError, ValueError: there is none, or it is not one that can run here.
    """
    description = getattr(config, KEY, None)
    if not isinstance(description, Mapping):
        raise TypeError(
            f"fftriton: --hf-overrides must hold '{KEY}' with a method, such as "
            f'{{"method": "temporalmerge", "budget": 0.3}}, got {description!r}'
        )
    method = from_dict(description)
    if reason := refusal(method):
        raise ValueError(f"fftriton: {reason}")
    return method


def refusal(method: Method) -> str | None:
    """Why a method cannot run inside vLLM; None if it can."""
    name = type(method).__name__
    if isinstance(method, Chain):
        return f"a chain of methods cannot run inside vLLM, which lays out the prompt beforehand: {_INSTEAD}"
    if method.proportional:
        return f"{name}: proportional must be False inside vLLM, whose attention knows no sizes"
    if method.count(4, 9) is None:
        return (
            f"{name} cannot run inside vLLM, which gives all layers the same tokens, and counts them before it sees "
            f"the video: {_INSTEAD}"
        )
    if isinstance(method, KVTP):
        if isinstance(method.relevance, OwnAttention):
            return f"{name}: relevance must come with each request, because vLLM runs no layer beforehand"
        if method.renumbers:
            return f"{name}: renumber must be False, because vLLM decides how positions go on"
        if method.make_pruner().wants_predictor:
            return f"{name}: pruner must not want the predictor's patches, which requests do not bring along"
    return None


def try_out(method: Method) -> None:
    """Raise a ValueError if the method does not leave as many tokens as it says: vLLM would cut or mix them up."""
    for frames, patches in _TRIED:
        promised, hidden = method.count(frames, patches), torch.randn(frames * patches, 8)
        left, _ = shorten(method, hidden, frames, patches)
        if len(left) != promised:
            raise ValueError(
                f"fftriton: {type(method).__name__}.count must be the number of tokens that it leaves, {len(left)} of "
                f"a video of {frames} frames of {patches}, got {promised}"
            )


def pruning_rate(method: Method) -> float | None:
    """What vLLM has to take for the fraction of video tokens that are dropped; None if none ever is."""
    left = sum(method.count(frames, patches) or 0 for frames, patches in _TRIED)
    total = sum(frames * patches for frames, patches in _TRIED)
    return None if left == total else 1 - left / total


def shorten(
    method: Method, embeddings: Tensor, frames: int, patches: int, relevance: Tensor | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tokens that a method leaves of one video.

    Args:
        method: one that is not refused.
        embeddings: [F * P, D], frame by frame; or [F * P, n * D], where later layers add all but the first D columns to
            hidden states (Qwen3-VL's deepstack features).
        frames, patches: F and P.
        relevance: [F] for KVTP; None gives every frame the same number of tokens.
        width: D; None if there are no additions.

    Returns:
        Their embeddings [K, n * D], and their places in the video [K] int64, ascending.
    """
    if relevance is not None:
        assert isinstance(method, KVTP)
        method = replace(method, relevance=relevance)
    place = torch.arange(frames * patches, device=embeddings.device)[None]
    hidden, *additions = embeddings[None].split(width or embeddings.shape[1], -1)
    tokens = VideoTokens(hidden, place, place % patches, frames * patches, additions=tuple(additions))
    layout = VideoLayout(torch.arange(frames * patches).view(frames, patches))
    prompt = Prompt(num_layers=1, length=frames * patches, layouts=[layout])
    left = [tokens, *list_steps(method.begin(prompt).before_attention(0, tokens))][-1]
    return torch.cat([left.hidden, *left.additions], -1)[0], left.position[0]
