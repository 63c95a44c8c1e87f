"""How long a call takes, and what the device can do at best."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

WARM_UP = 2
FEWEST, MOST = 5, 200  # timed runs
TURNS = {"cuda": 1, "cpu": 5}
FLUSH_BYTES = 2**28  # more than any L2 cache
HOST_RUNS = 3
SHORTEST_HOLD, LONGEST_HOLD = 2**20, 2**26  # cycles: about 0.5 ms and 35 ms
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True)
class Milliseconds:
    """Quantiles over repeated runs.

    Attributes:
        p20, p50, p80: on a GPU, of the time that the device needs; elapsed time for a call that waits.
        host: on a GPU, what one call takes on the host, from an idle device on.
        waits: the call itself waits for the device, so that what the host does is part of its time.
    """

    p20: float
    p50: float
    p80: float
    host: float | None = None
    waits: bool = False


def time_call(call: Callable[[], Any], device: str, seconds: float) -> Milliseconds:
    """As `time_calls`, for one."""
    return time_calls({"": call}, device, seconds)[""]


def time_calls(calls: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, Milliseconds]:
    """Quantiles of the time of each call.

    Args:
        calls: what to time, by name; in turns on a CPU, so that a busy machine slows all alike.
        device: "cuda": device events, with the L2 cache flushed before each run and the stream held until the host has
            launched everything; "cpu": wall clock.
        seconds: how long to repeat each, within FEWEST and MOST runs.
    """
    timers = {name: DeviceTimer(call) if device == "cuda" else WallClock(call) for name, call in calls.items()}
    fastest = {name: min(timer.sample(WARM_UP)) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS[device]):
        for name, timer in timers.items():
            runs = max(FEWEST, min(MOST, int(seconds * 1e3 / max(fastest[name], 1e-3))))
            times[name] += timer.sample(-(-runs // TURNS[device]))
    return {name: _quantiles(times[name], timer) for name, timer in timers.items()}


def _quantiles(times: list[float], timer: WallClock | DeviceTimer) -> Milliseconds:
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Milliseconds(p20, statistics.median(times), p80, timer.host, timer.waits)


class WallClock:
    """Milliseconds of a call on the clock."""

    host, waits = None, False

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def sample(self, runs: int) -> list[float]:
        """The time of each of so many runs."""
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            self.call()
            times.append((time.perf_counter() - start) * 1e3)
        return times


class DeviceTimer:
    """Milliseconds of a call on the GPU, without the host's.

    A kernel that only spins holds the stream while the host launches. A run counts if the spinning still went on when
    the last launch was made; otherwise the next one is held for longer. A call that even the longest hold does not
    cover waits for the device by itself: `waits` says so, and its runs count from an idle device on.

    Attributes:
        host: milliseconds that one call takes on the host, from an idle device on.
        waits: whether the call waits for the device.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.waits = False
        self._cycles = SHORTEST_HOLD
        call()  # compiles
        times = []
        for _ in range(HOST_RUNS):
            torch.cuda.synchronize()
            times += WallClock(call).sample(1)
        self.host = min(times)

    def sample(self, runs: int) -> list[float]:
        """The time of each of so many runs."""
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        while len(events) < runs:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            _flush_buffer().zero_()
            if self.waits:  # held, it would not count what the host does until it waits
                torch.cuda.synchronize()
            else:
                torch.cuda._sleep(self._cycles)
            start.record()
            self.call()
            end.record()
            if self.waits or not start.query():
                events.append((start, end))
            elif self._cycles < LONGEST_HOLD:
                self._cycles *= 2
            else:
                self.waits = True
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


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


def free_bytes(device: str) -> int:
    """Memory that may still be taken."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
