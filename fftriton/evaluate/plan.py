"""The plan of an evaluation, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

from ..checks import check_budget, check_choice, check_count
from ..methods import KeepAll, Method, RandomTokens
from ..methods.components import Component, class_of, make
from ..methods.registry import RELEVANCES
from ..methods.text import read
from ..runtime.target import Target
from .relevance import UNRELATED, SampleRelevance, sample_relevance
from .tasks import Task, make_task, sample_count


@dataclass(frozen=True)
class Setting:
    """One way of running the model: a method at a budget.

    Attributes:
        name: method as text, as for `methods.parse`: "framefusion:similarity_threshold=0.9". For kvtp, `relevance`
            names the checkpoint of a SigLIP, and question=unrelated gives it a question about another needle.
        budget: fraction of the video tokens to keep, in (0, 1]; 1 for keep-all.
    """

    name: str
    budget: float

    def method(self, index: int = 0) -> Method:
        """Make the method for one sample; random draws depend on the sample's index.

        Raises:
            ValueError, TypeError: a method or parameter is unknown or out of range.
        """
        try:
            return make([self._adapt(part, index) for part in read(self.name)], self.budget)
        except TypeError as error:
            raise TypeError(f"methods: '{self.name}' cannot be made: {error}") from None

    @property
    def relevances(self) -> list[SampleRelevance]:
        """The predictors that are named."""
        named = [part.parameters.get("relevance") for part in read(self.name)]
        return [sample_relevance(checkpoint) for checkpoint in named if _is_checkpoint(checkpoint)]

    @property
    def is_control(self) -> bool:
        """Whether the method gets a question that is unrelated to the sample's, as a control."""
        return any(part.parameters.get("question") == UNRELATED for part in read(self.name))

    def _adapt(self, part: Component, index: int) -> Component:
        """Replace the parameters that have a meaning only in an evaluation."""
        parameters = dict(part.parameters)
        if class_of(part) is RandomTokens:
            parameters.setdefault("seed", index)
        check_choice("methods", "question", parameters.pop("question", UNRELATED), (UNRELATED,))
        if _is_checkpoint(parameters.get("relevance")):
            parameters["relevance"] = sample_relevance(parameters["relevance"])
        return Component(part.name, parameters)

    def problem(self, num_layers: int) -> str | None:
        """The reason why the method cannot work at this budget and number of layers, or None if it can."""
        try:
            self.method().check(num_layers)
        except ValueError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Plan:
    """Methods, budgets, samples and the model of an evaluation.

    Args:
        methods: methods as text, as for `methods.parse`: "fastv:layer=3".
        budgets: fractions of the video tokens to keep, in (0, 1]. keep-all runs once.
        task: name of a task, see tasks.py.
        split: split of the task; None for its default.
        samples: number of samples, at least 1: those with the indices 0, 1, ...
        seed: selects the samples, which training never saw.
        num_frames: lengths of the videos, used in turn; empty for the split's own.
        target: the model; without a name, the task's own if it has one.
        out: folder for records and results.
        reference: the method that the others are tested against, at the same budget; one of `methods`. None for the
            one that keeps everything, or else the first.

    Raises:
        ValueError, TypeError: an invalid parameter; the message names the parameter, the rule and the value.
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
        sample_count(self.make_task(), self.samples)
        check_settings("eval", self.methods, self.budgets)
        if self.reference is not None:
            check_choice("eval", "reference", self.reference, self.methods)

    def make_task(self) -> Task:
        """Make the task with its split, seed and lengths."""
        return make_task(self.task, self.split, self.seed, self.num_frames)

    @property
    def answering(self) -> Target:
        """The model that answers: `target`, or, if that names none, the task's own."""
        checkpoint = getattr(self.make_task(), "checkpoint", None)
        return replace(self.target, model=str(checkpoint)) if self.target.model is None and checkpoint else self.target

    @property
    def settings(self) -> list[Setting]:
        """Each method at each budget; keep-all once, because it has no budget."""
        return make_settings(self.methods, self.budgets)

    def counterpart(self, setting: Setting) -> Setting | None:
        """The setting that this one is tested against; None for the reference itself and for keep-all."""
        reference = self.reference
        if reference is None:
            reference = next(filter(keeps_all, self.methods), self.methods[0])
        if setting.name == reference or keeps_all(setting.name):
            return None
        return Setting(reference, 1.0 if keeps_all(reference) else setting.budget)


def check_settings(owner: str, methods: Sequence[str], budgets: Sequence[float]) -> None:
    """Raise a ValueError or TypeError unless each of the methods can be made with each of the budgets.

    Args:
        owner: what the message starts with.
        methods: methods as text.
        budgets: fractions of the video tokens to keep.
    """
    for name, values in (("methods", methods), ("budgets", budgets)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{owner}: {name} must be one or more, each once, got {values!r}")
    for budget in budgets:
        check_budget(owner, "budgets", budget)
    for method in methods:
        if "budget" in read(method)[-1].parameters:
            raise ValueError(f"{owner}: methods must leave the budget of the last one to budgets, got '{method}'")
        Setting(method, min(budgets)).method()  # a chain whose first budget is fixed cannot meet all budgets


def make_settings(methods: Sequence[str], budgets: Sequence[float]) -> list[Setting]:
    """Each method at each budget; keep-all once, because it has no budget."""
    return [Setting(name, budget) for name in methods for budget in ((1.0,) if keeps_all(name) else budgets)]


def _is_checkpoint(relevance: object) -> TypeGuard[str]:
    """Whether a relevance names a checkpoint, and not the model's own attention."""
    return isinstance(relevance, str) and relevance not in RELEVANCES


def keeps_all(name: str) -> bool:
    """Whether this is the name of a method that keeps everything."""
    return [class_of(part) for part in read(name)] == [KeepAll]
