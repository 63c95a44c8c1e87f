"""Time to first token, decode speed and memory of random Qwen2 decoders, dense and reduced.

    python -m bench.prefill                                      # a CPU: the 0.5B shape
    python -m bench.prefill --shape 7B --frames 8,64,512 --batch 1,8        # a GPU
    python -m bench.prefill.scale results.csv                    # exponents of the cost in the length of the video

`ratio` is the speed-up over the dense prefill of the same run, divided by the one that the count of operations
predicts with causal attention counted as it is computed. Fewer rows use a processor worse, and weights are read however
few there are; `of_limit` leaves that out: it is the time of the layers alone on as many rows, divided by the prefill's.
Weights are random: nothing here is about accuracy.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import is_flash_attn_2_available

from bench.kernels.results import slug
from bench.prefill.measure import DENSE, Result, in_turns
from bench.prefill.prompts import SHAPES, Prompt, make_model, make_prompt, methods
from bench.provenance import ROOT, provenance
from bench.tables import write_csv

RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Without figures: memory was short, or the budget too low for so few layers."""

    shape: str
    layers: int
    dtype: str
    attention: str
    batch: int
    frames: int
    tokens: int  # of each sample
    method: str
    budget: float | None
    prefill_ms: float | None
    limit_ms: float | None  # of its layers alone on as many rows, taken for nothing
    decode_ms: float | None
    merge_ms: float | None
    prune_ms: float | None
    overhead_percent: float | None  # merging and pruning, of this prefill
    cache_mib: float | None
    peak_mib: float | None
    faster: float | None
    predicted: float | None  # by the operations as the papers count them
    predicted_causal: float | None
    ratio: float | None  # faster / predicted_causal
    of_limit: float | None  # limit_ms / prefill_ms
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str


FIGURES = (
    "prefill_ms", "limit_ms", "decode_ms", "merge_ms", "prune_ms", "overhead_percent", "cache_mib", "peak_mib",
    "faster", "predicted", "predicted_causal", "ratio", "of_limit",
)  # fmt: skip


def figures(result: Result | None, dense: Result | None) -> dict[str, float | None]:
    """The measured columns."""
    if result is None:
        return dict.fromkeys(FIGURES)
    faster, predicted, predicted_causal = (None,) * 3 if dense is None else result.against(dense)
    return {
        "prefill_ms": result.prefill * 1e3,
        "limit_ms": result.limit * 1e3,
        "decode_ms": result.decode * 1e3,
        "merge_ms": result.stages.get("merge", 0.0) * 1e3,
        "prune_ms": result.stages.get("prune", 0.0) * 1e3,
        "overhead_percent": 100 * result.overhead,
        "cache_mib": result.cache / 2**20,
        "peak_mib": None if result.peak is None else result.peak / 2**20,
        "faster": faster,
        "predicted": predicted,
        "predicted_causal": predicted_causal,
        "ratio": None if faster is None or predicted_causal is None else faster / predicted_causal,
        "of_limit": result.limit / result.prefill,
    }


def measure_cell(
    model: Any, prompt: Prompt, frames: int, budgets: list[float], *, turns: int, steps: int
) -> list[dict[str, Any]]:
    """The rows of one prompt: the dense prefill, and every method at every budget."""
    compared = {
        f"{name} {budget}": (name, budget, method)
        for budget in budgets
        for name, method in methods(budget, frames).items()
    }
    batch, tokens = prompt.embeddings.shape[:2]
    about = {"batch": batch, "frames": frames, "tokens": tokens}
    rows, dense = [], None
    reductions = {label: method for label, (_, _, method) in compared.items()}
    for label, result in in_turns(model, prompt, reductions, turns=turns, steps=steps):
        name, budget, _ = compared.get(label, (DENSE, None, None))
        dense = result if label == DENSE else dense
        rows.append(about | {"method": name, "budget": budget} | figures(result, dense))
    return rows


