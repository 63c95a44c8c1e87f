"""Every op of the library in plain PyTorch, as its formula reads. The kernels and the CPU path must compute the same.

Half and single precision inputs are computed in fp32, double precision ones in fp64, so `op(x.double())` is the
ground truth that errors are measured against. Slow, and nothing is validated here; the public functions do that.

With cu_seqlens tensors are packed: [T, ...] for [B, N, ...], and S sequences for B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._types import NO_LINK, Groups, Merged

_SCORES = 2**24  # elements of the attention matrix that exist at a time


def strided_cosine_similarity(x: Tensor, stride: int, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """x [B, N, D] -> [B, N]: cosine of each row with the one `stride` places earlier."""
    return linked_cosine_similarity(x, _links(stride, x.shape[:-1], x.device, cu_seqlens), cu_seqlens=cu_seqlens)


def linked_cosine_similarity(x: Tensor, predecessor: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """x [B, N, D], predecessor [B, N] (-1: none) -> [B, N]: cosine of each row with its predecessor."""
    if cu_seqlens is not None:
        return linked_cosine_similarity(x[None], predecessor[None])[0]
    if not x.numel():
        return _accumulated(x).new_full(predecessor.shape, NO_LINK)
    x = _accumulated(x)
    peak = x.abs().amax(-1, keepdim=True)
    unit = F.normalize(x / peak, dim=-1)
    linked = (predecessor >= 0) & (predecessor < x.shape[1])
    usable = ((peak > 0) & peak.isfinite()).squeeze(-1)
    partner = torch.where(linked, predecessor, 0).long()
    cosine = (unit * unit.gather(1, partner.unsqueeze(-1).expand_as(unit))).sum(-1)
    return torch.where(linked & usable & usable.gather(1, partner), cosine, NO_LINK)


def merge_roots(
    similarity: Tensor,
    predecessor: int | Tensor,
    threshold: float,
    max_merges: int | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """similarity [B, N] -> [B, N] int64: the first token of each token's group. max_seqlen does not matter here."""
    similarity = _accumulated(similarity)
    links = _links(predecessor, similarity.shape, similarity.device, cu_seqlens)
    position = torch.arange(similarity.shape[-1], device=similarity.device).expand_as(links)
    joins = (links >= 0) & (links < position) & (similarity > NO_LINK)
    joins &= similarity >= torch.tensor(threshold, dtype=torch.float32, device=similarity.device)
    if max_merges is not None:
        admitted = torch.zeros_like(joins)
        for number, rows in enumerate(_rows(similarity, cu_seqlens)):
            admitted[rows] = _best(similarity[rows], joins[rows], _count(max_merges, number))
        joins = admitted
    roots = torch.where(joins, links, position)
    while not torch.equal(further := roots.gather(-1, roots), roots):  # each round doubles the distance covered
        roots = further
    return roots


def connected_components(edges: Tensor, num_nodes: int) -> Tensor:
    """edges [E, 2] -> [num_nodes] int64: the smallest index of each node's component."""
    edges = edges[((edges >= 0) & (edges < num_nodes)).all(1)].long()
    ends, others = torch.cat([edges, edges.flip(1)]).unbind(1)
    label = torch.arange(num_nodes, device=edges.device)
    while True:
        lower = label.scatter_reduce(0, label[ends], label[others], "amin")  # at the root of one end, that of the other
        lower = lower[lower]
        if torch.equal(lower, label):
            return label
        label = lower


def merge_mean(
    x: Tensor,
    roots: Tensor,
    companions: Sequence[Tensor] = (),
    predecessor: int | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
) -> Merged:
    """x [B, N, D], roots [B, N] (-1: leaves without a group) -> the mean of each group at its root, compacted."""
    links = None if predecessor is None else _links(predecessor, roots.shape, roots.device, cu_seqlens)
    if cu_seqlens is None:
        groups = group_rows(roots, links, capacity)
        taken = gather_rows(groups.kept, *companions)
        mean = group_mean(x, groups)
        return Merged(mean, taken, groups.kept, groups.lengths, None if links is None else groups.predecessor)
    links = None if links is None else links[None]
    batch = merge_mean(x[None], roots[None], [part[None] for part in companions], links, capacity=capacity)
    taken = tuple(part[0] for part in batch.companions)
    rows = None if batch.predecessor is None else batch.predecessor[0]
    return Merged(batch.x[0], taken, batch.kept[0], _lengths(batch.kept[0], cu_seqlens), rows)


