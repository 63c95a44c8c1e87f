"""Removes redundant vision tokens inside video language models.

with fftriton.reduce(model, fftriton.FrameFusion(budget=0.3)):
    model.generate(**inputs)
"""

from . import layouts
from .hf import BatchReport, MergeStep, Reduction, Report, apply, apply_framefusion, reduce
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
    "BatchReport",
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
