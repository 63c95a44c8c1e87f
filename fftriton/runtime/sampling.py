"""Which frames to take from a video: what the user asks for, and the rules that turn it into frame numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.video_utils import VideoMetadata

from ..checks import check_count, check_real

FrameRule = Callable[[int, float], list[int]]
"""From the number of frames and the frames per second to the ascending numbers of the frames to take."""

_FRAMES = 16  # of a model whose processor says nothing
_QWEN_FPS = 2.0  # of qwen-vl-utils; its processors state only the bounds
_MAX_FRAMES = 768  # Qwen's, for everyone: a film holds far more frames than memory


@dataclass(frozen=True)
class Sampling:
    """What the user asks for; whatever is None is left to the checkpoint's processor.

    Args:
        frames: number of frames, spread evenly. Goes without fps, min_frames and max_frames.
        fps: frames to take per second of video.
        min_frames, max_frames: bounds of the number of frames.
        start, end: the part of the video to take frames from, in seconds after its first frame.

    Raises:
        ValueError, TypeError: a value is out of range, or two exclude each other.
    """

    frames: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "min_frames", "max_frames"):
            if getattr(self, name) is not None:
                check_count("fftriton", name, getattr(self, name), 1)
        for name in ("fps", "start", "end"):
            if getattr(self, name) is not None:
                check_real("fftriton", name, getattr(self, name), 0.0, 1e9)
        for name in ("fps", "end"):
            if getattr(self, name) == 0:
                raise ValueError(f"fftriton: {name} must be above 0, got 0")
        for name in ("fps", "min_frames", "max_frames"):
            if self.frames is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"fftriton: frames must go without {name}, got {self.frames} and {getattr(self, name)}"
                )
        if self.min_frames is not None and self.max_frames is not None and self.min_frames > self.max_frames:
            raise ValueError(
                f"fftriton: min_frames must be at most max_frames, got {self.min_frames} and {self.max_frames}"
            )
        if self.end is not None and self.end <= (self.start or 0):
            raise ValueError(f"fftriton: end must be after start, got {self.end} and {self.start or 0}")

    def bounded(self, count: int) -> int:
        """A number of frames within min_frames and max_frames."""
        least = max(count, self.min_frames or 1)
        return min(least, self.max_frames or least)


def sample_indices(total: int, count: int) -> list[int]:
    """The middle frame of each of `count` equal stretches; all frames if there are fewer.

    Args:
        total: number of existing frames, at least 1.
        count: number of frames to sample, at least 1.

    Returns:
        Ascending, distinct frame numbers, min(total, count) of them.
    """
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class Evenly:
    """A number of frames, spread by `sample_indices`."""

    frames: int

    def __call__(self, total: int, fps: float) -> list[int]:
        return sample_indices(total, self.frames)


@dataclass(frozen=True)
class PerSecond:
    """A number of frames per second, within bounds: the first frame of each of equal stretches.

    Args:
        fps: frames to take per second.
        min_frames, max_frames: bounds of the number of frames. A video with fewer frames gives all of them.
        multiple: the number is rounded down to a multiple of this, if there are so many: the frames of a token.

    Source:
        Qwen2VLVideoProcessor.sample_frames of Hugging Face transformers, which gives the same frames.
    """

    fps: float
    min_frames: int = 1
    max_frames: int = _MAX_FRAMES
    multiple: int = 1

    def __call__(self, total: int, fps: float) -> list[int]:
        most = self._rounded(min(self.max_frames, total))
        count = self._rounded(math.floor(min(max(total / fps * self.fps, self.min_frames), most)))
        return sorted({i * total // count for i in range(count)})

    def _rounded(self, count: int) -> int:
        return count // self.multiple * self.multiple or max(1, count)


@dataclass(frozen=True)
class ProcessorsOwn:
    """The rule of a processor of Hugging Face that samples frames by itself, within the user's bounds."""

    processor: Any
    sampling: Sampling

    def __call__(self, total: int, fps: float) -> list[int]:
        asked = {} if self.sampling.fps is None else {"fps": self.sampling.fps}
        metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
        try:
            indices = sorted({int(index) for index in self.processor.sample_frames(metadata=metadata, **asked)})
        except ValueError:  # it wants more frames than there are
            indices = list(range(total))
        if indices and indices[-1] == total:  # rounded past the end, as Qwen2-VL's does
            indices.pop()
        if not indices or indices[0] < 0 or indices[-1] >= total:
            kind = type(self.processor).__name__
            raise ValueError(f"model must have a processor that samples frames 0 to {total - 1}, got {kind}: {indices}")
        count = self.sampling.bounded(len(indices))
        return indices if count == len(indices) else sample_indices(total, count)


def frame_rule(sampling: Sampling, processor: Any) -> FrameRule:
    """The rule that a user's wishes and a checkpoint's video processor make together.

    A number of frames is spread evenly. Otherwise the processor decides: by its own function if it samples frames
    (`do_sample_frames`), or else by its `fps`, its `num_frames`, or, if it states `min_frames` and `max_frames`, as
    Qwen2-VL's does, by two frames per second.

    Args:
        sampling: the user's wishes.
        processor: a video processor of Hugging Face, or an object with its attributes.
    """
    if sampling.frames is not None:
        return Evenly(sampling.frames)
    fps, number, low, high = (
        getattr(processor, name, None) for name in ("fps", "num_frames", "min_frames", "max_frames")
    )
    if getattr(processor, "do_sample_frames", False) and number is None and (sampling.fps or fps):
        return ProcessorsOwn(processor, sampling)
    fps = sampling.fps or (None if number else fps or (low and high and _QWEN_FPS))
    if fps is None:
        return Evenly(sampling.bounded(number or _FRAMES))
    low, high = sampling.min_frames or low or 1, sampling.max_frames or high or _MAX_FRAMES
    if sampling.min_frames is None:
        low = min(low, high)
    return PerSecond(fps, low, max(low, high), getattr(processor, "temporal_patch_size", None) or 1)
