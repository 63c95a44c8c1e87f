"""Questions about videos as JSON lines: the lines of `fftriton eval --task`, with what labels need."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..checks import check_spelling
from ..runtime.files import beside, writing

CLIP = 8
"""Frames of a clip."""

MOST_FRAMES = 128
"""Frames of a long video; a shorter one has one frame a second."""

LEAST, MOST = 0, 5
"""The lowest and the highest relevance."""

_ELSEWHERE = ("fps", "min_frames", "max_frames", "start", "end")


@dataclass(frozen=True)
class Question:
    """One question about one video; everything but the first three may be unknown.

    Attributes:
        id: names the question in messages.
        video: the file.
        question: the question.
        options: the answers to choose from; empty for an open question.
        letter: of the right option.
        answer: right answers of an open question.
        kind: of the question.
        query: the question as a relevance predictor reads it: short, with the options.
        frames: frames to take of the video, spread evenly.
        relevance: of each clip of 8 of these frames, from 0 to 5; the last clip may be short.
    """

    id: str
    video: Path
    question: str
    options: tuple[str, ...] = ()
    letter: str | None = None
    answer: Any = None
    kind: str | None = None
    query: str | None = None
    frames: int | None = None
    relevance: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("question", "query"):
            value = getattr(self, name)
            if (value is not None or name == "question") and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"{name} must be a text, got {value!r}")
        if self.relevance is not None:
            clips = None if self.frames is None else num_clips(self.frames)
            if len(self.relevance) != clips or not all(LEAST <= label <= MOST for label in self.relevance):
                raise ValueError(
                    f"relevance must have a number from {LEAST} to {MOST} for each of the {clips} clips of "
                    f"{self.frames} frames, got {list(self.relevance)}"
                )

    @property
    def is_answered(self) -> bool:
        """Whether the right answer is known."""
        return self.letter is not None or self.answer is not None

    @property
    def text(self) -> str:
        """The question with its options, each on a line of its own."""
        return "\n".join([self.question, *(f"- {option}" for option in self.options)])

    @property
    def tells_clips_apart(self) -> bool:
        """Whether clips differ in relevance; if not, the question's loss in training is constant."""
        return self.relevance is not None and len(set(self.relevance)) > 1


_FIELDS = tuple(part.name for part in fields(Question))


def num_frames(seconds: float) -> int:
    """Frames to take of a video of this length: one a second, from 1 to 128."""
    return min(MOST_FRAMES, max(1, round(seconds)))


def num_clips(frames: int) -> int:
    """Clips of so many frames."""
    return -(-frames // CLIP)


def clip_seconds(frames: int, seconds: float) -> list[tuple[float, float]]:
    """Start and end of each clip in seconds. Frame i stands for the i-th of `frames` equal parts of the video."""
    edges = [*range(0, frames, CLIP), frames]
    return [(low * seconds / frames, high * seconds / frames) for low, high in itertools.pairwise(edges)]


def span_relevance(spans: Sequence[Sequence[float]], seconds: float) -> tuple[int, tuple[float, ...]]:
    """Relevance from the times of the answer: 5 for a clip with a frame in one of the spans, 0 for others.

    If no frame lies in a span, because it is short, the clip in which its middle lies counts.

    Args:
        spans: start and end of each, in seconds.
        seconds: length of the video. A span may end after it, as some of NExT-GQA do.

    Returns:
        The number of frames, and the relevance of each clip.

    Raises:
        ValueError: a span is not within the video.
    """
    frames = num_frames(seconds)
    relevance = [float(LEAST)] * num_clips(frames)
    for start, end in spans:
        if not 0 <= start < end or start >= seconds:
            raise ValueError(f"spans must start before they end, within {seconds:g} seconds, got {[start, end]}")
        times = [(index + 0.5) * seconds / frames for index in range(frames)]
        inside = [index for index, time in enumerate(times) if start <= time <= end]
        middle = math.floor((start + min(end, seconds)) / 2 * frames / seconds)
        for index in inside or [min(middle, frames - 1)]:
            relevance[index // CLIP] = float(MOST)
    return frames, tuple(relevance)


def read_questions(paths: Iterable[Path]) -> list[Question]:
    """The questions of one or more files of JSON lines.

    Relative paths of videos start from the folder of the file if they exist there, or else from the current folder.

    Raises:
        ValueError: a file cannot be read, or a line cannot be a question; the message names the line.
    """
    questions: list[Question] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other ends of lines
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"questions must be a file of JSON lines, got '{path}': {error}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    questions.append(_read(line, path, number))
                except (ValueError, TypeError) as error:  # a JSONDecodeError is a ValueError
                    raise ValueError(f"line {number} of '{path}': {error}") from error
    if not questions:
        raise ValueError("questions must be one or more, got none")
    return questions


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write questions, with paths of videos relative to the file's folder.

    Raises:
        OSError: the file cannot be written.
    """
    with writing(path) as partial:
        partial.write_text("".join(_line(question, path.parent) + "\n" for question in questions), encoding="utf-8")


def _read(line: str, path: Path, number: int) -> Question:
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError(f"a line must be an object, got {line.strip()[:40]}")
    check_spelling(entry, (*_FIELDS, *_ELSEWHERE))
    if found := sorted(entry.keys() & set(_ELSEWHERE)):
        raise ValueError(f"labels are for one frame a second of the whole video, got {', '.join(found)}")
    if not isinstance(entry.get("video"), str) or not entry["video"]:
        raise ValueError(f"video must be the path of a file, got {entry.get('video')!r}")
    values = {name: entry[name] for name in _FIELDS if entry.get(name) is not None}
    values["id"] = str(values.get("id", f"{path.stem}-{number}"))
    values["video"] = beside(path.parent, entry["video"])
    for name in ("options", "relevance"):
        if name in values:
            values[name] = tuple(values[name])
    return Question(**values)


def _line(question: Question, folder: Path) -> str:
    entry = asdict(replace(question, video=Path()))
    entry["video"] = os.path.relpath(question.video.absolute(), folder.absolute())
    return json.dumps({name: value for name, value in entry.items() if value not in (None, ())}, ensure_ascii=False)
