"""One request of a calibration at the recommended setting, for a page that shows what the setting keeps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluate.comparing import Question
from ..evaluate.plan import Setting
from ..hf import Report, reduce
from ..runtime.answers import TokenClock, generate
from ..runtime.shipped import Clip as AskedClip
from ..runtime.target import to_model
from .clips import Clip, Decoder, Task
from .request import Job


@dataclass(frozen=True)
class Example:
    """What became of the tokens of one request.

    Attributes:
        job: the request.
        report: of its prefill.
    """

    job: Job
    report: Report


@torch.no_grad()
def make_example(model: Any, decoder: Decoder, task: Task, setting: Setting) -> Example:
    """Run a request once, with the method that its comparison had.

    Args:
        model: the model.
        decoder: decodes the request's video.
        task: the request.
        setting: the setting.

    Raises:
        Exception: whatever the video, the processor or the method raises.
    """
    request = task.request
    (clip,) = decoder.decode([Clip([task])])
    if clip.error is not None:
        raise clip.error
    assert clip.video is not None
    processor = decoder.processor(request.max_pixels)
    seed = Question(task.key, clip.video, request.question, processor).seed
    method = setting.method(seed).about(clip.video.frames, request.question)
    inputs = processor(clip.video, request.question)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fftriton: the budget")  # as when it was compared
        with reduce(model, method) as reduction:
            generate(model, to_model(inputs, model), TokenClock(), 1)
    assert reduction.report is not None
    asked = AskedClip(request.video, "", request.question, max_pixels=request.max_pixels)
    return Example(Job(asked, clip.video, inputs, processor.tokenizer, method, request.video.stem), reduction.report)
