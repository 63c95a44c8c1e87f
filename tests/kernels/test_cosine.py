import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_libraries import ON_A_CPU, libraries
from testing_helpers import DTYPES, SHAPES, assert_no_worse_than_torch, far_rows, make_strided, make_video
from torch import Tensor

from fftriton_kernels import NO_LINK, _cpu, linked_cosine_similarity, strided_cosine_similarity
from fftriton_kernels._packed import strided_predecessor

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def plain_cosine(x: Tensor, predecessor: Tensor) -> Tensor:
    """What PyTorch has for it: [B, N] in x's dtype."""
    partner = x.gather(1, predecessor.long().clamp_min(0).unsqueeze(2).expand_as(x))
    return torch.cosine_similarity(x, partner, -1, eps=0).masked_fill(predecessor < 0, NO_LINK)


def random_predecessor(B: int, N: int, device: str) -> Tensor:
    """[B, N]: any earlier token, or none."""
    earlier = (torch.rand(B, N) * torch.arange(N)).long()
    return torch.where((torch.rand(B, N) < 0.3) | (torch.arange(N) == 0), -1, earlier).to(device)


@libraries
@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, (1, 16, 2, 8), (1, 17, 2, 8)], ids="B{0[0]}-F{0[1]}-P{0[2]}-D{0[3]}".format)
def test_strided_matches_fp64(library, shape, dtype, device):
    x, P = make_video(*shape, dtype, device), shape[2]
    predecessor = strided_predecessor(*x.shape[:2], P, x.device)
    out = library.strided_cosine_similarity(x, P)
    assert out.dtype == torch.float32
    assert_no_worse_than_torch(out, plain_cosine(x.float(), predecessor), plain_cosine(x.double(), predecessor))


@libraries
@dtypes
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_linked_matches_fp64(library, dtype, index, device):
    torch.manual_seed(0)
    x = make_video(2, 3, 7, 65, dtype, device)
    predecessor = random_predecessor(2, 21, device).to(index)
    out = library.linked_cosine_similarity(x, predecessor)
    assert out.dtype == torch.float32
    assert_no_worse_than_torch(out, plain_cosine(x.float(), predecessor), plain_cosine(x.double(), predecessor))


