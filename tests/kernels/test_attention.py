"""attention_column_sum: the kernels, run by the interpreter where there is no GPU, and the PyTorch reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_libraries import LIBRARIES, ON_A_CPU
from testing_helpers import DTYPES, assert_column_sum, far_rows, make_strided, shuffled_programs

from fftriton_kernels import _cpu, attention_column_sum, reference

OPS = {name: library.attention_column_sum for name, library in LIBRARIES.items()}
HEADS = [(1, 1), (4, 4), (4, 2), (14, 2), (28, 4), (64, 8)]
NAN, INF = float("nan"), float("inf")


def make_heads(B, H, Hkv, Nq, Nk, d, dtype=torch.float32, device="cpu", seed=0):
    """q [B, H, Nq, d], k [B, Hkv, Nk, d] of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, Nq, d, generator=generator)
    k = torch.randn(B, Hkv, Nk, d, generator=generator)
    return q.to(device, dtype), k.to(device, dtype)


def log_sum_exp(q, k, causal=True):
    """[B, H, Nq] fp32: what flash attention returns beside its output."""
    score = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[3] ** -0.5
    if causal:
        last_seen = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
        score = score.masked_fill(torch.arange(k.shape[2], device=q.device) > last_seen, -INF)
    return score.logsumexp(-1).float()


def softmax_column_sum(q, k, causal=True):
    """The same by way of torch.softmax, in fp64: shares no line with the reference."""
    score = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[3] ** -0.5
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        score = score.masked_fill(hidden.triu(k.shape[2] - q.shape[2] + 1), -INF)
    return score.softmax(-1).sum(2).mean(1)


def check(q, k, **options):
    """The kernel against fp64 and the reference's own error."""
    out = attention_column_sum(q, k, **options)
    assert_column_sum(out, q, k, **options)
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "Hkv", "Nq", "Nk", "d"), [(4, 2, 33, 33, 16), (3, 1, 7, 20, 5), (2, 2, 140, 150, 8)])
def test_reference_is_the_softmax(H, Hkv, Nq, Nk, d, causal):
    q, k = make_heads(2, H, Hkv, Nq, Nk, d)
    truth = softmax_column_sum(q, k, causal)
    torch.testing.assert_close(reference.attention_column_sum(q.double(), k.double(), causal=causal), truth)
    torch.testing.assert_close(
        reference.attention_column_sum(q, k, causal=causal).double(), truth, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 1), (1, 70), (2, 131), (17, 17), (33, 170), (150, 151)])
def test_matches_fp64(Nq, Nk, causal, dtype, device):
    check(*make_heads(2, 4, 2, Nq, Nk, 64, dtype, device), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 17, 64, 80, 96, 128, 160, 256])
def test_head_widths(d, dtype, device):
    q, k = make_heads(1, 6, 2, 40, 70, d, dtype, device)
    check(q, k)
    check(q, k, num_queries=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("Nq", "Nk"), [(1, 1), (1, 130), (2, 40), (17, 17), (33, 65), pytest.param(150, 170, marks=pytest.mark.night)]
)
def test_rows_add_up_to_the_number_of_queries(Nq, Nk, d, dtype, device):
    for H, Hkv in HEADS[: {150: 4, 33: 5}.get(Nq)]:
        q, k = make_heads(1, H, Hkv, Nq, Nk, d, dtype, device)
        total = attention_column_sum(q, k, causal=H != 4).double().sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, Nq), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("H", "Hkv"), HEADS)
