"""topk_keep, segmented_topk_keep, gather_rows and connected_components against the reference on a CPU, exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fftriton_kernels as ops
from fftriton_kernels import reference

from .checking import assert_equal, on_cpu, packed, poison, thrice
from .worker import Run

LENGTHS = (17, 2049, 13440, 53761)
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0]
DTYPES = (torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.int64, torch.complex64)
SECONDS = 5  # that a case may take


def main(run: Run) -> None:
    poison()
    torch.manual_seed(0)
    for N, kind in run.cases(product((24,) if run.toy else LENGTHS, ("fp32", "bf16", "ties", "special")), SECONDS):
        with run.check(f"top k N{N} {kind}"):
            check_top(some_scores(2, N, kind, run.device))
    with run.check("top k, packed sequences"):
        check_packed([0, 9, 4] if run.toy else [0, 5000, 3, 2048, 77], run.device)
    for dtype in run.cases(DTYPES, SECONDS):
        with run.check(f"gather_rows {str(dtype).removeprefix('torch.')}"):
            check_gather(*((12, 7, 24) if run.toy else (13440, 4032, 3584)), dtype, run.device)
    with run.check("connected_components"):
        check_components(60 if run.toy else 200_000, 2 if run.toy else 10, run.device)


def check(op: str, *arguments: Any, **options: Any) -> None:
    """Three runs of an op agree, and equal the reference's result."""
    out = thrice(lambda: as_tuple(getattr(ops, op)(*arguments, **options)))
    moved = [on_cpu(value) for value in arguments], {name: on_cpu(value) for name, value in options.items()}
    assert_equal(out, as_tuple(getattr(reference, op)(*moved[0], **moved[1])))


def as_tuple(result: Any) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def some_scores(B: int, N: int, kind: str, device: str) -> Tensor:
    """[B, N]: smooth in fp32 or bf16, with many ties, or of special values alone."""
    scores = torch.randn(B, N, device=device)
    if kind == "ties":
        return (scores * 4).round() / 4
    if kind == "special":
        return torch.tensor(SPECIAL, device=device)[torch.randint(0, len(SPECIAL), (B, N), device=device)]
    return scores.bfloat16() if kind == "bf16" else scores


def check_top(scores: Tensor) -> None:
    (B, N), device = scores.shape, scores.device
    candidates = torch.rand(B, N, device=device) < 0.6
    for k in (0, N // 3):
        check("topk_keep", scores, k)
        check("topk_keep", scores, k, candidates)
    check("topk_keep", scores, torch.tensor([N // 3, N], device=device), candidates, capacity=N)
    segments = torch.randint(-1, 9, (B, N), device=device)
    counts = torch.randint(-1, N // 4 + 2, (B, 9), device=device)
    check("segmented_topk_keep", scores, segments, counts)


def check_packed(lengths: list[int], device: str) -> None:
    bounds = packed(lengths, device)
    scores = torch.randn(sum(lengths), device=device).round(decimals=1)
    candidates = torch.rand_like(scores) < 0.7
    check("topk_keep", scores, 3, candidates, cu_seqlens=bounds)
    check("topk_keep", scores, 3, candidates, cu_seqlens=bounds, capacity=len(scores))


def check_gather(N: int, K: int, D: int, dtype: torch.dtype, device: str) -> None:
    kept = torch.randint(-1, N, (1, K), device=device)
    parts = [torch.randint(0, 100, (1, N, *rest), device=device).to(dtype) for rest in ((), (D,), (3, 128), (1,))]
    strided = parts[2].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    check("gather_rows", kept, *parts, strided)


def check_components(n: int, runs: int, device: str) -> None:
    line = torch.stack([torch.arange(n - 1), torch.arange(1, n)], 1)
    graphs: dict[str, Callable[[], Tensor]] = {
        "line": lambda: line,
        "shuffled line": lambda: torch.randperm(n)[line[torch.randperm(n - 1)]],
        "sparse": lambda: torch.randint(0, n, (n // 2, 2)),
        "dense": lambda: torch.randint(0, n, (4 * n, 2)),
        "star": lambda: torch.stack([torch.full((n,), n - 1), torch.arange(n)], 1),
    }
    for name, make in graphs.items():
        edges = make()
        expected, given = reference.connected_components(edges, n), edges.to(device)
        bad = sum(not torch.equal(ops.connected_components(given, n).cpu(), expected) for _ in range(runs))
        assert not bad, f"{name}: {bad} of {runs} runs are wrong"
