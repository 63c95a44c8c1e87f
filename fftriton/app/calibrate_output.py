"""The output of a calibration: a table, CSV, a plot, and the file of settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..evaluate.calibration import Results, Row, percent
from ..evaluate.plots import draw_pareto
from ..evaluate.rows import Row as Accuracy
from ..evaluate.rows import write_csv
from ..methods.settings import Settings
from ..runtime.files import writing
from ..runtime.provenance import provenance
from .calibrate import Calibration, Found

SETTINGS = "settings.json"


def write_results(plan: Calibration, found: Found) -> list[Path]:
    """Write results.csv and pareto.png, and settings.json if a setting is recommended.

    A settings.json of an earlier run is removed if none is.

    Returns:
        The paths of the files.
    """
    results = found.results
    table, pareto, settings = (plan.out / name for name in ("results.csv", "pareto.png", SETTINGS))
    origin = {"keep": plan.keep, **plan.target.describe(), **provenance()}
    firsts = [{"recommended": row is results.chosen} for row in results.rows] + [{}] * len(results.controls)
    kinds = ["setting"] * len(results.rows) + ["control"] * len(results.controls)
    first_columns = [{"kind": kind, **first} for kind, first in zip(kinds, firsts, strict=True)]
    write_csv(table, [*results.rows, *results.controls], origin, first_columns)
    written = [table]
    if any(row.same is not None for row in results.rows):
        title = f"{plan.target.name}: {results.requests} requests about {results.videos} videos"
        draw_pareto(pareto, [_accuracy(row) for row in results.rows], title, "answers that stay the same", plan.keep)
        written.append(pareto)
    if results.chosen is None:
        settings.unlink(missing_ok=True)  # an earlier recommendation holds no longer
        return written
    with writing(settings) as partial:
        partial.write_text(_settings(plan, found).to_json(), encoding="utf-8")
    return [*written, settings]


def results_table(results: Results) -> Table:
    """The table: MACs are relative to all tokens, ms is the prefill without the vision encoder."""
    labelled = any(row.accuracy is not None for row in results.rows)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("method", overflow="fold", min_width=11)
    right = ["right", "p"] if labelled else []
    for heading in ("budget", "asked", "same answer", "overlap", "est. loss", *right, "MACs", "ms", "MiB", ""):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=bool(heading))
    for row in results.rows:
        table.add_row(*_cells(row, results, labelled))
    for row in results.controls:
        cells = _cells(row, results, labelled)
        table.add_row(*cells[:-1], "control: sees next to nothing", style="dim")
    return table


def as_json(found: Found) -> str:
    """Everything that was found, for programs."""
    results = found.results
    content = {
        "advice": results.advice,
        "recommended": None if results.chosen is None else asdict(results.chosen),
        "keep": results.keep,
        "requests": results.requests,
        "videos": results.videos,
        "warnings": results.warnings,
        "settings": [asdict(row) for row in results.rows],
        "controls": [asdict(row) for row in results.controls],
        "failures": [{"video": video, "error": error} for video, error in found.failures],
    }
    return json.dumps(content, indent=2)


def _cells(row: Row, results: Results, labelled: bool) -> list[str]:
    start = [escape(row.method), f"{row.budget:.4g}", str(row.requests)]
    if row.same is None or row.same_low is None or row.same_high is None:
        return [*start, *[""] * (6 + 2 * labelled), f"[dim]{escape(row.note or '')}[/dim]"]
    interval = f"{percent(row.same)} ({100 * row.same_low:.1f}-{100 * row.same_high:.1f})"
    judged = [percent(row.accuracy), "" if row.p_value is None else f"{row.p_value:.1g}"] if labelled else []
    verdict = "[green]keeps, recommended[/green]" if row is results.chosen else "keeps" if row.keeps else ""
    milliseconds = f"{row.prefill_ms:.1f}" if row.prefill_ms else ""
    return [
        *start, interval, percent(row.overlap), f"{100 * (row.loss or 0):.1f} %", *judged,
        "" if row.relative_flops is None else f"{row.relative_flops:.1%}",
        milliseconds, "" if row.peak_mib is None else f"{row.peak_mib:.1f}", verdict,
    ]  # fmt: skip


def _accuracy(row: Row) -> Accuracy:
    """The row for the plot."""
    return Accuracy(
        row.method, row.budget, accuracy=row.same, accuracy_low=row.same_low, accuracy_high=row.same_high,
        relative_flops=row.relative_flops,
    )  # fmt: skip


def _settings(plan: Calibration, found: Found) -> Settings:
    row, results = found.results.chosen, found.results
    assert row is not None
    questions = sorted(f"{request.name} {request.question}" for request, _ in plan.labelled())
    measured: dict[str, Any] = {
        "keep": plan.keep,
        "requests": results.requests,
        "videos": results.videos,
        "warnings": results.warnings,
        **{name: value for name, value in asdict(row).items() if name not in ("method", "budget", "note", "requests")},
        "controls": {control.method: control.overlap for control in results.controls},
        "model": plan.target.name,
        "sampling": asdict(plan.sampling),
        "max_pixels": plan.max_pixels,
        "answers": found.origin,
        "digest_of_requests": hashlib.sha256("\n".join(questions).encode()).hexdigest(),
        **provenance(),
    }
    return Settings(row.method, row.budget, measured | {"fftriton": __version__})


def notes(found: Found) -> Iterator[str]:
    """What a reader must know besides the table."""
    yield from found.results.warnings
    if found.failures:
        video, error = found.failures[0]
        yield f"{len(found.failures)} requests failed and do not count; the first is {video}: {error}"
