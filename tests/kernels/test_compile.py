"""Static shapes: whole merge and prune steps under torch.compile, in CUDA graphs and on tensors without storage."""

import pytest
import torch
from testing_helpers import make_video
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

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

B, F, P, D = 2, 3, 5, 8
N, HEADS = F * P, 2


def make_inputs(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, N, D], q and k [B, H, N, d], max_merges [B]."""
    x = make_video(B, F, P, D, torch.float32, device)
    q = x.unflatten(2, (HEADS, D // HEADS)).transpose(1, 2)
    return x, q, q.flip(2), torch.tensor([4, 9], device=device)


def reduce_step(x: Tensor, q: Tensor, k: Tensor, max_merges: Tensor) -> tuple[Tensor, ...]:
    """A merge and a prune of the merged rows, of fixed shapes."""
    room = x.shape[1]
    roots = merge_roots(strided_cosine_similarity(x, P), P, 0.3, max_merges)
    merged = merge_mean(x, roots, (q.transpose(1, 2), k.transpose(1, 2)), P, capacity=room)
    query, key = (part.transpose(1, 2) for part in merged.companions)
    importance = attention_column_sum(query, key, num_queries=4)
    kept, lengths = topk_keep(importance, max_merges, merged.kept >= 0, capacity=room)
    rows = gather_rows(kept, merged.x, merged.kept, merged.predecessor)
    frames = torch.arange(room, device=x.device) // P
    few = segmented_topk_keep(importance, frames, torch.full_like(frames[:F], 2), capacity=room)
    return *rows, merged.lengths, kept, lengths, *few


def reduce_packed(x: Tensor, scores: Tensor, cu_seqlens: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """The same for packed sequences; attention stands for itself in the scores [T]."""
    room = x.shape[0]
    similarity = strided_cosine_similarity(x, P, cu_seqlens=cu_seqlens)
    roots = merge_roots(similarity, P, 0.3, counts, cu_seqlens=cu_seqlens, max_seqlen=room)
    merged = merge_mean(x, roots, (scores,), P, cu_seqlens=cu_seqlens, capacity=room)
    spans = merged.cu_seqlens
    kept, lengths = topk_keep(merged.companions[0], counts, cu_seqlens=spans, max_seqlen=room, capacity=room)
    return *gather_rows(kept, merged.x, merged.kept, cu_seqlens=spans), merged.lengths, spans, kept, lengths


def reduce_dynamic(x: Tensor, scores: Tensor, cu_seqlens: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """Packed and padded, where only the device knows the number of rows."""
    roots = merge_roots(linked_cosine_similarity(x[None], counts.new_zeros(1, len(x))), P, 0.3)
    merged = merge_mean(x[None], roots, (scores[None],), P)
    roots = merge_roots(strided_cosine_similarity(x, P, cu_seqlens=cu_seqlens), P, 0.3, counts, cu_seqlens=cu_seqlens)
    packed = merge_mean(x, roots, (scores,), P, cu_seqlens=cu_seqlens)
    kept = topk_keep(packed.companions[0], counts, cu_seqlens=packed.cu_seqlens)
    rows = gather_rows(kept, packed.x, packed.kept, cu_seqlens=packed.cu_seqlens)
    segments = torch.zeros_like(roots)
    few = segmented_topk_keep(scores, segments, counts, cu_seqlens=cu_seqlens)
    return (
        merged.x,
        merged.kept,
        *rows,
        packed.lengths,
        packed.cu_seqlens,
        kept,
        few,
        topk_keep(scores[None], counts[:1]),
    )


def packed_inputs(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D], scores [T], cu_seqlens [S+1], counts [S]."""
    x = make_video(1, F, P, D, torch.float32, device)[0]
    cu_seqlens = torch.tensor([0, 6, 6, N], dtype=torch.int32, device=device)
    return x, x[:, 0].contiguous(), cu_seqlens, torch.tensor([1, 0, 3], device=device)


