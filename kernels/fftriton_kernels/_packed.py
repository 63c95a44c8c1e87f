"""Packed sequences: many of any length one after the other, without a batch dimension, as flash-attention takes them.

Sequence s is the rows cu_seqlens[s] .. cu_seqlens[s + 1] - 1 of a packed tensor [T, ...]. Indices count from the start
of the packed tensor, so they index it directly, and most ops need no more than a batch of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import INDICES, check_at_least, check_dtype, check_rows, check_same_device, check_shape


def any_rows(packed: bool) -> dict[str, int | None]:
    """The leading dimensions of the first argument, for `check_shape`."""
    return {"T": None} if packed else {"B": None, "N": None}


def rows_of(x: Tensor, packed: bool) -> dict[str, int | None]:
    """The leading dimensions that the other arguments share with x, for `check_shape`."""
    shape = x.shape
    return {"T": shape[0]} if packed else {"B": shape[0], "N": shape[1]}


def check_cu_seqlens(
    op: str, cu_seqlens: Tensor | None, name: str, like: Tensor, *, values: bool = True, to_the_end: bool = False
) -> None:
    """Raise unless cu_seqlens, where given, is [S+1] int32 or int64 beside `like` [T, ...].

    Args:
        values: look at its values, too.
        to_the_end: the last sequence must end at T.
    """
    if cu_seqlens is not None:
        check_dtype(op, "cu_seqlens", cu_seqlens, INDICES)
        check_shape(op, "cu_seqlens", cu_seqlens, **{"S+1": None})
        if not cu_seqlens.shape[0]:
            raise ValueError(f"{op}: cu_seqlens must have shape [S+1], got [0]")
        check_same_device(op, **{name: like, "cu_seqlens": cu_seqlens})
        if values:
            check_bounds(op, "cu_seqlens", cu_seqlens, "T", like.shape[0], to_the_end)


def check_bounds(op: str, name: str, bounds: Tensor, axis: str, total: int, to_the_end: bool = False) -> None:
    """Raise unless bounds on a CPU ascend from 0 to `total`. On a GPU the host would have to wait.

    Rows before the first sequence, as padding is, are in none, and so are those behind the last, except `to_the_end`.
    """
    if bounds.device.type == "cpu" and type(bounds) is Tensor and not torch.compiler.is_compiling():  # it has values
        values = bounds.tolist()
        wrong_end = values[-1] != total if to_the_end else values[-1] > total
        if values != sorted(values) or values[0] < 0 or wrong_end:
            raise ValueError(f"{op}: {name} must ascend from 0 to {axis}={total}, got {values}")


def check_max_seqlen(op: str, name: str, max_seqlen: int | None, total: int, cu_seqlens: Tensor | None) -> int | None:
    """Raise unless max_seqlen is None, or an int beside cu_seqlens; that, or `total`, if all rows are fewer."""
    if max_seqlen is None:
        return None
    check_at_least(op, name, max_seqlen, 0)
    if cu_seqlens is None:
        raise ValueError(f"{op}: {name} goes with cu_seqlens, got {max_seqlen} without")
    return min(max_seqlen, total)


def check_capacity(op: str, capacity: int | None) -> None:
    """Raise unless capacity is None or an int that a number of rows can be."""
    if capacity is not None:
        check_rows(op, "capacity", capacity)


def sequence_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """[T] int64: the sequence of each packed token; -1 before the first, S after the last."""
    position = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), position, right=True) - 1


def strided_predecessor(
    batch: int, length: int, stride: int, device: torch.device, cu_seqlens: Tensor | None = None
) -> Tensor:
    """[B, N] int64: t - stride, -1 where that is before the start, or the start of its sequence."""
    earlier = torch.arange(length, device=device) - stride
    if cu_seqlens is not None:
        begin = cu_seqlens.long()[sequence_of(cu_seqlens, length).clamp_min(0)]
        earlier = torch.where(earlier >= begin, earlier, -1)
    return earlier.clamp_min(-1).expand(batch, -1)


def lengths_of(kept: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Rows that are no padding: kept [B, K] -> [B] int64; packed, [K] ascending -> [S]."""
    if cu_seqlens is None:
        return (kept >= 0).sum(1)
    return torch.searchsorted(kept, cu_seqlens.to(kept.dtype)).diff()
