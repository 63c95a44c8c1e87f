"""The methods: what to keep. One file each, without Hugging Face."""

from .base import Method, Prompt, VideoTokens
from .chain import Chain
from .fastv import FastV
from .frame_budgets import frame_budgets
from .framefusion import FrameFusion
from .keep_all import KeepAll
from .kvtp import KVTP, FrameContext
from .names import NAMES, make_method
from .pruners import PRUNERS, PruMerge, Pruner, RandomPruner, ToMe, TopKPruner
from .random_tokens import RandomTokens
from .uniform_frames import UniformFrames

__all__ = [
    "KVTP",
    "NAMES",
    "PRUNERS",
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
    "ToMe",
    "TopKPruner",
    "UniformFrames",
    "VideoTokens",
    "frame_budgets",
    "make_method",
]
