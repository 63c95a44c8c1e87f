"""The Hugging Face wrapper: runs a method inside a Qwen2-style decoder."""

from .api import apply, apply_framefusion, reduce
from .reduction import Reduction
from .report import BatchReport, MergeStep, Report

__all__ = ["BatchReport", "MergeStep", "Reduction", "Report", "apply", "apply_framefusion", "reduce"]
