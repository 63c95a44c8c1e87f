"""A merge step on a CPU beside other busy processes, ours and the authors' in turns.

    python -m bench.kernels.busy --neighbours 0,1,2

A step of many small parallel regions waits in each for its slowest thread, and the slowest one is late wherever another
process has the core. So a step that is fast alone can be slow on a shared machine.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.kernels import baselines, ops
from bench.provenance import provenance

RESULTS = Path(__file__).parents[1] / "results" / "busy.csv"
FRAMES, PATCHES = 16, 210


def keep_busy(started: Any) -> None:
    """A neighbour: one thread that multiplies matrices until it is ended."""
    torch.set_num_threads(1)
    matrix = torch.ones(512, 512)
    started.set()
    while True:
        matrix @ matrix


@contextmanager
def beside(neighbours: int) -> Iterator[None]:
    """So many other busy processes."""
    context = multiprocessing.get_context("spawn")
    started = [context.Event() for _ in range(neighbours)]
    processes = [context.Process(target=keep_busy, args=(event,), daemon=True) for event in started]
    for process in processes:
        process.start()
    for event in started:
        event.wait()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


@torch.no_grad()
def measure(dtype: torch.dtype, width: int, pairs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of our step and of the authors', in turns."""
    shape = ops.Shape(FRAMES, width, P=PATCHES)
    steps = ops.our_merge_step, baselines.merge_step
    own = [ops.merge_step_inputs(shape, dtype, "cpu") for _ in steps]  # the authors' step writes to them
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(pairs + 2):
        for step, inputs, times in zip(steps, own, taken, strict=True):
            begin = time.perf_counter()
            step(**inputs)
            if turn >= 2:  # the first ones warm up
                times.append(1e3 * (time.perf_counter() - begin))
    return taken


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", default="0,1,2", help="numbers of other busy processes, between commas")
    parser.add_argument("--widths", default="896,3584", help="of a token, between commas")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for neighbours in map(int, options.neighbours.split(",")):
        with beside(neighbours):
            for width in map(int, options.widths.split(",")):
                for dtype in (torch.bfloat16, torch.float32):
                    ours, authors = measure(dtype, width, options.pairs)
                    row = {
                        "neighbours": neighbours, "threads": options.threads, "tokens": FRAMES * PATCHES,
                        "width": width, "dtype": str(dtype).removeprefix("torch."),
                        "ms": f"{statistics.median(ours):.1f}", "authors_ms": f"{statistics.median(authors):.1f}",
                        "slowest_ms": f"{max(ours):.1f}", "authors_slowest_ms": f"{max(authors):.1f}",
                    }  # fmt: skip
                    print(row, flush=True)
                    rows.append(row | provenance("cpu"))
    with options.out.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
