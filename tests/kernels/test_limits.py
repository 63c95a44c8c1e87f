"""Numbers and indices far outside of what a tensor holds: the right result, or an error that says which and why."""

import sys

import pytest
import torch
from op_libraries import LIBRARIES, ON_A_CPU
from testing_helpers import make_video

import fftriton_kernels
from fftriton_kernels import (
    NO_LINK,
    attention_column_sum,
    connected_components,
    gather_rows,
    linked_cosine_similarity,
    merge_mean,
    merge_roots,
    reference,
    segmented_topk_keep,
    strided_cosine_similarity,
    topk_keep,
)

# at 306783379 the fourth step of a kernel wrapped around in 32 bits
LARGE = (20, 2**15, 306_783_379, 2**31 - 1, 2**31, 2**32 + 1, 2**61, sys.maxsize, 2**63, 10**30)
ops = pytest.mark.parametrize("library", [fftriton_kernels, ON_A_CPU], ids=["kernel", "cpu"])
large = pytest.mark.parametrize("number", LARGE)


@ops
@large
def test_a_stride_beyond_all_tokens_reaches_none(library, number, device):
    x = make_video(1, 5, 4, 16, torch.float32, device)
    similarity = torch.ones(1, 20, device=device)
    positions = torch.arange(20, device=device)
    packed = {"cu_seqlens": torch.tensor([0, 3, 20], device=device)}
    assert (library.strided_cosine_similarity(x, number) == NO_LINK).all()
    assert (library.strided_cosine_similarity(x[0], number, **packed) == NO_LINK).all()
    assert torch.equal(library.merge_roots(similarity, number, 0.5)[0], positions)
    assert torch.equal(library.merge_roots(similarity[0], number, 0.5, **packed), positions)
    assert (library.merge_mean(x, positions[None], (), number).predecessor == -1).all()
    assert (library.merge_mean(x[0], positions, (), number, **packed).predecessor == -1).all()


@ops
@pytest.mark.parametrize("stride", [1, 2, 3, 19])
def test_a_stride_within_reach(library, stride, device):
    x = make_video(2, 5, 4, 16, torch.float32, device)
    out, expected = (op(x, stride) for op in (library.strided_cosine_similarity, reference.strided_cosine_similarity))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@ops
@large
def test_more_than_there_are_is_all(library, number, device):
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0)).to(device)
    packed = {"cu_seqlens": torch.tensor([0, 3, 20], device=device)}
    everything, merged = torch.arange(20, device=device), torch.tensor([0] * 3 + [3] * 17, device=device)
    assert library.merge_roots(scores[None], 1, -1.0, number).tolist() == [[0] * 20]
    for longest in (None, 20, number):
        assert torch.equal(library.merge_roots(scores, 1, -1.0, number, **packed, max_seqlen=longest), merged)
        assert torch.equal(library.topk_keep(scores, number, **packed, max_seqlen=longest), everything)
    if number < 2**63:
        counts = torch.tensor([number], device=device)
        assert torch.equal(library.topk_keep(scores[None], counts), everything[None])
        assert library.merge_roots(scores[None], 1, -1.0, counts).tolist() == [[0] * 20]
        segments = torch.zeros_like(everything)
        assert torch.equal(library.segmented_topk_keep(scores[None], segments, counts), everything[None])
    q, k = torch.rand(20, 2, 8, device=device), torch.rand(20, 1, 8, device=device)
    bounds = {"cu_seqlens_q": packed["cu_seqlens"], "cu_seqlens_k": packed["cu_seqlens"]}
    out = library.attention_column_sum(q, k, **bounds, num_queries=number, max_seqlen_q=number, max_seqlen_k=number)
    torch.testing.assert_close(out, library.attention_column_sum(q, k, **bounds), rtol=3e-6, atol=1e-6)


