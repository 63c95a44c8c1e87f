"""Many questions about many videos: each video is decoded and encoded once, and what fails is one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from typing import Any

import torch
from torch import Tensor

from ..checks import first_line
from ..evaluate import Setting
from ..hf import reduce
from ..methods import Method
from ..runtime.answers import generate_batch
from ..runtime.encoding import encoded_once
from ..runtime.processes import Process
from ..runtime.progress import OnProgress
from ..runtime.target import Target, to_model
from .answer_file import Answers, Line
from .clips import Clip, Decoder, Task, ahead, batches, quick_collection, share_pixels

_LOG = logging.getLogger("fftriton")


def run_batch(
    tasks: Sequence[Task],
    answers: Answers,
    target: Target,
    model: Any,
    batch_size: int,
    process: Process,
    on_progress: OnProgress,
) -> tuple[int, int]:
    """Answer this process's share of the tasks, except those that are answered already.

    Args:
        tasks: of all processes.
        answers: where the answers go.
        target, model: the model, and how it was loaded.
        batch_size: number of videos that go through the model together.
        process: this process.
        on_progress: called after each answer with (done, total) of this process's share.

    Returns:
        The numbers of requests that this process answered now, and of those among them that failed.

    Raises:
        OSError: an answer cannot be written.
    """
    done = answers.done([task.key for task in tasks])
    own = batches(tasks, batch_size)[process.index :: process.count]
    total = sum(len(clip.tasks) for clips in own for clip in clips)
    missing = [clips for clips in own if any(task.key not in done for clip in clips for task in clip.tasks)]
    _LOG.info("%d of %d requests are answered already", len(done), len(tasks))
    before = total - sum(task.key not in done for clips in missing for clip in clips for task in clip.tasks)
    runner, written, failed = _Runner(target, model, batch_size), 0, 0
    on_progress(before, total)
    with quick_collection() as collect:
        for clips in ahead(runner.decoder.decode, missing):
            for lines in runner.answer(clips, done):
                answers.append(lines)
                written += len(lines)
                failed += sum(line["error"] is not None for line in lines)
                on_progress(before + written, total)
            collect()  # frames and caches stand in cycles, so that they would stay for long
    answers.finish([task.key for task in tasks])
    return written, failed


class _Runner:
    """Answers the questions about clips."""

    def __init__(self, target: Target, model: Any, batch_size: int) -> None:
        self._target, self._model, self._batch_size = target, model, batch_size
        self.decoder = Decoder(target)

    @torch.no_grad()
    def answer(self, clips: list[Clip], done: set[str]) -> Iterator[list[Line]]:
        """Yield the lines of the tasks that are not done, as they come.

        With one video at a time, only the missing questions are asked. Otherwise all are, because answers may depend,
        in the last bit, on what they were batched with.
        """
        for clip in clips:
            if clip.error is not None:
                yield [_failure(task, clip.error) for task in clip.tasks if task.key not in done]
        good = [clip for clip in clips if clip.error is None]
        if self._batch_size == 1:
            good = [replace(clip, tasks=[task for task in clip.tasks if task.key not in done]) for clip in good]
        pixels: dict[Any, Tensor] = {}
        with encoded_once(self._model):
            for questions in zip_longest(*(clip.tasks for clip in good)):
                asked = [(clip, task) for clip, task in zip(good, questions, strict=True) if task is not None]
                for together in self._together(asked):
                    lines = self._lines(together, pixels)
                    yield [line for line in lines if line["key"] not in done]

    def _together(self, asked: list[tuple[Clip, Task]]) -> Iterator[list[tuple[Clip, Task]]]:
        """Questions that may share a forward: those with the same method and length."""

        def way(pair: tuple[Clip, Task]) -> tuple[str, float, int]:
            request = pair[1].request
            return request.method, request.budget, request.max_new_tokens or 0

        for _, pairs in groupby(sorted(asked, key=way), key=way):
            yield list(pairs)

    def _lines(self, pairs: list[tuple[Clip, Task]], pixels: dict[Any, Tensor]) -> list[Line]:
        """Answer questions in one forward; if that fails, or the method looks at the video, one by one."""
        request = pairs[0][1].request
        setting = Setting(request.method, request.budget)
        try:
            methods = [_bound(setting, clip, task) for clip, task in pairs]
            if len(pairs) > 1 and any(method != methods[0] for method in methods):
                return [line for pair in pairs for line in self._lines([pair], pixels)]
            return self._forward(pairs, methods[0], pixels)
        except Exception as error:  # out of memory, a method that cannot work on this video, ...
            if len(pairs) == 1:
                return [_failure(pairs[0][1], error)]
        return [line for pair in pairs for line in self._lines([pair], pixels)]

    def _forward(self, pairs: list[tuple[Clip, Task]], method: Method, pixels: dict[Any, Tensor]) -> list[Line]:
        method.check(self._model.config.get_text_config().num_hidden_layers)
        processors = [self.decoder.processor(task.request.max_pixels) for _, task in pairs]
        prompts = [
            processor(clip.video, task.request.question)  # type: ignore[arg-type]
            for processor, (clip, task) in zip(processors, pairs, strict=True)
        ]
        tokenizer = processors[0].tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        inputs = to_model(collate(prompts, padding), self._model)
        inputs = share_pixels(inputs, [id(clip.video) for clip, _ in pairs], pixels)
        longest = pairs[0][1].request.max_new_tokens or self._target.answer_length(self._model)
        with reduce(self._model, method) as reduction:
            rows = generate_batch(self._model, inputs, longest, padding)
        if reduction.report is None or len(reduction.report.samples) != len(pairs):
            raise ValueError("model must get a prompt with a video that can be reduced, got one without")
        return [
            _success(pair, tokenizer.decode(row, skip_special_tokens=True), report)
            for pair, row, report in zip(pairs, rows, reduction.report.samples, strict=True)
        ]


def collate(prompts: Sequence[dict[str, Tensor]], padding: int) -> dict[str, Tensor]:
    """One batch of several prompts.

    Args:
        prompts: inputs of one row each: tokens [1, N], and tensors of the videos, whose first dimension is joined.
        padding: token to put before shorter prompts.

    Raises:
        ValueError: the videos cannot be joined, because frames of different sizes or numbers do not fit together.
    """
    if len(prompts) == 1:
        return prompts[0]
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    joined = {}
    for name, first in prompts[0].items():
        parts = [prompt[name] for prompt in prompts]
        if first.shape[:2] == (1, lengths[0]) and first.dim() == 2:  # one value per token
            fill = padding if name == "input_ids" else 0
            parts = [
                torch.nn.functional.pad(part, (max(lengths) - length, 0), value=fill)
                for part, length in zip(parts, lengths, strict=True)
            ]
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(f"videos must fit into one batch, got {name} of {[tuple(part.shape) for part in parts]}")
        joined[name] = torch.cat(parts)
    return joined


def _bound(setting: Setting, clip: Clip, task: Task) -> Method:
    assert clip.video is not None
    return setting.method().about(clip.video.frames, task.request.question)


def _common(task: Task) -> Line:
    """What every line of an answer starts with: the key, what was asked, and what else the request says."""
    request = task.request
    others = {"expected" if name == "answer" else name: value for name, value in request.others.items()}
    asked = {"video": request.name, "question": request.question, "method": request.method, "budget": request.budget}
    limits = {"max_pixels": request.max_pixels, "max_new_tokens": request.max_new_tokens}
    limits |= replace(request.sampling, frames=None).__dict__  # a line says how many frames were taken
    given = {name: value for name, value in limits.items() if value is not None}
    return {"key": ""} | others | {"key": task.key} | asked | given


def _success(pair: tuple[Clip, Task], answer: str, report: Any) -> Line:
    clip, task = pair
    assert clip.video is not None
    figures = {
        "frames": len(clip.video.frames),
        "vision_tokens": int(report.num_video_tokens),
        "budget_achieved": float(report.budget_achieved),
    }
    return _common(task) | {"answer": answer.strip(), "error": None} | figures


def _failure(task: Task, error: Exception) -> Line:
    _LOG.info("%s: %s", task.request.video, error, exc_info=error)
    return _common(task) | {"answer": None, "error": first_line(error)}
