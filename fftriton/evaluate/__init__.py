"""Accuracy and cost of methods, all on the same samples of a task."""

from .plan import Plan, Setting
from .rows import Row, summarise
from .runner import evaluate
from .statistics import mcnemar_exact, wilson_interval

__all__ = ["Plan", "Row", "Setting", "evaluate", "mcnemar_exact", "summarise", "wilson_interval"]
