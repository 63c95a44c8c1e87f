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

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu
from ._attention import (
    _add_norms_kernel,
    _column_sum_kernel,
    _row_norm_kernel,
    _score_kernel,
    _score_sum_kernel,
)
from ._dispatch import (
    FLOATS,
    INDICES,
    block,
    cdiv,
    check_at_least,
    check_dtype,
    check_float,
    check_most,
    check_same_device,
    check_shape,
    is_int,
    runs_triton,
)
from ._operators import operator, without_gradient
from ._packed import check_bounds, check_max_seqlen
from ._tiles import lanes, lookup, registers

_MOST_WIDTH = 256  # of a head: a whole row stays on chip
_MOST_PAIRS = 2**30  # of a query and a head of a group, which are counted in 32 bits
_FEW_QUERIES = 8  # whose scores, where one tile holds all pairs, are kept rather than computed twice
_ENOUGH_PROGRAMS = 1024  # to fill a GPU and even out a causal mask; with fewer, programs share a row or a column
_LEAST_KEYS = 256  # of a share of a row
_LOG2_E = 1.4426950408889634
_LEAST_TILES = 8  # of a share of a column


class _Packed(NamedTuple):
    """Sequences one after the other: where each begins and ends, and the most queries and keys that one has."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    queries: int
    keys: int


def _fake_sums(q, k, scale, causal, lse, num_queries, begin, end):
    return q.new_empty(q.shape[0], end - begin, dtype=torch.float32)


@operator("attention_column_sum", fake=_fake_sums)
def _attention_column_sum(
    q: Tensor, k: Tensor, scale: float, causal: bool, lse: Tensor | None, num_queries: int, begin: int, end: int
) -> Tensor:
    if not runs_triton(q):
        columns = (begin, end)
        return _cpu.attention_column_sum(
            q, k, scale=scale, causal=causal, lse=lse, num_queries=num_queries, columns=columns
        )
    first = q.shape[2] - num_queries
    lse = None if lse is None else _with_rows(lse)[:, :, first:]
    return _column_sum(q[:, :, first:], k, scale, causal, lse, begin, end, None)


def _with_rows(lse: Tensor) -> Tensor:
    """lse whose rows lie one after another in memory."""
    return lse if lse.stride(-1) == 1 else lse.contiguous()


def _fake_packed_sums(q, k, *_):
    return k.new_empty(k.shape[0], dtype=torch.float32)


@operator("attention_column_sum_packed", fake=_fake_packed_sums)
def _attention_column_sum_packed(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    num_queries: int | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Tensor:
    if not runs_triton(q):
        return _cpu.attention_column_sum(
            q, k, scale=scale, causal=causal, lse=lse, num_queries=num_queries,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        )  # fmt: skip
    sequences = len(cu_seqlens_q) - 1
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.clamp(0, len(q)), cu_seqlens_k.clamp(0, len(k))  # unchecked on a GPU
    if sequences * len(q) * len(k) == 0:
        return k.new_zeros(len(k), dtype=torch.float32)
    if max_seqlen_q is None or max_seqlen_k is None:
        longest = torch.stack([cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()]).clamp_min(0).tolist()
        max_seqlen_q = longest[0] if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = longest[1] if max_seqlen_k is None else max_seqlen_k
    queries = max_seqlen_q if num_queries is None else min(num_queries, max_seqlen_q)
    packed = _Packed(cu_seqlens_q, cu_seqlens_k, queries, max_seqlen_k)
    # every sequence sees all rows, at a stride of 0
    q, k = (x.transpose(0, 1).expand(sequences, -1, -1, -1) for x in (q, k))
    lse = None if lse is None else _with_rows(lse).expand(sequences, -1, -1)
    return _column_sum(q, k, scale, causal, lse, 0, max_seqlen_k, packed)[0]


def attention_column_sum(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    num_queries: int | None = None,
    columns: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Compute the attention that each key receives, summed over the queries and averaged over the heads.

    The queries are the last Nq of the Nk positions. The attention matrix is never stored: memory grows with Nk, not
    with Nq * Nk. Two runs on the same inputs agree bit for bit. Not differentiable.

    With `cu_seqlens_q` and `cu_seqlens_k` the sequences of a batch are concatenated without padding, as flash
    attention's varlen functions take them. Each gives what it would give alone.

    Args:
        q: [B, H, Nq, d] fp16, bf16 or fp32, any strides, d from 1 to 256. Packed: [Tq, H, d].
        k: [B, Hkv, Nk, d] of q's dtype, any strides. H is a multiple of Hkv; query head h reads key head
            h // (H / Hkv). Packed: [Tk, Hkv, d].
        scale: positive factor on the scores, from 2**-126 to 2**127; 1 / sqrt(d) if None.
        causal: if True, each query sees only the keys up to its own position, so Nq <= Nk. If False, every query sees
            every key. Packed: a sequence may have more queries than keys; its first queries then see nothing.
        lse: [B, H, Nq] fp32, any strides: natural log-sum-exp of the scaled scores of each of the Nq rows, as flash
            attention returns it. Skips the first of the two passes over q and k. Not checked against q and k.
            Packed: [H, Tq].
        num_queries: use only the last n queries, 1 <= n <= Nq; all if None. Packed: the last n of each sequence, or
            all if it has fewer.
        columns: (a, b) with 0 <= a <= b <= Nk: return only the keys a to b - 1; all if None. Rows are normalised over
            all keys. Not available for packed sequences.
        cu_seqlens_q: [S+1] int32 or int64, contiguous: sequence s has the queries cu_seqlens_q[s] to
            cu_seqlens_q[s + 1] - 1, possibly none. The values are not checked, because that would stall a GPU.
        cu_seqlens_k: [S+1] int32 or int64, the same for the keys.
        max_seqlen_q: at least the number of queries in the longest sequence. If None, it is read from the device, for
            which the host waits once. If it is too low, queries are missing.
        max_seqlen_k: the same for the keys.

    Returns:
        [B, C] fp32, C = b - a. Over all keys, a sample adds up to the number of queries. Packed: [Tk] fp32, 0 for a key
        that is in no sequence.

        Scores that are not finite: a key whose score is -inf receives nothing from that query, and a query that sees no
        other score adds nothing. A query that sees a score of NaN or +inf makes its sample (packed: its sequence) NaN,
        as torch.softmax does. With `lse`, which is taken as it is, a query of +inf or -inf adds nothing and one of NaN
        makes its sample NaN; a key whose score is NaN, or +inf for a query of infinite `lse`, becomes NaN itself.

    Raises:
        TypeError: a dtype that is not listed, or two dtypes for q and k. ValueError: a shape, a range or a scale that
            does not fit the above, tensors on two devices, or arguments that do not go together.

    Source:
        FastV, arXiv:2403.06764 (the last query); FrameFusion, arXiv:2501.01986 (all of them).
    """
    op = "attention_column_sum"
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}")
    pair = columns if isinstance(columns, (tuple, list)) else ()
    if columns is not None and [is_int(end) for end in pair] != [True, True]:
        raise TypeError(f"{op}: columns must be a pair of ints, got {columns}")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_dtype(op, "q", q, FLOATS)
        check_dtype(op, "k", k, FLOATS)
        check_shape(op, "q", q, Tq=None, H=None, d=None)
        check_shape(op, "k", k, Tk=None, Hkv=None, d=None)
        if columns is not None:
            raise ValueError(f"{op}: columns must be None with cu_seqlens, got {columns}")
        _check_sequences(op, cu_seqlens_q, cu_seqlens_k, len(q), len(k))
        max_seqlen_q = check_max_seqlen(op, "max_seqlen_q", max_seqlen_q, len(q), cu_seqlens_q)
        max_seqlen_k = check_max_seqlen(op, "max_seqlen_k", max_seqlen_k, len(k), cu_seqlens_k)
        _, heads, queries, _, width = _check_heads(op, q.transpose(0, 1)[None], k.transpose(0, 1)[None])
    else:
        if not (cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None):
            _raise_for_packed(
                op, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
            )  # fmt: skip
        batch, heads, queries, keys, width = _check_heads(op, q, k)
        if causal and queries > keys:
            raise ValueError(f"{op}: causal queries are the last of the keys' positions, got Nq={queries} > Nk={keys}")
    if scale is None:
        scale = width**-0.5
    check_float(op, "scale", scale)
    if not 2**-126 <= scale <= 2**127:  # neither 0 nor infinite in fp32, also when multiplied by log2(e)
        raise ValueError(f"{op}: scale must be positive, from 2**-126 to 2**127, got {scale}")
    if num_queries is not None:
        check_at_least(op, "num_queries", num_queries, 1)
    if lse is not None:
        check_dtype(op, "lse", lse, (torch.float32,))
    check_same_device(op, q=q, k=k, lse=lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        if lse is not None:
            check_shape(op, "lse", lse, H=heads, Tq=queries)
        num_queries = None if num_queries is None else min(num_queries, queries)
        return without_gradient(
            op,
            _attention_column_sum_packed,
            q,
            k,
            float(scale),
            causal,
            lse,
            num_queries,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
        )
    if lse is not None:
        check_shape(op, "lse", lse, B=batch, H=heads, Nq=queries)
    if num_queries is None:
        num_queries = queries
    elif num_queries > queries:
        raise ValueError(f"{op}: num_queries must be at most Nq={queries}, got {num_queries}")
    begin, end = (0, keys) if columns is None else columns
    if not 0 <= begin <= end <= keys:
        raise ValueError(f"{op}: columns (a, b) must be 0 <= a <= b <= Nk={keys}, got ({begin}, {end})")
    return without_gradient(op, _attention_column_sum, q, k, float(scale), causal, lse, num_queries, begin, end)


def _raise_for_packed(op: str, **arguments: object) -> None:
    given = " and ".join(name for name, value in arguments.items() if value is not None)
    raise ValueError(f"{op}: packed sequences need cu_seqlens_q and cu_seqlens_k, got {given} only")


def _check_sequences(op: str, cu_q: Tensor, cu_k: Tensor, queries: int, keys: int) -> None:
    """Raise unless the bounds of packed sequences fit each other and the number of rows."""
    for name, bounds, axis, total in (("cu_seqlens_q", cu_q, "Tq", queries), ("cu_seqlens_k", cu_k, "Tk", keys)):
        check_dtype(op, name, bounds, INDICES)
        check_shape(op, name, bounds, **{"S+1": None if bounds is cu_q else len(cu_q)})
        if not len(bounds) or not bounds.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous and not empty, got {list(bounds.shape)}")
        check_bounds(op, name, bounds, axis, total)


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
    if queries * (heads // kv_heads) > _MOST_PAIRS:
        raise ValueError(f"{op}: Nq * H / Hkv must be at most 2**30, got {queries * (heads // kv_heads)}")
    return batch, heads, queries, keys, width


def _column_sum(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    begin: int,
    end: int,
    packed: _Packed | None,
) -> Tensor:
    """[B, C], or [1, Tk] of packed sequences, whose q and k are [S, ...] with a stride of 0."""
    queries = packed.queries if packed else q.shape[2]
    if len(q) * queries * (end - begin) == 0:
        return q.new_zeros(1 if packed else len(q), k.shape[2] if packed else end - begin, dtype=torch.float32)
    check_most("attention_column_sum", "S" if packed else "B", len(q))
    one_tile = queries * (q.shape[1] // k.shape[1]) <= lookup("attention", q, q.shape[3]).streamed
    with torch.cuda.device_of(q):
        if lse is None and queries <= _FEW_QUERIES and one_tile:
            return _kept_score_mean(q, k, scale * _LOG2_E, causal, begin, end, packed)
        norms: tuple[Tensor, Tensor | None]
        if lse is None:
            norms = _row_norms(q, k, scale * _LOG2_E, causal, packed)
        else:
            norms = lse, None
        total = _streamed_sum(q, k, norms, scale * _LOG2_E, causal, begin, end, packed)
    return total / q.shape[1]


def _sizes(q: Tensor, k: Tensor, packed: _Packed | None) -> tuple[int, int, tuple[Tensor | None, Tensor | None]]:
    """The most queries and keys of a sample, and what a kernel needs to find a packed one."""
    if packed is None:
        return q.shape[2], k.shape[2], (None, None)
    return packed.queries, packed.keys, packed[:2]


def _row_norms(q: Tensor, k: Tensor, scale2: float, causal: bool, packed: _Packed | None) -> tuple[Tensor, Tensor]:
    """shift, weight [B, H, Nq] fp32: a row of the softmax is exp2(score - shift) * weight.

    Many programs share few rows.
    """
    batch, heads, rows, width = q.shape
    queries, keys, bounds = _sizes(q, k, packed)
    kv_heads = k.shape[1]
    tile = lookup("attention", q, width)
    pairs = queries * (heads // kv_heads)
    block_m, block_n = min(tile.still, block(pairs)), tile.streamed  # pairs stay, keys stream past
    tiles = cdiv(pairs, block_m)
    shares = _shares(tiles * kv_heads * batch, cdiv(keys, _LEAST_KEYS))
    span = cdiv(cdiv(keys, shares), block_n) * block_n
    shift, weight = _new_norms(q, shares, 1 if packed else batch, heads, rows)
    _row_norm_kernel[(tiles, shares * kv_heads, batch)](
        q, k, shift, weight, *bounds, *q.stride(), *k.stride(), *shift.expand(-1, batch, -1, -1).stride()[:3],
        scale2, queries, keys, kv_heads, span, GROUP=heads // kv_heads, D=width, BLOCK_D=block(width),
        BLOCK_M=block_m, BLOCK_N=block_n, **lanes(q, block_n), CAUSAL=causal,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    shift, weight = _added_norms(shift, weight)
    return shift.expand(batch, -1, -1), weight.expand(batch, -1, -1)


def _added_norms(peaks: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [shares, ...] of parts of the rows, contiguous -> [...] of the whole rows."""
    if len(peaks) == 1:
        return peaks[0], totals[0]
    shift, weight = torch.empty_like(peaks[0]), torch.empty_like(peaks[0])
    _add_norms_kernel[(cdiv(shift.numel(), 16),)](
        peaks, totals, shift, weight, len(peaks), shift.numel(), BLOCK_S=64, BLOCK_R=16,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return shift, weight


def _streamed_sum(
    q: Tensor,
    k: Tensor,
    norms: tuple[Tensor, Tensor | None],
    scale2: float,
    causal: bool,
    begin: int,
    end: int,
    packed: _Packed | None,
) -> Tensor:
    """[B, C]: the sums over heads and queries, for any number of queries.

    norms: those of whole rows, or natural log-sum-exps and None.
    """
    shift, weight = norms
    batch, heads, _, width = q.shape
    queries, keys, bounds = _sizes(q, k, packed)
    kv_heads = k.shape[1]
    tile = lookup("attention", q, width)
    block_m, block_n = min(tile.streamed, block(queries)), tile.still  # keys stay, queries stream past
    key_blocks = cdiv(end - begin, block_n)
    tiles = cdiv(queries, block_m) * (heads // kv_heads)
    shares = _shares(key_blocks * kv_heads * batch, cdiv(tiles, _LEAST_TILES))
    partial = _new_sums(q, k, packed, kv_heads * shares, columns=end - begin)
    _column_sum_kernel[(key_blocks, kv_heads * shares, batch)](
        q, k, shift, weight, partial, *bounds, *q.stride(), *k.stride(), *shift.stride()[:2],
        *partial.expand(batch, -1, -1).stride(),
        scale2, queries, keys, begin, end, shares, GROUP=heads // kv_heads, D=width, BLOCK_D=block(width),
        BLOCK_M=block_m, BLOCK_N=block_n, **lanes(q, block_m), CAUSAL=causal,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **registers(q, tile),
    )  # fmt: skip
    out = partial.sum(1)
    if causal:  # a row that is NaN is so where it is masked, too, in torch.softmax
        spoiled = (shift if weight is None else weight).isnan()
        if packed:
            spoiled = _spoiled_keys(spoiled[0].any(0), len(out[0]), packed)
        else:
            spoiled = spoiled.flatten(1).any(1)[:, None]
        out.masked_fill_(spoiled, float("nan"))
    return out


def _spoiled_keys(spoiled: Tensor, keys: int, packed: _Packed) -> Tensor:
    """spoiled [Tq], whether a query's row is NaN -> [Tk], whether a query that counts in a key's sequence is."""
    before = F.pad(spoiled.cumsum(0), (1, 0))
    ends = packed.cu_seqlens_q[1:].long()
    begins = torch.maximum(packed.cu_seqlens_q[:-1].long(), ends - packed.queries)
    sequence = torch.searchsorted(packed.cu_seqlens_k, torch.arange(keys, device=spoiled.device), right=True) - 1
    inside = (sequence >= 0) & (sequence < len(ends))
    return inside & (before[ends] > before[begins])[sequence.clamp(0, len(ends) - 1)]


def _new_norms(q: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
    """Not one tensor cut in two: a size could leave the second half unaligned, for another kernel."""
    return q.new_empty(*sizes, dtype=torch.float32), q.new_empty(*sizes, dtype=torch.float32)


def _new_sums(q: Tensor, k: Tensor, packed: _Packed | None, *sizes: int, columns: int) -> Tensor:
    """[B, *sizes, C] fp32 that the kernel writes all of, or [1, *sizes, Tk] of zeros: a key may be of no sequence."""
    if packed is None:
        return q.new_empty(len(q), *sizes, columns, dtype=torch.float32)
    return q.new_zeros(1, *sizes, k.shape[2], dtype=torch.float32)


def _kept_score_mean(
    q: Tensor, k: Tensor, scale2: float, causal: bool, begin: int, end: int, packed: _Packed | None
) -> Tensor:
    """[B, C]: the sums divided by the heads, for few queries, whose scores are kept so that K is read once."""
    batch, heads, _, width = q.shape
    queries, keys, bounds = _sizes(q, k, packed)
    kv_heads = k.shape[1]
    tile = lookup("attention", q, width)
    block_n = tile.still
    key_blocks = cdiv(keys, block_n)
    columns = k.shape[2] if packed else end - begin
    score = q.new_empty(1 if packed else batch, heads * queries, columns, dtype=torch.float32)
    score = score.expand(batch, -1, -1) if packed else score
    peaks, totals = _new_norms(q, key_blocks, batch, heads * queries)
    _score_kernel[(key_blocks, kv_heads, batch)](
        q, k, score, peaks, totals, *bounds, *q.stride(), *k.stride(), *score.stride(), *peaks.stride()[:2],
        scale2, queries, keys, begin, end, GROUP=heads // kv_heads, D=width, BLOCK_D=block(width),
        BLOCK_M=block(queries * (heads // kv_heads)), BLOCK_N=block_n, CAUSAL=causal,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    out = _new_sums(q, k, packed, columns=end - begin)
    strides = out.stride() if packed is None else (0, out.stride(1))
    _score_sum_kernel[(cdiv(end - begin, 128), batch)](
        score, peaks, totals, out, bounds[1], *score.stride(), *peaks.stride()[:2], *strides,
        key_blocks, score.shape[1], heads, end - begin,
        BLOCK_S=64, BLOCK_R=16, BLOCK_C=128, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _shares(programs: int, most: int) -> int:
    """Over how many programs each of `programs` pieces of work is spread, a power of two."""
    return min(block(cdiv(_ENOUGH_PROGRAMS, programs), 1), block(most, 1))
