"""Where results come from: versions, commit, date and command, and the name of a device.

Importing this module imports no torch: `fftriton doctor` needs it where torch is broken.
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__

if TYPE_CHECKING:
    import torch

_CPUINFO = Path("/proc/cpuinfo")


def provenance() -> dict[str, str]:
    """Versions, commit, date and command line, which are written with every result."""
    import torch

    return {
        "fftriton": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": version("transformers") or "",
        "date": today(),
        "command": _command(),
    }


def commit() -> str:
    """Commit of the checkout that the package runs from, with a + if there are changes; empty if not in a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked=no") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or not in a checkout
        return ""


def _command() -> str:
    """The command line; `python -m PACKAGE ...` if that is how it was started."""
    program = Path(sys.argv[0])
    start = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def device_name(device: str | torch.device) -> str:
    """The GPU's name; or the processor's, and how many threads compute."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"^model name\s*: (.+)$", _CPUINFO.read_text(), re.MULTILINE) if _CPUINFO.exists() else None
    threads = torch.get_num_threads()
    return f"{model[1].strip() if model else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def version(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def today() -> str:
    """The date (UTC)."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")