@dtypes
@pytest.mark.parametrize("arrange", [torch.Tensor.contiguous, make_strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("reach", [0, 2**21])
@pytest.mark.parametrize("order", ["stride", "random", "ahead"])
def test_a_cpu_works_in_blocks(order, reach, arrange, dtype, monkeypatch):
    monkeypatch.setattr(_cpu, "_POOLED", 4 * 65)  # 21 rows: five blocks and a shorter one
    monkeypatch.setattr(_cpu, "_REACH", reach)
    x = arrange(make_video(2, 3, 7, 65, dtype, "cpu"))
    torch.manual_seed(0)
    predecessor = {
        "stride": strided_predecessor(2, 21, 7, x.device),
        "random": random_predecessor(2, 21, "cpu"),
        "ahead": torch.randint(-1, 21, (2, 21)),
    }[order]
    out = ON_A_CPU.linked_cosine_similarity(x, predecessor)
    torch.testing.assert_close(out.double(), plain_cosine(x.double(), predecessor), rtol=0, atol=1e-6)


@libraries
@dtypes
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
def test_a_row_without_direction_has_no_similarity(library, dtype, value, device, monkeypatch):
    monkeypatch.setattr(_cpu, "_POOLED", 3 * 17)  # rows of later blocks take the places of earlier ones
    x = make_video(1, 4, 3, 17, dtype, device)
    plain = library.strided_cosine_similarity(x, 3)
    x[0, 4] = x[0, 4] * 0 if value == 0 else torch.where(torch.arange(17, device=device) == 5, value, x[0, 4])
    out = library.strided_cosine_similarity(x, 3)
    unaffected = torch.tensor([t not in (4, 7) for t in range(12)], device=device)
    assert torch.equal(out[0] == NO_LINK, (plain[0] == NO_LINK) | ~unaffected)
    assert torch.equal(out[0, unaffected], plain[0, unaffected])


@libraries
@pytest.mark.parametrize("scale", [3e38, 1e25, 1e-25, 1e-40])
def test_rows_of_any_finite_size_have_a_cosine(library, scale, device, monkeypatch):
    monkeypatch.setattr(_cpu, "_BLOCK", 33)  # one row at a time
    x = make_video(1, 2, 3, 33, torch.float32, device)
    x = x / x.abs().amax(-1, keepdim=True)
    x[0, 4] *= scale
    predecessor = strided_predecessor(1, 6, 3, x.device)
    truth = plain_cosine(x.double(), predecessor)
    out = library.strided_cosine_similarity(x, 3)
    assert (out - truth).abs().max() < 2e-7


@libraries
def test_strides(library, device):
    torch.manual_seed(0)
    x = make_video(2, 3, 5, 33, torch.bfloat16, device)
    predecessor = random_predecessor(2, 15, device)
    out = library.linked_cosine_similarity(make_strided(x), make_strided(predecessor))
    assert torch.equal(out, library.linked_cosine_similarity(x, predecessor))
    assert torch.equal(library.strided_cosine_similarity(make_strided(x), 5), library.strided_cosine_similarity(x, 5))


@libraries
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty(library, shape, device):
    x = torch.zeros(shape, device=device)
    predecessor = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    for out in (library.strided_cosine_similarity(x, 1), library.linked_cosine_similarity(x, predecessor)):
        assert out.dtype == torch.float32
        assert torch.equal(out, torch.full(shape[:2], NO_LINK, device=device))


@libraries
def test_no_partner_within_reach(library, device):
    x = make_video(1, 1, 9, 16, torch.float16, device)
    assert (library.strided_cosine_similarity(x, 9) == NO_LINK).all()
    assert (library.strided_cosine_similarity(x, 2**40) == NO_LINK).all()


@pytest.mark.large
def test_rows_past_two_to_the_31_elements(device):
    x = make_video(1, 4, 1, 16, torch.float16, device)
    far, predecessor = far_rows(x), torch.tensor([[-1, 0, 0, 2]], device=device)
    assert torch.equal(strided_cosine_similarity(far, 1), strided_cosine_similarity(x, 1))
    assert torch.equal(linked_cosine_similarity(far, predecessor), linked_cosine_similarity(x, predecessor))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    F=st.integers(1, 4),
    P=st.integers(1, 5),
    D=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    exponents=st.lists(st.integers(-20, 20), min_size=20),
)
def test_scaling_a_row_by_a_power_of_two_changes_no_bit(F, P, D, seed, exponents):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = make_video(1, F, P, D, torch.float32, device, seed)
    scaled = x * 2.0 ** torch.tensor(exponents[: F * P], device=device)[:, None]
    out = strided_cosine_similarity(x, P)
    assert torch.equal(strided_cosine_similarity(scaled, P), out)
    predecessor = strided_predecessor(1, F * P, P, x.device)
    assert torch.equal(linked_cosine_similarity(scaled, predecessor), out)
    assert (out[0, P:].abs() <= 1 + 1e-6).all()


def test_opcheck(device):
    x = make_video(2, 2, 3, 8, torch.float32, device)
    predecessor = random_predecessor(2, 6, device)
    torch.library.opcheck(torch.ops.fftriton_kernels.strided_cosine_similarity.default, (x, 3))
    torch.library.opcheck(torch.ops.fftriton_kernels.linked_cosine_similarity.default, (x, predecessor))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"strided_cosine_similarity: x must be a torch.Tensor, got list", ([], 1)),
        (TypeError, r"x must have dtype torch.float16 or .*, got torch.float64", (torch.zeros(1, 2, 3).double(), 1)),
        (ValueError, r"x must have shape \[B, N, D\], got \[2, 3\]", (torch.zeros(2, 3), 1)),
        (ValueError, r"stride must be at least 1, got 0", (torch.zeros(1, 2, 3), 0)),
        (TypeError, r"stride must be an int, got float", (torch.zeros(1, 2, 3), 1.0)),
    ],
)
def test_strided_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        strided_cosine_similarity(*arguments)


@pytest.mark.parametrize(
    ("error", "message", "predecessor"),
    [
        (TypeError, r"predecessor must have dtype torch.int32 or torch.int64, got torch.float32", torch.zeros(1, 2)),
        (ValueError, r"predecessor must have shape \[B=1, N=2\], got \[1, 3\]", torch.zeros(1, 3, dtype=torch.int32)),
        (ValueError, r"linked_cosine_similarity: .* one device", torch.zeros(1, 2, dtype=torch.int32, device="meta")),
    ],
)
def test_linked_errors(error, message, predecessor):
    with pytest.raises(error, match=message):
        linked_cosine_similarity(torch.zeros(1, 2, 3), predecessor)
