"""Runs a plan: every setting answers every sample, in one process or several."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from ..hf import reduce
from ..hf.flops import prefill_flops, reduced_flops
from ..methods import Method
from ..runtime.answers import TokenClock, generate
from ..runtime.encoding import encoded_once
from ..runtime.files import check_out
from ..runtime.measure import memory_before, peak_memory
from ..runtime.processes import this_process, wait_for_all
from ..runtime.progress import OpenBar
from ..runtime.target import Target, to_model
from .digests import digest_of_code
from .keys import origin_of_answers, record_key
from .plan import Plan, Setting
from .records import Record, RecordFolder
from .rows import Row, summarise
from .tasks import Sample, Task, check_sample, query_of

_LOG = logging.getLogger(__name__)
_MEMORY_SAMPLES = 3  # samples with peak memory: measuring it takes longer than the answer of a small model


def evaluate(plan: Plan, open_bar: OpenBar) -> tuple[list[Row], dict[Setting, list[Record]]]:
    """Answer every sample in every setting, except for answers that the plan's folder already has.

    Under `accelerate launch` or `torchrun` the processes share the samples; each returns all results.

    Args:
        plan: what to evaluate.
        open_bar: opens a progress bar.

    Returns:
        The rows, one per setting, and the records of each setting that can work, in the order of the samples.

    Raises:
        ValueError, TypeError: the model or the folder cannot be used.
        OSError: a record cannot be written.
    """
    check_out(plan.out)
    wait_for_all()  # fails now, not after the work, if they cannot wait for each other
    process = this_process()
    target, task = process.own_target(plan.answering), plan.make_task()
    with target.own_threads():
        with open_bar("Loading the model") as on_progress:
            answerer = Answerer(target, task)
            on_progress(1, 1)
        layers = answerer.config.num_hidden_layers
        problems = {setting: why for setting in plan.settings if (why := setting.problem(layers)) is not None}
        origin = answerer.describe()
        keys = {setting: record_key(origin, setting) for setting in plan.settings if setting not in problems}
        for relevance in {relevance for setting in keys for relevance in setting.relevances}:
            relevance.to(answerer.model.device)
        folder = RecordFolder(plan.out, process.index, Record)
        done = folder.read(keys.values())
        _LOG.info("%s: %d of %d answers are there already", plan.out, len(done), len(keys) * plan.samples)
        own = range(process.index, plan.samples, process.count)
        with open_bar(f"Answering {len(own)} samples in {len(keys)} ways") as on_progress:
            for count, index in enumerate(own, 1):
                missing = {setting: key for setting, key in keys.items() if (key, index) not in done}
                if missing:
                    sample = task.sample(index)
                    check_sample(task, sample, index)
                    folder.append(answerer.answer(sample, missing))
                on_progress(count, len(own))
    wait_for_all()
    found = folder.read(keys.values())
    records = {setting: [found[key, index] for index in range(plan.samples)] for setting, key in keys.items()}
    return summarise(plan, records, problems), records


class Answerer:
    """A model that answers the samples of a task.

    Args:
        target: the model, which is loaded here.
        task: the task.
    """

    def __init__(self, target: Target, task: Task) -> None:
        self.task, self.processor = task, target.load_processor()
        self.model = target.load_model()
        self.config = self.model.config.get_text_config()
        self._longest = target.answer_length(self.model)

    @torch.no_grad()
    def answer(self, sample: Sample, settings: dict[Setting, str]) -> list[Record]:
        """Answer a sample in each of the settings; the video is encoded once.

        Args:
            sample: the sample.
            settings: the settings, each with the key of its records.
        """
        inputs = to_model(self.task.inputs(sample, self.processor), self.model)
        with encoded_once(self.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fftriton: the budget")  # the rows state the achieved budget
            records = []
            for setting, key in settings.items():
                told = self.task.unrelated_question(sample) if setting.is_control else query_of(sample)
                method = setting.method(sample.index).about(sample.video.frames, told)
                records.append(self._record(sample, inputs, method, key))
            return records

    def describe(self) -> dict[str, Any]:
        """Everything about the model, the task and this library that an answer depends on."""
        task = {"samples": self.task.digest, "task": digest_of_code(type(self.task))}
        return origin_of_answers(self.model, self._longest) | task

    def _record(self, sample: Sample, inputs: dict[str, Tensor], method: Method, key: str) -> Record:
        clock, device = TokenClock(), self.model.device
        memory = memory_before(device) if sample.index < _MEMORY_SAMPLES else None
        with reduce(self.model, method) as reduction:
            tokens = generate(self.model, inputs, clock, self._longest)
        peak = None if memory is None else max(0, peak_memory(device) - memory)
        report = reduction.report
        if report is None:
            raise ValueError(
                f"eval: task: the inputs of sample {sample.index} must contain a video that can be reduced"
            )
        answer = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        all_tokens = [report.num_tokens] * len(report.tokens_per_layer)
        return Record(
            key,
            sample.index,
            sample.kind,
            len(sample.video.frames),
            sample.depth,
            answer,
            sample.answer,
            self.task.score(sample, answer),
            report.budget_achieved,
            reduced_flops(self.config, report),
            prefill_flops(self.config, all_tokens, all_tokens),
            report.seconds["prefill"],
            peak,
            report.vision_tokens_per_layer,
            report.relevance_seconds,
            report.relevance_macs,
        )