def group_rows(roots: Tensor, predecessor: int | Tensor | None = None, capacity: int | None = None) -> Groups:
    """roots [B, N] -> the rows and their members. A token is dropped if its root is -1 or is not itself a root."""
    links = None if predecessor is None else _links(predecessor, roots.shape, roots.device)
    kept = _left_padded([(row == torch.arange(len(row), device=row.device)).nonzero()[:, 0] for row in roots])
    kept = kept.to(roots.device)
    row = torch.full(roots.shape, -1, device=roots.device)
    sizes, members, linked = torch.zeros_like(kept), torch.full_like(row, -1), torch.full_like(kept, -1)
    for sample, root in enumerate(roots):
        place = torch.full((root.shape[0] + 1,), -1, device=roots.device)  # the row of each root; the last stays -1
        place[kept[sample]] = torch.arange(kept.shape[1], device=roots.device)
        place[-1] = -1
        row[sample] = place[torch.where((root >= 0) & (root < len(root)), root, -1).long()]
        grouped = row[sample].argsort(stable=True)[(row[sample] < 0).sum() :]
        sizes[sample] = row[sample][grouped].bincount(minlength=kept.shape[1])
        members[sample, : len(grouped)] = grouped
        if links is not None:
            earlier = torch.where(kept[sample] < 0, -1, F.pad(links[sample], (0, 1), value=-1)[kept[sample]])
            earlier = torch.where((earlier >= 0) & (earlier < len(root)), earlier, -1)
            linked[sample] = torch.where(earlier < 0, -1, F.pad(row[sample], (0, 1), value=-1)[earlier])
    starts, lengths = sizes.cumsum(1) - sizes, (kept >= 0).sum(1)
    if capacity is not None:  # the last rows; the members of the others stay in the list
        cut = kept.shape[1] - capacity
        kept, starts, sizes, linked = (
            F.pad(x, (-cut, 0), value=v) for x, v in zip((kept, starts, sizes, linked), (-1, 0, 0, -1), strict=True)
        )
        row, linked = (torch.where(x >= max(cut, 0), x - cut, -1) for x in (row, linked))
        lengths = lengths.clamp_max(capacity)
    return Groups(kept, lengths, kept[:, :0] if links is None else linked, row, starts, sizes, members)


