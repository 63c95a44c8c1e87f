"""What commands show besides their results: progress, log, errors in one line, and exit codes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.logging import RichHandler

from ..runtime.unusable import hide_unusable_torchvision

LOG = logging.getLogger("fftriton")

FAILED = 2  # exit code: bad input, or a file that cannot be written
INTERRUPTED = 130


@contextmanager
def working(quiet: bool = False, verbose: bool = False, resumes: str = "") -> Iterator[Console]:
    """Yield the console for progress and messages, on standard error, and end a command that fails in one line.

    Args:
        quiet: whether nothing is shown there but warnings and errors.
        verbose: whether the log shows what is done, and the traceback of a failure.
        resumes: sentence to add after Ctrl-C: what is left of the work.
    """
    console = Console(stderr=True, quiet=quiet)
    handler = RichHandler(console=Console(stderr=True) if quiet else console, show_path=False, rich_tracebacks=False)
    level = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        with in_one_line():
            if quiet and verbose:
                raise ValueError("quiet must go without verbose, got both")
            hide_unusable_torchvision()
            yield console
    except KeyboardInterrupt:
        say(console, " ".join(filter(None, ["Interrupted.", resumes])))
        raise typer.Exit(INTERRUPTED) from None
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turn exceptions that the user can mend into a one-line message and an exit code."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has had enough
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        LOG.info("The command fails.", exc_info=error)
        console = Console(stderr=True, style="bold red")
        say(console, f"Error: {error}")
        raise typer.Exit(FAILED) from None


def say(console: Console, text: str) -> None:
    """Print a text as it is, in one line."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
