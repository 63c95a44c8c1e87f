"""One part in a process of its own: python -m bench.first_contact.worker MODULE --out DIR ..."""

from __future__ import annotations

import argparse
import importlib
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import findings

Case = TypeVar("Case")
LOST = ("CUDA error", "illegal memory", "HIP error")  # after these nothing runs any more in a process


@dataclass(frozen=True)
class Run:
    """What a part is told, and how it says what it found.

    Args:
        part: its name in the findings.
        out: the folder for results.
        deadline: time.time() at which it will be stopped.
        toy: tiny sizes on a CPU.
        warm: only compile, into the caches on disk: nothing is said but errors.
        share: (i, n) for the i-th of n processes that share the cases, because compiling takes most of the time.
        commit: what to call this commit if there is no git.
    """

    part: str
    out: Path
    deadline: float = float("inf")
    toy: bool = False
    warm: bool = False
    share: tuple[int, int] = (0, 1)
    commit: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"

    @property
    def is_last(self) -> bool:
        """Whether this process has the last share."""
        return self.share[0] == self.share[1] - 1

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.deadline - time.time()

    def cases(self, every: Iterable[Case], seconds: float) -> Iterator[Case]:
        """This process's share of the cases, while there are so many seconds left for one."""
        index, count = self.share
        left_out = 0
        for number, case in enumerate(every):
            if number % count != index:
                continue
            if self.left() < seconds:
                left_out += 1
                continue
            yield case
        if left_out:
            self.note("not run", case=f"{left_out} cases", why="no time was left")

    def note(self, kind: str, **values: Any) -> None:
        """Add a finding."""
        if not self.warm or kind == "error":
            findings.add(self.out, self.part, kind, **values)

    @contextmanager
    def check(self, case: str) -> Iterator[None]:
        """What happens in the block is a finding and not the end of the part.

        ok, wrong for an AssertionError, error for other exceptions. Ends the process if the device is lost.
        """
        try:
            yield
        except AssertionError as error:
            self.note("wrong", case=case, why=f"{error}"[:600], where=traceback.format_exc(limit=-3)[-900:])
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.note("error", case=case, why=text[:600], where=traceback.format_exc(limit=-3)[-900:])
            if any(sign in text for sign in LOST):
                raise SystemExit(3) from error
        else:
            self.note("ok", case=case)


def main() -> None:
    """Run the module that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    index, count = map(int, given.share.split("/"))
    deadline = float(os.environ.get("FIRST_CONTACT_DEADLINE", "inf"))
    run = Run(given.name, given.out, deadline, given.toy, given.warm, (index, count), given.commit)
    if os.environ.get("TRITON_INTERPRET") == "1" and given.module != "versions":
        from triton_interpreter import trouble

        if reason := trouble():
            return run.note("skipped", why=reason)
    importlib.import_module(f"bench.first_contact.{given.module}").main(run)
    return None


if __name__ == "__main__":
    main()
