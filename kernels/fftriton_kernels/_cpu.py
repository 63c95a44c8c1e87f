"""The ops on a CPU: fast, in PyTorch, and equal to `reference` by the rule of the tests.

Half and single precision inputs are computed in fp32. Nothing is validated here; the public functions do that.
"""

from __future__ import annotations

import warnings
from itertools import pairwise, product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ._packed import sequence_of, strided_predecessor
from ._pages import empty
from ._radix import right_end
from ._types import NO_LINK, Groups

_BLOCK = 2**20  # elements of x that are worked on at a time: few parallel regions, each of which waits for its threads
_POOLED = 2**22  # those that are converted at a time: alone 2**20 is a little faster, beside busy processes much slower
_REACH = 2**21  # elements between a row and its partner up to which they share a pool of converted rows
_LONG_BAG = 1024  # members whose weight has too few bits in fp16, which counts in steps of 2**-24
_QUERY_BLOCK = (48, 128)  # rows of a head's attention matrix that exist at a time: for a core's cache; for many threads
_SCORES = 2**24  # elements of all heads' that do, at most


def strided_cosine_similarity(x: Tensor, stride: int) -> Tensor:
    """x [B, N, D] -> [B, N]: cosine of each row with the one `stride` places earlier."""
    return linked_cosine_similarity(x, strided_predecessor(x.shape[0], x.shape[1], stride, x.device))


def linked_cosine_similarity(x: Tensor, predecessor: Tensor) -> Tensor:
    """x [B, N, D], predecessor [B, N] (-1: none) -> [B, N]: cosine of each row with its predecessor."""
    linked = predecessor >= 0
    partner = torch.where(linked, predecessor.long(), torch.arange(x.shape[1], device=x.device))
    products = [_row_products(rows, links) for rows, links in zip(x, partner, strict=True)]
    square, dot = torch.stack(products).unbind(-1) if products else x.new_empty(2, *partner.shape, dtype=torch.float32)
    norm, safe = square.sqrt(), _is_safe(square)
    cosine = dot / (norm * norm.gather(1, partner))
    unsafe = linked & ~(safe & safe.gather(1, partner))
    if unsafe.any():  # rows that are zero, not finite, or so large or small that their squares are
        for some in unsafe.nonzero().split(_block_rows(x[0])):
            sample, token = some.unbind(1)
            cosine[sample, token] = _scaled_cosine(x[sample, token], x[sample, partner[sample, token]])
    return torch.where(linked, cosine, NO_LINK)


def _row_products(x: Tensor, partner: Tensor) -> Tensor:
    """x [N, D], partner [N] -> [N, 2]: each row times itself, and times its partner."""
    place = torch.arange(len(x), device=x.device)
    if x.device.type != "cpu" or not x.numel() or len(x) == 1:
        rows = x.float()
        return torch.stack(((rows * rows).sum(-1), (rows * rows[partner]).sum(-1)), 1)
    if x.dtype == torch.float32 and x.is_contiguous():
        return _sampled_products(_pattern(torch.stack((place, partner), 1), x), x, x)
    return _pooled_row_products(x, partner)


