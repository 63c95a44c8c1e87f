"""Errors of commands in one line, with an exit code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

FAILED = 2
"""Exit code: bad input, or a file that cannot be written."""

_LOG = logging.getLogger(__name__)


@contextmanager
def in_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions that the user can fix into a one-line message and an exit code; the log gets the traceback.

    Args:
        kinds: of exceptions; without any, those that bad input and files raise, or a package that is not installed.
    """
    caught = kinds or (ValueError, TypeError, OSError, ImportError)
    try:
        yield
    except BrokenPipeError:  # whoever read the output has had enough
        raise
    except caught as error:
        if _interrupted(error):
            raise KeyboardInterrupt from error
        _LOG.info("The command fails.", exc_info=error)
        Console(stderr=True, style="bold red").print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an exception, as when it comes while a package imports another."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
