"""Follows what a model of remote code does with its videos: the base of the followers in remote_code.py.

Such a model is a module around a language model. A method of its puts the features of videos and images among the
embeddings of the text, and the language model gets the result. A follower wraps that method, on the one object, and
notes for the embeddings that come out of it where the videos are. When these embeddings reach the language model, it
answers as a layout rule. Embeddings that it has not seen are refused: they may hold a video, too.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..layouts.layout import VideoLayout
from .hooks import Undo


@dataclass(eq=False)
class Noted:
    """What is known of embeddings before the language model gets them.

    Args:
        shape: [B, N].
        layouts: of their videos.
        has_vision: whether they hold images or videos.
        labels: [B, N], a copy that may be written to, or None: those of a loss that the language model does not see.
        reached: whether the language model has got them.
    """

    shape: torch.Size
    layouts: list[VideoLayout]
    has_vision: bool
    labels: Tensor | None = None
    reached: bool = False


class _Thread(threading.local):
    """What this thread's call of the model does."""

    expected: Noted | None = None  # what the language model is about to get, if it cannot be told by the object
    latest: Noted | None = None  # what it got last
    encoded: list[tuple[int, set[int]]] | None = None  # images, and tokens of each, that an encoder made in this call


class Follower(ABC):
    """Knows the videos of a model of remote code; called as a layout rule of its language model.

    Args:
        model: the object whose methods are wrapped.
        separators: whether the tokens between frames count as patches, as in the published code of FrameFusion.
    """

    part: ClassVar[str | None]
    """The attribute that holds the language model; None if the model is its own."""
    methods: ClassVar[Mapping[str, Sequence[str]]]
    """Those that the class must have, the one that makes the embeddings first, and the parameters that are read."""
    attributes: ClassVar[Sequence[str]] = ()
    """What else it must have."""

    def __init__(self, model: Any, separators: bool) -> None:
        self.model, self.separators = model, separators
        self._noted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._thread = _Thread()

    @property
    def language_model(self) -> Any:
        """The module to reduce."""
        return self.model if self.part is None else getattr(self.model, self.part)

    @property
    def expands(self) -> bool:
        """Whether the module to reduce may itself be given ids that are not what the decoder gets."""
        return self.part is None

    @abstractmethod
    def install(self, undo: Undo) -> None:
        """Wrap methods of the model; what takes that back is appended to `undo`."""

    def __call__(self, model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
        """The videos among the tokens of a forward, or a prompt, of the language model.

        Raises:
            ValueError: embeddings of unknown origin.
        """
        if arguments.get("inputs_embeds") is None:
            return []
        noted = self._find(arguments["inputs_embeds"])
        if noted is None:
            shape, maker = list(arguments["inputs_embeds"].shape), next(iter(self.methods))
            raise ValueError(
                f"layout: must be given if the language model of {type(self.model).__name__} gets embeddings of shape "
                f"{shape} that are not just as {maker} made them in this block"
            )
        noted.reached, self._thread.latest = True, noted
        return noted.layouts

    @property
    def has_vision(self) -> bool:
        """Whether the last embeddings that the language model got in this thread held images or videos."""
        return self._thread.latest is None or self._thread.latest.has_vision

    def labels(self, embeddings: Tensor) -> Tensor | None:
        """[B, N] labels that belong to the embeddings and may be written to, if the language model is given none."""
        noted = self._find(embeddings)
        return None if noted is None else noted.labels

    def _find(self, embeddings: Tensor) -> Noted | None:
        expected = self._thread.expected
        if embeddings in self._noted:
            return self._noted[embeddings]
        return expected if expected is not None and expected.shape == embeddings.shape[:2] else None

    def _note(self, embeddings: Tensor, noted: Noted) -> None:
        self._noted[embeddings] = noted

    @contextmanager
    def _expecting(self, noted: Noted | None) -> Iterator[None]:
        """Around a call of the model that makes embeddings which cannot be told by the object.

        Raises:
            RuntimeError: the language model has not got a video that it was to get.
        """
        outer, self._thread.expected = self._thread.expected, noted
        try:
            yield
        finally:
            self._thread.expected = outer
        if noted is not None and noted.layouts and not noted.reached:
            raise RuntimeError(
                f"reduce: {type(self.model).__name__} must give the embeddings of a video to its language model "
                f"{type(self.language_model).__name__}, but has not called it"
            )

    def _follow(self, note: Callable[[Mapping[str, Any], Any], Any]) -> Callable[[Callable], Callable]:
        """A wrapper of a method that calls note(arguments by name, output) and returns what that does."""

        def wrapper(method: Callable) -> Callable:
            signature = inspect.signature(method)

            def followed(*args: Any, **kwargs: Any) -> Any:
                output = method(*args, **kwargs)
                with torch.no_grad():
                    return note(named(by_name(signature, args, kwargs)), output)

            return followed

        return wrapper


def by_name(signature: inspect.Signature, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    """The arguments of a call, defaults included."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def named(bound: inspect.BoundArguments) -> Mapping[str, Any]:
    """Arguments by name, also those that a function takes as **kwargs."""
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    more = [value for name, value in bound.arguments.items() if kinds[name] is inspect.Parameter.VAR_KEYWORD]
    return {**bound.arguments, **(more[0] if more else {})}
