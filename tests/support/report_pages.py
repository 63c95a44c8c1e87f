"""HTML reports of the shipped model and clip, for tests: one with merges and pruning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

import fftriton.app.report
import fftriton.app.run
from fftriton.app.cli import app
from fftriton.app.request import Options
from fftriton.app.run import Result
from fftriton.runtime.shipped import NEEDLE

MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
MERGES_AND_PRUNES = re.search(r"fftriton run --compare --method (\S+)", MAKEFILE)[1]  # what make demo shows


@contextmanager
def quick() -> Iterator[None]:
    """Time each way of running once; never in Triton's interpreter, which fixtures of a module would run in."""
    with mock.patch.object(fftriton.app.run, "_REPEATS", 1), mock.patch("fftriton_kernels._dispatch.INTERPRET", False):
        yield


def write_run_report(out: Path, *arguments: object, question: str = NEEDLE.question) -> tuple[Path, Sequence[Result]]:
    """The page of `fftriton run` on the needle clip, and the results that it shows."""
    seen: list[Sequence[Result]] = []
    write = fftriton.app.report.write_run_page

    def note(path: Path, options: Options, results: Sequence[Result]) -> None:
        seen.append(results)
        write(path, options, results)

    page = out / "report.html"
    with quick(), mock.patch.object(fftriton.app.report, "write_run_page", note):
        given = ["run", "--compare", "--question", question, "--out", out, "--report", page, *arguments]
        done = CliRunner().invoke(app, list(map(str, given)))
    assert done.exit_code == 0, done.output
    return page, seen[0]
