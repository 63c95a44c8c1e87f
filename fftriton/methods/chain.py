"""Two methods one after the other: one that shortens the prompt before the first layer, then one inside the layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..layouts.layout import VideoLayout
from .base import Method, Prompt, VideoTokens, Window


class BeforeLayers(Method):
    """A method that works before the first layer only, so that another one can take over: `first + second`."""

    def __add__(self, second: Method) -> Chain:
        return Chain(self, second) if isinstance(second, Method) else NotImplemented


@dataclass(frozen=True)
class Chain(Method):
    """`first + second`: what `first` leaves is the prompt that `second` gets.

    The budget of `second` is the total: the mean over layers of the video tokens in attention, as a fraction of the
    whole prompt's. Where `first` leaves n of n0 tokens, `second` works on n tokens at its budget times n0 / n. So
    KVTP(0.5) + FrameFusion(0.2) keeps half of the tokens before the first layer and a fifth on average.

    Args:
        first: works before the first layer only.
        second: any method with a budget, not above that of `first`.

    Raises:
        TypeError: a method of another kind. ValueError: budgets that rise; at `reduce`, what `second` says of its own.
    """

    first: BeforeLayers
    second: Any

    def __post_init__(self) -> None:
        if not isinstance(self.first, BeforeLayers):
            raise TypeError(f"Chain: first must work before the first layer, as KVTP does, got {self.first!r}")
        if not isinstance(self.second, Method) or isinstance(self.second, Chain):
            raise TypeError(f"Chain: second must be a method, got {self.second!r}")
        if self.second.budget > self.first.budget:
            raise ValueError(
                f"Chain: the budget of second is the total, so it must not be above that of first, "
                f"{self.first.budget}; got {self.second.budget}"
            )

    def __str__(self) -> str:
        return f"{self.first} + {self.second}"

    @property
    def budget(self) -> float:  # type: ignore[override]
        """The total."""
        return self.second.budget

    @property
    def renumbers(self) -> bool:
        return self.first.renumbers

    def check(self, num_layers: int) -> None:
        """Raise a ValueError where one of them cannot work at this depth."""
        self.first.check(num_layers)
        self._scaled(1 / self.first.budget).check(num_layers)

    def about(self, frames: Any, question: str) -> Chain:
        """Both of them for one video and one question."""
        return Chain(self.first.about(frames, question), self.second.about(frames, question))  # type: ignore[arg-type]

    def begin(self, prompt: Prompt) -> Method:
        """The calls of one prefill."""
        return _Calls(self, prompt)

    def _scaled(self, factor: float) -> Any:
        """`second` for a prompt that has become shorter by this factor."""
        return replace(self.second, budget=min(1.0, self.second.budget * factor))


class _Calls(Method):
    def __init__(self, chain: Chain, prompt: Prompt) -> None:
        self.chain, self.prompt, self.budget = chain, prompt, chain.budget
        self.first = chain.first.begin(prompt)
        self.second: Method | None = None
        self.left = 1.0  # fraction of the video tokens that `first` left

    @property
    def least_budget(self) -> float:
        return self.budget if self.second is None else self.second.least_budget * self.left

    def window(self, length: int) -> Window | None:
        return None if self.second is None else self.second.window(length)

    def wants_attention(self, layer: int) -> bool:
        return self.second is not None and self.second.wants_attention(layer)

    def before_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        shorter = self.first.before_attention(layer, tokens) if layer == 0 else None
        left = tokens if shorter is None else shorter
        if self.second is None:
            self.left = left.num_video / self.prompt.num_video_tokens
            self.second = self.chain._scaled(1 / self.left).begin(_prompt_of(left, self.prompt))
        after = self.second.before_attention(layer, left)
        return shorter if after is None else replace(after, between=shorter)

    def after_attention(self, layer: int, tokens: VideoTokens) -> VideoTokens | None:
        assert self.second is not None  # begun before layer 0
        return self.second.after_attention(layer, tokens)


def _prompt_of(tokens: VideoTokens, prompt: Prompt) -> Prompt:
    """The prompt with holes where tokens have left it."""
    left = tokens.position[0].cpu()
    layouts = []
    for layout in prompt.layouts:
        positions = layout.positions.where(torch.isin(layout.positions, left), -1)
        if bool((positions >= 0).any()):
            layouts.append(VideoLayout(positions, layout.sample))
    return replace(prompt, layouts=layouts)
