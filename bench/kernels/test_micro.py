"""Micro-benchmarks of the CPU implementations, for pytest-benchmark to compare with a saved run.

pytest bench/kernels/test_micro.py
"""

from __future__ import annotations

import pytest
import torch
from ops import OPS, Shape

SHAPE = Shape(4, 896, 14, 2, 64)
THREADS = 1
BY_NAME = {op.name: op for op in OPS}


@pytest.mark.benchmark(min_rounds=20, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("name", BY_NAME)
def test_cpu(name: str, benchmark) -> None:
    torch.set_num_threads(THREADS)
    benchmark(BY_NAME[name].providers["fftriton"].run, **BY_NAME[name].inputs(SHAPE, torch.float32, "cpu"))
