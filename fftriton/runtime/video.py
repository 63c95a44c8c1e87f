"""Reading uniformly sampled frames from a video file with PyAV, and writing frames to a video file.

Reading takes two passes. The first reads packets without decoding them; it counts the frames, finds the key frames and
checks that the file is whole. The second decodes the sampled frames and seeks over the stretches between them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # PyAV is imported when a file is read or written; most of the package does not need it
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

OnProgress = Callable[[int, int], None]  # called with (done, total)

_TICKS = 1_000_000  # a container's own clock, per second
_FALLBACK_RATE = 24.0  # frames per second if a file states none; Hugging Face assumes the same


@dataclass(frozen=True)
class Video:
    """Frames sampled from one video file.

    Attributes:
        frames: [F, H, W, 3] uint8, RGB.
        indices: numbers of these frames in the file, ascending.
        total_frames: number of frames in the file.
        fps: frames per second of the file.
    """

    frames: np.ndarray
    indices: list[int]
    total_frames: int
    fps: float

    @property
    def sampled_fps(self) -> float:
        """Sampled frames per second."""
        return len(self.indices) / self.total_frames * self.fps


@dataclass(frozen=True)
class _Scan:
    """Frames according to the packets: presentation times in display order (None if there are none), and key frames."""

    num_frames: int
    times: list[int] | None
    key_times: list[int]


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


def read_video(path: str | Path, num_frames: int, on_progress: OnProgress | None = None) -> Video:
    """Sample `num_frames` frames uniformly from a video file.

    Args:
        path: the video file, in any container and codec that FFmpeg reads. Other files that it names are not opened.
        num_frames: number of frames to sample, at least 1; all frames of a shorter video are returned.
        on_progress: called after each sampled frame with (done, total).

    Returns:
        The sampled frames.

    Raises:
        ValueError: the file is missing, empty, not a video, a list of other files, damaged or truncated; or
            `num_frames` is below 1.
    """
    import av

    if num_frames < 1:
        raise ValueError(f"frames must be at least 1, got {num_frames}")
    path = Path(path)
    _check_file(path)
    try:
        with _open(path) as container:
            scan = _scan(container, path)
        with _open(path) as container:
            return _read(container, path, scan, sample_indices(scan.num_frames, num_frames), on_progress)
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


def _check_file(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"video must be a file that exists, got '{path}'")
    if not path.is_file():
        raise ValueError(f"video must be a file, got the folder '{path}'")
    if path.stat().st_size == 0:
        raise ValueError(f"video must not be empty, got '{path}' of 0 bytes")


@contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    """Open a video file. FFmpeg reads it through Python and may open no other file or address, as in a playlist."""
    import av

    with path.open("rb") as file:
        try:
            container = av.open(file, "r", container_options={"protocol_whitelist": "none"})
        except av.FFmpegError as error:
            file.seek(0)
            if file.read(8)[4:] == b"ftyp":  # an mp4 without its index, which may be at the end
                problem = "which is cut off: its index is missing"
                raise ValueError(f"video must be whole, got '{path}', {problem}") from error
            rule = "video must be a video file that holds its own frames, not a list of other files"
            raise ValueError(f"{rule}, got '{path}': {error.strerror}") from error
        with container:
            # FFmpeg reads long text files as ANSI art
            if not container.streams.video or container.format.name == "tty":
                raise ValueError(f"video must be a video file, got '{path}', which has no video stream")
            yield container


def _read(
    container: InputContainer, path: Path, scan: _Scan, indices: list[int], on_progress: OnProgress | None
) -> Video:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    frames: list[np.ndarray] = []
    for frame in _decode(container, stream, scan, indices):
        frames.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
        if on_progress is not None:
            on_progress(len(frames), len(indices))
    if len(frames) < len(indices):
        raise ValueError(f"video must be whole, got '{path}', which is cut off after {len(frames)} sampled frames")
    rate = stream.average_rate or stream.guessed_rate
    return Video(np.stack(frames), indices, scan.num_frames, float(rate) if rate else _FALLBACK_RATE)


def _scan(container: InputContainer, path: Path) -> _Scan:
    """Read every packet once; refuse a file that ends earlier than it states."""
    stream = container.streams.video[0]
    times: list[int | None] = []
    key_times: list[int] = []
    end = 0.0  # seconds
    for packet in container.demux():
        if packet.is_corrupt:
            raise ValueError(f"video must be whole, got '{path}', which is cut off or damaged at {end:.2f} s")
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream or packet.size == 0 or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            key_times.append(packet.pts)
    if not times:
        raise ValueError(f"video must contain at least one frame, got '{path}'")
    _check_whole(container, end, path)
    known = sorted(time for time in times if time is not None)
    return _Scan(len(times), known if len(known) == len(times) and key_times else None, sorted(key_times))


def _check_whole(container: InputContainer, end: float, path: Path) -> None:
    """Compare the end of the last packet with the duration in the header; streaming formats may state none."""
    if container.duration is None or end == 0:
        return
    stated = container.duration / _TICKS
    found = end - (container.start_time or 0) / _TICKS
    rate = container.streams.video[0].average_rate
    two_frames = 2 / float(rate) if rate else 0.0
    if found < stated - max(0.25, two_frames, 0.02 * stated):
        raise ValueError(f"video must be whole, got '{path}', which is cut off: it holds {found:.2f} of {stated:.2f} s")


def _decode(container: InputContainer, stream: VideoStream, scan: _Scan, indices: list[int]) -> Iterator[VideoFrame]:
    """Yield the frames with these numbers, in order; fewer if the stream ends early."""
    if scan.times is None:  # no timestamps for seeking
        wanted = set(indices)
        yield from (frame for i, frame in enumerate(container.decode(stream)) if i in wanted)
        return
    decoder = container.decode(stream)
    reached = scan.times[0]
    for time in (scan.times[i] for i in indices):
        key_time = scan.key_times[max(0, bisect_right(scan.key_times, time) - 1)]
        if key_time > reached:
            container.seek(key_time, stream=stream)
            decoder = container.decode(stream)
        for frame in decoder:
            if frame.pts is not None and frame.pts >= time:
                reached = frame.pts
                yield frame
                break
