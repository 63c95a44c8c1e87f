"""Timing of prefills in turns, and their distance from the speed-up that the count of operations predicts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import DynamicCache

import fftriton
from bench.first_contact.tracing import synchronize
from bench.prefill.prompts import Prompt
from fftriton.hf.compat import CACHE, cache_in, parameter
from fftriton.hf.flops import prefill_flops, reduced_flops
from fftriton.runtime.measure import memory_before, peak_memory

Out = TypeVar("Out")

DENSE = "dense"
STAGES = ("merge", "prune")  # what a reduction adds to a prefill, as reports name it


@dataclass
class Sample:
    """One prefill and the decode steps after it.

    Attributes:
        prefill, decode: seconds to the first token, and the median of those for each of the next ones.
        cache: bytes of keys and values.
        operations, causal_operations: multiply-accumulates, with the attention's counted in full and up to each row.
        report: of the reduction; None without one.
        logits: [B, 1, V] fp32 of the first token.
    """

    prefill: float
    decode: float
    cache: int
    operations: float
    causal_operations: float
    report: Any
    logits: torch.Tensor


@dataclass
class Result:
    """What several turns of one method gave.

    Attributes:
        prefill, decode: the least of the turns, in seconds.
        limit: that of the layers alone on as many rows.
        stages: seconds of each stage, in the turn of the least prefill.
        cache, peak: bytes of keys and values, and in use at most above those before; None where not known.
        operations, causal_operations: as in Sample.
    """

    prefill: float
    decode: float
    limit: float
    stages: dict[str, float]
    cache: int
    peak: int | None
    operations: float
    causal_operations: float

    @property
    def overhead(self) -> float:
        """The share of the prefill that the reduction itself takes."""
        return sum(self.stages.get(stage, 0.0) for stage in STAGES) / self.prefill

    def against(self, dense: Result) -> tuple[float, float, float]:
        """How many times faster than dense: measured, and by the operations in full and causal."""
        return (
            dense.prefill / self.prefill,
            dense.operations / self.operations,
            dense.causal_operations / self.causal_operations,
        )


def timed(device: torch.device, call: Callable[[], Out]) -> tuple[float, Out]:
    """Seconds until the device has done what is called, and what it returned."""
    synchronize(device.type)
    start = time.perf_counter()
    out = call()
    synchronize(device.type)
    return time.perf_counter() - start, out


@torch.no_grad()
def forward(model: Any, prompt: Prompt) -> Any:
    """The prefill alone."""
    return model(inputs_embeds=prompt.embeddings, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def sample(model: Any, prompt: Prompt, steps: int, reduction: fftriton.Reduction | None = None) -> Sample:
    """Time one prompt and `steps` decode steps, while the reduction holds."""
    device = prompt.embeddings.device
    prefill, out = timed(device, lambda: forward(model, prompt))
    cache, decode = cache_in(out), []
    size = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    token, keyword = out.logits[:, -1:].argmax(-1), parameter(model.forward, "forward", *CACHE)
    for _ in range(steps):
        seconds, step = timed(device, partial(model, input_ids=token, **{keyword: cache}))
        decode.append(seconds)
        token = step.logits[:, -1:].argmax(-1)
    report = None if reduction is None else reduction.report
    full, causal = (operations(model.config, prompt, report, causal) for causal in (False, True))
    return Sample(prefill, statistics.median(decode), size, full, causal, report, out.logits.float())


@torch.no_grad()
def layers_alone(model: Any, prompt: Prompt, rows: Sequence[int]) -> torch.Tensor:
    """The logits [B, 1, V] behind the decoder's layers on so many rows each: the first ones, taken for nothing.

    No reduction that leaves as many rows can be faster.
    """
    decoder, cache = model.model, DynamicCache(config=model.config)
    hidden = prompt.embeddings[:, : rows[0]]
    angles = decoder.rotary_emb(hidden, torch.arange(rows[0], device=hidden.device)[None])
    keyword = parameter(decoder.layers[0].self_attn.forward, "attention", *CACHE)
    for layer, n, behind in zip(decoder.layers, rows, [*rows[1:], rows[-1]], strict=True):
        given = {"position_embeddings": tuple(part[:, :n] for part in angles), "attention_mask": None, keyword: cache}
        hidden = (hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **given)[0])[:, :behind]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden[:, -1:]))


def rows_of(config: Any, prompt: Prompt, report: Any) -> list[int]:
    """The rows that each layer computes: with padding, those of the longest sample."""
    if report is None:
        return [prompt.embeddings.shape[1]] * config.num_hidden_layers
    return [max(rows) for rows in zip(*(one.rows_per_layer for one in report.samples), strict=True)]


def operations(config: Any, prompt: Prompt, report: Any, causal: bool) -> float:
    """Multiply-accumulates of all samples; padding is not counted."""
    batch, tokens = prompt.embeddings.shape[:2]
    if report is None:
        dense = [tokens] * config.num_hidden_layers
        return batch * prefill_flops(config, dense, dense, causal=causal)
    return sum(reduced_flops(config, one, causal=causal) for one in report.samples)


def reduced_sample(model: Any, prompt: Prompt, method: fftriton.Method | None, steps: int) -> Sample:
    """As `sample`, within a reduction by this method, if there is one."""
    with fftriton.reduce(model, method, prompt.layout) if method else nullcontext() as reduction:
        return sample(model, prompt, steps, reduction)


def in_turns(
    model: Any, prompt: Prompt, methods: dict[str, fftriton.Method], *, turns: int, steps: int
) -> Iterator[tuple[str, Result | None]]:
    """Time the dense prefill and each method's in turns, so that a busy machine slows all alike.

    A first turn warms up, compiles, and finds the peak of the memory. A method that runs out of memory, or that cannot
    meet its budget with so few layers, gives None.

    Raises:
        AssertionError: a method gave logits that are not finite, or others in the next turn.
    """
    every: dict[str, fftriton.Method | None] = {DENSE: None, **methods}
    samples: dict[str, list[Sample]] = {}
    peaks: dict[str, int | None] = {}
    for name, method in every.items():
        if method is not None and not _is_possible(method, model.config.num_hidden_layers):
            continue
        before = memory_before(prompt.embeddings.device)
        try:
            samples[name] = [reduced_sample(model, prompt, method, steps)]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        peaks[name] = None if before is None else peak_memory(prompt.embeddings.device) - before
    rows = {name: rows_of(model.config, prompt, some[0].report) for name, some in samples.items()}
    limits: dict[str, list[float]] = {name: [] for name in samples}
    for some in rows.values():
        layers_alone(model, prompt, some)
    for turn in range(turns):
        for name in list(samples) if turn % 2 == 0 else reversed(list(samples)):
            samples[name].append(reduced_sample(model, prompt, every[name], steps))
            alone = partial(layers_alone, model, prompt, rows[name])
            limits[name].append(timed(prompt.embeddings.device, alone)[0])
    for name in every:
        yield name, _result(name, samples[name], min(limits[name]), peaks[name]) if name in samples else None


def _is_possible(method: fftriton.Method, layers: int) -> bool:
    try:
        method.check(layers)
    except ValueError:
        return False
    return True


def _result(name: str, samples: list[Sample], limit: float, peak: int | None) -> Result:
    first, *timed = samples
    assert first.logits.isfinite().all(), f"{name}: logits are not finite"
    assert all(torch.equal(first.logits, other.logits) for other in timed), f"{name}: two turns differ"
    fastest = min(timed, key=lambda one: one.prefill)
    stages = {} if fastest.report is None else fastest.report.seconds
    return Result(
        fastest.prefill, min(one.decode for one in timed), limit, stages, first.cache, peak,
        first.operations, first.causal_operations,
    )  # fmt: skip
