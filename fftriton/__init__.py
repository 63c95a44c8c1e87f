"""Removes redundant vision tokens inside video language models.

with fftriton.reduce(model, fftriton.FrameFusion(budget=0.3)):
    model.generate(**inputs)
"""

from typing import Any

from . import layouts
from .hf import MergeStep, Reduction, Report, SampleReport, apply, apply_framefusion, reduce
from .hf.report import deprecated
from .layouts.layout import VideoLayout
from .methods import (
    KVTP,
    FastV,
    FrameContext,
    FrameFusion,
    KeepAll,
    Method,
    PruMerge,
    Pruner,
    RandomPruner,
    RandomTokens,
    StreamingLLM,
    TemporalMerge,
    ToMe,
    TopKPruner,
    UniformFrames,
    frame_budgets,
)
from .relevance import ContextFusion, SiglipRelevance

__version__ = "0.1.0"

__all__ = [
    "KVTP",
    "ContextFusion",
    "FastV",
    "FrameContext",
    "FrameFusion",
    "KeepAll",
    "MergeStep",
    "Method",
    "PruMerge",
    "Pruner",
    "RandomPruner",
    "RandomTokens",
    "Reduction",
    "Report",
    "SampleReport",
    "SiglipRelevance",
    "StreamingLLM",
    "TemporalMerge",
    "ToMe",
    "TopKPruner",
    "UniformFrames",
    "VideoLayout",
    "apply",
    "apply_framefusion",
    "frame_budgets",
    "layouts",
    "reduce",
]


def __getattr__(name: str) -> Any:
    return deprecated(__name__, name)
