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


class Ranked(NamedTuple):
    """The groups of each sample by rank, in the order of their roots, and their members. Buffers of N."""

    kept: Tensor  # [B, N] int32 the root
    links: Tensor  # [B, N] int32 the group of the root's predecessor, counted from the last group; 0 for none
    starts: Tensor  # [B, N] int32 where in members its tokens begin
    sizes: Tensor  # [B, N] int32 how many there are
    totals: Tensor  # [B] int32 groups
    members: Tensor  # [B, N] int32 tokens by group, ascending within a group, then -1
    lengths: Tensor  # [B] int64 groups, those that do not fit in a capacity left out
    from_last: Tensor  # [B, N] int64 the row of each token, 1 for the last one; 0 for tokens that are in none


@triton.jit
def _load_roots(roots_ptr, stride_rn, offs_n, N):
    # -1 for what cannot be a root
    root = tl.load(roots_ptr + offs_n * stride_rn, mask=offs_n < N, other=-1).to(tl.int64)
    return tl.where(root < N, root, -1)


@triton.jit(do_not_specialize=VARYING)
def _group_kernel(
    roots_ptr, predecessor_ptr,                    # each [B, N]
    counts_ptr, arrival_ptr, places_ptr,           # members of a root, those before a token, rank << 32 | start
    kept_ptr, links_ptr, starts_ptr, sizes_ptr,    # by rank, as in Ranked
    totals_ptr, listed_ptr, lengths_ptr,           # [B]; listed: members of all groups
    keys_ptr, from_last_ptr,                       # keys [B, N] int64 root << 32 | token, by root
    stride_rb, stride_rn,
    stride_pb, stride_pn,
    N, distance, capacity,
    LINKS: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (B,); capacity is -1 for none
    pid_b = tl.program_id(0).to(tl.int64)
    roots_ptr += pid_b * stride_rb
    row = pid_b * N
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        tl.store(counts_ptr + row + offs_n, tl.zeros((BLOCK_N,), tl.int32), mask=offs_n < N)
    tl.debug_barrier()  # what one thread has written others read
    roots = tl.zeros((BLOCK_N,), tl.int32)  # by place in a block, so that threads do not wait for each other
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        root = _load_roots(roots_ptr, stride_rn, offs_n, N)
        one = tl.full((BLOCK_N,), 1, tl.int32)
        arrival = tl.atomic_add(counts_ptr + row + root, one, mask=root >= 0, sem="relaxed")
        tl.store(arrival_ptr + row + offs_n, arrival, mask=root >= 0)
        roots += (root == offs_n).to(tl.int32)
    total = tl.sum(roots, 0)
    tl.debug_barrier()
    first_rank = 0
    first_place = 0
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        is_root = _load_roots(roots_ptr, stride_rn, offs_n, N) == offs_n
        count = tl.load(counts_ptr + row + offs_n, mask=is_root, other=0)
        rank = first_rank + tl.cumsum(is_root.to(tl.int32), 0) - 1
        begin = first_place + tl.cumsum(count, 0) - count
        place = (rank.to(tl.int64) << _KEY_BITS) | begin
        tl.store(places_ptr + row + offs_n, tl.where(is_root, place, -1), mask=offs_n < N)
        tl.store(kept_ptr + row + rank, offs_n.to(tl.int32), mask=is_root)
        tl.store(sizes_ptr + row + rank, count, mask=is_root)
        tl.store(starts_ptr + row + rank, begin, mask=is_root)
        first_rank += tl.sum(is_root.to(tl.int32), 0)
        first_place += tl.sum(count, 0)
    tl.debug_barrier()
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        root = _load_roots(roots_ptr, stride_rn, offs_n, N)
        place = tl.load(places_ptr + row + root, mask=root >= 0, other=-1)
        rank = (place >> _KEY_BITS).to(tl.int32)
        place &= 0xFFFFFFFF
        place += tl.load(arrival_ptr + row + offs_n, mask=rank >= 0, other=0)
        tl.store(keys_ptr + row + place, (root << _KEY_BITS) | offs_n, mask=rank >= 0)
        from_last = tl.where(rank >= 0, total - rank, 0)
        if capacity >= 0:
            from_last = tl.where(from_last <= capacity, from_last, 0)
        tl.store(from_last_ptr + row + offs_n, from_last.to(tl.int64), mask=offs_n < N)
        if LINKS:
            is_root = root == offs_n
            earlier = offs_n - distance
            if not STRIDED:
                earlier = tl.load(predecessor_ptr + pid_b * stride_pb + offs_n * stride_pn, mask=is_root, other=-1).to(
                    tl.int64
                )
            linked = is_root & (earlier >= 0) & (earlier < N)
            earlier_root = tl.load(roots_ptr + earlier * stride_rn, mask=linked, other=-1).to(tl.int64)
            linked &= (earlier_root >= 0) & (earlier_root < N)
            earlier_rank = (tl.load(places_ptr + row + earlier_root, mask=linked, other=-1) >> _KEY_BITS).to(tl.int32)
            tl.store(links_ptr + row + rank, tl.where(earlier_rank >= 0, total - earlier_rank, 0), mask=is_root)
    tl.store(totals_ptr + pid_b, total)
    tl.store(listed_ptr + pid_b, first_place)
    if capacity >= 0:
        total = tl.minimum(total, capacity)
    tl.store(lengths_ptr + pid_b, tl.cast(total, tl.int64))


@triton.jit(do_not_specialize=VARYING)
def _order_kernel(
    keys_ptr, places_ptr, sizes_ptr, listed_ptr, members_ptr,  # keys, places, members [B, N]
    N,
    BLOCK_N: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    # grid (ceil(N / BLOCK_N), B): keys ascend from group to group, so the place of a key is the number of smaller ones
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    listed = tl.load(listed_ptr + pid_b)
    row = pid_b * N
    keys_ptr += row
    mask = offs_n < listed
    key = tl.load(keys_ptr + offs_n, mask=mask, other=0)
    place = tl.load(places_ptr + row + (key >> _KEY_BITS), mask=mask, other=0)
    start = (place & 0xFFFFFFFF).to(tl.int32)
    end = start + tl.load(sizes_ptr + row + (place >> _KEY_BITS), mask=mask, other=0)
    lowest = tl.min(tl.where(mask, start, N), 0)
    smaller = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(lowest, tl.max(end, 0), OTHERS):
        offs = first + tl.arange(0, OTHERS)
        other = tl.load(keys_ptr + offs, mask=offs < listed, other=0x7FFFFFFFFFFFFFFF)
        smaller += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(members_ptr + row + lowest + smaller, (key & 0xFFFFFFFF).to(tl.int32), mask=mask)
    padding = (offs_n < N) & (offs_n >= listed)
    tl.store(members_ptr + row + offs_n, tl.full((BLOCK_N,), -1, tl.int32), mask=padding)


def rank_groups(roots: Tensor, predecessor: Tensor | None, stride: int, capacity: int | None) -> Ranked:
    """roots [B, N], not empty. Links come from `predecessor`, or from a `stride` above 0, or there are none."""
    batch, length = roots.shape
    # one allocation; each part is aligned, because Triton compiles anew for what is not
    parts = roots.new_empty(7, -(-batch * length // 16) * 16, dtype=torch.int32).unbind()
    counts, arrival, kept, links, starts, sizes, members = parts
    totals, listed = roots.new_empty(2, -(-batch // 16) * 16, dtype=torch.int32).unbind()
    keys, places, from_last = (roots.new_empty(batch, length, dtype=torch.int64) for _ in range(3))
    lengths = roots.new_empty(batch, dtype=torch.int64)
    partner = roots if predecessor is None else predecessor
    with torch.cuda.device_of(roots):
        _group_kernel[(batch,)](
            roots, partner, counts, arrival, places, kept, links, starts, sizes, totals, listed, lengths, keys,
            from_last, *roots.stride(), *partner.stride(), length, stride, -1 if capacity is None else capacity,
            LINKS=predecessor is not None or stride > 0, STRIDED=predecessor is None, BLOCK_N=BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        _order_kernel[(cdiv(length, _ORDER_BLOCK), batch)](
            keys, places, sizes, listed, members, length,
            BLOCK_N=_ORDER_BLOCK, OTHERS=_OTHERS, enable_fp_fusion=True,
        )  # fmt: skip
    return Ranked(kept, links, starts, sizes, totals, members, lengths, from_last)
