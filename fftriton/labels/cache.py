"""Replies of models on disk, so that labelling resumes and no reply is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.files import naming

_START = b'{"key": "'


class Cache:
    """Values by what they were made from, in a file of JSON lines that is appended to.

    Args:
        path: the file; created if missing. A last line that an interruption cut off is not read.

    Raises:
        OSError: the file cannot be written.
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._values = path, threading.Lock(), dict[str, Any]()
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                whole, _, rest = file.read().rpartition(b"\n")
                self._read(whole.split(b"\n") if whole else [], rest)
                if rest:
                    file.truncate(file.tell() - len(rest))

    def _read(self, lines: list[bytes], rest: bytes) -> None:
        """Take the values from whole lines; the rest must be the begin of one."""
        rule = "cache must be a file that labelling wrote"
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{rule}, got line {number} of '{self._path}'") from None
        if not _START.startswith(rest[: len(_START)]):
            raise ValueError(f"{rule}, got line {len(lines) + 1} of '{self._path}'")

    def get(self, source: Any, make: Callable[[], Any]) -> Any:
        """The value that was made from a source; made now, and kept, if there is none.

        Args:
            source: all that the value depends on, as JSON can hold it.
            make: makes the value. If it raises, nothing is kept.
        """
        key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
        if key not in self._values:
            value = make()
            data = json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n"
            with self._lock, naming(self._path), self._path.open("ab") as file:
                file.write(data.encode())
                file.flush()
                os.fsync(file.fileno())
                self._values[key] = value
        return self._values[key]
