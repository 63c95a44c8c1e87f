"""The most similar token of another frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import NO_LINK

from .base import VideoTokens
from .frames import FrameRows


def nearest_in(tokens: VideoTokens, frames: FrameRows, other: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The token of another frame whose cosine with each token is the highest.

    Args:
        tokens: all tokens of one sample.
        frames: the rows of each frame.
        other: [F] int64, the frame in which each frame looks.
        allowed: [F, P] bool, which tokens it may find there.

    Returns:
        The cosine [F, P] fp32, NO_LINK if there is none or it is not finite, and the row [F, P] int64, arbitrary then
        and at holes. Ties go to the earlier token.
    """
    width, there = tokens.hidden.shape[-1], FrameRows(frames.rows[other])
    found, start = [], 0
    for part, aim in zip(frames.parts(width), there.parts(width), strict=True):
        own = slice(start, start := start + len(part.rows))
        x, y = (F.normalize(one.take(tokens.hidden).float(), dim=-1) for one in (part, aim))
        cosine = torch.bmm(x, y.mT).nan_to_num(NO_LINK).masked_fill(~allowed[own, None], NO_LINK)
        found.append(cosine.max(-1))
    similarity, column = (torch.cat(parts) for parts in zip(*found, strict=True))
    return similarity, there.rows.gather(1, column)
