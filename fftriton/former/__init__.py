"""Modules under the names that they had before, for one more release.

This folder is a second place where Python looks for modules of the package `fftriton`: `import fftriton.video` finds
video.py here, which hands out `fftriton.runtime.video` and warns.
"""

from __future__ import annotations

import importlib
import sys
import warnings


def moved(name: str, place: str) -> None:
    """Let the module `place` stand in for the former module `name`."""
    warnings.warn(f"{name} is deprecated: use {place}", DeprecationWarning, stacklevel=3)
    sys.modules[name] = importlib.import_module(place)
