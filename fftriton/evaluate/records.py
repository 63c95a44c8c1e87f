"""One record a sample and setting, kept in files that a later run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..runtime.files import naming


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        key: of the setting, see `RecordFolder`.
        index: of the sample.
        kind: of the question.
        num_frames: length of the video.
        depth: where in the video the answer is to be seen, 0 to 1; None where in no one place.
        answer, expected: what the model said, and what is right.
        right: whether these agree.
        budget_achieved: mean over layers of the video tokens in attention, as a fraction of the prompt's.
        flops: of the prefill, see `prefill_flops`.
        dense_flops: the same with all tokens.
        prefill_seconds: what the decoder took for the prompt.
        peak_memory: bytes above what was in use before; None where it was not measured.
        vision_tokens: for each layer, the video tokens in its attention.
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


class RecordFolder:
    """The records of a folder: JSON lines, one file a process, appended to as answers come in.

    A record belongs to a setting by its key, a digest of everything that an answer depends on, so that records of other
    settings, models or data may stand in the same files and are left alone.

    Args:
        folder: where the files are, made if need be.
        process: number of this process, which names the file that it appends to.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self._folder, self._own = folder, folder / f"records-{process}.jsonl"
        with naming(self._own):
            folder.mkdir(parents=True, exist_ok=True)
            with self._own.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":  # left unfinished
                        file.write(b"\n")

    def append(self, records: Iterable[Record]) -> None:
        """Write at once: what has been answered is never lost."""
        with naming(self._own), self._own.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in records)

    def read(self, keys: Iterable[str]) -> dict[tuple[str, int], Record]:
        """The records of these keys, by key and index; lines that a broken-off run left unfinished are skipped."""
        wanted, found = set(keys), {}
        for path in sorted(self._folder.glob("records-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = Record(**json.loads(line))
                except (json.JSONDecodeError, TypeError):
                    continue
                if record.key in wanted:
                    found[record.key, record.index] = record
        return found
