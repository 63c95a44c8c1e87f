"""Progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..runtime.progress import OnProgress


class Bars:
    """Progress bars, one per step.

    Args:
        progress: the display that shows the bars.
    """

    def __init__(self, progress: Progress):
        self._progress = progress

    @contextmanager
    def open(self, description: str) -> Iterator[OnProgress]:
        """Show a bar that fills as `on_progress(done, total)` is called."""
        task = self._progress.add_task(description, total=None)

        def on_progress(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        yield on_progress


def make_progress(console: Console) -> Progress:
    """Make the display that shows the bars."""
    text, bar = TextColumn("{task.description}"), BarColumn(bar_width=30)
    return Progress(text, bar, TaskProgressColumn(), TimeElapsedColumn(), console=console)
