"""Pruners: how a frame is shortened to the number of tokens that it may keep.

A pruner works within each frame, on all frames at once. The remaining tokens stay in raster and time order.

Sources: PruMerge, arXiv:2403.15388, as KVTP uses it, arXiv:2503.10742. ToMe is in tome.py.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import topk_keep

from ..checks import check_choice, check_count, check_seed
from .base import VideoTokens
from .frames import FrameRows
from .importances import (
    PREDICTOR,
    Importance,
    Keys,
    check_importance,
    check_keys,
    importance_of,
    keys_of,
    of_predictor,
)


class Pruner(ABC):
    """Shortens each frame to its count.

    Attributes:
        may_drop: whether all tokens of a frame may vanish. A pruner that merges and drops nothing keeps at least one.
        proportional: as for a Method.
    """

    may_drop: ClassVar[bool] = True
    proportional: bool = False

    @property
    def wants_predictor(self) -> bool:
        """Whether importance or keys are to be those of the relevance predictor."""
        return PREDICTOR in (getattr(self, "importance", None), getattr(self, "keys", None))

    def with_predictor(self, relevance_of: Callable[[int], Any]) -> Pruner:
        """The pruner with the importance and keys of the predictor, if it wants them.

        Args:
            relevance_of: the relevance of a video by its number in the batch.
        """
        owner, found = type(self).__name__, {}
        for name in ("importance", "keys"):
            if getattr(self, name, None) == PREDICTOR:
                found[name] = of_predictor(owner, name, relevance_of)
        return replace(self, **found) if found else self  # type: ignore[type-var]

    @abstractmethod
    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        """The tokens that stay.

        Args:
            tokens: all tokens of one sample.
            frames: the rows of each frame.
            counts: [F] int64, the number of tokens to keep, from 1 to the frame's size.
            total: the sum of `counts`.
        """


@dataclass(frozen=True)
class RandomPruner(Pruner):
    """Keep random tokens of each frame. The draw depends only on the seed and the length of the prompt.

    Args:
        seed: of the draw, at least 0.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("RandomPruner", "seed", self.seed)

    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(1, tokens.length, generator=generator).to(counts.device)
        return tokens.keep(best_rows(tokens, frames, frames.take(scores), counts, total), total)


@dataclass(frozen=True)
class TopKPruner(Pruner):
    """Keep the most important tokens of each frame, ties to the earlier one.

    Args:
        importance: "distinctness" (1 - the cosine with the frame's mean: how much a token differs from the rest of the
            frame), "norm" (the token's), "predictor" (the attention in the pooling head of the vision tower by which
            KVTP's relevance was found), or a function of a FrameContext that returns [F, P] for its video.

    Raises:
        ValueError: an unknown importance. While it runs, TypeError or ValueError for what the function returns.
    """

    importance: str | Importance = "distinctness"

    def __post_init__(self) -> None:
        check_importance("TopKPruner", self.importance)

    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        scores = importance_of("TopKPruner", self.importance, tokens, frames)
        return tokens.keep(best_rows(tokens, frames, scores, counts, total), total)


