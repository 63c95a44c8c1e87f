"""The most similar one of other tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import NO_LINK

from .base import VideoTokens
from .frames import FrameRows


def nearest(tokens: VideoTokens, frames: FrameRows, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """For each token that one of its frame's candidates whose cosine with it is the highest.

    Args:
        tokens: all tokens of one sample.
        frames: the rows of each frame.
        candidates: [F, K] int64, K >= 1: rows, of any frame; -1 for none.

    Returns:
        The cosine [F, P] fp32, NO_LINK if there is none or it is not finite, and the row [F, P] int64, arbitrary then
        and at holes. Ties go to the first candidate.
    """
    found, start = [], 0
    for part in frames.parts(tokens.hidden.shape[-1]):
        others = FrameRows(candidates[start : (start := start + len(part.rows))])
        x, y = (F.normalize(one.take(tokens.hidden).float(), dim=-1) for one in (part, others))
        cosine = torch.bmm(x, y.mT).nan_to_num(NO_LINK).masked_fill(~others.present[:, None], NO_LINK)
        found.append(cosine.max(-1))
    similarity, column = (torch.cat(parts) for parts in zip(*found, strict=True))
    return similarity, candidates.gather(1, column)
