"""Tasks of `fftriton eval`: found by name, and asked through a small protocol."""

import importlib
import json
import linecache
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint

import pytest
from typer.testing import CliRunner

from fftriton.app.cli import app
from fftriton.evaluate import Plan, evaluate, tasks
from fftriton.evaluate.digests import digest_of_code, digest_of_method
from fftriton.methods import Method, parse, registry
from fftriton.needle import generate_sample
from fftriton.needle.task import NeedleTask
from fftriton.runtime.video import Video

pytest.importorskip("av")  # reads videos


def no_bar(description):
    return nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class Colours:
    """Which colour the box has: a task without splits, lengths or depths."""

    split: str | None = None
    seed: int = 0
    num_frames: tuple = ()

    kinds = ("colour",)
    digest = "colours"

    def sample(self, index):
        return Question(index, generate_sample("easy", self.seed, 5 * index + 4))

    def inputs(self, sample, processor):
        return processor(sample.video, sample.question)

    def score(self, sample, answer):
        return answer == sample.answer

    def unrelated_question(self, sample):
        return "How many boxes appear?"


@dataclass(frozen=True)
class Question:
    index: int
    needle: object
    kind: str = "colour"
    depth: None = None

    @property
    def video(self) -> Video:
        return self.needle.video

    @property
    def question(self):
        return self.needle.question

    @property
    def answer(self):
        return self.needle.answer


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_tasks", sys.modules[__name__])
    arguments = [
        "--task",
        "my_tasks:Colours",
        "--methods",
        "keep-all,framefusion",
        "--budgets",
        "0.5",
        "--samples",
        "2",
    ]
    result = CliRunner().invoke(app, ["eval", *arguments, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["method"], row["samples"]) for row in rows] == [("keep-all", 2), ("framefusion", 2)]
    assert set(rows[0]["by_kind"]) == {"colour"}
    assert not (tmp_path / "depths.png").exists()  # no answer is in one place


def test_tasks_of_other_distributions(monkeypatch):
    point = EntryPoint("colours", f"{__name__}:Colours", "fftriton.tasks")
    for module in (tasks, registry):
        monkeypatch.setattr(module, "entry_points", lambda group: [point])
    assert tasks.task_names() == ["colours", "needle"]
    assert isinstance(tasks.make_task("colours", seed=3), Colours)
    assert tasks.make_task("colours", seed=3).seed == 3


def test_the_needle_task():
    task = tasks.make_task("needle", "hard", 4, (8, 16))
    assert task == NeedleTask("hard", 4, (8, 16))
    for index in (0, 7):
        own, expected = task.sample(index), generate_sample("hard", 4, index, num_frames=(8, 16)[index // 5 % 2])
        assert (own.question, own.answer, own.depth) == (expected.question, expected.answer, expected.needle_depth)
        assert (own.video.frames == expected.frames).all()
        assert task.score(own, f"It is {own.answer}.")
        assert not task.score(own, "nothing")
    assert task.digest == NeedleTask("hard", 4, (8, 16)).digest
    others = (NeedleTask("easy", 4, (8, 16)), NeedleTask("hard", 5, (8, 16)), NeedleTask("hard", 4))
    assert len({task.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize("name", ["no_such_module:Task", "json:NoSuchTask", ".x:Task"])
def test_tasks_that_cannot_be_imported(name):
    with pytest.raises(ValueError, match=f"task must be a class that can be imported, got '{name}'"):
        tasks.make_task(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("os:getcwd", "task must be a class, got 'os:getcwd'"), (f"{__name__}:Lacking", "lacks .*'digest', 'sample'")],
)
def test_what_is_no_task(name, message):
    with pytest.raises(TypeError, match=message):
        Plan(task=name)


class Lacking:
    """Has nothing of a task but its constructor."""

    def __init__(self, split, seed, num_frames):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": 7}, r"sample\(0\) must have this index, got 7"),
        ({"kind": "shape"}, "kind must be one of .'colour'., got 'shape' in sample 0"),
    ],
)
def test_samples_that_cannot_be(tmp_path, monkeypatch, changes, message):
    sample = Colours.sample
    monkeypatch.setattr(Colours, "sample", lambda self, index: replace(sample(self, index), **changes))
    plan = Plan(methods=("keep-all",), samples=1, task=f"{__name__}:Colours", out=tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluate(plan, no_bar)


def test_inputs_without_a_video_are_refused(tmp_path, monkeypatch):
    def text_only(self, sample, processor):
        return dict(processor.tokenizer("what red", return_tensors="pt"))

    monkeypatch.setattr(Colours, "inputs", text_only)
    plan = Plan(methods=("framefusion",), samples=1, task=f"{__name__}:Colours", out=tmp_path)
    with pytest.raises(ValueError, match="the inputs of sample 0 must contain a video"):
        evaluate(plan, no_bar)


METHOD = """
from dataclasses import dataclass
from fftriton import ScoringMethod

@dataclass(frozen=True)
class Edge(ScoringMethod):
    budget: float = 0.3

    def score(self, tokens, prompt):
        return {sign}tokens.position.float()
"""


def test_a_method_whose_code_has_changed_is_asked_again(tmp_path, monkeypatch):
    """The text of the method, its parameters and the version of the package are as before."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    keys = []
    for sign in ("", "-"):
        (tmp_path / "edges.py").write_text(METHOD.format(sign=sign))
        sys.modules.pop("edges", None)
        importlib.invalidate_caches()
        linecache.checkcache()
        plan = Plan(methods=("edges:Edge",), budgets=(0.2,), samples=1, out=tmp_path / "out")
        _, records = evaluate(plan, no_bar)
        keys.append(records[plan.settings[0]][0].key)
    assert keys[0] != keys[1]


class Plain(Method):
    """A method that is no dataclass."""

    def __init__(self, budget=0.3):
        self.budget = budget


def test_methods_that_are_no_dataclasses_have_digests():
    assert digest_of_method(Plain()) == digest_of_method(Plain())
    assert digest_of_method(Plain()) != digest_of_method(parse("keep-all"))


def test_digests_of_code():
    def made(sign):
        space = {"__name__": "typed"}
        exec(f"class Typed:\n    def score(self, x):\n        return {sign}x, {{'a', 'b'}}, 1.5", space)
        return digest_of_code(space["Typed"])

    assert made("") == made("")
    assert made("") != made("-")
    first, second = (digest_of_method(parse(text)) for text in ("kvtp:pruner=tome", "fastv:layer=3"))
    assert first != second
