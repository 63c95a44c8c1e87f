"""Every op of fftriton_kernels, the merge step and the prune step: inputs, what they move or compute, and providers.

Bytes and FLOPs are the least that any implementation needs: each input is read once, each output is written once, and
nothing in between. A provider that moves more therefore shows a lower share of the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.kernels import baselines, peers
from fftriton_kernels import (
    attention_column_sum,
    connected_components,
    gather_rows,
    linked_cosine_similarity,
    merge_mean,
    merge_roots,
    segmented_topk_keep,
    strided_cosine_similarity,
    topk_keep,
)

PATCHES = 210
THRESHOLD = 0.6
KEEP = 0.3  # of the tokens, where an op prunes
BOUND = 0.7  # of the tokens: above the share that merges, so the bound is looked at and does not bite

Inputs = dict[str, Any]
Run = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Shape:
    """One video in one model: F frames of P patches, hidden size D, H query and Hkv key heads of d."""

    F: int
    D: int = 3584
    H: int = 28
    Hkv: int = 4
    d: int = 128
    P: int = PATCHES

    @property
    def N(self) -> int:  # noqa: N802
        """Tokens."""
        return self.F * self.P

    @property
    def K(self) -> int:  # noqa: N802
        """Tokens that pruning keeps."""
        return max(1, round(KEEP * self.N))

    def label(self, axes: str) -> str:
        """F64-P210-D3584, say, of the axes that matter: F, D, H (both numbers of heads) or d."""
        parts = {"F": f"F{self.F}-P{self.P}", "D": f"D{self.D}", "H": f"H{self.H}:{self.Hkv}", "d": f"d{self.d}"}
        return "-".join(parts[axis] for axis in axes)


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Args:
        run: called with the op's inputs by name.
        refuse: why it cannot serve them; None if it can.
        may_fail: an error or a wrong result is a note and no failure of the bench: it is not our code.
        dense: holds the op's intermediate of `Op.dense_bytes`.
    """

    run: Run
    refuse: Callable[..., str | None] = lambda **_: None
    may_fail: bool = False
    dense: bool = False


@dataclass(frozen=True)
class Op:
    """One op and its providers, the baseline first.

    Args:
        name: as the results call it.
        tests: the files under tests/kernels that must pass before it gets a number.
        axes: the parts of a shape that it depends on, as in `Shape.label`.
        inputs: (shape, dtype, device) -> arguments by name.
        providers: by name.
        bytes_moved: (shape, bytes per element) -> bytes; None if arithmetic is the bound.
        flops: shape -> FLOPs, of which a multiplication with its addition has two; None if memory is the bound.
        dense_bytes: memory that the whole attention matrix takes in providers that hold it.
        exact: if True, integer results of different providers must be equal. If False, they may differ in which of two
            nearly equal tokens is kept.
    """

    name: str
    tests: tuple[str, ...]
    axes: str
    inputs: Callable[[Shape, torch.dtype, str], Inputs]
    providers: dict[str, Provider]
    bytes_moved: Callable[[Shape, int], int] | None = None
    flops: Callable[[Shape], int] | None = None
    dense_bytes: Callable[[Shape], int] = field(default=lambda shape: 0)
    exact: bool = True


def providers(eager: Run, ours: Run, dense: bool = False, **others: Provider) -> dict[str, Provider]:
    """The baseline, the baseline compiled, other libraries, ours."""

    @cache
    def compiled() -> Run:
        return torch.compile(eager, dynamic=True)  # videos come in every length

    return {
        "eager": Provider(eager, dense=dense),
        "torch.compile": Provider(lambda **inputs: compiled()(**inputs), may_fail=True, dense=dense),
        **{name.replace("_", "-"): provider for name, provider in others.items()},
        "fftriton": Provider(ours),
    }


@cache
def starts(shape: Shape) -> Tensor:
    """[F, P] bool: where a patch shows something new, half of the time and in the first frame; the others repeat it."""
    new = torch.rand(shape.F, shape.P, generator=torch.Generator().manual_seed(0)) < 0.5
    new[0] = True
    return new


