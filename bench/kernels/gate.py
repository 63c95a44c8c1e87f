"""An op is timed only when its tests pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def passing(files: Iterable[Path], device: str) -> set[Path]:
    """Those of the test files that are green: at least one test passed and none failed.

    Args:
        files: each runs in a process of its own.
        device: "cpu" hides GPUs from the tests and runs the files side by side; "cuda" runs one after the other, as
            some tests take most of a GPU's memory.
    """
    environment = dict(os.environ)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""

    def passes(file: Path) -> bool:
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(file)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
        return done.returncode == 0

    files = sorted(set(files))
    with ThreadPoolExecutor(os.cpu_count() if device == "cpu" else 1) as pool:
        return {file for file, green in zip(files, pool.map(passes, files), strict=True) if green}
