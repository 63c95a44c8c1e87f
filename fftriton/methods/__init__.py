"""The methods: what to keep. One file each, without Hugging Face.

Importing this package imports no torch; a name is imported once it is used.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anchors import Anchors
    from .base import Method, MethodState, Prompt, Steps, VideoTokens, Window
    from .before_layers import BeforeLayers, ScoringMethod
    from .budgets import frame_budgets
    from .chain import Chain
    from .dycoke import DyCoke
    from .evs import EVS
    from .fastv import FastV
    from .fastvid import FastVID
    from .flashvid import FlashVID
    from .framefusion import FrameFusion
    from .frames import FrameContext, FrameRows
    from .keep_all import KeepAll
    from .kvtp import KVTP
    from .own_attention import OwnAttention
    from .pruners import PruMerge, Pruner, RandomPruner, TopKPruner
    from .random_tokens import RandomTokens
    from .registry import names
    from .settings import load_settings
    from .st_simdiff import STSimDiff
    from .streaming_llm import StreamingLLM
    from .temporal_merge import TemporalMerge
    from .text import from_dict, parse, split_methods, to_dict, to_text
    from .tome import ToMe
    from .uniform_frames import UniformFrames
    from .vidcom2 import VidCom2
    from .visionzip import VisionZip

_MODULES = {
    "anchors": ("Anchors",),
    "base": ("Method", "MethodState", "Prompt", "Steps", "VideoTokens", "Window"),
    "before_layers": ("BeforeLayers", "ScoringMethod"),
    "budgets": ("frame_budgets",),
    "chain": ("Chain",),
    "dycoke": ("DyCoke",),
    "evs": ("EVS",),
    "fastv": ("FastV",),
    "fastvid": ("FastVID",),
    "flashvid": ("FlashVID",),
    "frames": ("FrameContext", "FrameRows"),
    "framefusion": ("FrameFusion",),
    "keep_all": ("KeepAll",),
    "kvtp": ("KVTP",),
    "own_attention": ("OwnAttention",),
    "pruners": ("PruMerge", "Pruner", "RandomPruner", "TopKPruner"),
    "random_tokens": ("RandomTokens",),
    "registry": ("names",),
    "settings": ("load_settings",),
    "st_simdiff": ("STSimDiff",),
    "streaming_llm": ("StreamingLLM",),
    "temporal_merge": ("TemporalMerge",),
    "text": ("from_dict", "parse", "split_methods", "to_dict", "to_text"),
    "tome": ("ToMe",),
    "uniform_frames": ("UniformFrames",),
    "vidcom2": ("VidCom2",),
    "visionzip": ("VisionZip",),
}
_MODULE_OF = {name: module for module, exported in _MODULES.items() for name in exported}
_FORMER = {  # name: (name in former.py, what to use)
    "NAMES": ("NAMES", "fftriton.methods.names()"),
    "make_method": ("make_method", "fftriton.methods.parse"),
    "PRUNERS": ("CLASSES_OF_PRUNERS", "the classes of the pruners"),
}

__all__ = [
    "EVS",
    "KVTP",
    "Anchors",
    "BeforeLayers",
    "Chain",
    "DyCoke",
    "FastV",
    "FastVID",
    "FlashVID",
    "FrameContext",
    "FrameFusion",
    "FrameRows",
    "KeepAll",
    "Method",
    "MethodState",
    "OwnAttention",
    "Prompt",
    "PruMerge",
    "Pruner",
    "RandomPruner",
    "RandomTokens",
    "STSimDiff",
    "ScoringMethod",
    "Steps",
    "StreamingLLM",
    "TemporalMerge",
    "ToMe",
    "TopKPruner",
    "UniformFrames",
    "VidCom2",
    "VideoTokens",
    "VisionZip",
    "Window",
    "frame_budgets",
    "from_dict",
    "load_settings",
    "names",
    "parse",
    "split_methods",
    "to_dict",
    "to_text",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        globals()[name] = value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        return value
    if name in _FORMER:
        former, instead = _FORMER[name]
        warnings.warn(f"fftriton.methods.{name} is deprecated: use {instead}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(".former", __name__), former)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
