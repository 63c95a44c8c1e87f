"""The Triton kernels of attention_column_sum: row norms, column sums over them, and both for few queries.

A row of a tile is a (query, head of the group) pair; pairs run over the heads of a group first. attention.py has the
formula and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._dispatch import INTERPRET
from ._specialisation import VARYING

_UPCAST = tl.constexpr(INTERPRET)  # the interpreter's tl.dot multiplies the raw bits of a bf16


@triton.jit
def _pair_offsets(stride_h, stride_n, pair, GROUP: tl.constexpr):
    # pairs run over the heads of a group first, then over the queries
    return (pair % GROUP).to(tl.int64) * stride_h + (pair // GROUP).to(tl.int64) * stride_n


@triton.jit
def _sequence(cu_q_ptr, cu_k_ptr, pid_b, Nq, Nk):
    # first query, first key, queries (the last Nq at most) and keys of a sequence, or of a sample where none are packed
    if cu_q_ptr is None:
        return 0, 0, Nq, Nk
    else:
        last_query = tl.load(cu_q_ptr + pid_b + 1).to(tl.int64)
        queries = tl.minimum(last_query - tl.load(cu_q_ptr + pid_b).to(tl.int64), Nq)
        first_key = tl.load(cu_k_ptr + pid_b).to(tl.int64)
        keys = tl.minimum(tl.load(cu_k_ptr + pid_b + 1).to(tl.int64) - first_key, Nk)
        return last_query - queries, first_key, queries.to(tl.int32), keys.to(tl.int32)


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
def _softmax_total(total):
    # a score of +inf makes the sum of exponentials infinite, and the softmax of the row NaN
    return tl.where(total == float("inf"), float("nan"), total)


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


@triton.jit(do_not_specialize=VARYING)
def _row_norm_kernel(
    q_ptr, k_ptr,                                  # q [B, H, Nq, d], k [B, Hkv, Nk, d]
    peak_ptr, total_ptr,                           # each [shares, B, H, Nq] fp32: max score, sum of exp(score - max)
    cu_q_ptr, cu_k_ptr,                            # each [B + 1], None where no sequences are packed
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
    q_start, k_start, Nq, Nk = _sequence(cu_q_ptr, cu_k_ptr, pid_b, Nq, Nk)
    pair = first + tl.arange(0, BLOCK_M)
    mask_m = pair < Nq * GROUP
    q_ptr += pid_b * stride_qb + pid_h * GROUP * stride_qh + q_start * stride_qn
    q = _load_rows(q_ptr + _pair_offsets(stride_qh, stride_qn, pair, GROUP), mask_m, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh + k_start * stride_kn

    begin = share * span
    end = tl.where(first < Nq * GROUP, tl.minimum(begin + span, Nk), begin)
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
    offset = share.to(tl.int64) * stride_ps + pid_b * stride_pb + pid_h * GROUP * stride_ph + q_start * stride_pn
    offset += _pair_offsets(stride_ph, stride_pn, pair, GROUP)
    tl.store(peak_ptr + offset, peak, mask=mask_m)
    tl.store(total_ptr + offset, _softmax_total(total), mask=mask_m)


@triton.jit(do_not_specialize=VARYING)
def _column_sum_kernel(
    q_ptr, k_ptr,                                  # q [B, H, Nq, d], k [B, Hkv, Nk, d]
    peak_ptr, total_ptr, partial_ptr,              # peak, total [B, H, Nq] fp32, partial [B, Hkv * shares, C] fp32
    cu_q_ptr, cu_k_ptr,                            # each [B + 1], None where no sequences are packed
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
    q_start, k_start, Nq, Nk = _sequence(cu_q_ptr, cu_k_ptr, pid_b, Nq, Nk)
    end = tl.minimum(end, Nk)
    first_key = begin + tl.program_id(0) * BLOCK_N
    offs_n = first_key + tl.arange(0, BLOCK_N)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh + k_start * stride_kn
    k = _load_rows(k_ptr + offs_n.to(tl.int64) * stride_kn, offs_n < end, stride_kd, D, BLOCK_D)
    q_ptr += pid_b * stride_qb + pid_h * GROUP * stride_qh + q_start * stride_qn
    first_norm = pid_b * stride_pb + pid_h * GROUP * stride_ph + q_start * stride_pn

    tiles = tl.where(first_key < end, tl.cdiv(Nq * GROUP, BLOCK_M), 0)
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
    partial_ptr += pid_b * stride_sb + pid_s * stride_ss + k_start * stride_sn
    tl.store(partial_ptr + (offs_n - begin).to(tl.int64) * stride_sn, total, mask=offs_n < end)


@triton.jit(do_not_specialize=VARYING)
def _score_kernel(
    q_ptr, k_ptr, score_ptr,                       # q [B, H, Nq, d], k [B, Hkv, Nk, d], score [B, H, Nq, C] fp32
    peak_ptr, total_ptr,                           # each [key blocks, B, H, Nq] fp32
    cu_q_ptr, cu_k_ptr,                            # each [B + 1], None where no sequences are packed
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
    stored = pair < Nq * GROUP  # what a shorter sequence has not is -inf
    q_start, k_start, Nq, Nk = _sequence(cu_q_ptr, cu_k_ptr, pid_b, Nq, Nk)
    end = tl.minimum(end, Nk)
    mask_m = pair < Nq * GROUP
    q_ptr += pid_b * stride_qb + pid_h * GROUP * stride_qh + q_start * stride_qn
    q = _load_rows(q_ptr + _pair_offsets(stride_qh, stride_qn, pair, GROUP), mask_m, stride_qd, D, BLOCK_D)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh + k_start * stride_kn
    k = _load_rows(k_ptr + offs_n.to(tl.int64) * stride_kn, offs_n < Nk, stride_kd, D, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
    score = tl.where(mask_m[:, None] & (offs_n < Nk)[None, :], score, float("-inf"))
    if CAUSAL:
        score = tl.where(offs_n[None, :] <= (pair // GROUP + Nk - Nq)[:, None], score, float("-inf"))
    peak = tl.max(score, 1)
    total = tl.sum(tl.exp(score - _finite(peak)[:, None]), 1)
    offset = pid_n.to(tl.int64) * stride_ps + pid_b * stride_pb + pid_h * GROUP * stride_ph
    offset += _pair_offsets(stride_ph, stride_pn, pair, GROUP)
    tl.store(peak_ptr + offset, peak, mask=stored)
    tl.store(total_ptr + offset, _softmax_total(total), mask=stored)
    score_ptr += pid_b * stride_sb + pid_h * GROUP * stride_sh
    score_ptr += (k_start + offs_n - begin).to(tl.int64)[None, :] * stride_sn
    score_ptrs = score_ptr + _pair_offsets(stride_sh, stride_sm, pair, GROUP)[:, None]
    asked = (offs_n >= begin) & (offs_n < end)
    tl.store(score_ptrs, score, mask=stored[:, None] & asked[None, :])


@triton.jit(do_not_specialize=VARYING)
def _score_sum_kernel(
    score_ptr, peak_ptr, total_ptr, out_ptr,       # score [B, rows, C], peak, total [B, rows], out [B, C], all fp32
    cu_k_ptr,                                      # [B + 1], None where no sequences are packed
    stride_sb, stride_sr, stride_sn,
    stride_pb, stride_pr,
    stride_ob, stride_on,
    rows, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # grid (blocks of columns, B): one program adds up its columns, rows in order
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid_b = tl.program_id(1).to(tl.int64)
    _, k_start, _, C = _sequence(cu_k_ptr, cu_k_ptr, pid_b, C, C)
    score_ptr += pid_b * stride_sb + (k_start + offs_c).to(tl.int64)[None, :] * stride_sn
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        offset = pid_b * stride_pb + row.to(tl.int64) * stride_pr
        shift, weight = _load_norms(peak_ptr, total_ptr, offset, row < rows)
        mask = (row < rows)[:, None] & (offs_c < C)[None, :]
        score = tl.load(score_ptr + row.to(tl.int64)[:, None] * stride_sr, mask=mask, other=0.0)
        total += tl.sum(tl.exp(score - shift[:, None]) * weight[:, None], 0)
    tl.store(out_ptr + pid_b * stride_ob + (k_start + offs_c).to(tl.int64) * stride_on, total, mask=offs_c < C)


@triton.jit(do_not_specialize=VARYING)
def _add_norms_kernel(
    peaks_ptr, totals_ptr,                         # each [shares, rows] fp32
    peak_ptr, total_ptr,                           # each [rows] fp32
    stride_ss, stride_sr,
    stride_pr,
    shares, rows,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # grid (blocks of rows): the norms of whole rows from those of their shares, in order
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, shares, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < shares)[:, None] & (row < rows)[None, :]
        offset = offs_s.to(tl.int64)[:, None] * stride_ss + row[None, :] * stride_sr
        peaks = tl.load(peaks_ptr + offset, mask=mask, other=float("-inf"))
        totals = tl.load(totals_ptr + offset, mask=mask, other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, 0))
        shift = _finite(higher)
        total = total * tl.exp(peak - shift) + tl.sum(totals * tl.exp(peaks - shift[None, :]), 0)
        peak = higher
    tl.store(peak_ptr + row * stride_pr, peak, mask=row < rows)
    tl.store(total_ptr + row * stride_pr, total, mask=row < rows)
