"""attention_column_sum of packed sequences: each gives what it gives alone."""

from itertools import accumulate, pairwise

import pytest
import torch
from op_libraries import LIBRARIES
from testing_helpers import DTYPES, make_strided

from fftriton_kernels import attention_column_sum, reference

OPS = {name: library.attention_column_sum for name, library in LIBRARIES.items()}
LENGTHS = [(33, 33), (0, 0), (1, 70), (17, 140), (150, 150), (0, 5), (7, 7)]  # queries and keys of each sequence
NAN = float("nan")


def make_packed(lengths=LENGTHS, H=4, Hkv=2, d=16, dtype=torch.float32, device="cpu", index=torch.int32):
    """q [Tq, H, d], k [Tk, Hkv, d] of unit variance and the bounds of the sequences."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = ([length[i] for length in lengths] for i in (0, 1))
    q = torch.randn(sum(queries), H, d, generator=generator).to(device, dtype)
    k = torch.randn(sum(keys), Hkv, d, generator=generator).to(device, dtype)
    cu_q, cu_k = (torch.tensor([0, *accumulate(n)], dtype=index, device=device) for n in (queries, keys))
    return q, k, {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


def one_by_one(op, q, k, bounds, lse=None, num_queries=None, **options):
    """[Tk]: the op without packing on each sequence alone."""
    out = []
    spans = (list(pairwise(b)) for b in (bound.tolist() for bound in bounds.values()))
    for (low, high), (first, last) in zip(*spans, strict=True):
        options["lse"] = None if lse is None else lse[None, :, low:high]
        options["num_queries"] = min(num_queries, high - low) or None if num_queries else None
        out.append(op(q[low:high].transpose(0, 1)[None], k[first:last].transpose(0, 1)[None], **options)[0])
    return torch.cat(out)


def log_sum_exp(q, k, bounds, causal):
    """[H, Tq] fp32: what flash attention's varlen functions return beside their output."""
    out = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    spans = (list(pairwise(b)) for b in (bound.tolist() for bound in bounds.values()))
    for (low, high), (first, last) in zip(*spans, strict=True):
        keys = k[first:last].double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = torch.einsum("qhd,khd->hqk", q[low:high].double(), keys) * q.shape[2] ** -0.5
        if causal:
            hidden = torch.ones(score.shape[1:], dtype=torch.bool, device=q.device)
            score = score.masked_fill(hidden.triu(score.shape[2] - score.shape[1] + 1), -float("inf"))
        out[:, low:high] = score.logsumexp(-1)
    return out


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_queries", [None, 3, 20])
def test_each_sequence_gives_what_it_gives_alone(num_queries, causal, dtype, op, device):
    q, k, bounds = make_packed(dtype=dtype, device=device)
    out = op(q, k, causal=causal, num_queries=num_queries, **bounds)
    alone = one_by_one(op, q, k, bounds, causal=causal, num_queries=num_queries)
    torch.testing.assert_close(out, alone, rtol=3e-6, atol=1e-7)  # programs share the work in other ways
    truth = one_by_one(reference.attention_column_sum, q.double(), k.double(), bounds, None, num_queries, causal=causal)
    torch.testing.assert_close(out.double(), truth, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_queries", [None, 3])
def test_given_log_sum_exp(num_queries, causal, op, device):
    q, k, bounds = make_packed(dtype=torch.bfloat16, device=device)
    lse = log_sum_exp(q, k, bounds, causal)
    options = {"causal": causal, "num_queries": num_queries}
    out = op(q, k, lse=make_strided(lse), **options, **bounds)
    torch.testing.assert_close(out, op(q, k, **options, **bounds), rtol=1e-5, atol=1e-6)
    doubled = op(q, k, lse=lse + 0.5, **options, **bounds)
    torch.testing.assert_close(doubled, out * torch.tensor(-0.5).exp(), rtol=1e-5, atol=1e-6)  # it is used


@pytest.mark.parametrize(("H", "Hkv"), [(1, 1), (14, 2), (3, 3)])
@pytest.mark.parametrize("d", [1, 33, 80])
def test_heads(H, Hkv, d, device):
    q, k, bounds = make_packed([(19, 40), (0, 3), (35, 35)], H, Hkv, d, torch.float16, device, torch.int64)
    for num_queries in (None, 1):
        out = attention_column_sum(q, k, num_queries=num_queries, **bounds)
        alone = one_by_one(attention_column_sum, q, k, bounds, num_queries=num_queries)
        torch.testing.assert_close(out, alone, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("num_queries", [None, 2])
def test_equal_lengths_are_a_batch(num_queries, device):
    q, k, bounds = make_packed([(40, 50)] * 3, device=device)
    out = attention_column_sum(q, k, num_queries=num_queries, **bounds)
    padded = (x.unflatten(0, (3, -1)).transpose(1, 2) for x in (q, k))
    assert torch.equal(out.unflatten(0, (3, -1)), attention_column_sum(*padded, num_queries=num_queries))


@pytest.mark.parametrize("num_queries", [None, 2])
def test_given_maxima_and_strides(num_queries, device):
    q, k, bounds = make_packed([(9, 20), (0, 0), (30, 33)], device=device)
    out = attention_column_sum(q, k, num_queries=num_queries, **bounds)
    given = {"max_seqlen_q": 30, "max_seqlen_k": 33}
    assert torch.equal(attention_column_sum(q, k, num_queries=num_queries, **bounds, **given), out)
    strided = attention_column_sum(make_strided(q), make_strided(k), num_queries=num_queries, **bounds)
    assert torch.equal(strided, out)
    more = attention_column_sum(q, k, num_queries=num_queries, **bounds, max_seqlen_q=300, max_seqlen_k=600)
    torch.testing.assert_close(more, out, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("num_queries", [None, 2])
def test_rows_of_no_sequence_do_not_count(num_queries, op, device):
    q, k, bounds = make_packed([(9, 20), (30, 33)], device=device)
    out = op(q, k, num_queries=num_queries, **bounds)
    rows = torch.full((5, 4, 16), NAN, device=device)
    inside = {name: bound + 5 for name, bound in bounds.items()}
    q, k = torch.cat([rows, q, rows]), torch.cat([rows[:, :2], k, rows[:, :2]])
    embedded = op(q, k, num_queries=num_queries, **inside)
    assert torch.equal(embedded[5:-5], out)
    assert not embedded[:5].any()
    assert not embedded[-5:].any()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_query_spoils_its_sequence(causal, num_queries, op, device):
    q, k, bounds = make_packed([(20, 30), (40, 40), (0, 2), (9, 9)], device=device)
    lse = log_sum_exp(q, k, bounds, causal)
    lse[1, 20 + 38], lse[1, 20 + 5] = NAN, 0.0
    spoiled = q.clone()
    spoiled[20 + 38, 1, 3] = NAN
    for rows, norms in ((spoiled, None), (q, lse)):
        out = op(rows, k, causal=causal, num_queries=num_queries, lse=norms, **bounds)
        assert out[30:70].isnan().all()  # the last column too, which query 38 does not see: as in torch.softmax
        assert out[:30].isfinite().all()
        assert out[70:].isfinite().all()
    early = q.clone()
    early[20 + 5] = NAN
    if num_queries:
        assert op(early, k, causal=causal, num_queries=num_queries, **bounds).isfinite().all()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("num_queries", [None, 8])
def test_more_queries_than_keys_see_nothing(num_queries, op, device):
    q, k, bounds = make_packed([(9, 4), (3, 0), (6, 6)], device=device)
    out = op(q, k, num_queries=num_queries, **bounds)
    rest = op(q[5:], k, num_queries=num_queries, cu_seqlens_q=torch.tensor([0, 4, 7, 13], device=device),
              cu_seqlens_k=bounds["cu_seqlens_k"])  # fmt: skip
    torch.testing.assert_close(out, rest, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(out[:4].sum(), torch.tensor(4.0, device=device))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 7), (0, 2)], [(3, 0)]])
