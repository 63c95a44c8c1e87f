"""The picture of the comparison: accuracy over operations, a panel a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fftriton.evaluate.plan import keeps_all
from fftriton.runtime.figures import save

if TYPE_CHECKING:
    from bench.needle.compare import Line

_COLUMNS = 3
_LEAST = 0.5  # accuracy that is drawn
_MARKERS = "osD^vP*X"
_COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]


def draw(lines: Sequence[Line], path: Path, curves: Sequence[str]) -> None:
    """Draw accuracy over the operations of a prefill.

    Args:
        lines: of all splits.
        path: PNG file to write.
        curves: the methods that get a line and a colour; the others are grey points.
    """
    splits = list(dict.fromkeys(line.split for line in lines))
    rows = -(-len(splits) // _COLUMNS)
    figure = Figure(figsize=(4.2 * _COLUMNS, 3.3 * rows + 0.8), dpi=130, layout="constrained")
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axes, split in zip(panels, splits, strict=False):
        _draw_split(axes, [line for line in lines if line.split == split and line.accuracy is not None], curves)
        axes.set_title(split, fontsize=11)
    for axes in panels[len(splits) :]:
        axes.set_visible(False)
    figure.supxlabel("operations of the prefill, relative to all tokens", fontsize=10)
    figure.supylabel(f"right (methods below {_LEAST:.0%} are in the tables alone)", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def _draw_split(axes: Axes, lines: Sequence[Line], curves: Sequence[str]) -> None:
    for line in lines:
        if keeps_all(line.method) and line.accuracy is not None:
            axes.axhline(line.accuracy, color="black", linestyle=":", linewidth=1.2, label="all tokens")
    others = [line for line in lines if line.method not in curves and not keeps_all(line.method)]
    x, y = [line.relative_flops for line in others], [line.accuracy for line in others]
    axes.scatter(x, y, s=14, color="0.7", label="all other methods", zorder=1)
    for number, method in enumerate(curves):
        own = sorted((line for line in lines if line.method == method), key=lambda line: line.relative_flops or 0)
        axes.plot(
            [line.relative_flops for line in own],
            [line.accuracy for line in own],
            label=method,
            marker=_MARKERS[number % len(_MARKERS)],
            color=_COLOURS[number % len(_COLOURS)],
            markersize=5,
            linewidth=1.4,
            zorder=2,
        )
    axes.set(xscale="log", xticks=[0.02, 0.05, 0.1, 0.2, 0.5], xlim=(0.01, 1.05), ylim=(_LEAST, 1.02))
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
