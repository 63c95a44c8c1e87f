"""EVS: before the first layer, keep the tokens that changed most since the frame before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fftriton_kernels import topk_keep

from .base import VideoTokens
from .frame_methods import FrameMethod, novelty
from .frames import FrameRows


@dataclass(frozen=True)
class EVS(FrameMethod):
    """Keep the video tokens that are least similar to the same patch one frame earlier, and all of the first frame.

        score(t) = 1 - cos(x_t, x_previous(t)),   ranked over the whole prompt

    A frame keeps as many tokens as changed in it, possibly none. It needs nothing but the tokens. A budget below the
    first frame of each video keeps those of its tokens that differ most from the rest of the frame. Ties go to the
    earlier token.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].

    Raises:
        TypeError, ValueError: a budget out of range.

    Source:
        Efficient Video Sampling, arXiv:2510.14624; `compute_retention_mask` in vLLM's vllm/multimodal/evs.py, commit
        094f117. It rounds down, never keeps less than the first frame, and serves one video at a time.
    """

    def rate(self, tokens: VideoTokens, frames: FrameRows) -> tuple[Tensor, Tensor]:
        scores = novelty(tokens, frames, tokens.predecessor)
        return scores, scores.new_zeros(len(scores))

    def frame_counts(
        self, tokens: VideoTokens, frames: FrameRows, scores: Tensor, priority: Tensor, total: int
    ) -> Tensor:
        ranked = scores.masked_fill(~frames.present, math.nan)  # holes are below every token
        best = topk_keep(ranked.flatten()[None], total)[0]
        counts = torch.zeros_like(frames.sizes)
        return counts.index_add_(0, best // scores.shape[1], torch.ones_like(best))
