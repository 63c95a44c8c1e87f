"""The pictures of `fftriton inspect`, after figures 2, 3, 4, 5, 15 and 23 of FrameFusion's paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..evaluate.observing import Observed
from ..evaluate.redundancy import TOP, LayerRow, Redundancy, Retention
from ..runtime.figures import save

_SIMILARITY, _IMPORTANCE, _CHANCE = "#2563eb", "#d97706", "#6b7280"
_LAYERS: Colormap = colormaps["viridis"]
_MARKER_SIZE = 4
_THRESHOLD = "#dc2626"
_NOTHING = "nothing to show:\ntokens are all alike, or\nthe layers have no attention"
_DARK = {"facecolor": "#1f2937", "edgecolor": "none", "pad": 1.5}

DESCRIPTIONS = {
    "matrix": "Similarity of pairs of tokens at the first layer, and its mean by the distance of the two tokens",
    "distribution": "Distribution of the similarity in each layer, with the threshold that is suggested",
    "correlation": "Rank correlation between adjacent layers, of similarity and of importance",
    "retention": "Share of the top 30 % of the tokens of a layer that are in the top 30 % of later layers",
    "variance": "Variance of similarity and of importance in each layer",
    "joint": "Importance against similarity of the tokens, in several layers",
}
"""What each picture shows, by its name."""


def draw(out: Path, observed: Observed, found: Redundancy, title: str) -> list[Path]:
    """Draw all pictures.

    Args:
        out: folder to write to.
        observed: the tokens.
        found: the analyses.
        title: model and clip, the first line of every picture.

    Returns:
        The paths of the PNG files.
    """
    figures = {
        "matrix": _matrix(observed),
        "distribution": _distribution(observed, found),
        "correlation": _correlation(found.layers),
        "retention": _retention(found.retention, len(found.layers)),
        "variance": _variance(found.layers),
        "joint": _joint(observed, found),
    }
    paths = []
    for name, figure in figures.items():
        figure.suptitle(title, fontsize=11, parse_math=False)
        paths.append(out / f"{name}.png")
        save(figure, paths[-1])
    return paths


def _matrix(observed: Observed) -> Figure:
    """Figure 2: pairs of tokens, and the mean by the distance of the two."""
    figure = _figure(12, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    count, patches = len(observed.matrix), observed.patches
    darkest = min(0.99, float(np.quantile(observed.matrix, 0.01)))
    image = left.imshow(observed.matrix, cmap="magma", vmin=darkest, vmax=1, interpolation="nearest")
    left.annotate(
        "t - P", (patches, 0), xytext=(6, -12), textcoords="offset points", color="white", fontsize=9, bbox=_DARK
    )
    left.set_title(f"first layer, the first {observed.frame[count - 1] + 1} frames of {patches} tokens", fontsize=10)
    left.set(xlabel="token", ylabel="token t")
    figure.colorbar(image, ax=left, label="cosine similarity", shrink=0.85, extend="min")
    distance = np.arange(1, len(observed.by_distance) + 1)
    for number in range(1, len(distance) // patches + 1):
        right.axvline(number * patches, color=_CHANCE, linestyle=":", linewidth=1)
        name = "P" if number == 1 else f"{number}P"
        right.annotate(
            f"{name} = {number * patches}", (number * patches, 1), xycoords=("data", "axes fraction"), fontsize=9,
            xytext=(-4, -12), textcoords="offset points", ha="right", color=_CHANCE,
        )  # fmt: skip
    right.plot(distance, observed.by_distance, color=_SIMILARITY, linewidth=1.2)
    right.set_title("mean over all pairs of tokens that are so far apart", fontsize=10)
    right.set(xlabel="distance in tokens; P: tokens of a frame", ylabel="cosine similarity")
    _tidy(right)
    return figure


def _distribution(observed: Observed, found: Redundancy) -> Figure:
    """Figure 3: the distribution of the similarity in each layer."""
    figure = _figure(12, 4.8)
    left, right = figure.subplots(1, 2)
    layers = _chosen(len(found.layers), 6)
    for layer in layers:
        values = np.sort(observed.similarity[layer][np.isfinite(observed.similarity[layer])])
        shares = 1 - np.arange(len(values)) / len(values)
        left.step(values, shares, where="post", color=_colour(layer, len(found.layers)), label=f"layer {layer}")
    left.axvline(found.threshold, color=_THRESHOLD, linestyle="--", linewidth=1)
    left.set(xlim=(min(0.99, float(np.nanquantile(observed.similarity, 0.02))), 1), ylim=(0, 1.02))
    left.set(xlabel="similarity with the same patch one frame earlier", ylabel="share of the tokens that reach it")
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.legend(frameon=False, fontsize=9, loc="lower left")
    number = [row.layer for row in found.layers]
    quantiles = {name: [getattr(row, f"similarity_{name}") for row in found.layers] for name in (5, 25, 50, 75, 95)}
    right.fill_between(
        number, quantiles[5], quantiles[95], color=_SIMILARITY, alpha=0.15, label="5 to 95 %", linewidth=0
    )
    right.fill_between(
        number, quantiles[25], quantiles[75], color=_SIMILARITY, alpha=0.3, label="25 to 75 %", linewidth=0
    )
    right.plot(number, quantiles[50], color=_SIMILARITY, marker="o", markersize=_MARKER_SIZE, label="median")
    right.axhline(found.threshold, color=_THRESHOLD, linestyle="--", linewidth=1, label=_label(found))
    right.set(xlabel="layer", ylabel="similarity")
    right.legend(frameon=False, fontsize=9)
    _number_layers(right)
    for axes in (left, right):
        _tidy(axes)
    return figure


def _correlation(rows: Sequence[LayerRow]) -> Figure:
    """Figure 4: whether the ranking of the tokens is the same in the next layer."""
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    _plot(axes, [(row.layer, row.similarity_correlation) for row in rows], _SIMILARITY, "similarity", "o")
    _plot(axes, [(row.layer, row.importance_correlation) for row in rows], _IMPORTANCE, "importance", "s")
    axes.axhline(0, color=_CHANCE, linestyle=":", linewidth=1)
    axes.set(xlabel="layer", ylabel="rank correlation with the next layer", ylim=(None, 1.05))
    _legend(axes)
    _number_layers(axes)
    _tidy(axes)
    return figure


def _retention(pairs: Sequence[Retention], num_layers: int) -> Figure:
    """Figure 5: how many of the top tokens of a layer are in the top of later ones."""
    figure = _figure(12, 4.6)
    starts = _chosen(num_layers - 1, 5) or [0]
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("similarity", "importance"), strict=True):
        for start in starts:
            points = [(pair.layer, getattr(pair, name)) for pair in pairs if pair.start == start]
            _plot(axes, points, _colour(start, num_layers), f"from layer {start}", "o")
        axes.axhline(TOP, color=_CHANCE, linestyle="--", linewidth=1, label="chance")
        axes.set_title(f"the top {TOP:.0%} by {name}", fontsize=10)
        axes.set(xlabel="layer", ylim=(0, 1.05))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(labelleft=True)
        _legend(axes, loc="lower left")
        _number_layers(axes)
        _tidy(axes)
    figure.axes[0].set_ylabel("share that is in the top here, too")
    return figure


def _variance(rows: Sequence[LayerRow]) -> Figure:
    """Figure 15: how much similarity and importance differ from token to token."""
    figure = _figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    _plot(left, [(row.layer, row.similarity_variance) for row in rows], _SIMILARITY, "similarity", "o")
    left.set(xlabel="layer", ylabel="variance of the similarity over the tokens", ylim=(0, None))
    _plot(right, [(row.layer, row.importance_variance) for row in rows], _IMPORTANCE, "importance", "s")
    right.set(xlabel="layer", ylabel="variance of the importance / mean²", ylim=(0, None))
    for axes in (left, right):
        _legend(axes)
        _number_layers(axes)
        _tidy(axes)
    return figure


def _joint(observed: Observed, found: Redundancy) -> Figure:
    """Figure 23: similarity and importance of each token, in a few layers."""
    attending = [layer for layer in range(len(found.layers)) if np.isfinite(observed.importance[layer]).any()]
    layers = [attending[i] for i in _chosen(len(attending), 3)]
    figure = _figure(4.4 * max(1, len(layers)) + 0.8, 4.6)
    for axes, layer in zip(figure.subplots(1, max(1, len(layers)), squeeze=False)[0], layers, strict=False):
        x, y = observed.similarity[layer], observed.importance[layer]
        both = np.isfinite(x) & (y > 0)
        x, y = x[both], y[both] / np.nanmean(observed.importance[layer])
        bins = axes.hexbin(x, y, yscale="log", gridsize=28, cmap="viridis", norm=LogNorm(), mincnt=1, linewidths=0.2)
        correlation = found.layers[layer].joint_correlation
        axes.set_title(
            f"layer {layer}" + ("" if correlation is None else f", rank correlation {correlation:.2f}"), fontsize=10
        )
        axes.axvline(found.threshold, color=_THRESHOLD, linestyle="--", linewidth=1, label=_label(found))
        axes.set_xlabel("similarity with the frame before")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        figure.colorbar(bins, ax=axes, label="tokens", format="{x:g}")
        _tidy(axes)
    figure.axes[0].set_ylabel("importance, relative to the layer's mean")
    if not layers:
        _legend(figure.axes[0])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right", frameon=False, fontsize=9)
    return figure


def _label(found: Redundancy) -> str:
    return f"median at layer 0: {found.threshold:.3f}"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _plot(axes: Axes, points: Sequence[tuple[int, float | None]], colour: object, label: str, marker: str) -> None:
    known = [point for point in points if point[1] is not None]
    if known:
        x, y = zip(*known, strict=True)
        axes.plot(x, y, color=colour, label=label, marker=marker, markersize=_MARKER_SIZE)


def _chosen(count: int, most: int) -> list[int]:
    """At most so many indices below `count`, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count > 0 else []


def _colour(layer: int, num_layers: int) -> tuple[float, ...]:
    return _LAYERS(0.9 * layer / max(1, num_layers - 1))  # without the palest yellow


def _legend(axes: Axes, **options: Any) -> None:
    """The names of the lines; why there are none if there are none."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(facecolor="white", edgecolor="none", framealpha=1, fontsize=9, **options)
    else:
        axes.text(0.5, 0.5, _NOTHING, ha="center", va="center", transform=axes.transAxes, color=_CHANCE)


def _number_layers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
