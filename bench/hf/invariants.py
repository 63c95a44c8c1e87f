"""What the checks of a reduction cost, as a fraction of a prefill and of a decode step.

    python -m bench.hf.invariants

One random Qwen2 is being reduced. A stopwatch around each check adds up the time inside it, and the whole call is timed
as well: a difference between calls with and without checks would be smaller than the noise of the calls. On a GPU the
stopwatch sees what the host spends, which includes every wait for the device.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fftriton
from bench.hf.decode_overhead import RESULTS, WARM_UP, build, prompt, stepper
from bench.provenance import provenance
from bench.tables import write_csv
from fftriton.hf import decoder_hooks
from fftriton.hf import layers as decoder_layers
from fftriton.hf import rows as batch_rows
from fftriton.hf.invariants import Invariants

PATCHES, TEXT = 49, 20
METHODS = {
    "framefusion": fftriton.FrameFusion(0.3, similarity_threshold=0.5),
    "fastv": fftriton.FastV(0.5),
    "keep-all": fftriton.KeepAll(),
}
CHECKS: tuple[tuple[Any, str], ...] = (
    (decoder_hooks, "check_lengths"), (decoder_hooks, "check_growth"), (batch_rows, "check_left"),
    (batch_rows, "versions"), (Invariants, "expect"), (Invariants, "expect_output"), (Invariants, "read"),
    (decoder_layers, "check_no_rows"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Times are medians in milliseconds."""

    case: str
    stage: str
    layers: int
    hidden: int
    tokens: int
    runs: int
    total_p50: float
    checks_p50: float
    checks_percent: float  # of the total
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str


class Stopwatch:
    """Adds up the time inside the outermost of nested calls."""

    def __init__(self) -> None:
        self.milliseconds, self._depth = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the time that it takes added up."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.milliseconds += (time.perf_counter() - start) * 1000

        return timed


@contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    """Put the stopwatch around every check."""
    with ExitStack() as stack:
        for owner, name in CHECKS:
            stack.enter_context(mock.patch.object(owner, name, watch.around(getattr(owner, name))))
        yield


@torch.no_grad()
def measure(
    case: str, layers: int, hidden: int, frames: int, runs: int, device: str, about: dict[str, str]
) -> list[Row]:
    """One method: its prefill, and a decode step after it."""
    model = build(layers, hidden, "sdpa", device)
    video = frames * PATCHES
    embeddings = prompt(hidden, TEXT + video, device, model.dtype)
    layout = [fftriton.VideoLayout(torch.arange(video).view(frames, PATCHES) + TEXT // 2)]
    rows = []
    with fftriton.reduce(model, METHODS[case], lambda _, given: layout if "inputs_embeds" in given else []):

        def prefill() -> float:
            start = time.perf_counter()
            model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1)
            if device == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1000

        step, _ = stepper(model, embeddings, device)
        for stage, call, count in (("prefill", prefill, runs), ("decode step", step, 10 * runs)):
            totals, checks = in_checks(call, count, f"{case}, {stage}")
            total, check = statistics.median(totals), statistics.median(checks)
            rows.append(
                Row(case, stage, layers, hidden, TEXT + video, count, total, check, 100 * check / total, **about)
            )
    return rows


def in_checks(call: Callable[[], float], runs: int, label: str) -> tuple[list[float], list[float]]:
    """Milliseconds of each call, and those of them inside checks."""
    totals, checks = [], []
    for count in track(range(WARM_UP + runs), label, transient=True):
        watch = Stopwatch()
        with watched(watch):
            total = call()
        if count >= WARM_UP:
            totals.append(total)
            checks.append(watch.milliseconds)
    return totals, checks


def table(rows: list[Row]) -> Table:
    """What a reader compares."""
    out = Table("method", "stage", header_style="bold")
    for heading in ("tokens", "total ms", "checks ms", "checks"):
        out.add_column(heading, justify="right")
    for row in rows:
        out.add_row(
            row.case, row.stage, str(row.tokens), f"{row.total_p50:.1f}", f"{row.checks_p50:.3f}",
            f"{row.checks_percent:.2f} %",
        )  # fmt: skip
    return out


def main(
    runs: Annotated[int, typer.Option(min=1, help="Timed prefills; ten times as many decode steps.")] = 10,
    layers: Annotated[int, typer.Option(min=3)] = 28,
    hidden: Annotated[int, typer.Option(min=256, help="A multiple of 256.")] = 512,
    frames: Annotated[int, typer.Option(min=2, help="Of 49 tokens each.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the default is the GPU, if there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Where the CSV file goes.")] = RESULTS,
    commit: Annotated[str | None, typer.Option(help="Name of this commit, if there is no git.")] = None,
) -> None:
    """Time the checks of a reduction."""
    torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    about = provenance(device, commit, also=("transformers",))
    rows = [row for case in METHODS for row in measure(case, layers, hidden, frames, runs, device, about)]
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    write_csv(rows, out / f"invariants-{device}.csv")


if __name__ == "__main__":
    typer.run(main)
