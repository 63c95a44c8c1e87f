"""What a task is: samples with questions, and whether an answer is right. Tasks are found by name.

`fftriton eval --task NAME` takes a task of the package, the name of an entry point of the group `fftriton.tasks`, or
`module:Class`. A task is any class with the members of `Task`; the needle task (fftriton/needle/task.py) is one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import Tensor

from ..runtime.processing import Processor
from ..runtime.video import Video

BUILT_IN = {"needle": "fftriton.needle.task:NeedleTask"}
"""The tasks of the package: where the class of each name is."""


class Sample(Protocol):
    """One video and one question about it."""

    @property
    def index(self) -> int:
        """Its number in the task, from 0."""

    @property
    def kind(self) -> str:
        """The kind of its question, one of the task's kinds."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str:
        """The right answer."""

    @property
    def depth(self) -> float | None:
        """Where in the video the answer is to be seen, from 0 to 1; None if in no single place."""

    @property
    def video(self) -> Video: ...


class Task(Protocol):
    """Samples, and what makes an answer right. Constructed as `Task(split, seed, num_frames)`.

    Attributes:
        split: the part of the task that the samples are from.
        kinds: the kinds of questions.
        digest: of everything that the samples depend on; records of another digest are not used.
    """

    split: str | None
    kinds: Sequence[str]

    @property
    def digest(self) -> str: ...

    def sample(self, index: int) -> Any:
        """A `Sample`: the same one for the same index."""

    def inputs(self, sample: Any, processor: Processor) -> dict[str, Tensor]:
        """The arguments of the model's `generate`."""

    def score(self, sample: Any, answer: str) -> bool:
        """Whether the answer is right."""

    def unrelated_question(self, sample: Any) -> str:
        """A question that has nothing to do with the sample's, for methods that read the question: a control."""


def make_task(name: str, split: str | None = None, seed: int = 0, num_frames: tuple[int, ...] = ()) -> Task:
    """The task of this name.

    Args:
        name: a task of the package, an entry point of the group `fftriton.tasks`, or `module:Class`.
        split: of the task; None for its default.
        seed: picks the samples.
        num_frames: lengths of the videos, which take turns; empty for the split's own.

    Raises:
        ValueError: an unknown name, or an argument that the task refuses.
    """
    return _find(name)(split, seed, num_frames)


def task_names() -> list[str]:
    """The names of the tasks that are installed."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group="fftriton.tasks"))})


def _find(name: str) -> Any:
    if name in BUILT_IN:
        return _load(BUILT_IN[name])
    for point in entry_points(group="fftriton.tasks", name=name):
        return point.load()
    if ":" in name:
        try:
            return _load(name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"eval: task must be importable as module:Class, got '{name}': {error}") from error
    names = ", ".join(map(repr, task_names()))
    raise ValueError(f"eval: task must be one of {names}, got {name!r}; other tasks are given as module:Class")


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
