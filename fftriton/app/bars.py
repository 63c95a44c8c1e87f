"""Progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

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


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2g}/s" if speed < 10 else f"{speed:.0f}/s")


def make_progress(console: Console, rate: bool = False) -> Progress:
    """Make the display that shows the bars.

    Args:
        console: where to show them.
        rate: whether to show also how many steps are done, how fast, and when they will be. This is printed at the end
            even if the console is no terminal; the bars of short steps are not.
    """
    text, bar = TextColumn("{task.description}", markup=False), BarColumn(bar_width=30)
    columns = [MofNCompleteColumn(), _Rate(), TimeRemainingColumn(compact=True)] if rate else [TaskProgressColumn()]
    hidden = not (rate or console.is_terminal)
    return Progress(text, bar, *columns, TimeElapsedColumn(), console=console, disable=hidden)
