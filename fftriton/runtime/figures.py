"""Saving matplotlib figures."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import writing


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file, completely or not at all."""
    FigureCanvasAgg(figure)  # draws without a display, and does not change the process's back end
    with writing(path) as partial:
        figure.savefig(partial)
