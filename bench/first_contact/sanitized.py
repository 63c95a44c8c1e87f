"""Each op a few times at small sizes, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

import fftriton_kernels as ops

from .worker import Run


def main(run: Run) -> None:
    N, D, device = (37, 24, "cpu") if run.toy else (337, 136, "cuda")
    with run.check("every op"):
        torch.manual_seed(0)
        x = torch.randn(2, N, D, device=device).to(torch.bfloat16)
        links = (torch.arange(N, device=device) - 7).clamp_min(-1).expand(2, -1).contiguous()
        similarity = ops.linked_cosine_similarity(x, links)
        ops.strided_cosine_similarity(x, 7)
        roots = ops.merge_roots(similarity.abs(), links, 0.02, N // 2)
        ops.merge_roots(similarity, 7, 0.5)
        ops.merge_mean(x, roots, (x[:, :, :3], links), links)
        ops.merge_mean(x, roots, (), 7, capacity=N // 3)
        q, k = (torch.randn(2, N, heads, 64, device=device).to(torch.bfloat16).transpose(1, 2) for heads in (4, 2))
        for queries in (None, 1, 8, 20):
            ops.attention_column_sum(q, k, num_queries=queries)
        ops.attention_column_sum(q.float(), k.float(), columns=(5, N // 2))
        scores = torch.randn(2, N, device=device)
        kept = ops.topk_keep(scores, N // 4)
        ops.topk_keep(scores, N // 4, scores > 0, capacity=N)
        segments, counts = torch.arange(N, device=device) % 5, torch.full((5,), 2, device=device)
        ops.segmented_topk_keep(scores, segments.expand(2, -1), counts.expand(2, -1))
        ops.gather_rows(kept, x, links, scores)
        ops.connected_components(torch.randint(0, N, (400, 2), device=device), N)
        if not run.toy:
            torch.cuda.synchronize()
