"""The main job: ask a model about a video, with its vision tokens reduced and, to compare, with all of them.

Everything that can be refused is refused before the model is loaded: first the options, then the video, then the
checkpoint's configuration.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerBase
from transformers.utils import logging

from fftriton import shipped
from fftriton.hf import Report, reduce
from fftriton.measure import Cost, TokenClock, generate, time_call, time_generation
from fftriton.methods import FastV, FrameFusion, KeepAll, Method
from fftriton.pictures import draw_merges, draw_tokens_per_layer, patch_fates
from fftriton.processing import load_processor, unknown_words
from fftriton.video import OnProgress, Video, read_video

METHODS = {"framefusion": "FrameFusion", "fastv": "FastV", "keep-all": "KeepAll"}  # by option, as they are printed

OpenBar = Callable[[str], AbstractContextManager[OnProgress]]  # a progress bar for as long as a step takes

_DEFAULT_QUESTION = "Describe this video."
_DEFAULT_ANSWER_TOKENS = 64
_DECODE_TOKENS = 8
_REPEATS = 5


@dataclass(frozen=True)
class Options:
    """What to run; checked when made.

    Args:
        model: folder of a checkpoint, or its name on the Hugging Face hub; None for the one that ships.
        video: a video file; None for the clips that ship.
        question: what to ask; None for the clip's own question.
        method: a key of METHODS.
        budget: fraction of the vision tokens to keep, in (0, 1].
        compare: run with all tokens, too.
        out: folder for the pictures and report.json.
        frames: frames to sample, at least 1.
        max_pixels: upper bound of a frame's pixels, at least 1; None for the checkpoint's own.
        max_new_tokens: longest answer, at least 1; None for the checkpoint's own.
        device: a torch device; None for the GPU where there is one.

    Raises:
        ValueError, TypeError: the parameter, the rule and the value.
    """

    model: str | None = None
    video: Path | None = None
    question: str | None = None
    method: str = "framefusion"
    budget: float = 0.3
    compare: bool = False
    out: Path = Path("fftriton-out")
    frames: int = 16
    max_pixels: int | None = None
    max_new_tokens: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got '{self.method}'")
        self.make_method()
        for name in ("frames", "max_pixels", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must be a folder, got the file '{self.out}'")
        self.make_device()

    def make_method(self) -> Method:
        """The method; KeepAll has no use for the budget, but a bad one is refused all the same."""
        framefusion = FrameFusion(budget=self.budget)
        if self.method == "framefusion":
            return framefusion
        return FastV(budget=self.budget) if self.method == "fastv" else KeepAll()

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
    """

    task: Task
    video: Video
    inputs: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase

    @property
    def unknown_words(self) -> list[str]:
        """Words of the question outside the model's vocabulary."""
        return unknown_words(self.tokenizer, self.task.question)


@dataclass
class Way:
    """One way of running the model, dense or reduced: the answer it gave and what it cost.

    Attributes:
        name: as printed.
        method: None for the model as it is.
        answer: text of the new tokens.
        cost: figures over repeated runs.
    """

    name: str
    method: Method | None
    answer: str = ""
    cost: Cost = field(default_factory=Cost)
    _report: Report | None = None

    @property
    def report(self) -> Report:
        """What the reduction did to the last prompt."""
        if self._report is None:
            raise RuntimeError(f"'{self.name}' has run no reduction")
        return self._report

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """Run the model this way."""
        if self.method is None:
            yield
            return
        with reduce(model, self.method) as reduction:
            yield
        self._report = reduction.report


@dataclass
class Result:
    """What came of one prompt.

    Attributes:
        prompt: what was asked.
        dense: the model as it is; None unless compared.
        reduced: the model with its tokens reduced.
        vision_seconds: what the vision encoder takes of either prefill; None where it could not be timed alone.
        pictures: files drawn.
    """

    prompt: Prompt
    dense: Way | None
    reduced: Way
    vision_seconds: float | None
    pictures: list[Path]


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
    _quieten_transformers()
    tasks = choose_tasks(options)
    videos = []
    for task in tasks:
        with open_bar(f"Decoding {task.path.name}") as on_progress:
            videos.append(read_video(task.path, options.frames, on_progress))
    with _naming_the_model(options.checkpoint):
        config = AutoConfig.from_pretrained(options.checkpoint)
    options.make_method().check(config.get_text_config().num_hidden_layers)
    prompts = [_encode_prompt(options, task, video) for task, video in zip(tasks, videos, strict=True)]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got '{options.out}': {error.strerror}") from error
    return prompts


def _encode_prompt(options: Options, task: Task, video: Video) -> Prompt:
    processor = load_processor(options.checkpoint, task.max_pixels)
    return Prompt(task, video, processor(video, task.question), processor.tokenizer)


def load_model(options: Options) -> Any:
    """The checkpoint's model on the device, bf16 on a GPU and float32 elsewhere.

    Raises:
        ValueError, TypeError: no such checkpoint, no model for videos, or one that cannot be reduced.
    """
    _quieten_transformers()
    device = options.make_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with _naming_the_model(options.checkpoint):
        model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=dtype)
    reduce(model, options.make_method())  # refuses here what it cannot reduce
    return model.to(device).eval()


