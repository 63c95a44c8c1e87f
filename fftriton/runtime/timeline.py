"""The frames of a video file and when each is shown, according to its packets."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .container import moving_streams
from .sampling import FrameRule

if TYPE_CHECKING:  # PyAV is imported when a file is read or written; most of the package does not need it
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

_EPSILON = 1e-6  # seconds; timestamps are no finer
_FINENESS = 16  # short frames for each frame, where these stay differently long
_TICKS = 1_000_000  # a container's own clock, per second
_FALLBACK_RATE = 24.0  # frames per second if a file states none; Hugging Face assumes the same
_MOST_REORDERED = 64  # frames between a packet's place in the file and on the screen; codecs allow 16
_WITH_DURATION = {"matroska", "flv", "asf"}  # formats whose header states the duration


_FROM_ZERO = {"matroska", "asf"}  # of these, those whose duration counts from zero, not from the first frame
_BROADCAST = {"mpegts", "mpeg"}  # formats that may go on after a fault or a splice; the decoder tells the damage
_VP8_SHOWN = 0x10  # bit of a packet's first byte
_SMALLEST = 8  # bytes; a smaller packet may be a delimiter or a place that a frame left empty
_TINY = {"vp9", "av1"}  # codecs that show a frame again by a packet of a byte or two
_PICTURES = {"mjpeg", "png", "bmp", "tiff", "webp", "jpegls", "jpeg2000", "jpegxl"}  # codecs of single pictures


@dataclass(frozen=True)
class Timeline:
    """The frames of a video, in the order in which they are shown.

    Attributes:
        stream: index of the video stream.
        times: seconds after the first frame at which each frame is shown, ascending.
        duration: seconds from the first frame to the end of the last.
        fps: frames per second, on average.
        is_regular: whether every frame stays equally long, but for rounding.
        stamps, ordinals: presentation timestamp of each frame, and which packet of the stream holds it; both empty if
            only decoding from the start tells the frames apart.
        keys: the packets that decoding can start from, ascending: ordinal and timestamp.
    """

    stream: int
    times: Sequence[float]
    duration: float
    fps: float
    is_regular: bool
    stamps: Sequence[int] = ()
    ordinals: Sequence[int] = ()
    keys: Sequence[tuple[int, int]] = ()

    def key_before(self, number: int) -> tuple[int, int]:
        """The last packet from which decoding reaches this frame: ordinal and timestamp."""
        ordinal, stamp = self.ordinals[number], self.stamps[number]
        last = bisect_right(self.keys, (ordinal, stamp))
        return next(key for key in reversed(self.keys[:last]) if key[1] <= stamp)

    def choose(self, rule: FrameRule, start: float, end: float) -> list[int]:
        """Numbers of the frames that a rule takes from a part of the video.

        A rule counts frames of equal length. If those of the video stay differently long, it is asked about short ones,
        and what the video shows at the moments that it chooses is taken; a frame that stays may come several times.

        Args:
            rule: from the number of frames and their rate to the numbers of those to take.
            start, end: the part of the video, in seconds after its first frame; 0 <= start < end <= duration.
        """
        first, total = self._at(start), self._at(end, before=True) - self._at(start) + 1
        if self.is_regular or total == 1:
            return [first + i for i in rule(total, self.fps)]
        step = (end - start) / (total * _FINENESS)
        chosen = rule(total * _FINENESS, 1 / step)
        if len(chosen) >= total:
            return list(range(first, first + total))
        return [self._at(start + (i + 0.5) * step) for i in chosen]

    def _at(self, seconds: float, before: bool = False) -> int:
        """Number of the frame that is shown at this moment, or right before it."""
        number = bisect_right(self.times, seconds + _EPSILON * (-1 if before else 1)) - 1
        return max(0, number)


@dataclass
class _Track:
    """What the packets of one stream tell."""

    codec: str
    stamps: list[int | None] = field(default_factory=list)  # of every packet
    shown: list[int] = field(default_factory=list)  # ordinals of the packets that an edit list leaves
    keys: list[tuple[int, int]] = field(default_factory=list)
    last_duration: int = 0
    unclear: bool = False  # whether a packet may hold no frame, or changes how the later ones are decoded

    def add(self, packet: Packet) -> None:
        ordinal = len(self.stamps)
        self.stamps.append(packet.pts)
        hidden = self.codec == "vp8" and not memoryview(packet)[0] & _VP8_SHOWN
        if not (packet.is_discard or hidden):
            self.shown.append(ordinal)
        if packet.is_keyframe and packet.pts is not None:
            self.keys.append((ordinal, packet.pts))
        self.last_duration = packet.duration or 0
        changes = ordinal > 0 and (packet.has_sidedata("new_extradata") or packet.has_sidedata("palette"))
        self.unclear |= changes or (packet.size < _SMALLEST and self.codec not in _TINY)

    def ordered(self) -> list[tuple[int, int]] | None:
        """Timestamps and ordinals of the shown frames, as they are shown; None if the packets do not tell."""
        stamped = [(stamp, ordinal) for ordinal in self.shown if (stamp := self.stamps[ordinal]) is not None]
        order = sorted(stamped)
        distinct = len({stamp for stamp, _ in stamped}) == len(self.shown)
        if not distinct or self.unclear or not self.keys or order[0][0] < self.keys[0][1]:
            return None
        moved = max(abs(before[1] - after[1]) for before, after in zip(stamped, order, strict=True))
        return order if moved <= _MOST_REORDERED else None  # else timestamps start anew in the middle


def scan(container: InputContainer, path: Path) -> tuple[int, Timeline | None]:
    """Read every packet once.

    Returns:
        The index of the video stream; and the timeline, or None if only decoding can tell it.

    Raises:
        ValueError: the file ends earlier than it states, holds damaged packets, or has no frames.
    """
    tracks = {stream.index: _Track(stream.codec_context.name) for stream in moving_streams(container, path)}
    end, fault = 0.0, None  # seconds
    for packet in container.demux():
        if packet.is_corrupt and container.format.name not in _BROADCAST:
            raise ValueError(f"video must be whole, got '{path}', which is cut off or damaged at {end:.2f} s")
        if packet.is_corrupt and fault is None:
            fault = end
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index in tracks and packet.size:
            tracks[packet.stream.index].add(packet)
    index = next((index for index, track in tracks.items() if len(track.shown) > 1), min(tracks))
    track = tracks[index]
    if not track.shown:
        raise ValueError(f"video must contain at least one frame, got '{path}'")
    if len(track.shown) == 1 and container.streams.audio and track.codec in _PICTURES:
        raise ValueError(f"video must be a video file, got '{path}', whose only picture is a cover or a still")
    _check_whole(container, end, path)
    if fault is not None:
        warnings.warn(f"fftriton: '{path}' has a fault or a splice at {fault:.2f} s", stacklevel=3)
    order = track.ordered()
    if order is None:
        return index, None
    stamps, ordinals = map(list, zip(*order, strict=True))
    return index, make_timeline(container, index, stamps, track.last_duration, ordinals, track.keys)


def make_timeline(
    container: InputContainer,
    index: int,
    stamps: Sequence[int | None],
    last_duration: int = 0,
    ordinals: Sequence[int] = (),
    keys: Sequence[tuple[int, int]] = (),
) -> Timeline:
    """The timeline of frames with these timestamps.

    Args:
        container: the file.
        index: of the video stream.
        stamps: presentation timestamp of each frame as they come; if one is missing or out of order, the stream's rate
            decides instead.
        last_duration: how long the last frame stays, in ticks of the stream; 0 if unknown.
        ordinals, keys: as in `Timeline`; without them, frames are found by decoding from the start.
    """
    stream: VideoStream = container.streams[index]  # type: ignore[assignment]
    nominal = float(stream.average_rate or stream.guessed_rate or _FALLBACK_RATE)
    known = [stamp for stamp in stamps if stamp is not None]
    total, base = len(stamps), stream.time_base
    if base is None or len(known) < total or any(a >= b for a, b in pairwise(known)):
        times = [number / nominal for number in range(total)]
        return Timeline(index, times, total / nominal, nominal, True)
    times = [float((stamp - known[0]) * base) for stamp in known]
    average = (total - 1) / times[-1] if total > 1 else nominal
    fps = nominal if abs(total - 1 - times[-1] * nominal) < 0.5 else average
    # program streams stamp packs, not frames, so that a frame may seem to come one early or late
    most = 1.5 if container.format.name == "mpeg" else 0.5
    is_regular = all(abs(number - time * fps) <= most for number, time in enumerate(times))
    duration = total / fps if is_regular else times[-1] + (float(last_duration * base) or 1 / fps)
    found = (known, ordinals, keys) if keys else ()
    return Timeline(index, times, duration, fps, is_regular, *found)


def _check_whole(container: InputContainer, end: float, path: Path) -> None:
    """Compare the end of the last packet with the duration in the header."""
    formats = set(container.format.name.split(","))
    if container.duration is None or end == 0 or not formats & _WITH_DURATION:
        return
    stated = container.duration / _TICKS
    found = end if formats & _FROM_ZERO else end - (container.start_time or 0) / _TICKS
    rate = container.streams.video[0].average_rate
    two_frames = 2 / float(rate) if rate else 0.0
    if found < stated - max(0.25, two_frames, 0.02 * stated):
        raise ValueError(f"video must be whole, got '{path}', which is cut off: it holds {found:.2f} of {stated:.2f} s")
