"""Pruners: how a frame is shortened to the number of tokens that it may keep.

A pruner works within each frame, on all frames at once. The remaining tokens stay in raster and time order.

Sources: PruMerge, arXiv:2403.15388; ToMe, arXiv:2210.09461, section 3; both as KVTP uses them, arXiv:2503.10742. KVTP's
code takes importance and similarity from the vision tower's attention; here both come from the tokens that the language
model gets, so a pruner needs no access to the tower.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import segmented_topk_keep, topk_keep

from ..checks import check_choice, check_count, check_seed
from ..layouts.layout import VideoLayout
from .base import VideoTokens

_FRAMES = 64  # number of frames whose tokens are compared at a time


@dataclass(frozen=True)
class FrameRows:
    """Where the tokens of each frame stand in a sequence.

    Args:
        rows: [F, P] int64, ascending; -1 for a hole. The frames of several videos follow one another.
    """

    rows: Tensor

    @classmethod
    def of(cls, layouts: Sequence[VideoLayout], tokens: VideoTokens) -> FrameRows:
        """The frames of one sample's videos, whose tokens are all in the sequence."""
        widest = max(layout.positions.shape[1] for layout in layouts)
        padded = [F.pad(layout.positions, (0, widest - layout.positions.shape[1]), value=-1) for layout in layouts]
        positions = torch.cat(padded).to(tokens.position.device)
        rows = torch.searchsorted(tokens.position[0].contiguous(), positions)
        return cls(rows.where(positions >= 0, -1))

    @property
    def present(self) -> Tensor:
        """[F, P] bool: False for holes."""
        return self.rows >= 0

    @property
    def sizes(self) -> Tensor:
        """[F] int64: the number of tokens of each frame."""
        return self.present.sum(1)

    def take(self, x: Tensor) -> Tensor:
        """[1, N, ...] -> [F, P, ...]; the values at holes are arbitrary."""
        return x[0, self.rows.clamp_min(0)]

    def spread(self, values: Tensor, onto: Tensor) -> Tensor:
        """A copy of `onto` [1, N, ...] with the values [F, P, ...] at their tokens."""
        spread = onto.clone()
        spread[0, self.rows[self.present]] = values[self.present].to(onto.dtype)
        return spread

    def split(self) -> list[FrameRows]:
        """The frames in parts that are small enough to compare all their tokens with each other."""
        return [FrameRows(rows) for rows in self.rows.split(_FRAMES)]


def distinctness(x: Tensor, present: Tensor) -> Tensor:
    """x [F, P, D], present [F, P] bool -> [F, P]: 1 - the cosine with the frame's mean direction."""
    direction = F.normalize(x.float(), dim=-1)
    mean = (direction * present[..., None]).sum(1, keepdim=True)
    return 1 - F.cosine_similarity(direction, mean, dim=-1)


def feature_norm(x: Tensor, present: Tensor) -> Tensor:
    """x [F, P, D] -> [F, P]: the length of each token."""
    return x.float().norm(dim=-1)


Importance = Callable[[Tensor, Tensor], Tensor]
"""Tokens [F, P, D] and which of them exist [F, P] bool -> how important each is [F, P]."""

IMPORTANCES: dict[str, Importance] = {"distinctness": distinctness, "norm": feature_norm}


class Pruner(ABC):
    """Shortens each frame to its count."""

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
        return tokens.keep(_best(tokens, frames, frames.take(scores), counts, total), total)


@dataclass(frozen=True)
class TopKPruner(Pruner):
    """Keep the most important tokens of each frame, ties to the earlier one.

    Args:
        importance: "distinctness" (1 - the cosine with the frame's mean: how much a token differs from the rest of the
            frame), "norm" (the token's), or a function of tokens [F, P, D] and present [F, P] bool that returns [F, P].

    Raises:
        ValueError: an unknown importance.
    """

    importance: str | Importance = "distinctness"

    def __post_init__(self) -> None:
        _check_importance("TopKPruner", self.importance)

    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        scores = _importance(self.importance, tokens, frames)
        return tokens.keep(_best(tokens, frames, scores, counts, total), total)


