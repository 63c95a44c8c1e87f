"""An op is timed only when its tests pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from bench.provenance import ROOT

MOST_WORKERS = 8


def passing(files: Iterable[Path], device: str) -> set[Path]:
    """Those of the test files that are green: at least one test passed and none failed.

    Args:
        files: each runs in a process of its own.
        device: "cpu" hides GPUs from the tests and runs the files side by side; "cuda" runs one after the other, each
            in several processes if pytest-xdist is installed, without the tests that take most of a GPU's memory.
    """
    environment = dict(os.environ)
    options = ["-q", "--no-header", "-p", "no:cacheprovider"]
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        options += ["-m", "not large", *in_parallel(MOST_WORKERS)]

    def passes(file: Path) -> bool:
        command = [sys.executable, "-m", "pytest", *options, str(file)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
        return done.returncode == 0

    files = sorted(set(files))
    with ThreadPoolExecutor(os.cpu_count() if device == "cpu" else 1) as pool:
        return {file for file, green in zip(files, pool.map(passes, files), strict=True) if green}


def in_parallel(most: int) -> list[str]:
    """pytest's options for up to so many processes; none without pytest-xdist."""
    return ["--numprocesses", str(min(most, os.cpu_count() or 1))] if find_spec("xdist") else []
