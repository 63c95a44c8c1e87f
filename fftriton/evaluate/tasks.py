"""Tasks: samples with questions, and a rule that says whether an answer is right. Tasks are found by name.

`fftriton eval --task NAME` takes a task of the package, the name of an entry point of the group `fftriton.tasks`,
`module:Class`, or a file of questions (file_task.py). A task is any class with the members of `Task`; the needle task
(fftriton/needle/task.py) is an example.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..methods.registry import entry_point, load
from ..runtime.processing import Processor
from ..runtime.video import Video
from .file_task import SUFFIX, FileTask

GROUP = "fftriton.tasks"
BUILT_IN = {"needle": "fftriton.needle.task:NeedleTask"}
"""The tasks of the package: module and class of each name."""

_SAMPLES = 500
_MEMBERS = ("split", "kinds", "digest", "sample", "inputs", "score", "unrelated_question")


class Sample(Protocol):
    """One video and one question about it.

    It may also have a `query`: the question as a relevance predictor is to read it, in place of `question`.
    """

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

    A task whose samples are limited defines `__len__`. One that wants another model than the shipped one, where the
    user names none, defines `checkpoint`: the folder of the model or its name on the hub, or None.

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
    """The task of this name.

    Args:
        name: a task of the package, an entry point of the group `fftriton.tasks`, `module:Class`, or a file of JSON
            lines, see `FileTask`.
        split: of the task; None for its default. A file has none.
        seed: picks the samples. A file has its own order: 0.
        num_frames: lengths of the videos, which take turns; empty for the split's own.

    Raises:
        TypeError, ValueError: an unknown name, an argument that the task refuses, or a class that is no task.
    """
    if name.endswith(SUFFIX):
        for option, value, only in (("split", split, None), ("seed", seed, 0)):
            if value != only:
                raise ValueError(f"eval: {option} must be {only} for a file of questions, got {value!r}")
        return FileTask(Path(name), num_frames)
    point = entry_point(GROUP, name)
    place = BUILT_IN.get(name) or (point.value if point else name)
    if ":" not in place:
        names = ", ".join(map(repr, task_names()))
        others = f"other tasks are given as module:Class, and questions of your own as FILE{SUFFIX}"
        raise ValueError(f"eval: task must be one of {names}, got {name!r}; {others}")
    task_class = load(place, "eval: task", name)
    if not isinstance(task_class, type):
        raise TypeError(f"eval: task must be a class, got {name!r}, {task_class!r}")
    task = task_class(split, seed, num_frames)
    missing = [member for member in _MEMBERS if not hasattr(task, member)]
    if missing:
        raise TypeError(f"eval: task must have the members of fftriton.evaluate.tasks.Task, {name!r} lacks {missing}")
    return task


def sample_count(task: Task, asked: int | None) -> int:
    """How many samples to take: those asked for, or else all of a limited task, and _SAMPLES of another.

    Raises:
        ValueError: the task has fewer.
    """
    size = len(task) if isinstance(task, Sized) else None
    if size is not None and asked is not None and asked > size:
        raise ValueError(f"eval: samples must be at most {size}, as many as the task has, got {asked}")
    return asked if asked is not None else size or _SAMPLES


def check_sample(task: Task, sample: Any, index: int) -> None:
    """Raise a ValueError unless this can be sample `index` of the task."""
    if sample.index != index:
        raise ValueError(f"eval: task: sample({index}) must have this index, got {sample.index}")
    if sample.kind not in task.kinds:
        raise ValueError(f"eval: task: kind must be one of {list(task.kinds)}, got {sample.kind!r} in sample {index}")


def query_of(sample: Any) -> str:
    """The question of a sample as a relevance predictor reads it."""
    return getattr(sample, "query", sample.question)


def task_names() -> list[str]:
    """The names of the tasks that are installed."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})
