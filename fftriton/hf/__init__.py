"""The Hugging Face wrapper: runs a method inside a Qwen2-style decoder."""

from .api import apply, apply_framefusion, reduce
from .reduction import Reduction
from .report import MergeStep, Report

__all__ = ["MergeStep", "Reduction", "Report", "apply", "apply_framefusion", "reduce"]
