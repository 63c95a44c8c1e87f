"""Output of an evaluation: a table on the terminal, CSV files, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..runtime.provenance import provenance
from .plan import Plan, Setting
from .plots import draw_depths, draw_layers, draw_pareto
from .records import Record
from .rows import Row, depth_cells, write_csv

RESULTS = "results.csv"


def write_results(plan: Plan, rows: Sequence[Row], records: Mapping[Setting, Sequence[Record]]) -> list[Path]:
    """Write results.csv, depths.csv and the pictures into the plan's folder.

    Returns:
        The paths of the files.
    """
    cells = [cell for setting, own in records.items() for cell in depth_cells(setting, own)]
    names = (RESULTS, "depths.csv", "pareto.png", "depths.png", "layers.png")
    results, depths, pareto, heat_maps, layers = [plan.out / name for name in names]
    origin, title = describe(plan), _title(plan)
    write_csv(results, rows, origin)
    write_csv(depths, cells, origin)
    if not records:
        return [results, depths]
    draw_pareto(pareto, rows, title)
    draw_layers(layers, rows, title)
    if not cells:
        return [results, depths, pareto, layers]
    draw_depths(heat_maps, cells, title)
    return [results, depths, pareto, heat_maps, layers]


def describe(plan: Plan) -> dict[str, Any]:
    """Provenance of the results: samples, model, machine, versions, command."""
    asked = {"task": plan.task, "split": plan.make_task().split, "seed": plan.seed}
    return asked | plan.answering.describe() | provenance()


def print_results(console: Console, rows: Sequence[Row]) -> None:
    """Print the table of results, and below it what does not fit into it."""
    console.print(results_table(rows))
    for row in rows:
        start = f"{row.method} at {row.budget:.0%}: "
        if row.note is not None:
            console.print(start + row.note, markup=False, highlight=False, soft_wrap=True)
        if row.relevance_ms is not None:
            time = f"{row.relevance_ms:.1f} of {row.prefill_ms:.1f} ms and " if row.relevance_ms else ""
            cost = f"relevance takes {time}{row.relevance_gigaflops:.3g} of {row.gigaflops:.3g} GMACs"
            console.print(start + cost, markup=False, highlight=False, soft_wrap=True)


def results_table(rows: Sequence[Row]) -> Table:
    """The table of results: MACs are relative to all tokens, ms is the prefill, MiB the peak memory above rest."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0))
    table.add_column("method", overflow="fold", min_width=13)
    widths = {"budget": 6, "met": 6, "right": 6, "95 %": 10, "p": 5, "MACs": 6, "ms": 5, "MiB": 4}
    for heading, width in widths.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        if row.accuracy is None or row.accuracy_low is None or row.accuracy_high is None:
            table.add_row(escape(row.method), f"{row.budget:.0%}", "", "[dim]none[/dim]")
            continue
        table.add_row(
            escape(row.method), f"{row.budget:.0%}", f"{row.budget_achieved:.1%}", f"{row.accuracy:.1%}",
            f"{100 * row.accuracy_low:.1f}-{100 * row.accuracy_high:.1f}",
            "" if row.p_value is None else f"{row.p_value:.1g}", f"{row.relative_flops:.1%}", f"{row.prefill_ms:.1f}",
            "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
        )  # fmt: skip
    return table


def _title(plan: Plan) -> str:
    split = plan.make_task().split
    return f"{plan.answering.name} on the {plan.task} task, {split} split: {plan.samples} samples, seed {plan.seed}"
