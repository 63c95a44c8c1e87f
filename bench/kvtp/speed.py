"""Time and memory of the pruners beside a copy of the tokens, and how the time grows with the frames.

Growth is told in wall time and in user time: the kernel's page faults for fresh memory, of which a copy takes the most,
grow faster than the frames on some machines, and count only in the former. User time does not depend on other load.

python -m bench.kvtp.speed --csv bench/results/kvtp-speed.csv
"""

from __future__ import annotations

import csv
import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.provenance import provenance
from fftriton import PruMerge, RandomPruner, ToMe, TopKPruner, VideoLayout, frame_budgets
from fftriton.layouts.layout import patch_ids
from fftriton.methods.base import VideoTokens
from fftriton.methods.frames import FrameRows
from fftriton.runtime.measure import memory_before, peak_memory

PRUNERS = {"random": RandomPruner(), "topk": TopKPruner(), "prumerge": PruMerge(), "tome": ToMe()}
CPU = torch.device("cpu")


def tokens_of(frames: int, patches: int, width: int) -> tuple[VideoTokens, FrameRows]:
    """Random fp32 tokens of one video, some of which resemble each other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, frames * patches, width, generator=generator)
    x[0, 1::2] *= 0.7
    x[0, 1::2] += x[0, ::2][: x[0, 1::2].shape[0]] * 0.3
    layout = VideoLayout(torch.arange(frames * patches).view(frames, patches))
    patch = patch_ids([layout], 1, frames * patches, CPU)
    tokens = VideoTokens(x, torch.arange(frames * patches)[None], patch, frames * patches)
    return tokens, FrameRows.of([layout], tokens)


def calls(frames: int, patches: int, width: int, budget: float) -> dict[str, Callable[[], object]]:
    """A copy of the tokens, and each pruner on them."""
    tokens, rows = tokens_of(frames, patches, width)
    scores = torch.randn(frames, generator=torch.Generator().manual_seed(1)) * 3
    counts = frame_budgets(scores, patches, budget)
    total = int(counts.sum())
    pruned = {
        name: lambda pruner=pruner: pruner(tokens, rows, counts, total)  # type: ignore[misc]
        for name, pruner in PRUNERS.items()
    }
    return {"copy": tokens.hidden.clone, **pruned}


def medians(functions: dict[str, Callable[[], object]], turns: int) -> dict[str, tuple[float, float]]:
    """Median wall and user seconds of each, called in turn, so that other load on the machine affects all alike."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(turns):
        for name, function in functions.items():
            start, user = time.perf_counter(), user_seconds()
            function()
            seconds[name].append((time.perf_counter() - start, user_seconds() - user))
    return {name: tuple(map(statistics.median, zip(*own, strict=True))) for name, own in seconds.items()}


def user_seconds() -> float:
    """What this process has used of the CPU, outside the kernel."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def peak(function: Callable[[], object]) -> float:
    """MiB that a call takes above what is in use before, its result included."""
    gc.collect()
    before = memory_before(CPU)
    result = function()
    del result
    return math.nan if before is None else (peak_memory(CPU) - before) / 2**20


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log time over log frames, by least squares."""
    x, y = [math.log(n) for n in lengths], [math.log(s) for s in seconds]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main(
    frames: Annotated[int, typer.Option(min=2)] = 64,
    patches: Annotated[int, typer.Option(min=2)] = 196,
    width: Annotated[int, typer.Option(min=1)] = 3584,
    budget: Annotated[float, typer.Option()] = 0.2,
    turns: Annotated[int, typer.Option(min=1)] = 20,
    longest: Annotated[int, typer.Option(min=256, help="Frames of the longest video.")] = 1024,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    file: Annotated[Path | None, typer.Option("--csv", help="Where to write the rows.")] = None,
) -> None:
    """Measure each pruner and a copy of its input in the same run."""
    torch.set_num_threads(threads)
    functions = calls(frames, patches, width, budget)
    seconds = medians(functions, turns)
    peaks = {name: peak(function) for name, function in functions.items()}
    del functions
    lengths = [length for length in (64, 256, 1024, 4096) if length <= longest]
    growing = [medians(calls(length, patches, width, budget), 2) for length in lengths]
    rows = [
        {
            "name": name, "frames": frames, "patches": patches, "width": width, "budget": budget,
            "ms": f"{seconds[name][0] * 1e3:.4g}", "copies": f"{seconds[name][0] / seconds['copy'][0]:.3g}",
            "peak MiB": f"{peaks[name]:.4g}",
            **{
                f"{kind} exponent to {lengths[-1]}": f"{exponent(lengths, [one[name][clock] for one in growing]):.3g}"
                for clock, kind in enumerate(("wall", "user"))
            },
        }
        for name in seconds
    ]  # fmt: skip
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if file is not None:
        origin = {"threads": threads, "turns": turns, **provenance("cpu")}
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, [*rows[0], *origin], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **origin} for row in rows)


if __name__ == "__main__":
    typer.run(main)
