"""A merge and a prune with `capacity=`: no wait of the host, CUDA graphs replayed on new inputs, torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.kernels.measure import QWEN2_7B
from bench.kernels.ops import Shape, attention_inputs, video
from bench.kernels.timing import time_call
from fftriton_kernels import (
    attention_column_sum,
    gather_rows,
    linked_cosine_similarity,
    merge_mean,
    merge_roots,
    topk_keep,
)

from .checking import same_bits
from .kernels import TOY_SHAPE
from .tracing import elapsed_ms
from .worker import Run

SECONDS = 0.1  # for one measurement
COMPILE_SECONDS = 15  # that a compilation may take
MODES = (None, "reduce-overhead")


def merge(x: Tensor, predecessor: Tensor, bound: Tensor) -> tuple[Tensor, ...]:
    """[1, N, D] -> rows, positions, links and their number."""
    roots = merge_roots(linked_cosine_similarity(x, predecessor), predecessor, 0.6, bound)
    merged = merge_mean(x, roots, (), predecessor, capacity=x.shape[1])
    return merged.x, merged.kept, merged.predecessor, merged.lengths


def prune(q: Tensor, k: Tensor, x: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    """The rows that the last query attends to most, and their number."""
    kept, lengths = topk_keep(attention_column_sum(q, k, num_queries=1), keep, capacity=x.shape[1] // 2)
    return *gather_rows(kept, x), kept, lengths


def main(run: Run) -> None:
    shape = TOY_SHAPE if run.toy else Shape(64, *QWEN2_7B)
    x = video(shape, torch.bfloat16, run.device)
    q, k = attention_inputs(shape, torch.bfloat16, run.device).values()
    back = (torch.arange(shape.N, device=run.device) - shape.P).clamp_min(-1)[None]
    share = torch.tensor([shape.N // 3], device=run.device)
    steps: dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]] = {
        "merge": (merge, [x, back, share]),
        "prune": (prune, [q, k, x, share]),
    }
    for name, (step, given) in steps.items():
        fresh = [part.flip(1) if part.is_floating_point() else part.clone() for part in given]
        fresh[-1] //= 2
        if not run.toy:
            with run.check(f"{name}: the host never waits"):
                check_no_wait(step, given)
            with run.check(f"{name} in a CUDA graph"):
                run.note("graph", of=name, N=shape.N, **replayed(step, given, fresh))
        for mode in run.cases(MODES[:1] if run.toy else MODES, COMPILE_SECONDS):
            with run.check(f"{name} under torch.compile, mode {mode}"):
                run.note("compile", of=name, mode=mode, N=shape.N, **compiled(run, step, given, fresh, mode))


def check_no_wait(step: Callable, given: Sequence[Tensor]) -> None:
    step(*given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(step: Callable, given: Sequence[Tensor], fresh: Sequence[Tensor]) -> dict[str, Any]:
    """Capture a step, replay it on other inputs, and time it with and without the graph."""
    expected = step(*fresh)
    static = [part.clone() for part in given]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*static)
    for part, new in zip(static, fresh, strict=True):
        part.copy_(new)
    graph.replay()
    assert same_bits(out, expected), "a replay on new inputs differs from the step itself"
    plain, replay = (time_call(call, "cuda", SECONDS) for call in (lambda: step(*static), graph.replay))
    return {
        "replay_ms": replay.p50, "device_ms": plain.p50, "host_ms": plain.host,
        "elapsed_ms": min(elapsed_ms(lambda: step(*static), "cuda")),
    }  # fmt: skip


def compiled(
    run: Run, step: Callable, given: Sequence[Tensor], fresh: Sequence[Tensor], mode: str | None
) -> dict[str, Any]:
    """The same under torch.compile, as one graph."""
    torch._dynamo.reset()
    call = torch.compile(step, fullgraph=True, mode=mode, backend="aot_eager" if run.toy else "inductor")
    start = time.time()
    call(*given)
    seconds = time.time() - start
    for inputs in (given, fresh):
        assert same_bits(tuple(part.clone() for part in call(*inputs)), step(*inputs)), "differs from the step itself"
    return {"compile_s": seconds, "elapsed_ms": min(elapsed_ms(lambda: call(*given), run.device))}
