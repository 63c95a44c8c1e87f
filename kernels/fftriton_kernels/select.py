"""Which tokens stay, and taking their rows.

    topk:       kept = {t not a candidate} + {t: fewer than k candidates are better},   in ascending order
    segmented:  kept = {t in no segment} + {t: fewer than counts[segment of t] of its segment are better}

Better is a higher score, then a lower index; NaN is worse than any number. Top-k is an exact radix select (`_radix`),
bound by latency. Segments come from one stable sort of (segment, score) keys: in sorted order a token stays unless the
one counts[s] places earlier is of the same segment. Rows are copied by `_gather`, bound by DRAM bandwidth.
Reference: reference.topk_keep, reference.segmented_topk_keep, reference.gather_rows.
Source: FastV, arXiv:2403.06764, and FrameFusion, arXiv:2501.01986, prune so.
"""

from __future__ import annotations

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _cpu, _radix
from ._dispatch import (
    FLOATS,
    INDICES,
    cdiv,
    check_at_least,
    check_below,
    check_dtype,
    check_same_device,
    check_shape,
    runs_triton,
)
from ._gather import gather
from ._operators import operator
from ._packed import any_rows, check_capacity, check_cu_seqlens, check_max_seqlen, lengths_of, rows_of
from ._specialisation import VARYING

_BLOCK = 1024  # tokens a program


