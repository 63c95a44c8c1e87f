"""Decoding the wanted frames of a video file.

Frames are found by counting packets from the start of the file, never by seeking, which lands late in some containers.
Reading packets is cheap; only the stretches from a key frame to a wanted frame are decoded. Each stretch is checked:
its frames must be those that the packets announce. If they are not, the file is decoded from its start instead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .timeline import Timeline

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_STRICT = {"err_detect": "explode"}  # a decoder raises instead of painting over what is damaged


class MismatchError(Exception):
    """The decoded frames are not those that the packets announce."""


def all_frames(container: InputContainer, index: int) -> Iterator[VideoFrame]:
    """Every frame of a stream, as it is shown."""
    stream = _opened(container, index)
    stream.thread_type = "SLICE"  # one thread per frame, after a first packet that cannot be decoded, decodes none
    started = False
    for _, packet in _packets(container, stream):
        for frame in _decode(packet, started):
            started = True
            yield frame


def wanted_frames(container: InputContainer, timeline: Timeline, wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """Yield the frames with these numbers.

    Args:
        container: the file, at its start.
        timeline: of the file.
        wanted: ascending, distinct frame numbers.

    Raises:
        MismatchError: the timeline announces other frames than these.
    """
    if timeline.keys:
        yield from _in_stretches(container, timeline, list(wanted))
        return
    left = set(wanted)
    for number, frame in enumerate(all_frames(container, timeline.stream)):
        if number in left:
            left.remove(number)
            yield frame
        if not left:
            return


def upright(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """[H, W, 3] uint8 RGB: the frame as it is to be shown, turned or mirrored as its display matrix says.

    Args:
        frame: a decoded frame.
        width, height: its size before it is turned.
    """
    image = frame.to_ndarray(format="rgb24", width=width, height=height)
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return image
    a, b, _, c, d = np.frombuffer(data, dtype=np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _in_stretches(container: InputContainer, timeline: Timeline, wanted: list[int]) -> Iterator[VideoFrame]:
    numbers = {stamp: number for number, stamp in enumerate(timeline.stamps)}
    stream = _opened(container, timeline.stream)
    start, stamp = timeline.key_before(wanted[0])
    first, last = bisect_left(timeline.stamps, stamp), -1  # numbers of the stretch's first frame and of its latest
    for ordinal, packet in _packets(container, stream):
        if ordinal < start and packet.size:
            continue
        for frame in _decode(packet, last >= 0):
            number = numbers.get(frame.pts)  # type: ignore[arg-type]
            if number is not None and number < first:
                continue  # shown before the key frame that the stretch starts from
            if number is None or (last >= 0 and number != last + 1) or number > wanted[0]:
                raise MismatchError
            last = number
            if number < wanted[0]:
                continue
            yield frame
            del wanted[0]
            if not wanted:
                return
            start, stamp = timeline.key_before(wanted[0])
            if start > ordinal:
                stream.codec_context.flush_buffers()
                first, last = bisect_left(timeline.stamps, stamp), -1
                break
    raise MismatchError


def _opened(container: InputContainer, index: int) -> VideoStream:
    stream: VideoStream = container.streams[index]  # type: ignore[assignment]
    stream.thread_type = "AUTO"
    stream.codec_context.options = _STRICT
    return stream


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, Packet]]:
    """The packets that hold frames, with their ordinals, and at the end the empty one that flushes the decoder."""
    ordinal = 0
    for packet in container.demux(stream):
        if packet.size or packet.dts is None:
            yield ordinal, packet
            ordinal += 1


def _decode(packet: Packet, started: bool) -> list[VideoFrame]:
    """Decode a packet. Until a frame has been shown, a packet may need frames from before the start."""
    import av

    try:
        frames: list[VideoFrame] = packet.decode()
    except av.FFmpegError:
        if started:
            raise
        return []
    return frames
