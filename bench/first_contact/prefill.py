"""The prefill of a random decoder of a 7B model's shape: all tokens, FrameFusion, FastV, and a method that keeps all.

Times are elapsed time, with what the host does; weights are random, so nothing here is about accuracy.
"""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

import fftriton
from bench.kernels.ops import Shape, video
from fftriton.hf.flops import prefill_flops

from .tracing import synchronize, trace
from .worker import Run

FRAMES, PATCHES, TEXT = 64, 210, 40  # text tokens on either side of the video
QWEN2_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
METHODS = {
    "dense": None,
    "FrameFusion 0.3": fftriton.FrameFusion(0.3),
    "FastV 0.3": fftriton.FastV(0.3),
    "FrameFusion 0.3, last query": fftriton.FrameFusion(0.3, importance_queries=1),
    "keep-all": fftriton.KeepAll(),
}
TRACED = ("FrameFusion 0.3", "FastV 0.3")
SECONDS = 10  # that a method may take
SHORT_ANSWER = {True: 2, False: 16}  # decode steps


@dataclass
class Prompt:
    """A video between two texts, as embeddings, and where the video stands."""

    embeddings: torch.Tensor
    layout: list[fftriton.VideoLayout]


@dataclass
class Sample:
    """One prefill and a few decode steps: milliseconds, the first logits, bytes of keys and values."""

    prefill: float
    decode: float
    logits: torch.Tensor
    cache: int


def main(run: Run) -> None:
    start = time.time()
    model = make_model(run)
    prompt = make_prompt(run, model)
    run.note(
        "model", seconds=time.time() - start, parameters=sum(p.numel() for p in model.parameters()),
        tokens=prompt.embeddings.shape[1], transformers=transformers.__version__,
    )  # fmt: skip
    dense: dict[str, Any] = {}
    for name, method in run.cases(METHODS.items(), SECONDS):
        with run.check(f"prefill {name}"):
            row = measure(run, model, prompt, name, method)
            dense = dense or row
            row["faster"] = dense["prefill_ms"] / row["prefill_ms"]
            row["faster_by_flops"] = dense["multiply-accumulates"] / row["multiply-accumulates"]
            run.note("prefill", method=name, **row)
            assert row["finite"], "logits are not finite"
            assert row["same_logits"], "two runs differ"
            if name == "keep-all":
                assert row["logits_digest"] == dense["logits_digest"], "keep-all changes the logits"


def make_model(run: Run) -> Any:
    """Weights are made on the device; with fewer layers if only compiling matters."""
    shape = dict(SMALL if run.toy else QWEN2_7B)
    if run.warm:
        shape |= {"vocab_size": SMALL["vocab_size"], "num_hidden_layers": SMALL["num_hidden_layers"]}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = Qwen2Config(**shape, **special, max_position_embeddings=65536, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(run.device):
        dtype = torch.float32 if run.toy else torch.bfloat16
        return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def make_prompt(run: Run, model: Any) -> Prompt:
    frames, patches, text = (6, 8, 10) if run.toy else (FRAMES, PATCHES, TEXT)
    width = model.config.hidden_size
    shown = video(Shape(frames, width, P=patches), model.dtype, run.device)
    words = torch.randn(2, 1, text, width, dtype=model.dtype, device=run.device)
    positions = torch.arange(frames * patches).view(frames, patches) + text
    return Prompt(torch.cat([words[0], shown, words[1]], 1), [fftriton.VideoLayout(positions)])


def measure(run: Run, model: Any, prompt: Prompt, name: str, method: Any) -> dict[str, Any]:
    """A row of figures; the first run compiles and is left out."""
    gc.collect()
    torch.cuda.empty_cache()
    with fftriton.reduce(model, method, prompt.layout) if method else nullcontext() as reduction:
        first = sample(run, model, prompt)
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        samples = [sample(run, model, prompt) for _ in range(1 if run.warm else 2 if run.toy else 5)]
        last = samples[-1].logits
        row = {
            "first_prefill_ms": first.prefill,
            "prefill_ms": statistics.median(s.prefill for s in samples),
            "decode_ms": statistics.median(s.decode for s in samples),
            "cache_mib": samples[0].cache / 2**20,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if run.device == "cuda" else None,
            "finite": bool(last.isfinite().all()),
            "same_logits": all(torch.equal(s.logits, last) for s in samples),
            "logits_digest": hashlib.sha256(last.cpu().numpy().tobytes()).hexdigest()[:16],
        }
        if reduction is None:
            rows = attended = [prompt.embeddings.shape[1]] * model.config.num_hidden_layers
        else:
            report = reduction.report
            rows, attended = report.rows_per_layer, report.tokens_per_layer
            row |= {
                "budget": report.budget_achieved,
                "prune_layer": report.prune_layer,
                "merges": [(step.layer, step.tokens_before, step.tokens_after) for step in report.merge_steps],
                "stages_ms": {stage: 1e3 * seconds for stage, seconds in report.seconds.items()},
            }
        row["multiply-accumulates"] = prefill_flops(model.config, rows, attended)
        if name in TRACED and not run.warm:
            row |= trace(f"prefill, {name}", lambda: forward(model, prompt), run.device, run.out)
    return row


@torch.no_grad()
def forward(model: Any, prompt: Prompt) -> Any:
    return model(inputs_embeds=prompt.embeddings, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def sample(run: Run, model: Any, prompt: Prompt) -> Sample:
    synchronize(run.device)
    start = time.perf_counter()
    out = forward(model, prompt)
    synchronize(run.device)
    prefill = (time.perf_counter() - start) * 1e3
    token, cache, steps = out.logits[:, -1:].argmax(-1), out.past_key_values, []
    size = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    for _ in range(SHORT_ANSWER[run.toy or run.warm]):
        start = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        synchronize(run.device)
        steps.append((time.perf_counter() - start) * 1e3)
    return Sample(prefill, statistics.median(steps), out.logits.float(), size)