@triton.jit(do_not_specialize=VARYING)
def _segment_keys_kernel(
    scores_ptr, segments_ptr, keys_ptr,            # scores, segments [B, N], keys [B, N] int64
    stride_sb, stride_sn,
    stride_gb, stride_gn,
    N, S,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B): ascending keys are ascending segments, best first within each
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = offs_n < N
    x = tl.load(scores_ptr + pid_b * stride_sb + offs_n * stride_sn, mask=mask, other=0.0).to(tl.float32)
    segment = tl.load(segments_ptr + pid_b * stride_gb + offs_n * stride_gn, mask=mask, other=0).to(tl.int64)
    segment = tl.minimum(tl.maximum(segment, -1), S)
    key = (segment << 32) | (0xFFFFFFFF - _radix.sort_key(x, mask).to(tl.int64))
    tl.store(keys_ptr + pid_b * N + offs_n, key, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _segment_keep_kernel(
    keys_ptr, order_ptr, counts_ptr, keep_ptr,     # keys, order [B, N] int64 sorted, counts [B, S], keep [B, N] int8
    stride_cb, stride_cs,
    N, S,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B): one program looks at BLOCK_N places of the sorted order
    pid_b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = place < N
    keys_ptr += pid_b * N
    segment = tl.load(keys_ptr + place, mask=mask, other=0) >> 32
    counted = mask & (segment >= 0) & (segment < S)
    count = tl.load(counts_ptr + pid_b * stride_cb + segment * stride_cs, mask=counted, other=0)
    earlier = place - tl.maximum(count, 0)
    rival = tl.load(keys_ptr + earlier, mask=mask & (earlier >= 0), other=0) >> 32
    keep = (segment < 0) | (earlier < 0) | (rival != segment)
    token = tl.load(order_ptr + pid_b * N + place, mask=mask, other=0)
    tl.store(keep_ptr + pid_b * N + token, keep.to(tl.int8), mask=mask)


def _fake_kept(scores, bound, bounds, candidates, cu_seqlens=None, capacity=None):
    known = bounds is None and candidates is None and cu_seqlens is None
    rows = bound if known else None
    if capacity is not None:
        rows = capacity
    if rows is None:
        rows = torch.library.get_ctx().new_dynamic_size()
    leading = scores.shape[:-1]
    return scores.new_empty(*leading, rows, dtype=torch.int64), scores.new_empty(leading or 1, dtype=torch.int64)


@operator(
    "topk_keep",
    "(Tensor scores, SymInt bound, Tensor? bounds, Tensor? candidates, Tensor? cu_seqlens=None,"
    " SymInt? capacity=None) -> (Tensor, Tensor)",
    fake=_fake_kept,
)  # fmt: skip
def _topk_keep(
    scores: Tensor,
    bound: int,
    bounds: Tensor | None,
    candidates: Tensor | None,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """kept [B, K] and lengths [B]; packed, [K] and the [1] of all sequences together."""
    k = bound if bounds is None else bounds
    rows = capacity
    if rows is None and bounds is None and candidates is None and cu_seqlens is None:
        rows = bound  # else only the device knows
    if not scores.numel():
        kept = scores.new_full((*scores.shape[:-1], rows or 0), -1, dtype=torch.int64)
        return kept, kept.new_zeros(kept.shape[:-1] or 1)
    if not runs_triton(scores):
        return _cpu.topk_keep(scores, k, candidates, cu_seqlens=cu_seqlens, capacity=capacity)
    kept, lengths = _radix.topk(scores, k, candidates, cu_seqlens, rows)
    return kept if cu_seqlens is None else kept[0], lengths


def _fake_segmented(scores, segments, counts, capacity=None):
    rows = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    return scores.new_empty(scores.shape[0], rows, dtype=torch.int64)


@operator(
    "segmented_topk_keep",
    "(Tensor scores, Tensor segments, Tensor counts, SymInt? capacity=None) -> Tensor",
    fake=_fake_segmented,
)  # fmt: skip
def _segmented_topk_keep(scores: Tensor, segments: Tensor, counts: Tensor, capacity: int | None = None) -> Tensor:
    batch, length = scores.shape
    check_below("segmented_topk_keep", "segments", segments, "S", counts.shape[1])
    if not scores.numel():
        return scores.new_full((batch, capacity or 0), -1, dtype=torch.int64)
    if not runs_triton(scores):
        return _cpu.segmented_topk_keep(scores, segments, counts, capacity)
    keys = scores.new_empty(batch, length, dtype=torch.int64)
    keep = scores.new_empty(batch, length, dtype=torch.int8)
    grid = (cdiv(length, _BLOCK), batch)
    with torch.cuda.device_of(scores):
        _segment_keys_kernel[grid](
            scores, segments, keys, *scores.stride(), *segments.stride(), length, counts.shape[1],
            BLOCK_N=_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        keys, order = torch.sort(keys, dim=1, stable=True)
        _segment_keep_kernel[grid](
            keys, order, counts, keep, *counts.stride(), length, counts.shape[1],
            BLOCK_N=_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return _radix.compact("segmented_topk_keep", keep, capacity)[0]


@overload
def topk_keep(
    scores: Tensor,
    k: int | Tensor,
    candidates: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    capacity: None = None,
) -> Tensor: ...


@overload
def topk_keep(
    scores: Tensor,
    k: int | Tensor,
    candidates: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    capacity: int,
) -> tuple[Tensor, Tensor]: ...


def topk_keep(
    scores: Tensor,
    k: int | Tensor,
    candidates: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    capacity: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the positions of the k tokens with the highest scores, in their original order.

    If k is a tensor, or with candidates or packed sequences, the number of rows depends on the data, and the host waits
    for it once. It does not wait if a capacity is given, or if k is an int and all tokens of a batch compete.

    Args:
        scores: [B, N] fp16, bf16 or fp32, any strides. Ties go to the lower index; NaN is below every number.
        k: how many tokens to keep per sample, 0 <= k <= N; or int32 or int64 [B] on the device of `scores`, whose
            values are clamped to 0..N.
        candidates: [B, N] bool, any strides: only these compete for the k places, all others stay. If None, all
            compete.
        cu_seqlens: [S+1] int32 or int64, ascending from 0 to T (not checked, because that would stall a GPU). scores
            and candidates [T] then hold packed sequences, and k applies to each of them; as a tensor it is [S]. If a
            sequence has fewer than k candidates, all of them stay.
        max_seqlen: the length of the longest packed sequence, or more. Nothing depends on it any more.
        capacity: the number of rows to return, at least the number that a sample (packed: all sequences together)
            keeps; N (packed: T) always suffices. If it is too small, the last rows are returned.

    Returns:
        [B, K] int64 ascending. K is the most that a sample keeps (k, if it is an int and all compete); the others are
        padded with -1 on the left.
        Packed: [K] int64 ascending, positions among all T tokens, which index packed tensors.
        With a capacity: a tuple (kept, lengths). K is the capacity, and lengths [B] (packed: [S]) int64 says how many
        rows of each sample (packed: sequence) are not padding. Padding is on the left.

    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape or a value that does not fit the above, or tensors on
            two devices.

    Source:
        FastV, arXiv:2403.06764; FrameFusion, arXiv:2501.01986.
    """
    op = "topk_keep"
    packed = cu_seqlens is not None
    check_dtype(op, "scores", scores, FLOATS)
    check_shape(op, "scores", scores, **any_rows(packed))
    check_cu_seqlens(op, cu_seqlens, "scores", scores)
    check_max_seqlen(op, "max_seqlen", max_seqlen, scores.shape[-1], cu_seqlens)
    check_capacity(op, capacity)
    bound, bounds = 0, None
    if isinstance(k, Tensor):
        check_dtype(op, "k", k, INDICES)
        check_shape(op, "k", k, **({"B": scores.shape[0]} if cu_seqlens is None else {"S": cu_seqlens.shape[0] - 1}))
        bounds = k
    else:
        check_at_least(op, "k", k, 0)
        if not packed and k > scores.shape[1]:
            raise ValueError(f"{op}: k must be at most N={scores.shape[1]}, got {k}")
        bound = min(k, scores.shape[-1])
    if candidates is not None:
        check_dtype(op, "candidates", candidates, (torch.bool,))
        check_shape(op, "candidates", candidates, **rows_of(scores, packed))
    check_same_device(op, scores=scores, k=bounds, candidates=candidates)
    kept, lengths = _topk_keep(scores, bound, bounds, candidates, cu_seqlens, capacity)
    if capacity is None:
        return kept
    return kept, lengths if cu_seqlens is None else lengths_of(kept, cu_seqlens)


@overload
def segmented_topk_keep(
    scores: Tensor,
    segments: Tensor,
    counts: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    capacity: None = None,
) -> Tensor: ...


@overload
def segmented_topk_keep(
    scores: Tensor,
    segments: Tensor,
    counts: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    capacity: int,
) -> tuple[Tensor, Tensor]: ...


def segmented_topk_keep(
    scores: Tensor,
    segments: Tensor,
    counts: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the positions of the best tokens of every segment, such as a frame, in their original order.

    The host waits once, for the number of rows; with a capacity it does not.

    Args:
        scores: [B, N] fp16, bf16 or fp32, any strides. Ties go to the lower index; NaN is below every number.
        segments: [B, N] or [N] int32 or int64, any strides: the segment of each token, 0..S-1, in any order. Tokens of
            segment -1 always stay. On a GPU, tokens of a segment of S or more do not stay: checking for them would
            stall the GPU.
        counts: [B, S] or [S] int32 or int64, any strides: how many tokens of each segment stay. A segment with fewer
            keeps all of them; a negative count keeps none.
        cu_seqlens: [sequences + 1] int32 or int64, ascending from 0 to T (not checked). scores and segments [T] then
            hold packed sequences, and counts is [S]. No two sequences share a segment number.
        capacity: the number of rows to return, at least the number that a sample (packed: all sequences together)
            keeps; N (packed: T) always suffices. If it is too small, the last rows are returned.

    Returns:
        [B, K] int64 ascending. K is the most that a sample keeps; the others are padded with -1 on the left.
        Packed: [K] int64 ascending, positions among all T tokens.
        With a capacity: a tuple (kept, lengths). K is the capacity, and lengths [B] (packed: one per sequence) int64
        says how many rows of each sample are not padding. Padding is on the left.

    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape or a value that does not fit the above, or tensors on
            two devices.

    Source:
        KVTP, arXiv:2503.10742, in which each frame has a budget of its own.
    """
    op = "segmented_topk_keep"
    packed = cu_seqlens is not None
    check_dtype(op, "scores", scores, FLOATS)
    check_shape(op, "scores", scores, **any_rows(packed))
    check_cu_seqlens(op, cu_seqlens, "scores", scores)
    check_capacity(op, capacity)
    check_dtype(op, "segments", segments, INDICES)
    check_dtype(op, "counts", counts, INDICES)
    if packed:
        check_shape(op, "segments", segments, T=scores.shape[0])
        check_shape(op, "counts", counts, S=None)
        check_same_device(op, scores=scores, segments=segments, counts=counts)
        kept = _segmented_topk_keep(scores[None], segments[None], counts[None], capacity)[0]
    else:
        batch, length = scores.shape
        segments = segments.expand(batch, -1) if segments.ndim == 1 else segments
        counts = counts.expand(batch, -1) if counts.ndim == 1 else counts
        check_shape(op, "segments", segments, B=batch, N=length)
        check_shape(op, "counts", counts, B=batch, S=None)
        check_same_device(op, scores=scores, segments=segments, counts=counts)
        kept = _segmented_topk_keep(scores, segments, counts, capacity)
    return kept if capacity is None else (kept, lengths_of(kept, cu_seqlens))


def gather_rows(kept: Tensor, *tensors: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """Copy the same rows of many tensors, bit for bit. Differentiable: gradients add up at the rows taken.

    Up to six tensors share a launch.

    Args:
        kept: [B, K] int32 or int64, any strides: the rows to take, in any order; -1 gives a row of zeros. On a GPU so
            do values of N or more: checking for them would stall the GPU.
        tensors: each [B, N, ...] of any dtype, on the device of `kept`, any strides. PyTorch's own gather takes those
            whose rows are not one or two runs of neighbours in memory.
        cu_seqlens: [S+1] int32 or int64. kept [K] and tensors [T, ...] are then packed. Which sequence a row belongs to
            does not matter here.

    Returns:
        A tuple with each tensor's rows, [B, K, ...] contiguous; [K, ...] packed.

    Raises:
        TypeError: `kept` of another dtype, or something that is not a tensor. ValueError: a shape that does not fit the
            above, tensors on two devices, or, on a CPU, a position of N or more.

    Source:
        FastV, arXiv:2403.06764; FrameFusion, arXiv:2501.01986.
    """
    op = "gather_rows"
    packed = cu_seqlens is not None
    check_dtype(op, "kept", kept, INDICES)
    if packed:
        check_shape(op, "kept", kept, K=None)
    else:
        check_shape(op, "kept", kept, B=None, K=None)
    check_cu_seqlens(op, cu_seqlens, "kept", kept, values=False)
    batch, axes, leading = kept.shape[:-1], kept.ndim, None
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: tensors[{i}] must be a torch.Tensor, got {type(tensor).__name__}")
        rows = tensor.shape[:axes]
        if leading is None and rows[:-1] == batch and len(rows) == axes:
            leading = rows
        if rows != leading:
            _raise_for_rows(op, f"tensors[{i}]", tensor, kept, tensors[0])
        if tensor.device != kept.device:
            check_same_device(op, kept=kept, **{f"tensors[{i}]": tensor})
    if not tensors:
        return ()
    if packed:
        return tuple(rows[0] for rows in gather(kept[None], [tensor[None] for tensor in tensors]))
    return tuple(gather(kept, tensors))


def _raise_for_rows(op: str, name: str, tensor: Tensor, kept: Tensor, first: Tensor) -> None:
    axis = "T" if kept.ndim == 1 else "N"
    rows = axis if tensor is first else f"{axis}={first.shape[kept.ndim - 1]}"
    rule = f"{rows}, ..." if kept.ndim == 1 else f"B={kept.shape[0]}, {rows}, ..."
    raise ValueError(f"{op}: {name} must have shape [{rule}], got {list(tensor.shape)}")