@dataclass(frozen=True)
class PruMerge(Pruner):
    """Keep the most important tokens of each frame, and add to each the dropped tokens that are similar to it.

    A kept token becomes x_i + sum of a_j x_j, over the dropped ones among its nearest tokens (by cosine, in its frame),
    with a = softmax of the importance over the frame.

    Args:
        importance: as for TopKPruner.
        neighbours: number of nearest tokens, at least 1.

    Raises:
        TypeError, ValueError: a parameter out of range.
    """

    importance: str | Importance = "distinctness"
    neighbours: int = 32

    def __post_init__(self) -> None:
        _check_importance("PruMerge", self.importance)
        check_count("PruMerge", "neighbours", self.neighbours, 1)

    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        scores = _importance(self.importance, tokens, frames)
        rows = _best(tokens, frames, scores, counts, total)
        stays = torch.zeros_like(tokens.position, dtype=torch.bool).scatter_(1, rows, True)
        weights = scores.masked_fill(~frames.present, float("-inf")).softmax(1)
        hidden = tokens.hidden
        for part, weight in zip(frames.split(), weights.split(_FRAMES), strict=True):
            x = part.take(tokens.hidden).float()
            lost = weight * (part.present & ~part.take(stays))
            hidden = part.spread(x + self._around(x, part.present, lost), hidden)
        return replace(tokens, hidden=hidden).keep(rows, total)

    def _around(self, x: Tensor, present: Tensor, weight: Tensor) -> Tensor:
        """x [F, P, D], weight [F, P] -> [F, P, D]: the weighted sum of each token's nearest ones."""
        others = present[:, None] & ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        similarity = _cosines(x).masked_fill(~others, float("-inf"))
        nearest = similarity.topk(min(self.neighbours, x.shape[1]), dim=-1).indices
        near = torch.zeros_like(others).scatter_(2, nearest, True) & others
        return (near * weight[:, None]) @ x


@dataclass(frozen=True)
class ToMe(Pruner):
    """Merge the most similar tokens of each frame, by bipartite soft matching, until its count is left.

    In each round every second token of the frame proposes to the most similar of the others, and the best proposals are
    accepted, at most half of the tokens. A remaining token is the mean of the patches that merged into it.
    """

    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        roots = torch.arange(tokens.length, device=counts.device)[None]
        for part, count in zip(frames.split(), counts.split(_FRAMES), strict=True):
            column = _matching(part.take(tokens.hidden).float(), part.present, count)
            roots = part.spread(part.rows.gather(1, column), roots)
        return tokens.merge_groups(roots)


def _matching(x: Tensor, present: Tensor, counts: Tensor) -> Tensor:
    """x [F, P, D] fp32, present [F, P], counts [F] -> [F, P] int64: the column that each token merges into."""
    column = torch.arange(x.shape[1], device=x.device).expand(present.shape)
    root, alive, total = column, present, x
    while bool(((excess := alive.sum(1) - counts) > 0).any()):
        place = alive.cumsum(1)
        proposes, takes = alive & (place % 2 == 1), alive & (place % 2 == 0)
        cosines = _cosines(total).nan_to_num(-1.0)  # a sum has the direction of its mean
        similarity, partner = cosines.masked_fill(~takes[:, None], -2.0).max(-1)
        proposals = torch.where(proposes & takes.any(1, keepdim=True), similarity, float("-inf"))
        taken = topk_keep(proposals, torch.minimum(excess, takes.sum(1)).clamp_min(0))  # [F, K], -1 for none
        joins = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device)
        joins = joins.scatter_(1, taken % (x.shape[1] + 1), True)[:, :-1]  # -1 goes to a column of its own
        moved = torch.where(joins, partner, column)
        total = torch.zeros_like(total).scatter_add_(1, moved[..., None].expand_as(total), total)
        root, alive = moved.gather(1, root), alive & ~joins
    return root


def _best(tokens: VideoTokens, frames: FrameRows, scores: Tensor, counts: Tensor, total: int) -> Tensor:
    """[1, M] int64: each frame's `counts` best rows by `scores` [F, P], and all rows outside frames."""
    frame = torch.arange(len(counts), device=counts.device)[:, None].expand_as(frames.rows)
    segments = frames.spread(frame, torch.full_like(tokens.position, -1))
    spread = frames.spread(scores, torch.zeros(1, tokens.length, device=scores.device))
    rows = tokens.length - tokens.num_video + total  # known beforehand, so there is no need to wait for a GPU
    kept, _ = segmented_topk_keep(spread, segments, counts[None], capacity=rows)
    return kept


def _cosines(x: Tensor) -> Tensor:
    """[F, P, D] -> [F, P, P]."""
    direction = F.normalize(x, dim=-1)
    return direction @ direction.mT


def _check_importance(owner: str, importance: str | Importance) -> None:
    if not callable(importance):
        check_choice(owner, "importance", importance, tuple(IMPORTANCES))


def _importance(importance: str | Importance, tokens: VideoTokens, frames: FrameRows) -> Tensor:
    """[F, P] fp32."""
    function = IMPORTANCES[importance] if isinstance(importance, str) else importance
    return torch.cat([function(part.take(tokens.hidden), part.present) for part in frames.split()]).float()


def __getattr__(name: str) -> Any:
    if name == "Frames":
        warnings.warn("fftriton.methods.pruners.Frames is now called FrameRows", DeprecationWarning, stacklevel=2)
        return FrameRows
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
