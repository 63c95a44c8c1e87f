"""What the methods that work before the first layer share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import check_budget
from .base import Method, MethodState, Prompt, Steps, VideoTokens

if TYPE_CHECKING:
    from .chain import Chain


class BeforeLayers(Method):
    """A method that works before the first layer only, so that another method can follow: `first + second`.

    Subclasses define `shorten`. A budget of 1 keeps everything without asking them.
    """

    def __add__(self, other: Method) -> Chain:
        from .chain import Chain

        return Chain([self, other]) if isinstance(other, Method) else NotImplemented

    def begin(self, prompt: Prompt) -> MethodState:
        return BeforeLayersState(self, prompt)

    def num_kept(self, tokens: VideoTokens) -> int:
        """round(budget * video tokens), at least 1."""
        return self._num_kept_of(tokens.num_video)

    def _num_kept_of(self, num_video: int) -> int:
        return max(1, round(self.budget * num_video))

    def shorten(self, tokens: VideoTokens, prompt: Prompt) -> Steps:
        """The tokens that stay, of all tokens of the sample.

        Args:
            tokens: as the first layer would get them.
            prompt: the sample.
        """
        raise NotImplementedError(f"{type(self).__name__} must define shorten")


class BeforeLayersState(MethodState):
    """Shortens the tokens once, before the first layer."""

    method: BeforeLayers

    def before_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        return [] if layer > 0 or self.method.budget == 1 else self.shorten(tokens)

    def shorten(self, tokens: VideoTokens) -> Steps:
        """Asked once, with all tokens."""
        return self.method.shorten(tokens, self.prompt)


@dataclass(frozen=True)
class ScoringMethod(BeforeLayers, ABC):
    """Keep the round(budget * tokens) video tokens with the highest scores, before the first layer.

    A subclass defines `score`, and its own parameters if it has any. Scores are compared in fp32; ties go to the
    earlier token.

    Args:
        budget: video tokens to keep, as a fraction of the prompt's, in (0, 1].

    Raises:
        TypeError, ValueError: a budget out of range; while it runs, scores of another type or shape.
    """

    budget: float = 0.3

    def __post_init__(self) -> None:
        check_budget(type(self).__name__, "budget", self.budget)

    @abstractmethod
    def score(self, tokens: VideoTokens, prompt: Prompt) -> Tensor:
        """How much each token matters: real numbers [1, N] on any device; those of text do not count.

        Args:
            tokens: all N tokens of the sample, as the first layer would get them: `tokens.hidden` is [1, N, D].
            prompt: the sample: `prompt.frame[tokens.position[0].cpu()]` is the frame of each token.
        """

    def count(self, frames: int, patches: int) -> int | None:
        return self._num_kept_of(frames * patches)

    def shorten(self, tokens: VideoTokens, prompt: Prompt) -> Steps:
        scores = self.score(tokens, prompt)
        name = type(self).__name__
        if not isinstance(scores, Tensor) or scores.dtype == torch.bool or scores.is_complex():
            got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"{name}: score must return a tensor of real numbers, got {got}")
        if scores.shape != tokens.position.shape:
            raise ValueError(
                f"{name}: score must return one number per token, {list(tokens.position.shape)}, "
                f"got {list(scores.shape)}"
            )
        return tokens.keep_top(scores.to(tokens.hidden.device, torch.float32), self.num_kept(tokens))