def _quieten_transformers() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def _naming_the_model(checkpoint: str) -> Iterator[None]:
    """Turn Hugging Face's pages of explanation into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        rule = "a folder with, or the hub's name of, a video language model that transformers can load"
        raise ValueError(f"model must be {rule}, got '{checkpoint}': {reason}") from error


@torch.no_grad()
def run(options: Options, model: Any, prompt: Prompt, open_bar: OpenBar) -> Result:
    """Answer, time and draw one prompt.

    Args:
        options: what to run.
        model: from `load_model`.
        prompt: from `prepare`.
        open_bar: shows the progress of each step.

    Returns:
        The result; its pictures are in options.out.
    """
    with _threads(options.threads):
        return _run(options, model, prompt, open_bar)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(options: Options, model: Any, prompt: Prompt, open_bar: OpenBar) -> Result:
    inputs = _to_model(prompt.inputs, model)
    with open_bar("Encoding the frames") as on_progress:
        vision_seconds = _encode(model, inputs, on_progress)

    reduced = Way(METHODS[options.method], options.make_method())
    dense = Way("all tokens", None) if options.compare else None
    ways = [way for way in (dense, reduced) if way is not None]
    for way in ways:
        with open_bar(f"Generating, {way.name}") as on_progress:
            way.answer = _answer(options, model, inputs, way, prompt.tokenizer, on_progress)
    with open_bar("Timing") as on_progress:
        for done in range(_REPEATS):
            for way in ways:  # in turn, so that a busy machine slows all alike
                time_generation(model, inputs, way.running(model), _DECODE_TOKENS, way.cost)
            on_progress(done + 1, _REPEATS)

    pictures = _draw(options, prompt, reduced, inputs)
    return Result(prompt, dense, reduced, vision_seconds, pictures)


def _to_model(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Move the arguments that the model knows to its device, and pixels to its dtype."""
    known = inspect.signature(model.forward).parameters
    moved = {name: value.to(model.device) for name, value in inputs.items() if name in known}
    return {name: value.to(model.dtype) if name.startswith("pixel") else value for name, value in moved.items()}


def _encode(model: Any, inputs: dict[str, Tensor], on_progress: OnProgress) -> float | None:
    """Run the vision encoder once, block by block on the bar, then time it."""
    encode = getattr(model, "get_video_features", None)
    known = inspect.signature(encode).parameters if encode else {}
    if encode is None or "pixel_values_videos" not in known:
        on_progress(1, 1)
        return None
    arguments = {name: value for name, value in inputs.items() if name in known}
    blocks = _vision_blocks(model)
    done = itertools.count(1)

    def advance(*_: Any) -> None:
        on_progress(min(next(done), len(blocks)), len(blocks))

    hooks = [block.register_forward_hook(advance) for block in blocks]
    try:
        encode(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return time_call(lambda: encode(**arguments), model.device)


def _vision_blocks(model: Any) -> list[nn.Module]:
    """The longest list of modules outside the decoder: the vision encoder's blocks."""
    inside = set(model.get_decoder().modules())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and m not in inside]
    return list(max(lists, key=len, default=[]))


def _answer(
    options: Options, model: Any, inputs: dict[str, Tensor], way: Way, tokenizer: Any, on_progress: OnProgress
) -> str:
    most = options.max_new_tokens or model.generation_config.max_new_tokens or _DEFAULT_ANSWER_TOKENS
    clock = TokenClock(lambda done: on_progress(done, most))
    with way.running(model):
        tokens = generate(model, inputs, clock, most)
    on_progress(most, most)  # an answer may end early
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _draw(options: Options, prompt: Prompt, way: Way, inputs: dict[str, Tensor]) -> list[Path]:
    clip, video, report = prompt.task.path, prompt.video, way.report
    merges, tokens = options.out / f"{clip.stem}-merges.png", options.out / f"{clip.stem}-tokens.png"
    fates = patch_fates(report)
    seconds = [index / video.fps for index in video.indices]
    title = f"{clip.name}: {way.name} at a budget of {report.budget:.0%}"
    draw_merges(merges, video.frames, seconds, fates, _grid(fates.root.shape[1], inputs), title)
    draw_tokens_per_layer(tokens, report, way.name, f"{clip.name}: vision tokens in each layer's attention")
    return [merges, tokens]


def _grid(patches: int, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of a frame's tokens: from the grid in the inputs, else nearly square."""
    if "video_grid_thw" in inputs:
        _, height, width = inputs["video_grid_thw"][0].tolist()
        merge = round((height * width / patches) ** 0.5)
        return height // merge, width // merge
    rows = max(n for n in range(1, int(patches**0.5) + 1) if patches % n == 0)
    return rows, patches // rows


def is_right(answer: str, expected: str) -> bool:
    """Whether the expected word stands in the answer."""
    return re.search(rf"\b{re.escape(expected.lower())}\b", answer.lower()) is not None
