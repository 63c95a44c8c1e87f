"""Time every op against PyTorch, torch.compile and other libraries.

    PYTHONPATH=kernels python -m bench.kernels.run

An op is timed when its tests pass and its result is the baseline's; otherwise it gets no number.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.kernels.gate import passing
from bench.kernels.measure import Bench, Case, cases, free_memory
from bench.kernels.ops import OPS
from bench.kernels.picture import draw
from bench.kernels.results import Row, results_path
from bench.provenance import ROOT, provenance
from bench.tables import write_csv

KERNEL_TESTS = ROOT / "tests" / "kernels"
LOG_WIDTH = 150  # where the table goes to a file
SECONDS = {"cuda": 0.1, "cpu": 1.0}


def green_cases(every: Sequence[Case], device: str) -> tuple[list[Case], list[str]]:
    """The cases whose ops' tests pass, and a line for each op whose tests do not."""
    green = passing({KERNEL_TESTS / file for case in every for file in case.op.tests}, device)
    red = {case.op.name for case in every if not all(KERNEL_TESTS / file in green for file in case.op.tests)}
    kept = [case for case in every if case.op.name not in red]
    return kept, [f"{name}: its tests fail, so it gets no number" for name in sorted(red)]


def measure_all(bench: Bench, every: Sequence[Case], console: Console) -> None:
    """Ceilings, then all cases, with a progress bar."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the authors' code breaks graphs, which is no news
    columns = TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("ceilings", total=sum(len(case.op.providers) for case in every))
        bench.measure_ceilings(dict.fromkeys(case.dtype for case in every))
        op = None
        for case in every:
            if case.op is not op:
                torch._dynamo.reset()  # compile afresh for each op
                op = case.op
            for name in bench.measure(case):
                progress.update(task, description=f"{case.op.name} {case.label} {name}")
                progress.advance(task)
            free_memory()


def table(rows: Sequence[Row]) -> Table:
    """What a reader compares: each case's providers, the first one as the baseline."""
    out = Table("op", "shape", "dtype", "provider", header_style="bold")
    for heading in ("p50 ms", "p20 - p80", "rate", "of ceiling", "times faster"):
        out.add_column(heading, justify="right")
    baseline: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        case = (row.op, row.shape, row.dtype)
        faster = f"{baseline[case].p50 / row.p50:.2f}" if case in baseline and baseline[case].waits == row.waits else ""
        if row.provider == "eager":
            baseline[case] = row
        out.add_row(
            *case, row.provider, f"{row.p50:.4g}", f"{row.p20:.4g} - {row.p80:.4g}",
            f"{row.gbps_or_tflops:.4g} {row.metric}", f"{row.percent_of_ceiling:.0f} %", faster,
        )  # fmt: skip
    return out


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; the default is the GPU, if there is one.")] = "",
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as PyTorch takes.")] = 0,
    seconds: Annotated[float, typer.Option(help="Time for one measurement; 0: 0.1 on a GPU, 1 on a CPU.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the CSV file and the picture go.")] = ROOT / "bench" / "results",
    commit: Annotated[str | None, typer.Option(help="Name of this commit, if there is no git.")] = None,
    gate: Annotated[bool, typer.Option(help="Run the tests of the ops first.")] = True,
) -> None:
    """Time every op of fftriton_kernels, the merge step and the prune step."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    names = [case.name for case in OPS]
    if unknown := sorted(set(op or ()) - set(names)):
        raise typer.BadParameter(f"no op is called {', '.join(unknown)}; there are {', '.join(names)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if threads:
        torch.set_num_threads(threads)
    every, failures = cases(device, op or ()), []
    if gate:
        console.print("Running the tests of the ops ...")
        every, failures = green_cases(every, device)
    bench = Bench(device, seconds or SECONDS[device], provenance(device, commit), failures=failures)
    if every:
        measure_all(bench, every, console)
        path = results_path(out, bench.origin["device"])
        write_csv(bench.rows, path)
        draw(bench.rows, path.with_suffix(".png"))
        console.print(table(bench.rows))
        console.print(f"Wrote {path} and {path.with_suffix('.png').name}")
    for line in [*bench.notes, *bench.failures]:
        console.print(f"No number: {line}", markup=False)
    raise typer.Exit(1 if bench.failures else 0)


if __name__ == "__main__":
    typer.run(main)
