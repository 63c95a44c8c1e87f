"""The bench's results as rows of a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CEILINGS = ("copy", "matmul")
NUMBERS = ("p50", "p20", "p80", "gbps_or_tflops", "percent_of_ceiling")


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Times are in milliseconds."""

    op: str
    provider: str
    shape: str
    dtype: str
    metric: str  # GB/s or TFLOP/s: what gbps_or_tflops is
    p50: float
    p20: float
    p80: float
    gbps_or_tflops: float
    percent_of_ceiling: float
    device: str
    torch: str
    triton: str
    commit: str
    date: str
    host_ms: float | None = None  # on a GPU: the host's part of one call
    waits: str = ""  # "yes" if the call waits for the device, so that its times are elapsed time


def results_path(folder: Path, device: str) -> Path:
    """kernels-<device>.csv."""
    return folder / f"kernels-{slug(device)}.csv"


def slug(device: str) -> str:
    """A device's name as files and folders take it."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote."""
    with path.open(newline="") as file:
        rows = [{**row, **{name: float(row[name]) for name in NUMBERS}} for row in csv.DictReader(file)]
    return [Row(**{**row, "host_ms": float(row["host_ms"]) if row.get("host_ms") else None}) for row in rows]


def comparable(ours: Row, providers: Mapping[str, Row]) -> dict[str, Row]:
    """The other providers of a case whose times are of the same kind: of the device alone, or elapsed."""
    return {name: row for name, row in providers.items() if row is not ours and row.waits == ours.waits}


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(op, shape, dtype) -> the row of each provider, without the ceilings."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.op not in CEILINGS:
            cases.setdefault((row.op, row.shape, row.dtype), {})[row.provider] = row
    return cases
