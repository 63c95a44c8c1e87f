"""Saving matplotlib figures."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import writing


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file, which is whole or not there."""
    FigureCanvasAgg(figure)  # draws without a display, and leaves the process's choice of back end alone
    with writing(path) as partial:
        figure.savefig(partial)
