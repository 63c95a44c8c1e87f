"""What one way of running a model costs: time to the first token, time per token after it, peak memory."""

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
from transformers.generation.streamers import BaseStreamer

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size
_STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """Medians over repeated runs.

    Attributes:
        prefill: seconds to the first token, vision encoder included.
        decode: seconds per token after the first.
        peak_memory: the most bytes in use above what was in use before; None where the system does not tell.
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


class TokenClock(BaseStreamer):
    """Notes when each new token arrives; `generate` copies it to the host first, so the device has finished it.

    Args:
        on_token: called with the number of new tokens so far.
    """

    def __init__(self, on_token: Callable[[int], None] | None = None):
        self.times: list[float] = []
        self._on_token = on_token
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.times.append(time.perf_counter())
        if self._on_token is not None:
            self._on_token(len(self.times))

    def end(self) -> None:
        """Called by `generate` when it is done."""


def generate(model: Any, inputs: dict[str, Tensor], clock: TokenClock, most: int, least: int = 0) -> Tensor:
    """Generate greedily.

    Args:
        model: a Hugging Face generation model.
        inputs: its arguments for one prompt.
        clock: told of every token.
        most, least: bounds of the number of new tokens.

    Returns:
        [n] int64: the new tokens.
    """
    output = model.generate(
        **inputs, streamer=clock, do_sample=False, num_beams=1, max_new_tokens=most, min_new_tokens=least
    )
    return output[0, inputs["input_ids"].shape[1] :]


def time_generation(
    model: Any, inputs: dict[str, Tensor], reducing: AbstractContextManager[Any], decode_tokens: int, cost: Cost
) -> None:
    """Run once and add what it took to `cost`.

    Args:
        model: a Hugging Face generation model, warmed up.
        inputs: its arguments for one prompt.
        reducing: the context to run in, `fftriton.reduce(...)` or none.
        decode_tokens: tokens to generate after the first, at least 1.
        cost: collects the figures.
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
    """Median seconds of a call."""
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
    """Reset the peak and return the bytes in use now; None where the peak cannot be reset or read."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what the last run freed still counts as in use
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return _status_bytes("VmRSS")
    except (OSError, AttributeError):  # no Linux, no permission, no glibc
        return None


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    """A figure of this process's status, which is in kB."""
    match = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} does not state {name}")
    return int(match[1]) * 1024
