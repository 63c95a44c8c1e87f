"""Plots of results: accuracy over cost, accuracy by depth and length, tokens in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..runtime.figures import save
from .rows import DEPTHS, Cell, Row

_COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
_MARKERS = "osD^vP*X"
_APART = 0.008  # of the dense cost, between points that would cover each other
_ABOVE = 0.012  # of the most tokens, between lines that would


def draw_pareto(
    path: Path, rows: Sequence[Row], title: str, ylabel: str = "accuracy", keep: float | None = None
) -> None:
    """Plot accuracy over multiply-accumulates of the prefill, one line per method, as in figure 7 of FrameFusion.

    Points of equal cost are drawn side by side.

    Args:
        path: PNG file to write.
        rows: results; rows without an accuracy are left out.
        title: title of the plot.
        ylabel: what the accuracy of the rows is called.
        keep: where to draw a line.
    """
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    axes, places = figure.add_subplot(), _side_by_side(rows)
    for number, (method, own) in enumerate(_by_method(rows).items()):
        own = sorted(own, key=lambda row: row.relative_flops or 0)
        x, y = [places[id(row)] for row in own], [row.accuracy or 0.0 for row in own]
        below, above = ([abs(getattr(row, name) - row.accuracy) for row in own] for name in _INTERVAL)
        marker, colour = _MARKERS[number % len(_MARKERS)], _COLOURS[number % len(_COLOURS)]
        axes.errorbar(x, y, [below, above], label=method, marker=marker, color=colour, capsize=3, linewidth=1.5)
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="prefill MACs, relative to all tokens", ylabel=f"{ylabel}, 95 % interval", xlim=(0, 1.05))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    if keep is not None:
        axes.axhline(keep, color="black", linestyle="--", linewidth=1, label=f"{keep:.4g}")
    _tidy(axes)
    axes.legend(frameon=False, loc="best")
    save(figure, path)


def draw_depths(path: Path, cells: Sequence[Cell], title: str) -> None:
    """Plot accuracy by depth of the needle and length of the video: a heat map per method and budget, as in figure 12.

    Args:
        path: PNG file to write.
        cells: cells of all settings.
        title: title of the picture.
    """
    settings = list(dict.fromkeys((cell.method, cell.budget) for cell in cells))
    methods = list(dict.fromkeys(method for method, _ in settings))
    columns = max(sum(method == own for own, _ in settings) for method in methods)
    lengths = sorted({cell.num_frames for cell in cells})
    height = 0.75 + 0.28 * len(lengths)
    figure = Figure(figsize=(max(7, 1.5 + 2.4 * columns), 1.2 + height * len(methods)), dpi=150, layout="constrained")
    panels = figure.subplots(len(methods), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    for method, line in zip(methods, panels, strict=True):
        budgets = [budget for own, budget in settings if own == method]
        for budget, axes in zip(budgets, line, strict=False):
            axes.set_visible(True)
            grid = _grid(cells, method, budget, lengths)
            image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for row, column in np.argwhere(~np.isnan(grid)):
                share = grid[row, column]
                colour = "white" if share < 0.6 else "black"  # the colour map is dark at its lower end
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=colour)
            axes.set_title(f"{method}, {budget:.0%}", fontsize=7)
            axes.set_yticks(range(len(lengths)), [str(length) for length in lengths], fontsize=6)
            axes.set_xticks([-0.5, DEPTHS - 0.5], ["first", "last"], fontsize=6)
    figure.suptitle(title, fontsize=9)
    figure.supylabel("frames of the video", fontsize=8)
    figure.supxlabel("depth of the needle: where in the video", fontsize=8)
    bar = figure.colorbar(image, ax=panels, shrink=0.6, format=PercentFormatter(1, decimals=0))
    bar.set_label("accuracy", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    save(figure, path)


def draw_layers(path: Path, rows: Sequence[Row], title: str) -> None:
    """Plot the video tokens in each layer's attention: a panel per budget and a line per method, as in figure 14.

    Lines of equal counts would hide each other, so of those one is drawn a little above the other.

    Args:
        path: PNG file to write.
        rows: results; rows without tokens are left out.
        title: title of the picture.
    """
    rows = [row for row in rows if row.vision_tokens]
    budgets = sorted({row.budget for row in rows if row.budget < 1} or {1.0}, reverse=True)
    colours = dict(zip(_by_method(rows), _COLOURS * len(rows), strict=False))
    figure = Figure(figsize=(max(7, 1 + 3 * len(budgets)), 4.2), dpi=150, layout="constrained")
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0], budgets, strict=True):
        shown = [row for row in rows if row.budget in (budget, 1.0)]
        shifts = _above_each_other(shown)
        for row in shown:
            edges, counts = np.arange(len(row.vision_tokens) + 1) - 0.5, np.array(row.vision_tokens)
            axes.stairs(
                counts + shifts[id(row)],
                edges,
                label=row.method,
                color=colours[row.method],
                baseline=None,
                linewidth=1.5,
            )
        axes.set_title(f"budget {budget:.0%}", fontsize=9)
        axes.set(xlabel="layer", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(axes)
    figure.axes[0].set_ylabel("video tokens in attention, mean\n(equal lines are drawn apart)")
    figure.suptitle(title, fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, path)


_INTERVAL = ("accuracy_low", "accuracy_high")


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that have an accuracy, by method."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.accuracy is not None:
            found.setdefault(row.method, []).append(row)
    return found


def _side_by_side(rows: Sequence[Row]) -> dict[int, float]:
    """Where each row's point is drawn, by the row's id: at its cost, or beside others that cost the same."""
    costs = {id(row): row.relative_flops for row in rows if row.relative_flops is not None}
    groups: list[list[int]] = []
    for row in sorted(costs, key=lambda row: costs[row]):
        if groups and costs[row] - costs[groups[-1][0]] < _APART / 2:
            groups[-1].append(row)
        else:
            groups.append([row])
    return {
        row: costs[row] + (number - (len(group) - 1) / 2) * _APART
        for group in groups
        for number, row in enumerate(group)
    }


def _above_each_other(rows: Sequence[Row]) -> dict[int, float]:
    """How far each row's line is moved up, by the row's id: as far as it takes to be seen beside the others."""
    means = {id(row): float(np.mean(row.vision_tokens)) for row in rows}
    step = _ABOVE * max(max(row.vision_tokens) for row in rows)
    shifts, last = {}, -step
    for row in sorted(means, key=lambda row: means[row]):
        shifts[row] = max(0.0, last + step - means[row])
        last = means[row] + shifts[row]
    return shifts


def _grid(cells: Sequence[Cell], method: str, budget: float, lengths: Sequence[int]) -> np.ndarray:
    """Accuracies [lengths, DEPTHS]; NaN if there is no sample."""
    grid = np.full((len(lengths), DEPTHS), np.nan)
    for cell in cells:
        if (cell.method, cell.budget) == (method, budget):
            grid[lengths.index(cell.num_frames), round(cell.depth_from * DEPTHS)] = cell.accuracy
    return grid


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