X, S, L = torch.zeros(2, 9, 3), torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.int64)
Q, CU = torch.zeros(2, 4, 9, 8), torch.tensor([0, 4, 9])
PACKED = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
INTEGERS = {  # each integer parameter: its op, a call with it, the least and the most that it may be
    "stride": (strided_cosine_similarity, lambda n: strided_cosine_similarity(X, n), 1, None),
    "predecessor of roots": (merge_roots, lambda n: merge_roots(S, n, 0.5), 1, None),
    "max_merges": (merge_roots, lambda n: merge_roots(S, 1, 0.5, n), 0, None),
    "max_seqlen of roots": (merge_roots, lambda n: merge_roots(S[0], 1, 0.5, 1, cu_seqlens=CU, max_seqlen=n), 0, None),
    "predecessor of means": (merge_mean, lambda n: merge_mean(X, L, (), n), 1, None),
    "capacity of means": (merge_mean, lambda n: merge_mean(X, L, capacity=n), 0, 2**31 - 1),
    "num_nodes": (connected_components, lambda n: connected_components(L[:, :2], n), 0, 2**31 - 1),
    "k": (topk_keep, lambda n: topk_keep(S, n), 0, 9),
    "k packed": (topk_keep, lambda n: topk_keep(S[0], n, cu_seqlens=CU), 0, None),
    "max_seqlen of topk": (topk_keep, lambda n: topk_keep(S[0], 1, cu_seqlens=CU, max_seqlen=n), 0, None),
    "capacity of topk": (topk_keep, lambda n: topk_keep(S, 1, capacity=n), 0, 2**31 - 1),
    "capacity of segments": (
        segmented_topk_keep, lambda n: segmented_topk_keep(S, L, L[:, :1], capacity=n), 0, 2**31 - 1,
    ),
    "num_queries": (attention_column_sum, lambda n: attention_column_sum(Q, Q, num_queries=n), 1, 9),
    "num_queries packed": (
        attention_column_sum, lambda n: attention_column_sum(Q[0], Q[0], **PACKED_HEADS, num_queries=n), 1, None,
    ),
    "columns": (attention_column_sum, lambda n: attention_column_sum(Q, Q, columns=(0, n)), 0, 9),
    "max_seqlen_q": (
        attention_column_sum, lambda n: attention_column_sum(Q[0], Q[0], **PACKED_HEADS, max_seqlen_q=n), 0, None,
    ),
    "max_seqlen_k": (
        attention_column_sum, lambda n: attention_column_sum(Q[0], Q[0], **PACKED_HEADS, max_seqlen_k=n), 0, None,
    ),
}  # fmt: skip
PACKED_HEADS = {"cu_seqlens_q": torch.tensor([0, 1, 4]), "cu_seqlens_k": torch.tensor([0, 1, 4])}


@pytest.mark.parametrize("interpret", [True, False], ids=["kernel", "cpu"])
@pytest.mark.parametrize("parameter", INTEGERS)
def test_every_integer_parameter(parameter, interpret, monkeypatch):
    """What an int may be works; anything else is refused by name, with the rule and the value."""
    monkeypatch.setattr("fftriton_kernels._dispatch.INTERPRET", interpret)
    op, call, least, most = INTEGERS[parameter]
    name = parameter.split()[0]
    for number in (-(10**30), -(2**31), -1, 0, 1, 20, 306_783_379, 2**31, 2**63, 10**30):
        if number >= least and (most is None or number <= most):
            if number <= 20 or most != 2**31 - 1:  # else so many rows would be allocated
                call(number)
        else:
            with pytest.raises(ValueError) as error:
                call(number)
            assert str(error.value).startswith(f"{op.__name__}: {name} ")
            assert str(number) in str(error.value)
    for wrong in (1.0, True, "1"):
        with pytest.raises(TypeError, match=rf"^{op.__name__}: {name} must be an? "):
            call(wrong)


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), 2**62, -(2**62), 2**40 + 1])
def test_indices_that_are_no_token_are_none(library, value, device):
    """Where the semantics say so: no partner, no group, no edge."""
    similarity, x = torch.ones(1, 4, device=device), torch.arange(4.0, device=device).view(1, 4, 1)
    odd = torch.tensor([[-1, value, value, 0]], device=device)
    assert library.merge_roots(similarity, odd, 0.5).tolist() == [[0, 1, 2, 0]]
    assert library.merge_roots(similarity, odd, 0.5, 3).tolist() == [[0, 1, 2, 0]]
    merged = library.merge_mean(x, torch.tensor([[0, value, 2, 0]], device=device), (), odd)
    assert merged.kept.tolist() == [[0, 2]]
    assert merged.x.tolist() == [[[1.5], [2.0]]]
    assert merged.predecessor.tolist() == [[-1, -1]]
    edges = torch.tensor([[value, 0], [1, 2], [3, value]], device=device)
    assert library.connected_components(edges, 4).tolist() == [0, 1, 1, 3]


BEYOND = (4, 5, 2**31 - 1, 2**32, 2**32 + 1, 2**40, 2**62)  # of 4 tokens or segments


