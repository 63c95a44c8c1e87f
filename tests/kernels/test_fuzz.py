"""Every public op on arguments that hypothesis draws: on a CPU and by the kernels, against the reference.

`make fuzz` runs these for minutes, the suite for seconds. A failure ends with the call of the test that shows it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from op_inputs import HUGE, Inputs, capacities, dtypes, kinds, layouts, lengths, rows, widths
from op_libraries import ON_A_CPU
from torch import Tensor

import fftriton_kernels
from fftriton_kernels import NO_LINK, reference, verified
from fftriton_kernels._verify import unequal

pytestmark = pytest.mark.fuzz

seeds = st.integers(0, 2**31 - 1)
batches = st.integers(0, 2)
strides = st.one_of(st.integers(1, 50), st.sampled_from(HUGE))
bounds = st.one_of(st.none(), st.integers(0, 50), st.sampled_from(HUGE), st.just("tensor"))


def agree(name: str, *arguments: Any, **options: Any) -> None:
    """Each implementation's operators agree with their formulas, and its whole op with the reference."""
    expected = flat(getattr(reference, name)(*arguments, **options))
    for library in (fftriton_kernels, ON_A_CPU):
        with verified():
            results = flat(getattr(library, name)(*arguments, **options))
        for number, (out, want) in enumerate(zip(results, expected, strict=True)):
            if out.is_floating_point() and name != "gather_rows":  # `verified` has judged its numbers
                out, want = out == NO_LINK, want == NO_LINK
            assert not (fault := unequal(out, want)), f"{name}: result {number}: {fault}"


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results or () for tensor in flat(part)]


def bound_of(inputs: Inputs, bound: int | str | None) -> int | Tensor | None:
    return inputs.counts(inputs.length) if isinstance(bound, str) else bound


@given(
    B=batches, N=rows, D=widths, dtype=dtypes, kind=kinds, layout=layouts, packed=st.booleans(), seed=seeds,
    stride=strides,
)  # fmt: skip
def test_strided_cosine_similarity(B, N, D, dtype, kind, layout, packed, seed, stride):
    inputs = Inputs(B, N, packed, layout, seed)
    x = inputs.floats(*inputs.shape, D, dtype=dtype, kind=kind)
    agree("strided_cosine_similarity", x, stride, **inputs.options)


@given(B=batches, N=rows, D=widths, dtype=dtypes, kind=kinds, layout=layouts, packed=st.booleans(), seed=seeds)
def test_linked_cosine_similarity(B, N, D, dtype, kind, layout, packed, seed):
    inputs = Inputs(B, N, packed, layout, seed)
    x = inputs.floats(*inputs.shape, D, dtype=dtype, kind=kind)
    agree("linked_cosine_similarity", x, inputs.links(outside=False), **inputs.options)


@given(
    B=batches, N=lengths, dtype=dtypes, kind=kinds, layout=layouts, packed=st.booleans(), seed=seeds,
    stride=st.one_of(st.none(), strides), threshold=st.sampled_from([-3.0, -0.5, 0, 0.25, 0.6, 3e38, -3e38]),
    max_merges=bounds, max_seqlen=st.sampled_from([None, 2049, *HUGE]),
)  # fmt: skip
def test_merge_roots(B, N, dtype, kind, layout, packed, seed, stride, threshold, max_merges, max_seqlen):
    inputs = Inputs(B, N, packed, layout, seed)
    similarity = inputs.floats(*inputs.shape, dtype=dtype, kind=kind)
    links = inputs.links(outside=True) if stride is None else stride
    longest = {"max_seqlen": max_seqlen} if packed else {}
    agree("merge_roots", similarity, links, threshold, bound_of(inputs, max_merges), **inputs.options, **longest)


@given(
    B=batches, N=rows, D=widths, dtype=dtypes, kind=kinds, layout=layouts, packed=st.booleans(), seed=seeds,
    stride=st.one_of(st.none(), st.just("links"), strides), joins=st.floats(0, 1), capacity=capacities,
)  # fmt: skip
def test_merge_mean(B, N, D, dtype, kind, layout, packed, seed, stride, joins, capacity):
    inputs = Inputs(B, N, packed, layout, seed)
    x = inputs.floats(*inputs.shape, D, dtype=dtype, kind=kind)
    chained = torch.where(torch.rand(inputs.shape, generator=inputs.random) < joins, 1.0, 0.0).to(inputs.device)
    roots = reference.merge_roots(chained, inputs.links(outside=True), 0.5)
    roots = torch.where(inputs.integers(0, 9, *inputs.shape).to(inputs.device) == 0, inputs.links(outside=True), roots)
    companions = (roots, x, inputs.floats(*inputs.shape, 2, 3, dtype=torch.float16, kind=kind), x[..., None, :1] > 0)
    links = inputs.links(outside=True) if stride == "links" else stride
    agree("merge_mean", x, inputs.arranged(roots), companions, links, capacity=capacity, **inputs.options)


@given(nodes=st.integers(0, 300), edges=st.integers(0, 400), outside=st.integers(0, 5), layout=layouts, seed=seeds)
def test_connected_components(nodes, edges, outside, layout, seed):
    inputs = Inputs(1, 1, False, layout, seed)
    agree("connected_components", inputs.indices(-outside, nodes + outside, edges, 2), nodes)


