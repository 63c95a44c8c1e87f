"""Kernel tests run the kernels, on memory that shows what was never written."""

from collections.abc import Iterator

import pytest
import torch
from triton_interpreter import trouble

from fftriton_kernels import _dispatch


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """CPU tensors run the kernels in Triton's interpreter; torch.empty comes filled with NaN and the like."""
    if _dispatch.INTERPRET and (reason := trouble()):
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
