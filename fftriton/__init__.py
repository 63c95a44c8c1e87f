"""Removes redundant vision tokens inside video language models.

with fftriton.reduce(model, fftriton.FrameFusion(budget=0.3)):
    model.generate(**inputs)
"""

from .hf import MergeStep, Reduction, Report, apply, apply_framefusion, reduce
from .layout import VideoLayout
from .methods import FastV, FrameFusion, KeepAll, Method, RandomTokens, UniformFrames, frame_budgets

__version__ = "0.1.0"

__all__ = [
    "FastV",
    "FrameFusion",
    "KeepAll",
    "MergeStep",
    "Method",
    "RandomTokens",
    "Reduction",
    "Report",
    "UniformFrames",
    "VideoLayout",
    "apply",
    "apply_framefusion",
    "frame_budgets",
    "reduce",
]
