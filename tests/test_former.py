"""Modules under their former names: the same modules, with a DeprecationWarning."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fftriton
from fftriton import former

NAMES = sorted(path.stem for path in Path(former.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_a_former_module_is_the_present_one(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"fftriton.{name}", raising=False)
    monkeypatch.delattr(fftriton, name, raising=False)
    with pytest.warns(
        DeprecationWarning, match=rf"fftriton\.{name} is deprecated: use fftriton\.\w+\.{name}"
    ) as caught:
        module = importlib.import_module(f"fftriton.{name}")
    assert module.__name__.startswith(("fftriton.app.", "fftriton.runtime.", "fftriton.layouts."))
    assert module is sys.modules[module.__name__]
    assert len(caught) == 1


def test_the_former_command_line_runs():
    done = subprocess.run([sys.executable, "-m", "fftriton.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage" in done.stdout
