"""Where a bench's figures come from: device, versions, commit and date. Needs torch and triton."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
CPUINFO = Path("/proc/cpuinfo")


def provenance(device: str, commit: str | None = None, also: tuple[str, ...] = ()) -> dict[str, str]:
    """What every row of results carries.

    Args:
        device: "cuda" or "cpu".
        commit: what to call this commit, if there is no git.
        also: more packages whose versions matter.

    Returns:
        The device's name, the version of each package, the commit and today's date (UTC), by column.
    """
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{package: version(package) or "" for package in also},
        "commit": commit or checked_out(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def device_name(device: str) -> str:
    """The GPU's name; or the processor's, and how many threads compute."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else None
    threads = torch.get_num_threads()
    return f"{model[1].strip() if model else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def version(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def checked_out() -> str:
    """The commit, with -dirty after it if files differ from it; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
