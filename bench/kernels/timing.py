"""How long a call takes, what the device can do at best, and what the device is."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WARM_UP = 2
FEWEST, MOST = 5, 200  # timed runs
TURNS = {"cuda": 1, "cpu": 5}
FLUSH_BYTES = 2**28  # more than any L2 cache
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Milliseconds:
    """Quantiles over repeated runs."""

    p20: float
    p50: float
    p80: float


def time_call(call: Callable[[], Any], device: str, seconds: float) -> Milliseconds:
    """As `time_calls`, for one."""
    return time_calls({"": call}, device, seconds)[""]


def time_calls(calls: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, Milliseconds]:
    """Quantiles of the time of each call.

    Args:
        calls: what to time, by name; in turns on a CPU, so that a busy machine slows all alike.
        device: "cuda": device events, with the L2 cache flushed before each run; "cpu": wall clock.
        seconds: how long to repeat each, within FEWEST and MOST runs.
    """
    sample = _cuda_times if device == "cuda" else _wall_times
    fastest = {name: min(sample(call, WARM_UP)) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS[device]):
        for name, call in calls.items():
            runs = max(FEWEST, min(MOST, int(seconds * 1e3 / max(fastest[name], 1e-3))))
            times[name] += sample(call, -(-runs // TURNS[device]))
    return {name: _quantiles(every) for name, every in times.items()}


def _quantiles(times: list[float]) -> Milliseconds:
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Milliseconds(p20, statistics.median(times), p80)


def _wall_times(call: Callable[[], Any], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _cuda_times(call: Callable[[], Any], runs: int) -> list[float]:
    cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        cache.zero_()  # while this runs the host gets ahead, so launches are hidden as they are inside a model
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def copy_gbps(device: str, seconds: float) -> tuple[Milliseconds, float]:
    """Time of a large copy, and GB/s read and written."""
    source = torch.randint(127, (COPY_BYTES[device],), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = time_call(lambda: target.copy_(source), device, seconds)
    return times, 2 * source.numel() / times.p50 / 1e6


def matmul_tflops(device: str, dtype: torch.dtype, seconds: float) -> tuple[Milliseconds, float]:
    """Time of a large square matrix product, and its TFLOP/s."""
    size = MATMUL_SIZE[device]
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = time_call(lambda: left @ right, device, seconds)
    return times, 2 * size**3 / times.p50 / 1e9


def device_name(device: str) -> str:
    """The GPU's name; the processor's, and how many threads compute."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else None
    threads = torch.get_num_threads()
    return f"{model[1].strip() if model else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def free_bytes(device: str) -> int:
    """Memory that may still be taken."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
