"""FlashVID: the most diverse tokens of each frame; the others merge along trees through time, then into clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fftriton_kernels import NO_LINK, merge_roots

from ..checks import check_bool, check_budget, check_count, check_real
from .base import Prompt, Steps, VideoTokens
from .before_layers import BeforeLayers
from .budgets import shared_out
from .clusters import density_peaks
from .diversity import most_diverse
from .frames import FrameRows
from .importances import Importance, check_importance, importance_of
from .nearest import nearest
from .segments import segment_starts


@dataclass(frozen=True)
class FlashVID(BeforeLayers):
    """Keep the most diverse tokens of each frame, and merge the others: first through time, then within frames.

    1. The video is cut into segments where the means of neighbouring frames have a cosine below `segment_threshold`,
       and at the lowest of the other cosines, until there are `min_segments`.
    2. The share `diverse` of the budget goes to tokens that stay as they are, the same number of each frame: one after
       the other, the token that is farthest from those already chosen.
    3. Each other token joins the most similar one of the others in the frame before, within its segment, if their
       cosine is at least `similarity_threshold`. Trees grow so, and become their means, at their first tokens.
    4. The rest of the budget is shared among frames in proportion to what is left there. Each frame's tokens merge into
       so many clusters, found by density peaks, at the tokens with the highest peaks.

    It needs nothing but the tokens; the published distances are multiplied by the attention in the vision tower, for
    which `importance` has a place. The rest of FlashVID prunes in layer 20: `FlashVID(1.25 * budget) +
    FastV(budget, layer=20)`. Ties go to the earlier token.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].
        diverse: the share of the budget for tokens that stay as they are, in [0, 1].
        similarity_threshold: cosine from which a token joins another one of the frame before, in [-1, 1].
        segment_threshold: cosine of the means of neighbouring frames below which a segment ends, in [-1, 1].
        min_segments: the fewest segments of a video, unless it has fewer frames.
        importance: what the distances to a token are multiplied by when it may be chosen: None, "distinctness", "norm",
            or a function of a FrameContext that returns [F, P].
        proportional: whether a row that has merged counts as many times in attention, in every layer that follows and
            in decode, as it stands for tokens: log(size) is added to its scores. Means stay as they are.

    Raises:
        TypeError, ValueError: a parameter out of range. While it runs, what a function returns.

    Source:
        FlashVID, arXiv:2602.08024; `flashvid_compression` in Fanziyang-v/FlashVID, commit 1d37422.
        Proportional attention: ToMe, arXiv:2210.09461, section 3.
    """

    budget: float = 0.3
    diverse: float = 0.7
    similarity_threshold: float = 0.8
    segment_threshold: float = 0.9
    min_segments: int = 8
    importance: str | Importance | None = None
    proportional: bool = False

    def __post_init__(self) -> None:
        check_budget("FlashVID", "budget", self.budget)
        check_real("FlashVID", "diverse", self.diverse, 0.0, 1.0)
        check_real("FlashVID", "similarity_threshold", self.similarity_threshold, -1.0, 1.0)
        check_real("FlashVID", "segment_threshold", self.segment_threshold, -1.0, 1.0)
        check_count("FlashVID", "min_segments", self.min_segments, 1)
        if self.importance is not None:
            check_importance("FlashVID", self.importance, predictor=False)
        check_bool("FlashVID", "proportional", self.proportional)

    def count(self, frames: int, patches: int) -> int | None:
        return None if self.proportional else self._num_kept_of(frames * patches)

    def shorten(self, tokens: VideoTokens, prompt: Prompt) -> Steps:
        frames, total = FrameRows.of_prompt(prompt, tokens, empty=False), self.num_kept(tokens)
        stay = round(self.diverse * total)
        chosen = self._choose(tokens, frames, stay)
        starts = torch.cat(
            [segment_starts(video, self.segment_threshold, self.min_segments) for video in frames.contexts(tokens)]
        )
        similarity, partner = _best_before(tokens, frames, frames.present & ~chosen, starts)
        excess = tokens.num_video - total
        roots = merge_roots(similarity, partner, self.similarity_threshold, max_merges=excess)
        trees = tokens.merge_groups(roots, self.proportional)
        left = frames.after(roots)
        free = left.present & ~chosen
        counts = _shares(free.sum(1), frames.sizes, starts, total - stay, trees.num_video - stay)
        column, centres = density_peaks(trees, left, free, counts)
        roots = left.roots(column, trees.length)
        clusters = trees.merge_groups(roots, self.proportional)
        if clusters.num_video == total:
            return [trees, clusters]
        stays = left.spread(centres | chosen, torch.ones_like(roots, dtype=torch.float32))
        return [trees, clusters, clusters.keep_top(stays[:, _is_root(roots)], total)]  # frames without a cluster

    def _choose(self, tokens: VideoTokens, frames: FrameRows, number: int) -> Tensor:
        """[F, P] bool: the tokens that stay as they are."""
        if number == 0:
            return torch.zeros_like(frames.present)
        counts = shared_out(number, tokens.num_video, torch.ones_like(frames.sizes), frames.sizes)
        weight = None if self.importance is None else importance_of("FlashVID", self.importance, tokens, frames)
        return most_diverse(tokens, frames, counts, weight)


def _best_before(tokens: VideoTokens, frames: FrameRows, free: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar token of the frame before: its cosine [1, N] fp32, and its row [1, N] int64, -1 for none.

    free [F, P] bool: the tokens that may join another one, or be joined. starts [F] bool: frames that follow no other.
    """
    before = torch.arange(len(starts), device=starts.device).roll(1)
    candidates = frames.rows[before].where(free[before] & ~starts[:, None], -1)
    similarity, partner = nearest(tokens, frames, candidates)
    nowhere = torch.full_like(tokens.position, -1)
    unlike = torch.full_like(nowhere, NO_LINK, dtype=torch.float32)
    return frames.spread(similarity.where(free, NO_LINK), unlike), frames.spread(partner, nowhere)


def _shares(left: Tensor, sizes: Tensor, starts: Tensor, number: int, of: int) -> Tensor:
    """[F] int64, the sum of which is `number`: how many of the tokens that are left of each frame stay.

    A segment's part of the number is in proportion to its tokens, a frame's part of that to what is left of it.

    Args:
        left: [F] int64; their sum is `of`.
        sizes: [F] int64, the number of tokens of each frame.
        starts: [F] bool, the frames that a segment starts with.
    """
    segment = starts.cumsum(0) - 1
    of_segment = [torch.zeros_like(sizes).index_add_(0, segment, one)[segment] for one in (sizes, left)]
    share = left * of_segment[0] / of_segment[1].clamp_min(1)
    return shared_out(number, of, share, left)


def _is_root(roots: Tensor) -> Tensor:
    """roots [1, N] -> [N] bool."""
    return roots[0] == torch.arange(roots.shape[1], device=roots.device)
