"""The pages of the commands `run`, `calibrate` and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from ...runtime.answers import is_right
from ...runtime.files import writing
from ..calibrate import Calibration, Found
from ..calibrate_output import describe_calibration, notes, results_table
from ..display import describe_run, mebibytes, milliseconds, result_table
from ..display import notes as notes_of_run
from ..inspect import Inspection, layers_table
from ..inspect_pictures import DESCRIPTIONS
from ..request import Options
from ..run import Result
from .charts import read_picture, tokens_chart
from .strip import make_strip, states_at_threshold, states_of


@dataclass(frozen=True)
class Bar:
    """One bar of a group: its name, its length from 0 to 1, and the value in words."""

    name: str
    length: float
    value: str


def write_run_page(path: Path, options: Options, results: Sequence[Result]) -> None:
    """Write the page of `fftriton run`: what was answered, what became of each patch, and what it cost."""
    _write(
        path, "run.html", "What the model saw", describe_run(options), clips=[_clip(options, one) for one in results]
    )  # fmt: skip


def write_calibration_page(path: Path, plan: Calibration, found: Found, files: Sequence[Path]) -> None:
    """Write the page of `fftriton calibrate`: which setting keeps the answers, and how all compare.

    The frames are those of `found.example`.

    Args:
        path: the page.
        plan: what was calibrated.
        found: the results.
        files: what `write_results` has written, which may hold the plot.
    """
    plots = [
        read_picture(file, "Share of answers that stay the same against the cost of the prefill, a line per method")
        for file in files
        if file.name == "pareto.png"
    ]
    requests = [request for request, _ in plan.labelled()]
    example = found.example
    strip = None if example is None else make_strip(example.job, states_of(example.report))
    _write(
        path, "calibrate.html", "A setting that keeps the answers", describe_calibration(plan),
        found=found, notes=list(notes(found)), table=_plain(results_table(found.results)), plots=plots,
        strip_of_example=strip, requests=[(request.name, request.question) for request in requests],
    )  # fmt: skip


def write_inspection_page(path: Path, options: Options, inspection: Inspection, files: Sequence[Path]) -> None:
    """Write the page of `fftriton inspect`: where the video is redundant to the model.

    Args:
        path: the page.
        options: the options of the run.
        inspection: what was found.
        files: what `write_inspection` has written, which includes the pictures.
    """
    pictures = [read_picture(file, DESCRIPTIONS[file.stem]) for file in files if file.suffix == ".png"]
    strip = make_strip(inspection.job, states_at_threshold(inspection.observed, inspection.threshold))
    _write(
        path, "inspect.html", "Where the video is redundant", describe_run(options),
        inspection=inspection, strip_of_clip=strip, pictures=pictures, table=_plain(layers_table(inspection)),
    )  # fmt: skip


def _clip(options: Options, result: Result) -> dict[str, Any]:
    job, report = result.job, result.reduced.report
    ways = [way for way in (result.dense, result.reduced) if way is not None]
    expected = job.clip.answer
    return {
        "result": result,
        "answers": [
            (way.name, way.answer, None if expected is None else is_right(way.answer, expected)) for way in ways
        ],
        "table": _plain(result_table(result)),
        "notes": list(notes_of_run(options, result)),
        "strip": make_strip(job, states_of(report)),
        "chart": tokens_chart(report, result.reduced.name, job.name),
        "bars": {
            "Time to the first token": _bars([(way.name, way.first_token) for way in ways], milliseconds),
            "Time per later token": _bars([(way.name, way.cost.decode) for way in ways], milliseconds),
            "Peak memory above rest": _bars(
                [(way.name, way.cost.peak_memory) for way in ways if way.cost.peak_memory is not None], mebibytes
            ),
        },
    }


def _bars(values: Sequence[tuple[str, Any]], in_words: Any) -> list[Bar]:
    longest = max((value for _, value in values), default=0)
    return [Bar(name, value / longest if longest > 0 else 0.0, in_words(value)) for name, value in values]


def _plain(table: Table) -> dict[str, Any]:
    """The cells of a table for the terminal, without its styles."""
    columns = [[_text(cell) for cell in column.cells] for column in table.columns]
    return {
        "headings": [_text(column.header) for column in table.columns],
        "rows": list(zip(*columns, strict=True)),
        "numeric": [column.justify == "right" for column in table.columns],
    }


def _text(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def _in_words(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was set, without what was left open and without the command, which stands above."""
    said = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}: {item}" for key, item in value.items() if item is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, "") and name != "command":
            said.append((name.replace("_", " "), str(value)))
    return said


def _write(path: Path, template: str, title: str, settings: Mapping[str, Any], **content: Any) -> None:
    environment = Environment(
        loader=PackageLoader("fftriton.app.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(template).render(
        title=title, version=settings["fftriton"], command=settings["command"], settings=_in_words(settings), **content
    )  # fmt: skip
    with writing(path) as partial:
        partial.write_text(page, encoding="utf-8")
