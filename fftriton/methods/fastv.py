"""FastV: drop the least attended video tokens once, after an early layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_budget, check_count
from .base import Method, MethodState, Prompt, Steps, VideoTokens


@dataclass(frozen=True)
class FastV(Method):
    """Keep all tokens through `layer` layers, then the most attended video tokens for the rest.

    The remaining layers keep the fraction (budget * L - layer) / (L - layer), so that the mean over all layers meets
    the budget. If the last of the first layers has no attention scores (Qwen3.5's linear attention), the next layer
    that has them takes its place.

    Args:
        budget: video tokens kept, averaged over layers, as a fraction of the prompt's, in (0, 1].
        layer: number of layers that see everything, at least 1.
        importance_queries: attention is summed over this many of the last queries (1 as in the authors' code);
            None for all queries.

    Raises:
        TypeError, ValueError: a parameter out of range; at `reduce`, a budget that `layer` full layers exceed.

    Source:
        An Image is Worth 1/2 Tokens After Layer 2, arXiv:2403.06764.
    """

    budget: float = 0.3
    layer: int = 2
    importance_queries: int | None = 1

    def __post_init__(self) -> None:
        check_budget("FastV", "budget", self.budget)
        check_count("FastV", "layer", self.layer, 1)
        if self.importance_queries is not None:
            check_count("FastV", "importance_queries", self.importance_queries, 1)

    def check(self, num_layers: int) -> None:
        """Raise a ValueError if the layers that see everything already spend the budget."""
        if self.budget < 1 and self.budget * num_layers <= self.layer:
            raise ValueError(
                f"FastV: budget must be above layer / num_layers = {self.layer}/{num_layers}, because the first "
                f"{self.layer} layers keep everything; got {self.budget}"
            )

    def begin(self, prompt: Prompt) -> MethodState:
        return _FastVState(self, prompt)


class _FastVState(MethodState):
    method: FastV

    def __init__(self, method: FastV, prompt: Prompt) -> None:
        super().__init__(method, prompt)
        self.full = prompt.next_attention(method.layer - 1) + 1  # number of layers that see everything

    @property
    def least_budget(self) -> float:
        full, layers = self.full, self.prompt.num_layers
        return (full + max(layers - full, 0) / self.prompt.num_video_tokens) / layers

    def wants_attention(self, layer: int) -> bool:
        return layer == self.full - 1 < self.prompt.num_layers - 1 and self.method.budget < 1

    def after_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        if not self.wants_attention(layer):
            return []
        full, layers = self.full, self.prompt.num_layers
        count = round(tokens.num_video * (self.method.budget * layers - full) / (layers - full))
        assert tokens.attention is not None  # asked for by wants_attention
        return tokens.keep_top(tokens.attention(self.method.importance_queries), max(1, count))
