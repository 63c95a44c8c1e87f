"""The device to compute on."""

from __future__ import annotations

import torch


def choose_device(name: str | None) -> torch.device:
    """The named device; None for the GPU if there is one, or else the CPU.

    Raises:
        ValueError: torch cannot use the device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device must be one that torch can use here, got '{name}'") from error
    return device
