"""Opening video files: what is no video, or names other files, is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:  # PyAV is imported when a file is read or written; most of the package does not need it
    from av.container import InputContainer
    from av.video.stream import VideoStream

_STILLS = ("image2", "ico", "svg")  # formats of single pictures, beside those that end in _pipe
_BUFFER = 2**18  # bytes that FFmpeg asks for at once
_FOREIGN = "video must be a video file that holds its own frames, not a list of other files"


@contextmanager
def open_video(path: Path) -> Iterator[InputContainer]:
    """Open a video file. FFmpeg reads it through Python and may open no other file or address, as in a playlist.

    Raises:
        ValueError: the file is missing, empty, not a video, a still picture, a list of other files, or cut off.
    """
    import av

    _check_file(path)
    with path.open("rb", buffering=0) as file:
        known, options = _known_format(file), {"protocol_whitelist": "none"}
        try:
            container = av.open(file, "r", format=known, container_options=options, buffer_size=_BUFFER)
        except av.FFmpegError as error:
            file.seek(0)
            raise _refusal(path, file.read(16), error) from error
        with container:
            _check_format(container, path)
            _check_boxes(container, path)
            yield container


def moving_streams(container: InputContainer, path: Path) -> list[VideoStream]:
    """The video streams that are not covers or thumbnails.

    Raises:
        ValueError: there is none.
    """
    from av.stream import Disposition

    stills = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    moving = [stream for stream in container.streams.video if not stream.disposition & stills]
    if not moving:
        raise ValueError(f"video must be a video file, got '{path}', whose only picture is a cover or a still")
    return moving


def _known_format(file: BinaryIO) -> str | None:
    """The name of the format if FFmpeg's own guess needs more of the file: a transport stream of a few packets."""
    start = file.read(5 * 192)
    file.seek(0)
    for size, offset in ((188, 0), (192, 4)):  # the latter: .m2ts
        marks = start[offset::size]
        if len(marks) >= 3 and set(marks) == {0x47}:
            return "mpegts"
    return None


def _check_file(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"video must be a file that exists, got '{path}'")
    if not path.is_file():
        raise ValueError(f"video must be a file, got the folder '{path}'")
    if path.stat().st_size == 0:
        raise ValueError(f"video must not be empty, got '{path}' of 0 bytes")


def _check_format(container: InputContainer, path: Path) -> None:
    name = container.format.name
    if not container.streams.video or name == "tty":  # FFmpeg reads long text files as ANSI art
        raise ValueError(f"video must be a video file, got '{path}', which has no video stream")
    if name == "webp_pipe":
        raise ValueError(f"video must be a video file, got '{path}', a WebP: convert animated ones to mp4")
    if name.endswith("_pipe") or name in _STILLS:
        raise ValueError(f"video must be a video file, got '{path}', which is a still picture")


def _check_boxes(container: InputContainer, path: Path) -> None:
    """The outermost parts of an mp4, mov or avi state their sizes: the file must hold all of them."""
    is_mov, size = "mov" in container.format.name.split(","), path.stat().st_size
    if not is_mov and container.format.name != "avi":
        return
    with path.open("rb") as file:
        end = 0
        while end < size:
            file.seek(end)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big") if is_mov else int.from_bytes(head[4:8], "little") + 8
            if is_mov and length == 1:
                length = int.from_bytes(head[8:], "big")
            if length < 8 or (length == 8 and not is_mov):  # up to the end of the file, or never filled in
                return
            end += length
    if end > size:
        raise ValueError(f"video must be whole, got '{path}', which is cut off: it holds {size} of {end} bytes")


def _refusal(path: Path, start: bytes, error: Any) -> ValueError:
    """Why FFmpeg could not open a file that starts with these bytes."""
    if start[4:8] == b"ftyp":  # an mp4 without its index, which may be at the end
        return ValueError(f"video must be whole, got '{path}', which is cut off: its index is missing")
    return ValueError(f"{_FOREIGN}, got '{path}': {error.strerror}")
