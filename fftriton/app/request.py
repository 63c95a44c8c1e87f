"""What was asked of `fftriton run`, checked: the options, the videos, the checkpoint's configuration.

Whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checks import check_count
from ..methods import KVTP, Method, parse
from ..relevance import load_relevance
from ..runtime.files import check_out
from ..runtime.processing import unknown_words
from ..runtime.progress import OpenBar
from ..runtime.shipped import BUNNY, NEEDLE, Clip
from ..runtime.target import Target
from ..runtime.video import Video, read_video

_DEFAULT_QUESTION = "Describe this video."


@dataclass(frozen=True)
class Options:
    """What to run; checked when made.

    Args:
        target: the model.
        video: a video file; None for the clips that ship.
        question: what to ask; None for the clip's own question.
        method: how to reduce, as for `fftriton.methods.parse`.
        budget: fraction of the vision tokens to keep, in (0, 1].
        relevance: for the method kvtp, a SigLIP that scores the frames: a folder, or a name on the Hugging Face hub.
            None gives all frames the same score.
        compare: also run with all tokens.
        out: folder for the pictures and report.json.
        frames: frames to sample, at least 1.
        max_pixels: upper bound of a frame's pixels, at least 1; None for the checkpoint's own.

    Raises:
        ValueError, TypeError: the parameter, the rule and the value.
    """

    target: Target = field(default_factory=Target)
    video: Path | None = None
    question: str | None = None
    method: str = "framefusion"
    budget: float = 0.3
    relevance: str | None = None
    compare: bool = False
    out: Path = Path("fftriton-out")
    frames: int = 16
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        method = self.make_method()
        if self.relevance is not None and not isinstance(method, KVTP):
            raise ValueError(f"relevance must go with method kvtp, got method '{self.method}'")
        check_count("fftriton", "frames", self.frames, 1)
        if self.max_pixels is not None:
            check_count("fftriton", "max_pixels", self.max_pixels, 1)

    def make_method(self, **parameters: Any) -> Method:
        """The method at its budget."""
        method = parse(self.method, self.budget)
        return replace(method, **parameters) if parameters else method  # type: ignore[type-var]


@dataclass(frozen=True)
class Job:
    """A clip as the model gets it.

    Attributes:
        clip: the video file, and what to ask about it.
        video: the sampled frames.
        inputs: arguments of `generate`.
        tokenizer: the model's.
        method: how to reduce it.
    """

    clip: Clip
    video: Video
    inputs: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    method: Method

    @property
    def unknown_words(self) -> list[str]:
        """Words of the question that are not in the model's vocabulary."""
        return unknown_words(self.tokenizer, self.clip.question)


def choose_clips(options: Options) -> list[Clip]:
    """The user's video, or the shipped clips; a question without a video is asked of the needle clip alone."""
    shipped_model, asked, max_pixels = options.target.is_shipped, options.question, options.max_pixels
    if options.video is not None:
        question = asked or (NEEDLE.question if shipped_model else _DEFAULT_QUESTION)
        return [Clip(options.video, "", question, None, max_pixels)]
    if asked is not None and asked != NEEDLE.question:
        return [replace(NEEDLE, question=asked, answer=None, max_pixels=max_pixels)]
    needle = replace(NEEDLE, max_pixels=max_pixels)
    if asked is not None:
        return [needle]
    if shipped_model:
        return [needle, replace(BUNNY, max_pixels=max_pixels or BUNNY.max_pixels)]
    return [needle, replace(BUNNY, question=_DEFAULT_QUESTION, max_pixels=max_pixels)]


def prepare(options: Options, open_bar: OpenBar) -> list[Job]:
    """Decode and encode what is to be asked, without the model.

    Args:
        options: what to run.
        open_bar: shows the progress of each step.

    Raises:
        ValueError, TypeError: a video, a model or a folder that cannot be used, or a model too shallow for the method.
    """
    check_out(options.out)
    clips, videos = choose_clips(options), []
    for clip in clips:
        with open_bar(f"Decoding {clip.path.name}") as on_progress:
            videos.append(read_video(clip.path, options.frames, on_progress))
    options.make_method().check(options.target.load_config().get_text_config().num_hidden_layers)
    methods = _methods(options, clips, videos, open_bar)
    return [_encode(options.target, *parts) for parts in zip(clips, videos, methods, strict=True)]


def _encode(target: Target, clip: Clip, video: Video, method: Method) -> Job:
    processor = target.load_processor(clip.max_pixels)
    return Job(clip, video, processor(video, clip.question), processor.tokenizer, method)


def _methods(options: Options, clips: list[Clip], videos: list[Video], open_bar: OpenBar) -> list[Method]:
    """The method for each clip; it knows how relevant the frames are if that was asked for."""
    if options.relevance is None:
        return [options.make_method() for _ in clips]
    predictor = load_relevance(options.relevance).to(options.target.torch_device())
    methods = []
    with open_bar("Scoring the frames") as on_progress:
        for clip, video in zip(clips, videos, strict=True):
            features = predictor.encode(video.frames, progress=False)
            methods.append(options.make_method(relevance=predictor.bind(features, clip.question)))
            on_progress(len(methods), len(clips))
    return methods
