"""What was asked, checked: the options, the video, the model.

Everything that can be refused is refused before the model is loaded: first the options, then the video, then the
checkpoint's configuration.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase
from transformers.utils import logging

from ..hf import reduce
from ..methods import KVTP, Method, parse
from ..relevance import ContextFusion, SiglipRelevance
from ..runtime import shipped
from ..runtime.checkpoints import load_config, load_part
from ..runtime.files import check_out
from ..runtime.processing import load_processor, unknown_words
from ..runtime.video import OnProgress, Video, read_video

OpenBar = Callable[[str], AbstractContextManager[OnProgress]]  # a progress bar for as long as a step takes

_DEFAULT_QUESTION = "Describe this video."


@dataclass(frozen=True)
class Options:
    """What to run; checked when made.

    Args:
        model: folder of a checkpoint, or its name on the Hugging Face hub; None for the one that ships.
        video: a video file; None for the clips that ship.
        question: what to ask; None for the clip's own question.
        method: as for `methods.parse`.
        budget: fraction of the vision tokens to keep, in (0, 1].
        relevance: for the method kvtp, a SigLIP that scores the frames: a folder, or a name on the Hugging Face hub.
            None gives all frames the same.
        compare: run with all tokens, too.
        out: folder for the pictures and report.json.
        frames: frames to sample, at least 1.
        max_pixels: upper bound of a frame's pixels, at least 1; None for the checkpoint's own.
        max_new_tokens: longest answer, at least 1; None for the checkpoint's own.
        device: a torch device; None for the GPU where there is one.
        trust_remote_code: run the checkpoint's own code if it has any.

    Raises:
        ValueError, TypeError: the parameter, the rule and the value.
    """

    model: str | None = None
    video: Path | None = None
    question: str | None = None
    method: str = "framefusion"
    budget: float = 0.3
    relevance: str | None = None
    compare: bool = False
    out: Path = Path("fftriton-out")
    frames: int = 16
    max_pixels: int | None = None
    max_new_tokens: int | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        method = self.make_method()
        if self.relevance is not None and not isinstance(method, KVTP):
            raise ValueError(f"relevance must go with method kvtp, got method '{self.method}'")
        for name in ("frames", "max_pixels", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.make_device()

    def make_method(self, **parameters: Any) -> Method:
        """The method at its budget."""
        method = parse(self.method, self.budget)
        return replace(method, **parameters) if parameters else method  # type: ignore[type-var]

    def make_device(self) -> torch.device:
        """The device, which exists."""
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
            raise ValueError(f"device must be one that torch can use here, got '{self.device}'") from error
        return device

    @property
    def threads(self) -> int:
        """CPU threads: one for the shipped model, which is too small to gain from more, unless OMP_NUM_THREADS says so.

        With several, its times would hang on what else the machine is doing.
        """
        alone = self.uses_shipped_model and "OMP_NUM_THREADS" not in os.environ
        return 1 if alone else torch.get_num_threads()

    @property
    def uses_shipped_model(self) -> bool:
        """Whether the model is the small one in the package."""
        return self.model is None

    @property
    def checkpoint(self) -> str:
        """Folder or name to load from."""
        return str(shipped.MODEL) if self.model is None else self.model


@dataclass(frozen=True)
class Task:
    """One video and one question about it.

    Attributes:
        path: the video file.
        about: what is to be seen there; empty where unknown.
        question: what to ask.
        answer: the right answer; None where unknown.
        max_pixels: upper bound of a frame's pixels; None for the checkpoint's own.
    """

    path: Path
    about: str
    question: str
    answer: str | None
    max_pixels: int | None


@dataclass(frozen=True)
class Prompt:
    """A task as the model gets it.

    Attributes:
        task: what to ask.
        video: the sampled frames.
        inputs: arguments of `generate`.
        tokenizer: the model's.
        method: how to reduce it.
    """

    task: Task
    video: Video
    inputs: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    method: Method

    @property
    def unknown_words(self) -> list[str]:
        """Words of the question outside the model's vocabulary."""
        return unknown_words(self.tokenizer, self.task.question)


