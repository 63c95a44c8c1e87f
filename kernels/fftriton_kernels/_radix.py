"""Exact radix select and order-preserving compaction over the rows of a [B, N] tensor, without a sort.

A score becomes a 32-bit key that orders as the scores do; four passes of 8 bits, highest first, narrow down the key of
the k-th best element, with k read from device memory. Each program writes the histogram of its own block and the next
pass adds them up: no atomics, nothing to zero, the same result in whatever order programs run. Ties at the threshold go
to the lower index, by the last pass's histograms of the blocks before.

The first pass belongs to the op, which knows how its scores arise; the steps are

    selection = new_selection(scores)
    <a kernel that stores `sort_key` in selection.keys and calls `tally` with digit 0>, or `score_keys`
    refine(selection, k)
    <a kernel that calls `threshold` and `admitted`>, or `keep_best`, and then `compact`

Packed, keys are [T] and a row is a sequence: it begins at cu_seqlens[s], which `span` looks up. What belongs to no
sequence is never selected.

Bound by launches: N keys are 430 KB at N = 107520, and stay in L2.
Reference: reference.topk_keep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._packed import longest
from ._specialisation import VARYING

BLOCK = 2048  # tokens a program
WARPS = 8
CHUNK = 16  # blocks whose histograms a program adds at a time
_BINS = tl.constexpr(256)


class Selection(NamedTuple):
    """A select under way. Packed: S sequences for B, and keys [T]."""

    keys: Tensor  # [B, N] int32 holding unsigned bits: 0 cannot be selected, 1 is NaN, above them every fp32 in order
    tallies: Tensor  # [4, B, blocks, 256] int32 histogram of each digit among the keys that share the digits before it
    state: Tensor  # [4, B, 2] int32 after each digit: the digits so far, how many are still to be taken below them
    cu_seqlens: Tensor | None  # [S+1] where the rows are packed

    @property
    def grid(self) -> tuple[int, int]:
        """(blocks, B): a program for each block of BLOCK tokens."""
        return self.tallies.shape[2], self.tallies.shape[1]

    @property
    def spans(self) -> Tensor:
        """What kernels take as cu_seqlens_ptr; not read where the rows are not packed."""
        return self.state if self.cu_seqlens is None else self.cu_seqlens


def new_selection(scores: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Selection:
    """Buffers for a select among scores [B, N], or [T] packed; the op's first kernel fills keys and tallies[0]."""
    if cu_seqlens is None:
        batch, length = scores.shape
    else:
        batch, length = cu_seqlens.shape[0] - 1, longest(cu_seqlens, max_seqlen, scores.shape[0])
        cu_seqlens = cu_seqlens.contiguous()
    return Selection(
        torch.empty(scores.shape, dtype=torch.int32, device=scores.device),
        torch.empty(4, batch, triton.cdiv(length, BLOCK), 256, dtype=torch.int32, device=scores.device),
        torch.empty(4, batch, 2, dtype=torch.int32, device=scores.device),
        cu_seqlens,
    )


def row_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of [B, N] or packed [T], where all rows share the first."""
    return (0, *tensor.stride()) if tensor.ndim == 1 else tensor.stride()


@triton.jit
def span(cu_seqlens_ptr, pid_b, N, PACKED: tl.constexpr):
    """Where row pid_b begins in a contiguous buffer, at which position its tokens begin to count, and its length."""
    if PACKED:  # N is the length of all rows together
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + pid_b).to(tl.int64), 0), N)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + pid_b + 1).to(tl.int64), 0), N)
        base = begin
        length = end - begin
    else:
        base = pid_b * N
        begin = pid_b * 0
        length = begin + N
    return base, begin, length


@triton.jit
def sort_key(x, eligible):
    """fp32 -> uint32 in the same order: 0 where not eligible, then NaN, then the numbers; -0.0 equals 0.0."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(eligible, tl.where(x == x, key, 1), 0)


