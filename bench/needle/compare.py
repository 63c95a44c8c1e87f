"""Every method on every split of the needle task: a CSV file, a page with pictures, and the README's table.

    python -m bench.needle.compare                                            # hours on one thread; resumes
    python -m bench.needle.compare --also my_module:MyMethod --out comparison  # beside a method of your own

All methods run at 30 and 10 %, the best six of them and FrameFusion at 50, 30, 20, 10 and 5 %, all on the same samples;
p is that of McNemar's exact test against FrameFusion at the same budget. Operations are the multiply-accumulates of the
decoder and of a relevance predictor or first pass, relative to all tokens. Answers are kept in the folder --records, so
that an interrupted run resumes. Lines of OUT/needle-comparison.csv that a run does not measure stay as they are; they
must be of the same samples, device and releases.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from bench.generated import README, updated
from bench.gpu_plots import table
from bench.needle.pareto import draw
from bench.tables import write_csv
from fftriton.app.bars import Bars, make_progress
from fftriton.evaluate import Plan, Row, evaluate
from fftriton.evaluate.output import describe, results_table
from fftriton.evaluate.plan import keeps_all
from fftriton.methods import split_methods
from fftriton.needle import HARDER_SPLITS, SPLITS
from fftriton.runtime.target import Target

RESULTS = Path(__file__).resolve().parents[1] / "results"
NAME = "needle-comparison"
BEGIN, END = "<!-- made by python -m bench.needle.compare -->", "<!-- end of the comparison -->"

DENSE, REFERENCE = "keep-all", "framefusion"
METHODS = (
    DENSE,
    REFERENCE,
    "framefusion:proportional=True",
    "temporalmerge:budget=0.32+fastv:layer=4",  # the chain for 30 %, with FastV's own one query, and for 10 %
    "temporalmerge:budget=0.13+fastv:layer=4:importance_queries=4",
    "temporalmerge",
    "fastv",
    "streamingllm",
    "kvtp:relevance=attention",
    "kvtp:relevance=attention:pruner=visionzip",
    "evs",
    "vidcom2",
    "dycoke",
    "visionzip",
    "flashvid",
    "fastvid",
    "st-simdiff",
    "st-simdiff:importance_queries=None",
    "anchors",
    "uniformframes",
    "randomtokens",
)
FIRST, THEN, BEST = (0.3, 0.1), (0.5, 0.3, 0.2, 0.1, 0.05), 6


@dataclass(frozen=True)
class Line:
    """A method at a budget on a split; the fields after `split` are those of `fftriton eval`. Without an accuracy, the
    note says why."""

    split: str
    method: str
    budget: float
    budget_achieved: float | None
    samples: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    p_value: float | None
    relative_flops: float | None
    prefill_ms: float | None
    note: str | None
    seed: int
    model: str
    device: str
    threads: int
    torch: str
    transformers: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, str, float]:
        """What tells it from other lines."""
        return self.split, self.method, self.budget


def lines_of(plan: Plan, rows: Iterable[Row]) -> list[Line]:
    """The rows of an evaluation, with where they come from."""
    about: dict[str, Any] = describe(plan)
    names = [field.name for field in fields(Line)]
    return [Line(**{name: getattr(row, name) if hasattr(row, name) else about[name] for name in names}) for row in rows]


def read_lines(path: Path) -> list[Line]:
    """The lines of the CSV file; none if there is no file."""
    if not path.exists():
        return []
    kinds = {"float": float, "int": int, "str": str}
    readers = {field.name: kinds[str(field.type).split(" ")[0]] for field in fields(Line)}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Line(**{name: read(row[name]) if row[name] else None for name, read in readers.items()}) for row in rows]


def run(console: Console, split: str, methods: Sequence[str], budgets: Sequence[float], base: dict) -> list[Line]:
    """Measure methods on one split, or read what an earlier run has measured."""
    records = base["records"] / split
    plan = Plan(
        methods=tuple(methods), budgets=tuple(budgets), split=split, samples=base["samples"], seed=base["seed"],
        target=Target(device=base["device"]), out=records, reference=REFERENCE,
    )  # fmt: skip
    console.rule(f"{split}, at {', '.join(f'{budget:.0%}' for budget in budgets)}")
    with make_progress(console) as progress:
        rows, _ = evaluate(plan, Bars(progress).open)
    console.print(results_table(rows))
    return lines_of(plan, rows)


def check_comparable(path: Path, lines: Iterable[Line], about: dict[str, Any]) -> None:
    """Raise a BadParameter if the file has lines of other samples, another device or other releases."""
    for line in lines:
        for name, value in about.items():
            if line.accuracy is not None and getattr(line, name) != value:
                raise typer.BadParameter(
                    f"out must be a folder without lines that cannot be compared: {path} has some with {name} "
                    f"{getattr(line, name)}, and this run has {value}"
                )


def merged(old: Iterable[Line], new: Iterable[Line]) -> list[Line]:
    """Old lines, replaced and followed by new ones, by split, method and falling budget."""
    lines = {line.key: line for line in (*old, *new)}
    methods = list(dict.fromkeys((*METHODS, *(method for _, method, _ in lines))))
    order = {split: number for number, split in enumerate((*SPLITS, *HARDER_SPLITS))}
    return sorted(lines.values(), key=lambda line: (order[line.split], methods.index(line.method), -line.budget))


def shares(lines: Iterable[Line], budget: float) -> dict[str, dict[str, float]]:
    """For each method with a figure at a budget, and each split, its accuracy as a share of that with all tokens."""
    lines = list(lines)
    dense = {line.split: line.accuracy for line in lines if keeps_all(line.method)}
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        if line.budget == budget and line.accuracy is not None and dense.get(line.split):
            found.setdefault(line.method, {})[line.split] = line.accuracy / dense[line.split]
    return found


def best_methods(lines: Iterable[Line], count: int = BEST) -> list[str]:
    """FrameFusion, and the methods with the highest mean share over all splits and both of the first budgets."""
    lines = list(lines)
    splits, of_budget = {line.split for line in lines}, [shares(lines, budget) for budget in FIRST]
    means = {
        method: fmean(value for found in of_budget for value in found[method].values())
        for method in of_budget[0]
        if all(found.get(method, {}).keys() == splits for found in of_budget) and method != REFERENCE
    }
    return [REFERENCE, *sorted(means, key=lambda method: -means[method])[:count]]


def summary(lines: Sequence[Line]) -> str:
    """Markdown: the share of the dense accuracy that each method leaves at 30 and 10 %, on average and at worst."""
    of_budget = {budget: shares(lines, budget) for budget in FIRST}
    splits = list(dict.fromkeys(line.split for line in lines))

    def cells(method: str) -> list[str]:
        out = []
        for found in of_budget.values():
            own = found.get(method)
            if own is None or len(own) < len(splits):
                out += ["", ""]
                continue
            worst = min(own, key=lambda split: own[split])
            out += [f"{100 * fmean(own.values()):.1f}", f"{100 * own[worst]:.1f} ({worst})"]
        return out

    def rank(method: str) -> float:
        own = of_budget[FIRST[-1]].get(method, {})
        return -fmean(own.values()) if len(own) == len(splits) else 0.0

    methods = sorted(dict.fromkeys(line.method for line in lines if not keeps_all(line.method)), key=rank)
    heading = ["method", *(f"{budget:.0%}: {what}" for budget in FIRST for what in ("mean", "least (split)"))]
    return table(heading, [[f"`{method}`", *cells(method)] for method in methods])


def section(lines: Sequence[Line], split: str) -> str:
    """Markdown: all figures of one split."""
    own = [line for line in lines if line.split == split]
    dense = next((line for line in own if keeps_all(line.method)), None)
    about = "" if dense is None else f", {dense.samples} samples, {cell(dense)} with all tokens"
    by_key = {(line.method, line.budget): line for line in own}
    methods = list(dict.fromkeys(line.method for line in own if not keeps_all(line.method)))
    columns = ("right", "p", "operations", "ms")
    heading = ["method", *(f"{budget:.0%}: {column}" for budget in FIRST for column in columns)]
    first = [
        [f"`{method}`", *(text for budget in FIRST for text in figures(by_key.get((method, budget))))]
        for method in methods
    ]
    best = [method for method in methods if all((method, budget) in by_key for budget in THEN)]
    then = [[f"`{method}`", *(cell(by_key[method, budget]) for budget in THEN)] for method in best]
    curves = table(["method", *(f"{budget:.0%}" for budget in THEN)], then) if then else ""
    return f"## {split}{about}\n\n{table(heading, first)}\n\n{curves}".rstrip()


def figures(line: Line | None) -> list[str]:
    """The cells of a line: accuracy with its interval, p, operations, and milliseconds."""
    if line is None or line.accuracy is None:
        return ["" if line is None else "cannot", "", "", ""]
    p = "" if line.p_value is None else f"{line.p_value:.2g}"
    return [cell(line), p, f"{100 * (line.relative_flops or 0):.1f} %", f"{line.prefill_ms:.1f}"]


def cell(line: Line) -> str:
    """Percent right and its 95 % interval."""
    if line.accuracy is None or line.accuracy_low is None or line.accuracy_high is None:
        return "cannot"
    return f"{100 * line.accuracy:.1f} ({100 * line.accuracy_low:.1f}-{100 * line.accuracy_high:.1f})"


def page(lines: Sequence[Line]) -> str:
    """Markdown: the whole comparison."""
    first = lines[0]
    splits = list(dict.fromkeys(line.split for line in lines))
    commits = ", ".join(dict.fromkeys(line.commit for line in lines))
    about = (
        f"{first.samples} held-out samples a split, seed {first.seed}; {first.device}, {first.threads} thread, torch "
        f"{first.torch}, transformers {first.transformers}, commit {commits}, {max(line.date for line in lines)}. Made "
        f"by `python -m bench.needle.compare --samples {first.samples}`, with {NAME}.csv beside this page; it says "
        "which commit measured which line."
    )
    return "\n\n".join(
        (
            "# All methods on the needle task",
            f"{about}\n\n{EXPLANATION}",
            "## Share of the accuracy with all tokens, percent",
            summary(lines),
            f"![Accuracy over operations on each split]({NAME}.png)",
            *(section(lines, split) for split in splits),
        )
    )


EXPLANATION = """\
"right" is percent of the answers, with the 95 % interval (Wilson); p is McNemar's exact test against FrameFusion at the
same budget on the same samples; operations are multiply-accumulates of the decoder, the channels that carry sizes
included, and of a relevance predictor or first pass, relative to all tokens. What a method computes from the tokens and
scores that it is given (similarities, distances, column sums) is not in them, but in ms, the median time of predictor
and decoder, on a machine that may have had other work to do. A method that cannot reach a budget keeps more, and
StreamingLLM's budget counts text, too; the CSV file has what was achieved. "cannot": the budget is out of the method's
reach in eight layers; the chain of TemporalMerge and FastV has a setting of its own for each budget.

