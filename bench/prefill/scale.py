"""How the cost of a prefill grows with the video: exponents fitted to what `python -m bench.prefill` measured.

python -m bench.prefill --shape 0.5B --layers 4 --frames 2,4,8,16,32 --out results.csv
python -m bench.prefill.scale results.csv
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

LEAST = 3  # lengths that a fit needs
KEY = ("device", "shape", "layers", "dtype", "attention", "batch", "method", "budget")


@dataclass(frozen=True)
class Fit:
    """Time grows as tokens ** exponent.

    Attributes:
        key: the values of KEY.
        tokens: the fewest and the most.
        exponent: least squares in the logarithms.
        last: the exponent between the two longest videos alone, where attention weighs most.
    """

    key: tuple[str, ...]
    tokens: tuple[int, int]
    exponent: float
    last: float


def fits(rows: list[dict[str, str]]) -> list[Fit]:
    """One for each setting that was measured at three lengths or more; cells that did not run are left out."""
    series: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["prefill_ms"]:
            points, tokens = series[tuple(row[column] for column in KEY)], int(row["tokens"])
            points[tokens] = min(float(row["prefill_ms"]), points.get(tokens, math.inf))
    found = []
    for key, points in series.items():
        if len(points) < LEAST:
            continue
        tokens, times = np.array(sorted(points.items())).T
        exponent = float(np.polyfit(np.log(tokens), np.log(times), 1)[0])
        last = float(np.diff(np.log(times[-2:]))[0] / np.diff(np.log(tokens[-2:]))[0])
        found.append(Fit(key, (int(tokens[0]), int(tokens[-1])), exponent, last))
    return found


def main(results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="CSV of bench.prefill.")]) -> None:
    """Print the exponents."""
    with results.open(newline="") as file:
        found = fits(list(csv.DictReader(file)))
    if not found:
        raise typer.BadParameter(f"{results.name} must have a setting with at least {LEAST} lengths, and has none")
    out = Table(*KEY[1:], "tokens", "exponent", "of the last two", header_style="bold")
    for fit in found:
        out.add_row(*fit.key[1:], "{} to {}".format(*fit.tokens), f"{fit.exponent:.2f}", f"{fit.last:.2f}")
    Console(width=140).print(out)


if __name__ == "__main__":
    typer.run(main)
