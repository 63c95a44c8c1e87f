"""What commands show besides their results, on standard error: progress, messages, the log; and what Ctrl-C does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.logging import RichHandler

from .one_line import in_one_line
from .unusable import hide_unusable_torchvision

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_LOG = logging.getLogger("fftriton")


@contextmanager
def working(
    quiet: bool = False, verbose: bool = False, resumes: str = "", *, uses_transformers: bool = True
) -> Iterator[Console]:
    """Yield the console for progress and messages, and end a command that fails in one line.

    Args:
        quiet: whether nothing is shown there but warnings and errors.
        verbose: whether the log shows what is done, and the traceback of a failure.
        resumes: sentence to add after Ctrl-C: what is left of the work.
        uses_transformers: whether the command imports transformers, which a broken torchvision must be hidden from.
    """
    console = Console(stderr=True, quiet=quiet)
    handler = RichHandler(console=Console(stderr=True) if quiet else console, show_path=False, rich_tracebacks=False)
    level = _LOG.level
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        with in_one_line():
            if quiet and verbose:
                raise ValueError("quiet must go without verbose, got both")
            if uses_transformers:
                hide_unusable_torchvision()
            yield console
    except KeyboardInterrupt:
        say(console, " ".join(filter(None, ["Interrupted.", resumes])))
        raise typer.Exit(INTERRUPTED) from None
    finally:
        _LOG.removeHandler(handler)
        _LOG.setLevel(level)


def warn(text: str) -> None:
    """Print a text in one line, also where only warnings are shown."""
    Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def say(console: Console, text: str) -> None:
    """Print a text as it is, in one line."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
