"""Errors of commands in one line, with an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

FAILED = 2
"""Exit code: bad input, or a file that cannot be written."""


@contextmanager
def in_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions that the user can fix into a one-line message and an exit code."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has had enough
        raise
    except kinds as error:
        Console(stderr=True, style="bold red").print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None
