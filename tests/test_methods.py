"""Parameters of the methods, and the arithmetic that needs no model."""

import math

import pytest
import torch

import fftriton
from fftriton.layout import VideoLayout, previous_of_patch
from fftriton.methods.base import Prompt

METHODS = [fftriton.FrameFusion, fftriton.FastV]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0, -1, 1.5, math.nan, math.inf])
def test_budget_out_of_range(method, budget):
    with pytest.raises(ValueError, match=rf"{method.__name__}: budget must be in \(0, 1\], got {budget}"):
        method(budget=budget)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["a", None, True, [0.3], torch.tensor(0.3)], ids=str)
def test_budget_of_another_type(method, budget):
    with pytest.raises(TypeError, match=rf"{method.__name__}: budget must be a number in \(0, 1\], got "):
        method(budget=budget)


@pytest.mark.parametrize("threshold", [-1.01, 1.01, math.nan])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match=r"similarity_threshold must be in \[-1.0, 1.0\], got "):
        fftriton.FrameFusion(similarity_threshold=threshold)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"min_merge_ratio must be in \[0.0, 1.0\], got "):
        fftriton.FrameFusion(min_merge_ratio=ratio)


@pytest.mark.parametrize("method", METHODS)
def test_queries_out_of_range(method):
    with pytest.raises(ValueError, match="importance_queries must be at least 1, got 0"):
        method(importance_queries=0)
    with pytest.raises(TypeError, match=r"importance_queries must be an integer of at least 1, got 1\.5"):
        method(importance_queries=1.5)


def test_fastv_layer_out_of_range():
    with pytest.raises(ValueError, match="FastV: layer must be at least 1, got 0"):
        fftriton.FastV(0.5, layer=0)


def test_methods_are_values():
    assert fftriton.FrameFusion(0.3) == fftriton.FrameFusion()
    assert "budget=0.3" in str(fftriton.FrameFusion())


def test_previous_of_patch_by_hand():
    patch = torch.tensor([[-1, 0, 1, 2, -1, 1, 0, 0, -1], [-1, -1, 5, -1, 5, 5, -1, 3, 3]])
    expected = [[-1, -1, -1, -1, -1, 2, 1, 6, -1], [-1, -1, -1, -1, 2, 4, -1, -1, 7]]
    assert previous_of_patch(patch).tolist() == expected


def test_frames_of_a_prompt_by_hand():
    first = VideoLayout(torch.tensor([[1, 2], [4, -1]]), sample=1)  # two frames, the second with a hole
    second = VideoLayout(torch.tensor([[6], [7]]), sample=1)
    prompt = Prompt(num_layers=3, length=9, layouts=[first, second])
    assert prompt.num_video_tokens == 5
    assert prompt.frame.tolist() == [-1, 0, 0, -1, 1, -1, 2, 3, -1]
