"""The requests of `fftriton batch`: from JSON lines, a list of videos, a folder, a video, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..checks import check_count, check_spelling
from ..evaluate import Setting
from ..runtime.files import beside
from ..runtime.sampling import Sampling

STDIN = "-"
_VIDEOS = (
    "3g2 3gp asf avi divx dv f4v flv gif m1v m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf nut ogm ogv qt rm rmvb ts vob "
    "webm wmv y4m"
)
VIDEO_SUFFIXES = {f".{suffix}" for suffix in _VIDEOS.split()}
"""The endings of the files that are taken from a folder."""

_SAMPLING = tuple(part.name for part in fields(Sampling))
_KEYS = ("video", "question", "method", "budget", "max_pixels", "max_new_tokens", *_SAMPLING)


@dataclass(frozen=True)
class Request:
    """One question about one video.

    Attributes:
        name: the video's path, as it was given.
        video: the file.
        question: about the video.
        method, budget: how to reduce, as for `fftriton run`.
        sampling: which frames to take.
        max_pixels: maximum pixels per frame; None for the checkpoint's own.
        max_new_tokens: maximum length of the answer; None for the checkpoint's own.
        others: whatever else a line says; it is copied to the line of the answer.
    """

    name: str
    video: Path
    question: str
    method: str = "framefusion"
    budget: float = 0.3
    sampling: Sampling = field(default_factory=Sampling)
    max_pixels: int | None = None
    max_new_tokens: int | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"question must be a text, got {self.question!r}")
        if Setting(self.method, self.budget).is_control:
            raise ValueError(f"method must be told the question that is asked, got '{self.method}'")
        Setting(self.method, self.budget).method()
        for name in ("max_pixels", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_count("fftriton", name, getattr(self, name), 1)


@dataclass(frozen=True)
class Defaults:
    """What holds for requests that do not say otherwise.

    Attributes:
        questions: asked about each video that comes without a question.
        settings: the other fields of a Request and of its Sampling, by name.
    """

    questions: Sequence[str]
    settings: dict[str, Any]


def read_requests(source: str, defaults: Defaults) -> list[Request]:
    """Read requests.

    A line is a JSON object with a video, a question, and whatever differs from the defaults; or else the path of a
    video. Relative paths start from the folder of the file that names them if they exist there, or else from the
    current folder.

    Args:
        source: a file of lines; a folder, whose videos are taken with those of its folders; a video; or "-" for lines
            from standard input.
        defaults: for what a line leaves open.

    Raises:
        ValueError, TypeError: there is nothing to read, or a line cannot be a request; the message names the line.
    """
    if source == STDIN:
        return _from_lines(sys.stdin, "standard input", Path(), defaults)
    path = Path(source)
    if path.is_dir():
        videos = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file())
        if not videos:
            raise ValueError(f"requests must be a folder with videos in it, got '{path}'")
        return [request for video in videos for request in _of_video({"video": str(video)}, Path(), defaults)]
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return _of_video({"video": str(path)}, Path(), defaults)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _from_lines(file, f"'{path}'", path.parent, defaults)
    except OSError as error:
        raise ValueError(
            f"requests must be a file or a folder that can be read, got '{path}': {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"requests must be lines of text, got '{path}', which is something else") from error


def _from_lines(lines: Iterable[str], name: str, folder: Path, defaults: Defaults) -> list[Request]:
    requests = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        try:
            entry = json.loads(text) if text.startswith("{") else {"video": text}
            requests += _of_video(entry, folder, defaults)
        except (ValueError, TypeError) as error:  # a JSONDecodeError is a ValueError
            raise ValueError(f"requests: line {number} of {name}: {error}") from error
    if not requests:
        raise ValueError(f"requests must be one or more, got none in {name}")
    return requests


def _of_video(entry: dict[str, Any], folder: Path, defaults: Defaults) -> list[Request]:
    """The request of an entry; several if it has no question, and the defaults have several."""
    check_spelling(entry, _KEYS)
    values = defaults.settings | entry
    video = values.pop("video", None)
    if not isinstance(video, str) or not video:
        raise ValueError(f"video must be the path of a file, got {video!r}")
    path = beside(folder, video)
    if "frames" in entry:  # a number of frames takes the place of a rate
        values |= {name: entry.get(name) for name in ("fps", "min_frames", "max_frames")}
    elif entry.keys() & {"fps", "min_frames", "max_frames"}:
        values["frames"] = None
    sampling = Sampling(**{name: values.pop(name, None) for name in _SAMPLING})
    questions = [values.pop("question")] if "question" in values else defaults.questions
    own = {name: values.pop(name) for name in ("method", "budget", "max_pixels", "max_new_tokens") if name in values}
    return [Request(video, path, question, sampling=sampling, others=values, **own) for question in questions]
