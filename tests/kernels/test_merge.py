import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_libraries import ON_A_CPU, libraries
from testing_helpers import DTYPES, assert_no_worse_than_torch, far_rows, make_strided, make_video, shuffled_programs
from torch import Tensor

import fftriton_kernels
from fftriton_kernels import (
    NO_LINK,
    Merged,
    _cpu,
    _groups,
    _radix,
    linked_cosine_similarity,
    merge,
    merge_mean,
    merge_roots,
    reference,
)
from fftriton_kernels._gather import gather
from fftriton_kernels._groups import rank_groups
from fftriton_kernels._packed import strided_predecessor
from fftriton_kernels.merge import _mean_of_groups, _rows_of_tokens

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def links_of(predecessor: int | Tensor, B: int, N: int) -> list[list[int]]:
    if isinstance(predecessor, int):
        return [[max(t - predecessor, -1) for t in range(N)]] * B
    return predecessor.tolist()


def assert_rows_are_those_of_the_reference(roots: Tensor, predecessor: int | Tensor | None) -> None:
    """What merge_mean returns besides the means, and the members that the kernels add up."""
    links, stride = (predecessor, 0) if isinstance(predecessor, Tensor) else (None, predecessor or 0)
    x = roots.new_zeros(*roots.shape, 1, dtype=torch.float32)
    expected = reference.group_rows(roots, predecessor)
    ours = _mean_of_groups(x, roots, links, stride)[1:]
    theirs = (expected.kept, expected.lengths, expected.predecessor)
    for name, out, wanted in zip(("kept", "lengths", "links"), ours, theirs, strict=True):
        assert torch.equal(out, wanted), name
    assert torch.equal(_rows_of_tokens(roots, expected.kept), expected.row)
    assert torch.equal(rank_groups(roots, links, stride, None).members(roots).long(), expected.members)


def roots_by_hand(similarity: Tensor, predecessor: int | Tensor, threshold: float, bounds: list[int] | None) -> Tensor:
    """merge_roots, one token at a time."""
    B, N = similarity.shape
    threshold = torch.tensor(threshold, dtype=torch.float32).item()
    roots = torch.arange(N).repeat(B, 1)
    for b, links in enumerate(links_of(predecessor, B, N)):
        row = similarity[b].float().tolist()
        pairs = [t for t in range(N) if 0 <= links[t] < t and row[t] >= threshold and row[t] > NO_LINK]
        if bounds is not None:
            pairs = sorted(pairs, key=lambda t: (-row[t], t))[: max(bounds[b], 0)]
        for t in sorted(pairs):
            roots[b, t] = roots[b, links[t]]
    return roots.to(similarity.device)


def random_links(B: int, N: int, device: str) -> Tensor:
    """[B, N] int64: any token that is earlier, mostly a near one, or none."""
    near = torch.arange(N) - 1 - (torch.rand(B, N) ** 3 * N).long()
    return torch.where((near < 0) | (torch.rand(B, N) < 0.1), -1, near).to(device)


def random_roots(B: int, N: int, device: str, joins: float = 0.6, leaves: float = 0.1) -> Tensor:
    """[B, N] int64: groups of many sizes, fewer in each further sample; some tokens leave."""
    rate = torch.linspace(joins, 1.0, B)[:, None].expand(B, N)
    similarity = torch.where(torch.rand(B, N) < rate, 1.0, 0.0)
    roots = reference.merge_roots(similarity, random_links(B, N, "cpu"), 0.5)
    gone = torch.rand(B, N) < leaves
    return roots.masked_fill(gone.gather(1, roots), -1).to(device)  # a group leaves with its root


def means_by_hand(x: Tensor, roots: Tensor, kept: Tensor) -> Tensor:
    """[B, M, D] in x's dtype: PyTorch's mean over each group, zeros for padding."""
    rows = [
        x[b, roots[b] == root].mean(0) if root >= 0 else torch.zeros_like(x[b, 0])
        for b in range(kept.shape[0])
        for root in kept[b].tolist()
    ]
    return torch.stack(rows).view(*kept.shape, x.shape[2])


