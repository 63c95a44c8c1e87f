"""Runs a calibration: every request is answered with all tokens and in each setting that still has a chance."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import check_real, first_line
from ..evaluate.calibration import Comparison, Race, Results, Row, judge
from ..evaluate.comparing import BLANK, CONTROLS, DENSE, RANDOM, Comparer, IsRight, Question
from ..evaluate.file_task import read_label, read_options, with_options
from ..evaluate.keys import origin_of_answers, record_key
from ..evaluate.plan import Setting, check_settings, keeps_all, make_settings
from ..evaluate.records import RecordFolder
from ..methods import KeepAll, RandomTokens
from ..runtime.encoding import encoded_once
from ..runtime.processes import this_process, wait_for_all
from ..runtime.progress import OpenBar
from ..runtime.sampling import Sampling
from ..runtime.target import Target
from .calibrate_example import Example, make_example
from .clips import Clip, Decoder, Task, ahead, batches, make_tasks, quick_collection, share_pixels
from .requests import Request

_SEED = 0  # of the order in which videos are taken
_WITH_MEMORY = 3  # requests whose peak memory is measured, which takes long


@dataclass(frozen=True)
class Calibration:
    """What to calibrate; checked on construction.

    Args:
        requests: the requests. Equal ones count once. An "answer" or "letter" among their other fields is a label, with
            "options" if there are any, as for `fftriton eval --task FILE.jsonl`.
        methods: methods as text.
        budgets: fractions of the video tokens to keep, in (0, 1].
        keep: mean overlap with the dense model's next-token distributions that a setting must keep, in [0.5, 1).
        target: the model.
        out: folder for records and results.
        sampling, max_pixels: which frames to take, and their size, for requests that do not say; for the settings file.

    Raises:
        ValueError, TypeError: an invalid parameter; the message names the parameter, the rule and the value.
    """

    requests: Sequence[Request]
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    keep: float
    target: Target = field(default_factory=Target)
    out: Path = Path("fftriton-calibrate")
    sampling: Sampling = field(default_factory=Sampling)
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        check_settings("calibrate", self.methods, self.budgets)
        check_real("calibrate", "keep", self.keep, 0.5, 1)
        if self.keep == 1:
            raise ValueError("calibrate: keep must be below 1, because rounding alone changes the distributions, got 1")
        for name in self.methods:
            if keeps_all(name):
                raise ValueError(f"calibrate: methods must not keep all tokens, as the dense model does, got '{name}'")
            if Setting(name, 1.0).is_control:
                raise ValueError(f"calibrate: methods must be told the question that is asked, got '{name}'")
        for request in self.requests:
            if (request.method, request.budget) != (DENSE.name, DENSE.budget):
                raise ValueError(
                    f"calibrate: requests must leave the method and the budget to --methods and --budgets, got "
                    f"'{request.method}' at {request.budget} for '{request.name}'"
                )
            if request.max_new_tokens is not None:
                raise ValueError(
                    "calibrate: requests must leave max_new_tokens to --max-new-tokens, got "
                    f"{request.max_new_tokens} for '{request.name}'"
                )
        self.labelled()

    @property
    def settings(self) -> list[Setting]:
        """Each method at each budget."""
        return make_settings(self.methods, self.budgets)

    def labelled(self) -> list[tuple[Request, IsRight | None]]:
        """The different requests, with their options in the question, and what judges their answers."""
        seen: dict[str, tuple[Request, IsRight | None]] = {}
        for request in self.requests:
            asked, is_right = _read_label(request)
            place = json.dumps([str(asked.video), asked.question, asked.max_pixels, str(asked.sampling)])
            seen.setdefault(place, (asked, is_right))
        return list(seen.values())


@dataclass(frozen=True)
class Found:
    """The results of a calibration.

    Attributes:
        results: the judgement.
        failures: requests without an answer: the video and why.
        origin: what the answers depend on, see `origin_of_answers`.
        example: the first request that was answered, at the recommended setting; None if it was not asked for, if
            nothing is recommended, or if it failed.
        no_example: why it failed.
    """

    results: Results
    failures: list[tuple[str, str]]
    origin: dict[str, Any]
    example: Example | None = None
    no_example: str = ""


def calibrate(plan: Calibration, open_bar: OpenBar, with_example: bool = False) -> Found:
    """Compare all settings with the dense model, except for what the plan's folder already has.

    Under `accelerate launch` or `torchrun` the processes share the videos; each returns all results.

    Args:
        plan: what to calibrate.
        open_bar: opens a progress bar.
        with_example: whether the main process also runs one request at the recommended setting, for `Found.example`.

    Raises:
        ValueError, TypeError: the model cannot be used.
        OSError: a record cannot be written.
    """
    wait_for_all()  # fails now, not after the work, if they cannot wait for each other
    process = this_process()
    target = process.own_target(plan.target)
    with target.own_threads():
        with open_bar("Loading the model") as on_progress:
            model = target.load_model()
            on_progress(1, 1)
        runner = _Runner(plan, target, model, process.index)
        with open_bar(f"Comparing {len(plan.settings)} settings on {len(runner.tasks)} requests") as on_progress:
            own = runner.order()[process.index :: process.count]
            total, done = sum(len(clip.tasks) for clip in own), 0
            start = runner.replay(own)
            done = sum(len(clip.tasks) for clip in own[:start])
            on_progress(done, total)
            with quick_collection() as collect:
                for (clip,) in ahead(runner.decoder.decode, [[clip] for clip in own[start:]]):
                    runner.clip(clip)
                    done += len(clip.tasks)
                    on_progress(done, total)
                    collect()
    wait_for_all()
    found = runner.found()
    if not (with_example and process.is_main and found.results.chosen):
        return found
    with target.own_threads(), open_bar("Running one request at the recommended setting") as on_progress:
        found = runner.with_example(found, found.results.chosen)
        on_progress(1, 1)
    return found


class _Runner:
    """Compares the settings on one clip after the other."""

    def __init__(self, plan: Calibration, target: Target, model: Any, process: int) -> None:
        self._model, self._plan = model, plan
        self.decoder = Decoder(target)
        longest = target.answer_length(model)
        self._comparer = Comparer(model, longest)
        layers = model.config.get_text_config().num_hidden_layers
        settings = plan.settings
        self._problems = {setting: why for setting in settings if (why := setting.problem(layers)) is not None}
        able = [setting for setting in settings if setting not in self._problems]
        for relevance in {relevance for setting in able for relevance in setting.relevances}:
            relevance.to(model.device)
        self.origin = origin_of_answers(model, longest)
        self._keys = {setting: record_key(self.origin, setting) for setting in [DENSE, *able]}
        self._keys[BLANK] = record_key(self.origin, BLANK, KeepAll())
        self._keys[RANDOM] = record_key(self.origin, RANDOM, RandomTokens(RANDOM.budget))
        labelled = plan.labelled()
        self.tasks = [_dated(task) for task in make_tasks([request for request, _ in labelled], plan.target)]
        self._judges = {task.key: is_right for task, (_, is_right) in zip(self.tasks, labelled, strict=True)}
        self._folder = RecordFolder(plan.out, process, Comparison)
        self._records = self._folder.read(self._keys.values())
        self._race = Race(able, len(self.tasks), plan.keep)
        self._seen: set[str] = set()  # requests that the race knows

    def order(self) -> list[Clip]:
        """The clips in an order that depends on nothing but the requests."""
        clips = [clip for (clip,) in batches(self.tasks, 1)]
        random.Random(_SEED).shuffle(clips)
        return clips

    def replay(self, clips: Sequence[Clip]) -> int:
        """Take in what an earlier run recorded; returns the number of clips that it finished."""
        for number, clip in enumerate(clips):
            for task in clip.tasks:
                if self._missing(task):
                    return number
                self._advance(task)
        return len(clips)

    def clip(self, clip: Clip) -> None:
        """Compare on one clip, which is decoded."""
        pixels: dict[Any, Tensor] = {}

        def share(inputs: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
            return share_pixels(inputs, [hash(kind)], pixels)

        with encoded_once(self._model):
            for task in clip.tasks:
                if missing := self._missing(task):
                    records = self._compare(clip, task, missing, share)
                    self._folder.append(records)
                    self._records |= {(record.key, record.index): record for record in records}
                self._advance(task)

    def found(self) -> Found:
        """Judge what all processes recorded."""
        records = self._folder.read(self._keys.values())
        ordered = [task for clip in self.order() for task in clip.tasks]
        by_setting = {
            setting: {task.key: records[key, task.key] for task in ordered if (key, task.key) in records}
            for setting, key in self._keys.items()
        }
        failed = {index: record.error for index, record in by_setting[DENSE].items() if record.error is not None}
        by_setting[DENSE] = {i: record for i, record in by_setting[DENSE].items() if record.error is None}
        videos = {task.key: str(task.request.video) for task in ordered if task.key not in failed}
        results = judge(
            self._plan.settings, by_setting, DENSE, CONTROLS, videos, self._plan.keep, self._problems
        )  # fmt: skip
        failures = [(task.request.name, failed[task.key] or "") for task in self.tasks if task.key in failed]
        return Found(results, failures, self.origin)

    def with_example(self, found: Found, chosen: Row) -> Found:
        """The results with the first request that was answered, at the recommended setting."""
        answered = self._folder.read([self._keys[DENSE]])
        good = {index for (_, index), record in answered.items() if record.error is None}
        task = next(task for task in self.tasks if task.key in good)
        try:
            example = make_example(self._model, self.decoder, task, Setting(chosen.method, chosen.budget))
        except Exception as error:  # an earlier run compared it; memory may be short now
            return replace(found, no_example=f"{task.request.name}: {first_line(error)}")
        return replace(found, example=example)

    def _missing(self, task: Task) -> dict[Setting, str]:
        """The settings that have to be run on a request, with their keys; none if the request failed."""
        dense = self._records.get((self._keys[DENSE], task.key))
        if dense is not None and dense.error is not None:
            return {}
        wanted = [DENSE, *CONTROLS, *self._race.live]
        return {way: self._keys[way] for way in wanted if (self._keys[way], task.key) not in self._records}

    def _advance(self, task: Task) -> None:
        if task.key in self._seen:
            return
        self._seen.add(task.key)
        found = {way: self._records.get((self._keys[way], task.key)) for way in self._race.live}
        self._race.add({way: record for way, record in found.items() if record is not None})

    def _compare(self, clip: Clip, task: Task, missing: dict[Setting, str], share: Any) -> list[Comparison]:
        try:
            if clip.error is not None:
                raise clip.error
            assert clip.video is not None
            processor = self.decoder.processor(task.request.max_pixels)
            question = Question(task.key, clip.video, task.request.question, processor, self._judges[task.key])
            return self._comparer.compare(question, missing, share, with_memory=len(self._seen) < _WITH_MEMORY)
        except Exception as error:  # whatever a file does, the others go on
            return [Comparison(self._keys[DENSE], task.key, error=first_line(error))]


def _read_label(request: Request) -> tuple[Request, IsRight | None]:
    """The request with its options in the question, and what judges its answer; None if it has no label."""
    try:
        if request.others.get("answer") is None and request.others.get("letter") is None:
            options = read_options(request.others)
            return replace(request, question=with_options(request.question, options)), None
        label = read_label(request.others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"calibrate: requests: '{request.name}': {error}") from error
    return replace(request, question=with_options(request.question, label.options)), label.is_right


def _dated(task: Task) -> Task:
    """The task with a key that changes with the file of the video."""
    try:
        state = task.request.video.stat()
    except OSError:
        return task
    text = f"{task.key} {state.st_size} {state.st_mtime_ns}"
    return Task(hashlib.sha256(text.encode()).hexdigest()[:20], task.request)
