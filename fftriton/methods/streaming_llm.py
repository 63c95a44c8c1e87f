"""StreamingLLM: every token attends to the first tokens and to the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_budget, check_count
from .base import Method, Window


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Restrict attention to sinks, the first tokens of the prompt, and a window of the most recent ones.

    Sinks and window together are round(budget * prompt), text included, and hold for every query, in the prefill and
    for each new token; the KV cache holds no more. Positions stay those of the prompt. Attention and cache become
    smaller, but every token still goes through every layer's projections and feed-forward block: `report` counts them
    in `rows_per_layer`. Not for flash attention, which takes no such mask.

    Args:
        budget: tokens that a query attends to, as a fraction of the prompt's, in (0, 1].
        sinks: how many of the first tokens. The window has one token at the least, whatever the budget.

    Raises:
        TypeError, ValueError: a parameter out of range; while it runs, an attention back end without masks.

    Source:
        Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453.
    """

    budget: float = 0.3
    sinks: int = 8

    def __post_init__(self) -> None:
        check_budget("StreamingLLM", "budget", self.budget)
        check_count("StreamingLLM", "sinks", self.sinks, 0)

    def window(self, length: int) -> Window | None:
        if self.budget == 1:
            return None
        return Window(self.sinks, max(1, round(self.budget * length) - self.sinks))
