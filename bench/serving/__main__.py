"""Throughput, time to first token, time per token and KV cache of vLLM's server, dense and reduced.

    make serving                                     # a CPU: the small model that ships with fftriton
    python -m bench.serving Qwen/Qwen2.5-VL-7B-Instruct --videos a.mp4,b.mp4 --dtype bfloat16 --frames 64  # a GPU

Needs vLLM beside fftriton; `make vllm` has an environment with both. Each concurrency gets requests of its own, about
the same videos, so that its first ones find some of their videos in the caches, as in a server that runs for long.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.provenance import ROOT, provenance
from bench.serving.load import Load, metric, mix, run
from bench.serving.server import serving
from bench.serving.versions import installed_vllm
from bench.tables import write_csv
from fftriton.runtime.checkpoints import load_config
from fftriton.runtime.shipped import BUNNY, MODEL, NEEDLE
from fftriton.vllm.__main__ import make_overrides

DENSE = "dense"
QUESTIONS = [f"{what} {colour} box ?" for what in ("when", "where", "what") for colour in ("red", "green", "blue")]


@dataclass(frozen=True)
class Row:
    """One line of the CSV file."""

    method: str
    budget: float | None
    concurrency: int
    requests: int
    prompt_tokens: float  # of a request, the mean
    blocks: float  # of the KV cache that a request fills, the mean
    requests_per_s: float
    tokens_per_s: float  # of the answers
    first_p50_ms: float
    first_p95_ms: float
    token_p50_ms: float | None
    token_p95_ms: float | None
    peak_cache_percent: float
    device: str
    vllm: str
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str


def quantile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def row_of(load: Load, method: str, budget: float | None, concurrency: int, block: int, source: dict[str, str]) -> Row:
    """The figures of one load."""
    answered = load.answered
    per_token = [one.per_token_s for one in answered if one.per_token_s is not None]
    return Row(
        method=method,
        budget=budget,
        concurrency=concurrency,
        requests=len(answered),
        prompt_tokens=statistics.mean(one.prompt_tokens for one in answered),
        blocks=statistics.mean(math.ceil((one.prompt_tokens + one.answer_tokens) / block) for one in answered),
        requests_per_s=len(answered) / load.seconds,
        tokens_per_s=sum(one.answer_tokens for one in answered) / load.seconds,
        first_p50_ms=1e3 * quantile([one.first_s for one in answered], 50),
        first_p95_ms=1e3 * quantile([one.first_s for one in answered], 95),
        token_p50_ms=1e3 * quantile(per_token, 50) if per_token else None,
        token_p95_ms=1e3 * quantile(per_token, 95) if per_token else None,
        peak_cache_percent=100 * load.peak_cache,
        **source,
    )


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint (default: the small model that ships with fftriton).")] = "",
    videos: Annotated[str, typer.Option(help="Files, separated by commas (default: the shipped clips).")] = "",
    method: Annotated[str, typer.Option(help="How to reduce.")] = "temporalmerge",
    budget: Annotated[float, typer.Option(help="Vision tokens to keep.")] = 0.3,
    frames: Annotated[int, typer.Option(help="Frames to sample from each video, at most.")] = 16,
    fps: Annotated[float, typer.Option(help="Frames to sample from each second, at most.")] = 8,
    concurrency: Annotated[str, typer.Option(help="Requests at a time, separated by commas.")] = "1,4,16",
    requests: Annotated[int, typer.Option(help="Requests for each concurrency.")] = 64,
    answer: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    max_model_len: Annotated[int, typer.Option(help="Longest prompt with its answer.")] = 2048,
    block: Annotated[int, typer.Option(help="Tokens of a block of the KV cache.")] = 32,
    out: Annotated[Path, typer.Option(help="CSV file.")] = ROOT / "bench" / "results" / "serving.csv",
    toy: Annotated[bool, typer.Option("--toy", help="A few requests, to see that it works.")] = False,
) -> None:
    """Measure a server without and with a method, under the same requests."""
    at_a_time = [int(one) for one in concurrency.split(",")] if not toy else [1, 2]
    requests = 4 if toy else requests
    files = [Path(one) for one in videos.split(",") if one] or [NEEDLE.path, BUNNY.path]
    folder = Path(model or MODEL)
    architecture = load_config(str(folder), False).architectures[0]
    overrides = make_overrides(architecture, method, budget)
    dense = make_overrides(architecture, "keep-all", 1.0) if folder == MODEL else None  # vLLM itself cannot load it
    vllm = installed_vllm()
    source = provenance("cuda" if torch.cuda.is_available() else "cpu", also=("transformers",))
    more = [
        "--media-io-kwargs", json.dumps({"video": {"num_frames": frames, "fps": fps}}), "--block-size", str(block),
        "--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs", str(max(at_a_time)),
    ]  # fmt: skip
    more += [] if torch.cuda.is_available() else ["--enforce-eager"]  # compiling for a CPU takes minutes
    rows = []
    for name, share, given in ((DENSE, None, dense), (method, budget, overrides)):
        with tempfile.TemporaryDirectory() as logs, serving(folder, given, Path(logs) / "log", *more) as address:
            run(address, mix(files, QUESTIONS, 2 * len(files), answer, seed=0), 1)  # warms up
            for seed, one in enumerate(at_a_time, start=1):
                load = run(address, mix(files, QUESTIONS, requests, answer, seed), one)
                rows.append(row_of(load, name, share, one, block, {**source, "vllm": vllm}))
            if metric(address, "vllm:num_preemptions_total"):
                Console(stderr=True).print(f"{name}: requests were put off, as the KV cache was full")
    write_csv(rows, out)
    _show(rows)


def _show(rows: Sequence[Row]) -> None:
    """A column for each method and number of requests at a time."""
    table = Table("", *(f"{row.method}, {row.concurrency}" for row in rows))
    for name in [field.name for field in fields(Row)][3:13]:
        values = [getattr(row, name) for row in rows]
        table.add_row(name, *("" if one is None else f"{one:.4g}" for one in values))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
