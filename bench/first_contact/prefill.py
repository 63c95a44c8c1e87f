"""The prefill of a random decoder of a 7B model's shape: all tokens, FrameFusion, FastV, and a method that keeps all.

Times are elapsed time, with what the host does; weights are random, so nothing here is about accuracy.
"""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import transformers

import fftriton
from bench.prefill.measure import forward, layers_alone, rows_of, sample, timed
from bench.prefill.prompts import SHAPES, Prompt, make_model, make_prompt

from .tracing import trace
from .worker import Run

SHAPE, FRAMES = "7B", 64
METHODS = {
    "dense": None,
    "FrameFusion 0.3": fftriton.FrameFusion(0.3),
    "FastV 0.3": fftriton.FastV(0.3),
    "FrameFusion 0.3, last query": fftriton.FrameFusion(0.3, importance_queries=1),
    "keep-all": fftriton.KeepAll(),
}
TRACED = ("FrameFusion 0.3", "FastV 0.3")
SECONDS = 10  # that a method may take
CAUSAL = "causal multiply-accumulates"
SHORT_ANSWER = {True: 2, False: 16}  # decode steps


def main(run: Run) -> None:
    start = time.time()
    model = shaped_model(run)
    prompt = make_prompt(model, 6, patches=8, text=10) if run.toy else make_prompt(model, FRAMES)
    run.note(
        "model", seconds=time.time() - start, parameters=sum(p.numel() for p in model.parameters()),
        tokens=prompt.embeddings.shape[1], transformers=transformers.__version__,
    )  # fmt: skip
    dense: dict[str, Any] = {}
    for name, method in run.cases(METHODS.items(), SECONDS):
        with run.check(f"prefill {name}"):
            row = measure(run, model, prompt, name, method)
            dense = row if method is None else dense
            if dense:  # else memory was short for it
                row["faster"] = dense["prefill_ms"] / row["prefill_ms"]
                row["faster_by_flops"] = dense["multiply-accumulates"] / row["multiply-accumulates"]
                row["faster_by_causal_flops"] = dense[CAUSAL] / row[CAUSAL]
                row["ratio"] = row["faster"] / row["faster_by_causal_flops"]
            run.note("prefill", method=name, **row)
            assert row["finite"], "logits are not finite"
            assert row["same_logits"], "two runs differ"
            if name == "keep-all" and dense:
                assert row["logits_digest"] == dense["logits_digest"], "keep-all changes the logits"


def shaped_model(run: Run) -> Any:
    """With fewer layers if only compiling matters."""
    if run.toy:
        return make_model("toy", torch.float32, run.device)
    changes = {name: SHAPES["toy"][name] for name in ("vocab_size", "num_hidden_layers")} if run.warm else {}
    return make_model(SHAPE, torch.bfloat16, run.device, **changes)


def measure(run: Run, model: Any, prompt: Prompt, name: str, method: Any) -> dict[str, Any]:
    """A row of figures; the first run compiles and is left out."""
    gc.collect()
    torch.cuda.empty_cache()
    with fftriton.reduce(model, method, prompt.layout) if method else nullcontext() as reduction:
        steps = SHORT_ANSWER[run.toy or run.warm]
        first = sample(model, prompt, steps, reduction)
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        turns = 1 if run.warm else 2 if run.toy else 5
        samples = [sample(model, prompt, steps, reduction) for _ in range(turns)]
        last = samples[-1].logits
        row = {
            "first_prefill_ms": 1e3 * first.prefill,
            "prefill_ms": 1e3 * statistics.median(s.prefill for s in samples),
            "decode_ms": 1e3 * statistics.median(s.decode for s in samples),
            "cache_mib": samples[0].cache / 2**20,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if run.device == "cuda" else None,
            "finite": bool(last.isfinite().all()),
            "same_logits": all(torch.equal(s.logits, last) for s in samples),
            "logits_digest": hashlib.sha256(last.cpu().numpy().tobytes()).hexdigest()[:16],
        }
        if report := first.report:
            row |= {
                "budget": report.budget_achieved,
                "prune_layer": report.prune_layer,
                "merges": [(step.layer, step.tokens_before, step.tokens_after) for step in report.merge_steps],
                "stages_ms": {stage: 1e3 * seconds for stage, seconds in samples[-1].report.seconds.items()},
            }
        row |= {"multiply-accumulates": first.operations, CAUSAL: first.causal_operations}
        if name in TRACED and not run.warm:
            row |= trace(f"prefill, {name}", lambda: forward(model, prompt), run.device, run.out)
    alone = partial(layers_alone, model, prompt, rows_of(model.config, prompt, first.report))
    alone()
    row["limit_ms"] = 1e3 * statistics.median(timed(prompt.embeddings.device, alone)[0] for _ in samples)
    return row | {"of_limit": row["limit_ms"] / row["prefill_ms"]}
