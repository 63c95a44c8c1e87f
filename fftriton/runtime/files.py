"""Writing files: folders are checked before any work, and a file is written completely or not at all."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROBE_BYTES = 2**20  # about the size of the largest file that a run writes


def check_out(folder: Path) -> None:
    """Check that files can be written to a folder. It need not exist yet; no file is left there.

    Raises:
        ValueError: the folder cannot be created or written, or its disk is full.
    """
    try:
        _probe(folder)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got '{folder}': {error.strerror}") from error


def check_file(name: str, path: Path) -> None:
    """Check that a file can be written. Its folder need not exist yet; nothing is left there.

    Args:
        name: parameter, for the message.
        path: the file.

    Raises:
        ValueError: the path is a folder, or its folder cannot be created or written, or its disk is full.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        _probe(path.parent)
    except OSError as error:
        raise ValueError(f"{name} must be a file that can be written, got '{path}': {error.strerror}") from error


def beside(folder: Path, name: str) -> Path:
    """The file that a list in this folder names: a relative path starts from there, or else from the current folder."""
    path = folder / name
    return path if path.exists() else Path(name)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` on exit and is removed after an exception.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to the message of any OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write '{path}': {error.strerror or error}") from error


def _probe(folder: Path) -> None:
    """Raise an OSError if no file can be written to a folder, or its nearest parent that exists."""
    with tempfile.TemporaryFile(dir=_first_existing(folder)) as file:
        file.write(bytes(_PROBE_BYTES))


def _first_existing(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    for path in (folder, *folder.absolute().parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return path
    raise FileNotFoundError(folder)
