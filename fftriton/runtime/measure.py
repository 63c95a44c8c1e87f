"""Cost of running a model: time to the first token, time per later token, peak memory."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .answers import TokenClock, generate

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size
_STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """Cost over repeated runs: medians of the times, and the peak memory.

    Attributes:
        prefill: seconds to the first token, vision encoder included.
        decode: seconds per token after the first.
        peak_memory: maximum bytes in use above those in use before; None if the system does not report them.
    """

    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def prefill(self) -> float:
        return statistics.median(self.prefills)

    @property
    def decode(self) -> float:
        return statistics.median(self.decodes)

    @property
    def peak_memory(self) -> int | None:
        return max(self.peaks, default=None)


def time_generation(
    model: Any, inputs: dict[str, Tensor], reducing: AbstractContextManager[Any], decode_tokens: int, cost: Cost
) -> None:
    """Generate once and add the measurements to `cost`.

    Args:
        model: a Hugging Face generation model, warmed up.
        inputs: the model's inputs for one prompt.
        reducing: context manager to run in: `fftriton.reduce(...)` or one that does nothing.
        decode_tokens: tokens to generate after the first, at least 1.
        cost: collects the measurements.
    """
    clock = TokenClock()
    device = inputs["input_ids"].device
    memory = memory_before(device)
    _synchronize(device)
    with reducing:
        start = time.perf_counter()
        generate(model, inputs, clock, most=1 + decode_tokens, least=1 + decode_tokens)
    cost.prefills.append(clock.times[0] - start)
    cost.decodes.append((clock.times[-1] - clock.times[0]) / decode_tokens)
    if memory is not None:
        cost.peaks.append(peak_memory(device) - memory)


def time_call(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median duration of a call, in seconds."""
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_before(device: torch.device) -> int | None:
    """Reset the peak and return the bytes in use now, or None if the peak cannot be reset or read."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise memory that the last run freed still counts as in use
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return _status_bytes("VmRSS")
    except (OSError, AttributeError):  # not Linux, no permission, or no glibc
        return None


def peak_memory(device: torch.device) -> int:
    """Peak bytes in use since `memory_before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    """A value of this process's status file, which states kB, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} does not contain {name}")
    return int(match[1]) * 1024
