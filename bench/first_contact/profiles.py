"""One merge and one prune as fftriton.FrameFusion makes them: launches, waits, idle gaps."""

from __future__ import annotations

from functools import partial

import torch

from bench.kernels.measure import QWEN2_7B
from bench.kernels.ops import Shape, merge_step_inputs, our_merge_step, our_prune_step, prune_step_inputs

from .kernels import TOY_SHAPE
from .tracing import elapsed_ms, trace
from .worker import Run


def main(run: Run) -> None:
    shape = TOY_SHAPE if run.toy else Shape(64, *QWEN2_7B)
    calls = {
        "merge": partial(our_merge_step, **merge_step_inputs(shape, torch.bfloat16, run.device)),
        "prune": partial(our_prune_step, **prune_step_inputs(shape, torch.bfloat16, run.device)),
    }
    for name, call in calls.items():
        with run.check(f"profile of a {name}"):
            call()
            elapsed = min(elapsed_ms(call, run.device))
            run.note("profile", of=name, N=shape.N, elapsed_ms=elapsed, **trace(name, call, run.device, run.out))
