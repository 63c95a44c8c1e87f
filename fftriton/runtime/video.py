"""Reading sampled frames from a video file with PyAV, and writing frames to a video file.

Reading takes two passes. The first reads packets without decoding them; it lists the frames with their times and checks
that the file is whole. The second decodes the sampled frames (see decoding.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from .container import open_video
from .decoding import MismatchError, all_frames, upright, wanted_frames
from .sampling import Evenly, FrameRule, sample_indices
from .timeline import Timeline, make_timeline, scan

__all__ = ["Video", "read_video", "sample_indices", "write_video"]

OnProgress = Callable[[int, int], None]  # called with (done, total)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Video:
    """Frames sampled from one video file.

    Attributes:
        frames: [F, H, W, 3] uint8, RGB.
        indices: numbers of these frames in the file, ascending. In a file with a variable frame rate, a frame that is
            shown for long may have been taken several times.
        total_frames: number of frames in the file.
        fps: frames per second of the file, on average.
        times: seconds after the file's first frame at which each sampled frame is shown; if empty, the numbers and
            the rate decide.
        seconds: length of the part that was sampled; None for total_frames / fps.
    """

    frames: np.ndarray
    indices: list[int]
    total_frames: int
    fps: float
    times: Sequence[float] = ()
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not len(self.times):
            object.__setattr__(self, "times", [index / self.fps for index in self.indices])

    @property
    def sampled_fps(self) -> float:
        """Sampled frames per second."""
        if self.seconds is not None:
            return len(self.indices) / self.seconds
        return len(self.indices) / self.total_frames * self.fps


def read_video(
    path: str | Path,
    num_frames: int | None = None,
    on_progress: OnProgress | None = None,
    *,
    rule: FrameRule | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Video:
    """Sample frames from a video file.

    Args:
        path: the video file, in any container and codec that FFmpeg reads. Other files that it names are not opened.
        num_frames: number of frames to sample evenly, at least 1; all frames of a shorter video are returned.
        on_progress: called after each sampled frame with (done, total).
        rule: instead of num_frames, a function from the number of frames and their rate to the ascending numbers of
            the frames to take, such as a processor's `frame_rule`.
        start, end: the part of the video to sample, in seconds after its first frame; None for the whole.

    Returns:
        The sampled frames.

    Raises:
        ValueError: the file is missing, empty, not a video, a list of other files, damaged or truncated; `num_frames`
            is below 1; or the video ends before `start`.
        TypeError: neither or both of num_frames and rule are given.
    """
    import av

    if (num_frames is None) == (rule is None):
        raise TypeError(f"fftriton: read_video must get num_frames or rule, got {num_frames} and {rule}")
    if num_frames is not None:
        if num_frames < 1:
            raise ValueError(f"frames must be at least 1, got {num_frames}")
        rule = Evenly(num_frames)
    assert rule is not None
    path = Path(path)
    try:
        with open_video(path) as container:
            index, timeline = scan(container, path)
        if timeline is not None:
            try:
                return _take(path, timeline, rule, start, end, on_progress)
            except (MismatchError, av.FFmpegError):
                pass  # the packets are not what they seem
        return _take(path, _decoded_timeline(path, index), rule, start, end, on_progress)
    except av.FFmpegError as error:
        raise ValueError(f"video must decode, got '{path}', which is damaged: {error.strerror}") from error


def write_video(path: str | Path, frames: np.ndarray, rate: Fraction, crf: int) -> None:
    """Write frames as H.264 to an MP4 file, with its index at the start and the same bytes on every machine.

    Args:
        path: the file to write; its folder is created if missing.
        frames: [F, H, W, 3] uint8, RGB, height and width even.
        rate: frames per second.
        crf: constant rate factor of the encoder, from 0 (lossless) to 51.
    """
    import av

    options = {"crf": str(crf), "preset": "slow", "threads": "1", "x264-params": "cpu-independent=1"}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart", "fflags": "bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _decoded_timeline(path: Path, index: int) -> Timeline:
    """The timeline of all frames that can be decoded."""
    with open_video(path) as container:
        stamps = [frame.pts for frame in all_frames(container, index)]
        if not stamps:
            raise ValueError(f"video must contain at least one frame, got '{path}'")
        return make_timeline(container, index, stamps)


def _take(
    path: Path,
    timeline: Timeline,
    rule: FrameRule,
    start: float | None,
    end: float | None,
    on_progress: OnProgress | None,
) -> Video:
    first, last = start or 0.0, min(timeline.duration, timeline.duration if end is None else end)
    if first >= timeline.duration:
        raise ValueError(f"start must be before the end of '{path}' at {timeline.duration:.2f} s, got {first}")
    chosen = timeline.choose(rule, first, last)
    wanted = sorted(set(chosen))
    images: dict[int, np.ndarray] = {}
    with open_video(path) as container:
        size: tuple[int, int] | None = None  # of the first frame; a file may change it
        for number, frame in zip(wanted, wanted_frames(container, timeline, wanted), strict=False):
            size = size or (frame.width, frame.height)
            images[number] = upright(frame, *size)
            if on_progress is not None:
                on_progress(len(images), len(wanted))
    if len(images) < len(wanted):
        raise ValueError(f"video must be whole, got '{path}', which is cut off after {len(images)} sampled frames")
    frames = np.stack([images[number] for number in chosen])
    _LOG.info("%s: %d of %d frames, from %.2f to %.2f s", path, len(wanted), len(timeline.times), first, last)
    whole = start is None and end is None
    return Video(
        frames,
        chosen,
        len(timeline.times),
        timeline.fps,
        [timeline.times[number] for number in chosen],
        None if whole and timeline.is_regular else last - first,
    )
