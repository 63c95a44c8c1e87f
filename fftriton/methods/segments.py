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
    hidden, sizes = video.tokens.hidden, video.frames.sizes
    parts = video.frames.parts(hidden.shape[-1])
    sums = torch.cat([(part.take(hidden).float() * part.present[..., None]).sum(1) for part in parts])
    means = sums / sizes.clamp_min(1)[:, None]
    similarity = F.cosine_similarity(means[1:], means[:-1], dim=-1)
    starts = similarity < threshold
    lowest = topk_keep(-similarity[None], min(least - 1, len(similarity)))[0]
    return F.pad(starts.index_fill(0, lowest, True), (1, 0), value=True)
