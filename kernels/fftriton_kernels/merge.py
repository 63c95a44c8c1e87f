"""Merging similar tokens: who joins whom, and one row for each group.

    link[b, t] = predecessor[b, t] if similarity[b, t] >= threshold and the pair is among the most similar, else t
    root[b, t] = link[b, link[b, ... t]],   y[b, row of r] = mean of x[b, t] over root[b, t] = r

'Threshold, else the most similar pairs up to a bound' is one rule, min(pairs over the threshold, max_merges), so the
bound can stay in device memory. Chains are followed by pointer jumping: whatever another program has already shortened
is used, and any value read is an ancestor, so the outcome does not depend on the order of programs.

The mean is bound by DRAM bandwidth: x is read once and M rows are written. All else is bound by launches.
Reference: reference.merge_roots, reference.merge_mean.
Source: FrameFusion, arXiv:2501.01986, section 3.3; ToMe, arXiv:2210.09461, for merging by averaging.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _cpu, _groups, _radix
from ._dispatch import (
    FLOATS,
    INDICES,
    INTERPRET,
    block,
    cdiv,
    check_at_least,
    check_dtype,
    check_float,
    check_most,
    check_same_device,
    check_shape,
    check_stride,
    is_finite,
    runs_triton,
)
from ._gather import gather
from ._operators import needs_gradient, operator
from ._packed import (
    any_rows,
    check_capacity,
    check_cu_seqlens,
    check_max_seqlen,
    lengths_of,
    rows_of,
    strided_predecessor,
)
from ._radix import load_keys, row_strides, sort_key
from ._specialisation import VARYING
from ._tiles import lookup
from ._types import NO_LINK, Merged

_NO_LINK = tl.constexpr(NO_LINK)
BLOCK = 1024  # tokens a program
_MEMBERS = 4  # rows in flight


@triton.jit
def _load_partners(predecessor_ptr, stride_pb, stride_pn, distance, pid_b, offs_n, mask, STRIDED: tl.constexpr):
    if STRIDED:
        partner = offs_n - distance
    else:
        partner = tl.load(predecessor_ptr + pid_b * stride_pb + offs_n * stride_pn, mask=mask, other=-1)
    return partner.to(tl.int64)


@triton.jit
def _joins(similarity, partner, offs_n, threshold):
    # False for NaN and for a partner that is not earlier
    return (partner >= 0) & (partner < offs_n) & (similarity >= threshold) & (similarity > _NO_LINK)


@triton.jit(do_not_specialize=VARYING)
def _join_keys_kernel(
    similarity_ptr, predecessor_ptr, keys_ptr,     # similarity, predecessor, keys [B, N]
    stride_sb, stride_sn,
    stride_pb, stride_pn,
    threshold, distance, N,
    STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B): how the pairs that reach the threshold rank, 0 for all others
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = offs_n < N
    partner = _load_partners(predecessor_ptr, stride_pb, stride_pn, distance, pid_b, offs_n, mask, STRIDED)
    similarity = tl.load(similarity_ptr + pid_b * stride_sb + offs_n * stride_sn, mask=mask, other=_NO_LINK)
    similarity = similarity.to(tl.float32)
    key = sort_key(similarity, _joins(similarity, partner, offs_n, threshold))
    tl.store(keys_ptr + pid_b * N + offs_n, key.to(tl.int32, bitcast=True), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _admit_kernel(
    keys_ptr, predecessor_ptr, k_ptr, cu_seqlens_ptr, roots_ptr,  # keys, predecessor, roots [B, N], k [B]
    stride_pb, stride_pn,
    k, stride_k, distance, N,
    STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (B,): the link of each token, its partner where the pair is among the k best
    pid_b = tl.program_id(0).to(tl.int64)
    base, begin, length = _radix.span(cu_seqlens_ptr, pid_b, N)
    keys_ptr += base
    k = _radix.count(k_ptr, k, stride_k, pid_b, length)
    length = length.to(tl.int32)
    least, ties, _ = _radix.threshold(keys_ptr, length, k, BLOCK_N)
    for start in range(0, length, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = offs_n < length
        key = load_keys(keys_ptr, offs_n, length)
        equal = (key == least).to(tl.int32)
        joins = (key > least) | ((key == least) & (tl.cumsum(equal, 0) - equal < ties))
        ties -= tl.minimum(ties, tl.sum(equal, 0))
        token = begin + offs_n.to(tl.int64)
        partner = _load_partners(predecessor_ptr, stride_pb, stride_pn, distance, pid_b, token, mask, STRIDED)
        tl.store(roots_ptr + base + offs_n, tl.where(joins, partner, token), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _link_kernel(
    similarity_ptr, predecessor_ptr, roots_ptr,    # each [B, N]
    stride_sb, stride_sn,
    stride_pb, stride_pn,
    threshold, distance, N,
    STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grid (blocks, B): the link of each token, its partner where the pair reaches the threshold
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    partner = _load_partners(predecessor_ptr, stride_pb, stride_pn, distance, pid_b, offs_n, offs_n < N, STRIDED)
    similarity = tl.load(similarity_ptr + pid_b * stride_sb + offs_n * stride_sn, mask=offs_n < N, other=_NO_LINK)
    joins = _joins(similarity.to(tl.float32), partner, offs_n, threshold)
    tl.store(roots_ptr + pid_b * N + offs_n, tl.where(joins, partner, offs_n), mask=offs_n < N)


@triton.jit(do_not_specialize=VARYING)
def _jump_kernel(roots_ptr, N, BLOCK_N: tl.constexpr):
    # grid (blocks, B): links [B, N] become roots in place
    roots_ptr += tl.program_id(1).to(tl.int64) * N
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    root = tl.load(roots_ptr + offs_n, mask=offs_n < N, other=0)
    further = tl.load(roots_ptr + root, mask=offs_n < N, other=0)
    moves = (offs_n < N) & (further != root)
    moving = tl.max(moves.to(tl.int32), 0)
    while moving > 0:
        root = tl.where(moves, further, root)
        tl.store(roots_ptr + offs_n, root, mask=moves)
        further = tl.load(roots_ptr + root, mask=moves, other=0)
        moves = moves & (further != root)
        moving = tl.max(moves.to(tl.int32), 0)


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    # fp32 -> dtype, to nearest even; the interpreter truncates to bf16, so there it is done on the bits
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit(do_not_specialize=VARYING)
def _mean_kernel(
    x_ptr,                                         # x [B, N, D]
    groups_ptr,                                    # the buffer of `_groups.Ranked`
    out_ptr, kept_ptr, links_ptr,                  # out [B, M, D], the others [B, M] int64
    stride_xb, stride_xn, stride_xd,
    N, M, S,
    LINKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MEMBERS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # grid (M, ceil(D / BLOCK_D), B): one program owns a stretch of one output row; rows stand at the right end
    pid_b = tl.program_id(2).to(tl.int64)
    row = pid_b * M + tl.program_id(0)
    rank = tl.load(_groups.part(groups_ptr, S, _groups.TOTALS) + pid_b) - M + tl.program_id(0)
    group = pid_b * N + tl.maximum(rank, 0)
    size = tl.where(rank < 0, 0, tl.load(_groups.part(groups_ptr, S, _groups.SIZES) + group))
    root = tl.where(rank < 0, -1, tl.load(_groups.part(groups_ptr, S, _groups.KEPT) + group))
    begin = tl.load(_groups.part(groups_ptr, S, _groups.STARTS) + group)
    if tl.program_id(1) == 0:
        tl.store(kept_ptr + row, root.to(tl.int64))
        if LINKED:
            link = tl.where(rank < 0, 0, tl.load(_groups.part(groups_ptr, S, _groups.LINKS) + group))
            tl.store(links_ptr + row, tl.where((link > 0) & (link <= M), M - link, -1).to(tl.int64))
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    x_ptr += pid_b * stride_xb + offs_d * stride_xd
    out_ptr += row * D + offs_d
    if size == 1:  # no arithmetic: bit for bit
        tl.store(out_ptr, tl.load(x_ptr + root.to(tl.int64) * stride_xn, mask=offs_d < D, other=0), mask=offs_d < D)
    else:
        members_ptr = _groups.part(groups_ptr, S, _groups.MEMBERS) + pid_b * N + begin
        total = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, size, MEMBERS):
            for step in tl.static_range(MEMBERS):
                member = tl.load(members_ptr + tl.minimum(first + step, size - 1)).to(tl.int64)
                mask_d = offs_d < tl.where(first + step < size, D, 0)
                total += tl.load(x_ptr + member * stride_xn, mask=mask_d, other=0.0).to(tl.float32)
        mean = tl.div_rn(total, tl.zeros((BLOCK_D,), tl.float32) + tl.maximum(size, 1).to(tl.float32))
        tl.store(out_ptr, _rounded(mean, out_ptr.dtype.element_ty, INTERPRETED), mask=offs_d < D)


def _launch_roots(
    similarity: Tensor,
    predecessor: Tensor | None,
    stride: int,
    threshold: float,
    max_merges: int | Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Roots of similarity [B, N], or [T] packed; neither is empty."""
    length = similarity.shape[-1]
    packed = cu_seqlens is not None
    if packed and predecessor is None:
        predecessor = strided_predecessor(1, length, stride, similarity.device, cu_seqlens)[0]
    strided = predecessor is None
    if packed and max_merges is not None:  # the select leaves out what belongs to no sequence
        roots = torch.arange(length, device=similarity.device)
    else:
        roots = similarity.new_empty(*similarity.shape, dtype=torch.int64)
    partner = roots if predecessor is None else predecessor
    strides = (*row_strides(similarity), *row_strides(partner))
    grid = (cdiv(length, BLOCK), similarity.numel() // length)
    with torch.cuda.device_of(similarity):
        if max_merges is None:
            _link_kernel[grid](
                similarity, partner, roots, *strides, threshold, stride, length,
                STRIDED=strided, BLOCK_N=BLOCK, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            keys = similarity.new_empty(*similarity.shape, dtype=torch.int32)
            _join_keys_kernel[grid](
                similarity, partner, keys, *strides, threshold, stride, length,
                STRIDED=strided, BLOCK_N=BLOCK, enable_fp_fusion=True,
            )  # fmt: skip
            samples = grid[1] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            k_tensor, k, stride_k = _radix.on_device(max_merges)
            _admit_kernel[(samples,)](
                keys, partner, k_tensor, None if cu_seqlens is None else cu_seqlens.contiguous(), roots, *strides[2:],
                k, stride_k, stride, length,
                STRIDED=strided, BLOCK_N=_radix.BLOCK, num_warps=_radix.WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        _jump_kernel[grid](roots, length, BLOCK_N=BLOCK, enable_fp_fusion=True)
    return roots


def _fake_roots(similarity, *_):
    return similarity.new_empty(similarity.shape, dtype=torch.int64)


@operator(
    "merge_roots",
    "(Tensor similarity, Tensor? predecessor, SymInt stride, float threshold, Tensor? bounds, SymInt? bound,"
    " Tensor? cu_seqlens=None) -> Tensor",
    fake=_fake_roots,
)  # fmt: skip
def _merge_roots(
    similarity: Tensor,
    predecessor: Tensor | None,
    stride: int,
    threshold: float,
    bounds: Tensor | None,
    bound: int | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    max_merges: int | Tensor | None = bounds
    if bounds is None and bound is not None and bound < similarity.shape[-1]:  # above, it bounds nothing
        max_merges = bound
    if not similarity.numel():
        return similarity.new_empty(similarity.shape, dtype=torch.int64)
    if not runs_triton(similarity):
        links = stride if predecessor is None else predecessor
        return _cpu.merge_roots(similarity, links, threshold, max_merges, cu_seqlens=cu_seqlens)
    return _launch_roots(similarity, predecessor, stride, threshold, max_merges, cu_seqlens)


def _launch_mean(
    x: Tensor, roots: Tensor, predecessor: Tensor | None, stride: int, capacity: int | None
) -> tuple[Tensor, ...]:
    """What the operator returns; nothing is empty, x is on the current device."""
    batch, length, width = x.shape
    check_most("merge_mean", "B", batch)
    groups = _groups.rank_groups(roots, predecessor, stride, capacity)
    rows = max(groups.lengths.tolist()) if capacity is None else capacity  # the host needs M to allocate: the only wait
    linked = predecessor is not None or stride > 0
    out = x.new_empty(batch, rows, width)
    kept = groups.lengths.new_empty(batch, rows)
    links = groups.lengths.new_empty(batch, rows if linked else 0)
    if rows:
        tile = lookup("mean", x, width)
        block_d = min(block(width), tile.width)
        _mean_kernel[(rows, cdiv(width, block_d), batch)](
            x, groups.buffer, out, kept, links, *x.stride(), length, rows, groups.buffer.shape[1],
            LINKED=linked, D=width, BLOCK_D=block_d, MEMBERS=_MEMBERS, INTERPRETED=INTERPRET,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, kept, groups.lengths, links


def _fake_mean(x, roots, predecessor, stride, capacity=None):
    batch, _, width = x.shape
    rows = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    links = rows if predecessor is not None or stride > 0 else 0
    sizes = ((batch, rows), (batch,), (batch, links))
    return x.new_empty(batch, rows, width), *(roots.new_empty(size, dtype=torch.int64) for size in sizes)


@operator(
    "merge_mean",
    "(Tensor x, Tensor roots, Tensor? predecessor, SymInt stride, SymInt? capacity=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_mean,
)  # fmt: skip
def _mean_of_groups(
    x: Tensor, roots: Tensor, predecessor: Tensor | None, stride: int, capacity: int | None = None
) -> tuple[Tensor, ...]:
    """Links come from `predecessor`, or from a `stride` above 0, or there are none.

    Returns:
        x [B, M, D], kept [B, M], lengths [B], links [B, M] or [B, 0].
    """
    if x.numel() and runs_triton(x):
        with torch.cuda.device_of(x):
            return _launch_mean(x, roots, predecessor, stride, capacity)
    return _cpu.merge_mean(x, roots, stride if predecessor is None and stride else predecessor, capacity)


class _Mean(torch.autograd.Function):
    """The operator with its gradient in x."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        out = _mean_of_groups(*arguments)
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(arguments[1], out[1].clone())  # the caller may change what it gets
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        row = _rows_of_tokens(*ctx.saved_tensors)
        batch, rows = grad.shape[:2]
        place = torch.where(row < 0, rows, row)  # what is in no row counts behind the last one
        sizes = row.new_zeros(batch, rows + 1).scatter_add(1, place, torch.ones_like(row))[:, :rows]
        share = (grad.float() / sizes.clamp_min(1).unsqueeze(2)).to(grad.dtype)  # what each member of a row receives
        return gather(row, [share])[0], None, None, None, None


def _rows_of_tokens(roots: Tensor, kept: Tensor) -> Tensor:
    """roots [B, N], kept [B, M] -> [B, N] int64: the row that each token was merged into, -1 for none."""
    roots = roots.long().contiguous()
    row = torch.searchsorted(kept, roots)  # among positions that ascend, M where all are lower
    return torch.where((roots >= 0) & (F.pad(kept, (0, 1), value=-1).gather(1, row) == roots), row, -1)


def merge_roots(
    similarity: Tensor,
    predecessor: int | Tensor,
    threshold: float,
    max_merges: int | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Find the group of each token: the position of the group's first token. Similar tokens join their predecessor.

    Groups are transitive: if a token's predecessor has joined an earlier token, both get that token's root.

    Args:
        similarity: [B, N] fp16, bf16 or fp32, any strides: similarity of each token to its predecessor. A pair joins if
            this is at least the threshold; NaN and NO_LINK never join.
        predecessor: how many places earlier the partner is, at least 1; or [B, N] int32 or int64, any strides, the
            position of each token's partner. A position that is not earlier, such as -1, means no partner.
        threshold: a finite number, compared in fp32.
        max_merges: admit at most this many pairs per sample, the most similar ones; ties go to the lower index. An int
            of at least 0, or int32 or int64 [B] on the device of `similarity`, which the host does not wait for.
        cu_seqlens: [S+1] int32 or int64, ascending from 0 to T (not checked, because that would stall a GPU).
            similarity [T] then holds packed sequences. A stride does not cross the start of a sequence. Explicit
            predecessors [T] are positions among all T tokens; the caller sees to it that they are in the token's own
            sequence, and that padding before the first sequence, as `merge_mean` leaves it, has none. max_merges
            applies to each sequence; as a tensor it is [S].
        max_seqlen: the length of the longest packed sequence, or more. Nothing depends on it any more.

    Returns:
        [B, N] int64; packed: [T]. root[b, t] == t for the first token of a group. In each sample, min(pairs that reach
        the threshold, max_merges) tokens are not their own root.

    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape or a value that does not fit the above, or tensors on
            two devices.

    Source:
        FrameFusion, arXiv:2501.01986, section 3.3.
    """
    op = "merge_roots"
    packed = cu_seqlens is not None
    check_dtype(op, "similarity", similarity, FLOATS)
    check_shape(op, "similarity", similarity, **any_rows(packed))
    check_cu_seqlens(op, cu_seqlens, "similarity", similarity)
    check_max_seqlen(op, "max_seqlen", max_seqlen, similarity.shape[-1], cu_seqlens)
    links, stride = _check_predecessor(op, similarity, predecessor, packed)
    check_float(op, "threshold", threshold)
    if not is_finite(threshold):
        raise ValueError(f"{op}: threshold must be finite in fp32, got {threshold}")
    bounds = bound = None
    if isinstance(max_merges, Tensor):
        check_dtype(op, "max_merges", max_merges, INDICES)
        samples = {"B": similarity.shape[0]} if cu_seqlens is None else {"S": cu_seqlens.shape[0] - 1}
        check_shape(op, "max_merges", max_merges, **samples)
        bounds = max_merges
    elif max_merges is not None:
        check_at_least(op, "max_merges", max_merges, 0)
        bound = min(max_merges, similarity.shape[-1])
    check_same_device(op, similarity=similarity, predecessor=links, max_merges=bounds)
    return _merge_roots(similarity, links, stride, float(threshold), bounds, bound, cu_seqlens)


def merge_mean(
    x: Tensor,
    roots: Tensor,
    companions: Sequence[Tensor] = (),
    predecessor: int | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
) -> Merged:
    """Replace each group of tokens by one row: the mean of its members, in the place of its root.

    Differentiable in x (each member receives its row's gradient divided by the group's size) and in floating point
    companions (the roots receive the gradient).

    Args:
        x: [B, N, D] fp16, bf16 or fp32, any strides.
        roots: [B, N] int32 or int64, any strides: the root of each token's group, as `merge_roots` returns it. A token
            is dropped if its root is -1 or is not itself a root.
        companions: tensors [B, N, ...] that follow their rows (position ids, rotary cosines): any dtype, any strides.
            PyTorch gathers those whose rows are not one or two runs of neighbours in memory.
        predecessor: the links that the roots came from, as `merge_roots` takes them. If given, the links among the
            compacted rows are returned, too.
        cu_seqlens: [S+1] int32 or int64, ascending from 0 to T (not checked, because that would stall a GPU). x [T, D],
            roots [T], companions [T, ...] and predecessor [T] then hold packed sequences; roots and predecessors are
            positions among all T tokens. No group crosses the start of a sequence.
        capacity: the number of rows to return, at least the number of groups in a sample (packed: in all sequences
            together); N (packed: T) always suffices. If it is too small, the last rows are returned. If None, it is
            that of the longest sample, for which the host waits once; under torch.compile a dynamic size, which needs
            torch._dynamo.config.capture_dynamic_output_shape_ops for a single graph.

    Returns:
        Merged(x, companions, kept, lengths, predecessor). x [B, M, D]: sums in fp32 in ascending order of the members,
        rounded once; a group of one is copied bit for bit. companions: each [B, M, ...], taken at the roots.
        kept [B, M] int64: original positions, ascending. lengths [B] int64. predecessor [B, M] int64: the row of the
        group that holds the root's predecessor, -1 for none. M is the longest of the batch, or the capacity. Shorter
        samples are padded on the left: -1 in kept and predecessor, zeros elsewhere.
        Packed: x [M, D], companions [M, ...], kept and predecessor [M], which count over all sequences; lengths [S],
        and Merged.cu_seqlens [S+1] int32.

    Raises:
        TypeError: a dtype that is not listed. ValueError: a shape or a value that does not fit the above, or tensors on
            two devices.

    Source:
        FrameFusion, arXiv:2501.01986, section 3.3.
    """
    op = "merge_mean"
    packed = cu_seqlens is not None
    check_dtype(op, "x", x, FLOATS)
    check_shape(op, "x", x, **any_rows(packed), D=None)
    check_cu_seqlens(op, cu_seqlens, "x", x, to_the_end=True)  # rows are counted from the last one
    check_capacity(op, capacity)
    check_dtype(op, "roots", roots, INDICES)
    check_shape(op, "roots", roots, **rows_of(x, packed))
    links, stride = (None, 0) if predecessor is None else _check_predecessor(op, roots, predecessor, packed)
    if not isinstance(companions, Sequence):
        raise TypeError(f"{op}: companions must be a sequence of tensors, got {type(companions).__name__}")
    leading, device = x.shape[:-1], x.device
    axes = len(leading)
    for i, companion in enumerate(companions):
        if not isinstance(companion, Tensor) or companion.shape[:axes] != leading:
            _raise_for_companion(op, f"companions[{i}]", companion, leading, packed)
        if companion.device != device:
            check_same_device(op, x=x, **{f"companions[{i}]": companion})
    check_same_device(op, x=x, roots=roots, predecessor=links)
    if cu_seqlens is None:
        return _merge_mean(x, roots, companions, links, stride, capacity)
    if stride:
        links = strided_predecessor(1, x.shape[0], stride, x.device, cu_seqlens)[0]
    links = None if links is None else links[None]
    merged = _merge_mean(x[None], roots[None], [companion[None] for companion in companions], links, 0, capacity)
    return _packed(merged, cu_seqlens)


def _merge_mean(
    x: Tensor, roots: Tensor, companions: Sequence[Tensor], links: Tensor | None, stride: int, capacity: int | None
) -> Merged:
    call = _Mean.apply if needs_gradient(x) else _mean_of_groups
    mean, kept, lengths, predecessor = call(x, roots, links, stride, capacity)
    taken = tuple(gather(kept, companions)) if companions else ()
    return Merged(mean, taken, kept, lengths, predecessor if links is not None or stride else None)


def _packed(merged: Merged, cu_seqlens: Tensor) -> Merged:
    """The merge of a batch of one, which held the sequences cu_seqlens [S+1], without its batch dimension."""
    kept, links = merged.kept[0], merged.predecessor
    companions = tuple(part[0] for part in merged.companions)
    return Merged(merged.x[0], companions, kept, lengths_of(kept, cu_seqlens), None if links is None else links[0])


def _check_predecessor(op: str, like: Tensor, predecessor: int | Tensor, packed: bool) -> tuple[Tensor | None, int]:
    """The links as a tensor and a stride, one of which is None or 0."""
    if isinstance(predecessor, Tensor):
        check_dtype(op, "predecessor", predecessor, INDICES)
        check_shape(op, "predecessor", predecessor, **rows_of(like, packed))
        return predecessor, 0
    return None, check_stride(op, "predecessor", predecessor, like.shape[-1])


def _raise_for_companion(op: str, name: str, companion: Any, leading: torch.Size, packed: bool) -> None:
    if not isinstance(companion, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(companion).__name__}")
    sizes = ", ".join(f"{axis}={size}" for axis, size in zip("T" if packed else "BN", leading, strict=True))
    raise ValueError(f"{op}: {name} must have shape [{sizes}, ...], got {list(companion.shape)}")