traces_properties = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 cannot trace the property of a named tuple"
)
STEPS = [
    pytest.param(reduce_step, make_inputs, id="padded"),
    pytest.param(reduce_packed, packed_inputs, id="packed", marks=traces_properties),
]
steps = pytest.mark.parametrize(("step", "inputs"), STEPS)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@steps
def test_compiles_in_one_graph(step, inputs, backend, device):
    arguments = inputs(device)
    torch._dynamo.reset()
    out = torch.compile(step, backend=backend, fullgraph=True)(*arguments)
    for ours, eager in zip(out, step(*arguments), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@traces_properties
def test_dynamic_sizes_compile_in_one_graph(device):
    arguments = packed_inputs(device)
    torch._dynamo.reset()
    out = torch.compile(reduce_dynamic, backend="aot_eager", fullgraph=True)(*arguments)
    for ours, eager in zip(out, reduce_dynamic(*arguments), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@pytest.mark.gpu
@steps
def test_runs_in_a_cuda_graph(step, inputs, device):
    arguments = inputs(device)
    fresh = [part.flip(0) if part.is_floating_point() else part.clone() for part in arguments]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*arguments)  # compiles the kernels, which a capture cannot
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*arguments)
    for given in (fresh, [part.clone() for part in inputs(device)]):
        for static, new in zip(arguments, given, strict=True):
            static.copy_(new)
        graph.replay()
        for ours, eager in zip(out, step(*given), strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@pytest.mark.gpu
@steps
def test_the_host_never_waits(step, inputs, device):
    arguments = inputs(device)
    step(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@steps
def test_meta_tensors(step, inputs):
    arguments = inputs("cpu")
    on_meta = step(*(part.to("meta") for part in arguments))
    for shape, eager in zip(on_meta, step(*arguments), strict=True):
        assert shape.is_meta
        assert (shape.shape, shape.dtype) == (eager.shape, eager.dtype)
    edges = torch.zeros(4, 2, dtype=torch.int64, device="meta")
    assert connected_components(edges, 9).shape == (9,)
    x, links = torch.zeros(1, N, D, device="meta"), edges.new_zeros(1, N)
    assert linked_cosine_similarity(x, links).shape == (1, N)


@traces_properties
@pytest.mark.parametrize("capacity", [None, N])
def test_gradients_compile_in_one_graph(capacity, device):
    x, _, _, counts = make_inputs(device)
    roots = merge_roots(strided_cosine_similarity(x, P), P, 0.3, counts)

    def loss(x: Tensor) -> Tensor:
        return (merge_mean(x, roots, (x,), P, capacity=capacity).x ** 2).sum()

    torch._dynamo.reset()
    grads = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            leaf = x.clone().requires_grad_()
            call(leaf).backward()
            grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_sizes_may_be_symbols():
    """As torch.export traces a call whose number of tokens varies."""

    class Step(torch.nn.Module):
        def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
            room = x.shape[1]
            roots = merge_roots(strided_cosine_similarity(x, P), P, 0.3, max_merges=6)
            merged = merge_mean(x, roots, (scores,), P, capacity=room)
            kept, lengths = topk_keep(merged.companions[0], 4, capacity=room)
            heads = x.unflatten(2, (HEADS, D // HEADS)).transpose(1, 2)
            received = attention_column_sum(heads, heads, num_queries=2, columns=(4, room))
            return *gather_rows(kept, merged.x), lengths, topk_keep(scores, 5), received

    x = make_inputs("cpu")[0]
    length = torch.export.Dim("length", min=8, max=4096)
    program = torch.export.export(
        Step(), (x, x[..., 0]), dynamic_shapes=({1: length}, {1: length}), strict=False
    ).module()
    for frames in (F, 9):
        longer = make_video(B, frames, P, D, torch.float32, "cpu")
        for ours, eager in zip(program(longer, longer[..., 0]), Step()(longer, longer[..., 0]), strict=True):
            assert torch.equal(ours, eager)


def test_meta_tensors_have_no_dynamic_size():
    x, roots = torch.zeros(1, 4, 3, device="meta"), torch.zeros(1, 4, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="meta Tensors"):
        merge_mean(x, roots)


def test_fake_tensors():
    real = packed_inputs("cpu")
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = [mode.from_tensor(part, static_shapes=True) for part in real]
        out = reduce_packed(*fake)
        merged = merge_mean(fake[0], torch.zeros_like(fake[1]).long(), cu_seqlens=fake[2])
    for ours, eager in zip(out, reduce_packed(*real), strict=True):
        assert (ours.shape, ours.dtype) == (eager.shape, eager.dtype)
    assert isinstance(merged.x.shape[0], torch.SymInt)
    assert merged.lengths.shape == (3,)


def test_opcheck(device):
    x, scores, cu_seqlens, counts = packed_inputs(device)
    ops = torch.ops.fftriton_kernels
    links = torch.arange(N, device=device) - P
    for bounds, bound, capacity in ((counts, None, None), (None, 2, N)):
        arguments = scores, links, 0, 0.1, bounds, bound, cu_seqlens
        torch.library.opcheck(ops.merge_roots.default, arguments)
        arguments = scores, bound or 0, bounds, scores > 0, cu_seqlens, capacity
        torch.library.opcheck(ops.topk_keep.default, arguments)
    roots = merge_roots(scores, P, 0.1, cu_seqlens=cu_seqlens)[None]
    torch.library.opcheck(ops.merge_mean.default, (x[None], roots, links[None], 0, N + 1))
    torch.library.opcheck(ops.topk_keep.default, (scores[None], 3, None, None, None, N))
    segments = links[None].clamp_max(2)
    torch.library.opcheck(ops.segmented_topk_keep.default, (scores[None], segments, counts[None], N))
