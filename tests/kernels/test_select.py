"""topk_keep, segmented_topk_keep and gather_rows: the kernels and the PyTorch reference."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_libraries import ON_A_CPU, libraries
from testing_helpers import DTYPES, far_rows, make_strided, shuffled_programs

from fftriton_kernels import gather_rows, reference, segmented_topk_keep, topk_keep

NAN, INF = float("nan"), float("inf")
SPECIAL = torch.tensor([0.0, -0.0, NAN, INF, -INF, 1.0, -1.0, 1e-40, -1e-40, 3.4e38, -NAN])


def make_scores(B, N, kind="ties", dtype=torch.float32, device="cpu", seed=0):
    """[B, N]: smooth, or with many ties, or of special values alone (Triton's interpreter misreads subnormal bf16)."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "special":
        values = SPECIAL[SPECIAL.abs() != 1e-40] if dtype == torch.bfloat16 else SPECIAL
        scores = values[torch.randint(0, len(values), (B, N), generator=generator)]
    else:
        scores = torch.randn(B, N, generator=generator)
        scores = (scores * 4).round() / 4 if kind == "ties" else scores
    return scores.to(device, dtype)


def best_first(scores):
    """Positions of a list of scores, best first, by Python's own sort."""
    return sorted(
        range(len(scores)), key=lambda i: (scores[i] != scores[i], 0 if scores[i] != scores[i] else -scores[i], i)
    )


def padded(rows, device):
    """Lists of positions -> int64 [B, K], -1 on the left."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[-1] * (longest - len(row)) + sorted(row) for row in rows], device=device).view(
        len(rows), longest
    )


def expected_topk(scores, k, candidates=None):
    rows = []
    for b, row in enumerate(scores.tolist()):
        count = k if isinstance(k, int) else int(k[b])
        competing = [True] * len(row) if candidates is None else candidates[b].tolist()
        others = [i for i, competes in enumerate(competing) if not competes]
        rows.append(others + [i for i in best_first(row) if competing[i]][: max(count, 0)])
    return padded(rows, scores.device)


def expected_segmented(scores, segments, counts):
    rows = []
    for row, labels, allowed in zip(scores.tolist(), segments.tolist(), counts.tolist(), strict=True):
        kept = [i for i, label in enumerate(labels) if label < 0]
        for segment, count in enumerate(allowed):
            kept += [i for i in best_first(row) if labels[i] == segment][: max(count, 0)]
        rows.append(kept)
    return padded(rows, scores.device)


@libraries
@pytest.mark.parametrize("kind", ["smooth", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N"), [(1, 1), (2, 17), (3, 1000), (2, 2049)])
def test_topk(B, N, dtype, kind, library, device):
    scores = make_scores(B, N, kind, dtype, device)
    for k in sorted({0, 1, N // 3, N - 1, N}):
        out = library.topk_keep(scores, k)
        assert out.dtype == torch.int64
        assert torch.equal(out, expected_topk(scores, k))


@libraries
@pytest.mark.parametrize("value", [0.0, NAN, -INF])
def test_topk_of_equal_scores_keeps_the_first(value, library, device):
    scores = torch.full((2, 2100), value, device=device)
    expected = torch.arange(2060, device=device).expand(2, -1)
    assert torch.equal(library.topk_keep(scores, 2060), expected)


@libraries
@pytest.mark.parametrize("kind", ["ties", "special"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_topk_with_k_on_the_device(index, kind, library, device):
    scores = make_scores(4, 700, kind, device=device)
    k = torch.tensor([5, 700, 0, 300], dtype=index, device=device)
    assert torch.equal(library.topk_keep(scores, k), expected_topk(scores, k))
    outside = torch.tensor([-3, 701, -(2**31), 2**31 - 1], dtype=index, device=device)
    assert torch.equal(library.topk_keep(scores, outside), expected_topk(scores, outside.tolist()))
    assert library.topk_keep(scores, torch.zeros_like(k)).shape == (4, 0)
    spread = torch.stack((k, k + 1), 1)[:, 0]  # stride 2
    assert torch.equal(library.topk_keep(scores, spread), expected_topk(scores, k))


@libraries
@pytest.mark.parametrize("kind", ["smooth", "ties", "special"])
@pytest.mark.parametrize("N", [40, 2100])
def test_topk_of_candidates(N, kind, library, device):
    scores = make_scores(3, N, kind, device=device)
    candidates = torch.rand(3, N, generator=torch.Generator().manual_seed(1)).to(device) < 0.6
    candidates[1] = False
    candidates[2] = True
    for k in (0, 7, N // 2, N, torch.tensor([3, 0, N], device=device)):
        assert torch.equal(library.topk_keep(scores, k, candidates), expected_topk(scores, k, candidates))


def test_scores_in_order_are_as_quick_as_others():
    """Selection by pivots takes quadratic time on what is sorted, as importance under a causal mask nearly is."""

    def seconds(scores):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            ON_A_CPU.topk_keep(scores, 70000)
            times.append(time.perf_counter() - start)
        return min(times)

    descending = -torch.arange(200000.0)[None]
    shuffled = descending[:, torch.randperm(200000, generator=torch.Generator().manual_seed(0))]
    for scores in (descending, -descending):
        assert seconds(scores) < 10 * seconds(shuffled)


def test_topk_strides(device):
    scores = make_scores(2, 300, device=device)
    candidates = scores > -0.5
    expected = topk_keep(scores, 50, candidates)
    assert torch.equal(topk_keep(make_strided(scores), 50, candidates), expected)
    assert torch.equal(topk_keep(scores, 50, make_strided(candidates)), expected)
    assert torch.equal(topk_keep(scores.t().contiguous().t(), 50, candidates.t().contiguous().t()), expected)
    assert torch.equal(topk_keep(scores[:1].expand(2, -1), 50), topk_keep(scores[:1], 50).expand(2, -1))


@libraries
@pytest.mark.parametrize("kind", ["smooth", "ties", "special"])
@pytest.mark.parametrize(("N", "S"), [(1, 1), (50, 3), (1500, 40)])
def test_segmented(N, S, kind, library, device):
    scores = make_scores(3, N, kind, device=device)
    generator = torch.Generator().manual_seed(2)
    segments = torch.randint(-1, S, (3, N), generator=generator).to(device)
    segments[1] = segments[1].sort().values
    segments[2] = -1
    counts = torch.randint(0, 2 * N // S + 1, (3, S), generator=generator).to(device)
    out = library.segmented_topk_keep(scores, segments, counts)
    assert torch.equal(out, expected_segmented(scores, segments, counts))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segmented_dtypes_and_strides(dtype, index, device):
    scores = make_scores(2, 90, "ties", dtype, device)
    segments = (torch.arange(90, device=device) // 30).to(index)
    counts = torch.tensor([4, 0, 100], dtype=index, device=device)
    expected = expected_segmented(scores, segments.expand(2, -1), counts.expand(2, -1))
    assert torch.equal(segmented_topk_keep(scores, segments, counts), expected)
    assert torch.equal(segmented_topk_keep(scores, segments.expand(2, -1), counts.expand(2, -1)), expected)
    inputs = [scores, segments.expand(2, -1), counts.expand(2, -1)]
    for i, x in enumerate(inputs):
        assert torch.equal(segmented_topk_keep(*inputs[:i], make_strided(x), *inputs[i + 1 :]), expected)
    assert torch.equal(segmented_topk_keep(scores, segments, -counts.clamp_min(1)), expected[:, :0])


@libraries
def test_segmented_without_segments(library, device):
    scores = make_scores(2, 30, device=device)
    none = torch.full((2, 30), -1, device=device)
    everything = torch.arange(30, device=device).expand(2, -1)
    assert torch.equal(library.segmented_topk_keep(scores, none, none[:, :0]), everything)


def test_one_segment_is_topk(device):
    scores = make_scores(2, 500, "special", device=device)
    segments = torch.zeros(500, dtype=torch.int64, device=device)
    for k in (0, 1, 250, 500):
        counts = torch.tensor([k], device=device)
        assert torch.equal(segmented_topk_keep(scores, segments, counts), topk_keep(scores, k))


def test_order_of_programs_does_not_matter(device):
    scores = make_scores(2, 5000, device=device)
    candidates = scores > -1
    segments = torch.arange(5000, device=device) % 7
    counts = torch.full((7,), 300, device=device)
    kept = torch.randint(-1, 5000, (2, 900), device=device)

    def results():
        rows = gather_rows(kept, scores, candidates, scores[..., None].expand(-1, -1, 3))
        return (
            topk_keep(scores, 1234),
            topk_keep(scores, 99, candidates),
            segmented_topk_keep(scores, segments, counts),
            *rows,
        )

    expected = results()
    for seed in (0, 1):
        with shuffled_programs(seed):
            assert all(map(torch.equal, results(), expected))


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.sampled_from(SPECIAL.tolist()), min_size=1, max_size=60), k=st.integers(0, 60),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_topk_properties(scores, k, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.tensor([scores], device=device)
    candidates = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(device) < 0.7
    k = min(k, len(scores))
    (kept,) = topk_keep(x, k, candidates)
    assert torch.equal(kept, kept.unique())  # ascending, each once
    assert len(kept) == int((~candidates).sum()) + min(k, int(candidates.sum()))
    chosen = torch.zeros_like(candidates).index_fill(1, kept, True)
    assert (chosen | candidates).all()
    worst = x[chosen & candidates].nan_to_num(-INF, INF, -INF)
    best = x[~chosen].nan_to_num(-INF, INF, -INF)
    assert not len(worst) or not len(best) or worst.min() >= best.max()


@libraries
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize("large", [1, 2**25], ids=["large", "small"])
def test_gather(large, dtype, library, device, monkeypatch):
    monkeypatch.setattr("fftriton_kernels._pages._LARGE", large)
    generator = torch.Generator().manual_seed(0)
    kept = torch.randint(-1, 40, (2, 23), generator=generator).to(device)
    shapes = [(2, 40), (2, 40, 65), (2, 40, 3, 5), (2, 40, 1), (2, 40, 0)]
    tensors = [torch.randint(0, 100, shape, generator=generator).to(device, dtype) for shape in shapes]
    for out, tensor in zip(library.gather_rows(kept, *tensors), tensors, strict=True):
        expected = torch.where(
            (kept < 0).view(2, 23, *[1] * (tensor.ndim - 2)), 0, tensor[torch.arange(2)[:, None], kept]
        )
        assert out.dtype == dtype
        assert torch.equal(out, expected.to(dtype))


def test_gather_keeps_every_bit(device):
    bits = torch.tensor([[0x7FC00001, -1, 0x7F800001, -(2**31), 1, 0x7F7FFFFF]], dtype=torch.int32, device=device)
    kept = torch.tensor([[5, 0, 2, 1, 3, 4]], device=device)
    (out,) = gather_rows(kept, bits.view(torch.float32))
    assert torch.equal(out.view(torch.int32), bits[:, kept[0]])


@libraries
def test_gather_strides(library, device):
    B, N, d = 2, 30, 16
    kept = torch.tensor([[-1, 0, 3, 29], [2, 2, 28, 7]], device=device)
    cos = torch.randn(3, B, N, d, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.randn(B, 1, 5, N, generator=torch.Generator().manual_seed(1)).to(device) > 0
    tensors = [
        cos.permute(1, 2, 0, 3),  # a rotary embedding of three axes
        mask.permute(0, 3, 1, 2),  # the keys of an attention mask
        make_strided(cos[0]),
        make_strided(cos.permute(1, 2, 0, 3)),  # three strided dimensions
        cos[0, :1].expand(B, -1, -1),
        cos[0, :, :1].expand(-1, N, -1),
        torch.arange(N, device=device).expand(B, -1),
    ]
    expected = reference.gather_rows(kept, *(tensor.contiguous() for tensor in tensors))
    for index in (kept, kept.int(), make_strided(kept)):
        for out, want in zip(library.gather_rows(index, *tensors), expected, strict=True):
            assert torch.equal(out, want)


def test_gather_wide_rows(device):
    x = torch.randn(2, 9, 3000, generator=torch.Generator().manual_seed(0)).to(device)
    kept = torch.tensor([[8, -1], [0, 4]], device=device)
    many = [x + i for i in range(6)]  # more than one launch holds
    for out, tensor in zip(gather_rows(kept, *many), many, strict=True):
        assert torch.equal(out, reference.gather_rows(kept, tensor)[0])


@pytest.mark.large
def test_rows_past_two_to_the_31_elements(device):
    scores, kept = make_scores(1, 6, "smooth", device=device), torch.tensor([[5, -1, 2]], device=device)
    segments, counts = torch.zeros_like(scores, dtype=torch.int64), torch.tensor([2], device=device)
    far = far_rows(scores)
    assert torch.equal(topk_keep(far, 2), topk_keep(scores, 2))
    assert torch.equal(segmented_topk_keep(far, segments, counts), topk_keep(scores, 2))
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(gather_rows(kept, far_rows(x))[0], gather_rows(kept, x)[0])


def test_gather_leaves_its_inputs_alone(device):
    kept = torch.arange(6, device=device).expand(1, -1)
    x = torch.randn(1, 6, 4, device=device)
    (out,) = gather_rows(kept, x)
    assert out.data_ptr() != x.data_ptr()
    assert gather_rows(kept) == ()


@libraries
def test_gradients_add_up_at_the_rows_taken(library, device):
    kept = torch.tensor([[-1, 2, 2, 0], [4, 1, -1, 4]], device=device)
    x = torch.randn(2, 5, 3, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    fixed = torch.randn(2, 5, device=device)
    assert torch.autograd.gradcheck(lambda x, y: library.gather_rows(kept, x, fixed, y)[::2], (x, y))
    library.gather_rows(kept, x)[0].sum().backward()
    taken = torch.tensor([[1.0, 0, 2, 0, 0], [0, 1, 0, 0, 2]], dtype=torch.float64, device=device)
    assert torch.equal(x.grad, taken[..., None].expand(-1, -1, 3))


@libraries
def test_empty(library, device):
    scores = torch.zeros(2, 0, device=device)
    assert library.topk_keep(scores, 0).shape == (2, 0)
    assert library.topk_keep(scores[:0], 0).shape == (0, 0)
    assert library.topk_keep(scores, 0, scores > 0).shape == (2, 0)
    assert library.segmented_topk_keep(
        scores, scores.long(), torch.zeros(2, 3, dtype=torch.int64, device=device)
    ).shape == (2, 0)
    (out,) = library.gather_rows(scores.long(), torch.zeros(2, 4, 3, device=device))
    assert out.shape == (2, 0, 3)
    (out,) = library.gather_rows(scores[:0].long(), torch.zeros(0, 4, 3, device=device))
    assert out.shape == (0, 0, 3)


def test_opcheck(device):
    scores = make_scores(2, 30, device=device)
    candidates, k = scores > 0, torch.tensor([3, 8], device=device)
    topk = torch.ops.fftriton_kernels.topk_keep.default
    for bound, bounds, mask in ((5, None, None), (5, None, candidates), (0, k, None)):
        torch.library.opcheck(topk, (scores, bound, bounds, mask))
    segments = torch.arange(30, device=device).expand(2, -1) // 10
    counts = torch.tensor([[1, 2, 3], [4, 0, 0]], device=device)
    torch.library.opcheck(torch.ops.fftriton_kernels.segmented_topk_keep.default, (scores, segments, counts))
    kept = torch.tensor([[-1, 3], [4, 5]], device=device)
    rows = [scores.clone().requires_grad_(), torch.randn(2, 30, 4, device=device)]
    torch.library.opcheck(torch.ops.fftriton_kernels.gather_rows.default, (kept, rows))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_in_one_graph(device):
    def prune(scores, x, candidates):
        kept = topk_keep(scores, 5, candidates)
        return gather_rows(kept, x)[0] * 2, topk_keep(scores, 5)

    scores = make_scores(2, 30, device=device)
    inputs = scores, scores[..., None].expand(-1, -1, 4), scores > 0
    for out, want in zip(torch.compile(prune, backend="eager", fullgraph=True)(*inputs), prune(*inputs), strict=True):
        assert torch.equal(out, want)


S, SEGMENTS, COUNTS = torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
KEPT = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("op", "arguments", "error", "text"),
    [
        (topk_keep, (S.double(), 1), TypeError, "scores must have dtype .* got torch.float64"),
        (topk_keep, (S[0], 1), ValueError, r"scores must have shape \[B, N\], got \[9\]"),
        (topk_keep, (S, -1), ValueError, "k must be at least 0, got -1"),
        (topk_keep, (S, 10), ValueError, "k must be at most N=9, got 10"),
        (topk_keep, (S, 1.0), TypeError, "k must be an int, got float"),
        (topk_keep, (S, S[:, 0]), TypeError, "k must have dtype torch.int32 or torch.int64, got torch.float32"),
        (topk_keep, (S, SEGMENTS[0]), ValueError, r"k must have shape \[B=2\], got \[9\]"),
        (topk_keep, (S, 1, S), TypeError, "candidates must have dtype torch.bool, got torch.float32"),
        (topk_keep, (S, 1, (S > 0)[:1]), ValueError, r"candidates must have shape \[B=2, N=9\], got \[1, 9\]"),
        (topk_keep, (S, 1, (S > 0).to("meta")), ValueError, "all tensors must be on one device"),
        (segmented_topk_keep, (S.int(), SEGMENTS, COUNTS), TypeError, "scores must have dtype"),
        (segmented_topk_keep, (S, S, COUNTS), TypeError, "segments must have dtype .* got torch.float32"),
        (segmented_topk_keep, (S, SEGMENTS, COUNTS.short()), TypeError, "counts must have dtype .* got torch.int16"),
        (segmented_topk_keep, (S, None, COUNTS), TypeError, "segments must be a torch.Tensor, got NoneType"),
        (segmented_topk_keep, (S, SEGMENTS[:, 1:], COUNTS), ValueError, r"segments must have shape .* got \[2, 8\]"),
        (segmented_topk_keep, (S, SEGMENTS[0, 1:], COUNTS), ValueError, r"segments must have shape .* got \[2, 8\]"),
        (segmented_topk_keep, (S, SEGMENTS, COUNTS[:1]), ValueError, r"counts must have shape .* got \[1, 4\]"),
        (segmented_topk_keep, (S, SEGMENTS.to("meta"), COUNTS), ValueError, "all tensors must be on one device"),
        (gather_rows, (KEPT.float(), S), TypeError, "kept must have dtype .* got torch.float32"),
        (gather_rows, (KEPT[0], S), ValueError, r"kept must have shape \[B, K\], got \[3\]"),
        (gather_rows, (KEPT, S, [1]), TypeError, r"tensors\[1\] must be a torch.Tensor, got list"),
        (gather_rows, (KEPT, S[0]), ValueError, r"tensors\[0\] must have shape \[B=2, N, ...\], got \[9\]"),
        (gather_rows, (KEPT, S[:1]), ValueError, r"tensors\[0\] must have shape \[B=2, N, ...\], got \[1, 9\]"),
        (gather_rows, (KEPT, S, S[:, 1:]), ValueError, r"tensors\[1\] must have shape \[B=2, N=9, ...\], got \[2, 8\]"),
        (gather_rows, (KEPT, S.to("meta")), ValueError, "all tensors must be on one device"),
    ],
)  # fmt: skip
def test_errors(op, arguments, error, text):
    with pytest.raises(error, match=f"{op.__name__}: .*{text}"):
        op(*arguments)
