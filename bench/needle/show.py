"""Show the splits of the needle task: a picture of each, and two figures that tell them apart.

    python -m bench.needle.show [--out bench/results]

Writes OUT/needle-splits.jpg, one video a row, and OUT/needle-splits.csv: how much a needle resembles, in its first
frame, the patch that it covers, and how many patches resemble the same patch one frame earlier. Both are cosines of
pixels as the model gets them.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import typer
from matplotlib import pyplot as plt

from fftriton.needle import SPLITS, Sample, generate_sample
from fftriton.needle.digits import PATCH
from fftriton.needle.needles import draw_needles
from fftriton.needle.samples import RECIPES, draw_video
from fftriton.needle.scenes import GRID
from fftriton.runtime.processing import QwenPixels

_ALIKE = 0.9  # cosine from which on a patch counts as unchanged
_NUM_FRAMES = 16  # of the videos that are measured, whatever the split's own


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of patches [..., PATCH, PATCH, 3] uint8, centred as the model's processor does."""
    centre = 255 * np.array(QwenPixels().mean)
    a, b = ((patch - centre).reshape(*patch.shape[:-3], -1) for patch in (a, b))
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def onset_similarities(split: str, count: int) -> np.ndarray:
    """Of each of `count` needles in its first frame with what it covers."""
    recipe, found = RECIPES[split], []
    for seed in range(count):
        (needle,) = draw_needles(1, recipe.styles, _NUM_FRAMES, np.random.default_rng(seed))
        frame, (top, left) = needle.appearance.start, needle.appearance.corners[0]
        patch = (frame, slice(top, top + PATCH), slice(left, left + PATCH))
        videos = [
            draw_video(recipe, _NUM_FRAMES, needles, True, np.random.default_rng(seed)) for needles in ([needle], [])
        ]
        found.append(similarity(*(video[patch] for video in videos)))
    return np.array(found)


def share_unchanged(split: str, count: int) -> float:
    """How many patches of `count` videos resemble the same patch one frame earlier."""
    shares = []
    for index in range(count):
        frames = generate_sample(split, 0, index, num_frames=_NUM_FRAMES).frames
        patches = frames.reshape(-1, GRID, PATCH, GRID, PATCH, 3).swapaxes(2, 3)  # [F, GRID, GRID, PATCH, PATCH, 3]
        shares.append((similarity(patches[1:], patches[:-1]) > _ALIKE).mean())
    return float(np.mean(shares))


def draw(path: Path, samples: list[Sample]) -> None:
    """One video a row, with its question and answer."""
    figure, axes = plt.subplots(len(samples), 1, figsize=(14, 1.25 * len(samples)), layout="constrained")
    for axis, sample in zip(axes, samples, strict=True):
        axis.imshow(np.concatenate(list(sample.frames), axis=1), interpolation="nearest")
        axis.set_title(f"{sample.split}: {sample.question} {sample.answer}", loc="left", fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the figures.")] = Path("bench/results"),
    count: Annotated[int, typer.Option(help="Videos of each split to measure.", min=1)] = 200,
) -> None:
    """Draw a video of each split and measure what tells the splits apart."""
    matplotlib.use("agg")
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "needle-splits.jpg", [generate_sample(split, 0, 0, num_frames=_NUM_FRAMES) for split in SPLITS])
    with (out / "needle-splits.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "videos", "onset_similarity_p10", "p50", "p90", "share_unchanged"])
        for split in SPLITS:
            onsets = np.percentile(onset_similarities(split, count), (10, 50, 90))
            figures = [*onsets, share_unchanged(split, count)]
            writer.writerow([split, count, *(f"{figure:.2f}" for figure in figures)])
    print((out / "needle-splits.csv").read_text())


if __name__ == "__main__":
    typer.run(main)
