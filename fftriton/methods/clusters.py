"""Clusters of the tokens of a frame, around peaks of density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import VideoTokens
from .frames import FrameRows
from .pruners import best_columns

_NEIGHBOURS = 7
_FAR = torch.finfo(torch.float32).max


def density_peaks(tokens: VideoTokens, frames: FrameRows, members: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster tokens of each frame by density peaks among nearest neighbours (DPC-kNN).

        density(i) = exp(-mean of d(i, j)^2 over the nearest j),   d: Euclidean distance / sqrt(D)
        peak(i) = density(i) * distance to the nearest token of higher density, or the largest distance of all

    The tokens with the highest peaks are centres, and every other one belongs to the nearest centre. As many neighbours
    count as there are clusters, at most 7, the token itself among them.

    Args:
        tokens: all tokens of one sample.
        frames: the rows of each frame.
        members: [F, P] bool, the tokens to cluster.
        counts: [F] int64, the number of clusters of each frame, at most that of its members. With 0, nothing happens.

    Returns:
        [F, P] int64, the column of the centre of each member, its own for all else; and [F, P] bool, the centres. Ties
        go to the earlier token.

    Source:
        Density peaks with nearest neighbours, Du et al., Knowledge-Based Systems 99, 2016, as FlashVID uses it,
        arXiv:2602.08024. The authors' code adds noise to break ties.
    """
    found, start = [], 0
    for part in frames.parts(tokens.hidden.shape[-1]):
        own = slice(start, start := start + len(part.rows))
        found.append(_cluster(part.take(tokens.hidden).float(), members[own], counts[own]))
    column, centres = (torch.cat(parts) for parts in zip(*found, strict=True))
    return column, centres


def peak_scores(tokens: VideoTokens, frames: FrameRows, members: Tensor, neighbours: int) -> Tensor:
    """[F, P] fp32: how high a peak of density each member is, as for `density_peaks`; arbitrary for all else.

    Args:
        tokens, frames, members: as for `density_peaks`.
        neighbours: how many of the nearest members count, the token itself among them, at most 7.
    """
    number, found, start = members.sum(1).clamp_max(neighbours), [], 0
    for part in frames.parts(tokens.hidden.shape[-1]):
        own = slice(start, start := start + len(part.rows))
        found.append(_peaks(part.take(tokens.hidden).float(), members[own], number[own])[0])
    return torch.cat(found)


def _cluster(x: Tensor, members: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    peak, distance = _peaks(x, members, counts)
    centres = best_columns(peak, members, counts)
    everything = torch.arange(x.shape[1], device=x.device).expand_as(members)
    closest = distance.masked_fill(~centres[:, None], math.inf).argmin(-1)
    return torch.where(members & ~centres & (counts > 0)[:, None], closest, everything), centres


def _peaks(x: Tensor, members: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """The peak scores [F, P] of x [F, P, D], by so many neighbours [F], and distances [F, P, P] of members."""
    pairs = members[:, None] & members[..., None]
    distance = (torch.cdist(x, x) / math.sqrt(x.shape[-1])).nan_to_num(_FAR, _FAR).masked_fill(~pairs, math.inf)
    nearest = distance.topk(min(_NEIGHBOURS, x.shape[1]), largest=False).values
    number = neighbours.clamp(1, nearest.shape[-1])[:, None, None].expand(-1, x.shape[1], -1)
    density = (-nearest.square().cumsum(-1).gather(-1, number - 1)[..., 0] / number[..., 0]).exp()
    largest = distance.masked_fill(~pairs, 0).flatten(1).amax(1)[:, None, None]
    higher = density[:, None] > density[..., None]
    return distance.where(higher & pairs, largest).amin(-1) * density, distance