def _pooled_row_products(x: Tensor, partner: Tensor) -> Tensor:
    """As `_row_products`, block by block in a pool of fp32 rows: the last blocks, as far back as partners lie.

    Where partners lie too far back or ahead, the pool holds one block and its partners.
    """
    place = torch.arange(len(x))
    nearest, farthest = (int(end) for end in torch.aminmax(place - partner))
    block = min(max(1, _POOLED // x.shape[1]), len(x))
    if block < 2 * farthest:  # links of one stride lead to the same place of another block, and to the same core
        block = -(-farthest // -(-farthest // block))
    near = nearest >= 0 and farthest * x.shape[1] <= _REACH
    ring = (-(-farthest // block) + 1 if near else 1) * block  # row t is in place t % ring
    pool = torch.empty(ring if near else 2 * block, x.shape[1], dtype=torch.float32)
    slots = torch.stack((place % ring, partner % ring if near else block + place % block), 1)
    pattern = _pattern(slots[:block].clone(), pool)
    columns, values = (part.view(block, 2) for part in (pattern.col_indices(), pattern.values()))
    parts, turns, pool_columns = pool.split(block), ring // block, pool.mT
    products = []
    blocks = zip(x.split(block), partner.split(block), slots.split(block), strict=True)
    for number, (rows, partners, slot) in enumerate(blocks):
        own = parts[number % turns]
        own[: len(rows)] = rows
        if not near:
            parts[1][: len(rows)] = x.index_select(0, partners)
        columns[: len(rows)] = slot  # in place: to make a pattern takes as long as its products
        values.zero_()  # beta = 0 would keep what is NaN
        torch.sparse.sampled_addmm(pattern, own, pool_columns, beta=0.0, out=pattern)
        products.append(values.clone())
    return torch.cat(products)[: len(x)]


def _pattern(columns: Tensor, y: Tensor) -> Tensor:
    """columns [n, c] -> a sparse [n, len(y)] matrix with room for those columns of each row."""
    rows, count = columns.shape
    return _sparse(torch.full((rows,), count), columns.flatten(), y.new_zeros(rows * count), y)


def _sparse(sizes: Tensor, columns: Tensor, values: Tensor, y: Tensor) -> Tensor:
    """A sparse [n, len(y)] matrix: sizes [n] of its rows, columns [m] and values [m] row after row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            F.pad(sizes.cumsum(0), (1, 0)), columns, values, size=(len(sizes), len(y)), check_invariants=False
        )


def _sampled_products(pattern: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x [n, D], y [m, D] -> [n, c]: each row of x times the rows of y that the pattern names, none of them copied."""
    return torch.sparse.sampled_addmm(pattern, x, y.mT, beta=0.0).values().view(len(x), -1)


def _scaled_cosine(x: Tensor, y: Tensor) -> Tensor:
    """x, y [n, D] -> [n]: their cosine, whatever their size; NO_LINK where either is zero or not finite."""
    cosine = torch.full((len(x),), NO_LINK, dtype=torch.float32, device=x.device)
    if not x.shape[1]:
        return cosine
    usable = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for rows in (x, y):
        peak = rows.abs().amax(-1)
        usable &= (peak > 0) & peak.isfinite()
    if usable.any():
        cosine[usable] = (_unit(x[usable]) * _unit(y[usable])).sum(-1)
    return cosine


def _unit(rows: Tensor) -> Tensor:
    """rows [n, D] -> [n, D]: of length 1, by way of a largest element of 1."""
    rows = rows.float()
    rows = rows / rows.abs().amax(-1, keepdim=True)
    return rows / rows.norm(dim=-1, keepdim=True)


def _is_safe(square: Tensor) -> Tensor:
    """Whether a sum of squares is far enough from under- and overflow to be exact to rounding."""
    return (square > 1e-24) & (square < 1e30)


def merge_roots(
    similarity: Tensor,
    predecessor: int | Tensor,
    threshold: float,
    max_merges: int | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """similarity [B, N], or [T] packed -> int64: the first token of each token's group."""
    shape = similarity.shape
    if cu_seqlens is not None:
        similarity = similarity[None]
        predecessor = predecessor[None] if isinstance(predecessor, Tensor) else predecessor
    batch, length = similarity.shape
    similarity = similarity.float()
    links = as_predecessor(predecessor, similarity, cu_seqlens)
    position = torch.arange(length, device=similarity.device).expand(batch, -1)
    earlier = (links >= 0) & (links < position)
    joins = earlier & (similarity >= threshold) & (similarity > NO_LINK)  # False for NaN
    if max_merges is not None:
        joins = _highest(similarity, joins, max_merges, cu_seqlens)
    roots = torch.where(joins, links, position)
    while not torch.equal(further := roots.gather(1, roots), roots):  # each round doubles the distance covered
        roots = further
    return roots.view(shape)


def connected_components(edges: Tensor, num_nodes: int) -> Tensor:
    """edges [E, 2] -> [num_nodes] int64: the smallest index of each node's component."""
    label = torch.arange(num_nodes, device=edges.device)
    first, second = edges.long().T.contiguous()
    inside = (torch.minimum(first, second) >= 0) & (torch.maximum(first, second) < num_nodes)
    first, second = first[inside], second[inside]
    while True:
        one, other = label.index_select(0, first), label.index_select(0, second)
        hooked = label.scatter_reduce(0, torch.maximum(one, other), torch.minimum(one, other), "amin")
        hooked = hooked.index_select(0, hooked)
        if torch.equal(hooked, label):  # labels are roots, and equal along every edge
            return label
        label = hooked


def group_rows(roots: Tensor, predecessor: int | Tensor | None = None, capacity: int | None = None) -> Groups:
    """roots [B, N] -> the compacted rows and who is in them. A root that is no root itself, or -1, puts a token out."""
    batch, length = roots.shape
    roots = roots.long()
    position = torch.arange(length, device=roots.device)
    kept, lengths, slot = compact(roots == position)
    rows = kept.shape[1]
    inside = (roots >= 0) & (roots < length)
    root = torch.where(inside, roots, 0)
    row = slot.gather(1, root)
    member = inside & (roots.gather(1, root) == root)
    row = torch.where(member, row, -1)
    sizes = row.new_zeros(batch, rows + 1).scatter_add_(1, torch.where(member, row, rows), member.long())[:, :rows]
    order = torch.argsort(torch.where(member, row, rows), dim=1, stable=True)  # by row, ascending within
    members = torch.where(position < sizes.sum(1, keepdim=True), order, -1)
    links = kept.new_empty(batch, 0)
    if predecessor is not None and not length:
        links = torch.full_like(kept, -1)
    elif predecessor is not None:
        (earlier,) = gather_rows(kept, as_predecessor(predecessor, roots))
        linked = (kept >= 0) & (earlier >= 0) & (earlier < length)
        links = torch.where(linked, row.gather(1, torch.where(linked, earlier, 0)), -1)
    starts = sizes.cumsum(1) - sizes
    if capacity is not None:  # the last rows; the members of the others stay in the list
        cut, links = rows - capacity, right_end(links, capacity, -1) if predecessor is not None else links
        kept, starts, sizes = (
            right_end(kept, capacity, -1),
            right_end(starts, capacity, 0),
            right_end(sizes, capacity, 0),
        )
        row, links = (torch.where(x >= max(cut, 0), x - cut, -1) for x in (row, links))
        lengths = lengths.clamp_max(capacity)
    return Groups(kept, lengths, links, row, starts, sizes.contiguous(), members)


def merge_mean(
    x: Tensor, roots: Tensor, predecessor: int | Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator of `merge_mean` returns."""
    groups = group_rows(roots, predecessor, capacity)
    return group_mean(x, groups), groups.kept, groups.lengths, groups.predecessor


def group_mean(x: Tensor, groups: Groups) -> Tensor:
    """x [B, N, D] -> [B, M, D]: the mean of each row's members, added up in ascending order; zeros for padding."""
    (mean,) = gather_rows(groups.kept, x)  # a group of one is copied bit for bit
    for sample, rows in enumerate(x):
        starts, sizes, members = groups.starts[sample], groups.sizes[sample], groups.members[sample]
        crowded = (sizes > 1).nonzero()[:, 0]
        for some in crowded.split(4 * _block_rows(rows)) if len(crowded) else ():
            _put_rows(mean[sample], some, _bag_means(rows, members, starts[some], sizes[some]))
    return mean


def _put_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index] = rows, in elements of 16 bytes where rows consist of them: each takes as long as one of two."""
    if rows.numel() and rows.shape[1] * rows.element_size() % 16 == 0:
        out, rows = out.view(torch.complex128), rows.view(torch.complex128)
    out[index] = rows


def _bag_means(x: Tensor, members: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
    """x [N, D] -> [R, D]: means over bags, which start at starts [R] in members [N]; in fp32, rounded once.

    Products with sparse matrices accumulate rows of half precision in fp32 and read them once. They would round the sum
    before they divide it, though, so there each row comes with its weight.
    """
    if x.device.type != "cpu" or not x.numel():
        rows = x[_stretches(members, starts, sizes)].float()
        return torch.segment_reduce(rows, "mean", lengths=sizes).to(x.dtype)
    long = x.dtype == torch.float16 and bool(sizes.amax() > _LONG_BAG)
    if long or not x.is_contiguous():  # a few columns at a time, because they are copied
        taken = _stretches(members, starts, sizes)
        place, starts = torch.arange(len(taken)), sizes.cumsum(0) - sizes
        parts = (part.index_select(0, taken) for part in x.split(max(1, 4 * _BLOCK // len(taken)), dim=1))
        means = [_bag_means(part.float() if long else part, place, starts, sizes) for part in parts]
        return torch.cat(means, 1).to(x.dtype)
    if x.dtype == torch.float32:
        columns = _stretches(members, starts, sizes)
        return torch.sparse.mm(_sparse(sizes, columns, x.new_ones(len(columns)), x), x, "mean")
    weights = _parts(sizes.float().reciprocal()).to(x.dtype)
    counts = (weights != 0).sum(1)  # how often a bag is added up, each time with a part of its weight
    starts, repeats = starts.repeat_interleave(counts), sizes.repeat_interleave(counts)
    weights = weights[weights != 0].repeat_interleave(repeats)
    return torch.sparse.mm(_sparse(counts * sizes, _stretches(members, starts, repeats), weights, x), x, "sum")


def _stretches(members: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
    """members [N] -> [m]: the stretches that begin at starts [R], of sizes [R], one after another."""
    ends = sizes.cumsum(0)
    place = (starts - ends + sizes).repeat_interleave(sizes)
    return members.index_select(0, place.add_(torch.arange(len(place), device=place.device)))


def _parts(weights: Tensor) -> Tensor:
    """weights [R] fp32, positive -> [R, 3]: parts of 8 bits, as half precision holds them, that add up to the weights.

    None is negative, so that infinite rows stay infinite.
    """
    parts = []
    for _ in range(3):
        parts.append((weights.view(torch.int32) & -(2**16)).view(torch.float32))
        weights = weights - parts[-1]
    return torch.stack(parts, 1)


@torch.autocast("cpu", enabled=False)  # which would take the products in bf16
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
) -> Tensor:
    """q [B, H, Nq, d], k [B, Hkv, Nk, d] -> [B, C]: attention summed over the queries, averaged over the heads.

    With the bounds of packed sequences: q [Tq, H, d], k [Tk, Hkv, d], lse [H, Tq] -> [Tk].
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        out = torch.zeros(len(k), dtype=torch.float32, device=k.device)
        bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
        for (low, high), (first, last) in bounds:
            last_queries = None if num_queries is None else min(num_queries, high - low)
            row_norms = None if lse is None else lse[None, :, low:high]
            one_q, one_k = q[low:high].transpose(0, 1)[None], k[first:last].transpose(0, 1)[None]
            out[first:last] = attention_column_sum(
                one_q, one_k, scale=scale, causal=causal, lse=row_norms, num_queries=last_queries
            )[0]
        return out
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    begin, end = (0, keys) if columns is None else columns
    first = queries - (queries if num_queries is None else num_queries)
    group = heads // kv_heads  # of the heads that share keys
    many = torch.get_num_threads() > 1  # threads wait for each other behind every operation
    step = max(1, min(_QUERY_BLOCK[many], queries - first, _SCORES // max(1, group * keys)))
    most = max(1, (_SCORES if many else _BLOCK) // max(1, group * step * keys))  # of the key heads
    room = torch.empty(2, min(most, kv_heads) * group * step * keys, dtype=torch.float32, device=q.device)
    total = torch.zeros(batch, end - begin, dtype=torch.float32, device=q.device)
    for sample, head in product(range(batch), range(0, kv_heads, most)):
        some = slice(head, head + most)
        query, key = q[sample].unflatten(0, (kv_heads, group))[some], k[sample, some].float()
        for low in range(first, queries, step):
            high = min(low + step, queries)
            seen = max(high + keys - queries, 0) if causal else keys
            shape = len(key), group, high - low, seen
            score, weight = (part[: prod(shape)].view(shape) for part in room)
            block = query[:, :, low:high].float().flatten(1, 2) * scale
            torch.bmm(block, key[:, :seen].mT, out=score.flatten(1, 2))
            if causal:  # all rows see all but the last columns
                last_seen = torch.arange(low, high, device=q.device)[:, None] + keys - queries
                corner = torch.arange(max(0, seen - (high - low)), seen, device=q.device)
                score[..., seen - len(corner) :].masked_fill_(corner > last_seen, float("-inf"))
            if lse is None:
                spoiled = _softmax(score, weight)
            else:
                norm = lse[sample].unflatten(0, (kv_heads, group))[some, :, low:high]
                spoiled = bool(norm.isnan().any())
                norm = norm.masked_fill(norm == float("-inf"), float("inf"))  # a row that sees nothing adds nothing
                weight = score.sub_(norm[..., None]).exp_()
            if spoiled:  # as in softmax, what is unseen too
                total[sample] = float("nan")
            received = weight[..., begin:end].sum((0, 1, 2))
            total[sample, : len(received)] += received
    return total / heads


def _softmax(score: Tensor, out: Tensor) -> bool:
    """score [..., n]: its softmax, but zeros where a row sees nothing. Whether a row that sees something is NaN."""
    torch.softmax(score, -1, out=out)
    if not out[..., :1].isnan().any():
        return False
    out.masked_fill_((score == float("-inf")).all(-1, keepdim=True), 0)
    return bool(out[..., :1].isnan().any())


def topk_keep(
    scores: Tensor,
    k: int | Tensor,
    candidates: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """scores [B, N] -> [B, K] int64: every non-candidate and the k best candidates, ascending, -1 for padding; lengths.

    Packed, scores [T] -> [K], [1].
    """
    candidates = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates
    if cu_seqlens is None:
        return compact(_highest(scores, candidates, k) | ~candidates, capacity)[:2]
    scores, candidates = scores[None], candidates[None]
    others = ~candidates & (_per_row(1, scores, cu_seqlens) == 1)  # those of no sequence are not kept
    kept, lengths, _ = compact(_highest(scores, candidates, k, cu_seqlens) | others, capacity)
    return kept[0], lengths


def segmented_topk_keep(scores: Tensor, segments: Tensor, counts: Tensor, capacity: int | None = None) -> Tensor:
    """scores, segments [B, N], counts [B, S] -> [B, K] int64: tokens of segment -1 and the best of each segment."""
    order = _best_first(scores)
    order = order.gather(1, torch.argsort(segments.gather(1, order), dim=1, stable=True))  # by segment, best first
    sorted_segments = segments.gather(1, order).contiguous()
    position = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, position - torch.searchsorted(sorted_segments, sorted_segments))
    allowed = counts.gather(1, segments.clamp_min(0)) if counts.shape[1] else torch.zeros_like(segments)
    return compact((segments < 0) | (rank < allowed), capacity)[0]


def gather_rows(kept: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """kept [B, K] (-1: a row of zeros), tensors [B, N, ...] -> each [B, K, ...]."""
    index, padding = kept.long().clamp_min(0), kept < 0
    taken = (_take_rows(tensor, index) for tensor in tensors)
    if not padding.any():
        return tuple(taken)
    # where, not masked_fill: it takes every dtype
    return tuple(torch.where(padding.view(*kept.shape, *[1] * (row.ndim - 2)), row.new_zeros(()), row) for row in taken)


def compact(keep: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """keep [B, N] bool -> kept [B, M] positions ascending, left-padded with -1; lengths [B]; slot [B, N] of each.

    M is the longest of the batch, or `rows`, which takes the last ones; then slots of the others are negative.
    """
    lengths = keep.sum(1)
    if rows is None:
        rows = int(lengths.max()) if keep.numel() else 0
    slot = keep.cumsum(1) - 1 + (rows - lengths)[:, None]
    sample, position = (keep & (slot >= 0)).nonzero(as_tuple=True)
    kept = keep.new_full((keep.shape[0], rows), -1, dtype=torch.int64)
    kept[sample, slot[sample, position]] = position
    return kept, lengths.clamp_max(rows), slot


def rank_descending(scores: Tensor, candidates: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """scores [B, N] -> [B, N] int64: 0 for the highest; ties to the lower index, then NaN, then non-candidates.

    Packed, scores [1, T] are ranked within their sequences.
    """
    order = _best_first(scores, candidates, cu_seqlens)
    position = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    if cu_seqlens is not None:
        sequence = sequence_of(cu_seqlens, scores.shape[1])
        position = position - torch.where(sequence < 0, 0, cu_seqlens.long()[sequence.clamp_min(0)])
    return torch.empty_like(order).scatter_(1, order, position)


def _best_first(scores: Tensor, candidates: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """scores [B, N] -> [B, N] int64: the tokens in the order of `rank_descending`; packed, sequence by sequence."""
    last = scores.isnan().long()
    if candidates is not None:
        last = torch.where(candidates, last, 2)
    order = torch.argsort(scores.masked_fill(scores.isnan(), 0), dim=1, descending=True, stable=True)
    if last.any():
        order = order.gather(1, torch.argsort(last.gather(1, order), dim=1, stable=True))
    if cu_seqlens is not None:
        sequence = sequence_of(cu_seqlens, scores.shape[1])
        order = order.gather(1, torch.argsort(sequence[order], dim=1, stable=True))
    return order


def _highest(scores: Tensor, candidates: Tensor, count: int | Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """scores, candidates [B, N] -> [B, N] bool: those candidates whose `rank_descending` is below `count`."""
    length = scores.shape[1]
    scores = scores.masked_fill(~candidates, float("-inf"))
    if isinstance(count, Tensor) or cu_seqlens is not None or not 0 < count < length or scores.isnan().any():
        return candidates & (rank_descending(scores, candidates, cu_seqlens) < _per_row(count, scores, cu_seqlens))
    lowest = scores.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)  # a fraction of a sort's time
    above, level = scores > lowest, candidates & (scores == lowest)
    return above | (level & (level.cumsum(1) <= count - above.sum(1, keepdim=True)))


def as_predecessor(predecessor: int | Tensor, like: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """A tensor of links as int64, or an int stride as [B, N] int64, [1, T] packed."""
    if isinstance(predecessor, Tensor):
        return predecessor.long()
    batch = 1 if cu_seqlens is not None else like.shape[0]
    return strided_predecessor(batch, like.shape[-1], predecessor, like.device, cu_seqlens)


def _block_rows(x: Tensor) -> int:
    """How many rows of x [N, D] to work on at a time, so that they stay in the cache."""
    return max(1, _BLOCK // max(1, x.shape[1]))


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    if not x.shape[1]:  # all of index is padding
        return x.new_zeros(*index.shape, *x.shape[2:])
    # torch.gather would quiet fp16 NaNs, and indexing is slower
    out = empty((*index.shape, *x.shape[2:]), x)
    for sample, kept, rows in zip(x, index, out, strict=True):
        torch.index_select(sample, 0, kept, out=rows)
    return out


def _per_row(count: int | Tensor, like: Tensor, cu_seqlens: Tensor | None = None) -> int | Tensor:
    """What to compare the ranks of `like` [B, N] with. Packed, [1, T], and 0 for tokens of no sequence."""
    if cu_seqlens is None:
        return count.to(like.device)[:, None] if isinstance(count, Tensor) else count
    sequence, sequences = sequence_of(cu_seqlens, like.shape[1]), cu_seqlens.shape[0] - 1
    if isinstance(count, Tensor):
        count = count.to(like.device)[sequence.clamp(0, max(sequences - 1, 0))]
    return torch.where((sequence >= 0) & (sequence < sequences), count, 0)[None]