def survivors(shape: Shape) -> int:
    """M, the tokens that are left after a merge."""
    return int(starts(shape).sum())


def true_roots(shape: Shape, device: str) -> Tensor:
    """[1, N] int64: the token where what a token shows appeared."""
    frame = torch.arange(shape.F)[:, None]
    first = torch.where(starts(shape), frame, 0).cummax(0).values
    return (first * shape.P + torch.arange(shape.P)).reshape(1, -1).to(device)


def predecessors(shape: Shape, device: str) -> Tensor:
    """[1, N] int64."""
    return (torch.arange(shape.N, device=device) - shape.P).clamp_min(-1)[None]


def video(shape: Shape, dtype: torch.dtype, device: str) -> Tensor:
    """[1, N, D]: repeated patches have a cosine of about 0.8, others of about 0."""
    torch.manual_seed(0)
    shown = torch.randn(shape.N, shape.D, dtype=dtype, device=device)
    noise = torch.randn(shape.N, shape.D, dtype=dtype, device=device)
    return shown[true_roots(shape, device)[0]].add_(noise, alpha=0.5)[None]


def followers(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """What follows the hidden states: rotary cosines and sines [1, N, d], patch numbers [1, N]."""
    angle = torch.rand(2, 1, shape.N, shape.d, device=device)
    patch = torch.arange(shape.N, device=device) % shape.P
    return {"cos": angle[0].to(dtype), "sin": angle[1].to(dtype), "patch": patch[None]}


def distinct_scores(shape: Shape, device: str) -> Tensor:
    """[1, N] fp32 without ties."""
    torch.manual_seed(0)
    return torch.randperm(shape.N, device=device).float()[None] / shape.N


def similarity_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Of merge_roots: similarities as a video of `starts` gives them, no two equal."""
    likeness = 0.3 * distinct_scores(shape, device)
    likeness += torch.where(starts(shape).view(1, -1).to(device), 0.0, 0.65)
    predecessor = predecessors(shape, device)
    likeness[predecessor < 0] = baselines.NO_PARTNER
    return {"similarity": likeness, "predecessor": predecessor, "threshold": THRESHOLD}


def edge_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Of connected_components: the pairs that merge, in any order."""
    torch.manual_seed(0)
    links = torch.stack((torch.arange(shape.N), torch.arange(shape.N) - shape.P), 1)[~starts(shape).flatten()]
    return {"edges": links[torch.randperm(len(links))].to(device), "num_nodes": shape.N}


def frame_budgets(shape: Shape) -> Tensor:
    """[F] int64: tokens that each frame keeps, no two of a short video the same."""
    return torch.arange(shape.F) * 37 % round(2 * KEEP * shape.P)


def segment_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Of segmented_topk_keep: frames with budgets of their own."""
    segments = torch.arange(shape.N, device=device) // shape.P
    counts = frame_budgets(shape).to(device)
    return {"scores": distinct_scores(shape, device), "segments": segments[None], "counts": counts[None]}


def mean_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Of merge_mean."""
    x = video(shape, dtype, device)
    companions = tuple(followers(shape, dtype, device).values())
    return {"x": x, "roots": true_roots(shape, device), "companions": companions}


def gather_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Of gather_rows."""
    x = video(shape, dtype, device)
    kept = distinct_scores(shape, device).topk(shape.K).indices.sort().values
    return {"kept": kept, "tensors": (x, *followers(shape, dtype, device).values())}


def attention_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Queries [1, H, N, d] and keys [1, Hkv, N, d] as a projection lays them out: heads inside tokens."""
    torch.manual_seed(0)
    q = torch.randn(1, shape.N, shape.H, shape.d, dtype=dtype, device=device).transpose(1, 2)
    k = torch.randn(1, shape.N, shape.Hkv, shape.d, dtype=dtype, device=device).transpose(1, 2)
    return {"q": q, "k": k}


def log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    """[1, H, N] fp32 of the causal scores: from flash attention, or computed directly if that is not available."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if q.is_cuda and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, 0.0, True)[1]
    score = q.float() @ k.float().mT * q.shape[3] ** -0.5
    hidden = torch.ones(score.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    return score.masked_fill_(hidden, float("-inf")).logsumexp(-1)


def merge_step_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Of a merge call in the middle of a prefill."""
    return {
        "hidden": video(shape, dtype, device), **followers(shape, dtype, device),
        "predecessor": predecessors(shape, device), "num_patches": shape.P, "threshold": THRESHOLD,
        "max_merges": int(BOUND * shape.N),
    }  # fmt: skip


def prune_step_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Of the prune call."""
    heads = attention_inputs(shape, dtype, device)
    return heads | {"hidden": video(shape, dtype, device), **followers(shape, dtype, device), "keep": shape.K}


def our_merge_mean(x: Tensor, roots: Tensor, companions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ours with the results that the baseline has."""
    merged = merge_mean(x, roots, companions)
    return merged.x, *merged.companions


def our_gather_rows(kept: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ours with the tensors as one argument."""
    return gather_rows(kept, *tensors)


def our_merge_step(
    hidden: Tensor, cos: Tensor, sin: Tensor, patch: Tensor, predecessor: Tensor,
    threshold: float, max_merges: int, num_patches: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The calls that fftriton.FrameFusion makes; the links of the next call, which the baseline lacks, included."""
    similarity = linked_cosine_similarity(hidden, predecessor)
    roots = merge_roots(similarity, predecessor, threshold, max_merges=max_merges)
    merged = merge_mean(hidden, roots, (cos, sin, patch), predecessor=predecessor)
    return merged.x, *merged.companions


def our_prune_step(
    q: Tensor, k: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, patch: Tensor, keep: int
) -> tuple[Tensor, ...]:
    """The calls that fftriton.FrameFusion makes with importance_queries=1."""
    importance = attention_column_sum(q, k, num_queries=1)
    kept, _ = topk_keep(importance, keep, candidates=patch >= 0, capacity=keep)
    return kept, *gather_rows(kept, hidden, cos, sin, patch)


def follower_row(shape: Shape, size: int) -> int:
    """Bytes of one token's cosines, sines and patch number."""
    return 2 * shape.d * size + 8


def last_queries_bytes(shape: Shape, size: int, queries: int) -> int:
    """K and the last queries in, the column sums out."""
    return (shape.Hkv * shape.N + queries * shape.H) * shape.d * size + 4 * shape.N


def matrix_bytes(shape: Shape, queries: int | None = None) -> int:
    """The attention matrix in fp32, twice: scores and weights."""
    return 8 * shape.H * shape.N * (queries or shape.N)


def merge_step_bytes(shape: Shape, size: int) -> int:
    """x in for the similarities, x in for the means, the survivors out; what follows them in and out; links and ids."""
    rows = survivors(shape)
    hidden = (2 * shape.N + rows) * shape.D * size
    return hidden + 2 * rows * follower_row(shape, size) + 8 * (shape.N + rows)


def prune_step_bytes(shape: Shape, size: int) -> int:
    """The last query's attention, then the kept rows in and out."""
    rows = 2 * shape.K * (shape.D * size + follower_row(shape, size))
    return last_queries_bytes(shape, size, 1) + 8 * shape.N + rows


def column_sum_ops() -> list[Op]:
    """The column sum in its four modes."""
    ours, eager = attention_column_sum, baselines.attention_column_sum
    peer = Provider(peers.flash_colreduce, peers.refuse_flash_colreduce, may_fail=True)
    common = {"tests": ("test_attention.py",), "axes": "FHd"}

    def with_lse(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        heads = attention_inputs(shape, dtype, device)
        return heads | {"lse": log_sum_exp(**heads)}

    def last(queries: int) -> Op:
        return Op(
            f"column_sum_last_{queries}",
            inputs=lambda *case: attention_inputs(*case) | {"num_queries": queries},
            providers=providers(eager, ours, flash_colreduce=peer),
            bytes_moved=lambda shape, size: last_queries_bytes(shape, size, queries),
            **common,
        )

    return [
        Op(
            "column_sum",
            inputs=attention_inputs,
            providers=providers(eager, ours, dense=True, flash_colreduce=peer),
            flops=lambda shape: 2 * shape.H * shape.d * shape.N**2,  # the causal half, twice: norms, then sums
            dense_bytes=matrix_bytes,
            **common,
        ),
        Op(
            "column_sum_given_lse",
            inputs=with_lse,
            providers=providers(eager, ours, dense=True, flash_colreduce=peer),
            flops=lambda shape: shape.H * shape.d * shape.N**2,  # the causal half, once
            dense_bytes=matrix_bytes,
            **common,
        ),
        last(1),
        last(4),
    ]


OPS = [
    Op(
        "strided_cosine_similarity",
        ("test_cosine.py",),
        "FD",
        lambda *case: {"x": video(*case), "stride": case[0].P},
        providers(baselines.strided_cosine_similarity, strided_cosine_similarity),
        lambda shape, size: shape.N * shape.D * size + 4 * shape.N,
    ),
    Op(
        "linked_cosine_similarity",
        ("test_cosine.py",),
        "FD",
        lambda *case: {"x": video(*case), "predecessor": predecessors(case[0], case[2])},
        providers(baselines.linked_cosine_similarity, linked_cosine_similarity),
        lambda shape, size: shape.N * shape.D * size + 12 * shape.N,
    ),
    Op(
        "merge_roots",
        ("test_merge.py",),
        "F",
        similarity_inputs,
        providers(baselines.merge_roots, merge_roots),
        lambda shape, size: 20 * shape.N,
    ),
    Op(
        "merge_roots_bounded",
        ("test_merge.py",),
        "F",
        lambda *case: similarity_inputs(*case) | {"max_merges": case[0].N // 4},
        providers(baselines.merge_roots, merge_roots),
        lambda shape, size: 20 * shape.N,
    ),
    Op(
        "merge_mean",
        ("test_merge.py",),
        "FD",
        mean_inputs,
        providers(baselines.merge_mean, our_merge_mean),
        lambda shape, size: (
            (shape.N + survivors(shape)) * shape.D * size
            + 2 * survivors(shape) * follower_row(shape, size)
            + 8 * shape.N
        ),
    ),
    Op(
        "connected_components",
        ("test_components.py",),
        "F",
        edge_inputs,
        providers(
            baselines.connected_components,
            connected_components,
            scipy=Provider(peers.scipy_components, peers.refuse_scipy, may_fail=True),
        ),
        lambda shape, size: 16 * (shape.N - survivors(shape)) + 8 * shape.N,
    ),
    *column_sum_ops(),
    Op(
        "topk_keep",
        ("test_select.py",),
        "F",
        lambda *case: {"scores": distinct_scores(case[0], case[2]), "k": case[0].K},
        providers(baselines.topk_keep, topk_keep),
        lambda shape, size: 4 * shape.N + 8 * shape.K,
    ),
    Op(
        "segmented_topk_keep",
        ("test_select.py",),
        "F",
        segment_inputs,
        providers(baselines.segmented_topk_keep, segmented_topk_keep),
        lambda shape, size: 12 * shape.N + 8 * (shape.F + int(frame_budgets(shape).sum())),
    ),
    Op(
        "gather_rows",
        ("test_select.py",),
        "FD",
        gather_inputs,
        providers(baselines.gather_rows, our_gather_rows),
        lambda shape, size: 2 * shape.K * (shape.D * size + follower_row(shape, size)) + 8 * shape.K,
    ),
    Op(
        "merge_step",
        ("test_cosine.py", "test_merge.py"),
        "FD",
        merge_step_inputs,
        providers(baselines.merge_step, our_merge_step),
        merge_step_bytes,
    ),
    Op(
        "prune_step",
        ("test_attention.py", "test_select.py"),
        "FDHd",
        prune_step_inputs,
        providers(baselines.prune_step, our_prune_step),
        prune_step_bytes,
        exact=False,
    ),
]