def kept_by_hand(roots: Tensor) -> list[list[int]]:
    kept = [[t for t, root in enumerate(row) if root == t] for row in roots.tolist()]
    rows = max(map(len, kept))
    return [[-1] * (rows - len(row)) + row for row in kept]


# merge_roots


SIMILAR = {  # many ties; what is no number; all equal; nothing above the threshold
    "ties": lambda B, N: (torch.randn(B, N) * 3).round() / 4,
    "odd": lambda B, N: torch.tensor([0.5, math.nan, math.inf, -math.inf, NO_LINK, 0.0, -0.0, 1e-40, 0.3])[
        torch.randint(0, 9, (B, N))
    ],
    "equal": lambda B, N: torch.ones(B, N),
    "low": lambda B, N: torch.full((B, N), -0.9),
    "continuous": lambda B, N: torch.rand(B, N) * 2 - 1,
}


@libraries
@pytest.mark.parametrize("values", SIMILAR)
@pytest.mark.parametrize("links", [1, 70, "int32", "int64"])
def test_roots_by_hand(library, values, links, device):
    torch.manual_seed(0)
    B, N = 2, 2500  # two blocks, the second of them ragged
    similarity = SIMILAR[values](B, N).to(device)
    predecessor = links if isinstance(links, int) else random_links(B, N, device).to(getattr(torch, links))
    for bounds in (None, [0, 0], [700, 700], [-3, 130]):
        bound = bounds
        if bounds is not None:
            bound = bounds[0] if bounds[0] == bounds[1] else torch.tensor(bounds, device=device)
        out = library.merge_roots(similarity, predecessor, -0.25, bound)
        assert torch.equal(out, roots_by_hand(similarity, predecessor, -0.25, bounds))


@libraries
@dtypes
def test_threshold_is_reached_by_what_equals_it(library, dtype, device):
    value = torch.tensor(0.6, dtype=dtype)
    similarity = torch.stack([value, torch.nextafter(value.float(), torch.tensor(-9.0)).to(dtype), value * 2])
    similarity = similarity.expand(1, -1).to(device)
    roots = library.merge_roots(similarity, torch.tensor([[-1, 0, 1]], device=device), value.item())
    joins = similarity[0, 1].float() >= value.float()  # true where the step below was rounded away
    assert roots.tolist() == [[0, 0 if joins else 1, 0 if joins else 1]]


@libraries
def test_only_an_earlier_token_is_a_predecessor(library, device):
    similarity = torch.ones(1, 6, device=device)
    predecessor = torch.tensor([[0, 2, 99, -7, 4, 3]], device=device)
    assert library.merge_roots(similarity, predecessor, 0.5).tolist() == [[0, 1, 2, 3, 4, 3]]
    assert library.merge_roots(similarity, predecessor, 0.5, 9).tolist() == [[0, 1, 2, 3, 4, 3]]


@libraries
def test_tokens_without_a_link_never_merge(library, device):
    similarity = torch.tensor([[NO_LINK, NO_LINK, math.nan, -1.9]], device=device)
    assert library.merge_roots(similarity, 1, -3.0).tolist() == [[0, 1, 2, 2]]


