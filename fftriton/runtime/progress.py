"""Types for the progress of long-running steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""

OpenBar = Callable[[str], AbstractContextManager[OnProgress]]
"""Opens a progress bar with this description for the duration of a step."""


@contextmanager
def no_bar(description: str) -> Iterator[OnProgress]:
    """An OpenBar that shows nothing."""
    yield lambda done, total: None
