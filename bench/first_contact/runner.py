"""Runs parts as processes, each with a limit, and notes how each one ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import findings
from .parts import ROOT, Part

LEAST = 5.0  # seconds: with less left no part is started
GRACE = 4.0  # seconds between the request to stop and the end; pytest and the profiler say what they have


class Runner:
    """One run of bench/gpu.py.

    Args:
        out: where everything goes; findings of an earlier run there are replaced.
        minutes: after so long no part runs any more.
    """

    def __init__(self, out: Path, minutes: float) -> None:
        self.out = out
        self.end = time.time() + 60 * minutes
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()
        out.mkdir(parents=True, exist_ok=True)
        for name in findings.ALL:
            (out / name).unlink(missing_ok=True)

    def run(self, parts: Sequence[Part]) -> None:
        """Run parts side by side, as many at a time as there are cores."""
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(self._run_one, parts))
        except KeyboardInterrupt:
            self._stopped.set()
            for process in list(self._running):
                os.killpg(process.pid, signal.SIGKILL)
            raise

    def _run_one(self, part: Part) -> None:
        limit = min(part.seconds, self.end - time.time())
        if part.missing or limit < LEAST or self._stopped.is_set():
            why = part.missing or "no time was left"
            self._note(part, "skipped" if part.missing else "not run", why=why)
            return
        start = time.time()
        with (self.out / part.log).open("a") as log:
            log.write(f"\n# {part.name}: {' '.join(part.command)}\n")
            log.flush()
            environment = part.environment | {"FIRST_CONTACT_DEADLINE": str(start + limit)}
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            code = self._wait(process, limit)
            self._running.discard(process)
        self._note(part, "ended", code=code, seconds=round(time.time() - start, 1), limit=round(limit))

    def _wait(self, process: subprocess.Popen, limit: float) -> int | None:
        """The exit status, or None for a process that had to be stopped. Its children end with it."""
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return None

    def _note(self, part: Part, kind: str, **values: object) -> None:
        findings.add(
            self.out, part.name, kind, required=part.required, wrong=list(part.wrong or ()), log=part.log, **values
        )
