"""Chain: methods one after the other. All but the last shorten the prompt before the first layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from .base import FrameScores, Method, MethodState, Prompt, Steps, VideoTokens, Window, list_steps, start, wrong_kind
from .before_layers import BeforeLayers


@dataclass(frozen=True, init=False)
class Chain(Method):
    """Methods one after the other, `first + second + ...`: each gets the tokens that the one before it leaves.

    The budget of each method is a fraction of the whole prompt, so the last one is the total: the video tokens in a
    layer's attention, averaged over layers. If n of n0 tokens are left when a method's turn comes, it works on these n
    at its budget times n0 / n. So KVTP(0.5) + FrameFusion(0.2) keeps half of the tokens before the first layer and a
    fifth on average. Chains in `methods` are taken apart.

    Args:
        methods: one or more; all but the last must work before the first layer only. Budgets must not rise.

    Raises:
        TypeError: something else than a method, or a method in the wrong place.
        ValueError: no methods, or budgets that rise; at `reduce`, whatever the methods raise.
    """

    methods: tuple[Method, ...]

    def __init__(
        self, methods: Sequence[Method] | None = None, second: Method | None = None, *, first: Method | None = None
    ) -> None:
        given: Any = methods if first is None else first
        if isinstance(given, Method) and second is not None:
            warnings.warn("Chain(first, second) is deprecated: write Chain([first, second])", DeprecationWarning, 2)
            given = [given, second]
        elif first is not None or second is not None or not isinstance(given, list | tuple):
            raise TypeError(f"Chain: methods must be a list of methods, got {given!r}")
        parts: list[Any] = []
        for method in given:
            parts += method.methods if isinstance(method, Chain) else [method]
        object.__setattr__(self, "methods", tuple(parts))
        self._check()

    def _check(self) -> None:
        if not self.methods:
            raise ValueError("Chain: methods must be one or more, got none")
        for method in self.methods:
            if not isinstance(method, Method):
                raise TypeError(f"Chain: methods must be methods, got {method!r}")
        for before, method in zip(self.methods, self.methods[1:], strict=False):
            if not isinstance(before, BeforeLayers):
                raise TypeError(
                    f"Chain: methods must work before the first layer, as KVTP does, apart from the last one; got "
                    f"{before!r}"
                )
            if method.budget > before.budget:
                raise ValueError(
                    f"Chain: budgets must not rise, because the last one is the total: that of "
                    f"{type(method).__name__} must not be above that of {type(before).__name__}, {before.budget}; "
                    f"got {method.budget}"
                )
            if method.budget < 1 and "budget" not in _parameters(method):
                raise TypeError(f"Chain: methods must be dataclasses with a field 'budget', got {method!r}")

    def __add__(self, other: Method) -> Chain:
        return Chain([self, other]) if isinstance(other, Method) else NotImplemented

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods))

    @property
    def first(self) -> Method:
        """Deprecated: the first of `methods`."""
        warnings.warn("Chain.first is deprecated: use Chain.methods[0]", DeprecationWarning, stacklevel=2)
        return self.methods[0]

    @property
    def second(self) -> Method:
        """Deprecated: the second of `methods`."""
        warnings.warn("Chain.second is deprecated: use Chain.methods[1]", DeprecationWarning, stacklevel=2)
        return self.methods[1]

    @property
    def budget(self) -> float:  # type: ignore[override]
        """The total."""
        return self.methods[-1].budget

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        """Whether one of the methods is."""
        return any(method.proportional for method in self.methods)

    @property
    def renumbers(self) -> bool:
        return any(method.renumbers for method in self.methods)

    def check(self, num_layers: int) -> None:
        """Raise a ValueError if one of the methods cannot work on a decoder of `num_layers` layers."""
        left = 1.0
        for method in self.methods:
            _scaled(method, 1 / left).check(num_layers)
            left = method.budget

    def about(self, frames: Any, question: str) -> Chain:
        """All of them for one video and one question."""
        return Chain([method.about(frames, question) for method in self.methods])

    def begin(self, prompt: Prompt) -> MethodState:
        return _ChainState(self, prompt)


class _ChainState(MethodState):
    method: Chain

    def __init__(self, method: Chain, prompt: Prompt) -> None:
        super().__init__(method, prompt)
        self.states = [start(method.methods[0], prompt)]  # the others begin once those before them are done
        self.left = 1.0  # fraction of the video tokens that the last method gets

    @property
    def last(self) -> MethodState | None:
        """The state of the last method; None before it has begun, and if nothing was left for it."""
        return self.states[-1] if len(self.states) == len(self.method.methods) else None

    @property
    def least_budget(self) -> float:
        return self.method.budget if self.last is None else self.last.least_budget * self.left

    @property
    def frame_scores(self) -> Sequence[FrameScores]:
        return [scores for state in self.states for scores in state.frame_scores]

    def window(self, length: int) -> Window | None:
        return None if self.last is None else self.last.window(length)

    def wants_attention(self, layer: int) -> bool:
        return self.last is not None and self.last.wants_attention(layer)

    def before_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        if layer > 0:
            return [] if self.last is None else list_steps(self.last.before_attention(layer, tokens))
        steps = list_steps(self.states[0].before_attention(0, tokens))
        for method in self.method.methods[1:]:
            left = steps[-1] if steps else tokens
            if any(map(wrong_kind, steps)):
                break  # an error of the caller's
            if left.num_video == 0:
                break  # nothing is left for the others
            self.left = left.num_video / self.prompt.num_video_tokens
            self.states.append(start(_scaled(method, 1 / self.left), _prompt_of(left, self.prompt)))
            steps = steps + list_steps(self.states[-1].before_attention(0, left))
        return steps

    def after_attention(self, layer: int, tokens: VideoTokens) -> Steps:
        return [] if self.last is None else list_steps(self.last.after_attention(layer, tokens))


def _parameters(method: Method) -> list[str]:
    return [field.name for field in fields(method) if field.init] if is_dataclass(method) else []


def _scaled(method: Method, factor: float) -> Method:
    """The method for a prompt that has become shorter by this factor."""
    budget = min(1.0, method.budget * factor)
    return method if budget == method.budget else replace(method, budget=budget)  # type: ignore[type-var]


def _prompt_of(tokens: VideoTokens, prompt: Prompt) -> Prompt:
    """The prompt, with holes where tokens have left it."""
    left = tokens.position[0].cpu()
    layouts, numbers = [], []
    for video, layout in enumerate(prompt.layouts):
        positions = layout.positions.cpu()
        positions = positions.where(torch.isin(positions, left), -1)
        if bool((positions >= 0).any()):
            layouts.append(replace(layout, positions=positions, length=None))
            numbers.append(prompt.number_of(video))
    return replace(prompt, layouts=layouts, video_numbers=numbers)
