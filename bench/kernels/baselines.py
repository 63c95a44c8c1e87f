"""The benches' baselines: what one writes in PyTorch without kernels, and what the authors of FrameFusion wrote.

One sample a batch throughout, as in the authors' code. Each function takes the arguments of the op of its name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NO_PARTNER = -2.0


def strided_cosine_similarity(x: Tensor, stride: int) -> Tensor:
    """x [1, N, D] -> [1, N] fp32."""
    cosine = F.cosine_similarity(x[:, stride:], x[:, :-stride], dim=-1)
    return F.pad(cosine.float(), (stride, 0), value=NO_PARTNER)


def linked_cosine_similarity(x: Tensor, predecessor: Tensor) -> Tensor:
    """x [1, N, D], predecessor [1, N] -> [1, N] fp32."""
    partner = x[:, predecessor[0].clamp_min(0)]
    return F.cosine_similarity(x, partner, dim=-1).float().masked_fill(predecessor < 0, NO_PARTNER)


def merge_roots(similarity: Tensor, predecessor: Tensor, threshold: float, max_merges: int | None = None) -> Tensor:
    """similarity, predecessor [1, N] -> [1, N] int64, by pointer jumping."""
    joins = similarity >= threshold
    if max_merges is not None:
        best = similarity.topk(max_merges).indices
        joins = joins & torch.zeros_like(joins).scatter_(1, best, True)
    roots = torch.where(joins, predecessor, torch.arange(similarity.shape[1], device=similarity.device))
    while not torch.equal(further := roots.gather(1, roots), roots):
        roots = further
    return roots


def merge_mean(x: Tensor, roots: Tensor, companions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x [1, N, D], roots [1, N], companions [1, N, ...] -> the means [1, M, D], the companions' rows [1, M, ...]."""
    is_root = roots[0] == torch.arange(roots.shape[1], device=roots.device)
    kept = is_root.nonzero()[:, 0]
    row = (is_root.cumsum(0) - 1)[roots[0]]
    total = x.new_zeros(len(kept), x.shape[2], dtype=torch.float32).index_add_(0, row, x[0].float())
    mean = total / torch.bincount(row, minlength=len(kept))[:, None]
    return mean.to(x.dtype)[None], *(companion[:, kept] for companion in companions)


def connected_components(edges: Tensor, num_nodes: int) -> Tensor:
    """edges [E, 2] -> [num_nodes] int64: labels spread along edges, then along labels, until none falls."""
    first, second = edges.unbind(1)
    label = torch.arange(num_nodes, device=edges.device)
    while True:
        lowest = torch.minimum(label[first], label[second])
        lower = label.scatter_reduce(0, first, lowest, "amin").scatter_reduce(0, second, lowest, "amin")
        lower = lower[lower]
        if torch.equal(lower, label):
            return label
        label = lower


def attention_column_sum(q: Tensor, k: Tensor, num_queries: int | None = None, lse: Tensor | None = None) -> Tensor:
    """q [1, H, N, d], k [1, Hkv, N, d] -> [1, N] fp32, by way of the whole attention matrix."""
    queries, keys = num_queries or q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    score = q[:, :, -queries:] @ k.mT * q.shape[3] ** -0.5
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    score.masked_fill_(hidden, float("-inf"))
    if lse is None:
        weight = score.softmax(-1, dtype=torch.float32)
    else:
        weight = (score.float() - lse[:, :, -queries:, None]).exp()
    return weight.sum(2).mean(1)


def topk_keep(scores: Tensor, k: int) -> Tensor:
    """scores [1, N] -> [1, k] int64 ascending."""
    return scores.topk(k).indices.sort().values


def segmented_topk_keep(scores: Tensor, segments: Tensor, counts: Tensor) -> Tensor:
    """scores, segments [1, N], counts [1, S] -> [1, K] int64 ascending, by two stable sorts."""
    order = scores[0].argsort(descending=True, stable=True)
    order = order[segments[0, order].argsort(stable=True)]
    sizes = torch.bincount(segments[0], minlength=counts.shape[1])
    segment = segments[0, order]
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[segment]
    return order[rank < counts[0, segment]].sort().values[None]


def gather_rows(kept: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """kept [1, K], tensors [1, N, ...] -> each [1, K, ...]."""
    return tuple(tensor[:, kept[0]] for tensor in tensors)


def merge_step(
    hidden: Tensor, cos: Tensor, sin: Tensor, patch: Tensor, num_patches: int, threshold: float, max_merges: int, **_
) -> tuple[Tensor, ...]:
    """One merge call of the authors' code, transcribed: hidden [1, N, D], cos and sin [1, N, d], patch [1, N].

    As theirs it works in the hidden states' dtype and writes into them. Theirs stores the lengths of runs in that dtype
    too, which miscounts long runs in bf16; here they are integers.
    Source: https://github.com/thu-nics/FrameFusion, framefusion/main.py.
    """
    similarity, order = _similarity_by_patch(hidden, patch, num_patches)
    above = int((similarity >= threshold).sum())
    merged = torch.where(similarity >= threshold)[0] if above < max_merges else similarity.topk(max_merges).indices
    keep = torch.ones(patch.shape[1], dtype=torch.bool, device=patch.device)
    keep[order[merged]] = False
    _add_runs(hidden, order, merged)
    return hidden[:, keep], cos[:, keep], sin[:, keep], patch[:, keep]


def _similarity_by_patch(hidden: Tensor, patch: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
    """[n] the similarity of each video token to the one before it in the order by patch, and [n] that order."""
    patches = torch.arange(num_patches, device=patch.device)
    patch_of, order = torch.where(patch == patches[:, None])  # a [num_patches, N] comparison
    earlier, later = hidden[0, order[:-1]], hidden[0, order[1:]]
    cosine = (earlier * later).sum(-1) / (earlier.norm(dim=-1) * later.norm(dim=-1))
    cosine[patch_of[:-1] != patch_of[1:]] = NO_PARTNER
    return torch.cat((cosine.new_full((1,), NO_PARTNER), cosine)), order


def _add_runs(hidden: Tensor, order: Tensor, merged: Tensor) -> None:
    """Replace the token before each run of merged ones by the mean of it and the run, in place."""
    flag = torch.zeros(len(order) + 1, dtype=torch.int8, device=order.device)
    flag[merged] = 1
    step = flag.diff(prepend=flag.new_zeros(1))
    first = torch.where(step == 1)[0] - 1  # the token that a run joins
    length = torch.where(step == -1)[0] - first - 1
    start = torch.repeat_interleave(first, length)
    place = torch.arange(len(start), device=order.device)
    member = start + 1 + place - torch.repeat_interleave(length.cumsum(0) - length, length)
    hidden.index_add_(1, order[start], hidden[:, order[member]])
    hidden[:, order[first]] /= (length + 1)[None, :, None]


def prune_step(
    q: Tensor, k: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, patch: Tensor, keep: int
) -> tuple[Tensor, ...]:
    """One prune call as FastV and FrameFusion do it: the tokens that the last query attends to most, then a gather."""
    importance = attention_column_sum(q, k, num_queries=1)
    others = torch.where(patch[0] < 0)[0]
    best = importance[0].masked_fill(patch[0] < 0, float("-inf")).topk(keep).indices
    kept = torch.cat((best, others)).sort().values
    return kept[None], hidden[:, kept], cos[:, kept], sin[:, kept], patch[:, kept]
