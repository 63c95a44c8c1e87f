"""What the checks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, tuple)


def poison() -> None:
    """From here on torch.empty comes filled with NaN or the largest integer, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def thrice(call: Callable[[], Result]) -> Result:
    """The result of a call, three runs of which must agree in every bit."""
    first = call()
    assert all(same_bits(first, call()) for _ in range(2)), "three runs differ in bits"
    return first


def same_bits(one: Any, other: Any) -> bool:
    """Whether two results are the same, NaNs included."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, tuple):
        return all(map(same_bits, one, other))
    return one == other


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def assert_equal(ours: Sequence[Any], expected: Sequence[Any]) -> None:
    """Integer results on any device equal those on the CPU."""
    for index, (one, other) in enumerate(zip(ours, expected, strict=True)):
        same = torch.equal(one.cpu(), other) if isinstance(one, Tensor) else one == other
        assert same, f"output {index} differs from the reference"


def on_cpu(value: Any) -> Any:
    """A tensor's copy on the CPU, or the value itself."""
    return value.cpu() if isinstance(value, Tensor) else value


def packed(lengths: Sequence[int], device: str) -> Tensor:
    """[S+1] int32: the bounds of packed sequences of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
