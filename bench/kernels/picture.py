"""The bench's picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib

from bench.kernels.results import CEILINGS, Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"eager": "#9aa5b1", "torch.compile": "#e0a458", "fftriton": "#2a6f97"}
OTHER = "#7f5a83"
COLUMNS = 3  # panels side by side


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel an op: for each shape, each provider's share of the ceiling."""
    ops = list(dict.fromkeys(row.op for row in rows if row.op not in CEILINGS))
    if not ops:
        return
    lines = math.ceil(len(ops) / COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(15, 3.6 * lines), squeeze=False, layout="constrained")
    for axis, op in zip(axes.flat, ops, strict=False):
        _draw_op(axis, op, [row for row in rows if row.op == op])
    for axis in axes.flat[len(ops) :]:
        axis.set_axis_off()
    colours = {row.provider: COLOURS.get(row.provider, OTHER) for row in rows if row.op not in CEILINGS}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    names = [_in_words(provider, rows[0].device) for provider in colours]
    figure.legend(handles, names, loc="outside upper center", ncols=len(colours), frameon=False)
    figure.supxlabel(fill(_caption(rows), 130), fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _in_words(provider: str, device: str) -> str:
    """The name of a provider; on a processor ours is no kernel."""
    return "fftriton, its CPU code" if provider == "fftriton" and "thread" in device else provider


def _draw_op(axis: plt.Axes, op: str, rows: Sequence[Row]) -> None:
    providers = list(dict.fromkeys(row.provider for row in rows))
    cases = list(dict.fromkeys((row.shape, row.dtype) for row in rows))
    width = 0.8 / len(providers)
    for row in rows:
        x = cases.index((row.shape, row.dtype)) + (providers.index(row.provider) - (len(providers) - 1) / 2) * width
        axis.bar(x, row.percent_of_ceiling, width, color=COLOURS.get(row.provider, OTHER))
        label = f" {row.p50:.0f}" if row.p50 >= 100 else f" {row.p50:.3g}"
        label += " w" if row.waits else ""
        axis.text(x, row.percent_of_ceiling, label, ha="center", va="bottom", fontsize=9, rotation=90)
    one_dtype = len({dtype for _, dtype in cases}) == 1
    labels = [shape if one_dtype else f"{shape} {dtype}" for shape, dtype in cases]
    axis.set_xticks(range(len(cases)), labels, fontsize=9)
    if len(cases) > 1:
        plt.setp(axis.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
    axis.set_xlim(-1, max(len(cases), 2))
    axis.set_title(op, fontsize=12)
    axis.set_ylabel("% of matmul rate" if rows[0].metric == "TFLOP/s" else "% of copy rate", fontsize=10)
    axis.tick_params(axis="y", labelsize=9)
    axis.margins(y=0.4)
    axis.spines[["top", "right"]].set_visible(False)


def _caption(rows: Sequence[Row]) -> str:
    ceilings = ", ".join(f"{r.op} {r.dtype} {r.gbps_or_tflops:.4g} {r.metric}" for r in rows if r.op in CEILINGS)
    first = rows[0]
    return (
        f"{first.device}; torch {first.torch}, triton {first.triton}; commit {first.commit}, {first.date}. "
        f"Ceilings: {ceilings}. Numbers at the bars: median ms."
        + (" w: the call waits for the device, so the host's time is part of it." if any(r.waits for r in rows) else "")
    )
