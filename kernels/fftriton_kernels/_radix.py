"""Exact select of the k best, and order-preserving compaction, over the rows of a [B, N] tensor, without a sort.

A score becomes a 32-bit key that orders as the scores do. One program looks for the k-th best key of a row: two bits at
a time, highest first, it counts the keys that reach each of three candidates. Ties at the threshold go to the lower
index. k may be in device memory, and there is one launch however long the rows are.

Packed, a row is a sequence: it begins at cu_seqlens[s], which `span` looks up. What belongs to no sequence is never
selected.

Bound by latency: a pass reads N keys, 215 KB at N = 53760, from the caches of one multiprocessor.
Reference: reference.topk_keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import check_most
from ._specialisation import VARYING

BLOCK = 4096  # tokens that a program looks at at a time
WARPS = 16  # 1024 threads on AMD, the most that a program can have
COMPACT_BLOCK = 1024
CHUNK = 64


def row_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of [B, N] or packed [T], where all rows share the first."""
    return (0, *tensor.stride()) if tensor.ndim == 1 else tensor.stride()


@triton.jit
def span(cu_seqlens_ptr, pid_b, N):
    """Where row pid_b begins in a contiguous buffer, at which position its tokens begin to count, and its length.

    cu_seqlens_ptr None: the rows are not packed.
    """
    if cu_seqlens_ptr is None:
        base = pid_b * N
        begin = pid_b * 0
        length = begin + N
    else:  # N is the length of all rows together
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + pid_b).to(tl.int64), 0), N)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + pid_b + 1).to(tl.int64), 0), N)
        base = begin
        length = end - begin
    return base, begin, length


