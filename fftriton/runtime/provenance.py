"""Where figures come from: versions, commit, date and command."""

from __future__ import annotations

import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
import transformers

from .. import __version__


def provenance() -> dict[str, str]:
    """What is written beside every result: versions, commit, date and the command line."""
    return {
        "fftriton": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit() -> str:
    """The commit of the checkout that the package runs from, with a + if it has been changed; else empty."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed package
        return ""
