"""Questions of one's own about videos of one's own, as a task for `fftriton eval`: `--task FILE.jsonl`."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import check_count, check_spelling
from ..runtime.answers import is_right
from ..runtime.files import beside
from ..runtime.processing import Processor
from ..runtime.sampling import Sampling
from ..runtime.video import Video, read_video

SUFFIX = ".jsonl"
_KIND = "question"  # of lines that name none
_CHOOSE = "Answer with the letter of the right option only."
_SAMPLING = tuple(part.name for part in fields(Sampling))
_KEYS = ("video", "question", "answer", "options", "letter", "kind", "query", *_SAMPLING)


@dataclass(frozen=True)
class Label:
    """What a right answer is.

    Attributes:
        answers: right answers: texts that the answer may contain, or the letter of the right option.
        options: the options' texts, in the order of their letters; empty for an open question.
    """

    answers: list[str]
    options: list[str]

    def is_right(self, answer: str) -> bool:
        """Whether an answer contains a right one, or names the right option by letter or text."""
        if not self.options:
            return any(is_right(answer, expected) for expected in self.answers)
        return chosen_letter(answer, self.options) == self.answers[0]


@dataclass
class FileSample:
    """One line of the file.

    Attributes:
        index: of the line among the questions.
        kind: of the question; "question" unless the line says otherwise.
        question: with the options, if there are any.
        answers: right answers: texts that the answer may contain, or the letter of the right option.
        options: the options' texts, in the order of their letters; empty for an open question.
        path: the video.
        sampling: which frames to take.
        query: the question as a relevance predictor reads it.
    """

    index: int
    kind: str
    question: str
    answers: list[str]
    options: list[str]
    path: Path
    sampling: Sampling
    query: str
    depth: None = None
    loaded: Video | None = field(default=None, repr=False)

    @property
    def answer(self) -> str:
        """The right answer; several are joined by |."""
        return "|".join(self.answers)

    @property
    def video(self) -> Video:
        """The frames that were sampled when the inputs were made."""
        if self.loaded is None:
            raise RuntimeError(f"the inputs of question {self.index} must be made before its video is looked at")
        return self.loaded

    def is_right(self, answer: str) -> bool:
        """Whether an answer contains a right one, or names the right option by letter or text."""
        return Label(self.answers, self.options).is_right(answer)


class FileTask:
    """The questions of a file of JSON lines.

    A line has a video, a question and an answer: a text that the model's answer must contain, or a list of such texts.
    With options, the answer is the text of the right one, or its letter, which may also stand under "letter". A line
    may have a kind, the fields of a Sampling, and a query, which a relevance predictor reads in place of the question
    with its options. Other keys are not read.

    Args:
        path: the file. Relative paths of videos start from its folder if they exist there, or else from the current
            folder.
        num_frames: one number of frames for all lines that say nothing of it; empty for the checkpoint's own rule.

    Raises:
        ValueError, TypeError: the file cannot be read, or a line cannot be a question; the message names the line.
    """

    split: str | None = None
    kinds: Sequence[str]

    def __init__(self, path: Path, num_frames: Sequence[int] = ()) -> None:
        if len(num_frames) > 1:
            raise ValueError(f"eval: frames must be one number for a file of questions, got {tuple(num_frames)}")
        for frames in num_frames:
            check_count("eval", "frames", frames, 1)
        self._path, self._frames = path, num_frames[0] if num_frames else None
        try:
            self._text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"eval: task must be a file of JSON lines, got '{path}': {error}") from error
        self._samples: list[FileSample] = []
        for number, line in enumerate(self._text.split("\n"), 1):
            if line.strip():
                try:
                    self._samples.append(self._read(line))
                except (ValueError, TypeError) as error:  # a JSONDecodeError is a ValueError
                    raise ValueError(f"eval: task: line {number} of '{path}': {error}") from error
        if not self._samples:
            raise ValueError(f"eval: task must have one question or more, got '{path}' without any")
        self.kinds = list(dict.fromkeys(sample.kind for sample in self._samples))
        self._last: tuple[Any, Video] | None = None

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def digest(self) -> str:
        """Digest of the file, and of the sizes and dates of the videos."""
        digest = hashlib.sha256(f"{self._frames} {self._text}".encode())
        for path in sorted({sample.path for sample in self._samples}):
            state = path.stat() if path.exists() else None
            digest.update(f"{path} {state and (state.st_size, state.st_mtime_ns)}".encode())
        return digest.hexdigest()

    def sample(self, index: int) -> FileSample:
        """Question `index` of the file, from 0."""
        return self._samples[index]

    def inputs(self, sample: FileSample, processor: Processor) -> dict[str, Tensor]:
        """The arguments of the model's `generate`. Neighbouring questions about one video share its frames."""
        wanted = (sample.path, sample.sampling)
        if self._last is None or self._last[0] != wanted:
            rule, part = processor.frame_rule(sample.sampling), sample.sampling
            self._last = wanted, read_video(sample.path, rule=rule, start=part.start, end=part.end)
        sample.loaded = self._last[1]
        return processor(sample.loaded, sample.question)

    def score(self, sample: FileSample, answer: str) -> bool:
        """Whether the answer is right."""
        return sample.is_right(answer)

    def unrelated_question(self, sample: FileSample) -> str:
        """The next question of the file that is another one and about another video, as a predictor reads it."""
        for step in range(1, len(self)):
            other = self._samples[(sample.index + step) % len(self)]
            if other.path != sample.path and other.question != sample.question:
                return other.query
        raise ValueError(f"eval: task: '{self._path}' must have a question about another video for a control")

    def _read(self, line: str) -> FileSample:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError(f"a line must be an object, got {line.strip()[:40]}")
        check_spelling(entry, _KEYS)
        for name in ("video", "question", "query"):
            if (name in entry or name != "query") and (not isinstance(entry.get(name), str) or not entry[name].strip()):
                raise ValueError(f"{name} must be a text, got {entry.get(name)!r}")
        wishes = {name: entry[name] for name in _SAMPLING if name in entry}
        if not wishes.keys() & {"frames", "fps", "min_frames", "max_frames"}:
            wishes["frames"] = self._frames
        label = read_label(entry)
        question = with_options(entry["question"], label.options)
        return FileSample(
            len(self._samples), str(entry.get("kind", _KIND)), question, label.answers, label.options,
            beside(self._path.parent, entry["video"]), Sampling(**wishes), entry.get("query", question),
        )  # fmt: skip


