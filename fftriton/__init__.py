"""Removes redundant vision tokens inside video language models.

with fftriton.reduce(model, fftriton.FrameFusion(budget=0.3)):
    model.generate(**inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hf, layouts, methods, relevance
    from .hf import MergeStep, Reduction, Report, SampleReport, apply, apply_framefusion, reduce
    from .layouts import VideoLayout
    from .methods import (
        EVS,
        KVTP,
        Anchors,
        Chain,
        DyCoke,
        FastV,
        FastVID,
        FlashVID,
        FrameContext,
        FrameFusion,
        KeepAll,
        Method,
        PruMerge,
        Pruner,
        RandomPruner,
        RandomTokens,
        ScoringMethod,
        StreamingLLM,
        STSimDiff,
        TemporalMerge,
        ToMe,
        TopKPruner,
        UniformFrames,
        VidCom2,
        VisionZip,
        frame_budgets,
        load_settings,
    )
    from .relevance import ContextFusion, SiglipRelevance

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/former")  # modules under their former names, for one more release

__all__ = [
    "EVS",
    "KVTP",
    "Anchors",
    "Chain",
    "ContextFusion",
    "DyCoke",
    "FastV",
    "FastVID",
    "FlashVID",
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
    "STSimDiff",
    "SampleReport",
    "ScoringMethod",
    "SiglipRelevance",
    "StreamingLLM",
    "TemporalMerge",
    "ToMe",
    "TopKPruner",
    "UniformFrames",
    "VidCom2",
    "VideoLayout",
    "VisionZip",
    "apply",
    "apply_framefusion",
    "frame_budgets",
    "hf",
    "layouts",
    "load_settings",
    "methods",
    "reduce",
    "relevance",
]

_ROOMS = ("hf", "layouts", "methods", "relevance")


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is used: `import fftriton` stays quick."""
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        for room in _ROOMS:
            module = importlib.import_module(f".{room}", __name__)
            if name in module.__all__:
                globals()[name] = value = getattr(module, name)
                return value
    if name == "BatchReport":
        from .hf.report import deprecated

        return deprecated(__name__, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
