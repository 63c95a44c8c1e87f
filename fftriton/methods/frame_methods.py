"""What the methods share that give each frame a number of tokens and rank the tokens of each frame."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fftriton_kernels import NO_LINK, linked_cosine_similarity

from ..checks import check_budget
from .base import Prompt, Steps, VideoTokens
from .before_layers import BeforeLayers, BeforeLayersState
from .budgets import frame_budgets
from .frames import FrameRows
from .importances import importance_of
from .pruners import Pruner, best_rows

_ABOVE_ALL = 3.0  # above every 1 - cosine


@dataclass(frozen=True)
class FrameMethod(BeforeLayers, Pruner):
    """Keep the best tokens of each frame, before the first layer; the numbers of all frames add up to the budget.

    A subclass defines `rate`, and `frame_counts` if its numbers follow another rule. It is also a pruner:
    `KVTP(budget, relevance, pruner=method)` takes the numbers from the relevance of the frames instead, and only the
    scores of the tokens from the method, whose own budget then has no effect.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].

    Raises:
        TypeError, ValueError: a budget out of range.
    """

    min_tokens: ClassVar[int] = 0
    """The fewest tokens that any frame keeps. A budget below is met as closely as possible."""

    budget: float = 0.3

    def __post_init__(self) -> None:
        check_budget(type(self).__name__, "budget", self.budget)

    def count(self, frames: int, patches: int) -> int | None:
        return max(frames * min(patches, self.min_tokens), self._num_kept_of(frames * patches))

    @abstractmethod
    def rate(self, tokens: VideoTokens, frames: FrameRows) -> tuple[Tensor, Tensor]:
        """How much each token matters within its frame, [F, P] fp32, and each frame, [F] fp32; higher is more.

        Args:
            tokens: all tokens of the sample, as the first layer would get them.
            frames: where the tokens of its videos stand.
        """

    def frame_counts(
        self, tokens: VideoTokens, frames: FrameRows, scores: Tensor, priority: Tensor, total: int
    ) -> Tensor:
        """How many tokens of each frame stay, [F] int64: here at least `min_tokens`, in proportion to exp(priority).

        Args:
            tokens, frames: as for `rate`.
            scores, priority: what it returned.
            total: the sum.
        """
        budget = total / tokens.num_video
        return frame_budgets(priority, frames.sizes, budget, temperature=1.0, min_tokens=self.min_tokens)

    def shorten_frames(
        self, tokens: VideoTokens, frames: FrameRows, scores: Tensor, counts: Tensor, total: int
    ) -> VideoTokens:
        """The tokens that stay, given the scores and the number of tokens of each frame, and the sum of the numbers."""
        return tokens.keep(best_rows(tokens, frames, scores, counts, total), total)

    def __call__(self, tokens: VideoTokens, frames: FrameRows, counts: Tensor, total: int) -> VideoTokens:
        scores, _ = self.rate(tokens, frames)
        return self.shorten_frames(tokens, frames, scores, counts, total)

    def begin(self, prompt: Prompt) -> _FrameMethodState:
        return _FrameMethodState(self, prompt)


class _FrameMethodState(BeforeLayersState):
    method: FrameMethod
    _least = 0.0

    @property
    def least_budget(self) -> float:
        return max(self.method.budget, self._least)

    def shorten(self, tokens: VideoTokens) -> Steps:
        prompt, method = self.prompt, self.method
        frames = FrameRows.of_prompt(prompt, tokens, empty=False)
        sizes = torch.cat([(layout.positions >= 0).sum(1) for layout in prompt.layouts])
        floor, total = int(sizes.clamp_max(method.min_tokens).sum()), method.num_kept(tokens)
        if total < floor:
            total, self._least = floor, floor / tokens.num_video
        scores, priority = method.rate(tokens, frames)
        counts = method.frame_counts(tokens, frames, scores, priority, total)
        return method.shorten_frames(tokens, frames, scores, counts, total)


def novelty(tokens: VideoTokens, frames: FrameRows, partner: Tensor) -> Tensor:
    """[F, P] fp32: 1 - the cosine of each token with its partner.

    Tokens without a partner come first, those that differ most from the rest of their frame before the others.

    Args:
        tokens: all tokens of one sample.
        frames: the rows of each frame.
        partner: [1, N] int64, an earlier row for each row, or -1.
    """
    similarity = frames.take(linked_cosine_similarity(tokens.hidden, partner))
    alone = importance_of("novelty", "distinctness", tokens, frames).clamp_min(0.0)
    return torch.where(similarity == NO_LINK, _ABOVE_ALL + alone, 1 - similarity)
