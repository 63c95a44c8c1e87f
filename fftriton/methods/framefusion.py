"""FrameFusion: merge similar tokens of adjacent frames at the first layers, then prune by attention to a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fftriton_kernels import linked_cosine_similarity, merge_roots

from ..checks import check_budget, check_count, check_real
from .base import Method, Prompt, VideoTokens

_ROUNDING = 1e-9  # of token counts that are exact but for floating point


@dataclass(frozen=True)
class FrameFusion(Method):
    """Merge, layer after layer, the video tokens that resemble the same patch one frame earlier; then prune once.

    Merging happens before the first layer's attention and after each layer's attention, for as long as at least
    `min_merge_ratio` of the video tokens merge. The next layer then keeps the most attended tokens, so many that the
    mean over layers meets the budget. Where similar pairs abound, only the most similar ones that meet the budget
    merge, and nothing is pruned. A budget below the least that a prompt allows is met as closely as possible.

    Args:
        budget: mean over layers of the video tokens in attention, as a fraction of the prompt's, in (0, 1].
        similarity_threshold: cosine from which a token joins the token before it, in [-1, 1].
        min_merge_ratio: merging ends when a smaller fraction of the video tokens merges, in [0, 1].
        importance_queries: attention is summed over the last so many queries; None (the paper) for all. The authors'
            code uses 1 for Qwen2 and 4 for Qwen2-VL.

    Raises:
        TypeError, ValueError: a parameter out of range.

    Source:
        FrameFusion, ICCV 2025, arXiv:2501.01986.
    """

    budget: float = 0.3
    similarity_threshold: float = 0.6
    min_merge_ratio: float = 0.1
    importance_queries: int | None = None

    def __post_init__(self) -> None:
        check_budget("FrameFusion", "budget", self.budget)
        check_real("FrameFusion", "similarity_threshold", self.similarity_threshold, -1.0, 1.0)
        check_real("FrameFusion", "min_merge_ratio", self.min_merge_ratio, 0.0, 1.0)
        if self.importance_queries is not None:
            check_count("FrameFusion", "importance_queries", self.importance_queries, 1)

    def begin(self, prompt: Prompt) -> Method:
        """The calls of one prefill."""
        return _Fusion(self, prompt)


class _Fusion(Method):
    """One prefill: tokens spent so far, and whether it merges, prunes next, or is done."""

    def __init__(self, method: FrameFusion, prompt: Prompt) -> None:
        self.method, self.prompt, self.budget = method, prompt, method.budget
        self.unspent = method.budget * prompt.num_layers * prompt.num_video_tokens  # tokens x layers
        self.first_layer = prompt.num_video_tokens  # video tokens that layer 0 cannot do without
        self.phase = "merge"

    @property
    def least_budget(self) -> float:
        layers, video = self.prompt.num_layers, self.prompt.num_video_tokens
        return (self.first_layer + layers - 1) / (layers * video)

    def wants_attention(self, layer: int) -> bool:
        return self.phase != "done" and layer < self.prompt.num_layers - 1

    def before_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        if layer > 0:
            return None
        return self._merge(tokens, self.prompt.num_layers)

    def after_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        if not self.wants_attention(layer):
            return None
        self.unspent -= tokens.num_video
        layers_left = self.prompt.num_layers - layer - 1
        return self._merge(tokens, layers_left) if self.phase == "merge" else self._prune(tokens, layers_left)

    def _merge(self, tokens: VideoTokens, layers_left: int) -> VideoTokens | None:
        affordable = self.unspent / layers_left  # video tokens a layer from here on
        excess = tokens.num_video - affordable
        similarity = linked_cosine_similarity(tokens.hidden, tokens.predecessor)
        similar = (similarity >= self.method.similarity_threshold).sum()
        limit = max(0, math.floor(excess + _ROUNDING))
        merged = tokens.merge_groups(
            merge_roots(similarity, tokens.predecessor, self.method.similarity_threshold, max_merges=limit)
        )
        if layers_left == self.prompt.num_layers:
            self.first_layer = tokens.num_video - int(similar)
        if int(similar) >= excess - _ROUNDING:  # enough similar pairs: the budget is met by merging alone
            self.phase = "done"
            return merged
        payable = merged.num_video + (layers_left - 1) <= self.unspent + _ROUNDING
        if not payable and tokens.attention is not None:
            return self._prune(tokens, layers_left)
        if not payable or int(similar) < self.method.min_merge_ratio * tokens.num_video:
            self.phase = "prune"
        return merged

    def _prune(self, tokens: VideoTokens, layers_left: int) -> VideoTokens:
        self.phase = "done"
        count = min(tokens.num_video, max(1, round(self.unspent / layers_left)))
        assert tokens.attention is not None  # asked for by wants_attention
        return tokens.keep_top(tokens.attention(self.method.importance_queries), count)
