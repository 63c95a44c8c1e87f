"""From the root of each token to compacted rows and the ordered list of each row's members, without a sort.

A root's rank is the number of roots before it (a scan); a group's place in the member list is the number of members
before it (a scan); tokens enter their group's stretch of the list in the order their atomic increments arrive, and a
second kernel puts each stretch in ascending order by counting smaller members. So nothing depends on the order programs
run in. What belongs to a group stands at its rank in buffers of N: the host does not know their number yet.

One program groups a sample, because its threads can wait for each other between the passes. Bound by latency: about 60
bytes a token. The second kernel compares the members of a group with each other, which costs more than the rest once a
group has tens of thousands of members.
Reference: reference.group_rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import cdiv
from ._radix import WARPS
from ._specialisation import VARYING

BLOCK = 2048  # tokens that a program looks at at a time
_ORDER_BLOCK = 128  # list places a program of the last pass
_OTHERS = 32  # places that it compares them with at a time
_KEY_BITS = tl.constexpr(32)


# The parts of the buffer that the kernels share, each of B * N int32 and rounded up, in which a sample has N
KEPT = tl.constexpr(0)  # the root of each rank
LINKS = tl.constexpr(1)  # the group of the root's predecessor, counted from the last group; 0 for none
STARTS = tl.constexpr(2)  # where in MEMBERS its tokens begin
SIZES = tl.constexpr(3)  # how many there are
TOTALS = tl.constexpr(4)  # [B] groups
MEMBERS = tl.constexpr(5)  # tokens by group, ascending within a group, then -1
_LISTED = tl.constexpr(6)  # [B] members of all groups
_COUNTS = tl.constexpr(7)  # the members of a root, by token
_ARRIVAL = tl.constexpr(8)  # those of its root before a token
_PLACES = tl.constexpr(9)  # int64, takes two: rank << 32 | start, by root
_KEYS = tl.constexpr(11)  # int64, takes two: root << 32 | token, by root
_PARTS = 13


class Ranked(NamedTuple):
    """The groups of each sample by rank, in the order of their roots, and their members."""

    buffer: Tensor  # [parts, B * N rounded up] int32
    lengths: Tensor  # [B] int64 groups, those that do not fit in a capacity left out

    def members(self, roots: Tensor) -> Tensor:
        """[B, N] int32, given the roots [B, N]."""
        return self.buffer[MEMBERS.value, : roots.numel()].view_as(roots)


@triton.jit
def part(buffer_ptr, S, INDEX: tl.constexpr):
    """Where a part of the buffer begins, whose parts have S elements, a multiple of 16."""
    return buffer_ptr + INDEX * tl.multiple_of(S, 16).to(tl.int64)


@triton.jit
def _long_part(buffer_ptr, S, INDEX: tl.constexpr):
    return part(buffer_ptr, S, INDEX).to(tl.pointer_type(tl.int64))


@triton.jit
def _load_roots(roots_ptr, stride_rn, offs_n, mask, N):
    # int32, -1 for what cannot be a root
    root = tl.load(roots_ptr + offs_n.to(tl.int64) * stride_rn, mask=mask, other=-1)
    return tl.where((root >= 0) & (root < N), root, -1).to(tl.int32)


@triton.jit(do_not_specialize=VARYING)
def _group_kernel(
    roots_ptr, predecessor_ptr, buffer_ptr,        # roots, predecessor [B, N]
    lengths_ptr,                                   # [B] as in Ranked
    stride_rb, stride_rn,
    stride_pb, stride_pn,
    N, S, distance, capacity,
    LINKED: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (B,); capacity is -1 for none
    pid_b = tl.program_id(0).to(tl.int64)
    roots_ptr += pid_b * stride_rb
    predecessor_ptr += pid_b * stride_pb
    row = pid_b * N
    counts_ptr = part(buffer_ptr, S, _COUNTS) + row
    arrival_ptr = part(buffer_ptr, S, _ARRIVAL) + row
    places_ptr = _long_part(buffer_ptr, S, _PLACES) + row
    keys_ptr = _long_part(buffer_ptr, S, _KEYS) + row
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        tl.store(counts_ptr + offs_n, tl.zeros((BLOCK_N,), tl.int32), mask=offs_n < N)
    tl.debug_barrier()  # what one thread has written others read
    roots = tl.zeros((BLOCK_N,), tl.int32)  # by place in a block, so that threads do not wait for each other
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        root = _load_roots(roots_ptr, stride_rn, offs_n, offs_n < N, N)
        one = tl.full((BLOCK_N,), 1, tl.int32)
        arrival = tl.atomic_add(counts_ptr + root, one, mask=root >= 0, sem="relaxed")
        tl.store(arrival_ptr + offs_n, arrival, mask=root >= 0)
        roots += (root == offs_n).to(tl.int32)
    total = tl.sum(roots, 0)
    tl.debug_barrier()
    first_rank = 0
    first_place = 0
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        is_root = _load_roots(roots_ptr, stride_rn, offs_n, offs_n < N, N) == offs_n
        count = tl.load(counts_ptr + offs_n, mask=is_root, other=0)
        rank = first_rank + tl.cumsum(is_root.to(tl.int32), 0) - 1
        begin = first_place + tl.cumsum(count, 0) - count
        place = (rank.to(tl.int64) << _KEY_BITS) | begin
        tl.store(places_ptr + offs_n, tl.where(is_root, place, -1), mask=offs_n < N)
        tl.store(part(buffer_ptr, S, KEPT) + row + rank, offs_n.to(tl.int32), mask=is_root)
        tl.store(part(buffer_ptr, S, SIZES) + row + rank, count, mask=is_root)
        tl.store(part(buffer_ptr, S, STARTS) + row + rank, begin, mask=is_root)
        first_rank += tl.sum(is_root.to(tl.int32), 0)
        first_place += tl.sum(count, 0)
    tl.debug_barrier()
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        root = _load_roots(roots_ptr, stride_rn, offs_n, offs_n < N, N)
        place = tl.load(places_ptr + root, mask=root >= 0, other=-1)
        rank = (place >> _KEY_BITS).to(tl.int32)
        place &= 0xFFFFFFFF
        place += tl.load(arrival_ptr + offs_n, mask=rank >= 0, other=0)
        tl.store(keys_ptr + place, (root.to(tl.int64) << _KEY_BITS) | offs_n, mask=rank >= 0)
        if LINKED:
            is_root = root == offs_n
            earlier = offs_n - distance
            if not STRIDED:
                earlier = tl.load(predecessor_ptr + offs_n.to(tl.int64) * stride_pn, mask=is_root, other=-1)
            linked = is_root & (earlier >= 0) & (earlier < N)
            earlier_root = _load_roots(roots_ptr, stride_rn, earlier, linked, N)
            linked &= earlier_root >= 0
            earlier_rank = (tl.load(places_ptr + earlier_root, mask=linked, other=-1) >> _KEY_BITS).to(tl.int32)
            tl.store(
                part(buffer_ptr, S, LINKS) + row + rank,
                tl.where(earlier_rank >= 0, total - earlier_rank, 0),
                mask=is_root,
            )
    tl.store(part(buffer_ptr, S, TOTALS) + pid_b, total)
    tl.store(part(buffer_ptr, S, _LISTED) + pid_b, first_place)
    if capacity >= 0:
        total = tl.minimum(total, capacity)
    tl.store(lengths_ptr + pid_b, tl.cast(total, tl.int64))


@triton.jit(do_not_specialize=VARYING)
def _order_kernel(
    buffer_ptr,
    N, S,
    BLOCK_N: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    # grid (ceil(N / BLOCK_N), B): keys ascend from group to group, so the place of a key is the number of smaller ones
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    listed = tl.load(part(buffer_ptr, S, _LISTED) + pid_b)
    row = pid_b * N
    keys_ptr = _long_part(buffer_ptr, S, _KEYS) + row
    members_ptr = part(buffer_ptr, S, MEMBERS) + row
    mask = offs_n < listed
    key = tl.load(keys_ptr + offs_n, mask=mask, other=0)
    place = tl.load(_long_part(buffer_ptr, S, _PLACES) + row + (key >> _KEY_BITS), mask=mask, other=0)
    start = (place & 0xFFFFFFFF).to(tl.int32)
    end = start + tl.load(part(buffer_ptr, S, SIZES) + row + (place >> _KEY_BITS), mask=mask, other=0)
    lowest = tl.min(tl.where(mask, start, N), 0)
    smaller = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(lowest, tl.max(end, 0), OTHERS):
        offs = first + tl.arange(0, OTHERS)
        other = tl.load(keys_ptr + offs, mask=offs < listed, other=0x7FFFFFFFFFFFFFFF)
        smaller += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(members_ptr + lowest + smaller, (key & 0xFFFFFFFF).to(tl.int32), mask=mask)
    padding = (offs_n < N) & (offs_n >= listed)
    tl.store(members_ptr + offs_n, tl.full((BLOCK_N,), -1, tl.int32), mask=padding)


def rank_groups(roots: Tensor, predecessor: Tensor | None, stride: int, capacity: int | None) -> Ranked:
    """roots [B, N], not empty, on the current device.

    Links come from `predecessor`, or from a `stride` above 0, or there are none.
    """
    batch, length = roots.shape
    size = -(-batch * length // 16) * 16  # Triton compiles anew for parts that are not aligned
    buffer = roots.new_empty(_PARTS, size, dtype=torch.int32)
    lengths = roots.new_empty(batch, dtype=torch.int64)
    partner = roots if predecessor is None else predecessor
    _group_kernel[(batch,)](
        roots, partner, buffer, lengths, *roots.stride(), *partner.stride(),
        length, size, stride, -1 if capacity is None else capacity,
        LINKED=predecessor is not None or stride > 0, STRIDED=predecessor is None, BLOCK_N=BLOCK,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    _order_kernel[(cdiv(length, _ORDER_BLOCK), batch)](
        buffer, length, size,
        BLOCK_N=_ORDER_BLOCK, OTHERS=_OTHERS, enable_fp_fusion=True,
    )  # fmt: skip
    return Ranked(buffer, lengths)