@given(
    B=batches, N=lengths, dtype=dtypes, kind=kinds, layout=layouts, packed=st.booleans(), seed=seeds,
    k=st.one_of(st.floats(0, 1), st.sampled_from(HUGE), st.just("tensor")), candidates=st.booleans(),
    capacity=capacities, max_seqlen=st.sampled_from([None, 2049, *HUGE]),
)  # fmt: skip
def test_topk_keep(B, N, dtype, kind, layout, packed, seed, k, candidates, capacity, max_seqlen):
    inputs = Inputs(B, N, packed, layout, seed)
    assume(packed or not isinstance(k, int))  # more than N is an error where no sequences are packed
    scores = inputs.floats(*inputs.shape, dtype=dtype, kind=kind)
    mask = inputs.arranged(inputs.integers(0, 2, *inputs.shape) > 0) if candidates else None
    longest = {"max_seqlen": max_seqlen} if packed else {}
    count = bound_of(inputs, int(k * N) if isinstance(k, float) else k)
    agree("topk_keep", scores, count, mask, capacity=capacity, **inputs.options, **longest)


@given(
    B=batches, N=lengths, S=st.integers(0, 7), dtype=dtypes, kind=kinds, layout=layouts, packed=st.booleans(),
    seed=seeds, shared=st.booleans(), capacity=capacities,
)  # fmt: skip
def test_segmented_topk_keep(B, N, S, dtype, kind, layout, packed, seed, shared, capacity):
    inputs = Inputs(B, N, packed, layout, seed)
    scores = inputs.floats(*inputs.shape, dtype=dtype, kind=kind)
    one = shared or packed
    segments = inputs.indices(-1, S, *inputs.shape[-1 if one else 0 :])
    counts = inputs.indices(-2, N // max(S, 1) + 3, *(S,) if one else (B, S))
    agree("segmented_topk_keep", scores, segments, counts, capacity=capacity, **inputs.options)


@given(B=batches, N=lengths, K=lengths, dtype=dtypes, layout=layouts, packed=st.booleans(), seed=seeds,
       trailing=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6))  # fmt: skip
def test_gather_rows(B, N, K, dtype, layout, packed, seed, trailing):
    inputs = Inputs(B, N, packed, layout, seed)
    kept = inputs.indices(-1, N, *inputs.shape[:-1], K)
    kinds = (dtype, torch.int64, torch.uint8, torch.float64, torch.bool, torch.complex128)
    tensors = [
        inputs.arranged(inputs.floats(*inputs.shape, *sizes, dtype=dtype, kind="special").nan_to_num(7, 8, 9).to(to))
        for sizes, to in zip(trailing, kinds, strict=False)
    ]
    agree("gather_rows", kept, *tensors, **inputs.options)


@given(
    B=st.integers(0, 2), H=st.sampled_from([(1, 1), (4, 4), (6, 2), (7, 1)]), Nq=st.integers(0, 40),
    Nk=st.one_of(st.integers(0, 40), st.sampled_from([129, 300])), d=st.integers(1, 40), dtype=dtypes,
    kind=st.sampled_from(["smooth", "ties", "special", "zero"]), layout=layouts, packed=st.booleans(), seed=seeds,
    causal=st.booleans(), scale=st.sampled_from([None, 1, 1e-3, 3.0]), given_lse=st.booleans(),
    num_queries=st.one_of(st.none(), st.integers(1, 9), st.sampled_from(HUGE)), part=st.booleans(),
)  # fmt: skip
def test_attention_column_sum(
    B, H, Nq, Nk, d, dtype, kind, layout, packed, seed, causal, scale, given_lse, num_queries, part
):
    Nk = max(Nk, Nq) if causal and not packed else Nk
    queries, keys = Inputs(B, Nq, packed, layout, seed), Inputs(B, Nk, packed, layout, seed)
    if packed:
        shapes, lead = ((Nq, H[0], d), (Nk, H[1], d)), (H[0],)
        options = {f"cu_seqlens_{name}": x.options["cu_seqlens"] for name, x in (("q", queries), ("k", keys))}
        options |= {"max_seqlen_k": HUGE[seed % len(HUGE)]} if seed % 2 else {}
    else:
        shapes, lead = ((B, H[0], Nq, d), (B, H[1], Nk, d)), (B, H[0])
        num_queries = (num_queries and Nq and min(num_queries, Nq)) or None
        options = {"columns": tuple(keys.integers(0, Nk + 1, 2).sort().values.tolist())} if part else {}
    q, k = (keys.floats(*shape, dtype=dtype, kind=kind) for shape in shapes)
    # in fp32 scores could overflow, in one order of the sums and not in another
    q, k = (torch.where(x.isfinite() & (x.abs() > 1e9), 1, x) for x in (q, k))
    if given_lse and kind != "special":  # else not any value can be a log-sum-exp
        options["lse"] = 3 + keys.floats(*lead, Nq, dtype=torch.float32, kind="special").clamp_min(-9)
    agree("attention_column_sum", q, k, causal=causal, scale=scale, num_queries=num_queries, **options)
