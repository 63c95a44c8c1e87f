"""What to evaluate, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..checks import check_budget, check_choice, check_count
from ..methods import KeepAll, Method, RandomTokens
from ..methods.components import Component, class_of, make
from ..methods.text import read
from ..runtime.target import Target
from .relevance import UNRELATED, SampleRelevance, sample_relevance
from .tasks import Task, make_task


@dataclass(frozen=True)
class Setting:
    """One way of running the model: a method at a budget.

    Attributes:
        name: the text of a method, as for `methods.parse`: "framefusion:similarity_threshold=0.9". For kvtp,
            `relevance` names the checkpoint of a SigLIP, and question=unrelated tells it a question about another
            needle.
        budget: fraction of the video tokens to keep, in (0, 1]; 1 for keep-all.
    """

    name: str
    budget: float

    def method(self, index: int = 0) -> Method:
        """The method for one sample; random draws depend on the sample's index.

        Raises:
            ValueError, TypeError: an unknown method or parameter, or one out of range.
        """
        try:
            return make([self._adapt(part, index) for part in read(self.name)], self.budget)
        except TypeError as error:
            raise TypeError(f"methods: '{self.name}' cannot be made: {error}") from None

    @property
    def relevance(self) -> SampleRelevance | None:
        """The predictor that is named, or None."""
        named = [part.parameters["relevance"] for part in read(self.name) if "relevance" in part.parameters]
        return sample_relevance(named[0]) if named else None

    @property
    def is_control(self) -> bool:
        """Whether the method is told a question that has nothing to do with the sample's."""
        return any(part.parameters.get("question") == UNRELATED for part in read(self.name))

    def _adapt(self, part: Component, index: int) -> Component:
        """Replace the parameters that only an evaluation knows."""
        parameters = dict(part.parameters)
        if class_of(part) is RandomTokens:
            parameters.setdefault("seed", index)
        check_choice("methods", "question", parameters.pop("question", UNRELATED), (UNRELATED,))
        if "relevance" in parameters:
            parameters["relevance"] = self.relevance
        return Component(part.name, parameters)

    def problem(self, num_layers: int) -> str | None:
        """Why the method cannot work at this budget and depth; None where it can."""
        try:
            self.method().check(num_layers)
        except ValueError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Plan:
    """Which methods at which budgets, on which samples, by which model.

    Args:
        methods: texts of methods, as for `methods.parse`: "fastv:layer=3".
        budgets: fractions of the video tokens to keep, in (0, 1]. keep-all runs once.
        task: name of a task, see tasks.py.
        split: of the task; None for its default.
        samples: how many, at least 1: those of the indices 0, 1, ...
        seed: picks the samples, which training never saw.
        num_frames: lengths of the videos, which take turns; empty for the split's own.
        target: the model.
        out: folder for records and results.
        reference: the method that the others are tested against, at the same budget; one of `methods`.

    Raises:
        ValueError, TypeError: the parameter, the rule and the value.
    """

    methods: tuple[str, ...] = ("keep-all", "framefusion")
    budgets: tuple[float, ...] = (0.3,)
    task: str = "needle"
    split: str | None = None
    samples: int = 500
    seed: int = 0
    num_frames: tuple[int, ...] = ()
    target: Target = field(default_factory=Target)
    out: Path = Path("fftriton-eval")
    reference: str | None = None

    def __post_init__(self) -> None:
        check_count("eval", "samples", self.samples, 1)
        self.make_task()
        for name in ("methods", "budgets"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"eval: {name} must be one or more, each once, got {values!r}")
        for budget in self.budgets:
            check_budget("eval", "budgets", budget)
        if self.reference is not None:
            check_choice("eval", "reference", self.reference, self.methods)
        for name in self.methods:
            Setting(name, min(self.budgets)).method()  # a chain with a first budget of its own cannot do all

    def make_task(self) -> Task:
        """The task, with its samples picked."""
        return make_task(self.task, self.split, self.seed, self.num_frames)

    @property
    def settings(self) -> list[Setting]:
        """Each method at each budget; keep-all once, as there is nothing to choose."""
        return [
            Setting(name, budget) for name in self.methods for budget in ((1.0,) if _keeps_all(name) else self.budgets)
        ]

    def counterpart(self, setting: Setting) -> Setting | None:
        """The setting that this one is tested against; None for that itself."""
        reference = self.reference
        if reference is None:
            reference = next((name for name in self.methods if not _keeps_all(name)), self.methods[0])
        if setting.name == reference or _keeps_all(setting.name):
            return None
        return Setting(reference, 1.0 if _keeps_all(reference) else setting.budget)


def _keeps_all(name: str) -> bool:
    """Whether this is the name of the method that keeps everything."""
    return [class_of(part) for part in read(name)] == [KeepAll]
