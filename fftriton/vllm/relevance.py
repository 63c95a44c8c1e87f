"""The relevance of frames to a question, as a request brings it along for KVTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..relevance.bound import of_token_frames

KEY = "fftriton_relevance"
"""Its key in a request's `mm_processor_kwargs`: a list of numbers for each video, one number a frame of tokens."""


def of_request(kwargs: Mapping[str, Any], videos: int) -> list[Tensor] | None:
    """The scores [F] of each video of a request, or None if it brings none.

    Raises:
        TypeError, ValueError: something else than a list of finite numbers for each of the videos.
    """
    given = kwargs.get(KEY)
    if given is None:
        return None
    if not _is_list(given) or not all(map(_is_list, given)):
        raise TypeError(f"fftriton: {KEY} must be a list of numbers for each video, got {_shown(given)}")
    if len(given) != videos:
        raise ValueError(f"fftriton: {KEY} must be a list for each video of the request, {videos}, got {len(given)}")
    return [_as_scores(one) for one in given]


def check_frames(scores: Tensor, frames: int) -> None:
    """Raise a ValueError unless there is one score for each frame of tokens."""
    if len(scores) != frames:
        raise ValueError(f"fftriton: {KEY} must hold one number for each frame of tokens, {frames}, got {len(scores)}")


def for_request(scores: Sequence[Any], frames: Sequence[int] | None = None) -> dict[str, list[list[float]]]:
    """What a client puts into `mm_processor_kwargs`.

        relevance = SiglipRelevance.from_pretrained("google/siglip-so400m-patch14-384")
        kwargs = for_request([relevance(video.frames, question)], [len(video.frames) // 2])

    Args:
        scores: [T] for each video of the request, as SiglipRelevance returns them.
        frames: frames of tokens of each; if they are fewer than the scores, as in Qwen2-VL, where a token stands for
            two frames, the highest of the frames' scores counts. None for one score a frame of tokens.

    Raises:
        ValueError: a video's T frames cannot have become so many.
    """
    tensors = [torch.as_tensor(one).detach().float().cpu() for one in scores]
    if frames is not None:
        tensors = [of_token_frames(one, count) for one, count in zip(tensors, frames, strict=True)]
    return {KEY: [one.tolist() for one in tensors]}


def _as_scores(numbers: Any) -> Tensor:
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise TypeError(f"fftriton: {KEY} must hold numbers, got {_shown(numbers)}")
    scores = torch.tensor(
        [max(min(number, 1e39), -1e39) for number in numbers], dtype=torch.float32
    )  # no float has 10**400
    if not bool(scores.isfinite().all()):
        raise ValueError(f"fftriton: {KEY} must be finite, got {scores[~scores.isfinite()][0].item()}")
    return scores


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
