"""StreamingLLM: every token attends to the first tokens and to the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_budget, check_count
from .base import Method, MethodState, Prompt, Window


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Restrict attention to sinks, the first tokens of the prompt, and a window of the most recent tokens.

    Sinks and window together are round(budget * prompt) tokens, including text. They hold for every query, in the
    prefill and for each new token, and the KV cache holds no more. Positions stay those of the prompt. Attention and
    cache become smaller, but every token still goes through every layer's projections and feed-forward block; `report`
    counts them in `rows_per_layer`. Does not work with flash attention, which takes no such mask.

    Args:
        budget: tokens that a query attends to, as a fraction of the prompt's, in (0, 1].
        sinks: number of tokens at the start of the prompt. The window has at least one token, whatever the budget.

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

    def begin(self, prompt: Prompt) -> MethodState:
        return _StreamingLLMState(self, prompt)


class _StreamingLLMState(MethodState):
    method: StreamingLLM

    def window(self, length: int) -> Window | None:
        budget, sinks = self.method.budget, self.method.sinks
        return None if budget == 1 else Window(sinks, max(1, round(budget * length) - sinks))