@pytest.mark.parametrize("num_queries", [None, 2])
def test_empty(num_queries, lengths, op, device):
    q, k, bounds = make_packed(lengths, device=device)
    out = op(q, k, num_queries=num_queries, **bounds)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.zeros(len(k), device=device))


def test_opcheck(device):
    q, k, bounds = make_packed([(5, 9), (0, 0), (6, 6)], device=device)
    op = torch.ops.fftriton_kernels.attention_column_sum_packed.default
    torch.library.opcheck(op, (q, k, 0.25, True, None, None, *bounds.values(), None, None))
    lse = log_sum_exp(q, k, bounds, False)
    torch.library.opcheck(op, (q, k, 0.25, False, lse, 2, *bounds.values(), 6, 9))


def test_meta():
    q, k, bounds = make_packed([(5, 9), (6, 6)], device="meta")
    out = attention_column_sum(q, k, num_queries=2, **bounds)
    assert out.device.type == "meta"
    assert out.shape == (15,)
    assert out.dtype == torch.float32


def test_compiles_in_one_graph(device):
    q, k, bounds = make_packed([(5, 9), (6, 6)], device=device)
    compiled = torch.compile(attention_column_sum, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, **bounds), attention_column_sum(q, k, **bounds))


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (ValueError, "need cu_seqlens_q and cu_seqlens_k, got cu_seqlens_q only", {"cu_seqlens_k": None}),
        (ValueError, "got max_seqlen_k only", {"cu_seqlens_k": None, "cu_seqlens_q": None, "max_seqlen_k": 3}),
        (ValueError, r"columns must be None with cu_seqlens, got \(0, 2\)", {"columns": (0, 2)}),
        (TypeError, "cu_seqlens_q must have dtype .* got torch.float32", {"cu_seqlens_q": torch.zeros(3)}),
        (ValueError, r"cu_seqlens_k must have shape \[S\+1=3\], got \[4\]", {"cu_seqlens_k": torch.zeros(4).int()}),
        (ValueError, "contiguous and not empty, got", {"cu_seqlens_k": torch.zeros(6).int()[::2]}),
        (ValueError, "cu_seqlens_q must be contiguous and not empty", {"cu_seqlens_q": torch.zeros(0).int()}),
        (ValueError, "all tensors must be on one device", {"cu_seqlens_k": torch.zeros(3, device="meta").int()}),
        (ValueError, r"q must have shape \[Tq, H, d\], got \[1, 4, 5, 8\]", {"q": torch.zeros(1, 4, 5, 8)}),
        (ValueError, r"lse must have shape \[H=4, Tq=5\], got \[1, 4, 5\]", {"lse": torch.zeros(1, 4, 5)}),
        (ValueError, "num_queries must be at least 1, got 0", {"num_queries": 0}),
        (ValueError, "max_seqlen_q must be at least 0, got -1", {"max_seqlen_q": -1}),
        (TypeError, "max_seqlen_k must be an int, got float", {"max_seqlen_k": 2.0}),
        (TypeError, "q must be a torch.Tensor, got NoneType", {"q": None}),
    ],
)
def test_errors(error, text, change):
    arguments = {"q": torch.zeros(5, 4, 8), "k": torch.zeros(6, 2, 8)}
    arguments |= {"cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 3, 6])} | change
    with pytest.raises(error, match=f"attention_column_sum: .*{text}"):
        attention_column_sum(**arguments)
