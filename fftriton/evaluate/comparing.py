"""Compares settings with the dense model on one request, and records what was found."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import first_line
from ..hf import Report, reduce
from ..hf.flops import prefill_flops, reduced_flops
from ..methods import Method, RandomTokens
from ..runtime.answers import TokenClock, generate
from ..runtime.forcing import Steps
from ..runtime.measure import memory_before, peak_memory
from ..runtime.processing import Processor
from ..runtime.target import to_model
from ..runtime.video import Video
from .agreement import Agreement, DenseAnswer, OneForward
from .calibration import Comparison
from .plan import Setting

DENSE = Setting("keep-all", 1.0)
BLANK = Setting("blank video", 1.0)
RANDOM = Setting("random tokens", 0.02)
CONTROLS = (BLANK, RANDOM)
"""The settings that see next to nothing."""

_GREY = 128

IsRight = Callable[[str], bool]
"""Whether an answer is right."""


@dataclass(frozen=True)
class Question:
    """A question about a video.

    Attributes:
        index: name of the request in its records.
        video: the sampled frames.
        text: the question.
        processor: makes the model's inputs.
        is_right: judges answers; None without a label.
    """

    index: str
    video: Video
    text: str
    processor: Processor
    is_right: IsRight | None = None

    @property
    def seed(self) -> int:
        """A seed that is the same in every run."""
        return int.from_bytes(hashlib.sha256(self.index.encode()).digest()[:4], "big")


def blank_video(question: Question) -> Question:
    """The same question about a video of the same size and length that shows nothing."""
    frames = np.full_like(question.video.frames, _GREY)
    return replace(question, video=replace(question.video, frames=frames))


class Comparer:
    """A model that answers questions in several settings.

    Args:
        model: a Hugging Face generation model.
        most: maximum number of tokens of an answer.
    """

    def __init__(self, model: Any, most: int) -> None:
        self._model, self._most, self._one_forward = model, most, OneForward(model)
        self._config = model.config.get_text_config()
        ends = model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}

    @torch.no_grad()
    def compare(
        self,
        question: Question,
        settings: dict[Setting, str],
        share: Callable[[dict[str, Tensor], str], dict[str, Tensor]] | None = None,
        with_memory: bool = False,
    ) -> list[Comparison]:
        """Answer a question with all tokens, under the controls and in each of the settings.

        Args:
            question: the question.
            settings: the settings, DENSE and the controls among them if they are wanted, each with the key of its
                records. The dense model answers in any case.
            share: called with the inputs and the kind of video, "video" or BLANK; replaces pixels by equal ones that
                the vision encoder has seen.
            with_memory: whether to measure peak memory, which takes time.

        Returns:
            One record per setting. A setting that fails has a record with an error, and does not stop the others.

        Raises:
            Exception: whatever the dense model or the processor raises.
        """
        share = share or (lambda inputs, kind: inputs)
        inputs = share(to_model(question.processor(question.video, question.text), self._model), "video")
        if with_memory:
            DenseAnswer(self._model, inputs, 1)  # the vision encoder, which all settings share, has run then
        memory = self._memory(with_memory)
        dense = DenseAnswer(self._model, inputs, self._most)
        peak = self._peak(memory)
        text = _decode(question, dense.steps.tokens)
        right = None if question.is_right is None else question.is_right(text)
        n = len(dense.steps.tokens)
        records = []
        for setting, key in settings.items():
            if setting == DENSE:
                same = Agreement(True, None, n, 1.0, 0.0, 0.0)
                records.append(self._record(question, key, same, right, dense.report, peak))
            elif setting == BLANK:
                grey = blank_video(question).video
                blank = share(to_model(question.processor(grey, question.text), self._model), BLANK.name)
                records.append(self._record(question, key, dense.compare(dense.forced(blank))))
            else:
                try:
                    records.append(self._reduced(question, dense, right, setting, key, with_memory))
                except Exception as error:  # out of memory, a method that cannot work on this video, ...
                    records.append(Comparison(key, question.index, error=first_line(error)))
        return records

    def _reduced(
        self, question: Question, dense: DenseAnswer, right: bool | None, setting: Setting, key: str, with_memory: bool
    ) -> Comparison:
        if setting == RANDOM:
            method: Method = RandomTokens(RANDOM.budget, seed=question.seed)
        else:
            method = setting.method(question.seed).about(question.video.frames, question.text)
        method.check(self._config.num_hidden_layers)
        memory = self._memory(with_memory)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fftriton: the budget")  # the rows state the achieved budget
            steps, report = self._one_forward.under(dense, setting.name, method)
            peak, agreement = self._peak(memory), dense.compare(steps)
            if question.is_right is not None and not agreement.same and setting != RANDOM:
                right = question.is_right(_decode(question, self._answer(dense, agreement, steps, method)))
        return self._record(question, key, agreement, None if setting == RANDOM else right, report, peak)

    def _answer(self, dense: DenseAnswer, agreement: Agreement, steps: Steps, method: Method) -> Tensor:
        """The tokens of an answer that differs from the dense one."""
        step = agreement.first_difference
        assert step is not None
        known = torch.cat([dense.steps.tokens[:step], steps.tokens[step : step + 1]])
        if len(known) == self._most or int(known[-1]) in self._ends:
            return known  # it ends where it differs
        with reduce(self._model, method):
            return generate(self._model, dense.inputs, TokenClock(), self._most)

    def _record(
        self,
        question: Question,
        key: str,
        agreement: Agreement,
        right: bool | None = None,
        report: Report | None = None,
        peak: int | None = None,
    ) -> Comparison:
        record = Comparison(
            key, question.index, agreement.same, agreement.first_difference, agreement.tokens, agreement.overlap,
            agreement.kl, agreement.loss, right, peak_memory=peak,
        )  # fmt: skip
        if report is None:
            return record
        whole = [report.num_tokens] * len(report.tokens_per_layer)
        return replace(
            record,
            budget_achieved=report.budget_achieved,
            flops=reduced_flops(self._config, report),
            dense_flops=prefill_flops(self._config, whole, whole),
            seconds=report.seconds["prefill"] + report.relevance_seconds,
        )

    def _memory(self, wanted: bool) -> int | None:
        return memory_before(self._model.device) if wanted else None

    def _peak(self, before: int | None) -> int | None:
        return None if before is None else max(0, peak_memory(self._model.device) - before)


def _decode(question: Question, tokens: Tensor) -> str:
    return question.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
