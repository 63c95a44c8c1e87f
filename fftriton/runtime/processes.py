"""The processes that `accelerate launch` or `torchrun` started together."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from .target import Target


@dataclass(frozen=True)
class Process:
    """One of several processes that share the work.

    Attributes:
        index: number of this process, from 0.
        local_index: its number on its machine.
        count: how many there are.
    """

    index: int = 0
    local_index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes results."""
        return self.index == 0

    def own_target(self, target: Target) -> Target:
        """The target on this process's own GPU, unless a device was asked for.

        Raises:
            ValueError: several processes would each spread the model over all devices.
        """
        if self.count > 1 and target.device_map is not None:
            raise ValueError(f"device_map must go without several processes, got '{target.device_map}'")
        if target.device is None and self.count > 1 and torch.cuda.is_available():
            return replace(target, device=f"cuda:{self.local_index}")
        return target


def this_process() -> Process:
    """This process, from the variables that `accelerate launch` and `torchrun` set."""
    index, local, count = (int(os.environ.get(name) or "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return Process(index, local, max(1, count))


def wait_for_all() -> None:
    """Wait until every process has come here.

    Raises:
        ValueError: there are several processes, and accelerate is not installed.
    """
    if this_process().count == 1:
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError("fftriton: several processes need accelerate: pip install 'fftriton[eval]'") from error
    PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
