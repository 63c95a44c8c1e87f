"""How much attention each key receives: the column sums of the attention matrix.

    c[b, n] = 1/H sum_h sum_i exp(scale <q[b, h, i], k[b, h // G, n]> - lse[b, h, i]),   G = H / Hkv

Bound by the tensor cores when every query counts, and by DRAM bandwidth (K is read once) when only the last few do.
The Nq x Nk matrix never exists. A row of a tile is a (query, head of the group) pair, so that one tile of keys serves
its whole query-head group. A key block belongs to one program for each share of the rows, and the shares are added in
order, without float atomics: two runs agree bit for bit.
Reference: reference.attention_column_sum.
Source: FastV, arXiv:2403.06764 (the last query); FrameFusion, arXiv:2501.01986 (all of them).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from ._dispatch import (
    FLOATS,
    INTERPRET,
    block,
    check_at_least,
    check_dtype,
    check_same_device,
    check_shape,
    runs_triton,
)

_UPCAST = tl.constexpr(INTERPRET)  # the interpreter's tl.dot multiplies the raw bits of a bf16
_MOST_WIDTH = 256  # of a head: a whole row stays on chip
_FEW_QUERIES = 8  # whose scores, where one tile holds all pairs, are kept rather than computed twice
_ENOUGH_PROGRAMS = 1024  # to fill a GPU and even out a causal mask; with fewer, programs share a row or a column
_LEAST_KEYS = 256  # of a share of a row
_LEAST_TILES = 8  # of a share of a column


@triton.jit
def _pair_offsets(stride_h, stride_n, pair, GROUP: tl.constexpr):
    # pairs run over the heads of a group first, then over the queries
    return (pair % GROUP).to(tl.int64) * stride_h + (pair // GROUP).to(tl.int64) * stride_n


@triton.jit
def _load_rows(row_ptrs, mask, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # [rows, BLOCK_D], zeros where masked and beyond D
    offs_d = tl.arange(0, BLOCK_D)
    if BLOCK_D == D:
        x = tl.load(row_ptrs[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask[:, None], other=0.0)
    else:
        mask_d = mask[:, None] & (offs_d < D)[None, :]
        x = tl.load(row_ptrs[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask_d, other=0.0)
    if _UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _finite(peak):
    # what a log-sum-exp subtracts: an infinite peak would make NaNs of -inf - -inf
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def _load_norms(peak_ptr, total_ptr, offset, mask):
    # a row of the softmax is exp(score - shift) * weight: 0 where masked and where the row saw nothing
    shift = tl.load(peak_ptr + offset, mask=mask, other=float("inf"))
    shift = tl.where(shift == float("-inf"), float("inf"), shift)
    if total_ptr is None:
        weight = tl.zeros_like(shift) + 1.0
    else:
        total = tl.load(total_ptr + offset, mask=mask, other=1.0)
        weight = tl.where(total == 0.0, 0.0, 1.0 / total)
    return shift, weight


@triton.jit
def _row_norm_kernel(
    q_ptr, k_ptr,                                  # q [B, H, Nq, d], k [B, Hkv, Nk, d]
    peak_ptr, total_ptr,                           # each [shares, B, H, Nq] fp32: max score, sum of exp(score - max)
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_ps, stride_pb, stride_ph, stride_pn,
    scale, Nq, Nk, kv_heads, span,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    # grid (tiles of pairs, shares * Hkv, B): one program takes BLOCK_M pairs over `span` keys; long rows start first
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    share = tl.program_id(1) // kv_heads
    pid_h = (tl.program_id(1) % kv_heads).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    pair = first + tl.arange(0, BLOCK_M)
    mask_m = pair < Nq * GROUP
    q_ptr += pid_b * stride_qb + pid_h * GROUP * stride_qh
    q = _load_rows(q_ptr + _pair_offsets(stride_qh, stride_qn, pair, GROUP), mask_m, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh

    begin = share * span
    end = tl.minimum(begin + span, Nk)
    whole = end // BLOCK_N * BLOCK_N  # up to here no score is masked
    if CAUSAL:
        last_query = tl.minimum((first + BLOCK_M - 1) // GROUP, Nq - 1)
        end = tl.minimum(end, last_query + Nk - Nq + 1)
        whole = tl.minimum(whole, (first // GROUP + Nk - Nq + 1) // BLOCK_N * BLOCK_N)
    whole = tl.maximum(whole, begin)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(2):
        for start in range(whole if MASKED else begin, end if MASKED else whole, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr + offs_n.to(tl.int64) * stride_kn, offs_n < Nk, stride_kd, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
            if MASKED:
                score = tl.where((offs_n < Nk)[None, :], score, float("-inf"))
                if CAUSAL:
                    seen = offs_n[None, :] <= (pair // GROUP + Nk - Nq)[:, None]
                    score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            shift = _finite(higher)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
            peak = higher
    offset = share.to(tl.int64) * stride_ps + pid_b * stride_pb + pid_h * GROUP * stride_ph
    offset += _pair_offsets(stride_ph, stride_pn, pair, GROUP)
    tl.store(peak_ptr + offset, peak, mask=mask_m)
    tl.store(total_ptr + offset, total, mask=mask_m)


@triton.jit
def _column_sum_kernel(
    q_ptr, k_ptr,                                  # q [B, H, Nq, d], k [B, Hkv, Nk, d]
    peak_ptr, total_ptr, partial_ptr,              # peak, total [B, H, Nq] fp32, partial [B, Hkv * shares, C] fp32
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_pb, stride_ph, stride_pn,
    stride_sb, stride_ss, stride_sn,
    scale, Nq, Nk, begin, end, shares,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    # grid (key blocks, Hkv * shares, B): one program holds BLOCK_N keys and streams its share of the pairs past them
    pid_s = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    pid_h = pid_s // shares
    first_key = begin + tl.program_id(0) * BLOCK_N
    offs_n = first_key + tl.arange(0, BLOCK_N)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh
    k = _load_rows(k_ptr + offs_n.to(tl.int64) * stride_kn, offs_n < end, stride_kd, D, BLOCK_D)
    q_ptr += pid_b * stride_qb + pid_h * GROUP * stride_qh
    first_norm = pid_b * stride_pb + pid_h * GROUP * stride_ph

    tiles = tl.cdiv(Nq * GROUP, BLOCK_M)
    first = 0  # tile that sees the first key
    whole = 0  # tile from which every pair sees every key
    if CAUSAL:
        first = tl.maximum(first_key - (Nk - Nq), 0) * GROUP // BLOCK_M
        whole = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - (Nk - Nq), 0) * GROUP, BLOCK_M)
    share = tl.cdiv(tiles - first, shares)
    first += share * (tl.program_id(1) % shares)
    last = tl.minimum(first + share, tiles)
    whole = tl.minimum(tl.maximum(whole, first), last)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for MASKED in tl.static_range(1 if CAUSAL else 0, -1, -1):
        for tile in range(first if MASKED else whole, whole if MASKED else last):
            pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = pair < Nq * GROUP
            pair = tl.minimum(pair, Nq * GROUP - 1)  # the last one again, of weight 0: zeros times Inf would be NaN
            q = _load_rows(q_ptr + _pair_offsets(stride_qh, stride_qn, pair, GROUP), pair >= 0, stride_qd, D, BLOCK_D)
            offset = first_norm + _pair_offsets(stride_ph, stride_pn, pair, GROUP)
            shift, weight = _load_norms(peak_ptr, total_ptr, offset, mask_m)
            score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - shift[None, :]
            if MASKED:
                score = tl.where(offs_n[:, None] <= (pair // GROUP + Nk - Nq)[None, :], score, float("-inf"))
            total += tl.sum(tl.exp(score) * weight[None, :], 1)
    partial_ptr += pid_b * stride_sb + pid_s * stride_ss
    tl.store(partial_ptr + (offs_n - begin).to(tl.int64) * stride_sn, total, mask=offs_n < end)


@triton.jit
def _score_kernel(
    q_ptr, k_ptr, score_ptr,                       # q [B, H, Nq, d], k [B, Hkv, Nk, d], score [B, H, Nq, C] fp32
    peak_ptr, total_ptr,                           # each [key blocks, B, H, Nq] fp32
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_sb, stride_sh, stride_sm, stride_sn,
    stride_ps, stride_pb, stride_ph, stride_pn,
    scale, Nq, Nk, begin, end,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    # grid (key blocks, Hkv, B): all pairs of a group against BLOCK_N keys, so that K is read once
    pid_n = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    pair = tl.arange(0, BLOCK_M)
    mask_m = pair < Nq * GROUP
    q_ptr += pid_b * stride_qb + pid_h * GROUP * stride_qh
    q = _load_rows(q_ptr + _pair_offsets(stride_qh, stride_qn, pair, GROUP), mask_m, stride_qd, D, BLOCK_D)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh
    k = _load_rows(k_ptr + offs_n.to(tl.int64) * stride_kn, offs_n < Nk, stride_kd, D, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
    score = tl.where((offs_n < Nk)[None, :], score, float("-inf"))
    if CAUSAL:
        score = tl.where(offs_n[None, :] <= (pair // GROUP + Nk - Nq)[:, None], score, float("-inf"))
    peak = tl.max(score, 1)
    total = tl.sum(tl.exp(score - _finite(peak)[:, None]), 1)
    offset = pid_n.to(tl.int64) * stride_ps + pid_b * stride_pb + pid_h * GROUP * stride_ph
    offset += _pair_offsets(stride_ph, stride_pn, pair, GROUP)
    tl.store(peak_ptr + offset, peak, mask=mask_m)
    tl.store(total_ptr + offset, total, mask=mask_m)
    score_ptr += pid_b * stride_sb + pid_h * GROUP * stride_sh + (offs_n - begin).to(tl.int64)[None, :] * stride_sn
    score_ptrs = score_ptr + _pair_offsets(stride_sh, stride_sm, pair, GROUP)[:, None]
    asked = (offs_n >= begin) & (offs_n < end)
    tl.store(score_ptrs, score, mask=mask_m[:, None] & asked[None, :])


@triton.jit
def _score_sum_kernel(
    score_ptr, peak_ptr, total_ptr, out_ptr,       # score [B, rows, C], peak, total [B, rows], out [B, C], all fp32
    stride_sb, stride_sr, stride_sn,
    stride_pb, stride_pr,
    stride_ob, stride_on,
    rows, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # grid (blocks of columns, B): one program adds up its columns, rows in order
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid_b = tl.program_id(1).to(tl.int64)
    score_ptr += pid_b * stride_sb + offs_c.to(tl.int64)[None, :] * stride_sn
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        offset = pid_b * stride_pb + row.to(tl.int64) * stride_pr
        shift, weight = _load_norms(peak_ptr, total_ptr, offset, row < rows)
        mask = (row < rows)[:, None] & (offs_c < C)[None, :]
        score = tl.load(score_ptr + row.to(tl.int64)[:, None] * stride_sr, mask=mask, other=0.0)
        total += tl.sum(tl.exp(score - shift[:, None]) * weight[:, None], 0)
    tl.store(out_ptr + pid_b * stride_ob + offs_c.to(tl.int64) * stride_on, total, mask=offs_c < C)


@triton.jit
def _add_norms_kernel(
    peaks_ptr, totals_ptr,                         # each [shares, rows] fp32
    peak_ptr, total_ptr,                           # each [rows] fp32
    stride_ss, stride_sr,
    stride_pr,
    shares, rows,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # grid (blocks of rows): the norms of whole rows from those of their shares, in order
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, shares, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < shares)[:, None] & (row < rows)[None, :]
        offset = offs_s.to(tl.int64)[:, None] * stride_ss + row.to(tl.int64)[None, :] * stride_sr
        peaks = tl.load(peaks_ptr + offset, mask=mask, other=float("-inf"))
        totals = tl.load(totals_ptr + offset, mask=mask, other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, 0))
        shift = _finite(higher)
        total = total * tl.exp(peak - shift) + tl.sum(totals * tl.exp(peaks - shift[None, :]), 0)
        peak = higher
    tl.store(peak_ptr + row.to(tl.int64) * stride_pr, peak, mask=row < rows)
    tl.store(total_ptr + row.to(tl.int64) * stride_pr, total, mask=row < rows)


@torch.library.custom_op("fftriton::attention_column_sum", mutates_args=())
def _attention_column_sum(
    q: Tensor, k: Tensor, scale: float, causal: bool, lse: Tensor | None, num_queries: int, begin: int, end: int
) -> Tensor:
    if not runs_triton(q):
        columns = (begin, end)
        return reference.attention_column_sum(
            q, k, scale=scale, causal=causal, lse=lse, num_queries=num_queries, columns=columns
        )
    batch, heads, queries, _ = q.shape
    if batch * num_queries * (end - begin) == 0:
        return q.new_zeros(batch, end - begin, dtype=torch.float32)
    q = q[:, :, queries - num_queries :]
    one_tile = num_queries * (heads // k.shape[1]) <= _tile(q)[1]
    with torch.cuda.device_of(q):
        if lse is not None:
            total = _streamed_sum(q, k, lse[:, :, queries - num_queries :], None, scale, causal, begin, end)
        elif num_queries <= _FEW_QUERIES and one_tile:
            total = _kept_score_sum(q, k, scale, causal, begin, end)
        else:
            total = _streamed_sum(q, k, *_row_norms(q, k, scale, causal), scale, causal, begin, end)
    return total / heads


@_attention_column_sum.register_fake
def _(q, k, scale, causal, lse, num_queries, begin, end):
    return q.new_empty(q.shape[0], end - begin, dtype=torch.float32)


def attention_column_sum(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    num_queries: int | None = None,
    columns: tuple[int, int] | None = None,
) -> Tensor:
    """Attention that each key receives, summed over the queries and averaged over the heads.

    The queries are the last Nq of the Nk positions. The attention matrix is never stored: memory grows with Nk, not
    with Nq * Nk. Two runs on the same inputs agree bit for bit. Not differentiable.

    Args:
        q: [B, H, Nq, d] fp16, bf16 or fp32, any strides, d from 1 to 256.
        k: [B, Hkv, Nk, d] of q's dtype, any strides. H is a multiple of Hkv; query head h reads key head
            h // (H / Hkv).
        scale: positive factor on the scores, 1 / sqrt(d) if None.
        causal: each query sees the keys up to its own position only, so Nq <= Nk. False: every query sees every key.
        lse: [B, H, Nq] fp32, any strides: natural log-sum-exp of the scaled scores of each of the Nq rows, as flash
            attention returns it. Skips the first of the two passes over q and k. Not checked against q and k.
        num_queries: the last n queries only, 1 <= n <= Nq; all if None.
        columns: (a, b), 0 <= a <= b <= Nk: only the keys a..b-1; all if None. Rows are normalised over all keys.

    Returns:
        [B, C] fp32, C = b - a. Over all keys a sample adds up to the number of queries. A query whose log-sum-exp is
        infinite adds nothing; one whose log-sum-exp is NaN makes its sample NaN, as torch.softmax does.

    Raises:
        TypeError: a dtype that is not listed, or two dtypes for q and k. ValueError: a shape, a range or a scale that
            is not as above, or tensors on two devices.

    Source:
        FastV, arXiv:2403.06764 (the last query); FrameFusion, arXiv:2501.01986 (all of them).
    """
    op = "attention_column_sum"
    batch, heads, queries, keys, width = _check_heads(op, q, k)
    if causal and queries > keys:
        raise ValueError(f"{op}: causal queries are the last of the keys' positions, got Nq={queries} > Nk={keys}")
    if scale is None:
        scale = width**-0.5
    elif not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    if lse is not None:
        check_dtype(op, "lse", lse, (torch.float32,))
        check_shape(op, "lse", lse, B=batch, H=heads, Nq=queries)
    check_same_device(op, q=q, k=k, lse=lse)
    if num_queries is None:
        num_queries = queries
    else:
        check_at_least(op, "num_queries", num_queries, 1)
        if num_queries > queries:
            raise ValueError(f"{op}: num_queries must be at most Nq={queries}, got {num_queries}")
    begin, end = (0, keys) if columns is None else columns
    if not 0 <= begin <= end <= keys:
        raise ValueError(f"{op}: columns (a, b) must be 0 <= a <= b <= Nk={keys}, got ({begin}, {end})")
    return _attention_column_sum(q, k, float(scale), causal, lse, num_queries, begin, end)


def _check_heads(op: str, q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """Raise unless q and k fit each other; B, H, Nq, Nk and d."""
    check_dtype(op, "q", q, FLOATS)
    check_dtype(op, "k", k, FLOATS)
    if q.dtype != k.dtype:
        raise TypeError(f"{op}: q and k must have one dtype, got {q.dtype} and {k.dtype}")
    check_shape(op, "q", q, B=None, H=None, Nq=None, d=None)
    batch, heads, queries, width = q.shape
    check_shape(op, "k", k, B=batch, Hkv=None, Nk=None, d=width)
    kv_heads, keys = k.shape[1:3]
    if not 1 <= width <= _MOST_WIDTH:
        raise ValueError(f"{op}: d must be from 1 to {_MOST_WIDTH}, got {width}")
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: H must be a multiple of Hkv, both at least 1, got H={heads} and Hkv={kv_heads}")
    return batch, heads, queries, keys, width


def _tile(x: Tensor) -> tuple[int, int, int, int]:
    """A tile of scores: its longer side, held still, its shorter side, streamed past; BLOCK_D and warps."""
    width = block(x.shape[-1])
    if x.dtype == torch.float32:  # no tensor cores; more than one row a thread and the still side spills
        return 32, 32, width, 16
    return (128, 64, width, 4) if width <= 128 else (64, 64, width, 4)


def _row_norms(q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Each row's highest score and sum of exp(score - highest), [B, H, Nq] fp32. Many programs share few rows."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    block_m, block_n, block_d, warps = _tile(q)
    pairs = queries * (heads // kv_heads)
    block_m = min(block_m, block(pairs))
    tiles = triton.cdiv(pairs, block_m)
    shares = _shares(tiles * kv_heads * batch, triton.cdiv(keys, _LEAST_KEYS))
    span = triton.cdiv(triton.cdiv(keys, shares), block_n) * block_n
    peak, total = q.new_empty(2, shares, batch, heads, queries, dtype=torch.float32)
    _row_norm_kernel[(tiles, shares * kv_heads, batch)](
        q, k, peak, total, *q.stride(), *k.stride(), *peak.stride(),
        scale, queries, keys, kv_heads, span, GROUP=heads // kv_heads, D=width, BLOCK_D=block_d,
        BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal, num_warps=warps, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return _added_norms(peak, total)


def _added_norms(peaks: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [shares, ...] of parts of the rows -> [...] of the whole rows."""
    if peaks.shape[0] == 1:
        return peaks[0], totals[0]
    flat = peaks.flatten(1)
    peak, total = torch.empty_like(peaks[0]), torch.empty_like(peaks[0])
    _add_norms_kernel[(triton.cdiv(peak.numel(), 16),)](
        flat, totals, peak, total, *flat.stride(), 1, *flat.shape, BLOCK_S=64, BLOCK_R=16,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return peak, total


def _streamed_sum(
    q: Tensor, k: Tensor, peak: Tensor, total: Tensor | None, scale: float, causal: bool, begin: int, end: int
) -> Tensor:
    """[B, C]: both sums, for any number of queries. Norms as `_row_norms` gives them, or a log-sum-exp and None."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    block_n, block_m, block_d, warps = _tile(q)
    pairs = queries * (heads // kv_heads)
    block_m = min(block_m, block(pairs))
    key_blocks = triton.cdiv(end - begin, block_n)
    shares = _shares(key_blocks * kv_heads * batch, triton.cdiv(pairs, block_m * _LEAST_TILES))
    partial = q.new_empty(batch, kv_heads * shares, end - begin, dtype=torch.float32)
    _column_sum_kernel[(key_blocks, kv_heads * shares, batch)](
        q, k, peak, total, partial, *q.stride(), *k.stride(), *peak.stride(), *partial.stride(),
        scale, queries, keys, begin, end, shares, GROUP=heads // kv_heads, D=width, BLOCK_D=block_d,
        BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal, num_warps=warps, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    out = partial.sum(1)
    if causal:  # a row that is NaN is so where it is masked, too, in torch.softmax
        spoiled = (peak if total is None else total).isnan().flatten(1).any(1)
        out.masked_fill_(spoiled[:, None], float("nan"))
    return out


def _kept_score_sum(q: Tensor, k: Tensor, scale: float, causal: bool, begin: int, end: int) -> Tensor:
    """[B, C]: both sums for few queries, whose scores are kept between the passes so that K is read once."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    block_n, _, block_d, warps = _tile(q)
    key_blocks = triton.cdiv(keys, block_n)
    score = q.new_empty(batch, heads, queries, end - begin, dtype=torch.float32)
    peak, total = q.new_empty(2, key_blocks, batch, heads, queries, dtype=torch.float32)
    _score_kernel[(key_blocks, kv_heads, batch)](
        q, k, score, peak, total, *q.stride(), *k.stride(), *score.stride(), *peak.stride(),
        scale, queries, keys, begin, end, GROUP=heads // kv_heads, D=width, BLOCK_D=block_d,
        BLOCK_M=block(queries * (heads // kv_heads)), BLOCK_N=block_n, CAUSAL=causal,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    out = score.new_empty(batch, end - begin)
    score = score.flatten(1, 2)
    peak, total = (norm.flatten(1) for norm in _added_norms(peak, total))
    _score_sum_kernel[(triton.cdiv(end - begin, 128), batch)](
        score, peak, total, out, *score.stride(), *peak.stride(), *out.stride(), *score.shape[1:],
        BLOCK_R=16, BLOCK_C=128, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _shares(programs: int, most: int) -> int:
    """Over how many programs each of `programs` pieces of work is spread, a power of two."""
    return min(triton.next_power_of_2(triton.cdiv(_ENOUGH_PROGRAMS, programs)), triton.next_power_of_2(most))
