"""The file that `fftriton batch` writes: one JSON line per answer, appended at once, also by several processes."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..runtime.files import naming, writing

Line = dict[str, Any]
"""An answer; its first entry is the key of its request."""

_START = '{"key": "'


class Answers(Protocol):
    """Where answers go."""

    def done(self, keys: Sequence[str]) -> set[str]:
        """The keys that are answered already."""

    def append(self, lines: Sequence[Line]) -> None: ...

    def finish(self, keys: Sequence[str]) -> None:
        """Called by each process once it has answered its share."""

    def all_failed(self, keys: Sequence[str]) -> bool:
        """Whether all requests have come to their end, and none is answered."""


class StandardOutput:
    """Answers that go to standard output; nothing is answered already."""

    def __init__(self) -> None:
        self._failed: list[bool] = []

    def done(self, keys: Sequence[str]) -> set[str]:
        return set()

    def append(self, lines: Sequence[Line]) -> None:
        for line in lines:
            print(_text(line), flush=True)
            self._failed.append(line["error"] is not None)

    def finish(self, keys: Sequence[str]) -> None:
        sys.stdout.flush()

    def all_failed(self, keys: Sequence[str]) -> bool:
        return bool(self._failed) and all(self._failed)  # of this process's share


class AnswerFile:
    """Answers in a file, from which an interrupted run resumes.

    Lines are appended whole, under a lock, and have the key of their request. Once all are there, they are put into
    the order of the requests.

    Args:
        path: the file; it and its folder are created if missing.
        overwrite: whether to start anew.
        retry: whether to drop the lines of requests that failed.

    Raises:
        ValueError: the file cannot be written, or holds something else.
    """

    def __init__(self, path: Path, overwrite: bool = False, retry: bool = False):
        self._path = path
        try:
            if path.is_dir():
                raise IsADirectoryError(None, "it is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                self._probe(file)
                lines = [] if overwrite else self._whole_lines(file)
                if retry:
                    lines = [line for line in lines if json.loads(line).get("error") is None]
                self._rewrite(file, lines)
        except OSError as error:
            raise ValueError(f"out must be a file that can be written, got '{path}': {error.strerror}") from error

    def done(self, keys: Sequence[str]) -> set[str]:
        """The keys that are answered already.

        Raises:
            ValueError: the file has answers to other requests, or with other settings.
        """
        with self._locked() as file:
            found = {json.loads(line)["key"] for line in self._whole_lines(file)}
        strangers = len(found - set(keys))
        if strangers:
            raise ValueError(
                f"out must hold answers to these requests with these settings, got '{self._path}', where {strangers} "
                f"of {len(found)} lines answer something else: choose another file, or --overwrite"
            )
        return found

    def append(self, lines: Sequence[Line]) -> None:
        """Append lines at once.

        Raises:
            OSError: they cannot be written.
        """
        data = "".join(_text(line) + "\n" for line in lines).encode()
        with naming(self._path), self._locked() as file:
            end = os.fstat(file).st_size
            try:
                written = 0
                while written < len(data):
                    written += os.write(file, data[written:])
            except OSError:
                os.ftruncate(file, end)  # a disk that is full leaves no half line
                raise

    def finish(self, keys: Sequence[str]) -> None:
        """Put the lines into the order of the requests, if all are there."""
        with naming(self._path), self._locked() as file:
            lines = {json.loads(line)["key"]: line for line in self._whole_lines(file)}
            ordered = [lines[key] for key in keys if key in lines]
            if len(ordered) == len(keys):
                self._rewrite(file, ordered)

    def all_failed(self, keys: Sequence[str]) -> bool:
        """Whether all requests have come to their end, and none is answered."""
        with naming(self._path), self._locked() as file:
            lines = [json.loads(line) for line in self._whole_lines(file)]
        return len(lines) == len(keys) and all(line["error"] is not None for line in lines)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The open file, for this process alone."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self._is_current(file):  # not replaced by another process meanwhile
                    yield file
                    return
            finally:
                os.close(file)

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _probe(self, file: int) -> None:
        """Raise if the disk is full."""
        end = os.fstat(file).st_size
        try:
            os.write(file, b"\n")
        finally:
            os.ftruncate(file, end)

    def _whole_lines(self, file: int) -> list[str]:
        """The lines; what follows the last line break was cut off by an interruption."""
        text = os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")
        *lines, rest = text.split("\n")
        if not (all(map(_is_answer, lines)) and _START.startswith(rest[: len(_START)])):
            rule = "out must be a file of answers, or a new one"
            raise ValueError(f"{rule}, got '{self._path}', which holds something else: --overwrite replaces it")
        return lines

    def _rewrite(self, file: int, lines: Sequence[str]) -> None:
        """Replace the content, completely or not at all."""
        text = "".join(line + "\n" for line in lines)
        if text.encode() == os.pread(file, os.fstat(file).st_size, 0):
            return
        with writing(self._path) as partial:
            partial.write_text(text, encoding="utf-8")


def _is_answer(line: str) -> bool:
    try:
        return line.startswith(_START) and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False)
