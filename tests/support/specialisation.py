"""How many kernels Triton would compile for prompts of many lengths, counted by Triton's own specialisation key.

    PYTHONPATH=kernels:tests/support python tests/support/specialisation.py

Runs the ops of merge and prune steps on CPU tensors with the launches intercepted, once for each of 60 random lengths,
and prints JSON: the number of different kernels after each, without and after `warm_up`. TRITON_INTERPRET must not be
set.
"""

import json
import random

import torch
from aot import WRITTEN, gpu_target
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fftriton_kernels as ops
from fftriton_kernels import _dispatch, _tiles, _warm_up

HIDDEN, HEADS, KV_HEADS, WIDTH = 896, 14, 2, 64
BACKEND = make_backend(gpu_target("cuda:90"))


def record(seen):
    """Instead of launching: note which kernel Triton would look up; overwrite the arguments."""

    def run(kernel, *positional, grid, warmup=False, **keywords):
        binder = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        _, specialisation, options = binder(*positional, **keywords)
        seen.add(f"{kernel.__name__} {specialisation} {options}")
        for value in positional:
            if isinstance(value, torch.Tensor) and 0 not in value.stride():
                value.fill_(WRITTEN)

    JITFunction.run = run


def prompt(rng):
    """The ops of one prompt of a random length and batch."""
    batch, length = rng.choice((1, 1, 1, 2, 3)), rng.randint(300, 5000)
    x = torch.zeros(batch, length, HIDDEN, dtype=torch.bfloat16)
    links = torch.zeros(batch, length, dtype=torch.int64)
    companions = (links, links + 1, *(torch.zeros(batch, length, WIDTH, dtype=torch.bfloat16) for _ in range(2)))
    similarity = ops.linked_cosine_similarity(x, links)
    roots = ops.merge_roots(similarity, links, 0.6, max_merges=rng.randint(0, length))
    ops.merge_mean(x, roots, companions, links)
    q, k = (
        torch.zeros(batch, length, heads, WIDTH, dtype=torch.bfloat16).transpose(1, 2) for heads in (HEADS, KV_HEADS)
    )
    ops.attention_column_sum(q, k)
    ops.attention_column_sum(q, k, num_queries=rng.choice((1, 4)))
    ops.attention_column_sum(q, k, lse=torch.zeros(batch, HEADS, length))
    ops.topk_keep(similarity, rng.randint(1, length), candidates=links >= 0, capacity=length)
    counts = torch.ones(batch, rng.randint(1, 99), dtype=torch.int64)
    ops.segmented_topk_keep(similarity, torch.zeros_like(links), counts)
    ops.gather_rows(links, x, *companions)


def counts(warm):
    """How many kernels there are after each of 60 prompts, and what `warm_up` had not compiled."""
    seen, rng = set(), random.Random(0)
    record(seen)
    if warm:
        _warm_up.run_ops(HIDDEN, HEADS, KV_HEADS, WIDTH, torch.bfloat16, torch.device("cpu"), axes=1)
    before, numbers = set(seen), []
    for _ in range(60):
        prompt(rng)
        numbers.append(len(seen))
    return {"counts": numbers, "new": sorted(seen - before)}


if __name__ == "__main__":
    _dispatch.INTERPRET = True  # CPU tensors take the launchers' path, to the recorder instead of the interpreter
    _tiles._device = lambda device: ("", "sm90")
    print(json.dumps({"cold": counts(warm=False), "warm": counts(warm=True)}))
