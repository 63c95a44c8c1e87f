"""The request of `fftriton run`: options, videos and the checkpoint's configuration, checked.

Invalid requests are refused before the model is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checks import check_count
from ..evaluate import Setting
from ..evaluate.relevance import sample_relevance
from ..methods import KVTP, Chain, Method
from ..runtime.files import check_out
from ..runtime.processing import Processor, unknown_words
from ..runtime.progress import OpenBar
from ..runtime.sampling import Sampling
from ..runtime.shipped import BUNNY, DEFAULT_QUESTION, NEEDLE, Clip
from ..runtime.target import Target
from ..runtime.video import Video, read_video


@dataclass(frozen=True)
class Options:
    """The options of a run; checked on construction.

    Args:
        target: the model.
        video: a video file; None for the shipped clips.
        question: question about the video; None for the clip's own.
        method: method as text, as for `fftriton.methods.parse`; the parameter `relevance` of kvtp may name the
            checkpoint of a SigLIP.
        budget: fraction of the vision tokens to keep, in (0, 1].
        relevance: for the method kvtp, the SigLIP checkpoint that scores the frames: a folder, or a name on the
            Hugging Face hub. None gives all frames the same score.
        compare: whether to also run with all tokens.
        out: folder for the pictures and report.json.
        sampling: which frames to take; the checkpoint decides what is left open.
        max_pixels: maximum pixels per frame, at least 1; None for the checkpoint's own.

    Raises:
        ValueError, TypeError: an invalid option; the message names the parameter, the rule and the value.
    """

    target: Target = field(default_factory=Target)
    video: Path | None = None
    question: str | None = None
    method: str = "framefusion"
    budget: float = 0.3
    relevance: str | None = None
    compare: bool = False
    out: Path = Path("fftriton-out")
    sampling: Sampling = field(default_factory=Sampling)
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        method = self.make_method()
        if self.relevance is not None and not any(isinstance(part, KVTP) for part in _parts(method)):
            raise ValueError(f"relevance must go with method kvtp, got method '{self.method}'")
        if self.relevance is not None and any(getattr(part, "relevance", None) is not None for part in _parts(method)):
            raise ValueError(f"relevance must be given once, got '{self.relevance}' and method '{self.method}'")
        if self.max_pixels is not None:
            check_count("fftriton", "max_pixels", self.max_pixels, 1)

    def make_method(self) -> Method:
        """The method with its budget."""
        setting = Setting(self.method, self.budget)
        if setting.is_control:
            raise ValueError(f"method must be told the question that is asked, got '{self.method}'")
        return setting.method()


@dataclass(frozen=True)
class Job:
    """A clip, prepared for the model.

    Attributes:
        clip: the video file and the question about it.
        video: the sampled frames.
        inputs: arguments of `generate`.
        tokenizer: the model's tokenizer.
        method: the method that reduces it.
        name: start of the names of its pictures.
    """

    clip: Clip
    video: Video
    inputs: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    method: Method
    name: str

    @property
    def unknown_words(self) -> list[str]:
        """Words of the question that the model's vocabulary does not contain."""
        return unknown_words(self.tokenizer, self.clip.question)


def choose_clips(options: Options) -> list[Clip]:
    """The user's video, or the shipped clips; a question without a video is about the needle clip only."""
    shipped_model, asked, max_pixels = options.target.is_shipped, options.question, options.max_pixels
    if options.video is not None:
        question = asked or (NEEDLE.question if shipped_model else DEFAULT_QUESTION)
        return [Clip(options.video, "", question, None, max_pixels)]
    if asked is not None and asked != NEEDLE.question:
        return [replace(NEEDLE, question=asked, answer=None, max_pixels=max_pixels)]
    needle = replace(NEEDLE, max_pixels=max_pixels)
    if asked is not None:
        return [needle]
    if shipped_model:
        return [needle, replace(BUNNY, max_pixels=max_pixels or BUNNY.max_pixels)]
    return [needle, replace(BUNNY, question=DEFAULT_QUESTION, max_pixels=max_pixels)]


def prepare(options: Options, open_bar: OpenBar) -> list[Job]:
    """Decode the videos and make the model's inputs, without loading the model.

    Args:
        options: the options of the run.
        open_bar: opens a progress bar for each step.

    Raises:
        ValueError, TypeError: the video, the model or the folder cannot be used, or the model has too few layers for
            the method.
    """
    check_out(options.out)
    clips, videos = choose_clips(options), []
    processors = [options.target.load_processor(clip.max_pixels) for clip in clips]
    start, end = options.sampling.start, options.sampling.end
    for clip, processor in zip(clips, processors, strict=True):
        with open_bar(f"Decoding {clip.path.name}") as on_progress:
            rule = processor.frame_rule(options.sampling)
            videos.append(read_video(clip.path, on_progress=on_progress, rule=rule, start=start, end=end))
    options.make_method().check(options.target.load_config().get_text_config().num_hidden_layers)
    methods = _methods(options, clips, videos, open_bar)
    return [_encode(*parts) for parts in zip(processors, clips, videos, methods, strict=True)]


def told_apart(jobs: Sequence[Job]) -> list[Job]:
    """The same jobs, each with a name of its own: x, x-2, x-3, ..."""
    seen: set[str] = set()
    named = []
    for job in jobs:
        numbers = (f"-{number}" for number in itertools.count(2))
        name = next(name for end in itertools.chain([""], numbers) if (name := job.name + end) not in seen)
        seen.add(name)
        named.append(replace(job, name=name))
    return named


def _encode(processor: Processor, clip: Clip, video: Video, method: Method) -> Job:
    return Job(clip, video, processor(video, clip.question), processor.tokenizer, method, clip.path.stem)


def _methods(options: Options, clips: list[Clip], videos: list[Video], open_bar: OpenBar) -> list[Method]:
    """The method for each clip, with the relevance of the frames if requested."""
    method, predictors = options.make_method(), Setting(options.method, options.budget).relevances
    if options.relevance is not None:
        predictors = [sample_relevance(options.relevance)]
        method = _with_relevance(method, predictors[0])
    for predictor in predictors:
        predictor.to(options.target.torch_device())
    if not predictors:
        return [method.about(video.frames, clip.question) for clip, video in zip(clips, videos, strict=True)]
    methods = []
    with open_bar("Scoring the frames") as on_progress:
        for clip, video in zip(clips, videos, strict=True):
            methods.append(method.about(video.frames, clip.question))
            on_progress(len(methods), len(clips))
    return methods


def _parts(method: Method) -> list[Method]:
    """The methods of a chain, or the one method."""
    return list(method.methods) if isinstance(method, Chain) else [method]


def _with_relevance(method: Method, relevance: Any) -> Method:
    """The same method, in which KVTP knows how relevant the frames are."""
    parts = [replace(part, relevance=relevance) if isinstance(part, KVTP) else part for part in _parts(method)]
    return parts[0] if len(parts) == 1 else Chain(parts)
