"""Results: one row per setting, computed from the records."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.files import writing
from .plan import Plan, Setting
from .records import Record
from .statistics import mcnemar_exact, wilson_interval

DEPTHS = 8  # equal stretches of a video


@dataclass(frozen=True)
class Row:
    """The result of one method at one budget.

    Attributes:
        method, budget: the method and the budget asked for.
        budget_achieved: mean over samples of the budget that was achieved.
        samples: number of answers.
        accuracy: fraction of right answers; None if the method cannot work at this budget.
        accuracy_low, accuracy_high: its 95 % interval (Wilson).
        relative_flops: multiply-accumulates of the prefill and of the relevance predictor, relative to the prefill of
            all tokens; mean over samples.
        gigaflops: 10^9 multiply-accumulates of the prefill and of the predictor; mean over samples.
        prefill_ms: median time of the predictor and the decoder for a prompt, in milliseconds.
        peak_mib: peak memory of a prompt above rest; median of the first samples.
        against: the method that `p_value` compares with at the same budget.
        p_value: p-value of McNemar's exact test on the same samples, two-sided.
        by_kind: accuracy for each kind of question.
        vision_tokens: for each layer, the video tokens in its attention, mean over samples.
        relevance_gigaflops: the predictor's part of `gigaflops`; None without a predictor.
        relevance_ms: median time of the predictor; None without one, 0 if it is part of the decoder's.
        note: the reason why there is no accuracy.
    """

    method: str
    budget: float
    budget_achieved: float | None = None
    samples: int = 0
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    relative_flops: float | None = None
    gigaflops: float | None = None
    prefill_ms: float | None = None
    peak_mib: float | None = None
    against: str | None = None
    p_value: float | None = None
    by_kind: dict[str, float] = field(default_factory=dict)
    vision_tokens: list[float] = field(default_factory=list)
    relevance_gigaflops: float | None = None
    relevance_ms: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Cell:
    """Accuracy of a setting on videos of one length whose answer lies in one stretch: a cell of the heat map."""

    method: str
    budget: float
    num_frames: int
    depth_from: float
    depth_to: float
    samples: int
    accuracy: float


def summarise(plan: Plan, records: Mapping[Setting, Sequence[Record]], problems: Mapping[Setting, str]) -> list[Row]:
    """Compute one row for each setting of the plan.

    Args:
        plan: the plan that was evaluated.
        records: records of each setting that can work, for the same samples in the same order.
        problems: for each of the other settings, the reason why it cannot work.
    """
    rows = []
    for setting in plan.settings:
        if setting in problems:
            rows.append(Row(setting.name, setting.budget, note=problems[setting]))
            continue
        other = plan.counterpart(setting)
        rows.append(_row(setting, records[setting], other, records.get(other, ()) if other else ()))
    return rows


def _row(setting: Setting, records: Sequence[Record], other: Setting | None, others: Sequence[Record]) -> Row:
    right = sum(record.right for record in records)
    low, high = wilson_interval(right, len(records))
    peaks = [record.peak_memory for record in records if record.peak_memory is not None]
    scored = any(record.relevance_flops for record in records)
    kinds = dict.fromkeys(record.kind for record in records)
    return Row(
        setting.name,
        setting.budget,
        budget_achieved=statistics.fmean(record.budget_achieved for record in records),
        samples=len(records),
        accuracy=right / len(records),
        accuracy_low=low,
        accuracy_high=high,
        relative_flops=statistics.fmean(record.flops / record.dense_flops for record in records),
        gigaflops=statistics.fmean(record.flops for record in records) / 1e9,
        prefill_ms=statistics.median(record.prefill_seconds + record.relevance_seconds for record in records) * 1e3,
        peak_mib=statistics.median(peaks) / 2**20 if peaks else None,
        against=other.name if other and others else None,
        p_value=_p_value(records, others) if others else None,
        relevance_gigaflops=statistics.fmean(record.relevance_flops for record in records) / 1e9 if scored else None,
        relevance_ms=statistics.median(record.relevance_seconds for record in records) * 1e3 if scored else None,
        by_kind={kind: _accuracy([record for record in records if record.kind == kind]) for kind in kinds},
        vision_tokens=[statistics.fmean(counts) for counts in zip(*(r.vision_tokens for r in records), strict=True)],
    )


def _p_value(first: Sequence[Record], second: Sequence[Record]) -> float:
    pairs = [(a.right, b.right) for a, b in zip(first, second, strict=True)]
    return mcnemar_exact(pairs.count((True, False)), pairs.count((False, True)))


def _accuracy(records: Sequence[Record]) -> float:
    return statistics.fmean(record.right for record in records)


def depth_cells(setting: Setting, records: Sequence[Record]) -> list[Cell]:
    """Accuracy by length of the video and depth of the needle, for questions that have a depth."""
    cells: dict[tuple[int, int], list[Record]] = {}
    for record in records:
        if record.depth is not None:
            stretch = min(int(record.depth * DEPTHS), DEPTHS - 1)
            cells.setdefault((record.num_frames, stretch), []).append(record)
    return [
        Cell(
            setting.name,
            setting.budget,
            frames,
            stretch / DEPTHS,
            (stretch + 1) / DEPTHS,
            len(inside),
            _accuracy(inside),
        )
        for (frames, stretch), inside in sorted(cells.items())
    ]


def write_csv(
    path: Path,
    items: Sequence[Any],
    origin: Mapping[str, Any],
    first_columns: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write one line per item, with its provenance.

    Args:
        path: file to write.
        items: rows, cells, or objects of any other dataclass.
        origin: last columns, the same in every line.
        first_columns: first columns of each item.
    """
    firsts = first_columns or [{}] * len(items)
    lines = [{**first, **_flat(asdict(item)), **origin} for first, item in zip(firsts, items, strict=True)]
    with writing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def as_json(rows: Iterable[Row]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(row) for row in rows], indent=2)


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """One value per column: each kind gets a column, and the tokens of all layers share one."""
    kinds = {f"accuracy {kind}": value for kind, value in fields.pop("by_kind", {}).items()}
    tokens = fields.pop("vision_tokens", None)
    flat = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in {**fields, **kinds}.items()}
    return flat if tokens is None else {**flat, "vision tokens per layer": " ".join(f"{count:.4g}" for count in tokens)}
