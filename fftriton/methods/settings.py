"""Files of settings, as `fftriton calibrate` writes them: a method, its budget, and what they were measured with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import check_budget
from .base import Method
from .text import parse

FORMAT = 1
_FORMAT_KEY = "fftriton_settings"


@dataclass(frozen=True)
class Settings:
    """A method at a budget, with what it was measured with.

    Attributes:
        method: the method as text, see `parse`.
        budget: fraction of the video tokens to keep.
        measured: everything else, for reading: model, sampling, agreement, versions.

    Raises:
        TypeError, ValueError: a budget out of range, or a method that does not exist.
    """

    method: str
    budget: float
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_budget("settings", "budget", self.budget)
        if not isinstance(self.method, str):
            raise TypeError(f"settings: method must be a text, got {self.method!r}")

    def to_json(self) -> str:
        """The text of the file."""
        content = {_FORMAT_KEY: FORMAT, "method": self.method, "budget": self.budget, **self.measured}
        return json.dumps(content, indent=2) + "\n"


def read_settings(path: str | Path) -> Settings:
    """Read a file of settings.

    Raises:
        TypeError, ValueError: the file cannot be read, or is something else.
    """
    rule = f"settings must be a file that 'fftriton calibrate' wrote, got '{path}'"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{rule}: {error.strerror}") from error
    except ValueError as error:  # also what is not text
        raise ValueError(f"{rule}, which is not JSON") from error
    if not isinstance(content, dict) or _FORMAT_KEY not in content:
        raise ValueError(f"{rule}, which lacks '{_FORMAT_KEY}'")
    version = content.pop(_FORMAT_KEY)
    if version != FORMAT:
        raise ValueError(f"{rule} in format {version!r}; this release reads format {FORMAT}")
    missing = [name for name in ("method", "budget") if name not in content]
    if missing:
        raise ValueError(f"{rule}, which lacks '{missing[0]}'")
    return Settings(content.pop("method"), content.pop("budget"), content)


def load_settings(path: str | Path) -> Method:
    """The method of a file of settings that `fftriton calibrate` wrote, for `fftriton.reduce`.

        with fftriton.reduce(model, fftriton.load_settings("calibrated/settings.json")):
            model.generate(**inputs)

    What was measured holds for the model, the sampling of frames and the kind of requests that the file names.

    Raises:
        TypeError, ValueError: the file cannot be read, is something else, or names a method that does not exist.
    """
    settings = read_settings(path)
    return parse(settings.method, settings.budget)
