"""FrameFusion: merge similar tokens of adjacent frames at the first layers, then prune by attention to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fftriton_kernels import linked_cosine_similarity, merge_roots

from ..checks import check_bool, check_budget, check_choice, check_count, check_real
from .base import Method, MethodState, Prompt, Steps, VideoTokens

STAGES = (("merge", "prune"), ("merge",), ("prune",), ("prune", "merge"))

_ROUNDING = 1e-9  # of token counts that are exact but for floating point


@dataclass(frozen=True)
class FrameFusion(Method):
    """Merge, layer after layer, the video tokens that resemble the same patch one frame earlier; then prune once.

    Merging happens before the first layer's attention and after each layer's attention, as long as at least
    `min_merge_ratio` of the video tokens merge. The next layer then keeps the most attended tokens: as many as the
    budget, averaged over layers, allows. If there are more similar pairs than the budget requires, only the most
    similar ones merge, and nothing is pruned. A budget below the lowest that a prompt allows is met as closely as
    possible.

    The last three parameters take the method apart, for ablations. If merging is the last stage, it continues at every
    layer until the budget is met, and cannot meet it if too few tokens are similar.

    Args:
        budget: video tokens in a layer's attention, averaged over layers, as a fraction of the prompt's, in (0, 1].
        similarity_threshold: cosine from which a token merges into the same patch one frame earlier, in [-1, 1].
        min_merge_ratio: merging ends once a smaller fraction of the video tokens merges, in [0, 1].
        importance_queries: attention is summed over this many of the last queries; None (the paper) for all queries.
            The authors' code uses 1 for Qwen2 and 4 for Qwen2-VL.
        stages: what happens, in order: ("merge", "prune"), ("merge",), ("prune",) or ("prune", "merge"). Pruning before
            merging drops half of the tokens that have to go.
        start_layer: the first layer whose attention may see fewer tokens. Pruning needs attention, so it cannot affect
            layer 0.
        cascaded: merge at one layer after the other; False: at one layer only.
        proportional: whether a row that has merged counts as many times in attention, in every layer that follows and
            in decode, as it stands for tokens: log(size) is added to its scores. Means stay as they are.

    Raises:
        TypeError, ValueError: a parameter out of range; at `reduce`, a budget that the layers before `start_layer`
            exceed.

    Source:
        FrameFusion, ICCV 2025, arXiv:2501.01986.
        Proportional attention: ToMe, arXiv:2210.09461, section 3.
    """

    budget: float = 0.3
    similarity_threshold: float = 0.6
    min_merge_ratio: float = 0.1
    importance_queries: int | None = None
    stages: tuple[str, ...] = ("merge", "prune")
    start_layer: int = 0
    cascaded: bool = True
    proportional: bool = False

    def __post_init__(self) -> None:
        check_budget("FrameFusion", "budget", self.budget)
        check_real("FrameFusion", "similarity_threshold", self.similarity_threshold, -1.0, 1.0)
        check_real("FrameFusion", "min_merge_ratio", self.min_merge_ratio, 0.0, 1.0)
        if self.importance_queries is not None:
            check_count("FrameFusion", "importance_queries", self.importance_queries, 1)
        check_choice("FrameFusion", "stages", self.stages, STAGES)
        check_count("FrameFusion", "start_layer", self.start_layer, 0)
        check_bool("FrameFusion", "cascaded", self.cascaded)
        check_bool("FrameFusion", "proportional", self.proportional)

    def check(self, num_layers: int) -> None:
        """Raise a ValueError if the layers before `start_layer` already spend the budget."""
        if self.start_layer and self.budget < 1 and self.budget * num_layers <= self.start_layer:
            raise ValueError(
                f"FrameFusion: budget must be above start_layer / num_layers = {self.start_layer}/{num_layers}, "
                f"because the first {self.start_layer} layers keep everything; got {self.budget}"
            )

    def begin(self, prompt: Prompt) -> MethodState:
        return _FrameFusionState(self, prompt)


class _FrameFusionState(MethodState):
    """Keeps track of the budget and of the stages that are left."""

    method: FrameFusion

    def __init__(self, method: FrameFusion, prompt: Prompt) -> None:
        super().__init__(method, prompt)
        self.unspent = method.budget * prompt.num_layers * prompt.num_video_tokens  # tokens x layers
        first = prompt.next_attention(max(1, method.start_layer) - 1)  # the first layer with scores to prune by
        self.full_layers = min(first + 1, prompt.num_layers)
        self.full = prompt.num_video_tokens  # the fewest that these layers can hold
        self.stages = list(method.stages)

    @property
    def least_budget(self) -> float:
        layers, video = self.prompt.num_layers, self.prompt.num_video_tokens
        if self.method.stages[-1] == "merge":
            return self.method.budget - min(self.unspent, 0) / (layers * video)
        return (self.full * self.full_layers + layers - self.full_layers) / (layers * video)

    def wants_attention(self, layer: int) -> bool:
        return "prune" in self.stages and self._acts_in(layer)

    def _acts_in(self, layer: int) -> bool:
        return bool(self.stages) and self.method.start_layer - 1 <= layer < self.prompt.num_layers - 1

    def before_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        if layer > 0 or self.method.start_layer > 0 or self.stages[0] != "merge":
            return []
        return self._merge(tokens, self.prompt.num_layers)

    def after_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        self.unspent -= tokens.num_video
        if not self._acts_in(layer):
            return []
        layers_left = self.prompt.num_layers - layer - 1
        if self.stages[0] == "merge":
            return self._merge(tokens, layers_left)
        return [] if tokens.attention is None else self._prune(tokens, layers_left)

    def _merge(self, tokens: VideoTokens, layers_left: int) -> VideoTokens:
        affordable = self.unspent / layers_left  # video tokens per layer from here on
        excess = tokens.num_video - affordable
        similarity = linked_cosine_similarity(tokens.hidden, tokens.predecessor)
        found = _on_its_way((similarity >= self.method.similarity_threshold).sum())
        limit = max(0, math.floor(excess + _ROUNDING))
        merged = tokens.merge_groups(
            merge_roots(similarity, tokens.predecessor, self.method.similarity_threshold, max_merges=limit),
            self.method.proportional,
        )
        similar = found()  # has arrived, because merging has waited for the GPU
        if layers_left == self.prompt.num_layers:
            self.full = tokens.num_video - similar
        if similar >= excess - _ROUNDING:  # enough similar pairs: the budget is met by merging alone
            self.stages = []
            return merged
        prunes = "prune" in self.stages
        layer = self.prompt.num_layers - layers_left  # the next one
        full = min(self.prompt.next_attention(layer) + 1 - layer, layers_left)  # run before it can prune again
        payable = merged.num_video * full + (layers_left - full) <= self.unspent + _ROUNDING
        if prunes and not payable and tokens.attention is not None:
            return self._prune(tokens, layers_left)
        few = similar < self.method.min_merge_ratio * tokens.num_video
        if not self.method.cascaded or (prunes and (few or not payable)):
            del self.stages[0]
        return merged

    def _prune(self, tokens: VideoTokens, layers_left: int) -> VideoTokens:
        del self.stages[: self.stages.index("prune") + 1]
        count = self.unspent / layers_left
        if self.stages:  # merging drops the other half; each layer after the next needs a token
            count = min((tokens.num_video + count) / 2, self.unspent - (layers_left - 1))
        assert tokens.attention is not None  # asked for by wants_attention
        scores = tokens.attention(self.method.importance_queries)
        return tokens.keep_top(scores, min(tokens.num_video, max(1, round(count))))


def _on_its_way(count: Tensor) -> Callable[[], int]:
    """Start the copy of a number to the host; the function returned gives it, and waits if it has not arrived."""
    if not count.is_cuda:
        return lambda: int(count)
    on_host = torch.empty_like(count, device="cpu", pin_memory=True)
    with torch.cuda.device_of(count):
        on_host.copy_(count, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

    def read() -> int:
        if not arrived.query():
            arrived.synchronize()
        return int(on_host)

    return read
