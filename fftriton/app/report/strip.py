"""The frames of a video, and what became of each patch in each layer, for the page's script."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...evaluate.observing import Observed
from ...hf import Report
from ..fates import patch_fates, patch_grid
from ..request import Job

_WIDTH = 320  # pixels of a frame
_PIXELS = 64 * _WIDTH * 180  # of all frames of a video: more frames are drawn smaller
_QUALITY = 70


@dataclass(frozen=True)
class Strip:
    """One video.

    Attributes:
        name: unique within the page, for the ids of its elements.
        frames: per frame of tokens, its picture (a data URI) and its caption. If the model makes one token of a patch
            in several frames, it is the first of them.
        layers: number of layers.
        grid: rows and columns of patches in a frame.
        script: what the page's script reads: the sizes and `_changes`.
    """

    name: str
    frames: list[dict[str, str]]
    layers: int
    grid: tuple[int, int]
    script: dict[str, Any]


def make_strip(job: Job, states: Sequence[np.ndarray]) -> Strip:
    """The strip of the only video of a prompt.

    Args:
        job: the prompt.
        states: what became of the patches in each layer, see `states_of`.
    """
    video, (rows, patches) = job.video, states[0].shape
    count = -(-len(video.frames) // rows)  # frames of the video that make one frame of tokens
    firsts = [min(row * count, len(video.frames) - 1) for row in range(rows)]
    captions = [_caption(video.times, first, count) for first in firsts]
    frames = [
        {"picture": picture, "caption": caption}
        for picture, caption in zip(_pictures(video.frames[firsts]), captions, strict=True)
    ]
    grid = patch_grid(patches, job.inputs)
    script = {"rows": grid[0], "columns": grid[1], "frames": rows, "changes": _changes(states)}
    return Strip(job.name, frames, len(states), grid, script)


def states_of(report: Report) -> list[np.ndarray]:
    """Per layer [F, P] int64: the patch whose token represents each patch in its attention, or -1 if it was pruned.

    Patches count from 0 through all frames; one that is kept represents itself.
    """
    fates = (patch_fates(report, layer=layer) for layer in range(len(report.kept_positions)))
    return [np.where(fate.pruned, -1, fate.root) for fate in fates]


def states_at_threshold(observed: Observed, threshold: float) -> list[np.ndarray]:
    """The same for an unreduced model, if each layer by itself merged what is so similar to the frame before."""
    frames, patches = int(observed.frame.max()) + 1, int(observed.patch.max()) + 1
    states = []
    for similarity in observed.similarity:
        root = np.full((frames, patches), -1)
        root[observed.frame, observed.patch] = observed.frame * patches + observed.patch
        joins = np.zeros((frames, patches), dtype=bool)
        joins[observed.frame, observed.patch] = similarity >= threshold  # NaN without a patch before
        for frame in range(1, frames):
            root[frame] = np.where(joins[frame], root[frame - 1], root[frame])
        states.append(root)
    return states


def _changes(states: Sequence[np.ndarray]) -> list[list[list[int]]]:
    """Per layer, two lists: the patches that changed since the layer before, and their states.

    Before the first layer all are kept.
    """
    changes = []
    before = np.arange(states[0].size)
    for state in (each.reshape(-1) for each in states):
        changed = np.flatnonzero(state != before)
        changes.append([changed.tolist(), state[changed].tolist()])
        before = state
    return changes


def _caption(times: Sequence[float], first: int, count: int) -> str:
    """When a frame is shown; of several that share their tokens, the first and the last."""
    last = min(first + count, len(times)) - 1
    return f"{times[first]:.1f} s" if last == first else f"{times[first]:.1f} to {times[last]:.1f} s"


def _pictures(frames: np.ndarray) -> list[str]:
    """[F, H, W, 3] uint8 -> a data URI per frame."""
    count, height, width, _ = frames.shape
    scale = min(_WIDTH / width, (_PIXELS / (count * height * width)) ** 0.5)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    uris = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).resize(size, resample).save(file, "JPEG", quality=_QUALITY)
        uris.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return uris
