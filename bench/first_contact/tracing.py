"""What the profiler sees of one call: launches, waits of the host, gaps in which the device has nothing to do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import findings

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def trace(name: str, call: Callable[[], Any], device: str, out: Path) -> dict[str, Any]:
    """Profile one call, append the profiler's table to a file, and sum up what the device did.

    Returns:
        launches and waits by name, milliseconds from the first kernel to the last, busy and idle, the largest gaps with
        the kernels that ended them, and our own kernels' times.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as recorded:
        call()
        synchronize(device)
    with (out / findings.PROFILE).open("a") as file:
        table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
        file.write(f"# {name}\n{table}\n")
    calls = Counter(event.name for event in recorded.events() if event.name.startswith("cu"))
    found = {
        "launches": sum(calls[name] for name in LAUNCHES),
        "waits": {name: count for name, count in calls.items() if "Synchronize" in name},
    }
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
    )
    return found | (busy_and_idle(kernels) if kernels else {})


def busy_and_idle(kernels: list[tuple[float, float, str]]) -> dict[str, Any]:
    """(begin, end, name) in microseconds, in order -> how busy the device was."""
    busy, gaps, reached, ours = 0.0, [], kernels[0][0], Counter[str]()
    for begin, end, name in kernels:
        if begin > reached:
            gaps.append((round(begin - reached, 1), name[:40]))
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        if name.startswith("_") and name.endswith("_kernel"):
            ours[name] += end - begin
    return {
        "kernels": len(kernels), "span_ms": (reached - kernels[0][0]) / 1e3, "busy_ms": busy / 1e3,
        "idle_ms": sum(gap for gap, _ in gaps) / 1e3, "largest_gaps_us": sorted(gaps, reverse=True)[:8],
        "our_kernels_us": {name: round(time, 1) for name, time in ours.most_common()},
    }  # fmt: skip


def elapsed_ms(call: Callable[[], Any], device: str, runs: int = 5) -> list[float]:
    """Elapsed milliseconds of a call, each from an idle device to an idle device, so the host's time is part of it."""
    times = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()