def test_head_layouts(H, Hkv, device):
    q, k = make_heads(1, H, Hkv, 37, 50, 16, torch.bfloat16, device)
    check(q, k)
    check(q, k, num_queries=2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_queries", [1, 2, 8, 9, 60])
def test_last_queries(num_queries, causal, device):
    q, k = make_heads(2, 6, 2, 60, 75, 32, torch.float16, device)
    out = check(q, k, num_queries=num_queries, causal=causal)
    torch.testing.assert_close(out, attention_column_sum(q[:, :, -num_queries:], k, causal=causal), rtol=0, atol=0)


@pytest.mark.parametrize("columns", [(0, 170), (0, 1), (169, 170), (20, 151), (64, 128), (128, 170)])
@pytest.mark.parametrize("num_queries", [None, 2])
def test_columns_are_a_slice_of_all(columns, num_queries, device):
    q, k = make_heads(1, 4, 2, 150, 170, 32, torch.bfloat16, device)
    out = check(q, k, columns=columns, num_queries=num_queries)
    whole = attention_column_sum(q, k, num_queries=num_queries)[:, columns[0] : columns[1]]
    torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_queries", [None, 1, 20])
def test_given_log_sum_exp(num_queries, causal, device):
    q, k = make_heads(2, 4, 2, 50, 61, 64, torch.bfloat16, device)
    lse = log_sum_exp(q, k, causal)
    options = {"causal": causal, "num_queries": num_queries, "columns": (3, 60)}
    out = check(q, k, lse=make_strided(lse), **options)
    torch.testing.assert_close(out, attention_column_sum(q, k, **options), rtol=1e-5, atol=1e-6)
    doubled = attention_column_sum(q, k, lse=lse + 2.0**-1, **options)
    torch.testing.assert_close(doubled, out * torch.tensor(-0.5).exp(), rtol=1e-5, atol=1e-6)  # it is used


@pytest.mark.parametrize("scale", [1e-3, 1, 3.0])
def test_scale(scale, device):
    q, k = make_heads(1, 2, 1, 20, 40, 16, torch.float32, device)
    check(q, k, scale=scale)
    check(q, k, scale=scale, num_queries=1)


@pytest.mark.parametrize("num_queries", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, num_queries, device):
    q, k = make_heads(2, 4, 2, 33, 40, 24, dtype, device)
    expected = attention_column_sum(q, k, num_queries=num_queries)
    for strided in ((make_strided(q), k), (q, make_strided(k))):
        assert torch.equal(attention_column_sum(*strided, num_queries=num_queries), expected)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))  # [B, N, H, d] in memory
    assert torch.equal(attention_column_sum(q, k, num_queries=num_queries), expected)
    shared = k[:, :1].expand(-1, 2, -1, -1)  # stride 0
    torch.testing.assert_close(
        attention_column_sum(q, shared, num_queries=num_queries),
        attention_column_sum(q, k[:, :1], num_queries=num_queries),
    )


@pytest.mark.large
@pytest.mark.parametrize("num_queries", [None, 2])
def test_rows_past_two_to_the_31_elements(num_queries, device):
    q, k = make_heads(1, 1, 1, 5, 5, 16, torch.float16, device)
    expected = attention_column_sum(q, k, num_queries=num_queries)
    for inputs in ((far_rows(q[:, 0])[:, None], k), (q, far_rows(k[:, 0])[:, None])):
        assert torch.equal(attention_column_sum(*inputs, num_queries=num_queries), expected)
    q, k = make_heads(1, 4, 4, 1, 1, 16, torch.float16, device)
    expected = attention_column_sum(q, k, scale=0.1, lse=torch.zeros(1, 4, 1, device=device))
    for inputs in ((far_rows(q[:, :, 0])[:, :, None], k), (q, far_rows(k[:, :, 0])[:, :, None])):
        out = attention_column_sum(*inputs, scale=0.1, lse=torch.zeros(1, 4, 1, device=device))
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("Nq", "Nk", "H"), [(150, 150, 14), (20, 1100, 2), (1, 2100, 2)], ids=["column", "row", "few"])
def test_work_shared_by_programs(Nq, Nk, H, device):
    check(*make_heads(1, H, 2, Nq, Nk, 16, torch.float32, device))


