"""What the checks of a reduction cost: a prefill and a decode step with them, against the same without.

    python -m bench.hf.invariants

One random Qwen2 is being reduced; its checks are switched off and on in turn, in an order that changes, so that drift
hits both alike. The same without them, timed twice, says what is noise.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

import fftriton
from bench.hf.decode_overhead import RESULTS, build, in_turn, median_difference, prompt, stepper, write_csv
from bench.provenance import provenance
from fftriton.hf import invariants, prefill, reduction

PATCHES, TEXT = 49, 20
METHODS = {
    "framefusion": fftriton.FrameFusion(0.3, similarity_threshold=0.5),
    "fastv": fftriton.FastV(0.5),
    "keep-all": fftriton.KeepAll(),
}


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Times are milliseconds; `checks` is the median of the paired differences."""

    case: str
    stage: str
    layers: int
    hidden: int
    tokens: int
    runs: int
    without_p50: float
    with_p50: float
    checks: float
    checks_percent: float
    noise_percent: float  # the same for two that have none
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str


def _nothing(*_: Any) -> None:
    """In place of a check."""


@contextmanager
def unchecked() -> Iterator[None]:
    """Without checks; what takes their place is as quick as a function can be, unlike a Mock."""
    first: Callable[[Any], int] = lambda layers: layers[0].get_seq_length() if layers else 0  # noqa: E731
    with (
        mock.patch.object(reduction, "check_lengths", first),
        mock.patch.object(reduction, "check_growth", _nothing),
        mock.patch.object(prefill, "check_left", lambda method, stage, layer, before, after, *_: after),
        mock.patch.object(prefill, "versions", _nothing),
        mock.patch.object(invariants.Invariants, "expect_output", _nothing),
    ):
        yield


@torch.no_grad()
def measure(
    case: str, layers: int, hidden: int, frames: int, runs: int, device: str, about: dict[str, str]
) -> list[Row]:
    """One method: its prefill, and a decode step behind it."""
    model = build(layers, hidden, "sdpa", device)
    video = frames * PATCHES
    embeddings = prompt(hidden, TEXT + video, device, model.dtype)
    layout = [fftriton.VideoLayout(torch.arange(video).view(frames, PATCHES) + TEXT // 2)]
    rows = []
    with fftriton.reduce(model, METHODS[case], lambda _, given: layout if "inputs_embeds" in given else []):

        def run() -> float:
            start = time.perf_counter()
            model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1)
            if device == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1000

        step, _ = stepper(model, embeddings, device)
        for stage, call, count in (("prefill", run, runs), ("decode step", step, 10 * runs)):
            rows.append(compare(case, stage, call, count, layers, hidden, TEXT + video, about))
    return rows


def compare(
    case: str, stage: str, call: Callable[[], float], runs: int, layers: int, hidden: int, tokens: int, about: Any
) -> Row:
    """The call with checks against the call without."""

    def without() -> float:
        with unchecked():
            return call()

    plain, checked, control = in_turn([without, call, without], runs, f"{case}, {stage}")
    middle, checks = statistics.median(plain), median_difference(checked, plain)
    return Row(
        case=case, stage=stage, layers=layers, hidden=hidden, tokens=tokens, runs=runs, without_p50=middle,
        with_p50=statistics.median(checked), checks=checks, checks_percent=100 * checks / middle,
        noise_percent=100 * median_difference(control, plain) / middle, **about,
    )  # fmt: skip


def table(rows: list[Row]) -> Table:
    """What a reader compares."""
    out = Table("method", "stage", header_style="bold")
    for heading in ("tokens", "without ms", "with ms", "checks ms", "checks", "noise"):
        out.add_column(heading, justify="right")
    for row in rows:
        out.add_row(
            row.case, row.stage, str(row.tokens), f"{row.without_p50:.3f}", f"{row.with_p50:.3f}",
            f"{row.checks:+.3f}", f"{row.checks_percent:+.2f} %", f"{row.noise_percent:+.2f} %",
        )  # fmt: skip
    return out


def main(
    runs: Annotated[int, typer.Option(min=1, help="Timed prefills; ten times as many decode steps.")] = 20,
    layers: Annotated[int, typer.Option(min=3)] = 28,
    hidden: Annotated[int, typer.Option(min=256, help="A multiple of 256.")] = 512,
    frames: Annotated[int, typer.Option(min=2, help="Of 49 tokens each.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the default is the GPU where there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Where the CSV file goes.")] = RESULTS,
    commit: Annotated[str | None, typer.Option(help="What to call this commit where there is no git.")] = None,
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