def index_calls(library, value, device):
    """Each op that takes indices which must lie inside: a call with `value` among them, and its result for none."""
    x, scores = torch.arange(1.0, 9, device=device).view(1, 4, 2), torch.rand(1, 4, device=device)
    index = torch.tensor([[0, value, -1, 1]], device=device)
    counts = torch.full((4,), 9, device=device)
    return {
        "linked_cosine_similarity: predecessor": (
            lambda: library.linked_cosine_similarity(x, index)[0, 1].item(), NO_LINK,
        ),
        "gather_rows: kept": (lambda: library.gather_rows(index, x)[0][0, 1].tolist(), [0.0, 0.0]),
        "segmented_topk_keep: segments": (
            lambda: library.segmented_topk_keep(scores, index, counts)[0].tolist(), [0, 2, 3],
        ),
    }  # fmt: skip


@ops
@pytest.mark.parametrize("value", BEYOND)
@pytest.mark.parametrize("name", index_calls(None, 0, "cpu"))
def test_an_index_beyond_the_end_is_refused_on_a_cpu(name, value, library):
    call, _ = index_calls(library, value, "cpu")[name]
    with pytest.raises(ValueError, match=rf"^{name} must be below [NS]=4, got {value}$"):
        call()


@pytest.mark.parametrize("value", BEYOND)
@pytest.mark.parametrize("name", index_calls(None, 0, "cpu"))
def test_kernels_read_nothing_beyond_the_end(name, value, device, monkeypatch):
    """On a GPU nobody looks at the values beforehand."""
    for module in ("cosine", "_gather", "select"):
        monkeypatch.setattr(f"fftriton_kernels.{module}.check_below", lambda *_: None)
    call, none = index_calls(fftriton_kernels, value, device)[name]
    assert call() == none
    call, none = index_calls(reference, value, device)[name]
    assert call() == none


