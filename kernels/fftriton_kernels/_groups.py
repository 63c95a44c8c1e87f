"""From the root of each token to compacted rows and the ordered list of each row's members, without a sort.

A root's row is the number of roots before it (a scan); a row's place in the member list is the number of members before
it (a scan); tokens enter their row's stretch of the list in the order their atomic increments arrive, and a last pass
puts each stretch in ascending order by counting smaller members. So nothing depends on the order programs run in.
Rows stand at the right end of buffers of N until the host knows M, the longest of the batch, or for good, where M is a
capacity that the caller gave; rows that do not fit there are cut off.

Bound by launches: about 60 bytes a token. The last pass compares the members of a group with each other, which costs
more than the rest once a group has tens of thousands of members.
Reference: reference.group_rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _cpu
from ._dispatch import runs_triton
from ._ops import add_op_namespace_prefix
from ._radix import right_end, sum_before
from ._specialisation import VARYING
from ._types import Groups

BLOCK = 1024  # tokens a program
_ORDER_BLOCK = 128  # list places a program of the last pass
_OTHERS = 32  # places that it compares them with at a time
_CHUNK = 64
_KEY_BITS = tl.constexpr(32)


class _Scratch(NamedTuple):
    """What the passes hand on."""

    arrival: Tensor  # [B, N] int32 how many members of the token's group were counted before it
    counts: Tensor  # [B, N] int32 members at each root
    slot: Tensor  # [B, N] int64 a root's row in buffers of N, -1 for other tokens
    block_roots: Tensor  # [B, blocks] int32
    block_members: Tensor  # [B, blocks] int32 members of the groups whose root is in the block
    keys: Tensor  # [B, N] int64 root << 32 | token, by root


@triton.jit
def _load_roots(roots_ptr, stride_rb, stride_rn, pid_b, offs_n, N):
    # -1 for what cannot be a root
    root = tl.load(roots_ptr + pid_b * stride_rb + offs_n * stride_rn, mask=offs_n < N, other=-1).to(tl.int64)
    return tl.where(root < N, root, -1)


@triton.jit(do_not_specialize=VARYING)
def _count_kernel(
    roots_ptr, counts_ptr, arrival_ptr, block_roots_ptr,  # roots, counts, arrival [B, N], block_roots [B, blocks]
    stride_rb, stride_rn,
    N, blocks,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B); counts are zero at the start
    pid_n = tl.program_id(0)
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    root = _load_roots(roots_ptr, stride_rb, stride_rn, pid_b, offs_n, N)
    one = tl.full((BLOCK_N,), 1, tl.int32)
    arrival = tl.atomic_add(counts_ptr + pid_b * N + root, one, mask=root >= 0, sem="relaxed")
    tl.store(arrival_ptr + pid_b * N + offs_n, arrival, mask=root >= 0)
    tl.store(block_roots_ptr + pid_b * blocks + pid_n, tl.sum((root == offs_n).to(tl.int32), 0))


@triton.jit(do_not_specialize=VARYING)
def _slot_kernel(
    roots_ptr, counts_ptr, block_roots_ptr, slot_ptr, block_members_ptr,
    kept_ptr, sizes_ptr, lengths_ptr,              # kept, sizes [B, N], lengths [B]
    stride_rb, stride_rn,
    N, blocks,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B)
    pid_n = tl.program_id(0)
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    root = _load_roots(roots_ptr, stride_rb, stride_rn, pid_b, offs_n, N)
    is_root = root == offs_n
    count = tl.load(counts_ptr + pid_b * N + offs_n, mask=is_root, other=0)
    length = sum_before(block_roots_ptr + pid_b * blocks, blocks, CHUNK)
    first = N - length + sum_before(block_roots_ptr + pid_b * blocks, pid_n, CHUNK)
    slot = first + tl.cumsum(is_root.to(tl.int32), 0) - 1
    tl.store(slot_ptr + pid_b * N + offs_n, tl.where(is_root, slot, -1).to(tl.int64), mask=offs_n < N)
    tl.store(kept_ptr + pid_b * N + slot, offs_n, mask=is_root)
    tl.store(sizes_ptr + pid_b * N + slot, count.to(tl.int64), mask=is_root)
    padding = offs_n < N - length
    tl.store(kept_ptr + pid_b * N + offs_n, tl.full((BLOCK_N,), -1, tl.int64), mask=padding)
    tl.store(sizes_ptr + pid_b * N + offs_n, tl.zeros((BLOCK_N,), tl.int64), mask=padding)
    tl.store(block_members_ptr + pid_b * blocks + pid_n, tl.sum(count, 0))
    tl.store(lengths_ptr + pid_b, length.to(tl.int64), mask=pid_n == 0)


@triton.jit(do_not_specialize=VARYING)
def _start_kernel(
    counts_ptr, slot_ptr, block_members_ptr, lengths_ptr, starts_ptr,  # starts [B, N]
    N, blocks,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B)
    pid_n = tl.program_id(0)
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    slot = tl.load(slot_ptr + pid_b * N + offs_n, mask=offs_n < N, other=-1)
    count = tl.load(counts_ptr + pid_b * N + offs_n, mask=slot >= 0, other=0)
    start = sum_before(block_members_ptr + pid_b * blocks, pid_n, CHUNK) + tl.cumsum(count, 0) - count
    tl.store(starts_ptr + pid_b * N + slot, start.to(tl.int64), mask=slot >= 0)
    padding = offs_n < N - tl.load(lengths_ptr + pid_b)
    tl.store(starts_ptr + pid_b * N + offs_n, tl.zeros((BLOCK_N,), tl.int64), mask=padding)


@triton.jit
def _longest(lengths_ptr, batch, CHUNK: tl.constexpr):
    longest = tl.zeros((CHUNK,), tl.int64)
    for first in range(0, batch, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        longest = tl.maximum(longest, tl.load(lengths_ptr + offs, mask=offs < batch, other=0))
    return tl.max(longest, 0)


@triton.jit(do_not_specialize=VARYING)
def _scatter_kernel(
    roots_ptr, predecessor_ptr, arrival_ptr, slot_ptr, starts_ptr, lengths_ptr,
    keys_ptr, row_ptr, links_ptr,                  # each [B, N]
    stride_rb, stride_rn,
    stride_pb, stride_pn,
    N, batch, distance, capacity,
    LINKS: tl.constexpr, STRIDED: tl.constexpr, HAS_CAPACITY: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B)
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    # columns of the buffers that the result does without
    if HAS_CAPACITY:
        before = pid_b * 0 + N - capacity
    else:
        before = N - _longest(lengths_ptr, batch, CHUNK)
    root = _load_roots(roots_ptr, stride_rb, stride_rn, pid_b, offs_n, N)
    slot = tl.load(slot_ptr + pid_b * N + root, mask=root >= 0, other=-1)
    start = tl.load(starts_ptr + pid_b * N + slot, mask=slot >= 0, other=0)
    place = start + tl.load(arrival_ptr + pid_b * N + offs_n, mask=slot >= 0, other=0)
    tl.store(keys_ptr + pid_b * N + place, (root << _KEY_BITS) | offs_n, mask=slot >= 0)
    tl.store(row_ptr + pid_b * N + offs_n, tl.where(slot >= tl.maximum(before, 0), slot - before, -1), mask=offs_n < N)
    if LINKS:
        is_root = root == offs_n
        earlier = offs_n - distance
        if not STRIDED:
            earlier = tl.load(predecessor_ptr + pid_b * stride_pb + offs_n * stride_pn, mask=is_root, other=-1).to(
                tl.int64
            )
        linked = is_root & (earlier >= 0) & (earlier < N)
        earlier_root = tl.load(roots_ptr + pid_b * stride_rb + earlier * stride_rn, mask=linked, other=-1).to(tl.int64)
        linked &= (earlier_root >= 0) & (earlier_root < N)
        earlier_slot = tl.load(slot_ptr + pid_b * N + earlier_root, mask=linked, other=-1)
        link = tl.where(earlier_slot >= tl.maximum(before, 0), earlier_slot - before, -1)
        tl.store(links_ptr + pid_b * N + slot, link, mask=is_root)
        padding = offs_n < N - tl.load(lengths_ptr + pid_b)
        tl.store(links_ptr + pid_b * N + offs_n, tl.full((BLOCK_N,), -1, tl.int64), mask=padding)


@triton.jit(do_not_specialize=VARYING)
def _order_kernel(
    keys_ptr, slot_ptr, starts_ptr, sizes_ptr, block_members_ptr, members_ptr,  # keys, members [B, N]
    N, blocks,
    BLOCK_N: tl.constexpr, OTHERS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # grid (ceil(N / BLOCK_N), B): keys ascend from group to group, so the place of a key is the number of smaller ones
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    total = sum_before(block_members_ptr + pid_b * blocks, blocks, CHUNK)
    keys_ptr += pid_b * N
    mask = offs_n < total
    key = tl.load(keys_ptr + offs_n, mask=mask, other=0)
    slot = tl.load(slot_ptr + pid_b * N + (key >> _KEY_BITS), mask=mask, other=0)
    start = tl.load(starts_ptr + pid_b * N + slot, mask=mask, other=0)
    end = start + tl.load(sizes_ptr + pid_b * N + slot, mask=mask, other=0)
    lowest = tl.min(tl.where(mask, start, N), 0)
    rank = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(lowest, tl.max(end, 0), OTHERS):
        offs = first + tl.arange(0, OTHERS)
        other = tl.load(keys_ptr + offs, mask=offs < total, other=0x7FFFFFFFFFFFFFFF)
        rank += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(members_ptr + pid_b * N + lowest + rank, key & 0xFFFFFFFF, mask=mask)
    tl.store(members_ptr + pid_b * N + offs_n, tl.full((BLOCK_N,), -1, tl.int64), mask=(offs_n < N) & (offs_n >= total))


def _scratch(roots: Tensor, blocks: int) -> _Scratch:
    batch, length = roots.shape
    return _Scratch(
        arrival=roots.new_empty(batch, length, dtype=torch.int32),
        counts=roots.new_zeros(batch, length, dtype=torch.int32),
        slot=roots.new_empty(batch, length, dtype=torch.int64),
        block_roots=roots.new_empty(batch, blocks, dtype=torch.int32),
        block_members=roots.new_empty(batch, blocks, dtype=torch.int32),
        keys=roots.new_empty(batch, length, dtype=torch.int64),
    )


def _sent(lengths: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start the copy of the lengths to the host; the GPU goes on."""
    if not lengths.is_cuda:
        return lengths, None
    on_host = torch.empty(lengths.shape, dtype=lengths.dtype, pin_memory=True)
    on_host.copy_(lengths, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return on_host, event


def _group_rows(roots: Tensor, predecessor: Tensor | None, stride: int, capacity: int | None) -> Groups:
    batch, length = roots.shape
    blocks = triton.cdiv(length, BLOCK)
    grid = (blocks, batch)
    scratch = _scratch(roots, blocks)
    linked = predecessor is not None or stride > 0
    kept, row, starts, sizes, members = (roots.new_empty(batch, length, dtype=torch.int64) for _ in range(5))
    links = roots.new_empty(batch, length if linked else 0, dtype=torch.int64)
    lengths = roots.new_empty(batch, dtype=torch.int64)
    partner = roots if predecessor is None else predecessor
    with torch.cuda.device_of(roots):
        _count_kernel[grid](
            roots, scratch.counts, scratch.arrival, scratch.block_roots, *roots.stride(), length, blocks,
            BLOCK_N=BLOCK, enable_fp_fusion=True,
        )  # fmt: skip
        _slot_kernel[grid](
            roots, scratch.counts, scratch.block_roots, scratch.slot, scratch.block_members, kept, sizes, lengths,
            *roots.stride(), length, blocks, BLOCK_N=BLOCK, CHUNK=_CHUNK, enable_fp_fusion=True,
        )  # fmt: skip
        on_host, copied = _sent(lengths) if capacity is None else (lengths, None)
        _start_kernel[grid](
            scratch.counts, scratch.slot, scratch.block_members, lengths, starts, length, blocks,
            BLOCK_N=BLOCK, CHUNK=_CHUNK, enable_fp_fusion=True,
        )  # fmt: skip
        _scatter_kernel[grid](
            roots, partner, scratch.arrival, scratch.slot, starts, lengths, scratch.keys, row, links,
            *roots.stride(), *partner.stride(), length, batch, stride, 0 if capacity is None else capacity,
            LINKS=linked, STRIDED=predecessor is None, HAS_CAPACITY=capacity is not None,
            BLOCK_N=BLOCK, CHUNK=_CHUNK, enable_fp_fusion=True,
        )  # fmt: skip
        _order_kernel[(triton.cdiv(length, _ORDER_BLOCK), batch)](
            scratch.keys, scratch.slot, starts, sizes, scratch.block_members, members, length, blocks,
            BLOCK_N=_ORDER_BLOCK, OTHERS=_OTHERS, CHUNK=_CHUNK, enable_fp_fusion=True,
        )  # fmt: skip
        if copied is not None:
            copied.synchronize()  # the only wait: the host needs M to allocate
    if capacity is None:
        rows = int(on_host.max())
    else:
        rows, lengths = capacity, lengths.clamp_max(capacity)
    kept, starts, sizes = right_end(kept, rows, -1), right_end(starts, rows, 0), right_end(sizes, rows, 0)
    return Groups(kept, lengths, right_end(links, rows, -1) if linked else links, row, starts, sizes, members)


@torch.library.custom_op(
    add_op_namespace_prefix("group_rows"),
    mutates_args=(),
    schema="(Tensor roots, Tensor? predecessor, SymInt stride, SymInt? capacity=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def group_rows(roots: Tensor, predecessor: Tensor | None, stride: int, capacity: int | None = None) -> Groups:
    """roots [B, N] -> Groups. Links come from `predecessor`, or from a `stride` above 0, or there are none.

    M is the longest of the batch, or the capacity.
    """
    if roots.numel() and runs_triton(roots):
        return _group_rows(roots, predecessor, stride, capacity)
    return _cpu.group_rows(roots, stride if predecessor is None and stride else predecessor, capacity)


@group_rows.register_fake
def _(roots, predecessor, stride, capacity=None):
    batch, length = roots.shape
    rows = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    links = rows if predecessor is not None or stride > 0 else 0
    sizes = ((batch, rows), (batch,), (batch, links), (batch, length), (batch, rows), (batch, rows), (batch, length))
    return tuple(roots.new_empty(size, dtype=torch.int64) for size in sizes)
