"""The methods: what to keep. One file each, without Hugging Face."""

from .base import Method, Prompt, VideoTokens, Window
from .chain import BeforeLayers, Chain
from .fastv import FastV
from .frame_budgets import frame_budgets
from .framefusion import FrameFusion
from .keep_all import KeepAll
from .kvtp import KVTP, FrameContext
from .names import NAMES, make_method
from .pruners import PRUNERS, PruMerge, Pruner, RandomPruner, ToMe, TopKPruner
from .random_tokens import RandomTokens
from .streaming_llm import StreamingLLM
from .temporal_merge import TemporalMerge
from .uniform_frames import UniformFrames

__all__ = [
    "KVTP",
    "NAMES",
    "PRUNERS",
    "BeforeLayers",
    "Chain",
    "FastV",
    "FrameContext",
    "FrameFusion",
    "KeepAll",
    "Method",
    "Prompt",
    "PruMerge",
    "Pruner",
    "RandomPruner",
    "RandomTokens",
    "StreamingLLM",
    "TemporalMerge",
    "ToMe",
    "TopKPruner",
    "UniformFrames",
    "VideoTokens",
    "Window",
    "frame_budgets",
    "make_method",
]
