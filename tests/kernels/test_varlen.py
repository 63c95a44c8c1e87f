"""Packed sequences: each gets what the op gives it alone. Capacities: the same rows in buffers of a chosen length."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_libraries import libraries
from testing_helpers import DTYPES, make_strided, make_video, shuffled_programs
from torch import Tensor

from fftriton_kernels import (
    NO_LINK,
    _groups,
    _radix,
    connected_components,
    gather_rows,
    linked_cosine_similarity,
    merge,
    merge_mean,
    merge_roots,
    reference,
    segmented_topk_keep,
    strided_cosine_similarity,
    topk_keep,
)
from fftriton_kernels._packed import sequence_of

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LENGTHS = {  # none is a power of two; two are empty, one of them the first; longer than a block
    "odd": (0, 7, 1, 0, 33, 12),
    "one": (21,),
    "empty at the end": (5, 0, 0),
    "long": (9, 2300, 0, 70),
}
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
short = pytest.mark.parametrize(
    "lengths", [LENGTHS["odd"], LENGTHS["empty at the end"]], ids=["odd", "empty at the end"]
)


def boundaries(lengths: tuple[int, ...], device: str, index: torch.dtype = torch.int64) -> Tensor:
    """[S+1]: cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, index)


def parts(x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Each sequence of a packed tensor as a batch of one."""
    return [part[None] for part in x.split(list(lengths))]


def make_packed(lengths: tuple[int, ...], width: int, dtype: torch.dtype, device: str) -> Tensor:
    """[T, D]: patches that drift, and a zero row and a NaN among them."""
    x = make_video(1, -(-sum(lengths) // 3), 3, width, dtype, device)[0, : sum(lengths)]
    x[3], x[-2, 0] = 0.0, math.nan
    return x


def make_links(lengths: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    """[T] int64 packed positions: any earlier token of the sequence, or none."""
    generator, links = torch.Generator().manual_seed(seed), []
    for begin, length in zip([0, *torch.tensor(lengths).cumsum(0).tolist()], lengths, strict=False):
        earlier = (torch.rand(length, generator=generator) * torch.arange(length)).long()
        none = (torch.rand(length, generator=generator) < 0.2) | (torch.arange(length) == 0)
        links.append(torch.where(none, -1, begin + earlier))
    return torch.cat(links).to(device)


def alone(packed: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Packed positions [T] as positions in each sequence [1, N], -1 stays."""
    cu_seqlens = boundaries(lengths, packed.device)
    return [torch.where(part < 0, -1, part - cu_seqlens[s]) for s, part in enumerate(parts(packed, lengths))]


def joined(results: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    """Positions in each sequence [1, K] as packed positions."""
    begins = boundaries(lengths, "cpu").tolist()
    return torch.cat([torch.where(part[0] < 0, -1, part[0] + begin) for part, begin in zip(results, begins)])  # noqa: B905


def make_scores(lengths: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """[T] with many ties and some NaN."""
    scores = (torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0)) * 4).round() / 4
    scores[::5] = math.nan
    return scores.to(device, dtype)


def equal(out: Tensor, expected: Tensor) -> bool:
    """Whether dtype, shape and values agree, NaN with NaN."""
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    return True


# each sequence alone


@libraries
@dtypes
@short
def test_similarity(library, dtype, lengths, device):
    x, cu_seqlens = make_packed(lengths, 33, dtype, device), boundaries(lengths, device, torch.int32)
    for stride in (3, 40):
        out = library.strided_cosine_similarity(x, stride, cu_seqlens=cu_seqlens)
        expected = torch.cat([reference.strided_cosine_similarity(part, stride)[0] for part in parts(x, lengths)])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert torch.equal(out == NO_LINK, expected == NO_LINK)
    links = make_links(lengths, device)
    out = library.linked_cosine_similarity(x, links.int(), cu_seqlens=cu_seqlens)
    pairs = zip(parts(x, lengths), alone(links, lengths), strict=True)
    expected = torch.cat([reference.linked_cosine_similarity(part, link)[0] for part, link in pairs])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@libraries
@lengths
@pytest.mark.parametrize("links", ["stride", "links"])
def test_roots(library, links, lengths, device):
    cu_seqlens = boundaries(lengths, device)
    similarity = make_scores(lengths, torch.float32, device)
    predecessor = 3 if links == "stride" else make_links(lengths, device)
    each = [3] * len(lengths) if links == "stride" else alone(predecessor, lengths)
    bounds = torch.tensor([(5 * s) % 7 - 1 + n // 9 for s, n in enumerate(lengths)], device=device)
    for bound in (None, 4, 2**40, make_strided(bounds.int())):
        out = library.merge_roots(similarity, predecessor, -0.25, bound, cu_seqlens=cu_seqlens)
        expected = [
            reference.merge_roots(part, each[s], -0.25, bound[s : s + 1] if isinstance(bound, Tensor) else bound)
            for s, part in enumerate(parts(similarity, lengths))
        ]
        assert equal(out, joined(expected, lengths))


@dtypes
def test_roots_of_any_dtype_and_strides(dtype, device):
    lengths = LENGTHS["odd"]
    similarity, links = make_scores(lengths, dtype, device), make_links(lengths, device)
    cu_seqlens = boundaries(lengths, device)
    expected = reference.merge_roots(similarity, links, 0.0, 3, cu_seqlens=cu_seqlens)
    for spans, longest in ((cu_seqlens.int(), 33), (make_strided(cu_seqlens), 99)):
        wide = make_strided(similarity), make_strided(links.int())
        assert equal(merge_roots(*wide, 0.0, 3, cu_seqlens=spans, max_seqlen=longest), expected)


@libraries
@dtypes
@short
def test_mean(library, dtype, lengths, device):
    x, cu_seqlens, links = (
        make_packed(lengths, 17, dtype, device),
        boundaries(lengths, device),
        make_links(lengths, device),
    )
    similarity = make_scores(lengths, torch.float32, device)
    companions = (torch.arange(sum(lengths), device=device), x[:, :6].unflatten(1, (2, 3)))
    for predecessor in (2, links):
        roots = library.merge_roots(similarity, predecessor, 0.0, cu_seqlens=cu_seqlens)
        roots[::11] = torch.where(roots[::11] == torch.arange(len(roots), device=device)[::11], roots[::11], -1)
        out = library.merge_mean(x, roots, companions, predecessor, cu_seqlens=cu_seqlens)
        each = [2] * len(lengths) if predecessor is not links else alone(links, lengths)
        groups = [
            library.merge_mean(
                part, alone(roots, lengths)[s], [parts(companion, lengths)[s] for companion in companions], each[s]
            )
            for s, part in enumerate(parts(x, lengths))
        ]
        assert equal(out.x, torch.cat([group.x[0] for group in groups]))
        assert equal(out.kept, joined([group.kept for group in groups], lengths))
        assert equal(out.lengths, torch.cat([group.lengths for group in groups]))
        rows = tuple(out.lengths.tolist())
        assert equal(out.predecessor, joined([group.predecessor for group in groups], rows))
        assert equal(out.cu_seqlens, boundaries(rows, device, torch.int32))
        for i in (0, 1):
            assert equal(out.companions[i], torch.cat([group.companions[i][0] for group in groups]))
    assert library.merge_mean(x[None], roots[None]).cu_seqlens is None


@libraries
@lengths
def test_topk(library, lengths, device):
    scores, cu_seqlens = make_scores(lengths, torch.float32, device), boundaries(lengths, device)
    candidates = torch.rand(len(scores), generator=torch.Generator().manual_seed(1)).to(device) < 0.6
    counts = torch.tensor([(5 * s) % 7 - 1 + n // 9 for s, n in enumerate(lengths)], device=device)
    for k in (5, 2**31 - 1, make_strided(counts.int())):
        each = k.clamp_min(0).tolist() if isinstance(k, Tensor) else [k] * len(lengths)
        each = [min(count, length) for count, length in zip(each, lengths, strict=True)]
        for mask in (None, candidates):
            out = library.topk_keep(scores, k, mask, cu_seqlens=cu_seqlens)
            masks = [None] * len(lengths) if mask is None else parts(mask, lengths)
            expected = [reference.topk_keep(part, each[s], masks[s]) for s, part in enumerate(parts(scores, lengths))]
            assert equal(out, joined(expected, lengths))


@dtypes
def test_topk_of_any_dtype_and_strides(dtype, device):
    lengths = LENGTHS["odd"]
    scores, cu_seqlens = make_scores(lengths, dtype, device), boundaries(lengths, device)
    candidates = scores > -0.5
    expected = reference.topk_keep(scores, 4, candidates, cu_seqlens=cu_seqlens)
    for spans, longest in ((cu_seqlens.int(), 33), (make_strided(cu_seqlens), 99)):
        wide = make_strided(scores), 4, make_strided(candidates)
        assert equal(topk_keep(*wide, cu_seqlens=spans, max_seqlen=longest), expected)


@libraries
@dtypes
@short
def test_segmented(library, dtype, lengths, device):
    scores, cu_seqlens = make_scores(lengths, dtype, device), boundaries(lengths, device)
    sequence = sequence_of(cu_seqlens, len(scores))
    local = torch.randint(-1, 3, (len(scores),), generator=torch.Generator().manual_seed(1)).to(device)
    segments = torch.where(local < 0, -1, 3 * sequence + local)
    counts = torch.arange(3 * len(lengths), device=device) % 4
    out = library.segmented_topk_keep(scores, segments, counts, cu_seqlens=cu_seqlens)
    expected = [
        reference.segmented_topk_keep(part, parts(local, lengths)[s], counts[None, 3 * s : 3 * s + 3])
        for s, part in enumerate(parts(scores, lengths))
    ]
    assert equal(out, joined(expected, lengths))


@libraries
def test_gather(library, device):
    lengths = LENGTHS["odd"]
    x, positions = make_packed(lengths, 6, torch.bfloat16, device), torch.arange(sum(lengths), device=device)
    kept = torch.tensor([-1, 0, 7, 8, 52], device=device)
    for index in (kept, make_strided(kept.int())):
        rows = library.gather_rows(index, x, positions, x.unflatten(1, (2, 3)), cu_seqlens=boundaries(lengths, device))
        assert equal(rows[0], torch.cat([torch.zeros_like(x[:1]), x[kept[1:]]]))
        assert equal(rows[1], kept.clamp_min(0))
        assert equal(rows[2], rows[0].unflatten(1, (2, 3)))
    assert gather_rows(kept, cu_seqlens=boundaries(lengths, device)) == ()


def test_components_of_packed_graphs(device):
    graphs = [
        (torch.tensor([[0, 2], [2, 1]]), 4),
        (torch.zeros(0, 2, dtype=torch.int64), 0),
        (torch.tensor([[1, 2]]), 3),
    ]
    begins = boundaries((4, 0, 3), "cpu").tolist()
    edges = torch.cat([edges + begin for (edges, _), begin in zip(graphs, begins, strict=False)]).to(device)
    expected = [connected_components(edges.to(device), nodes)[None] for edges, nodes in graphs]
    assert equal(connected_components(edges, 7), joined(expected, (4, 0, 3)))


def test_gradients_stay_in_their_sequence(device):
    lengths = (4, 0, 5)
    cu_seqlens = boundaries(lengths, device)
    x = torch.randn(9, 3, device=device, requires_grad=True)
    roots = torch.tensor([0, 0, 2, 0, 4, 4, 4, 7, -1], device=device)
    merged = merge_mean(x, roots, (x,), cu_seqlens=cu_seqlens)
    kept, _ = topk_keep(merged.x.detach()[:, 0], 9, cu_seqlens=merged.cu_seqlens, capacity=6)
    (rows,) = gather_rows(kept, merged.x, cu_seqlens=cu_seqlens)
    (grad,) = torch.autograd.grad(rows.sum() + merged.companions[0].sum(), x)
    share = torch.tensor([4 / 3, 1 / 3, 2, 1 / 3, 4 / 3, 1 / 3, 1 / 3, 2, 0], device=device)
    torch.testing.assert_close(grad, share[:, None].expand(-1, 3))


@libraries
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nothing(library, lengths, device):
    x, cu_seqlens = torch.zeros(0, 4, device=device), boundaries(lengths, device)
    similarity = library.strided_cosine_similarity(x, 2, cu_seqlens=cu_seqlens)
    roots = library.merge_roots(similarity, 2, 0.5, 3, cu_seqlens=cu_seqlens)
    assert similarity.shape == roots.shape == (0,)
    for capacity in (None, 3):
        rows = capacity or 0
        merged = library.merge_mean(x, roots, (roots,), 2, cu_seqlens=cu_seqlens, capacity=capacity)
        assert equal(merged.x, torch.zeros(rows, 4, device=device))
        assert equal(merged.kept, torch.full((rows,), -1, device=device))
        assert merged.lengths.tolist() == [0] * len(lengths)
        assert merged.cu_seqlens.tolist() == [rows] * (len(lengths) + 1)
        kept = library.topk_keep(similarity, 3, cu_seqlens=cu_seqlens, capacity=capacity)
        assert (kept if capacity is None else kept[0]).tolist() == [-1] * rows


# capacities


def padded(x: Tensor, capacity: int, fill: float) -> Tensor:
    """x [B, M, ...] with capacity for M: its last rows, after `fill`."""
    room = x.new_full((x.shape[0], capacity, *x.shape[2:]), fill)
    return torch.cat([room, x], 1)[:, x.shape[1] :]


@libraries
@pytest.mark.parametrize("excess", [-1, 0, 1, "N", "N + 5", "0"])
def test_capacity(library, excess, device):
    torch.manual_seed(0)
    B, N = 3, 40
    x, similarity = make_video(B, 1, N, 9, torch.float32, device), torch.rand(B, N, device=device)
    roots = library.merge_roots(similarity, 3, 0.4, torch.tensor([5, 20, 40], device=device))
    candidates = similarity < 0.7
    segments, counts = torch.arange(N, device=device) // 10 - 1, torch.tensor([3, 0, 4], device=device)
    k = torch.tensor([2, 9, 0], device=device)
    plain = library.merge_mean(x, roots, (segments.expand(B, -1), x), 3)
    fixed = {"N": N, "N + 5": N + 5, "0": 0}
    capacity = fixed[excess] if excess in fixed else plain.x.shape[1] + excess
    out = library.merge_mean(x, roots, (segments.expand(B, -1), x), 3, capacity=capacity)
    assert equal(out.x, padded(plain.x, capacity, 0))
    assert equal(out.kept, padded(plain.kept, capacity, -1))
    assert equal(out.lengths, plain.lengths.clamp_max(capacity))
    for ours, theirs in zip(out.companions, plain.companions, strict=True):
        assert equal(ours, padded(theirs, capacity, 0))
    shift = capacity - plain.x.shape[1]  # links to rows that were cut off are none
    links = torch.where(plain.predecessor < 0, -1, (plain.predecessor + shift).clamp_min(-1))
    assert equal(out.predecessor, padded(links, capacity, -1))

    for keep in (
        lambda **options: library.topk_keep(similarity, 7, **options),
        lambda **options: library.topk_keep(similarity, k, **options),
        lambda **options: library.topk_keep(similarity, k, candidates, **options),
        lambda **options: library.segmented_topk_keep(
            similarity, segments.expand(B, -1), counts.expand(B, -1), **options
        ),
    ):
        expected = keep()
        rows = fixed[excess] if excess in fixed else expected.shape[1] + excess
        kept, lengths = keep(capacity=rows)
        assert equal(kept, padded(expected, rows, -1))
        assert equal(lengths, (expected >= 0).sum(1).clamp_max(rows))


@libraries
@pytest.mark.parametrize("excess", [-2, 0, 3])
def test_capacity_for_packed_sequences(library, excess, device):
    lengths = LENGTHS["odd"]
    cu_seqlens = boundaries(lengths, device)
    x, similarity = make_packed(lengths, 9, torch.float32, device), make_scores(lengths, torch.float32, device)
    roots = library.merge_roots(similarity, 2, 0.0, 6, cu_seqlens=cu_seqlens)
    plain = library.merge_mean(x, roots, (), 2, cu_seqlens=cu_seqlens)
    capacity = len(plain.kept) + excess
    out = library.merge_mean(x, roots, (), 2, cu_seqlens=cu_seqlens, capacity=capacity)
    assert equal(out.x, padded(plain.x[None], capacity, 0)[0])
    assert equal(out.kept, padded(plain.kept[None], capacity, -1)[0])
    cut = (plain.cu_seqlens + excess).clamp_min(0)
    assert equal(out.cu_seqlens, cut)
    assert equal(out.lengths, cut.long().diff())
    segments, counts = sequence_of(cu_seqlens, len(similarity)), torch.full((len(lengths),), 4, device=device)
    for keep in (
        lambda **options: library.topk_keep(similarity, 4, cu_seqlens=cu_seqlens, **options),
        lambda **options: library.segmented_topk_keep(similarity, segments, counts, cu_seqlens=cu_seqlens, **options),
    ):
        expected = keep()
        kept, rows = keep(capacity=len(expected) + excess)
        assert equal(kept, padded(expected[None], len(expected) + excess, -1)[0])
        assert rows.tolist() == [int((segments[kept[kept >= 0]] == s).sum()) for s in range(len(lengths))]


@libraries
def test_padding_of_a_capacity_is_of_no_sequence(library, device):
    # a merge with room to spare, then a prune and a second merge among its rows
    lengths = LENGTHS["odd"]
    x = make_video(1, 53, 1, 9, torch.float32, device)[0]
    roots = library.merge_roots(
        library.strided_cosine_similarity(x, 2, cu_seqlens=boundaries(lengths, device)), 2, 0.3,
        cu_seqlens=boundaries(lengths, device),
    )  # fmt: skip

    def go_on(merged, **room):
        scores = merged.x[:, 0].contiguous()
        similarity = library.linked_cosine_similarity(merged.x, merged.predecessor, cu_seqlens=merged.cu_seqlens)
        again = library.merge_roots(similarity, merged.predecessor, -0.5, 2, cu_seqlens=merged.cu_seqlens)
        few = library.topk_keep(scores, 3, scores > 0, cu_seqlens=merged.cu_seqlens, **room)
        few = few[0] if room else few
        return few[few >= 0], again, library.gather_rows(few[few >= 0], merged.kept, cu_seqlens=merged.cu_seqlens)[0]

    tight = library.merge_mean(x, roots, (), 2, cu_seqlens=boundaries(lengths, device))
    roomy = library.merge_mean(x, roots, (), 2, cu_seqlens=boundaries(lengths, device), capacity=53)
    spare = 53 - len(tight.kept)
    assert spare > 0
    expected, out = go_on(tight), go_on(roomy, capacity=53)
    assert equal(out[0], expected[0] + spare)
    assert equal(out[1][spare:], expected[1] + spare)
    assert equal(out[1][:spare], torch.arange(spare, device=device))
    assert equal(out[2], expected[2])


# runs and orders


def everything(lengths, device):
    """The results of every op, with several blocks."""
    cu_seqlens, links = boundaries(lengths, device), make_links(lengths, device)
    scores = make_scores(lengths, torch.float32, device)
    x = make_packed(lengths, 3, torch.float32, device)
    bounds = torch.tensor([n // 2 for n in lengths], device=device)
    roots = merge_roots(scores, links, -0.5, bounds, cu_seqlens=cu_seqlens)
    merged = merge_mean(
        x[:25], roots[:25].clamp_max(24), (scores[:25],), 3, cu_seqlens=cu_seqlens.clamp_max(25), capacity=30
    )
    kept, rows = topk_keep(scores, bounds, scores > -1, cu_seqlens=cu_seqlens, capacity=len(scores))
    segments = torch.arange(len(scores), device=device) % 7
    return [
        strided_cosine_similarity(x[:25], 3, cu_seqlens=cu_seqlens.clamp_max(25)),
        linked_cosine_similarity(x[:25], links[:25].clamp_max(24), cu_seqlens=cu_seqlens.clamp_max(25)),
        roots, merged.x, merged.kept, merged.lengths, merged.predecessor, *merged.companions, kept, rows,
        segmented_topk_keep(scores, segments, segments[:7] * 20, cu_seqlens=cu_seqlens),
        connected_components(torch.stack([torch.arange(len(roots), device=device), roots], 1), len(roots)),
        *gather_rows(kept, scores, cu_seqlens=cu_seqlens),
    ]  # fmt: skip


def test_two_runs_agree_bit_for_bit(device):
    first, second = everything(LENGTHS["long"], device), everything(LENGTHS["long"], device)
    assert all(map(equal, second, first))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("seed", range(2))
def test_programs_in_any_order(seed, monkeypatch, device):
    lengths = (9, 300, 0, 100)
    monkeypatch.setattr(_radix, "BLOCK", 128)
    monkeypatch.setattr(merge, "BLOCK", 128)
    monkeypatch.setattr(_groups, "BLOCK", 128)
    expected = everything(lengths, device)
    with shuffled_programs(seed):
        assert all(map(equal, everything(lengths, device), expected))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple), k=st.integers(0, 6),
    stride=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_kernels_agree_with_the_reference(lengths, k, stride, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cu_seqlens = boundaries(lengths, device)
    scores = torch.randint(-3, 4, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).float().to(device)
    same = {"cu_seqlens": cu_seqlens}
    roots = merge_roots(scores, stride, -1.0, k, **same)
    assert equal(roots, reference.merge_roots(scores, stride, -1.0, k, **same))
    begin = cu_seqlens[sequence_of(cu_seqlens, sum(lengths))]
    assert (roots >= begin).all()
    assert equal(topk_keep(scores, k, scores > -2, **same), reference.topk_keep(scores, k, scores > -2, **same))
    ours, theirs = (library.merge_mean(scores[:, None], roots, (), stride, **same) for library in (merge, reference))
    assert equal(ours.kept, theirs.kept)
    assert equal(ours.predecessor, theirs.predecessor)
    assert equal(ours.lengths, theirs.lengths)


# errors


X, S, R = torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, dtype=torch.int64)
CU = torch.tensor([0, 1, 4])
PACKED = {
    strided_cosine_similarity: (X, 1),
    linked_cosine_similarity: (X, R),
    merge_roots: (S, 1, 0.5),
    merge_mean: (X, R),
    topk_keep: (S, 1),
    segmented_topk_keep: (S, R, R),
    gather_rows: (R, X),
}


@pytest.mark.parametrize("op", PACKED, ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("error", "text", "cu_seqlens"),
    [
        (TypeError, "cu_seqlens must be a torch.Tensor, got list", [0, 4]),
        (TypeError, "cu_seqlens must have dtype torch.int32 or torch.int64, got torch.float32", CU.float()),
        (ValueError, r"cu_seqlens must have shape \[S\+1\], got \[1, 3\]", CU[None]),
        (ValueError, r"cu_seqlens must have shape \[S\+1\], got \[0\]", CU[:0]),
        (ValueError, "all tensors must be on one device", CU.to("meta")),
    ],
)
def test_errors_of_cu_seqlens(op, error, text, cu_seqlens):
    with pytest.raises(error, match=f"{op.__name__}: {text}"):
        op(*PACKED[op], cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("op", "arguments", "options", "error", "text"),
    [
        (strided_cosine_similarity, (X[None], 1), {}, ValueError, r"x must have shape \[T, D\], got \[1, 4, 3\]"),
        (linked_cosine_similarity, (X, R[:2]), {}, ValueError, r"predecessor must have shape \[T=4\], got \[2\]"),
        (merge_roots, (S[None], 1, 0.5), {}, ValueError, r"similarity must have shape \[T\], got \[1, 4\]"),
        (merge_roots, (S, 1, 0.5, R), {}, ValueError, r"max_merges must have shape \[S=2\], got \[4\]"),
        (merge_roots, (S, 1, 0.5), {"max_seqlen": -1}, ValueError, "max_seqlen must be at least 0, got -1"),
        (merge_roots, (S, 1, 0.5), {"max_seqlen": 1.0}, TypeError, "max_seqlen must be an int, got float"),
        (merge_mean, (X, R[:2]), {}, ValueError, r"roots must have shape \[T=4\], got \[2\]"),
        (merge_mean, (X, R, (X[:2],)), {}, ValueError, r"companions\[0\] must have shape \[T=4, ...\], got \[2, 3\]"),
        (merge_mean, (X, R), {"capacity": -1}, ValueError, "capacity must be at least 0, got -1"),
        (merge_mean, (X, R), {"capacity": 1.5}, TypeError, "capacity must be an int, got float"),
        (topk_keep, (S, R), {}, ValueError, r"k must have shape \[S=2\], got \[4\]"),
        (topk_keep, (S, 1, (S > 0)[None]), {}, ValueError, r"candidates must have shape \[T=4\], got \[1, 4\]"),
        (topk_keep, (S, 1), {"capacity": -1}, ValueError, "capacity must be at least 0, got -1"),
        (segmented_topk_keep, (S, R[:1], R), {}, ValueError, r"segments must have shape \[T=4\], got \[1\]"),
        (segmented_topk_keep, (S, R, R[None]), {}, ValueError, r"counts must have shape \[S\], got \[1, 4\]"),
        (segmented_topk_keep, (S, R, R), {"capacity": True}, TypeError, "capacity must be an int, got bool"),
        (gather_rows, (R[None], X), {}, ValueError, r"kept must have shape \[K\], got \[1, 4\]"),
        (gather_rows, (R, X, S[1:]), {}, ValueError, r"tensors\[1\] must have shape \[T=4, ...\], got \[3\]"),
        (gather_rows, (R, S[0]), {}, ValueError, r"tensors\[0\] must have shape \[T, ...\], got \[\]"),
    ],
)  # fmt: skip
def test_errors(op, arguments, options, error, text):
    with pytest.raises(error, match=f"{op.__name__}: {text}"):
        op(*arguments, cu_seqlens=CU, **options)


@pytest.mark.parametrize(("op", "arguments"), [(merge_roots, (S[None], 1, 0.5)), (topk_keep, (S[None], 1))])
def test_max_seqlen_goes_with_cu_seqlens(op, arguments):
    with pytest.raises(ValueError, match=f"{op.__name__}: max_seqlen goes with cu_seqlens, got 4 without"):
        op(*arguments, max_seqlen=4)
