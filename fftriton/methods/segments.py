"""Segments of a video: cut where frames differ most."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fftriton_kernels import topk_keep

from .frames import FrameContext


def segment_starts(video: FrameContext, threshold: float, least: int) -> Tensor:
    """[F] bool: whether a segment of the video starts with a frame.

    Args:
        video: the F frames.
        threshold: cosine of the means of neighbouring frames below which a segment ends.
        least: the fewest segments, unless there are fewer frames: the other cuts are at the lowest cosines.

    Source:
        FastVID, arXiv:2503.11187, section 3.2, which FlashVID, arXiv:2602.08024, takes over. Their frames are compared
        by the output of the vision tower's pooling head.
    """
    hidden = video.tokens.hidden
    means = torch.cat([_sum(part.take(hidden).float(), part.present) for part in video.frames.parts(hidden.shape[-1])])
    similarity = F.cosine_similarity(means[1:], means[:-1], dim=-1)
    starts = similarity < threshold
    lowest = topk_keep(-similarity[None], min(least - 1, len(similarity)))[0]
    return F.pad(starts.index_fill(0, lowest, True), (1, 0), value=True)


def _sum(x: Tensor, present: Tensor) -> Tensor:
    """x [F, P, D], present [F, P] bool -> [F, D]: the sum of the tokens that are finite, as good as their mean."""
    counts = present & x.isfinite().all(-1)
    return x.masked_fill(~counts[..., None], 0.0).sum(1)
