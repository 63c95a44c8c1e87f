"""Records, one per sample and setting, in files from which a later run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..runtime.files import naming


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        key: key of the setting, see `RecordFolder`.
        index: index of the sample.
        kind: kind of the question.
        num_frames: number of frames of the video.
        depth: where in the video the answer is visible, from 0 to 1; None if in no single place.
        answer, expected: the model's answer and the right answer.
        right: whether they agree.
        budget_achieved: mean over layers of the video tokens in attention, as a fraction of the prompt's.
        flops: multiply-accumulates of the prefill, see `prefill_flops`, and of the relevance predictor.
        dense_flops: multiply-accumulates with all tokens.
        prefill_seconds: time of the decoder for the prompt.
        peak_memory: peak bytes above those in use before; None if it was not measured.
        vision_tokens: for each layer, the video tokens in its attention.
        relevance_seconds: time of the relevance predictor, which comes before the prefill.
        relevance_flops: its multiply-accumulates.
    """

    key: str
    index: int
    kind: str
    num_frames: int
    depth: float | None
    answer: str
    expected: str
    right: bool
    budget_achieved: float
    flops: float
    dense_flops: float
    prefill_seconds: float
    peak_memory: int | None
    vision_tokens: list[int]
    relevance_seconds: float = 0.0
    relevance_flops: float = 0.0


class Keyed(Protocol):
    """A record with the key of its setting and the name of its sample."""

    @property
    def key(self) -> str: ...

    @property
    def index(self) -> Any: ...


R = TypeVar("R", bound=Keyed)


class RecordFolder(Generic[R]):
    """The records of a folder: JSON lines, one file per process, appended to as answers arrive.

    A record has the key of its setting, a digest of everything that an answer depends on. Records of other settings,
    models or data may be in the same files and are ignored.

    Args:
        folder: folder of the files; created if missing.
        process: number of this process, which determines the file that it appends to.
        kind: the dataclass of the records.
    """

    def __init__(self, folder: Path, process: int, kind: type[R]) -> None:
        self._kind = kind
        self._folder, self._own = folder, folder / f"records-{process}.jsonl"
        with naming(self._own):
            folder.mkdir(parents=True, exist_ok=True)
            with self._own.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":  # an unfinished line
                        file.write(b"\n")

    def append(self, records: Iterable[R]) -> None:
        """Append records to the file at once, so that no answer is lost."""
        with naming(self._own), self._own.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(record)) + "\n" for record in records)

    def read(self, keys: Iterable[str]) -> dict[tuple[str, Any], R]:
        """The records with these keys, by key and index; unfinished lines of an interrupted run are skipped.

        The last one counts, but no failure takes the place of an answer.
        """
        wanted, found = set(keys), {}
        for path in sorted(self._folder.glob("records-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = self._kind(**json.loads(line))
                except (json.JSONDecodeError, TypeError):
                    continue
                place = record.key, record.index
                fails = getattr(record, "error", None) is not None
                if record.key in wanted and not (fails and place in found):
                    found[place] = record
        return found
