"""Similarities, roots and means against fp64; three runs bit for bit; races provoked."""

from __future__ import annotations

from itertools import product

import torch
from testing_helpers import DTYPES, assert_no_worse_than_torch, make_video
from torch import Tensor

import fftriton_kernels as ops
from fftriton_kernels import reference
from fftriton_kernels._groups import rank_groups

from .checking import assert_equal, on_cpu, packed, poison, same_bits, thrice
from .worker import Run

SHAPES = [  # B, F, P, D
    (2, 3, 7, 65), (1, 64, 210, 3584), (2, 20, 49, 896), (1, 9, 100, 4097), (1, 5, 33, 8192), (3, 17, 1, 1),
]  # fmt: skip
TOY = [(2, 3, 3, 33)]
SECONDS = 8  # that a case may take


def main(run: Run) -> None:
    poison()
    torch.manual_seed(0)
    for dtype, shape in run.cases(product(DTYPES, TOY if run.toy else SHAPES), SECONDS):
        name = f"B{shape[0]}-F{shape[1]}-P{shape[2]}-D{shape[3]} {str(dtype).removeprefix('torch.')}"
        x, P = make_video(*shape, dtype, run.device), shape[2]
        links = some_links(*x.shape[:2], P, run.device)
        similarity = torch.rand(x.shape[:2], device=run.device).round(decimals=3)
        with run.check(f"similarity {name}"):
            check_similarity(x, P, links)
        with run.check(f"merge_roots {name}"):
            check_roots(similarity, P, links)
        with run.check(f"merge_mean {name}"):
            check_mean(x, similarity, P, links)
    if run.is_last:
        with run.check("packed sequences"):
            check_packed([0, 5, 7] if run.toy else [0, 3001, 1, 210, 1777], run.device)
        with run.check("races: long chains"):
            check_chains(300 if run.toy else 200_000, 2 if run.toy else 20, run.device)
        if not run.toy:
            with run.check("a side stream, reused memory"):
                check_side_stream()


def some_links(B: int, N: int, P: int, device: str) -> Tensor:
    """[B, N] int64: one or two frames back, or none."""
    back = P * torch.randint(1, 3, (B, N), device=device)
    links = torch.arange(N, device=device) - back
    return torch.where(torch.rand(B, N, device=device) < 0.2, -1, links).clamp_min(-1)


def check_similarity(x: Tensor, P: int, links: Tensor) -> None:
    strided = (torch.arange(x.shape[1], device=x.device) - P).clamp_min(-1).expand(len(x), -1)
    for call, partner in (
        (lambda: ops.strided_cosine_similarity(x, P), strided),
        (lambda: ops.linked_cosine_similarity(x, links), links),
        (lambda: ops.linked_cosine_similarity(x, links.int()), links),
    ):
        out = thrice(call)
        eager = reference.linked_cosine_similarity(x, partner)
        assert_no_worse_than_torch(out, eager, reference.linked_cosine_similarity(x.double(), partner))


def check_roots(similarity: Tensor, P: int, links: Tensor) -> None:
    B, N = similarity.shape
    bounds = (None, N // 4, torch.full((B,), N // 3, device=similarity.device))
    for bound in bounds:
        for predecessor in (P, links):
            roots = thrice(lambda: ops.merge_roots(similarity, predecessor, 0.4, bound))  # noqa: B023
            expected = reference.merge_roots(similarity.cpu(), on_cpu(predecessor), 0.4, on_cpu(bound))
            assert_equal([roots], [expected])


def check_mean(x: Tensor, similarity: Tensor, P: int, links: Tensor) -> None:
    B, N, _ = x.shape
    roots = ops.merge_roots(similarity, P, 0.4)
    heads = torch.randn(3, B, N, 16, device=x.device).to(x.dtype).permute(1, 2, 0, 3)  # strided, as mRoPE lays them out
    companions = (heads, torch.arange(N, device=x.device).expand(B, -1))
    for capacity in (None, N, max(1, N // 2)):
        out = thrice(lambda: ops.merge_mean(x, roots, companions, links, capacity=capacity))  # noqa: B023
        given = (roots, companions, links)
        eager = reference.merge_mean(x, *given, capacity=capacity)
        truth = reference.merge_mean(x.double(), *given, capacity=capacity)
        assert_no_worse_than_torch(out.x, eager.x, truth.x)
        rest = (out.kept, out.lengths, out.predecessor, *out.companions)
        assert_equal(rest, [on_cpu(part) for part in (eager.kept, eager.lengths, eager.predecessor, *eager.companions)])


def check_packed(lengths: list[int], device: str) -> None:
    cu_seqlens = packed(lengths, device)
    x = torch.randn(sum(lengths), 128, device=device).to(torch.bfloat16)
    x[3::4] = x[: len(x[3::4])].clone()
    similarity = ops.strided_cosine_similarity(x, 3, cu_seqlens=cu_seqlens)
    eager = reference.strided_cosine_similarity(x, 3, cu_seqlens=cu_seqlens)
    truth = reference.strided_cosine_similarity(x.double(), 3, cu_seqlens=cu_seqlens)
    assert_no_worse_than_torch(similarity, eager, truth)
    for bound in (None, 20):
        roots = ops.merge_roots(similarity, 3, 0.1, bound, cu_seqlens=cu_seqlens)
        expected = reference.merge_roots(similarity.cpu(), 3, 0.1, bound, cu_seqlens=cu_seqlens.cpu())
        assert_equal([roots], [expected])
    out = ops.merge_mean(x, roots, (), 3, cu_seqlens=cu_seqlens)
    expected = reference.merge_mean(x.cpu(), roots.cpu(), (), 3, cu_seqlens=cu_seqlens.cpu())
    assert_equal((out.kept, out.lengths, out.predecessor), (expected.kept, expected.lengths, expected.predecessor))


def check_chains(N: int, runs: int, device: str) -> None:
    ones = torch.ones(1, N, device=device)
    anywhere = (torch.rand(1, N, device=device) * torch.arange(N, device=device)).long()
    for name, predecessor in {"line": 1, "frames": 210, "anywhere": anywhere}.items():
        expected = reference.merge_roots(ones.cpu(), on_cpu(predecessor), 0.5)
        bad = sum(not torch.equal(ops.merge_roots(ones, predecessor, 0.5).cpu(), expected) for _ in range(runs))
        assert not bad, f"{name}: {bad} of {runs} runs are wrong"
    roots = ops.merge_roots(ones, 210, 0.5)
    expected = reference.group_rows(roots.cpu(), 210)
    for _ in range(runs):
        groups = rank_groups(roots, None, 210, None)
        assert_equal([groups.members(roots).long(), groups.lengths], [expected.members, expected.lengths])


def check_side_stream() -> None:
    x, stream = make_video(1, 64, 210, 896, torch.bfloat16, "cuda"), torch.cuda.Stream()

    def step() -> tuple[Tensor, Tensor]:
        roots = ops.merge_roots(ops.strided_cosine_similarity(x, 210), 210, 0.6)
        merged = ops.merge_mean(x, roots, (), 210)
        return merged.x, merged.kept

    expected = step()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(30):
        with torch.cuda.stream(stream):
            out = step()
        torch.full((2**22,), float("nan"), device="cuda")  # the other stream takes and frees memory meanwhile
        stream.synchronize()
        assert same_bits(out, expected)