@pytest.mark.parametrize(("Nq", "Nk"), [(150, 150), (20, 600), (2, 600)])
def test_order_of_programs_does_not_matter(Nq, Nk, device):
    q, k = make_heads(1, 14, 2, Nq, Nk, 16, torch.bfloat16, device)
    expected = attention_column_sum(q, k)
    for seed in (0, 1):
        with shuffled_programs(seed):
            assert torch.equal(attention_column_sum(q, k), expected)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize(
    ("B", "Nq", "Nk", "columns"), [(0, 3, 5, None), (2, 0, 5, None), (2, 3, 5, (4, 4)), (2, 0, 0, None)]
)
def test_empty(B, Nq, Nk, columns, op, device):
    q, k = make_heads(B, 4, 2, Nq, Nk, 16, device=device)
    out = op(q, k, columns=columns)
    width = Nk if columns is None else 0
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.zeros(B, width, device=device))
    assert attention_column_sum(q[:, :, :0], k[:, :, :0], causal=False).shape == (B, 0)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_key_spoils_the_rows_that_see_it(causal, num_queries, op, device):
    q, k = make_heads(2, 2, 1, 40, 40, 16, device=device)
    k[0, 0, 7, 3] = NAN
    out = op(q, k, causal=causal, num_queries=num_queries)
    assert out[0].isnan().all()  # the last query sees every key
    assert out[1].isfinite().all()
    if causal and num_queries is None:  # the first 7 queries do not see it
        early = op(q[:, :, :7], k[:, :, :7])
        torch.testing.assert_close(early, softmax_column_sum(q[:, :, :7], k[:, :, :7]).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_query_spoils_its_sample(causal, num_queries, op, device):
    q, k = make_heads(2, 2, 1, 40, 40, 16, device=device)
    lse = log_sum_exp(q, k, causal)
    lse[0, 1, 38] = NAN
    spoiled = q.clone()
    spoiled[0, 1, 38, 3] = NAN
    for out in (
        op(spoiled, k, causal=causal, num_queries=num_queries),
        op(q, k, causal=causal, num_queries=num_queries, lse=lse),
    ):
        assert out[0].isnan().all()  # the last column too, which query 38 does not see: as in torch.softmax
        assert out[1].isfinite().all()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("num_queries", [None, 2])
def test_infinite_keys(num_queries, op, device):
    q, k = make_heads(1, 2, 1, 20, 20, 16, device=device)
    q = q.abs()
    k[0, 0, 5] = -INF  # scores of -inf: weight 0 wherever another key is seen
    out = op(q, k, num_queries=num_queries)
    others = [n for n in range(20) if n != 5]
    keep = torch.tensor(others, device=device)
    assert out[0, 5] == 0
    if num_queries:
        expected = op(q[:, :, -2:], k[:, :, keep], causal=False)
        torch.testing.assert_close(out[0, keep][:19], op(q, k, num_queries=2)[0, keep])
        torch.testing.assert_close(out.sum(), expected.sum())


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("columns", [None, (0, 3), (7, 20)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_score_of_infinity_spoils_its_sample_as_in_softmax(causal, columns, num_queries, value, op, device):
    q, k = make_heads(2, 2, 1, 20, 20, 16, device=device)
    q = q.abs()
    k[0, 0, 19] = value  # which only the last query sees, if causal
    out = op(q, k, causal=causal, num_queries=num_queries, columns=columns)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    if causal and num_queries is None:
        early = op(q[:, :, :19], k[:, :, :19], columns=columns and (columns[0], min(columns[1], 19)))
        assert early.isfinite().all()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_a_key_of_infinity_beside_a_given_log_sum_exp(queries, op, device):
    """`lse` is taken as it is: a query that it calls infinite adds nothing, except that +inf - inf is NaN."""
    q, k = make_heads(1, 2, 1, queries, 20, 16, device=device)
    q = q.abs()
    k[0, 0, 5] = INF
    out = op(q, k, causal=False, lse=torch.full((1, 2, queries), INF, device=device))
    assert out[0, 5].isnan()
    assert not out[0, [n for n in range(20) if n != 5]].any()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("length", [2, 20])
def test_query_that_sees_scores_of_minus_infinity_alone(length, op, device):
    q, k = make_heads(1, 2, 1, length, length, 16, device=device)
    k[0, 0, 0] = -INF
    out = op(q.abs(), k)
    assert out[0, 0] == 0
    torch.testing.assert_close(out.sum(), torch.tensor(length - 1.0, device=device))  # the first query adds nothing


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_infinite_log_sum_exp_add_nothing(causal, value, op, device):
    q, k = make_heads(1, 2, 1, 40, 50, 16, device=device)
    lse = log_sum_exp(q, k, causal)
    lse[:, :, :11] = value
    out = op(q, k, causal=causal, lse=lse)
    rest = op(q, k, causal=causal, lse=lse, num_queries=29)
    torch.testing.assert_close(out, rest)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_zero_rows_attend_evenly(op, device):
    q, k = make_heads(1, 2, 1, 30, 30, 16, device=device)
    out = op(q * 0, k)
    expected = torch.tensor([sum(1 / (i + 1) for i in range(n, 30)) for n in range(30)], device=device)
    torch.testing.assert_close(out[0], expected)


def test_large_scores_do_not_overflow(device):
    q, k = make_heads(1, 2, 1, 40, 40, 16, device=device)
    for num_queries in (None, 2):
        out = attention_column_sum(q * 100, k * 100, num_queries=num_queries)
        # scores of some 10^4 have roundings of 10^-3, which exponentials turn into relative errors
        torch.testing.assert_close(out.sum(), torch.tensor(float(num_queries or 40), device=device), rtol=2e-3, atol=0)


@settings(max_examples=12, deadline=None)
@given(
    group=st.integers(1, 9), kv_heads=st.integers(1, 3), queries=st.integers(1, 40), more=st.integers(0, 40),
    d=st.integers(1, 40), causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(group, kv_heads, queries, more, d, causal, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = make_heads(1, group * kv_heads, kv_heads, queries, queries + more, d, device=device, seed=seed)
    out = attention_column_sum(q, k, causal=causal)
    torch.testing.assert_close(out.double(), softmax_column_sum(q, k, causal), rtol=2e-6, atol=2e-6)
    assert (out >= 0).all()


def test_opcheck(device):
    q, k = make_heads(2, 4, 2, 5, 9, 16, device=device)
    op = torch.ops.fftriton_kernels.attention_column_sum.default
    torch.library.opcheck(op, (q, k, 0.25, True, None, 5, 0, 9))
    torch.library.opcheck(op, (q, k, 0.25, False, log_sum_exp(q, k, False), 2, 3, 7))


def test_compiles_in_one_graph(device):
    q, k = make_heads(1, 4, 2, 5, 9, 16, device=device)
    compiled = torch.compile(attention_column_sum, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, num_queries=2), attention_column_sum(q, k, num_queries=2))


def test_a_cpu_takes_fewer_at_a_time_where_there_are_many_scores(monkeypatch):
    q, k = make_heads(2, 8, 4, 30, 40, 16)
    whole = ON_A_CPU.attention_column_sum(q, k)
    for scores in (7 * 2 * 40, 3 * 30 * 2 * 40):  # seven queries of a key head; all queries, of three of the four
        monkeypatch.setattr(_cpu, "_SCORES", scores)
        monkeypatch.setattr(_cpu, "_BLOCK", scores)
        torch.testing.assert_close(ON_A_CPU.attention_column_sum(q, k), whole)


def test_autocast_changes_nothing():
    q, k = make_heads(1, 4, 2, 30, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ON_A_CPU.attention_column_sum(q, k)
    assert torch.equal(out, ON_A_CPU.attention_column_sum(q, k))


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (TypeError, "q must have dtype .* got torch.float64", {"q": torch.zeros(1, 4, 3, 8).double()}),
        (TypeError, "k must be a torch.Tensor, got NoneType", {"k": None}),
        (TypeError, "one dtype, got torch.float32 and torch.float16", {"k": torch.zeros(1, 2, 5, 8).half()}),
        (ValueError, r"q must have shape \[B, H, Nq, d\], got \[4, 3, 8\]", {"q": torch.zeros(4, 3, 8)}),
        (ValueError, r"k must have shape \[B=1, Hkv, Nk, d=8\], got \[2, 2, 5, 8\]", {"k": torch.zeros(2, 2, 5, 8)}),
        (ValueError, r"d=8\], got \[1, 2, 5, 9\]", {"k": torch.zeros(1, 2, 5, 9)}),
        (ValueError, "H must be a multiple of Hkv.* got H=4 and Hkv=3", {"k": torch.zeros(1, 3, 5, 8)}),
        (
            ValueError,
            "d must be from 1 to 256, got 257",
            {"q": torch.zeros(1, 4, 3, 257), "k": torch.zeros(1, 2, 5, 257)},
        ),
        (ValueError, "got Nq=3 > Nk=2", {"k": torch.zeros(1, 2, 2, 8)}),
        (ValueError, r"scale must be positive, from 2\*\*-126 to 2\*\*127, got 0", {"scale": 0}),
        (ValueError, r"scale must be positive, from 2\*\*-126 to 2\*\*127, got -1.0", {"scale": -1.0}),
        (ValueError, r"scale must be positive, from .* got 1e-39", {"scale": 1e-39}),
        (ValueError, r"scale must be positive, from 2\*\*-126 to 2\*\*127, got nan", {"scale": NAN}),
        (ValueError, r"scale must be positive, from 2\*\*-126 to 2\*\*127, got inf", {"scale": INF}),
        (TypeError, "scale must be a float, got str", {"scale": "a"}),
        (TypeError, "scale must be a float, got bool", {"scale": True}),
        (TypeError, "causal must be a bool, got str", {"causal": "no"}),
        (TypeError, "columns must be a pair of ints, got 3", {"columns": 3}),
        (TypeError, "lse must have dtype torch.float32, got torch.float16", {"lse": torch.zeros(1, 4, 3).half()}),
        (ValueError, r"lse must have shape \[B=1, H=4, Nq=3\], got \[1, 4, 2\]", {"lse": torch.zeros(1, 4, 2)}),
        (ValueError, "all tensors must be on one device", {"lse": torch.zeros(1, 4, 3, device="meta")}),
        (ValueError, "num_queries must be at least 1, got 0", {"num_queries": 0}),
        (ValueError, "num_queries must be at most Nq=3, got 4", {"num_queries": 4}),
        (TypeError, "num_queries must be an int, got float", {"num_queries": 2.0}),
        (ValueError, r"0 <= a <= b <= Nk=5, got \(-1, 3\)", {"columns": (-1, 3)}),
        (ValueError, r"0 <= a <= b <= Nk=5, got \(3, 2\)", {"columns": (3, 2)}),
        (ValueError, r"0 <= a <= b <= Nk=5, got \(3, 6\)", {"columns": (3, 6)}),
    ],
)
def test_errors(error, text, change):
    arguments = {"q": torch.zeros(1, 4, 3, 8), "k": torch.zeros(1, 2, 5, 8)} | change
    with pytest.raises(error, match=f"attention_column_sum: .*{text}"):
        attention_column_sum(**arguments)
