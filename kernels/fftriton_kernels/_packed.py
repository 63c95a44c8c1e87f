"""Packed sequences: many of any length one after the other, without a batch dimension, as flash-attention takes them.

Sequence s is the rows cu_seqlens[s] .. cu_seqlens[s + 1] - 1 of a packed tensor [T, ...]. Indices count from the start
of the packed tensor, so they index it directly, and most ops need no more than a batch of one.
"""

from __future__ import annotations

from torch import Tensor

from ._dispatch import INDICES, check_at_least, check_dtype, check_same_device, check_shape


def any_rows(packed: bool) -> dict[str, int | None]:
    """The leading dimensions of the first argument, for `check_shape`."""
    return {"T": None} if packed else {"B": None, "N": None}


def rows_of(x: Tensor, packed: bool) -> dict[str, int | None]:
    """The leading dimensions that the other arguments share with x, for `check_shape`."""
    return {"T": x.shape[0]} if packed else {"B": x.shape[0], "N": x.shape[1]}


def check_cu_seqlens(
    op: str, cu_seqlens: Tensor | None, name: str, like: Tensor, max_seqlen: int | None = None
) -> None:
    """Raise unless cu_seqlens, where given, is [S+1] int32 or int64 beside `like`, and max_seqlen an int or None."""
    if cu_seqlens is not None:
        check_dtype(op, "cu_seqlens", cu_seqlens, INDICES)
        check_shape(op, "cu_seqlens", cu_seqlens, **{"S+1": None})
        if not cu_seqlens.shape[0]:
            raise ValueError(f"{op}: cu_seqlens must have shape [S+1], got [0]")
        check_same_device(op, **{name: like, "cu_seqlens": cu_seqlens})
    if max_seqlen is not None:
        check_at_least(op, "max_seqlen", max_seqlen, 0)
        if cu_seqlens is None:
            raise ValueError(f"{op}: max_seqlen goes with cu_seqlens, got {max_seqlen} without")


def check_capacity(op: str, capacity: int | None) -> None:
    """Raise unless capacity is None or an int of at least 0."""
    if capacity is not None:
        check_at_least(op, "capacity", capacity, 0)


def longest(cu_seqlens: Tensor, max_seqlen: int | None, total: int) -> int:
    """The length of the longest sequence; without max_seqlen the host waits for it."""
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    return max(min(max_seqlen, total), 0)
