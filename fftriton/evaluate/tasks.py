"""Tasks: samples with questions, and a rule that says whether an answer is right. Tasks are found by name.

`fftriton eval --task NAME` takes a task of the package, the name of an entry point of the group `fftriton.tasks`, or
`module:Class`. A task is any class with the members of `Task`; the needle task (fftriton/needle/task.py) is an example.
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
"""The tasks of the package: module and class of each name."""


class Sample(Protocol):
    """One video and one question about it."""

    @property
    def index(self) -> int:
        """Index of the sample in the task, from 0."""

    @property
    def kind(self) -> str:
        """Kind of the question, one of the task's kinds."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str:
        """The right answer."""

    @property
    def depth(self) -> float | None:
        """Where in the video the answer is visible, from 0 to 1; None if in no single place."""

    @property
    def video(self) -> Video: ...


class Task(Protocol):
    """Samples and the scoring of their answers. Constructed as `Task(split, seed, num_frames)`.

    Attributes:
        split: the part of the task that the samples come from.
        kinds: the kinds of questions.
        digest: digest of everything that the samples depend on; records with another digest are not used.
    """

    split: str | None
    kinds: Sequence[str]

    @property
    def digest(self) -> str: ...

    def sample(self, index: int) -> Any:
        """The `Sample` with this index, always the same one."""

    def inputs(self, sample: Any, processor: Processor) -> dict[str, Tensor]:
        """The arguments of the model's `generate`."""

    def score(self, sample: Any, answer: str) -> bool:
        """Whether the answer is right."""

    def unrelated_question(self, sample: Any) -> str:
        """A question that is unrelated to the sample's: a control for methods that read the question."""


def make_task(name: str, split: str | None = None, seed: int = 0, num_frames: tuple[int, ...] = ()) -> Task:
    """Make the task with this name.

    Args:
        name: a task of the package, an entry point of the group `fftriton.tasks`, or `module:Class`.
        split: split of the task; None for its default.
        seed: selects the samples.
        num_frames: lengths of the videos, used in turn; empty for the split's own.

    Raises:
        ValueError: the name is unknown, or the task refuses an argument.
    """
    return _find(name)(split, seed, num_frames)


def task_names() -> list[str]:
    """The names of all installed tasks."""
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