@triton.jit
def load_keys(keys_ptr, base, offs_n, length):
    """The keys of a block as uint32, 0 past the end."""
    return tl.load(keys_ptr + base + offs_n, mask=offs_n < length, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def tally(key, prefix, tallies_ptr, pid_b, pid_n, blocks, batch, DIGIT: tl.constexpr):
    """Store the block's histogram of digit DIGIT (0 is the highest) of the keys whose higher digits are `prefix`."""
    counted = key != 0
    if DIGIT > 0:
        counted &= (key >> (32 - 8 * DIGIT)) == prefix
    digit = ((key >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
    histogram = tl.histogram(tl.where(counted, digit, 0), _BINS)  # no mask: Triton 3.2 has none
    histogram = histogram.to(tl.int64).to(tl.int32)  # what Triton 3.2's interpreter returns is not the int32 it says
    offs = tl.arange(0, _BINS)
    histogram -= tl.where(offs == 0, tl.sum(tl.where(counted, 0, 1), 0), 0)
    tl.store(tallies_ptr + ((DIGIT * batch + pid_b) * blocks + pid_n) * _BINS + offs, histogram)


@triton.jit
def _next_digit(tallies_ptr, prefix, k, pid_b, blocks, batch, DIGIT: tl.constexpr, CHUNK: tl.constexpr):
    """The digits of the k-th best key down to DIGIT, and how many of the keys that share them are taken."""
    offs = tl.arange(0, _BINS)
    tallies_ptr += (DIGIT * batch + pid_b) * blocks * _BINS
    total = tl.zeros((_BINS,), tl.int32)
    for first in range(0, blocks, CHUNK):
        rows = first + tl.arange(0, CHUNK)
        tile = tl.load(tallies_ptr + rows[:, None] * _BINS + offs[None, :], mask=rows[:, None] < blocks, other=0)
        total += tl.sum(tile, 0)
    if DIGIT == 0:
        k = tl.minimum(k, tl.sum(total, 0))
    digit = tl.max(tl.where(tl.cumsum(total, 0, reverse=True) >= k, offs, 0), 0)
    above = tl.sum(tl.where(offs > digit, total, 0), 0)
    return (prefix << 8) | digit.to(tl.uint32), k - above


@triton.jit
def _load_state(state_ptr, pid_b, batch, DIGIT: tl.constexpr):
    state_ptr += (DIGIT * batch + pid_b) * 2
    return tl.load(state_ptr).to(tl.uint32, bitcast=True), tl.load(state_ptr + 1)


@triton.jit(do_not_specialize=VARYING)
def _refine_kernel(
    keys_ptr, k_ptr, tallies_ptr, state_ptr,       # keys [B, N], k [B], tallies [4, B, blocks, 256], state [4, B, 2]
    cu_seqlens_ptr,
    k, stride_k, N, blocks, batch,
    K_ON_DEVICE: tl.constexpr, PACKED: tl.constexpr,
    DIGIT: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B): every program finds digit DIGIT - 1 of the threshold, then counts digit DIGIT in its block
    pid_n = tl.program_id(0)
    pid_b = tl.program_id(1).to(tl.int64)
    base, _, length = span(cu_seqlens_ptr, pid_b, N, PACKED)
    prefix = tl.zeros((), tl.uint32)
    if DIGIT > 1:
        prefix, remaining = _load_state(state_ptr, pid_b, batch, DIGIT - 2)
    elif K_ON_DEVICE:
        remaining = tl.minimum(tl.maximum(tl.load(k_ptr + pid_b * stride_k), 0), length).to(tl.int32)
    else:
        remaining = tl.zeros((), tl.int32) + k
    prefix, remaining = _next_digit(tallies_ptr, prefix, remaining, pid_b, blocks, batch, DIGIT - 1, CHUNK)
    out_ptr = state_ptr + ((DIGIT - 1) * batch + pid_b) * 2
    tl.store(out_ptr, prefix.to(tl.int32, bitcast=True), mask=pid_n == 0)
    tl.store(out_ptr + 1, remaining, mask=pid_n == 0)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tally(load_keys(keys_ptr, base, offs_n, length), prefix, tallies_ptr, pid_b, pid_n, blocks, batch, DIGIT)


def refine(selection: Selection, k: int | Tensor) -> None:
    """Narrow the select down to the k best keys of each row; k is an int or int32 / int64 [B] on the device."""
    keys, tallies, state, cu_seqlens = selection
    blocks, batch = selection.grid
    length = keys.shape[-1]
    if isinstance(k, Tensor):
        on_device, k_tensor, stride_k, k_scalar = True, k, k.stride(0), 0
    else:
        on_device, k_tensor, stride_k, k_scalar = False, keys, 0, min(k, length)
    with torch.cuda.device_of(keys):
        for digit in (1, 2, 3):
            _refine_kernel[selection.grid](
                keys, k_tensor, tallies, state, selection.spans, k_scalar, stride_k, length, blocks, batch,
                K_ON_DEVICE=on_device, PACKED=cu_seqlens is not None,
                DIGIT=digit, BLOCK_N=BLOCK, CHUNK=CHUNK, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip


@triton.jit
def threshold(tallies_ptr, state_ptr, pid_b, pid_n, blocks, batch, CHUNK: tl.constexpr):
    """After `refine`: the least key taken, how many equal to it are taken, how many such stand in earlier blocks."""
    prefix, remaining = _load_state(state_ptr, pid_b, batch, 2)
    least, ties = _next_digit(tallies_ptr, prefix, remaining, pid_b, blocks, batch, 3, CHUNK)
    tallies_ptr += (3 * batch + pid_b) * blocks * _BINS + (least & 255)
    earlier = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, pid_n, CHUNK):
        rows = first + tl.arange(0, CHUNK)
        earlier += tl.load(tallies_ptr + rows * _BINS, mask=rows < pid_n, other=0)
    return least, ties, tl.sum(earlier, 0)


@triton.jit
def admitted(key, least, ties, earlier):
    """Which keys of a block `threshold` takes."""
    equal = (key == least).to(tl.int32)
    rank = earlier + tl.cumsum(equal, 0) - equal
    return (key > least) | ((key == least) & (rank < ties))


@triton.jit(do_not_specialize=VARYING)
def _score_keys_kernel(
    scores_ptr, candidates_ptr, keys_ptr, tallies_ptr,  # scores, candidates [B, N], keys [B, N], tallies [4, B, ...]
    cu_seqlens_ptr,
    stride_sb, stride_sn,
    stride_cb, stride_cn,
    N, blocks, batch,
    HAS_CANDIDATES: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B)
    pid_n = tl.program_id(0)
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    base, begin, length = span(cu_seqlens_ptr, pid_b, N, PACKED)
    place = begin + offs_n
    eligible = offs_n < length
    x = tl.load(scores_ptr + pid_b * stride_sb + place * stride_sn, mask=eligible, other=0.0).to(tl.float32)
    if HAS_CANDIDATES:
        eligible &= tl.load(candidates_ptr + pid_b * stride_cb + place * stride_cn, mask=eligible, other=0) != 0
    key = sort_key(x, eligible)
    tl.store(keys_ptr + base + offs_n, key.to(tl.int32, bitcast=True), mask=offs_n < length)
    tally(key, 0, tallies_ptr, pid_b, pid_n, blocks, batch, 0)


def score_keys(
    scores: Tensor,
    candidates: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Selection:
    """The first pass for scores [B, N] fp16, bf16 or fp32, any strides; candidates bool [B, N]: only these compete."""
    selection = new_selection(scores, cu_seqlens, max_seqlen)
    mask = scores if candidates is None else candidates.view(torch.uint8)
    with torch.cuda.device_of(scores):
        _score_keys_kernel[selection.grid](
            scores, mask, selection.keys, selection.tallies, selection.spans, *row_strides(scores), *row_strides(mask),
            scores.shape[-1], *selection.grid,
            HAS_CANDIDATES=candidates is not None, PACKED=cu_seqlens is not None,
            BLOCK_N=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return selection


@triton.jit(do_not_specialize=VARYING)
def _keep_best_kernel(
    keys_ptr, tallies_ptr, state_ptr, keep_ptr, counts_ptr,  # keys, keep [B, N], counts [B, blocks]
    cu_seqlens_ptr,
    N, blocks, batch,
    KEEP_OTHERS: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B)
    pid_n = tl.program_id(0)
    pid_b = tl.program_id(1).to(tl.int64)
    least, ties, earlier = threshold(tallies_ptr, state_ptr, pid_b, pid_n, blocks, batch, CHUNK)
    base, _, length = span(cu_seqlens_ptr, pid_b, N, PACKED)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    key = load_keys(keys_ptr, base, offs_n, length)
    keep = admitted(key, least, ties, earlier)
    if KEEP_OTHERS:
        keep |= (key == 0) & (offs_n < length)
    tl.store(keep_ptr + base + offs_n, keep.to(tl.int8), mask=offs_n < length)
    tl.store(counts_ptr + pid_b * blocks + pid_n, tl.sum(keep.to(tl.int32), 0))


def keep_best(selection: Selection, keep_others: bool = False) -> tuple[Tensor, Tensor]:
    """After `refine`: int8 [B, N], 1 for the k best and, on demand, the ineligible; their int32 [B, blocks] sums.

    Packed, both are as for a batch of one, [1, T].
    """
    keys, tallies, state, cu_seqlens = selection
    packed = cu_seqlens is not None
    new = torch.zeros if packed else torch.empty  # a row of no sequence is not kept
    keep = new(keys.shape, dtype=torch.int8, device=keys.device)
    counts = torch.empty(selection.grid[::-1], dtype=torch.int32, device=keys.device)
    with torch.cuda.device_of(keys):
        _keep_best_kernel[selection.grid](
            keys, tallies, state, keep, counts, selection.spans, keys.shape[-1], *selection.grid,
            KEEP_OTHERS=keep_others, PACKED=packed, BLOCK_N=BLOCK, CHUNK=CHUNK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return (keep[None], block_counts(keep[None])) if packed else (keep, counts)


def block_counts(keep: Tensor) -> Tensor:
    """keep [B, N] int8 -> [B, blocks] int32: the ones in each block."""
    return F.pad(keep, (0, -keep.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2, dtype=torch.int32)


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


def compact(keep: Tensor, counts: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions of the ones of keep [B, N], as `keep_best` returns it: int64 [B, M] left-padded with -1, lengths [B].

    M is `rows` where the caller knows it, or bounds it: the last rows are taken. Otherwise it is the longest of the
    batch, which the host waits for.
    """
    batch, length = keep.shape
    kept = torch.empty(batch, length, dtype=torch.int64, device=keep.device)
    lengths = torch.empty(batch, dtype=torch.int64, device=keep.device)
    with torch.cuda.device_of(keep):
        _compact_kernel[(counts.shape[1], batch)](
            keep, counts, kept, lengths, length, counts.shape[1],
            BLOCK_N=BLOCK, CHUNK=CHUNK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return right_end(kept, int(lengths.max()) if rows is None else rows, -1), lengths


def right_end(x: Tensor, rows: int, fill: int) -> Tensor:
    """x [B, N] -> [B, rows] contiguous: its last columns, after `fill` where there are fewer."""
    missing = rows - x.shape[1]
    if missing > 0:
        return F.pad(x, (missing, 0), value=fill)
    return (
        x[:, -missing:].clone(memory_format=torch.contiguous_format) if missing else x
    )  # not a view of what is longer