All methods run at their defaults, but where their text says otherwise: FrameFusion prunes by all queries, FastV and
ST-SimDiff by the last one, as their authors do. Anchors was developed on this task, the others were not. The splits,
and the two models that answer them, are described in [bench/needle](../needle/README.md); these models are small,
their answers one word long."""


def main(
    methods: Annotated[str, typer.Option(help="Between commas; the default is all.")] = "",
    also: Annotated[list[str] | None, typer.Option(help="A further method: its text, or module:Class.")] = None,
    splits: Annotated[str, typer.Option(help="Between commas.")] = ",".join((*SPLITS, *HARDER_SPLITS)),
    samples: Annotated[int, typer.Option(help="Of each split.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Which held-out samples.", min=0)] = 40000,
    best: Annotated[bool, typer.Option(help="Also the best six at more budgets.")] = True,
    device: Annotated[str | None, typer.Option(help="Torch device; the default is the GPU, if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the CSV file, the page and its picture.")] = RESULTS,
    records: Annotated[Path, typer.Option(help="Folder of the answers.")] = Path("build") / NAME,
) -> None:
    """Measure, or resume, and write everything anew."""
    chosen_splits = splits.split(",")
    if unknown := [split for split in chosen_splits if split not in (*SPLITS, *HARDER_SPLITS)]:
        raise typer.BadParameter(f"splits must be among {', '.join((*SPLITS, *HARDER_SPLITS))}, got {unknown[0]!r}")
    chosen = list(dict.fromkeys((DENSE, REFERENCE, *(split_methods(methods) if methods else METHODS), *(also or ()))))
    console, path = Console(width=120), out / f"{NAME}.csv"
    about = {"samples": samples, "seed": seed, "device": Target(device=device).describe()["device"]}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    check_comparable(path, read_lines(path), about)
    base = {"samples": samples, "seed": seed, "device": device, "records": records}
    lines = read_lines(path)
    for split in chosen_splits:
        lines = merged(lines, run(console, split, chosen, FIRST, base))
        write_csv(lines, path)
    for split in chosen_splits if best else ():
        lines = merged(lines, run(console, split, [DENSE, *best_methods(lines)], THEN, base))
        write_csv(lines, path)
    lines = read_lines(path)  # as rounded as a reader has them
    draw(lines, out / f"{NAME}.png", best_methods(lines))
    (out / f"{NAME}.md").write_text(page(lines) + "\n", encoding="utf-8")
    if out == RESULTS:
        text = README.read_text(encoding="utf-8")
        README.write_text(updated(text, summary(lines), BEGIN, END), encoding="utf-8")
    console.print(f"Written: {path}, {NAME}.md and {NAME}.png", highlight=False)


if __name__ == "__main__":
    typer.run(main)