def group_mean(x: Tensor, groups: Groups) -> Tensor:
    """x [B, N, D] -> [B, M, D]: the mean of each row's members, zeros for padding; a group of one is copied."""
    means = []
    for sample, row in enumerate(groups.row):
        size = groups.sizes[sample, :, None]
        total = _accumulated(x).new_zeros(len(size), x.shape[2])
        total = total.index_add(0, row[row >= 0], _accumulated(x[sample])[row >= 0])
        means.append((total / size.clamp_min(1)).to(x.dtype))
    mean = torch.stack(means) if means else x.new_zeros(*groups.kept.shape, x.shape[2])
    return torch.where(groups.sizes[..., None] == 1, gather_rows(groups.kept, x)[0], mean)


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
    """q [B, H, Nq, d], k [B, Hkv, Nk, d] -> [B, C]: attention summed over the queries, averaged over the heads.

    With packed sequences: q [Tq, H, d], k [Tk, Hkv, d], lse [H, Tq] -> [Tk]. max_seqlen_q and max_seqlen_k do not
    matter here.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        out = _accumulated(k).new_zeros(len(k))
        for queries, keys in zip(_rows(q, cu_seqlens_q), _rows(k, cu_seqlens_k), strict=True):
            one_q, one_k = q[queries].transpose(0, 1)[None], k[keys].transpose(0, 1)[None]
            last = None if num_queries is None else min(num_queries, one_q.shape[2])
            norms = None if lse is None else lse[None, :, queries]
            out[keys] = attention_column_sum(one_q, one_k, scale=scale, causal=causal, lse=norms, num_queries=last)[0]
        return out
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    scale = width**-0.5 if scale is None else scale
    begin, end = (0, keys) if columns is None else columns
    k = _accumulated(k).repeat_interleave(heads // k.shape[1], 1)
    total = k.new_zeros(batch, end - begin)
    asked = torch.arange(queries, device=q.device)[queries - (queries if num_queries is None else num_queries) :]
    for some in asked.split(max(1, _SCORES // max(1, batch * heads * keys))):
        score = _accumulated(q[:, :, some]) @ k.mT * scale
        if causal:
            hidden = torch.arange(keys, device=q.device) > some[:, None] + keys - queries
            score = score.masked_fill(hidden, -torch.inf)
        if lse is None:
            weight = score.softmax(-1).masked_fill((score == -torch.inf).all(-1, keepdim=True), 0)
        else:
            norm = lse[:, :, some, None].to(score.dtype)
            weight = (score - norm.masked_fill(norm == -torch.inf, torch.inf)).exp()
        total += weight.sum(2).mean(1)[:, begin:end]
    return total


def topk_keep(
    scores: Tensor,
    k: int | Tensor,
    candidates: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    capacity: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """scores [B, N] -> [B, K] int64: every non-candidate and the k best candidates, ascending, -1 for padding."""
    if isinstance(k, int) and candidates is None and cu_seqlens is None and capacity is None:
        return topk_keep(scores, k, capacity=k)[0]  # a batch of none has k columns, too
    candidates = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates
    keep = torch.zeros_like(candidates)
    for number, rows in enumerate(_rows(scores, cu_seqlens)):
        keep[rows] = _best(scores[rows], candidates[rows], _count(k, number)) | ~candidates[rows]
    return _kept(keep, cu_seqlens, capacity)


def segmented_topk_keep(
    scores: Tensor,
    segments: Tensor,
    counts: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """scores, segments [B, N], counts [B, S] -> [B, K] int64: tokens of segment -1 and the best of each segment."""
    segments = segments.expand_as(scores)
    keep = segments < 0
    for rows in [slice(None)] if scores.ndim == 1 else range(len(scores)):
        for segment, count in enumerate(counts if counts.ndim == 1 else counts[rows]):
            keep[rows] |= _best(scores[rows], segments[rows] == segment, int(count))
    return _kept(keep, cu_seqlens, capacity)


def gather_rows(kept: Tensor, *tensors: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """kept [B, K] (-1: a row of zeros), tensors [B, N, ...] -> each [B, K, ...]."""
    if cu_seqlens is not None:
        return tuple(rows[0] for rows in gather_rows(kept[None], *(tensor[None] for tensor in tensors)))
    sample = torch.arange(kept.shape[0], device=kept.device)[:, None]
    taken = []
    for tensor in tensors:
        if not tensor.shape[1]:
            taken.append(tensor.new_zeros(*kept.shape, *tensor.shape[2:]))
            continue
        inside = (kept >= 0) & (kept < tensor.shape[1])
        rows = tensor[sample, torch.where(inside, kept, 0).long()]
        # where, not masked_fill: it takes every dtype
        taken.append(torch.where(inside.view(*kept.shape, *[1] * (rows.ndim - 2)), rows, rows.new_zeros(())))
    return tuple(taken)


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> list[Any]:
    """What indexes each sample of x [B, N], or each sequence of a packed [T]."""
    if cu_seqlens is None:
        return list(range(len(x)))
    return [slice(begin, end) for begin, end in pairwise(cu_seqlens.tolist())]


def _count(count: int | Tensor, number: int) -> int:
    return max(int(count[number]), 0) if isinstance(count, Tensor) else count


def _best(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """scores, candidates [N] -> [N] bool: the `count` best candidates; ties to the lower index, NaN last."""
    order = (-scores).argsort(stable=True)
    return torch.zeros_like(candidates).index_fill(0, order[candidates[order]][: max(count, 0)], True)


def _links(
    predecessor: int | Tensor, shape: torch.Size, device: torch.device, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Links as they are, or those of a stride, which does not reach over the start of a sample or sequence: int64."""
    if isinstance(predecessor, Tensor):
        return predecessor.long()
    links = torch.full(shape, -1, device=device)
    for rows in _rows(links, cu_seqlens):
        position = torch.arange(shape[-1], device=device)[slice(None) if cu_seqlens is None else rows]
        links[rows] = F.pad(position, (min(predecessor, len(position)), 0), value=-1)[: len(position)]
    return links


def _kept(keep: Tensor, cu_seqlens: Tensor | None, capacity: int | None) -> Tensor | tuple[Tensor, Tensor]:
    """keep [B, N] bool, or [T] -> what the selecting ops return."""
    rows = _left_padded([row.nonzero()[:, 0] for row in (keep if cu_seqlens is None else keep[None])], capacity)
    rows = rows.to(keep.device)
    kept = rows if cu_seqlens is None else rows[0]
    return kept if capacity is None else (kept, _lengths(kept, cu_seqlens))


def _lengths(kept: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How many positions of each sample of kept [B, K], or of each sequence of a packed [K], are no padding."""
    if cu_seqlens is None:
        return (kept >= 0).sum(1)
    begins, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    return ((kept >= begins) & (kept < ends)).sum(1)


def _left_padded(rows: list[Tensor], length: int | None = None) -> Tensor:
    """Positions of each sample -> [B, length] int64, None: the longest: the last ones, after -1 if there are fewer."""
    longest = max(map(len, rows), default=0) if length is None else length
    padded = torch.full((len(rows), longest), -1)
    for out, row in zip(padded, rows, strict=True):
        if count := min(len(row), longest):
            out[-count:] = row[-count:]
    return padded


def _accumulated(x: Tensor) -> Tensor:
    """In the precision that the formula is computed in."""
    return x if x.dtype == torch.float64 else x.float()
