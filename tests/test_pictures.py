"""Pictures: who stands for whom, and what is drawn from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from fftriton import VideoLayout
from fftriton.app.fates import PatchFates, patch_fates
from fftriton.app.pictures import (
    _DPI,
    MAX_FRAMES,
    _blank,
    _cut,
    _group_means,
    _join,
    draw_merges,
    draw_tokens_per_layer,
)


def report_of(
    positions: list[list[int]], steps: list[tuple[list[int], list[int]]], pruned: list[int]
) -> SimpleNamespace:
    """The part of a report that `patch_fates` reads; a step is (merged, into)."""
    return SimpleNamespace(
        layouts=[VideoLayout(torch.tensor(positions))],
        num_tokens=12,
        merge_steps=[SimpleNamespace(merged=torch.tensor(m), into=torch.tensor(i)) for m, i in steps],
        pruned=torch.tensor(pruned, dtype=torch.int64),
    )


def test_fates_follow_groups_through_the_layers():
    positions = [[3, 4], [5, 6], [7, 8], [9, 10]]  # three tokens of text before
    report = report_of(positions, steps=[([7], [5]), ([5, 8], [3, 6])], pruned=[6, 9])
    fates = patch_fates(report)
    assert fates.root.tolist() == [[0, 1], [0, 3], [0, 3], [6, 7]]
    assert fates.merged.tolist() == [[False, False], [True, False], [True, True], [False, False]]
    assert fates.pruned.tolist() == [[False, False], [False, True], [False, True], [True, False]]  # with its group


def test_holes_count_as_pruned():
    fates = patch_fates(report_of([[3, -1], [5, 6]], steps=[], pruned=[]))
    assert fates.pruned.tolist() == [[False, True], [False, False]]
    assert fates.root.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (4, 4)), ((37, 90), (3, 7)), ((1080, 1920), (11, 20))])
def test_frames_are_cut_into_square_patches(size, grid):
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    patches = _cut(frames, grid)
    assert patches.shape[:2] == (2, grid[0] * grid[1])
    assert patches.shape[2] == patches.shape[3]
    joined = _join(patches[1], grid)
    cell = patches.shape[2]
    assert joined.shape == (grid[0] * cell, grid[1] * cell, 3)
    last = joined[-cell:, -cell:]
    assert np.array_equal(last, patches[1, -1])


def test_small_frames_are_enlarged_without_blur():
    frame = np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8)[None]  # one black pixel, one white
    assert set(np.unique(_cut(frame, (1, 2)))) == {0, 255}


def test_groups_take_their_mean_and_lost_patches_go_blank():
    patches = np.zeros((3, 2, 1, 1, 3), dtype=np.uint8)
    patches[:, 0] = np.array([10, 20, 60])[:, None, None, None]
    patches[:, 1] = 200
    root = np.array([[0, 1], [0, 3], [0, 3]])
    frame_of = np.arange(3)
    means = _group_means(patches, root, frame_of)
    assert means[:, 0, 0, 0, 0].tolist() == [30, 30, 30]
    assert means[:, 1, 0, 0, 0].tolist() == [200, 200, 200]
    fates = PatchFates(root, np.array([[False, True], [False, False], [False, False]]))
    blank = _blank(patches, fates.merged, fates.pruned, frame_of)
    assert blank[0, 0].tolist() == patches[0, 0].tolist()  # kept
    assert blank[0, 1, 0, 0, 0] < 100  # pruned: dark
    assert (blank[1:, 0] > 230).all()  # merged: nearly white


def draw(path: Path, num_frames: int, frames_a_token: int = 1) -> Image.Image:
    tokens = -(-num_frames // frames_a_token)
    root = np.zeros((tokens, 6), dtype=np.int64) + np.arange(6)
    fates = PatchFates(root, np.zeros((tokens, 6), dtype=bool))
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 40, 60, 3), dtype=np.uint8)
    draw_merges(path, frames, [i / 2 for i in range(num_frames)], fates, (2, 3), "$100_$")
    return Image.open(path)


def test_merge_picture_wraps_and_is_capped(tmp_path):
    sizes = {n: draw(tmp_path / f"{n}.png", n).size for n in (1, 8, 9, MAX_FRAMES, MAX_FRAMES + 20)}
    assert sizes[8][0] == sizes[9][0] <= 20 * _DPI
    assert sizes[8][1] < sizes[9][1]
    assert sizes[MAX_FRAMES] == sizes[MAX_FRAMES + 20]


def test_tokens_that_span_frames(tmp_path):
    """Five frames, two to a token: the last token has one frame."""
    assert draw(tmp_path / "pairs.png", 5, frames_a_token=2).size == draw(tmp_path / "single.png", 5).size


def test_drawing_is_exact_to_the_pixel(tmp_path):
    picture = np.asarray(draw(tmp_path / "one.png", 1).convert("RGB"))
    frame = np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
    expected = _join(_cut(frame, (2, 3))[0], (2, 3))
    height, width = expected.shape[:2]
    places = np.argwhere((picture == expected[0, 0]).all(-1))
    assert any(np.array_equal(picture[y : y + height, x : x + width], expected) for y, x in places)


def test_plot_is_drawn_without_touching_the_back_end(tmp_path):
    back_end = matplotlib.get_backend()
    report = SimpleNamespace(
        vision_tokens_per_layer=[100, 60, 60, 20], num_video_tokens=100, budget=0.6, budget_achieved=0.6
    )
    draw_tokens_per_layer(tmp_path / "plots" / "tokens.png", report, "FrameFusion", "$100_$.mp4")
    assert Image.open(tmp_path / "plots" / "tokens.png").size == (1200, 675)
    assert matplotlib.get_backend() == back_end