def table(rows: list[Row]) -> Table:
    """What a reader compares."""
    out = Table("shape", "dtype", "batch", "tokens", "method", "budget", header_style="bold")
    columns = {
        "prefill_ms": "prefill ms", "decode_ms": "decode ms", "overhead_percent": "reduction %", "cache_mib": "KV MiB",
        "faster": "faster", "predicted_causal": "predicted", "ratio": "ratio", "of_limit": "of limit",
    }  # fmt: skip
    for heading in columns.values():
        out.add_column(heading, justify="right")
    for row in rows:
        budget = "" if row.budget is None else f"{row.budget}"
        values = (getattr(row, column) for column in columns)
        shown = ("" if value is None else f"{value:.3g}" for value in values)
        out.add_row(row.shape, row.dtype, str(row.batch), str(row.tokens), row.method, budget, *shown)
    return out


def parse_list(text: str, kind: type) -> list[Any]:
    """Values between commas.

    Raises:
        typer.BadParameter: one of them is not of this kind, or not positive.
    """
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"must be numbers between commas, got {text!r}") from error
    if not all(value > 0 for value in values):
        raise typer.BadParameter(f"must be positive, got {text!r}")
    return values


def main(
    shape: Annotated[str, typer.Option(help=f"Between commas: {', '.join(SHAPES)}.")] = "0.5B",
    frames: Annotated[str, typer.Option(help="Between commas.")] = "4,8,16",
    batch: Annotated[str, typer.Option(help="Between commas.")] = "1",
    budgets: Annotated[str, typer.Option(help="Between commas.")] = "0.3,0.1",
    dtype: Annotated[str, typer.Option(help="Between commas; the default is bfloat16 on a GPU, else both.")] = "",
    layers: Annotated[int | None, typer.Option(min=3, help="Fewer than the shape has.")] = None,
    patches: Annotated[int, typer.Option(min=1, help="Tokens of a frame.")] = 210,
    redundancy: Annotated[float, typer.Option(min=0, max=1, help="Share of patches that repeat.")] = 0.5,
    turns: Annotated[int, typer.Option(min=1, help="Timed prefills of each; the least counts.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps behind each.")] = 4,
    minutes: Annotated[float, typer.Option(min=0, help="No new cell begins later.")] = 1e9,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the default is the GPU, if there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="The CSV file.")] = None,
    commit: Annotated[str | None, typer.Option(help="Name of this commit, if there is no git.")] = None,
) -> None:
    """Time prefills in turns and compare them with what their operations predict."""
    torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = dtype.split(",") if dtype else ["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]
    shapes, lengths, batches = shape.split(","), parse_list(frames, int), parse_list(batch, int)
    for given, known in ((shapes, SHAPES), (dtypes, ("float32", "bfloat16", "float16"))):
        if unknown := [name for name in given if name not in known]:
            raise typer.BadParameter(f"{unknown[0]!r} must be one of {', '.join(known)}")
    attentions = ["sdpa", *(["flash_attention_2"] if device == "cuda" and is_flash_attn_2_available() else [])]
    kept = parse_list(budgets, float)
    about = provenance(device, commit, also=("transformers",))
    console, deadline = Console(width=None if sys.stdout.isatty() else 140), time.monotonic() + 60 * minutes
    path = out or RESULTS / f"prefill-{slug(about['device'])}.csv"
    rows: list[Row] = []
    for name, kind, attention in itertools.product(shapes, dtypes, attentions):
        changes = {} if layers is None else {"num_hidden_layers": layers}
        model = make_model(name, getattr(torch, kind), device, attention=attention, **changes)
        fixed: dict[str, Any] = {
            "shape": name, "layers": model.config.num_hidden_layers, "dtype": kind, "attention": attention, **about,
        }  # fmt: skip
        for size, length in itertools.product(batches, lengths):
            if time.monotonic() > deadline:
                console.print(f"not run for want of time: {name}, {kind}, {attention}, batch {size}, {length} frames")
                continue
            prompt = make_prompt(model, length, batch=size, patches=patches, redundancy=redundancy)
            cell = measure_cell(model, prompt, length, kept, turns=turns, steps=steps)
            new = [Row(**fixed | row) for row in cell]
            console.print(table(new))
            rows += new
            write_csv(rows, path)  # after each cell, so that an interruption loses one


if __name__ == "__main__":
    typer.run(main)
