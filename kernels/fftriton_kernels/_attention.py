"""The Triton kernels of attention_column_sum: row norms, column sums over them, and both for few queries.

A row of a tile of the row norms is a (query, head of the group) pair; pairs run over the heads of a group first.
Exponentials are of base 2, for which there is an instruction:
a score is multiplied by scale2 = scale * log2(e). The norm of a row is two numbers, its softmax exp2(score - shift) *
weight: one alone would lose the precision of large scores. attention.py has the formula and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._dispatch import INTERPRET
from ._specialisation import VARYING

_LOG2_E = tl.constexpr(1.4426950408889634)
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
    # [rows, BLOCK_D], zeros where masked and beyond D; mask None: every row is there
    offs_d = tl.arange(0, BLOCK_D)
    if mask is None and BLOCK_D == D:
        x = tl.load(row_ptrs[:, None] + offs_d.to(tl.int64)[None, :] * stride_d)
    elif mask is None:
        x = tl.load(row_ptrs[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, (offs_d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        x = tl.load(row_ptrs[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask[:, None], other=0.0)
    else:
        mask_d = mask[:, None] & (offs_d < D)[None, :]
        x = tl.load(row_ptrs[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask_d, other=0.0)
    if _UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _by_lane(score, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr):
    # [ROWS, _, LANES, RUN]: of the threads that share a row of a matrix unit's accumulators each holds one lane, so
    # that sums over the other two axes exchange nothing between threads
    return tl.reshape(score, (ROWS, COLUMNS // (LANES * RUN), LANES, RUN))


@triton.jit
def _finite(peak):
    # what a log-sum-exp subtracts: an infinite peak would make NaNs of -inf - -inf
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def _whole(peak, total):
    # the norms of whole rows from their highest scores and their sums of exp2(score - peak). A row that saw nothing has
    # the weight 0; a score of +inf makes the softmax of its row NaN
    shift = tl.where(peak == float("-inf"), float("inf"), peak)
    weight = tl.where(total == float("inf"), float("nan"), 1.0 / tl.where(total == 0.0, 1.0, total))
    return shift, tl.where(total == 0.0, 0.0, weight)


@triton.jit
def _added(peaks_ptr, totals_ptr, stride_ps, row, mask, shares, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr):
    # highest scores and sums of whole rows from those of their shares, in order
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, shares, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = (offs_s < shares)[:, None] & mask[None, :]
        offset = offs_s.to(tl.int64)[:, None] * stride_ps + row[None, :]
        peaks = tl.load(peaks_ptr + offset, mask=mask_s, other=float("-inf"))
        totals = tl.load(totals_ptr + offset, mask=mask_s, other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, 0))
        shift = _finite(higher)
        total = total * tl.exp2(peak - shift) + tl.sum(totals * tl.exp2(peaks - shift[None, :]), 0)
        peak = higher
    return peak, total


@triton.jit
def _load_norms(shift_ptrs, weight_ptrs, mask):
    # of whole rows, all of them if mask is None; weight_ptrs None: shifts are natural log-sum-exps
    shift = tl.load(shift_ptrs) if mask is None else tl.load(shift_ptrs, mask=mask, other=float("inf"))
    if weight_ptrs is None:  # that of a row that saw nothing is -inf
        shift = tl.where(shift == float("-inf"), float("inf"), shift * _LOG2_E)
        weight = tl.full(shift.shape, 1.0, tl.float32)
    elif mask is None:
        weight = tl.load(weight_ptrs)
    else:
        weight = tl.load(weight_ptrs, mask=mask, other=0.0)
    return shift, weight


@triton.jit(do_not_specialize=VARYING)
def _row_norm_kernel(
    q_ptr, k_ptr,                                  # q [B, H, Nq, d], k [B, Hkv, Nk, d]
    shift_ptr, weight_ptr,                         # each [shares, B, H, Nq] fp32; of shares: peaks and totals
    cu_q_ptr, cu_k_ptr,                            # each [B + 1], None where no sequences are packed
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_ps, stride_pb, stride_ph,
    scale2, Nq, Nk, kv_heads, span,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr,
    CAUSAL: tl.constexpr,
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
    peaks = tl.full((BLOCK_M, LANES), float("-inf"), tl.float32)  # of the keys of a lane each
    totals = tl.zeros((BLOCK_M, LANES), tl.float32)
    last_key = tl.zeros((BLOCK_M,), tl.int32) + Nk - 1  # that a pair sees
    if CAUSAL:
        last_key -= Nq - 1 - pair // GROUP
    row_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * stride_kn
    for MASKED in tl.static_range(2):
        for start in range(whole if MASKED else begin, end if MASKED else whole, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < Nk if MASKED else None
            k = _load_rows(k_ptr + tl.cast(start, tl.int64) * stride_kn + row_offsets, mask_n, stride_kd, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if MASKED:
                score = tl.where(offs_n[None, :] <= last_key[:, None], score, float("-inf"))
            score = _by_lane(score, BLOCK_M, BLOCK_N, LANES, RUN)
            higher = tl.maximum(peaks, tl.max(tl.max(score, 3), 1) * scale2)
            shift = _finite(higher)
            score = tl.exp2(score * scale2 - shift[:, None, :, None])
            totals = totals * tl.exp2(peaks - shift) + tl.sum(tl.sum(score, 3), 1)
            peaks = higher
    peak = tl.max(peaks, 1)
    total = tl.sum(totals * tl.exp2(peaks - _finite(peak)[:, None]), 1)
    if tl.num_programs(1) == kv_heads:  # the rows are whole
        peak, total = _whole(peak, total)
    offset = share.to(tl.int64) * stride_ps + pid_b * stride_pb + pid_h * GROUP * stride_ph + q_start
    offset += _pair_offsets(stride_ph, 1, pair, GROUP)
    tl.store(shift_ptr + offset, peak, mask=mask_m)
    tl.store(weight_ptr + offset, total, mask=mask_m)


@triton.jit(do_not_specialize=VARYING)
def _column_sum_kernel(
    q_ptr, k_ptr,                                  # q [B, H, Nq, d], k [B, Hkv, Nk, d]
    shift_ptr, weight_ptr, partial_ptr,            # shift, weight [B, H, Nq], partial [B, Hkv * shares, C], fp32
    cu_q_ptr, cu_k_ptr,                            # each [B + 1], None where no sequences are packed
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_pb, stride_ph,
    stride_sb, stride_ss, stride_sn,
    scale2, Nq, Nk, begin, end, shares,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    # grid (key blocks, Hkv * shares, B): one program holds BLOCK_N keys and streams its share of the group's queries
    # past them, BLOCK_M of one head at a time: addresses are the same but for a scalar
    pid_s = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    pid_h = pid_s // shares
    q_start, k_start, Nq, Nk = _sequence(cu_q_ptr, cu_k_ptr, pid_b, Nq, Nk)
    end = tl.minimum(end, Nk)
    first_key = begin + tl.program_id(0) * BLOCK_N
    offs_n = first_key + tl.arange(0, BLOCK_N)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh + k_start * stride_kn
    k = _load_rows(k_ptr + offs_n.to(tl.int64) * stride_kn, offs_n < end, stride_kd, D, BLOCK_D)
    offs_m = tl.arange(0, BLOCK_M)
    q_ptrs = q_ptr + pid_b * stride_qb + pid_h * GROUP * stride_qh + q_start * stride_qn
    q_ptrs += offs_m.to(tl.int64) * stride_qn
    norms = pid_b * stride_pb + pid_h * GROUP * stride_ph + q_start

    tiles = tl.where(first_key < end, tl.cdiv(Nq, BLOCK_M) * GROUP, 0)
    first = 0  # tile that sees the first key
    whole = 0  # tile from which every query sees every key
    if CAUSAL:
        first = tl.maximum(first_key - (Nk - Nq), 0) // BLOCK_M * GROUP
        whole = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - (Nk - Nq), 0), BLOCK_M) * GROUP
    share = tl.cdiv(tiles - first, shares)
    first += share * (tl.program_id(1) % shares)
    last = tl.minimum(first + share, tiles)
    whole = tl.minimum(tl.maximum(whole, first), last)
    partial = tl.minimum(tl.maximum(Nq // BLOCK_M * GROUP, whole), last)  # tile from which rows are missing
    totals = tl.zeros((BLOCK_N, LANES), tl.float32)
    first_query = offs_n - (Nk - Nq)  # that sees a key, where causal
    for part in tl.static_range(0 if CAUSAL else 1, 3):
        for tile in range(
            first if part == 0 else (whole if part == 1 else partial),
            whole if part == 0 else (partial if part == 1 else last),
        ):
            head = tl.cast(tile % GROUP, tl.int64)
            start = tile // GROUP * BLOCK_M
            q_offset = head * stride_qh + tl.cast(start, tl.int64) * stride_qn
            offset = norms + head * stride_ph + start
            counts = None if part == 1 else start + offs_m < Nq
            q = _load_rows(q_ptrs + q_offset, counts, stride_qd, D, BLOCK_D)
            score = tl.dot(k, tl.trans(q), input_precision="ieee")
            weight_ptrs = None if weight_ptr is None else weight_ptr + offset + offs_m
            shift, weight = _load_norms(shift_ptr + offset + offs_m, weight_ptrs, counts)
            score = score * scale2 - shift[None, :]
            if counts is not None:
                seen = counts[None, :]
                if CAUSAL:
                    seen &= (start + offs_m)[None, :] >= first_query[:, None]
                score = tl.where(seen, score, float("-inf"))
            totals += tl.sum(tl.sum(_by_lane(tl.exp2(score) * weight[None, :], BLOCK_N, BLOCK_M, LANES, RUN), 3), 1)
    total = tl.sum(totals, 1)
    partial_ptr += pid_b * stride_sb + pid_s * stride_ss + k_start * stride_sn
    tl.store(partial_ptr + (offs_n - begin).to(tl.int64) * stride_sn, total, mask=offs_n < end)


@triton.jit(do_not_specialize=VARYING)
def _score_kernel(
    q_ptr, k_ptr, score_ptr,                       # q [B, H, Nq, d], k [B, Hkv, Nk, d], score [B, Hkv * pairs, C] fp32
    peaks_ptr, totals_ptr,                         # each [key blocks, B, Hkv * pairs] fp32
    cu_q_ptr, cu_k_ptr,                            # each [B + 1], None where no sequences are packed
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_sb, stride_sr, stride_sn,
    stride_ps, stride_pb,
    scale2, Nq, Nk, begin, end,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    # grid (key blocks, Hkv, B): all pairs of a group against BLOCK_N keys, so that K is read once
    pid_n = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    pair = tl.arange(0, BLOCK_M)
    stored = pair < Nq * GROUP  # what a shorter sequence has not is -inf
    row = pid_h * Nq * GROUP + pair
    q_start, k_start, Nq, Nk = _sequence(cu_q_ptr, cu_k_ptr, pid_b, Nq, Nk)
    end = tl.minimum(end, Nk)
    mask_m = pair < Nq * GROUP
    q_ptr += pid_b * stride_qb + pid_h * GROUP * stride_qh + q_start * stride_qn
    q = _load_rows(q_ptr + _pair_offsets(stride_qh, stride_qn, pair, GROUP), mask_m, stride_qd, D, BLOCK_D)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh + k_start * stride_kn
    k = _load_rows(k_ptr + offs_n.to(tl.int64) * stride_kn, offs_n < Nk, stride_kd, D, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2  # [BLOCK_M, BLOCK_N]
    score = tl.where(mask_m[:, None] & (offs_n < Nk)[None, :], score, float("-inf"))
    if CAUSAL:
        score = tl.where(offs_n[None, :] <= (pair // GROUP + Nk - Nq)[:, None], score, float("-inf"))
    peak = tl.max(score, 1)
    total = tl.sum(tl.exp2(score - _finite(peak)[:, None]), 1)
    offset = pid_n.to(tl.int64) * stride_ps + pid_b * stride_pb + row
    tl.store(peaks_ptr + offset, peak, mask=stored)
    tl.store(totals_ptr + offset, total, mask=stored)
    score_ptr += pid_b * stride_sb + (k_start + offs_n - begin).to(tl.int64)[None, :] * stride_sn
    asked = (offs_n >= begin) & (offs_n < end)
    tl.store(score_ptr + row[:, None] * stride_sr, score, mask=stored[:, None] & asked[None, :])


@triton.jit(do_not_specialize=VARYING)
def _score_sum_kernel(
    score_ptr, peaks_ptr, totals_ptr, out_ptr,     # score [B, rows, C], peaks, totals [shares, B, rows], out [B, C]
    cu_k_ptr,                                      # [B + 1], None where no sequences are packed
    stride_sb, stride_sr, stride_sn,
    stride_ps, stride_pb,
    stride_ob, stride_on,
    shares, rows, heads, C,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # grid (blocks of columns, B): one program adds up its columns, rows in order, and divides by the heads
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid_b = tl.program_id(1).to(tl.int64)
    _, k_start, _, C = _sequence(cu_k_ptr, cu_k_ptr, pid_b, C, C)
    score_ptr += pid_b * stride_sb + (k_start + offs_c).to(tl.int64)[None, :] * stride_sn
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask_r = row < rows
        peak, weight = _added(
            peaks_ptr, totals_ptr, stride_ps, pid_b * stride_pb + row, mask_r, shares, BLOCK_S, BLOCK_R
        )
        shift, weight = _whole(peak, weight)
        mask = mask_r[:, None] & (offs_c < C)[None, :]
        score = tl.load(score_ptr + row.to(tl.int64)[:, None] * stride_sr, mask=mask, other=0.0)
        total += tl.sum(tl.exp2(score - shift[:, None]) * weight[:, None], 0)
    mean = tl.div_rn(total, tl.zeros((BLOCK_C,), tl.float32) + heads.to(tl.float32))
    tl.store(out_ptr + pid_b * stride_ob + (k_start + offs_c).to(tl.int64) * stride_on, mean, mask=offs_c < C)


@triton.jit(do_not_specialize=VARYING)
def _add_norms_kernel(
    peaks_ptr, totals_ptr,                         # each [shares, rows] fp32
    shift_ptr, weight_ptr,                         # each [rows] fp32
    shares, rows,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # grid (blocks of rows): the norms of whole rows
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    peak, total = _added(peaks_ptr, totals_ptr, rows, row, row < rows, shares, BLOCK_S, BLOCK_R)
    shift, weight = _whole(peak, total)
    tl.store(shift_ptr + row, shift, mask=row < rows)
    tl.store(weight_ptr + row, weight, mask=row < rows)