def choose_tasks(options: Options) -> list[Task]:
    """The user's video, or the shipped clips; a question about no video in particular is asked of the needle clip."""
    if options.video is not None:
        question = options.question or (shipped.NEEDLE.question if options.uses_shipped_model else _DEFAULT_QUESTION)
        return [Task(options.video, "", question, None, options.max_pixels)]
    needle = shipped.NEEDLE
    answer = needle.answer if options.question in (None, needle.question) else None
    tasks = [Task(needle.path, needle.about, options.question or needle.question, answer, options.max_pixels)]
    if options.question is None:
        bunny = shipped.BUNNY
        question, max_pixels = _DEFAULT_QUESTION, options.max_pixels
        if options.uses_shipped_model:
            question, max_pixels = bunny.question, max_pixels or bunny.max_pixels
        tasks.append(Task(bunny.path, bunny.about, question, None, max_pixels))
    return tasks


def prepare(options: Options, open_bar: OpenBar) -> list[Prompt]:
    """Decode and encode what is to be asked, without the model.

    Args:
        options: what to run.
        open_bar: shows the progress of each step.

    Raises:
        ValueError, TypeError: a video, a model or a folder that cannot be used, or a model too shallow for the method.
    """
    check_out(options.out)
    _quieten_transformers()
    tasks = choose_tasks(options)
    videos = []
    for task in tasks:
        with open_bar(f"Decoding {task.path.name}") as on_progress:
            videos.append(read_video(task.path, options.frames, on_progress))
    config = load_config(options.checkpoint, options.trust_remote_code)
    options.make_method().check(config.get_text_config().num_hidden_layers)
    methods = _methods(options, tasks, videos, open_bar)
    return [_encode_prompt(options, *parts) for parts in zip(tasks, videos, methods, strict=True)]


def _encode_prompt(options: Options, task: Task, video: Video, method: Method) -> Prompt:
    processor = load_processor(options.checkpoint, task.max_pixels, options.trust_remote_code)
    return Prompt(task, video, processor(video, task.question), processor.tokenizer, method)


def _methods(options: Options, tasks: list[Task], videos: list[Video], open_bar: OpenBar) -> list[Method]:
    """The method for each prompt, which knows how relevant the frames are where that was asked for."""
    if options.relevance is None:
        return [options.make_method() for _ in tasks]
    predictor = load_relevance(options.relevance).to(options.make_device())
    methods = []
    with open_bar("Scoring the frames") as on_progress:
        for task, video in zip(tasks, videos, strict=True):
            features = predictor.encode(video.frames, progress=False)
            methods.append(options.make_method(relevance=predictor.bind(features, task.question)))
            on_progress(len(methods), len(tasks))
    return methods


def load_relevance(checkpoint: str, head: ContextFusion | None = None) -> SiglipRelevance:
    """The predictor of a checkpoint, with the head that lies in its folder if none is given.

    Raises:
        ValueError: it cannot be read, is no SigLIP, or needs code of its own, which no SigLIP does.
    """
    try:
        return SiglipRelevance.from_pretrained(checkpoint, head)
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"relevance must be the checkpoint of a SigLIP, got '{checkpoint}': {reason}") from error


def load_model(options: Options) -> Any:
    """The checkpoint's model on the device, bf16 on a GPU and float32 elsewhere.

    Raises:
        ValueError, TypeError: no such checkpoint, no model for videos, or one that cannot be reduced.
    """
    _quieten_transformers()
    device = options.make_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = load_config(options.checkpoint, options.trust_remote_code)
    model = load_part(
        AutoModelForImageTextToText, options.checkpoint, options.trust_remote_code, config=config, dtype=dtype
    )
    reduce(model, options.make_method())  # refuses here what it cannot reduce
    return model.to(device).eval()


def _quieten_transformers() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