@libraries
def test_bound_below_and_above_every_int32(library, device):
    similarity = torch.ones(2, 5, device=device)
    bounds = torch.tensor([-(2**40), 2**40], device=device)
    assert library.merge_roots(similarity, 1, 0.5, bounds).tolist() == [[0, 1, 2, 3, 4], [0] * 5]
    assert library.merge_roots(similarity, 1, 0.5, 2**40).tolist() == [[0] * 5] * 2


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), B=st.integers(1, 3), N=st.integers(1, 60), bound=st.integers(0, 60))
def test_roots_keep_the_rules(data, B, N, bound):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = st.sampled_from([NO_LINK, -0.0, 0.0, 0.5, 0.5000001, 1.0, math.nan])
    row = st.lists(st.tuples(grid, st.floats(0, 1)), min_size=N, max_size=N)
    cells = data.draw(st.lists(row, min_size=B, max_size=B))
    similarity = torch.tensor([[value for value, _ in row] for row in cells], device=device)
    links = torch.tensor([[int(back * t) - 1 for t, (_, back) in enumerate(row)] for row in cells], device=device)
    roots = merge_roots(similarity, links, 0.5, bound)
    position = torch.arange(N, device=device)
    joined = roots != position
    fits = (links >= 0) & (similarity >= 0.5)
    assert (roots <= position).all()
    assert torch.equal(roots.gather(1, roots), roots)  # a root is its own root
    assert torch.equal(joined.sum(1), fits.sum(1).clamp_max(bound))
    assert not (joined & ~fits).any()
    assert torch.equal(roots[joined], roots.gather(1, links.clamp_min(0))[joined])  # in its predecessor's group
    worst_taken = similarity.masked_fill(~joined, 9).amin(1)
    assert (similarity.masked_fill(~fits | joined, -9).amax(1) <= worst_taken).all()


@pytest.mark.gpu
def test_a_long_video(device):
    torch.manual_seed(0)
    N = 70_000  # more blocks than a program adds up at a time
    similarity = torch.rand(1, N, device=device).round(decimals=2)
    roots = merge_roots(similarity, 300, 0.2, 50_000)
    assert torch.equal(roots, reference.merge_roots(similarity, 300, 0.2, 50_000))
    assert_rows_are_those_of_the_reference(roots, 300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("seed", range(3))
def test_programs_in_any_order(seed, monkeypatch):
    monkeypatch.setattr(_radix, "BLOCK", 512)  # several blocks a program, and several programs
    monkeypatch.setattr(merge, "BLOCK", 256)
    monkeypatch.setattr(_groups, "BLOCK", 256)
    torch.manual_seed(0)
    B, N = 2, 2100
    similarity, links = torch.rand(B, N).round(decimals=2), random_links(B, N, "cpu")
    with shuffled_programs(seed):
        roots = merge_roots(similarity, links, 0.1, 1800)
        assert torch.equal(roots, reference.merge_roots(similarity, links, 0.1, 1800))
        assert torch.equal(merge_roots(similarity, links, 0.3), reference.merge_roots(similarity, links, 0.3))
        assert_rows_are_those_of_the_reference(roots, links)


@pytest.mark.large
def test_similarity_past_two_to_the_31_elements(device):
    similarity = torch.tensor([[0.0, 1.0, 1.0, 0.1, 0.8]], dtype=torch.float16, device=device)
    links = torch.tensor([[-1, 0, 1, 2, 3]], dtype=torch.int32, device=device)
    far, links = far_rows(similarity, 600_000_000), far_rows(links, 600_000_000)  # 40 GB on a GPU
    for bound in (None, 2):
        assert torch.equal(merge_roots(far, links, 0.5, bound), merge_roots(similarity, 1, 0.5, bound))


# merge_mean


@libraries
@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 2, 1), (2, 23, 65), (3, 40, 1025), (1, 6, 2048)], ids="B{0[0]}-N{0[1]}-D{0[2]}".format
)
def test_mean_matches_fp64(library, shape, dtype, device):
    torch.manual_seed(1)
    B, N, D = shape
    x, roots = make_video(B, 1, N, D, dtype, device), random_roots(B, N, device)
    merged = library.merge_mean(x, roots)
    assert merged.x.dtype == dtype
    assert merged.kept.tolist() == kept_by_hand(roots)
    assert merged.lengths.tolist() == (roots == torch.arange(N, device=device)).sum(1).tolist()
    assert merged.companions == ()
    assert merged.predecessor is None
    truth = means_by_hand(x.double(), roots, merged.kept)
    assert_no_worse_than_torch(merged.x, means_by_hand(x, roots, merged.kept), truth)