def test_gradients_of_an_index_beyond_the_end(device, monkeypatch):
    monkeypatch.setattr("fftriton_kernels._gather.check_below", lambda *_: None)
    x = torch.ones(2, 4, 2, device=device, requires_grad=True)
    gather_rows(torch.tensor([[0, 4, 9], [3, 2**40, -1]], device=device), x)[0].sum().backward()
    assert x.grad[..., 0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("bounds", [[0, 5, 3, 9], [-1, 9], [0, 10], [0, 2**40, 9], [9, 0]])
def test_bounds_that_do_not_ascend_are_refused_on_a_cpu(bounds):
    x, index, cu_seqlens = torch.zeros(9, 3), torch.zeros(9, dtype=torch.int64), torch.tensor(bounds)
    q, k = torch.zeros(9, 2, 8), torch.zeros(9, 1, 8)
    calls = {
        strided_cosine_similarity: (x, 1), linked_cosine_similarity: (x, index), merge_roots: (x[:, 0], 1, 0.5),
        merge_mean: (x, index), topk_keep: (x[:, 0], 1), segmented_topk_keep: (x[:, 0], index, index),
    }  # fmt: skip
    for op, arguments in calls.items():
        with pytest.raises(ValueError, match=rf"^{op.__name__}: cu_seqlens must ascend from 0 to T=9, got \[.*9?\]"):
            op(*arguments, cu_seqlens=cu_seqlens)
    good = torch.zeros(len(bounds), dtype=torch.int64)
    for name, pair in {"cu_seqlens_q": (cu_seqlens, good), "cu_seqlens_k": (good, cu_seqlens)}.items():
        with pytest.raises(ValueError, match=rf"^attention_column_sum: {name} must ascend from 0 to T[qk]=9"):
            attention_column_sum(q, k, cu_seqlens_q=pair[0], cu_seqlens_k=pair[1])


def test_a_merge_needs_a_sequence_to_the_end_on_a_cpu():
    """Its rows are found from the last one backwards; what precedes the first sequence may be padding."""
    x, roots = torch.zeros(6, 3), torch.arange(6)
    assert merge_mean(x, roots, cu_seqlens=torch.tensor([2, 6])).cu_seqlens.tolist() == [2, 6]
    with pytest.raises(ValueError, match=r"^merge_mean: cu_seqlens must ascend from 0 to T=6, got \[0, 4\]$"):
        merge_mean(x, roots, cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("bounds", [[0, 5, 3, 9], [-7, 9], [0, 1000], [9, 0], [2**30, 2**31 - 1]])
def test_kernels_read_nothing_beyond_bounds(bounds, device, monkeypatch):
    """On a GPU nobody looks at the values beforehand; the results mean nothing, but memory stays whole."""
    monkeypatch.setattr("fftriton_kernels._packed.check_bounds", lambda *_: None)
    monkeypatch.setattr("fftriton_kernels.attention.check_bounds", lambda *_: None)
    cu_seqlens = torch.tensor(bounds, device=device)
    q, k, scores = (torch.rand(9, *shape, device=device) for shape in ((2, 8), (1, 8), ()))
    for options in ({}, {"num_queries": 1}, {"lse": torch.zeros(2, 9, device=device)}):
        out = attention_column_sum(q, k, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **options)
        assert out.shape == (9,)
    roots = merge_roots(scores, 2, 0.5, 3, cu_seqlens=cu_seqlens)
    assert (roots >= 0).all()
    assert merge_mean(q[:, 0], roots, (), 2, cu_seqlens=cu_seqlens).lengths.shape == (len(bounds) - 1,)
    assert topk_keep(scores, 2, cu_seqlens=cu_seqlens, capacity=9)[0].shape == (9,)
    assert strided_cosine_similarity(q[:, 0], 2, cu_seqlens=cu_seqlens).shape == (9,)


@pytest.mark.parametrize("number", [10**400, -(10**400), 1e39, float("inf"), float("nan")])
def test_numbers_that_fp32_does_not_hold(number):
    with pytest.raises(ValueError, match=r"^merge_roots: threshold must be finite in fp32, got "):
        merge_roots(S, 1, number)
    with pytest.raises(
        ValueError, match=r"^attention_column_sum: scale must be positive, from 2\*\*-126 to 2\*\*127, got "
    ):
        attention_column_sum(Q, Q, scale=number)


def test_more_pairs_than_32_bits_count():
    q, k = torch.zeros(1).expand(1, 8, 2**28, 1), torch.zeros(1).expand(1, 1, 2**28, 1)
    with pytest.raises(
        ValueError, match=r"^attention_column_sum: Nq \* H / Hkv must be at most 2\*\*30, got 2147483648"
    ):
        attention_column_sum(q, k, num_queries=1)


@pytest.mark.gpu
def test_a_long_video_of_one_patch_a_frame(device):
    """The grid's second and third axes hold 65535 programs; the number of frames is on neither."""
    x = torch.ones(1, 8 * 65536, 1, device=device)
    assert (strided_cosine_similarity(x, 1)[0, 1:] == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda wide, many: strided_cosine_similarity(wide, 1),
         r"^strided_cosine_similarity: D must be at most 262144"),
        (lambda wide, many: linked_cosine_similarity(wide, torch.full_like(wide[..., 0], -1, dtype=torch.int64)),
         r"^linked_cosine_similarity: D must be at most 262144"),
        (lambda wide, many: strided_cosine_similarity(many, 1), r"^strided_cosine_similarity: B must be at most 65535"),
        (lambda wide, many: linked_cosine_similarity(many, torch.zeros_like(many[..., 0], dtype=torch.int64)),
         r"^linked_cosine_similarity: B must be at most 65535"),
        (lambda wide, many: merge_mean(many, torch.zeros_like(many[..., 0], dtype=torch.int64)),
         r"^merge_mean: B must be at most 65535"),
        (lambda wide, many: gather_rows(torch.zeros_like(many[..., 0], dtype=torch.int64), many),
         r"^gather_rows: B must be at most 65535"),
        (lambda wide, many: attention_column_sum(many[:, None], many[:, None]),
         r"^attention_column_sum: B must be at most 65535"),
    ],
)  # fmt: skip
def test_what_no_grid_can_hold_is_an_error(call, message, device):
    wide, many = torch.ones(1, 2, 2**18 + 1, device=device), torch.ones(65536, 1, 1, device=device)
    with pytest.raises(ValueError, match=message):
        call(wide, many)
    assert ON_A_CPU.strided_cosine_similarity(wide.cpu(), 1)[0, 1] == pytest.approx(1)


def test_rows_of_what_needs_no_gradient_need_none(device):
    hidden, cosines = torch.randn(1, 6, 4, device=device, requires_grad=True), torch.randn(1, 6, 2, device=device)
    other = torch.randn(1, 6, 3, device=device, requires_grad=True)
    rows, of_cosines, unused = gather_rows(torch.tensor([[1, 4]], device=device), hidden, cosines, other)
    assert not of_cosines.requires_grad
    rows.sum().backward()
    assert other.grad is None
    assert hidden.grad.sum() == 8
