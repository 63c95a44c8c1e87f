"""Anchors: the tokens that stand out in time, and a few of every frame that stand for all others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_bool, check_real
from .base import Prompt, VideoTokens
from .before_layers import ScoringMethod
from .frames import FrameContext, FrameRows

_GOLDEN = 0.6180339887498949  # turns by it spread evenly, however many there are
_ANCHOR, _OUTLIER = 4.0, 8.0  # above every novelty, which is at most 2
_ROUNDING = 1e-9  # of token counts that are exact but for floating point
_ELEMENTS = 2**24  # of hidden states in fp32 at a time


@dataclass(frozen=True)
class Anchors(ScoringMethod):
    """Keep outliers, and anchors of the background that are spread over time and count for all that is dropped.

        novelty(t) = 1 - cos(x_t, mean over the frames of the patch of t)

    In a video of one frame, as an image is, the mean is over the frame.

    Of k = round(budget * n) tokens, floor(share * k / frames) of each frame are anchors; where that is none, half of
    that share is spread over the frames, because what stands out matters more. The others are the outliers: the tokens
    of the highest novelty. The anchors of a frame stand at even distances among its other tokens, from a start that
    turns from frame to frame. Each of them has the size (n - outliers) / anchors. No attention is read, and the videos
    of a sample share everything but the means. Ties go to the earlier token.

    Questions about time need tokens of every frame, and a softmax that has lost the mass of the background answers
    others wrongly: hence the anchors and their sizes. The needle task, where answers are outliers, suits this rule.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].
        share: of the budget, for anchors, in [0, 1].
        proportional: whether anchors count in attention for what they stand for.

    Raises:
        TypeError, ValueError: a parameter out of range.

    Source:
        This project. Proportional attention: ToMe, arXiv:2210.09461, section 3.
    """

    share: float = 2 / 3
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("Anchors", "share", self.share, 0.0, 1.0)
        check_bool("Anchors", "proportional", self.proportional)

    def count(self, frames: int, patches: int) -> int | None:
        return None if self.proportional else super().count(frames, patches)

    def score(self, tokens: VideoTokens, prompt: Prompt) -> Tensor:
        frames = FrameRows.of_prompt(prompt, tokens, empty=False)
        novelty = frames.join([_novelty(video) for video in frames.contexts(tokens)])
        outliers, anchors = self._choose(novelty, frames, self.num_kept(tokens))
        ranked = novelty + _OUTLIER * outliers + _ANCHOR * anchors
        return frames.spread(ranked, torch.zeros_like(tokens.position, dtype=torch.float32))

    def shorten(self, tokens: VideoTokens, prompt: Prompt) -> VideoTokens:
        scores = self.score(tokens, prompt)
        kept = self.num_kept(tokens)
        left = tokens.keep_top(scores, kept)
        if not self.proportional:
            return left
        row = torch.searchsorted(tokens.position[0].contiguous(), left.position[0].contiguous())
        is_anchor = (scores[:, row] >= _ANCHOR) & (scores[:, row] < _OUTLIER)
        whole, own = (torch.ones_like(part.position, dtype=torch.float32) for part in (tokens, left))
        if tokens.sizes is not None and left.sizes is not None:
            whole, own = tokens.sizes, left.sizes
        others = own.masked_fill(is_anchor | (left.patch < 0), 0.0).sum()  # of the outliers
        size = (whole.masked_fill(tokens.patch < 0, 0.0).sum() - others) / is_anchor.sum().clamp_min(1)
        return replace(left, sizes=torch.where(is_anchor, size, own))

    def _choose(self, novelty: Tensor, frames: FrameRows, kept: int) -> tuple[Tensor, Tensor]:
        """[F, P] bool each: the outliers, and the anchors."""
        number = len(frames.rows)
        wanted = self.share * kept
        anchors = int(wanted / number + _ROUNDING) * number or round(wanted / 2)
        outliers = max(1, kept - anchors)
        ranked = novelty.masked_fill(~frames.present, -1.0).flatten()
        is_outlier = torch.zeros_like(ranked, dtype=torch.bool)
        is_outlier = is_outlier.scatter_(0, ranked.argsort(descending=True, stable=True)[:outliers], True)
        is_outlier = is_outlier.view_as(novelty)
        until = torch.arange(number + 1, device=novelty.device) * (kept - outliers) // number
        return is_outlier, _evenly(frames.present & ~is_outlier, until.diff())


def _novelty(video: FrameContext) -> Tensor:
    """[F, P] fp32 in [0, 2]: 1 - the cosine of each token with the mean over time of its patch; 2 if not finite."""
    frames, _, width = video.hidden.shape
    if frames == 1:
        return _novelty_of(video.hidden[0, :, None].float(), video.present[0, :, None])[None, :, 0]
    some = max(1, _ELEMENTS // (frames * width))  # patches
    parts = zip(video.hidden.split(some, 1), video.present.split(some, 1), strict=True)
    return torch.cat([_novelty_of(hidden.float(), present) for hidden, present in parts], 1)


def _novelty_of(hidden: Tensor, present: Tensor) -> Tensor:
    """The same for some patches, hidden [F, p, D] fp32 and present [F, p] bool."""
    counts = (present & hidden.isfinite().all(-1))[..., None]
    usual = hidden.masked_fill(~counts, 0.0).sum(0, keepdim=True)  # as good as the mean: only its direction counts
    cosine = F.cosine_similarity(hidden, usual, dim=-1)
    return (1 - cosine).nan_to_num(nan=2.0).clamp(0.0, 2.0)


def _evenly(among: Tensor, counts: Tensor) -> Tensor:
    """[F, P] bool: of these [F, P] bool, `counts` [F] of each frame, or all, at even distances from a turning start."""
    total = among.sum(1, keepdim=True).clamp_min(1)
    start = (torch.arange(len(among), device=among.device, dtype=torch.float64)[:, None] * _GOLDEN % 1 * total).long()
    place = (among.cumsum(1) - 1 - start) % total
    counts = torch.minimum(counts[:, None], total)
    return among & ((place + 1) * counts // total > place * counts // total)
