"""Where an op runs, and the checks that every public function makes before any work."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""True when Triton's interpreter runs the kernels on CPU tensors: read once, as Triton itself does."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)
_LARGEST = torch.finfo(torch.float32).max
_MOST = 2**31 - 1  # rows, which the kernels count in 32 bits


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernel serves this tensor; `_cpu` does otherwise."""
    return tensor.is_cuda or (INTERPRET and tensor.device.type == "cpu")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv costs 3 us a call."""
    return -(-a // b)


def block(size: int, least: int = 16) -> int:
    """The power of two that covers `size`."""
    return max(least, 1 << (size - 1).bit_length())


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise a TypeError that names the op, the argument, the dtypes it takes and the one it got."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        raise TypeError(f"{op}: {name} must have dtype {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, **sizes: int | None) -> None:
    """Raise a ValueError unless the dimensions are as named, e.g. `B=x.shape[0], N=None` (None: any size)."""
    shape = tensor.shape
    if len(shape) == len(sizes):
        for want, got in zip(sizes.values(), shape, strict=True):  # a generator takes twice as long
            if want is not None and want != got:
                break
        else:
            return
    rule = ", ".join(axis if want is None else f"{axis}={want}" for axis, want in sizes.items())
    raise ValueError(f"{op}: {name} must have shape [{rule}], got {list(shape)}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError unless all tensors are on one device."""
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        first = first or tensor.device
        if tensor.device != first:
            devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
            raise ValueError(f"{op}: all tensors must be on one device, got {devices}")


def is_int(value: object) -> bool:
    """Whether `value` is an int, or one that a trace has a symbol for."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_at_least(op: str, name: str, value: int, least: int) -> None:
    """Raise unless `value` is an int of at least `least`."""
    if not is_int(value):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def check_rows(op: str, name: str, value: int) -> None:
    """Raise unless `value` is an int that a number of rows can be."""
    check_at_least(op, name, value, 0)
    if value > _MOST:
        raise ValueError(f"{op}: {name} must be at most {_MOST}, got {value}")


def check_stride(op: str, name: str, value: int, length: int) -> int:
    """Raise unless `value` is an int of at least 1; the stride, or the least that reaches over all tokens."""
    check_at_least(op, name, value, 1)
    return min(value, max(length, 1))


def check_most(op: str, name: str, value: int, most: int = 65535) -> None:
    """Raise unless a kernel can have a size; that of the batch is an axis of grids, which ends at 65535 programs."""
    if value > most:
        raise ValueError(f"{op}: {name} must be at most {most} for a Triton kernel, got {value}")


def check_float(op: str, name: str, value: float) -> None:
    """Raise unless `value` is a float (or int)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")


def is_finite(value: float) -> bool:
    """Whether `value` is finite in fp32, as kernels take it."""
    return abs(value) <= _LARGEST


def check_below(op: str, name: str, index: Tensor, axis: str, size: int) -> None:
    """Raise unless an index on a CPU is below `size`. On a GPU the host would have to wait: kernels mask it."""
    if index.device.type == "cpu" and index.numel() and (highest := int(index.max())) >= size:
        raise ValueError(f"{op}: {name} must be below {axis}={size}, got {highest}")
