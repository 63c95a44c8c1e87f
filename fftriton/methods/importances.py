"""How important each token of a frame is, and which vectors say how similar two tokens are."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice
from .base import VideoTokens
from .frames import FrameContext, FrameRows

_SMALLEST_NORM = 1e-12

Importance = Callable[[FrameContext], Tensor]
"""A video -> how important each of its tokens is [F, P]."""

Keys = Callable[[FrameContext], Tensor]
"""A video -> a vector for each of its tokens [F, P, E]; the cosine of two says how similar the tokens are."""


def distinctness(x: Tensor, present: Tensor) -> Tensor:
    """x [F, P, D], present [F, P] bool -> [F, P] fp32: 1 - the cosine with the frame's mean direction.

    A token that is not finite is in no mean, and its distinctness is -1, below all others.
    """
    x = x.float()
    finite = x.isfinite().all(-1)
    x, present = x.masked_fill(~finite[..., None], 0.0), present & finite
    length = x.norm(dim=-1).clamp_min(_SMALLEST_NORM)
    mean = torch.bmm((present / length)[:, None], x)  # [F, 1, D]
    along = torch.bmm(x, mean.mT)[..., 0]
    return (1 - along / (length * mean.norm(dim=-1).clamp_min(_SMALLEST_NORM))).where(finite, -1.0)


def feature_norm(x: Tensor, present: Tensor) -> Tensor:
    """x [F, P, D] -> [F, P] fp32: the length of each token."""
    return x.float().norm(dim=-1)


IMPORTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"distinctness": distinctness, "norm": feature_norm}
"""Functions of tokens [F, P, D] and of which of them exist [F, P] bool, frame by frame."""

PREDICTOR = "predictor"
"""The name of the importance and the keys that come from the relevance predictor's vision tower."""


def check_importance(owner: str, importance: str | Importance, *, predictor: bool = True) -> None:
    """Raise a ValueError unless it is the name of an importance, the predictor's if it can be known, or a function."""
    if not callable(importance):
        check_choice(owner, "importance", importance, (*IMPORTANCES, PREDICTOR) if predictor else tuple(IMPORTANCES))
    elif _takes_tokens(importance):
        warnings.warn(
            f"{owner}: an importance of (tokens, present) is deprecated: it gets a FrameContext, with `hidden` and "
            "`present` of a whole video",
            DeprecationWarning,
            stacklevel=4,
        )


def check_keys(owner: str, keys: str | Keys) -> None:
    """Raise a ValueError unless it is the name of keys or a function."""
    if not callable(keys):
        check_choice(owner, "keys", keys, ("tokens", PREDICTOR))


def importance_of(owner: str, importance: str | Importance, tokens: VideoTokens, frames: FrameRows) -> Tensor:
    """[F, P] fp32: the importance of every token of a sample.

    Raises:
        TypeError, ValueError: a function returned something else than [F, P] numbers, or one that is not finite.
    """
    if isinstance(importance, str):
        _check_found(owner, "importance", importance)
        function = IMPORTANCES[importance]
        parts = frames.parts(tokens.hidden.shape[-1])
        return torch.cat([function(part.take(tokens.hidden), part.present) for part in parts])
    scores: list[Tensor] = []
    for context in frames.contexts(tokens):
        given = importance(context.hidden, context.present) if _takes_tokens(importance) else importance(context)  # type: ignore[call-arg, arg-type]
        check_values(owner, "importance", given, context, 2)
        scores.append(given.to(tokens.hidden.device, torch.float32))
    return frames.join(scores)


def keys_of(owner: str, keys: str | Keys, tokens: VideoTokens, frames: FrameRows) -> Tensor | None:
    """[F, P, E] fp32: the keys of every token of a sample; None if they are the tokens.

    Raises:
        TypeError, ValueError: a function returned something else than [F, P, E] numbers, or one that is not finite.
    """
    if isinstance(keys, str):
        _check_found(owner, "keys", keys)
        return None
    given: list[Tensor] = []
    for context in frames.contexts(tokens):
        vectors = keys(context)
        check_values(owner, "keys", vectors, context, 3)
        given.append(vectors.to(tokens.hidden.device, torch.float32))
    if len(widths := {one.shape[-1] for one in given}) > 1:
        raise ValueError(f"{owner}: keys must be of one width in all videos of a sample, got {sorted(widths)}")
    return frames.join(given)


def of_predictor(owner: str, name: str, relevance_of: Callable[[int], Any]) -> Callable[[FrameContext], Tensor]:
    """The importance or keys that the relevance of each video brings along.

    Args:
        owner: what the error message starts with.
        name: "importance" or "keys".
        relevance_of: the relevance of a video by its number in the batch.
    """

    def function(context: FrameContext) -> Tensor:
        patches = getattr(relevance_of(context.video), "patches", None)
        if patches is None:
            raise ValueError(
                f"{owner}: {name}='{PREDICTOR}' needs a relevance that knows patches, which SiglipRelevance.bind gives "
                f"with patches=True, got {relevance_of(context.video)!r} for video {context.video}"
            )
        return patches.importance(context) if name == "importance" else patches.vectors(context)

    return function


def _check_found(owner: str, name: str, value: str) -> None:
    if value == PREDICTOR:
        raise ValueError(f"{owner}: {name}='{PREDICTOR}' needs KVTP, which knows the predictor")


def check_values(owner: str, name: str, values: Any, context: FrameContext, ndim: int) -> None:
    """Raise unless these are finite numbers [F, P] or [F, P, E] for the tokens of the video."""
    if not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_complex():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{owner}: {name} must return a tensor of real numbers, got {got}")
    shape = tuple(context.present.shape)
    if values.ndim != ndim or tuple(values.shape[:2]) != shape:
        wanted = [*shape] if ndim == 2 else [*shape, "E"]
        raise ValueError(
            f"{owner}: {name} must return {wanted} for video {context.video}, one for each token, got "
            f"{list(values.shape)}"
        )
    finite = values.isfinite() if ndim == 2 else values.isfinite().all(-1)
    if not bool((finite | ~context.present.to(finite.device)).all()):
        raise ValueError(f"{owner}: {name} must be finite, got NaN or infinity for video {context.video}")


def _takes_tokens(function: Any) -> bool:
    """Whether a function wants the tokens and which of them exist, as in an earlier release."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    wanted = [part for part in parameters if part.kind <= part.POSITIONAL_OR_KEYWORD and part.default is part.empty]
    return len(wanted) == 2
