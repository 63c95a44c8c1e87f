"""Tokens of a frame that are far from one another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import topk_keep

from .base import VideoTokens
from .frames import FrameRows


def most_diverse(tokens: VideoTokens, frames: FrameRows, counts: Tensor, weight: Tensor | None = None) -> Tensor:
    """Choose tokens of each frame one after the other: each time the one that is farthest from all chosen ones.

    The distance of two tokens is 1 - their cosine. The first token is the one that is farthest from its nearest
    neighbour. There are as many rounds as the largest count, each for all frames at once.

    Args:
        tokens: all tokens of one sample.
        frames: the rows of each frame.
        counts: [F] int64, how many of each frame are chosen, at most its size.
        weight: [F, P] fp32, what the distances to a token are multiplied by when it may be chosen; None for 1.

    Returns:
        [F, P] bool: the chosen ones. Ties go to the earlier token.

    Source:
        FlashVID, arXiv:2602.08024, section 3.2: with attention as the weight, it is its ADTS.
    """
    distance = torch.cat([_distances(part.take(tokens.hidden)) for part in frames.parts(tokens.hidden.shape[-1])])
    if weight is not None:
        distance = distance * weight[:, None]
    present, itself = frames.present, torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(~present[..., None] | itself, math.inf).amin(1).masked_fill(~present, -math.inf)
    chosen = torch.zeros_like(present)
    for number in range(int(counts.max())):
        best = topk_keep(nearest, 1)  # [F, 1]
        chosen |= torch.zeros_like(chosen).scatter_(1, best, True) & (counts > number)[:, None]
        to_best = distance.gather(1, best[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        nearest = torch.minimum(nearest, to_best) if number else to_best.masked_fill(~present, -math.inf)
        nearest = nearest.scatter(1, best, -math.inf)
    return chosen


def _distances(x: Tensor) -> Tensor:
    """x [F, P, D] -> [F, P, P] fp32: 1 - the cosines; 1 for rows that are not finite."""
    direction = F.normalize(x.float(), dim=-1)
    return 1 - torch.bmm(direction, direction.mT).nan_to_num(0.0, 0.0, 0.0)