@dataclass(frozen=True)
class PruMerge(Pruner):
    """Keep the most important tokens of each frame, and add to each the tokens that are similar to it.

    A kept token becomes x_i + sum of a_j x_j over its nearest tokens (by the cosine of their keys, in its frame), and
    so does what the decoder adds to it in its first layers.

    Args:
        importance: as for TopKPruner.
        neighbours: number of nearest tokens, at least 1.
        keys: "tokens", "predictor" (the keys in that pooling head), or a function of a FrameContext that returns
            vectors [F, P, E] for its video.
        weights: what a is: "softmax" of the importance over the frame, or the "importance" itself.
        adds: which of the nearest tokens are added: the "dropped" ones, or "all".

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs, what a function returns.

    Source:
        PruMerge, arXiv:2403.15388. The code of KVTP, arXiv:2503.10742, has weights="importance" and adds="all", with
        importance and keys from the pooling head of the vision tower.
    """

    importance: str | Importance = "distinctness"
    neighbours: int = 32
    keys: str | Keys = "tokens"
    weights: str = "softmax"
    adds: str = "dropped"

    def __post_init__(self) -> None:
        check_importance("PruMerge", self.importance)
        check_count("PruMerge", "neighbours", self.neighbours, 1)
        check_keys("PruMerge", self.keys)
        check_choice("PruMerge", "weights", self.weights, ("softmax", "importance"))
        check_choice("PruMerge", "adds", self.adds, ("dropped", "all"))

    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        scores = importance_of("PruMerge", self.importance, tokens, frames)
        keys = keys_of("PruMerge", self.keys, tokens, frames)
        rows = best_rows(tokens, frames, scores, counts, total)
        stays = torch.zeros_like(tokens.position, dtype=torch.bool).scatter_(1, rows, True)
        weights = scores.masked_fill(~frames.present, float("-inf")).softmax(1) if self.weights == "softmax" else scores
        left, start, host_counts = tokens.keep(rows, total), 0, counts.tolist()
        for part in frames.parts(tokens.hidden.shape[-1]):
            own = slice(start, start := start + len(part.rows))
            kept = part.take(stays) & part.present
            added = part.present if self.adds == "all" else part.present & ~kept
            x = part.take(tokens.hidden).float()
            column, near = self._nearest(x if keys is None else keys[own], part.present, kept, max(host_counts[own]))
            shares, places = near * weights[own].where(added, 0)[:, None], part.rows.gather(1, column.clamp_min(0))
            for whole, to in zip((tokens.hidden, *tokens.additions), (left.hidden, *left.additions), strict=True):
                values = x if whole is tokens.hidden else part.take(whole).float()
                kept_ones = values.gather(1, column.clamp_min(0)[..., None].expand(-1, -1, values.shape[-1]))
                put(to, rows, places, column >= 0, kept_ones + torch.bmm(shares, values), sum(host_counts[own]))
        return left

    def _nearest(self, keys: Tensor, present: Tensor, kept: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The columns [F, K] that are kept, -1 for padding, and which ones are nearest to them [F, K, P] bool."""
        column, _ = topk_keep(kept.float(), kept.sum(1), capacity=most)
        index = column.clamp_min(0)
        patches = present.shape[1]
        others = present[:, None] & (torch.arange(patches, device=keys.device) != index[..., None])
        similarity = cosines(keys, index).masked_fill(~others, float("-inf"))
        count = min(self.neighbours, patches)
        near, _ = topk_keep(similarity.flatten(0, 1), count, capacity=count)
        return column, torch.zeros_like(others).scatter_(2, near.view(*index.shape, count), True) & others


def cosines(x: Tensor, index: Tensor) -> Tensor:
    """x [F, P, D] fp32, index [F, K] -> [F, K, P]: the cosines of these tokens of each frame with all its tokens."""
    direction = F.normalize(x, dim=-1)
    return torch.bmm(direction.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), direction.mT)


def best_rows(tokens: VideoTokens, frames: FrameRows, scores: Tensor, counts: Tensor, total: int) -> Tensor:
    """[1, M] int64: each frame's `counts` best rows by `scores` [F, P], and all rows outside frames.

    Every frame is sorted by itself, so that the time is linear in the frames.
    """
    best = best_columns(scores, frames.present, counts)
    stays = frames.spread(best, torch.ones_like(tokens.position, dtype=torch.bool))
    rows = tokens.length - tokens.num_video + total  # known beforehand, so there is no need to wait for a GPU
    return positions_of(stays[0], rows)[None]


def best_columns(scores: Tensor, present: Tensor, counts: Tensor) -> Tensor:
    """[F, P] bool: the `counts` [F] best tokens of each frame by `scores` [F, P]; ties go to the earlier one."""
    lowest = scores.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    ranked = lowest.masked_fill(~present, math.nan)  # holes are below every token
    column, _ = topk_keep(ranked, counts, capacity=ranked.shape[1])  # [F, P], -1 for padding
    best = F.pad(torch.zeros_like(present), (0, 1))
    return best.scatter_(1, column.where(column >= 0, ranked.shape[1]), True)[:, :-1]


def positions_of(chosen: Tensor, number: int) -> Tensor:
    """chosen [N] bool -> [number] int64 ascending: the positions that are chosen, if it is known how many there are."""
    place = torch.where(chosen, chosen.cumsum(0) - 1, number)
    positions = torch.arange(len(chosen), device=chosen.device)
    return positions.new_empty(number + 1).scatter_(0, place, positions)[:-1]


def put(hidden: Tensor, kept: Tensor, rows: Tensor, chosen: Tensor, values: Tensor, number: int) -> None:
    """Write values to rows that are kept.

    Args:
        hidden: [1, M, D] the kept rows, written to.
        kept: [1, M] int64 ascending: where they stand in the sequence.
        rows: [F, K] int64: where the values belong there.
        chosen: [F, K] bool: which of them are meant.
        values: [F, K, D].
        number: how many are meant.
    """
    places = positions_of(chosen.flatten(), number)
    row = torch.searchsorted(kept[0], rows.flatten()[places])
    hidden[0].index_copy_(0, row, values.flatten(0, 1)[places].to(hidden.dtype))


_MOVED = {
    "Frames": ("frames", "FrameRows"), "FrameRows": ("frames", "FrameRows"), "ToMe": ("tome", "ToMe"),
    "distinctness": ("importances", "distinctness"), "feature_norm": ("importances", "feature_norm"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, present = _MOVED[name]
    warnings.warn(
        f"fftriton.methods.pruners.{name} is now fftriton.methods.{module}.{present}", DeprecationWarning, stacklevel=2
    )
    return getattr(import_module(f".{module}", __package__), present)
