"""The methods: what to keep. One file each, without Hugging Face."""

from .base import Method, Prompt, VideoTokens
from .fastv import FastV
from .frame_budgets import frame_budgets
from .framefusion import FrameFusion
from .keep_all import KeepAll
from .names import NAMES, make_method
from .random_tokens import RandomTokens
from .uniform_frames import UniformFrames

__all__ = [
    "NAMES",
    "FastV",
    "FrameFusion",
    "KeepAll",
    "Method",
    "Prompt",
    "RandomTokens",
    "UniformFrames",
    "VideoTokens",
    "frame_budgets",
    "make_method",
]
