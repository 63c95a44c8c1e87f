"""The methods: what to keep. One file each, without Hugging Face."""

from .base import Method, Prompt, VideoTokens
from .fastv import FastV
from .frame_budgets import frame_budgets
from .framefusion import FrameFusion
from .keep_all import KeepAll

__all__ = ["FastV", "FrameFusion", "KeepAll", "Method", "Prompt", "VideoTokens", "frame_budgets"]
