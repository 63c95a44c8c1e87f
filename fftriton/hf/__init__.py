"""The Hugging Face wrapper: runs a method inside a Qwen2-style decoder."""

from typing import Any

from .api import apply, apply_framefusion, reduce
from .reduction import Reduction
from .report import MergeStep, Report, SampleReport, deprecated

__all__ = ["MergeStep", "Reduction", "Report", "SampleReport", "apply", "apply_framefusion", "reduce"]


def __getattr__(name: str) -> Any:
    return deprecated(__name__, name)