@libraries
@dtypes
def test_a_group_of_one_keeps_every_bit(library, dtype, device):
    torch.manual_seed(0)
    width = torch.finfo(dtype).bits
    bits = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (1, 6, 300)).to(BITS[dtype])
    x = bits.view(dtype).to(device)  # NaNs of every payload, signed zeros, subnormals
    x[0, 0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    roots = torch.tensor([[0, 1, 2, 3, 3, -1]], device=device)
    out = library.merge_mean(x, roots).x
    assert torch.equal(out[:, :3].view(BITS[dtype]), x[:, :3].view(BITS[dtype]))


@libraries
@dtypes
def test_members_are_added_in_ascending_order_and_rounded_once(library, dtype, device):
    torch.manual_seed(0)
    N = 11
    x = (torch.randn(1, N, 40) * 10.0 ** torch.randint(-4, 5, (1, N, 40))).to(dtype).to(device)
    total = torch.zeros(40, device=device)
    for t in range(N):
        total = total + x[0, t].float()
    out = library.merge_mean(x, torch.zeros(1, N, dtype=torch.int64, device=device)).x
    size = torch.tensor(N, device=device)  # by a Python number CUDA divides as a product with its reciprocal
    assert torch.equal(out[0, 0], (total / size).to(dtype))


@pytest.mark.parametrize("leaves", [0.0, 0.1, 0.9])
def test_rows_and_their_members(leaves, device):
    torch.manual_seed(0)
    roots, links = random_roots(3, 150, device, leaves=leaves), random_links(3, 150, device)
    assert_rows_are_those_of_the_reference(roots, links)


def test_groups_longer_than_a_block(device):
    torch.manual_seed(0)
    N = 1100
    x = torch.randn(1, N, 3, device=device)
    roots = torch.where(torch.rand(1, N) < 0.7, 2, torch.arange(N) % 5).to(device)
    roots[0, :5] = torch.arange(5)
    for given_roots in (roots, torch.zeros_like(roots)):
        assert_rows_are_those_of_the_reference(given_roots, None)
        assert torch.equal(merge_mean(x, given_roots).x.cpu(), reference.merge_mean(x.cpu(), given_roots.cpu()).x)


@dtypes
@pytest.mark.parametrize("arrange", [Tensor.contiguous, make_strided], ids=["contiguous", "strided"])
def test_a_cpu_adds_groups_up_in_blocks(arrange, dtype, monkeypatch):
    x, roots = make_video(2, 1, 200, 65, dtype, "cpu"), random_roots(2, 200, "cpu")
    whole, x = ON_A_CPU.merge_mean(x, roots).x, arrange(x)
    monkeypatch.setattr(_cpu, "_BLOCK", 4 * 65)  # 16 groups at a time
    assert torch.equal(ON_A_CPU.merge_mean(x, roots).x, whole)


@dtypes
def test_a_long_group_has_a_mean_of_full_precision(dtype):
    x = 1 + torch.rand(1, 100000, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = ON_A_CPU.merge_mean(x, torch.zeros(1, 100000, dtype=torch.int64)).x
    truth = x.double().mean(1, keepdim=True)
    assert ((out - truth) / truth).abs().max() <= torch.finfo(dtype).eps / 2 + 2e-5


@libraries
@dtypes
def test_rows_that_are_not_finite_spoil_their_own_group_only(library, dtype, device):
    x = torch.ones(1, 7, 4, device=device, dtype=dtype)
    x[0, 1, 2], x[0, 3, 0] = math.nan, math.inf
    out = library.merge_mean(x, torch.tensor([[0, 0, 2, 2, 2, 5, 5]], device=device)).x
    expected = torch.ones(1, 3, 4, device=device, dtype=dtype)
    expected[0, 0, 2], expected[0, 1, 0] = math.nan, math.inf
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@libraries
@dtypes
def test_an_infinite_row_in_a_large_group(library, dtype, device):
    """Its weight is too small for one number of half precision, and what is left of it may be none."""
    x = torch.ones(1, 300, 4, device=device, dtype=dtype)
    x[0, 7, 1] = math.inf
    out = library.merge_mean(x, torch.zeros(1, 300, dtype=torch.int64, device=device)).x
    assert out.tolist() == [[[1.0, math.inf, 1.0, 1.0]]]


@libraries
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_who_leaves(library, index, device):
    # -1 leaves, so does a token whose root is no root: 3 is led by 2, which 1 leads; 8 and -5 are no tokens
    roots = torch.tensor([[-1, 1, 1, 2, 4, 4, 8, -5], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=index, device=device)
    x = torch.arange(16.0, device=device).view(2, 8, 1)
    merged = library.merge_mean(x, roots, predecessor=1)
    assert merged.kept.tolist() == [[1, 4], [-1, 0]]
    assert merged.lengths.tolist() == [2, 1]
    assert merged.x[..., 0].tolist() == [[1.5, 4.5], [0.0, 11.5]]
    assert merged.predecessor.tolist() == [[-1, -1], [-1, -1]]


@libraries
def test_companions_of_any_kind(library, device):
    torch.manual_seed(0)
    B, N = 2, 37
    roots = random_roots(B, N, device)
    tables = torch.randn(2, B, N, 6, device=device)
    companions = {
        "positions": torch.arange(B * N, device=device).view(B, N),
        "patches": torch.arange(N, device=device).flip(0).expand(B, N),
        "mask": torch.rand(B, N, device=device) < 0.5,
        "bytes": torch.randint(0, 255, (B, N, 3), device=device, dtype=torch.uint8),
        "sections": torch.randn(3, B, N, 5, device=device).permute(1, 2, 0, 3),  # rotary tables in three sections
        "cos": tables[0].half(),
        "sin": tables[1].half(),
        "wide": torch.randn(B, N, 1540, device=device, dtype=torch.float64),
        "one run": make_strided(torch.randn(B, N, 7, device=device)),
        "two runs": make_strided(torch.randn(B, N, 3, 4, device=device)),
        "three runs": make_strided(torch.randn(B, N, 2, 3, 4, device=device)),
        "heads": torch.randn(B, 4, N, 5, device=device).transpose(1, 2),
        "complex": torch.randn(B, N, 2, dtype=torch.complex128, device=device),
        "nothing": torch.randn(B, N, 0, device=device),
    }
    merged = library.merge_mean(torch.randn(B, N, 8, device=device), roots, tuple(companions.values()))
    for (name, companion), out in zip(companions.items(), merged.companions, strict=True):
        assert out.dtype == companion.dtype
        assert out.shape == (*merged.kept.shape, *companion.shape[2:])
        assert out.is_contiguous() or library is reference
        for b in range(B):
            taken = merged.kept[b][merged.kept[b] >= 0]
            assert torch.equal(out[b, -len(taken) :], companion[b, taken]), name
            assert not out[b, : -len(taken)].any(), name


@libraries
@pytest.mark.parametrize("links", [1, 5, "int32", "strided"])
def test_links_among_the_rows(library, links, device):
    torch.manual_seed(0)
    B, N = 3, 90
    roots = random_roots(B, N, device)
    predecessor = links if isinstance(links, int) else random_links(B, N, device)
    by_token = links_of(predecessor, B, N)
    if links == "int32":
        predecessor = predecessor.int()
    elif links == "strided":
        predecessor = make_strided(predecessor)
    merged = library.merge_mean(torch.zeros(B, N, 1, device=device), roots, predecessor=predecessor)
    expected = []
    for b, kept in enumerate(merged.kept.tolist()):
        row = {root: m for m, root in enumerate(kept) if root >= 0}
        earlier = [by_token[b][root] if root >= 0 else -1 for root in kept]
        expected.append([row.get(int(roots[b, t]), -1) if t >= 0 else -1 for t in earlier])
    assert merged.predecessor.tolist() == expected


def test_two_merges_in_a_row(device):
    # the second, on the compacted rows and their links, finds what one over the survivors of the first would
    x, P = make_video(1, 6, 5, 16, torch.float32, device), 5
    links = strided_predecessor(1, 30, P, x.device)
    roots = merge_roots(linked_cosine_similarity(x, links), links, 0.9)
    first = merge_mean(x, roots, (torch.arange(30, device=device)[None] % P,), links)
    patch = first.companions[0][0].tolist()
    nearest = [max((s for s in range(m) if patch[s] == patch[m]), default=-1) for m in range(len(patch))]
    assert first.predecessor.tolist() == [nearest]
    again = merge_roots(linked_cosine_similarity(first.x, first.predecessor), first.predecessor, 0.5)
    assert merge_mean(first.x, again, predecessor=first.predecessor).kept.shape[1] < len(patch)


@libraries
def test_strides(library, device):
    torch.manual_seed(0)
    x, roots, links = (
        make_video(2, 3, 7, 33, torch.bfloat16, device),
        random_roots(2, 21, device),
        random_links(2, 21, device),
    )
    plain = library.merge_mean(x, roots, (links,), links)
    out = library.merge_mean(make_strided(x), make_strided(roots), (make_strided(links),), make_strided(links))
    assert torch.equal(out.x, plain.x)
    assert torch.equal(out.kept, plain.kept)
    assert torch.equal(out.predecessor, plain.predecessor)
    similarity = torch.rand(2, 21, device=device)
    roots = library.merge_roots(make_strided(similarity), make_strided(links), 0.5, 4)
    assert torch.equal(roots, library.merge_roots(similarity, links, 0.5, 4))


@pytest.mark.large
def test_rows_past_two_to_the_31_elements(device):
    x = make_video(1, 4, 1, 16, torch.float16, device)
    roots = torch.tensor([[0, 0, 2, 0]], device=device)
    far, plain = merge_mean(far_rows(x), roots, (far_rows(x),)), merge_mean(x, roots, (x,))
    assert torch.equal(far.x, plain.x)
    assert torch.equal(far.companions[0], plain.companions[0])
    assert torch.equal(gather(far.kept.int(), [far_rows(x)])[0], plain.companions[0])


@libraries
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty(library, shape, device):
    B, N, D = shape
    x = torch.zeros(shape, device=device)
    roots = library.merge_roots(torch.ones(B, N, device=device), 1, 0.5, 10)
    assert roots.shape == (B, N)
    merged = library.merge_mean(x, roots, (x, roots), predecessor=1)
    M = min(N, 1) if B else 0
    assert merged.x.shape == (B, M, D)
    assert merged.kept.shape == merged.predecessor.shape == (B, M)
    assert merged.companions[1].shape == (B, M)
    assert merged.lengths.tolist() == [M] * B


@libraries
def test_all_leave(library, device):
    x = torch.ones(2, 3, 4, device=device)
    merged = library.merge_mean(x, torch.full((2, 3), -1, device=device), (x,), predecessor=1)
    assert merged.x.shape == merged.companions[0].shape == (2, 0, 4)
    assert merged.predecessor.shape == (2, 0)
    assert merged.lengths.tolist() == [0, 0]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(B=st.integers(1, 3), N=st.integers(1, 40), joins=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_merging_keeps_the_sum(B, N, joins, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    roots = random_roots(B, N, device, joins, leaves=0.0)
    x = torch.randint(-8, 9, (B, N, 3), device=device).float()
    merged = merge_mean(x, roots, (torch.arange(N, device=device).expand(B, N),))
    sizes = (roots.unsqueeze(1) == merged.kept.unsqueeze(2)).sum(2)
    torch.testing.assert_close((merged.x * sizes[..., None]).sum(1), x.sum(1), rtol=1e-5, atol=1e-4)
    assert torch.equal(sizes.sum(1), torch.full((B,), N, device=device))
    assert torch.equal(merged.companions[0], merged.kept.clamp_min(0))


# gradients


@pytest.mark.parametrize("capacity", [None, 5, 23])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("D", [7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype, D, kind, capacity, device):
    torch.manual_seed(0)
    B, N = 2, 19
    roots = random_roots(B, N, device).to(kind)
    roots[0, 3], roots[1, 4] = N, 10**6  # beyond the end: in no group
    inputs = [torch.randn(B, N, D), torch.randn(B, N, 3), torch.randn(2, B, N, 2).permute(1, 2, 0, 3)]
    weights = [torch.randn(B, 23, *part.shape[2:]) for part in inputs]

    def gradients(merge, dtype):
        leaves = [part.to(device, dtype).requires_grad_() for part in inputs]
        merged = merge(leaves[0], roots, (leaves[1], roots, leaves[2]), capacity=capacity)
        outs = (merged.x, merged.companions[0], merged.companions[2])
        M = merged.x.shape[1]
        loss = sum((out * weight[:, :M].to(device, dtype)).sum() for out, weight in zip(outs, weights, strict=True))
        return torch.autograd.grad(loss, leaves)

    truth = gradients(reference.merge_mean, torch.float64)
    eager = gradients(reference.merge_mean, dtype)
    for ours, theirs, exact in zip(gradients(merge_mean, dtype), eager, truth, strict=True):
        assert_no_worse_than_torch(ours, theirs, exact)


def test_gradients_where_nothing_is_left(device):
    x = torch.ones(2, 3, 4, device=device, requires_grad=True)
    merge_mean(x, torch.full((2, 3), -1, device=device)).x.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_gradients_do_not_need_what_the_caller_has_changed(device):
    x = torch.ones(1, 4, 2, device=device, requires_grad=True)
    merged = merge_mean(x, torch.tensor([[0, 0, 2, -1]], device=device), capacity=3)
    merged.kept.clamp_(min=0)
    merged.x.sum().backward()
    assert x.grad[0, :, 0].tolist() == [0.5, 0.5, 1, 0]


def test_second_gradients(device):
    x = torch.randn(1, 6, 2, device=device, requires_grad=True)
    roots = torch.tensor([[0, 0, 2, 0, 4, -1]], device=device)
    out = merge_mean(x, roots).x
    (first,) = torch.autograd.grad((out**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    sizes, root_row = torch.tensor([3.0, 3, 1, 3, 1, 0], device=device), torch.tensor([0, 0, 1, 0, 2, 0], device=device)
    expected = torch.where(sizes > 0, 6 / sizes.clamp_min(1), 0)[:, None] * out[0, root_row]
    torch.testing.assert_close(second[0], expected)


# as PyTorch operators


@pytest.mark.parametrize("bound", [None, 3, "tensor"])
def test_opcheck_roots(bound, device):
    similarity, links = torch.rand(2, 9, device=device), random_links(2, 9, device)
    bounds = torch.tensor([2, 5], device=device) if bound == "tensor" else None
    bound = bound if isinstance(bound, int) else None
    torch.library.opcheck(torch.ops.fftriton_kernels.merge_roots.default, (similarity, links, 0, 0.4, bounds, bound))


def test_opcheck_mean(device):
    roots = torch.tensor([[0, 0, 2, 2, 4], [0, 1, 2, 3, 4]], device=device)
    x = torch.randn(2, 5, 4, device=device)
    for stride in (0, 1):
        torch.library.opcheck(torch.ops.fftriton_kernels.merge_mean.default, (x, roots, None, stride))
    kept = reference.group_rows(roots).kept
    torch.library.opcheck(torch.ops.fftriton_kernels.gather_rows.default, (kept, [x, roots]))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_as_one_graph(device):
    def step(x, position):
        similarity = fftriton_kernels.strided_cosine_similarity(x, 3)
        merged = merge_mean(x, merge_roots(similarity, 3, 0.6), (position,), predecessor=3)
        return merged.x * 2, merged.companions[0], merged.predecessor

    x, position = make_video(1, 4, 3, 16, torch.float32, device), torch.arange(12, device=device)[None]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(x, position), step(x, position), strict=True):
        assert torch.equal(ours, theirs)


# what is refused

S, X, R = torch.zeros(1, 4), torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"merge_roots: similarity must be a torch.Tensor, got list", ([], 1, 0.5)),
        (TypeError, r"similarity must have dtype torch.float16 or .*, got torch.float64", (S.double(), 1, 0.5)),
        (ValueError, r"similarity must have shape \[B, N\], got \[1, 4, 2\]", (X, 1, 0.5)),
        (ValueError, r"predecessor must be at least 1, got 0", (S, 0, 0.5)),
        (TypeError, r"predecessor must be an int, got float", (S, 1.0, 0.5)),
        (TypeError, r"predecessor must have dtype torch.int32 or torch.int64, got torch.float32", (S, S, 0.5)),
        (ValueError, r"predecessor must have shape \[B=1, N=4\], got \[1, 3\]", (S, R[:, :3], 0.5)),
        (ValueError, r"threshold must be finite in fp32, got nan", (S, 1, math.nan)),
        (ValueError, r"threshold must be finite in fp32, got inf", (S, 1, math.inf)),
        (TypeError, r"threshold must be a float, got str", (S, 1, "0.5")),
        (TypeError, r"threshold must be a float, got bool", (S, 1, True)),
        (ValueError, r"max_merges must be at least 0, got -1", (S, 1, 0.5, -1)),
        (TypeError, r"max_merges must be an int, got float", (S, 1, 0.5, 1.5)),
        (TypeError, r"max_merges must have dtype .*, got torch.float32", (S, 1, 0.5, S[0, :1])),
        (ValueError, r"max_merges must have shape \[B=1\], got \[4\]", (S, 1, 0.5, R[0])),
        (ValueError, r"merge_roots: all tensors must be on one device, got", (S, 1, 0.5, R[:, 0].to("meta"))),
    ],
)
def test_roots_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        merge_roots(*arguments)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"merge_mean: x must have dtype torch.float16 or .*, got torch.int64", (R, R)),
        (ValueError, r"x must have shape \[B, N, D\], got \[1, 4\]", (S, R)),
        (TypeError, r"roots must have dtype torch.int32 or torch.int64, got torch.float32", (X, S)),
        (ValueError, r"roots must have shape \[B=1, N=4\], got \[1, 2\]", (X, R[:, :2])),
        (TypeError, "companions must be a sequence of tensors, got NoneType", (X, R, None)),
        (TypeError, r"companions\[1\] must be a torch.Tensor, got int", (X, R, (S, 3))),
        (ValueError, r"companions\[0\] must have shape \[B=1, N=4, \.\.\.\], got \[4, 1\]", (X, R, (R.T,))),
        (ValueError, r"companions\[0\] must have shape \[B=1, N=4, \.\.\.\], got \[4\]", (X, R, (R[0],))),
        (ValueError, r"merge_mean: all tensors must be on one device, got", (X, R, (S.to("meta"),))),
        (ValueError, r"merge_mean: all tensors must be on one device, got", (X, R.to("meta"))),
        (ValueError, r"predecessor must be at least 1, got -1", (X, R, (), -1)),
        (ValueError, r"predecessor must have shape \[B=1, N=4\], got \[4\]", (X, R, (), R[0])),
    ],
)
def test_mean_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        merge_mean(*arguments)


def test_merged_is_what_comes_back():
    assert Merged._fields == ("x", "companions", "kept", "lengths", "predecessor")
    assert isinstance(merge_mean(X, R), Merged)
