"""The columns that say where a bench's figures come from."""

from __future__ import annotations

from pathlib import Path

import torch
import triton

from fftriton.runtime.provenance import commit as commit_of_checkout
from fftriton.runtime.provenance import device_name, today, version

ROOT = Path(__file__).resolve().parents[1]


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
        "commit": commit or commit_of_checkout() or "unknown",
        "date": today(),
    }
