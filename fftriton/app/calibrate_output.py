"""The output of a calibration: a table, CSV, a plot, and the file of settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
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
from ..methods.settings import Settings, read_settings
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
    origin = _origin(plan)
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
        with suppress(ValueError, TypeError):  # nothing there, or somebody else's
            read_settings(settings)
            settings.unlink()  # an earlier recommendation holds no longer
        return written
    with writing(settings) as partial:
        partial.write_text(_settings(plan, found).to_json(), encoding="utf-8")
    return [*written, settings]


def describe_calibration(plan: Calibration) -> dict[str, Any]:
    """All that is needed to repeat the calibration."""
    asked = {
        "methods": list(plan.methods),
        "budgets": list(plan.budgets),
        "sampling": asdict(plan.sampling),
        "max_pixels": plan.max_pixels,
    }
    return _origin(plan) | asked


def results_table(results: Results) -> Table:
    """The table, for 80 columns: shares in percent, ms of the prefill without the vision encoder, MiB above rest."""
    labelled = any(row.accuracy is not None for row in results.rows)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0))
    table.add_column("method", overflow="fold", min_width=13)
    widths = {"budget": 6, "same": 5, "95 %": 10, "overlap": 7, "ms": 5, "MiB": 4}
    widths |= {"right": 5, "p": 5} if labelled else {}
    for heading, width in widths.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    table.add_column("", no_wrap=True, min_width=9)
    for row in results.rows:
        table.add_row(*_cells(row, labelled), _verdict(row, results))
    for row in results.controls:
        table.add_row(*_cells(row, labelled), "control", style="dim")
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


def _cells(row: Row, labelled: bool) -> list[str]:
    start = [escape(row.method), f"{row.budget:.4g}"]
    if row.same is None or row.same_low is None or row.same_high is None:
        return [*start, *[""] * (5 + 2 * labelled)]
    judged = [_bare(row.accuracy), "" if row.p_value is None else f"{row.p_value:.1g}"] if labelled else []
    return [
        *start, _bare(row.same), f"{100 * row.same_low:.1f}-{100 * row.same_high:.1f}", _bare(row.overlap),
        f"{row.prefill_ms:.1f}" if row.prefill_ms else "", "" if row.peak_mib is None else f"{row.peak_mib:.3g}",
        *judged,
    ]  # fmt: skip


def _verdict(row: Row, results: Results) -> str:
    if row is results.chosen:
        return "[green]take this[/green]"
    if row.keeps:
        return "keeps"
    return "" if row.note is None else "[dim]stopped[/dim]" if row.stopped else "[dim]fails[/dim]"


def _bare(share: float | None) -> str:
    """A share in percent, without the sign."""
    return percent(share).removesuffix(" %")


def _accuracy(row: Row) -> Accuracy:
    """The row for the plot."""
    return Accuracy(
        row.method, row.budget, accuracy=row.same, accuracy_low=row.same_low, accuracy_high=row.same_high,
        relative_flops=row.relative_flops,
    )  # fmt: skip


def _origin(plan: Calibration) -> dict[str, Any]:
    """Where the figures come from, in each line of results.csv."""
    return {"keep": plan.keep, **plan.target.describe(), **provenance()}


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
    for row in found.results.rows:
        if row.note is not None and not row.stopped:
            yield f"{row.method} at {row.budget:.4g}: {row.note}"
    if any(row.stopped for row in found.results.rows):
        yield f"Stopped: cannot keep {found.results.keep:.4g} any more, or a higher budget of the method cannot."
    yield from found.results.warnings
    if found.failures:
        video, error = found.failures[0]
        yield f"{len(found.failures)} requests failed and do not count; the first is {video}: {error}"