def read_label(entry: Mapping[str, Any]) -> Label:
    """The right answers and the options of a line. What stands under "letter" is never an option's text.

    Raises:
        ValueError: they are missing or contradict each other.
    """
    options = read_options(entry)
    return Label(_right(entry, options), options)


def read_options(entry: Mapping[str, Any]) -> list[str]:
    """The texts of a line's options; empty without any.

    Raises:
        ValueError: they are not a list.
    """
    options = entry.get("options")
    if options is not None and not isinstance(options, list):
        raise ValueError(f"options must be a list of texts, got {options!r}")
    return [str(option) for option in options or []]


def with_options(question: str, options: Sequence[str]) -> str:
    """A question with its options and their letters; the question itself if there are none."""
    if not options:
        return question
    return "\n".join([question, *map("{}. {}".format, string.ascii_uppercase, options), _CHOOSE])


def _right(entry: Mapping[str, Any], options: list[str]) -> list[str]:
    """The right answers, or the letter of the right option."""
    by_letter = entry.get("letter") is not None
    answer = entry["letter"] if by_letter else entry.get("answer")
    answers = [str(text) for text in (answer if isinstance(answer, list) else [answer]) if str(text).strip()]
    if answer is None or not answers:
        raise ValueError(f"answer must be a text or a list of texts, got {answer!r}")
    if not options:
        return answers
    letters = string.ascii_uppercase[: len(options)]
    if len(options) > len(string.ascii_uppercase) or (not by_letter and len({*options}) < len(options)):
        raise ValueError(f"options must be at most 26 different texts, got {options}")
    if len(answers) == 1 and answers[0] in options and not by_letter:
        return [letters[options.index(answers[0])]]
    if len(answers) == 1 and answers[0].strip(" ().").upper() in letters:
        return [answers[0].strip(" ().").upper()]
    raise ValueError(f"answer must be an option or a letter from A to {letters[-1]}, got {answer!r}")


def chosen_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names: by its letter at the start or alone, or else by its text alone."""
    letters = string.ascii_uppercase[: len(options)]
    start = re.match(rf"\s*\(?(?:([{letters}])(?:[.):,\s]|$)|([{letters.lower()}])(?:[.):]|$))", answer)
    found = re.findall(rf"\(([{letters}])\)|(?:[Oo]ption|[Aa]nswer(?: is)?:?)\s+([{letters}])\b", answer)
    named = {one or other for one, other in found}
    if len(named) > 1:
        return None
    if start and not re.match(r"\s*A\s+[a-z]", answer):  # "A red box" is a text
        return (start[1] or start[2]).upper()
    if named:
        return named.pop()
    texts = [letter for letter, option in zip(letters, options, strict=True) if is_right(answer, option)]
    return texts[0] if len(texts) == 1 else None
