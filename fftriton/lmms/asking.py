"""Relevance for models that read their videos themselves: it learns frames and question while they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..evaluate.relevance import SampleRelevance
from ..methods import KVTP, Chain, FrameContext, Method
from ..relevance import BoundRelevance


class AskedRelevance:
    """The relevance of the video and the question that a model is about to answer.

    Args:
        predictor: scores the frames.
        patches: whether pruners want its importance and keys.
    """

    of_one_video = True

    def __init__(self, predictor: SampleRelevance, patches: bool) -> None:
        self._predictor, self._patches = predictor, patches
        self.ask(None)

    def ask(self, question: str | None) -> None:
        """A request begins: whatever was seen belongs to another one."""
        self._question, self._bound, self._frames = question, None, None

    def see(self, frames: Any) -> None:
        """The frames that the model gets.

        Raises:
            ValueError: the request has another video already.
        """
        if self._frames is not None:
            raise ValueError("fftriton: a question must be about one video for kvtp with relevance, got more")
        self._frames = frames

    def __call__(self, context: FrameContext) -> Tensor:
        """Scores [F] of the F frames of tokens."""
        return self._binding()(context)

    @property
    def seconds(self) -> float:
        return self._binding().seconds

    @property
    def macs(self) -> float:
        return self._binding().macs

    @property
    def patches(self) -> Any:
        return self._binding().patches

    def _binding(self) -> BoundRelevance:
        if self._bound is None:
            if self._frames is None or self._question is None:
                raise ValueError(
                    "fftriton: the frames must be known for kvtp with relevance: the base must pass them as `videos` "
                    "to its processor, got none; use processing=fftriton"
                )
            self._bound = self._predictor.bind(self._frames, self._question, self._patches)
        return self._bound


class NotingProcessor:
    """A processor that tells relevances which videos it is given, and is the original otherwise.

    Args:
        original: the processor.
        asked: whom to tell.
    """

    def __init__(self, original: Any, asked: list[AskedRelevance]) -> None:
        self._original, self._asked = original, asked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        videos = kwargs.get("videos")
        if videos is not None:
            for one in self._asked:
                one.see(as_frames(videos))
        return self._original(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def as_frames(videos: Any) -> np.ndarray:
    """[T, H, W, 3] uint8: the one video that a processor is given, whose pixels may be floats, or channels first.

    Raises:
        ValueError: it is given several, or something else.
    """
    if isinstance(videos, list | tuple):
        if len(videos) != 1:
            raise ValueError(f"fftriton: a question must be about one video for kvtp with relevance, got {len(videos)}")
        return _as_uint8(_as_array(videos[0]))
    array = _as_array(videos)
    return as_frames(list(array)) if array.ndim == 5 else _as_uint8(array)


def _as_array(video: Any) -> np.ndarray:
    """A tensor, an array, or a list of pictures as an array."""
    if isinstance(video, Tensor):
        return video.cpu().numpy()
    return np.stack([np.asarray(frame) for frame in video]) if isinstance(video, list | tuple) else np.asarray(video)


def _as_uint8(frames: np.ndarray) -> np.ndarray:
    if frames.ndim == 4 and frames.shape[1] == 3 and frames.shape[-1] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"fftriton: a video must be [T, H, W, 3] or [T, 3, H, W], got {list(frames.shape)}")
    if frames.dtype != np.uint8:
        if frames.size and (frames.min() < 0 or 0 < frames.max() <= 1 or frames.max() > 255):
            raise ValueError(
                "fftriton: pixels must be from 0 to 255 for kvtp with relevance, got "
                f"{frames.min():g} to {frames.max():g}"
            )
        frames = frames.round().astype(np.uint8)
    return np.ascontiguousarray(frames)


def with_asked(method: Method) -> tuple[Method, list[AskedRelevance]]:
    """The method with relevances that still have to learn frames and question, and these."""
    asked: list[AskedRelevance] = []

    def adapt(part: Method) -> Method:
        if not isinstance(part, KVTP) or not isinstance(part.relevance, SampleRelevance):
            return part
        asked.append(AskedRelevance(part.relevance, part.make_pruner().wants_predictor))
        return replace(part, relevance=asked[-1])

    if isinstance(method, Chain):
        return Chain([adapt(part) for part in method.methods]), asked
    return adapt(method), asked


@contextmanager
def noting(model: Any, asked: list[AskedRelevance]) -> Iterator[None]:
    """Inside the block, the processors of an lmms-eval model tell the relevances what they are given."""
    found = {name: value for name, value in vars(model).items() if "processor" in name and callable(value)}
    for name, value in found.items():
        setattr(model, name, NotingProcessor(value, asked))
    try:
        yield
    finally:
        for name, value in found.items():
            setattr(model, name, value)
