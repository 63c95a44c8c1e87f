"""Micro-benchmarks of the CPU implementations, for pytest-benchmark to compare with a saved run.

One thread's processor time, which other programs disturb less than the time on the clock.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench.kernels.ops import OPS, Shape

SHAPE = Shape(4, 896, 14, 2, 64)
SHORT = Shape(1, 896, 14, 2, 64)  # for what grows with the square of the tokens
THREADS = 1
BY_NAME = {op.name: op for op in OPS}


@pytest.mark.benchmark(timer=time.process_time, min_rounds=20, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("name", BY_NAME)
def test_cpu(name: str, benchmark) -> None:
    torch.set_num_threads(THREADS)
    op = BY_NAME[name]
    shape = SHORT if op.flops is not None else SHAPE
    benchmark(op.providers["fftriton"].run, **op.inputs(shape, torch.float32, "cpu"))
