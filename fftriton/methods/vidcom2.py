"""VidCom2: before the first layer, more tokens for frames that stand out, and of each frame those that stand out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fftriton_kernels import topk_keep

from .base import VideoTokens
from .frame_methods import FrameMethod
from .frames import FrameContext, FrameRows

_WIDTHS = tuple(2.0**k for k in range(-3, 2))  # of the Gaussians whose sum says how similar two directions are
_TEMPERATURE = 0.01
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class VidCom2(FrameMethod):
    """Keep the video tokens that are least like the mean of their video and of their frame, most of unusual frames.

        g(u, c) = sum over a in 1/8, 1/4, ..., 2 of exp(-|u - c|^2 / 2a)
        score(t) = -g(u_t, mean of the video) - g(u_t, mean of the frame),   u: unit vectors of half of the channels
        share(f) = 1 + p_f - mean of p,   p = softmax over frames of (-mean of g(u_t, mean of the video) / 0.01)

    Half of the channels count, those that vary least within the video. A frame gets one token, and of the others a
    number in proportion to its share; its tokens of the highest scores stay. It needs nothing but the tokens. A budget
    below one token per frame is met as closely as possible. Ties go to the earlier token.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].

    Raises:
        TypeError, ValueError: a budget out of range.

    Source:
        Video Compression Commander, arXiv:2505.14454; `vidcom2_compression` in xuyang-liu16/VidCom2, commit 944a17d,
        which rounds every frame by itself, so that it misses the budget.
    """

    min_tokens: ClassVar[int] = 1

    def rate(self, tokens: VideoTokens, frames: FrameRows) -> tuple[Tensor, Tensor]:
        rated = [_rate_video(context) for context in frames.contexts(tokens)]
        shares = torch.cat([shares for _, shares in rated])
        return frames.join([scores for scores, _ in rated]), (shares * frames.sizes.clamp_min(1)).log()


def _rate_video(video: FrameContext) -> tuple[Tensor, Tensor]:
    """The scores [F, P] fp32 of a video's tokens, and the shares [F] fp32 of its frames, above 0."""
    hidden, sizes = video.tokens.hidden, video.frames.sizes
    parts, number = video.frames.parts(hidden.shape[-1]), sizes.sum()
    mean, square = torch.stack([_sums(_take(part, hidden)) for part in parts]).sum(0) / number
    steady = topk_keep((mean.square() - square).float()[None], max(1, len(mean) // 2))[0]  # of the lowest variance
    sums = torch.cat([_directions(_take(part, hidden), steady).sum(1) for part in parts])  # [F, D / 2]
    centre, centres = sums.sum(0) / number, sums / sizes.clamp_min(1)[:, None]
    to_video, to_frame, start = [], [], 0
    for part in parts:
        own = centres[start : (start := start + len(part.rows)), None]
        x = _directions(_take(part, hidden), steady)
        to_video.append(_similarity(x, centre))
        to_frame.append(_similarity(x, own))
    near = torch.cat(to_video) * video.present
    uniqueness = -near.sum(1) / sizes.clamp_min(1)
    weight = (uniqueness / _TEMPERATURE).masked_fill(sizes == 0, -math.inf).softmax(0)
    return -near - torch.cat(to_frame), 1 + weight - 1 / (sizes > 0).sum()


def _take(part: FrameRows, hidden: Tensor) -> Tensor:
    """[F, P, D] fp32: the tokens of some frames; zeros at holes and for what is not finite."""
    return (part.take(hidden).float() * part.present[..., None]).nan_to_num(0.0, 0.0, 0.0)


def _sums(x: Tensor) -> Tensor:
    """x [F, P, D] -> [2, D] fp64: the sum of the tokens, and of their squares."""
    return torch.stack([x.sum((0, 1), dtype=torch.float64), x.square().sum((0, 1), dtype=torch.float64)])


def _directions(x: Tensor, channels: Tensor) -> Tensor:
    """x [F, P, D], channels [C] -> [F, P, C]: unit vectors of these channels; zero vectors stay."""
    x = x[..., channels]
    return x / x.norm(dim=-1, keepdim=True).clamp_min(_SMALLEST_NORM)


def _similarity(x: Tensor, centre: Tensor) -> Tensor:
    """x [F, P, C], centre [C] or [F, 1, C] -> [F, P]: a sum of Gaussians of the distance."""
    squared = (x - centre).square().sum(-1)
    return torch.stack([(-squared / (2 * width)).exp() for width in _WIDTHS]).sum(0)
