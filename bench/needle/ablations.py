"""The ablations of the FrameFusion paper (arXiv:2501.01986) on the needle task, with the shipped model.

    python -m bench.needle.ablations --out bench/results/needle-ablations.csv

| table | what differs |
|---|---|
| 2 | the first layer whose attention sees fewer tokens |
| 3 | merging, pruning, both, and pruning first |
| 4 | merging at one layer after the other, or at one only |
| 7 | the number of frames |
| importance | attention of all queries, of the last four, or of the last one |

Every line is a setting of `fftriton eval`, on the same samples as the others of its table, with a 95 % interval and the
p-value of McNemar's exact test against the first line of its table (table 7: none). Answers are kept in a folder beside
the CSV file, so that an interrupted run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fftriton.app.bars import Bars, make_progress
from fftriton.evaluate import Plan, Row, evaluate
from fftriton.evaluate.output import describe, results_table
from fftriton.evaluate.rows import write_csv
from fftriton.runtime.target import Target

RESULTS = Path(__file__).resolve().parents[1] / "results"
ORIGINAL = "framefusion"
FRAMES = (8, 16, 32, 64)

VARIANTS = {
    "2": [ORIGINAL, *(f"{ORIGINAL}:start_layer={layer}" for layer in (1, 2, 3))],
    "3": [ORIGINAL, *(f"{ORIGINAL}:stages=({stages})" for stages in ("merge", "prune", "prune,merge"))],
    "4": [ORIGINAL, f"{ORIGINAL}:cascaded=False"],
    "importance": [ORIGINAL, f"{ORIGINAL}:importance_queries=4", f"{ORIGINAL}:importance_queries=1"],
}
TABLES = ("2", "3", "4", "7", "importance")


@dataclass(frozen=True)
class Line:
    """One line of a table: the parameters that all its methods share, then a row of `fftriton eval`."""

    table: str
    split: str
    num_frames: str
    similarity_threshold: float
    row: Row

    def columns(self) -> dict[str, Any]:
        """What tells its line from those of the other tables."""
        return {name: getattr(self, name) for name in ("table", "split", "num_frames", "similarity_threshold")}


def plans(table: str, base: Plan, threshold: float) -> Iterator[Plan]:
    """The evaluations of one table."""
    suffix = f":similarity_threshold={threshold}"
    first = ORIGINAL + suffix
    if table == "7":
        for frames in FRAMES:
            yield replace(base, methods=(first, "keep-all"), num_frames=(frames,), reference=first)
        return
    yield replace(base, methods=tuple(variant + suffix for variant in VARIANTS[table]), reference=first)


def main(
    tables: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(TABLES),
    splits: Annotated[str, typer.Option(help="Separated by commas.")] = "easy,hard",
    budgets: Annotated[str, typer.Option(help="Separated by commas.")] = "0.5,0.3",
    thresholds: Annotated[str, typer.Option(help="Similarity thresholds, separated by commas.")] = "0.6,0.9",
    samples: Annotated[int, typer.Option(help="For each line.")] = 500,
    seed: Annotated[int, typer.Option(help="Picks the samples.")] = 0,
    model: Annotated[str | None, typer.Option(help="Checkpoint; else the one that ships.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; the default is the GPU, if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="CSV file.")] = RESULTS / "needle-ablations.csv",
) -> None:
    """Run the ablations and write one CSV file."""
    console, lines = Console(width=120), []
    unknown = set(tables.split(",")) - set(TABLES)
    if unknown:
        raise typer.BadParameter(f"tables must be among {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    for table in tables.split(","):
        for split in splits.split(","):
            base = Plan(
                budgets=tuple(map(float, budgets.split(","))), split=split, samples=samples, seed=seed,
                target=Target(model, device), out=out.with_suffix(""),
            )  # fmt: skip
            for threshold in map(float, thresholds.split(",")):
                for plan in plans(table, base, threshold):
                    lines += run(console, table, plan, threshold)
                    origin = {"samples of the task": samples, **describe(plan)}
                    write_csv(out, [line.row for line in lines], origin, [line.columns() for line in lines])
    console.print(f"Written: {out}", highlight=False)


def run(console: Console, table: str, plan: Plan, threshold: float) -> list[Line]:
    """One evaluation, shown on the terminal."""
    frames = " ".join(map(str, plan.num_frames)) or "the split's own"
    console.rule(f"table {table}: {plan.split} split, frames: {frames}, similarity threshold {threshold}")
    with make_progress(console) as progress:
        rows, _ = evaluate(plan, Bars(progress).open)
    console.print(results_table(rows))
    return [Line(table, plan.split, frames, threshold, row) for row in rows]


if __name__ == "__main__":
    typer.run(main)