@triton.jit
def sort_key(x, eligible):
    """fp32 -> uint32 in the same order: 0 where not eligible, then NaN, then the numbers; -0.0 equals 0.0."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(eligible, tl.where(x == x, key, 1), 0)


@triton.jit
def load_keys(keys_ptr, offs, length):
    """The keys of some tokens of a row as uint32, 0 past the end."""
    return tl.load(keys_ptr + offs, mask=offs < length, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _reaching(keys_ptr, length, first, second, third, BLOCK_N: tl.constexpr):
    # how many keys are at least each of three
    firsts = tl.zeros((BLOCK_N,), tl.int32)  # by place in a block, so that threads meet once
    seconds = tl.zeros((BLOCK_N,), tl.int32)
    thirds = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, length, BLOCK_N):
        key = load_keys(keys_ptr, start + tl.arange(0, BLOCK_N), length)
        firsts += (key >= first).to(tl.int32)
        seconds += (key >= second).to(tl.int32)
        thirds += (key >= third).to(tl.int32)
    return tl.sum(firsts, 0), tl.sum(seconds, 0), tl.sum(thirds, 0)


@triton.jit
def threshold(keys_ptr, length, k, BLOCK_N: tl.constexpr):
    """The least of the k best keys of a row, how many equal to it are among them, and how many keys compete."""
    one = tl.full((), 1, tl.uint32)
    competing, ties, _ = _reaching(keys_ptr, length, one, one, one, BLOCK_N)
    least = one
    if competing > k:  # else all of them
        least = tl.full((), 0, tl.uint32)
        for step in range(16):
            bit = one << tl.cast(30 - 2 * step, tl.uint32)
            first, second, third = _reaching(keys_ptr, length, least + bit, least + 2 * bit, least + 3 * bit, BLOCK_N)
            higher = tl.where(third >= k, 3, tl.where(second >= k, 2, tl.where(first >= k, 1, 0)))
            least += bit * higher.to(tl.uint32)
        above = 0
        if least != 0xFFFFFFFF:  # the highest key, which no score has, where k is 0
            above, _, _ = _reaching(keys_ptr, length, least + one, least, least, BLOCK_N)
        ties = k - above
    return least, ties, competing


@triton.jit
def count(k_ptr, k, stride_k, pid_b, length):
    """How many a row takes, from device memory or, where k_ptr is None, from the host."""
    if k_ptr is None:
        wanted = length * 0 + k
    else:
        wanted = tl.load(k_ptr + pid_b * stride_k).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 0), length).to(tl.int32)


def on_device(k: int | Tensor) -> tuple[Tensor | None, int, int]:
    """What kernels take as k_ptr, k, stride_k for an int, or for int32 or int64 [B] on the device."""
    return (k, 0, k.stride(0)) if isinstance(k, Tensor) else (None, k, 0)


@triton.jit(do_not_specialize=VARYING)
def _topk_kernel(
    scores_ptr, candidates_ptr, keys_ptr,          # each [B, N]; candidates None: all compete
    k_ptr, cu_seqlens_ptr,                         # k [B], None where the host knows it; [B + 1], None where not packed
    keep_ptr, kept_ptr, lengths_ptr,               # keep [B, N] int8 or else kept [B, M], lengths [B] int64
    stride_sb, stride_sn,
    stride_cb, stride_cn,
    k, stride_k, N, M,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (B,): one program for each row
    pid_b = tl.program_id(0).to(tl.int64)
    base, begin, length = span(cu_seqlens_ptr, pid_b, N)
    k = count(k_ptr, k, stride_k, pid_b, length)
    scores_ptr += pid_b * stride_sb + begin * stride_sn
    if candidates_ptr is not None:
        candidates_ptr += pid_b * stride_cb + begin * stride_cn
    keys_ptr += base
    length = length.to(tl.int32)
    for start in range(0, length, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        competes = offs < length
        x = tl.load(scores_ptr + offs.to(tl.int64) * stride_sn, mask=competes, other=0.0).to(tl.float32)
        if candidates_ptr is not None:
            competes &= tl.load(candidates_ptr + offs.to(tl.int64) * stride_cn, mask=competes, other=0) != 0
        tl.store(keys_ptr + offs, sort_key(x, competes).to(tl.int32, bitcast=True), mask=offs < length)
    tl.debug_barrier()  # what one thread has written others read
    least, ties, competing = threshold(keys_ptr, length, k, BLOCK_N)
    stay = tl.minimum(k, competing)
    if candidates_ptr is not None:  # and all others
        stay += length - competing
    slot = M - stay  # at the right end
    for start in range(0, length, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        key = load_keys(keys_ptr, offs, length)
        stays = key > least
        if candidates_ptr is not None:
            stays |= (key == 0) & (offs < length)
        equal = key == least
        # both counts in one scan: a block has fewer than 1 << 16
        sums = tl.cumsum(stays.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        equals = (sums >> 16) - equal.to(tl.int32)  # before a token
        slots = slot + (sums & 0xFFFF) - stays.to(tl.int32) + tl.minimum(equals, ties)
        keep = stays | (equal & (equals < ties))
        if kept_ptr is None:
            tl.store(keep_ptr + base + offs, keep.to(tl.int8), mask=offs < length)
        else:
            tl.store(kept_ptr + pid_b * M + slots, offs.to(tl.int64), mask=keep & (slots >= 0))
        taken = tl.sum(keep.to(tl.int32), 0)
        ties -= tl.minimum(ties, tl.sum(equal.to(tl.int32), 0))
        slot += taken
    if kept_ptr is not None:
        for start in range(0, M - stay, BLOCK_N):
            offs = start + tl.arange(0, BLOCK_N)
            tl.store(kept_ptr + pid_b * M + offs, tl.full((BLOCK_N,), -1, tl.int64), mask=offs < M - stay)
        tl.store(lengths_ptr + pid_b, tl.minimum(stay, M).to(tl.int64))


def topk(
    scores: Tensor, k: int | Tensor, candidates: Tensor | None, cu_seqlens: Tensor | None, rows: int | None
) -> tuple[Tensor, Tensor]:
    """Positions of the k best of scores [B, N], and of what is no candidate: int64 [B, M] left-padded, lengths [B].

    M is `rows` where the caller knows it, or bounds it: the last rows are taken. Otherwise it is the longest of the
    batch, which the host waits for. Packed, scores are [T] and the result is that of a batch of one, [1, M] and [1].
    """
    mask = None if candidates is None else candidates.view(torch.uint8)
    batch, length = scores.shape if cu_seqlens is None else (cu_seqlens.shape[0] - 1, scores.shape[0])
    keys = scores.new_empty(*scores.shape, dtype=torch.int32)
    kept = lengths = keep = spans = None
    if cu_seqlens is not None:
        spans = cu_seqlens.contiguous()
        keep = scores.new_zeros(*scores.shape, dtype=torch.int8)  # a row of no sequence is not kept
    elif rows is None:
        keep = scores.new_empty(*scores.shape, dtype=torch.int8)
    else:
        kept = scores.new_empty(batch, rows, dtype=torch.int64)
        lengths = scores.new_empty(batch, dtype=torch.int64)
    with torch.cuda.device_of(scores):
        k_tensor, k_scalar, stride_k = on_device(k)
        _topk_kernel[(batch,)](
            scores, mask, keys, k_tensor, spans, keep, kept, lengths,
            *row_strides(scores), *((0, 0) if mask is None else row_strides(mask)),
            k_scalar, stride_k, length, rows or 0,
            BLOCK_N=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    if kept is not None and lengths is not None:
        return kept, lengths
    assert keep is not None
    return compact("topk_keep", keep.view(-1, length), rows)


@triton.jit
def sum_before(counts_ptr, end, CHUNK: tl.constexpr):
    """The sum of the first `end` int32 at counts_ptr."""
    total = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, end, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        total += tl.load(counts_ptr + offs, mask=offs < end, other=0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=VARYING)
def _compact_kernel(
    keep_ptr, counts_ptr, kept_ptr, lengths_ptr,   # keep [B, N], counts [B, blocks], kept [B, N], lengths [B]
    N, blocks,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B): positions go to the right end of their row, -1 fills the left
    pid_n = tl.program_id(0)
    pid_b = tl.program_id(1).to(tl.int64)
    length = sum_before(counts_ptr + pid_b * blocks, blocks, CHUNK)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = tl.load(keep_ptr + pid_b * N + offs_n, mask=offs_n < N, other=0).to(tl.int32)
    slot = N - length + sum_before(counts_ptr + pid_b * blocks, pid_n, CHUNK) + tl.cumsum(keep, 0) - 1
    kept_ptr += pid_b * N
    tl.store(kept_ptr + slot, offs_n.to(tl.int64), mask=keep != 0)
    tl.store(kept_ptr + offs_n, tl.full((BLOCK_N,), -1, tl.int64), mask=offs_n < N - length)
    tl.store(lengths_ptr + pid_b, length.to(tl.int64), mask=pid_n == 0)


def compact(op: str, keep: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions of the ones of keep [B, N] int8, contiguous: int64 [B, M] left-padded with -1, lengths [B].

    M is `rows` where the caller knows it, or bounds it: the last rows are taken. Otherwise it is the longest of the
    batch, which the host waits for.
    """
    batch, length = keep.shape
    check_most(op, "B", batch)
    counts = F.pad(keep, (0, -length % COMPACT_BLOCK)).unflatten(1, (-1, COMPACT_BLOCK)).sum(2, dtype=torch.int32)
    kept = torch.empty(batch, length, dtype=torch.int64, device=keep.device)
    lengths = torch.empty(batch, dtype=torch.int64, device=keep.device)
    with torch.cuda.device_of(keep):
        _compact_kernel[(counts.shape[1], batch)](
            keep, counts, kept, lengths, length, counts.shape[1],
            BLOCK_N=COMPACT_BLOCK, CHUNK=CHUNK, enable_fp_fusion=True,
        )  # fmt: skip
    if rows is None:
        return right_end(kept, int(lengths.max()), -1), lengths
    return right_end(kept, rows, -1), lengths.clamp_max(rows)


def right_end(x: Tensor, rows: int, fill: int) -> Tensor:
    """x [B, N] -> [B, rows] contiguous: its last columns, after `fill` where there are fewer."""
    missing = rows - x.shape[1]
    if missing > 0:
        return F.pad(x, (missing, 0), value=fill)
    return (
        x[:, -missing:].clone(memory_format=torch.contiguous_format) if missing else x
    )  # not a view of what is longer
