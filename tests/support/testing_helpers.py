"""What several test files share: inputs, shapes, and the rule that judges floating point errors."""

import builtins
import mmap
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from fftriton_kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # B, F, P, D
    (1, 2, 1, 1),
    (2, 3, 7, 65),  # nothing is a power of two
    (1, 5, 13, 129),  # D crosses a block edge
    (1, 1, 9, 64),  # one frame: no partner anywhere
]


def make_video(B: int, F: int, P: int, D: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """[B, F * P, D]: patches that drift from frame to frame, at rates of their own, and now and then cut."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.rand(B, P, 1, generator=generator)
    frames = [torch.randn(B, P, D, generator=generator)]
    for _ in range(F - 1):
        cut = torch.rand(B, P, 1, generator=generator) < 0.2
        step = torch.randn(B, P, D, generator=generator)
        frames.append(torch.where(cut, step, frames[-1] + rate * step))
    return torch.stack(frames, 1).reshape(B, F * P, D).to(device=device, dtype=dtype)


def make_strided(x: Tensor) -> Tensor:
    """The values of x at strides that no contiguous tensor has; what lies between is NaN or the largest integer."""
    if x.is_floating_point() or x.is_complex():
        fill = float("nan")
    else:
        fill = torch.iinfo(x.dtype).max if x.dtype != torch.bool else True
    holder = torch.full([2 * size + 1 for size in x.shape], fill, dtype=x.dtype, device=x.device)
    view = holder[tuple(slice(1, 2 * size + 1, 2) for size in x.shape)]
    return view.copy_(x)


def assert_no_worse_than_torch(out: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The error of `out` against fp64 is at most twice eager torch's worst, plus one rounding.

    Args:
        out: the op's result.
        eager: what plain PyTorch gives in the input's dtype.
        truth: the same in fp64. NaN and Inf must stand in the same places in `out`.
    """
    assert out.shape == truth.shape
    assert truth.dtype == torch.float64
    finite = truth.isfinite()
    torch.testing.assert_close(out.double()[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    truth = truth[finite]
    worst = (eager.double()[finite] - truth).abs().max() if truth.numel() else 0.0
    excess = (out.double()[finite] - truth).abs() - 2 * worst - truth.abs() * torch.finfo(out.dtype).eps
    assert bool((excess <= 0).all()), (
        f"{int((excess > 0).sum())} of {excess.numel()} too far by up to {excess.max():.3e}"
    )


def assert_column_sum(out: Tensor, q: Tensor, k: Tensor, **options: Any) -> None:
    """The error of attention_column_sum against fp64 is at most twice the reference's own, plus a rounding of scores.

    Args:
        out: the op's result.
        q: the queries that it was given.
        k: the keys.
        **options: its other arguments.
    """
    truth = reference.attention_column_sum(q.double(), k.double(), **options)
    eager = reference.attention_column_sum(q, k, **options)
    assert out.dtype == torch.float32
    assert out.shape == truth.shape
    # one rounding of a score is a relative error of the score's size; how many the sums cancel is chance
    peak = q.double().norm(dim=-1).amax() * k.double().norm(dim=-1).amax()
    peak *= options.get("scale") or q.shape[-1] ** -0.5
    rounding = truth.abs() * torch.finfo(torch.float32).eps / 2 * (1 + peak)
    allowed = 2 * (eager - truth).abs().amax(-1, keepdim=True) + rounding
    assert ((out - truth).abs() <= allowed).all(), (
        f"off by {(out - truth).abs().max():.2e}, eager {allowed.max() / 2:.2e}"
    )


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Triton's interpreter runs the programs of each grid in a random order (seed 0: backwards)."""
    from triton.runtime import interpreter

    def shuffled(*bounds: int) -> Sequence[int]:
        order = builtins.range(*bounds)
        if sys._getframe(1).f_code.co_name != "__call__":  # not the loop over the grid
            return order
        return order[::-1] if seed == 0 else random.Random(seed).sample(order, len(order))

    interpreter.range = shuffled
    try:
        yield
    finally:
        del interpreter.range


def far_rows(x: Tensor, row_stride: int = 1_100_000_000) -> Tensor:
    """x [1, N, ...] with 1.1e9 elements from row to row: from row 2 on, a 32-bit offset wraps around.

    Only the pages in use take memory. A wrapped offset reads zeros that stand in front, so a broken kernel gives wrong
    numbers and does not crash.
    """
    wrapped = 2**32  # elements that a wrapped offset may go back
    extent = wrapped + row_stride * (x.shape[1] - 1) + x[0, 0].numel()
    if x.is_cuda:
        torch.cuda.empty_cache()
        if extent * x.element_size() > torch.cuda.mem_get_info()[0]:
            raise SkipTest(f"needs {extent * x.element_size() / 1e9:.0f} GB of free GPU memory")
        buffer = x.new_zeros(extent)
    else:
        reserved = mmap.mmap(-1, extent * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        buffer = torch.frombuffer(reserved, dtype=x.dtype)
    inner = torch.empty(x.shape[2:]).stride()
    return buffer.as_strided(x.shape, (0, row_stride, *inner), wrapped).copy_(x)
