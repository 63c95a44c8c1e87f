"""What the parts found: lines of JSON in one file, on disk as soon as they are known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "findings.jsonl"
KERNELS = "kernels.csv"  # the rows of the kernel bench
PROFILE = "profile.txt"  # the profiler's tables
SUMMARY = "summary.txt"
LOG, GPU_TESTS, KERNEL_TESTS, SANITIZER = "log.txt", "gpu-tests.log", "kernel-tests.log", "sanitizer.log"
ALL = (FILE, KERNELS, PROFILE, SUMMARY, LOG, GPU_TESTS, KERNEL_TESTS, SANITIZER)


def add(out: Path, part: str, kind: str, **values: Any) -> None:
    """Append one finding, and print it for the log. Several processes may append at once."""
    line = json.dumps({"part": part, "kind": kind, **values}, default=str)
    with (out / FILE).open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(line, flush=True)


def read(out: Path) -> list[dict[str, Any]]:
    """All findings so far, in the order they came."""
    path = out / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
