"""attention_column_sum against fp64: head widths, shared key heads, last queries, log-sum-exps, columns, packed."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from testing_helpers import DTYPES, assert_column_sum
from torch import Tensor

from fftriton_kernels import attention_column_sum, reference

from .checking import packed, poison, thrice
from .worker import Run

WIDE = [(28, 4, 128), (14, 2, 64)]  # H, Hkv, d
HEADS = [*WIDE, (16, 16, 128), (64, 8, 128), (6, 2, 80), (4, 2, 256), (12, 2, 17)]
SECONDS = 8  # that a case may take


def main(run: Run) -> None:
    poison()
    N = 20 if run.toy else 1345
    for dtype, heads in run.cases(product(DTYPES, WIDE[1:] if run.toy else HEADS), SECONDS):
        with run.check(f"H{heads[0]}:{heads[1]}-d{heads[2]} {str(dtype).removeprefix('torch.')}"):
            check_heads(N, *heads, dtype, run.device, every_option=heads in WIDE)
    if run.is_last:
        with run.check("packed sequences"):
            check_packed([3, 0, 20] if run.toy else [700, 0, 1, 1345, 130], run.device)
    if not run.toy and run.share[0] == 0:
        with run.check("N13440 H28:4-d128 bfloat16"):
            q, k = make_heads(1, 28, 4, 13440, 13440, 128, torch.bfloat16, "cuda")
            check(q, k)
            check(q, k, num_queries=1)
        with run.check("scores of thousands in fp16"):
            q, k = make_heads(1, 28, 4, 2000, 2000, 128, torch.float16, "cuda")
            total = attention_column_sum(q * 30, k * 30).double().sum()
            torch.testing.assert_close(total, torch.full_like(total, 2000), rtol=1e-4, atol=0)


def make_heads(
    B: int, H: int, Hkv: int, Nq: int, Nk: int, d: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Queries and keys as a projection lays them out: heads inside tokens."""
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(B, Nq, H, d, generator=generator, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(B, Nk, Hkv, d, generator=generator, device=device).to(dtype).transpose(1, 2)
    return q, k


def check(q: Tensor, k: Tensor, **options: Any) -> None:
    out = thrice(lambda: attention_column_sum(q, k, **options))
    assert_column_sum(out, q, k, **options)


def check_heads(N: int, H: int, Hkv: int, d: int, dtype: torch.dtype, device: str, every_option: bool) -> None:
    q, k = make_heads(1, H, Hkv, N, N, d, dtype, device)
    check(q, k)
    check(q, k, num_queries=1)
    if not every_option:
        return
    check(q, k, num_queries=4)
    check(q, k, num_queries=9)
    check(q, k, causal=False)
    check(q, k, columns=(3, N - 7))
    score = (q.double() @ k.double().repeat_interleave(H // Hkv, 1).mT) * d**-0.5
    hidden = torch.ones(N, N, dtype=torch.bool, device=device).triu(1)
    check(q, k, lse=score.masked_fill(hidden, float("-inf")).logsumexp(-1).float())
    check(*make_heads(2, H, Hkv, min(33, N), N, d, dtype, device))


def check_packed(lengths: list[int], device: str) -> None:
    bounds = packed(lengths, device)
    generator = torch.Generator(device).manual_seed(0)
    for dtype, last in product(DTYPES[1:], (None, 1)):
        q, k = (torch.randn(sum(lengths), H, 64, generator=generator, device=device).to(dtype) for H in (14, 2))
        options = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "num_queries": last}
        check(q, k, **options)
        total = reference.attention_column_sum(q, k, **options).sum()
        torch.testing.assert_close(attention_column_sum(q, k, **options).sum(), total, rtol=1e-4, atol=0)
