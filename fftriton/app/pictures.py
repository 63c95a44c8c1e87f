"""Pictures of a reduction: which patches merged, and how many tokens each layer had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..hf import Report
from ..runtime.figures import save
from .fates import PatchFates

FRAMES_A_ROW = 8
MAX_FRAMES = 32

_MERGED = np.array([238, 238, 242], dtype=np.uint8)  # nearly white
_PRUNED = np.array([64, 68, 78], dtype=np.uint8)  # dark slate
_DENSE_COLOUR, _REDUCED_COLOUR, _BUDGET_COLOUR = "#9aa0aa", "#2563eb", "#dc2626"

_DPI = 100
_FRAME_WIDTH = 160  # pixels, about
_GAP, _MARGIN, _LABELS, _HEADER = 6, 24, 120, 96  # pixels


def draw_merges(
    path: Path, frames: np.ndarray, seconds: list[float], fates: PatchFates, grid: tuple[int, int], title: str
) -> None:
    """Draw rows of frames: as sampled; with merged patches blank; with every patch as the mean of its group.

    Args:
        path: PNG file to write.
        frames: [F, H, W, 3] uint8: the sampled frames. If the model makes one token from the same patch of several
            frames, `fates` has fewer rows than there are frames.
        seconds: [F]: time of each frame.
        fates: what happened to the patches, [f, P].
        grid: rows and columns of patches in a frame, P in total.
        title: first line of the picture.
    """
    patches = _cut(frames, grid)  # [F, P, c, c, 3]
    frames_a_token = -(-len(frames) // len(fates.root))
    frame_of = np.arange(len(frames)) // frames_a_token  # row of `fates` for each frame
    strips = {"as sampled": patches, "what is left": _blank(patches, fates.merged, fates.pruned, frame_of)}
    if fates.merged.any():
        means = _group_means(patches, fates.root, frame_of)
        strips["group means"] = _blank(means, np.zeros_like(fates.merged), fates.pruned, frame_of)
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MAX_FRAMES)).round().astype(int))
    images = {label: [_join(strip[i], grid) for i in shown] for label, strip in strips.items()}
    _draw_strips(path, images, [f"{seconds[i]:.1f} s" for i in shown], title, _tally(fates))


def draw_tokens_per_layer(path: Path, report: Report, method: str, title: str) -> None:
    """Plot the vision tokens in each layer's attention, with those of the unreduced model for comparison.

    Args:
        path: PNG file to write.
        report: report of the reduced prefill.
        method: name of the method.
        title: title of the plot.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = plot_tokens_per_layer(figure, report, method)
    axes.set_title(title, parse_math=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    save(figure, path)


def plot_tokens_per_layer(figure: Figure, report: Report, method: str) -> Axes:
    """Fill a figure with what `draw_tokens_per_layer` draws; the title and the legend are left to the caller."""
    counts = report.vision_tokens_per_layer
    axes = figure.add_subplot()
    edges = np.arange(len(counts) + 1) - 0.5
    dense = [report.num_video_tokens] * len(counts)
    axes.stairs(dense, edges, color=_DENSE_COLOUR, linewidth=2, label="all tokens kept", baseline=None)
    axes.stairs(counts, edges, color=_REDUCED_COLOUR, linewidth=2, fill=True, alpha=0.25)
    reached = f"{method}: mean {report.budget_achieved:.1%} of all"
    axes.stairs(counts, edges, color=_REDUCED_COLOUR, linewidth=2, label=reached, baseline=None)
    budget = report.budget * report.num_video_tokens
    axes.axhline(budget, color=_BUDGET_COLOUR, linestyle="--", label=f"budget: mean {report.budget:.0%}")
    _label_counts(axes, counts)
    axes.set(xlabel="layer", ylabel="vision tokens in attention", ylim=(0, dense[0] * 1.12))
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _cut(frames: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Frames [F, H, W, 3] -> patches [F, P, c, c, 3], each frame resized so that all patches are c pixels square."""
    rows, columns = grid
    cell = max(4, round(_FRAME_WIDTH / columns))
    size = (columns * cell, rows * cell)
    enlarge = size[0] >= frames.shape[2]
    resample = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    resized = np.stack([np.asarray(Image.fromarray(frame).resize(size, resample)) for frame in frames])
    cells = resized.reshape(len(frames), rows, cell, columns, cell, 3).swapaxes(2, 3)
    return cells.reshape(len(frames), rows * columns, cell, cell, 3)


def _join(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """One frame's patches [P, c, c, 3] -> [H, W, 3]."""
    cell = patches.shape[1]
    cells = patches.reshape(*grid, cell, cell, 3).swapaxes(1, 2)
    return cells.reshape(grid[0] * cell, grid[1] * cell, 3)


def _blank(patches: np.ndarray, merged: np.ndarray, pruned: np.ndarray, frame_of: np.ndarray) -> np.ndarray:
    """A copy of [F, P, c, c, 3] with flat colours for tokens [f, P] that merged or were pruned."""
    out = patches.copy()
    out[merged[frame_of]] = _MERGED
    out[pruned[frame_of]] = _PRUNED
    return out


def _group_means(patches: np.ndarray, root: np.ndarray, frame_of: np.ndarray) -> np.ndarray:
    """[F, P, c, c, 3]: the mean of all patches that share a root [f, P]."""
    pixels = patches.reshape(-1, patches[0, 0].size).astype(np.float64)
    group = root[frame_of].reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sums = np.add.reduceat(pixels[order], starts)
    sizes = np.diff(starts, append=len(group))
    means = np.empty_like(pixels)
    means[order] = np.repeat(sums / sizes[:, None], sizes, axis=0)
    return means.round().astype(np.uint8).reshape(patches.shape)


def _tally(fates: PatchFates) -> str:
    """The number of tokens that merged, were pruned and are left, in words."""
    merged = int((fates.merged & ~fates.pruned).sum())
    pruned = int(fates.pruned.sum())
    total = fates.root.size
    return f"{total} vision tokens: {merged} merged into others, {pruned} pruned, {total - merged - pruned} left"


def _draw_strips(path: Path, images: dict[str, list[np.ndarray]], times: list[str], title: str, tally: str) -> None:
    """Lay the images out in blocks of FRAMES_A_ROW frames, one strip per label; one image pixel is one pixel."""
    height, width = next(iter(images.values()))[0].shape[:2]
    columns = min(len(times), FRAMES_A_ROW)
    num_blocks = -(-len(times) // FRAMES_A_ROW)
    block_height = len(images) * (height + _GAP) + _MARGIN
    total_width = max(_LABELS + columns * (width + _GAP) + _MARGIN, 900)
    total_height = _HEADER + num_blocks * block_height + _GAP
    figure = Figure(figsize=(total_width / _DPI, total_height / _DPI), dpi=_DPI)

    def at(x: float, y: float) -> tuple[float, float]:  # pixels from the top left corner -> figure's fractions
        return x / total_width, 1 - y / total_height

    figure.text(*at(_MARGIN, 34), title, fontsize=13, weight="bold", parse_math=False)
    figure.text(*at(_MARGIN, 58), tally, fontsize=10, color="#444444")
    legend = {"merged into another patch": _MERGED, "pruned": _PRUNED}
    swatches = [Patch(facecolor=tuple(colour / 255), edgecolor="#888888") for colour in legend.values()]
    corner = at(total_width - _MARGIN, 44)
    figure.legend(swatches, legend, loc="upper right", bbox_to_anchor=corner, ncols=2, frameon=False, fontsize=9)
    for i, time in enumerate(times):
        block, column = divmod(i, FRAMES_A_ROW)
        x = _LABELS + column * (width + _GAP)
        top = _HEADER + block * block_height
        figure.text(*at(x + width / 2, top - 5), time, fontsize=9, ha="center", color="#444444")
        for row, (label, strip) in enumerate(images.items()):
            y = top + row * (height + _GAP)
            if column == 0:
                figure.text(*at(_LABELS - 12, y + height / 2), label, fontsize=10, ha="right", va="center")
            axes = figure.add_axes((*at(x, y + height), width / total_width, height / total_height))
            axes.imshow(strip[i], interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    save(figure, path)


def _label_counts(axes: Axes, counts: list[int]) -> None:
    """Write each count once, above the first layer that has it."""
    for layer, count in enumerate(counts):
        if layer == 0 or count != counts[layer - 1]:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            at = (layer - 0.45, count)
            axes.annotate(f"{count}", at, xytext=(0, 5), textcoords="offset points", fontsize=9, bbox=box)
