"""Adapters of public annotations: Video-MME, EgoSchema, NExT-QA and NExT-GQA.

Each reads the files that the data set publishes and returns all of its questions, whether or not their videos are here.
"""

from __future__ import annotations

import csv
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .questions import Question, span_relevance

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Files:
    """The files of a data set.

    Attributes:
        annotations: its questions.
        videos: folder of its videos.
        answers: EgoSchema's subset_answers.json.
        spans: NExT-GQA's gsub_val.json or gsub_test.json.
        video_map: NExT-QA's map_vid_vidorID.json: where a video is in the folder.
    """

    annotations: Path
    videos: Path
    answers: Path | None = None
    spans: Path | None = None
    video_map: Path | None = None

    def video(self, name: str) -> Path:
        """The file of a video."""
        if self.video_map is not None:
            name = str(_need(_read_json(self.video_map, dict), name, str(self.video_map)))
        return self.videos / f"{name}.mp4"


def videomme(files: Files) -> list[Question]:
    """Video-MME: a table with a row per question; the options begin with their letters."""

    def read(row: Row) -> Question:
        options = [re.sub(rf"^{letter}[.)]\s*", "", str(option)) for letter, option in _lettered(row["options"])]
        letter = _checked_letter(str(row["answer"]), options)
        video = files.video(str(row["videoID"]))
        return Question(
            f"videomme-{row['question_id']}", video, row["question"], tuple(options), letter, kind=row.get("task_type")
        )

    return _read_rows(files.annotations, read)


def egoschema(files: Files) -> list[Question]:
    """EgoSchema: questions.json, of which subset_answers.json answers 500, or the table of the hub."""
    answers = {} if files.answers is None else _read_json(files.answers, dict)

    def read(row: Row) -> Question:
        of_hub = "q_uid" not in row
        name = str(row["video_idx"] if of_hub else row["q_uid"])
        options = [str(text) for text in row["option"]] if of_hub else [row[f"option {i}"] for i in range(5)]
        if of_hub:  # the hub's options begin with their letters, too
            options = [re.sub(rf"^{letter}[.)]\s*", "", option) for letter, option in _lettered(options)]
        answer = row.get("answer") if of_hub else answers.get(name)
        letter = None if answer is None or answer == "" else _letter_of_number(answer, options)
        number = f"-{row['question_idx']}" if "question_idx" in row else ""
        return Question(
            f"egoschema-{name}{number}", files.video(name), row["question"], tuple(options), letter, kind="egoschema"
        )

    return _read_rows(files.annotations, read)


def nextqa(files: Files) -> list[Question]:
    """NExT-QA: a table with a row per question; the answer is the number of an option."""
    return _read_rows(files.annotations, lambda row: _of_next(row, files, "nextqa", str(row["video"])))


def nextgqa(files: Files) -> list[Question]:
    """NExT-GQA: a table like NExT-QA's whose answers are texts, and the times of the answers, which are the labels."""
    if files.spans is None:
        raise ValueError("labels: spans must be the file gsub_val.json or gsub_test.json for nextgqa, got None")
    spans = _read_json(files.spans, dict)

    def read(row: Row) -> Question | None:
        name = str(row.get("video_id") or row["video"])
        times = spans.get(name, {}).get("location", {}).get(str(row["qid"]))
        if not times:  # not all of the table's questions are located
            return None
        frames, relevance = span_relevance(times, float(spans[name]["duration"]))
        return _of_next(row, files, "nextgqa", name, frames=frames, relevance=relevance)

    return _read_rows(files.annotations, read)


SETS: dict[str, Callable[[Files], list[Question]]] = {
    "videomme": videomme, "egoschema": egoschema, "nextqa": nextqa, "nextgqa": nextgqa,
}  # fmt: skip
"""The adapter of each data set."""


def _of_next(row: Row, files: Files, prefix: str, video: str, **labels: Any) -> Question:
    """A question of NExT-QA or NExT-GQA; the latter calls the video's column video_id and answers in words."""
    options = [str(row[f"a{i}"]) for i in range(5)]
    if "video_id" in row:
        if options.count(row["answer"]) != 1:
            raise ValueError(f"answer must be one of {options}, got {row['answer']!r}")
        letter = string.ascii_uppercase[options.index(row["answer"])]
    else:
        letter = _letter_of_number(row["answer"], options)
    text = str(row["question"]).strip()
    return Question(
        f"{prefix}-{video}-{row['qid']}", files.video(video), text if text.endswith("?") else f"{text}?",
        tuple(options), letter, kind=row["type"], **labels,
    )  # fmt: skip


def _lettered(options: Iterable[Any]) -> zip[tuple[str, Any]]:
    return zip(string.ascii_uppercase, options, strict=False)


def _checked_letter(letter: str, options: list[str]) -> str:
    if len(letter) != 1 or letter not in string.ascii_uppercase[: len(options)]:
        raise ValueError(f"answer must be the letter of one of {len(options)} options, got {letter!r}")
    return letter


def _letter_of_number(number: Any, options: list[str]) -> str:
    try:
        index = int(number)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(options):
        raise ValueError(f"answer must be a number from 0 to {len(options) - 1}, got {number!r}")
    return string.ascii_uppercase[index]


def _read_rows(path: Path, read: Callable[[Row], Question | None]) -> list[Question]:
    questions = []
    for number, row in enumerate(_rows(path), 1):
        try:
            question = read(row)
        except KeyError as error:
            raise ValueError(f"labels: question {number} of '{path}' must have {error}, got {sorted(row)}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"labels: question {number} of '{path}': {error}") from error
        if question is not None:
            questions.append(question)
    if not questions:
        raise ValueError(f"labels: annotations must have one question or more, got '{path}' without any")
    return questions


def _rows(path: Path) -> Iterable[Row]:
    """The rows of a table: .parquet, .csv, or .json with a list of objects."""
    if path.suffix == ".json":
        return _read_json(path, list)
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file, strict=True))
        if path.suffix == ".parquet":
            return _parquet_rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels: annotations must be a file that can be read, got '{path}': {error}") from error
    raise ValueError(f"labels: annotations must be a .parquet, .csv or .json file, got '{path}'")


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("labels: a .parquet file needs pyarrow: pip install 'fftriton[labels]'") from error
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"labels: annotations must be a parquet file, got '{path}': {error}") from error


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"labels: '{path}' must be a JSON file: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"labels: '{path}' must hold a {kind.__name__}, got a {type(value).__name__}")
    return value


def _need(entries: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in entries:
        raise ValueError(f"'{where}' must have an entry for video '{name}', got none")
    return entries[name]
