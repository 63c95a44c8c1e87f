"""ToMe as a pruner: merge the most similar tokens of each frame.

Source: ToMe, arXiv:2210.09461, section 3, as KVTP uses it, arXiv:2503.10742.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fftriton_kernels import topk_keep

from ..checks import check_bool, check_choice
from .base import Merge, VideoTokens
from .frames import FrameRows
from .importances import Keys, check_keys, keys_of
from .pruners import Pruner, best_rows, put

_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class ToMe(Pruner):
    """Merge the most similar tokens of each frame, by bipartite soft matching, until its count is left.

    In each round every second token of the frame proposes to the most similar of the others, which are its receivers,
    and the best proposals are accepted, at most half of the tokens. Then the receivers stand first, and after them the
    tokens whose proposals were not accepted. A remaining token stands where the receiver stood.

    Args:
        means: what a remaining token is: "weighted", the mean of all patches that merged into it; "plain", the mean of
            the tokens of each round, whatever they consist of; or "rescaled", a plain mean that in each round gets the
            largest norm of its tokens.
        keys: as for PruMerge: by whose cosines tokens are compared; keys merge like tokens, without rescaling.
        proportional: whether a row that has merged counts as many times in attention, in every layer that follows and
            in decode, as it stands for tokens: log(size) is added to its scores. Means stay as they are.

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs, what a function returns.

    Source:
        ToMe, arXiv:2210.09461. The code of KVTP, arXiv:2503.10742, has means="rescaled".
    """

    may_drop: ClassVar[bool] = False

    means: str = "rescaled"
    keys: str | Keys = "tokens"
    proportional: bool = False

    def __post_init__(self) -> None:
        check_choice("ToMe", "means", self.means, ("weighted", "plain", "rescaled"))
        check_keys("ToMe", self.keys)
        check_bool("ToMe", "proportional", self.proportional)

    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        keys = keys_of("ToMe", self.keys, tokens, frames)
        sizes = frames.sizes
        excess = sizes - counts
        host_sizes, host_counts = torch.stack([sizes, counts]).tolist()  # the only wait for a GPU
        parts, matched, start = frames.parts(tokens.hidden.shape[-1]), [], 0
        for part in parts:
            own = slice(start, start := start + len(part.rows))
            x = part.take(tokens.hidden).float()
            pairs = Pairs(x, None if keys is None else keys[own], part.present, self.means)
            for _ in range(max(map(num_rounds, host_sizes[own], host_counts[own]))):
                pairs.merge(excess[own])
            matched.append((pairs.column, pairs.weights()))
        column, weight = (torch.cat(values) for values in zip(*matched, strict=True))
        stands = frames.present & (column == torch.arange(column.shape[1], device=column.device))
        rows = best_rows(tokens, frames, stands.float(), counts, total)
        left, start = tokens.keep(rows, total), 0
        for part in parts:
            own = slice(start, start := start + len(part.rows))
            for given, kept in zip((tokens.hidden, *tokens.additions), (left.hidden, *left.additions), strict=True):
                sums = _sums(part.take(given).float(), column[own], weight[own])
                put(kept, rows, part.rows, stands[own], sums, sum(host_counts[own]))
        roots = frames.roots(column, tokens.length)
        if self.proportional and left.length < tokens.length:
            left = replace(left, sizes=tokens.sizes_at(roots).gather(1, rows))
        return replace(left, merge=Merge(roots, tokens.position))


def num_rounds(size: int, count: int) -> int:
    """The rounds that it takes to merge `size` tokens into `count`."""
    rounds = 0
    while size > max(1, count):
        size, rounds = max(count, size - size // 2), rounds + 1
    return rounds


class Pairs:
    """The tokens of some frames while they merge, known by their inner products only.

    Args:
        x: [F, P, D] fp32: the tokens.
        keys: [F, P, E] fp32: what they are compared by; None for the tokens themselves.
        present: [F, P] bool.
        means: as for ToMe.

    Attributes:
        column: [F, P] int64: the column of the token that each token has merged into.
    """

    def __init__(self, x: Tensor, keys: Tensor | None, present: Tensor, means: str) -> None:
        self.means = means
        self.column = torch.arange(x.shape[1], device=x.device).expand(present.shape)
        self._own = self.column
        self._place = (present.cumsum(1) - 1).where(present, -1)  # order of the tokens that are left; -1 for the others
        self._weight = torch.ones_like(self.column, dtype=torch.float32)
        self._lengths = _products(x) if keys is None or means == "rescaled" else None
        self._similar = self._lengths if keys is None else _products(keys)

    def merge(self, excess: Tensor) -> None:
        """One round. excess: [F] int64, the tokens of each frame that have yet to go, written to."""
        receives, proposes = ((self._place >= 0) & (self._place % 2 == parity) for parity in (0, 1))
        best, partner = self._cosines().masked_fill(~receives[:, None], -2.0).max(-1)
        accepted = torch.minimum(excess, proposes.sum(1))
        width = self.column.shape[1]
        taken, _ = topk_keep(best.masked_fill(~proposes, float("-inf")), accepted, capacity=width // 2)
        joins = torch.zeros(len(taken), width + 1, dtype=torch.bool, device=taken.device)
        joins = joins.scatter_(1, taken.where(taken >= 0, width), True)[:, :-1]
        moved = torch.where(joins, partner, self._own)
        self._combine(moved)
        self.column = moved.gather(1, self.column)
        self._reorder(receives, proposes & ~joins)
        excess -= accepted

    def weights(self) -> Tensor:
        """[F, P] fp32: what each token counts in the row that it has merged into."""
        if self.means != "weighted":
            return self._weight
        size = torch.zeros_like(self._weight).scatter_add_(1, self.column, torch.ones_like(self._weight))
        return size.reciprocal().gather(1, self.column)

    def _cosines(self) -> Tensor:
        assert self._similar is not None
        norm = self._similar.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().clamp_min(_SMALLEST_NORM)
        return self._similar / norm[:, :, None] / norm[:, None]

    def _combine(self, moved: Tensor) -> None:
        """Update the products and weights after each column has moved to another one [F, P] int64."""
        joined = (moved[:, None] == self._own[..., None]).float()  # [F, P, P]: row a holds the columns that moved to a
        size = joined.sum(2).clamp_min(1)
        plain = torch.ones_like(size) if self.means == "weighted" else size.reciprocal()
        scale = plain
        if self.means == "rescaled":
            assert self._lengths is not None
            squares = self._lengths.diagonal(dim1=1, dim2=2).clamp_min(0)
            sums = _between(joined, self._lengths).diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
            largest = (joined * squares[:, None]).amax(2).sqrt()
            scale = (largest / sums.clamp_min(_SMALLEST_NORM)).where(size > 1, 1.0)
        same = self._similar is self._lengths
        if self._lengths is not None:
            self._lengths = _between(joined * scale[..., None], self._lengths)
        assert self._similar is not None
        self._similar = self._lengths if same else _between(joined * plain[..., None], self._similar)
        self._weight = self._weight * scale.gather(1, moved.gather(1, self.column))

    def _reorder(self, receives: Tensor, remains: Tensor) -> None:
        """The receivers first, then the proposers that remain, each in their former order."""
        width = self._place.shape[1]
        places = self._place.where(remains, width)
        ranks = torch.zeros(len(places), width + 1, dtype=torch.int64, device=places.device)
        ranks = ranks.scatter_(1, places, 1)[:, :-1].cumsum(1) - 1
        behind = receives.sum(1, keepdim=True) + ranks.gather(1, self._place.clamp_min(0))
        self._place = torch.where(receives, self._place // 2, behind.where(remains, -1))


def _products(x: Tensor) -> Tensor:
    """[F, P, D] -> [F, P, P]: inner products; 0 for rows that are not finite."""
    return torch.bmm(x, x.mT).nan_to_num(0.0, 0.0, 0.0)


def _between(rows: Tensor, products: Tensor) -> Tensor:
    """Inner products of sums of tokens, given those of the tokens: rows [F, P, P] holds the coefficients."""
    return torch.bmm(torch.bmm(rows, products), rows.mT)


def _sums(x: Tensor, column: Tensor, weight: Tensor) -> Tensor:
    """x [F, P, D], column [F, P], weight [F, P] -> [F, P, D]: the weighted sum of what has merged into each column."""
    offset = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    sums = torch.zeros_like(x)
    sums.flatten(0, 1).index_add_(0, (column + offset).flatten(), (x * weight[..., None]).flatten(0, 1))
    return sums
