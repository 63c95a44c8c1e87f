"""What a reduction costs in decode: steps of a wrapped model against those of the plain one.

    python -m bench.hf.decode_overhead

Two copies of a random 28-layer Qwen2 share their weights; one of them is being reduced. Both hold the same number of
cached rows, and take their steps in turn, in an order that changes, so that drift hits both alike. A third, plain copy
says how far two equal models are apart: differences below that are noise.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

import fftriton
from bench.provenance import ROOT, provenance
from bench.tables import write_csv
from fftriton.hf.compat import CACHE, cache_in, parameter

RESULTS = ROOT / "bench" / "results"
PATCHES, FRAMES, TEXT = 49, 8, 20
WARM_UP = 10
VOCABULARY = 1024

Step = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Times are milliseconds per step; `overhead` is the median of the paired differences."""

    case: str
    attention: str
    layers: int
    hidden: int
    cached_rows: int
    steps: int
    plain_least: float
    plain_p50: float
    wrapped_least: float
    wrapped_p50: float
    overhead: float
    overhead_percent: float
    noise_percent: float  # the same for two plain models
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        name: how the table calls it.
        method: the reduction.
        attention: the back end.
    """

    name: str
    method: fftriton.Method
    attention: str


CASES = [
    Case("keep-all", fftriton.KeepAll(), "sdpa"),
    Case("reduced", fftriton.UniformFrames(0.5), "sdpa"),
    Case("reduced", fftriton.UniformFrames(0.5), "eager"),
    Case("sizes in attention", fftriton.Anchors(0.5), "sdpa"),
]


def build(layers: int, hidden: int, attention: str, device: str) -> Any:
    """A random Qwen2 of bf16 weights on a GPU, fp32 ones elsewhere."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256),
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def twin(model: Any) -> Any:
    """A copy that shares the weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def prompt(hidden: int, rows: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """[1, rows, D] embeddings."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(1, rows, hidden, generator=generator) * 0.02).to(device, dtype)


def stepper(model: Any, embeddings: torch.Tensor, device: str) -> tuple[Step, int]:
    """A decode step after the prompt, which is undone outside of its timing, and the number of cached rows."""
    cache = cache_in(model(inputs_embeds=embeddings, use_cache=True))
    token = torch.full((len(embeddings), 1), 3, device=device)

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=token, **{parameter(model.forward, "forward", *CACHE): cache})
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        cache.crop(-1)
        return seconds * 1000

    return step, cache.layers[0].keys.shape[-2]


def in_turn(steppers: list[Step], steps: int, label: str) -> list[list[float]]:
    """Milliseconds of each step of each model; the order turns around every time."""
    times: list[list[float]] = [[] for _ in steppers]
    for count in track(range(WARM_UP + steps), label, transient=True):
        order = range(len(steppers)) if count % 2 == 0 else reversed(range(len(steppers)))
        for index in order:
            elapsed = steppers[index]()
            if count >= WARM_UP:
                times[index].append(elapsed)
    return times


@torch.no_grad()
def measure(case: Case, layers: int, hidden: int, steps: int, device: str, about: dict[str, str]) -> Row:
    """One case against the plain model."""
    plain = build(layers, hidden, case.attention, device)
    wrapped, control = twin(plain), twin(plain)
    video = FRAMES * PATCHES
    embeddings = prompt(hidden, TEXT + video, device, plain.dtype)
    layout = [fftriton.VideoLayout(torch.arange(video).view(FRAMES, PATCHES) + TEXT // 2)]
    with fftriton.reduce(wrapped, case.method, layout):
        wrapped_step, rows = stepper(wrapped, embeddings, device)
        plain_step, plain_rows = stepper(plain, embeddings[:, :rows], device)
        control_step, _ = stepper(control, embeddings[:, :rows], device)
        assert rows == plain_rows  # so that both attend to as much
        label = f"{case.name}, {case.attention}"
        plain_times, wrapped_times, control_times = in_turn([plain_step, wrapped_step, control_step], steps, label)
    middle = statistics.median(plain_times)
    overhead = median_difference(wrapped_times, plain_times)
    return Row(
        case=case.name, attention=case.attention, layers=layers, hidden=hidden, cached_rows=rows,
        steps=steps, plain_least=min(plain_times), plain_p50=middle, wrapped_least=min(wrapped_times),
        wrapped_p50=statistics.median(wrapped_times), overhead=overhead, overhead_percent=100 * overhead / middle,
        noise_percent=100 * median_difference(control_times, plain_times) / middle, **about,
    )  # fmt: skip


def median_difference(first: list[float], second: list[float]) -> float:
    """The median of what the pairs differ by."""
    return statistics.median(a - b for a, b in zip(first, second, strict=True))


def table(rows: list[Row]) -> Table:
    """What a reader compares."""
    out = Table("case", "attention", header_style="bold")
    for heading in ("cached rows", "plain p50 ms", "wrapped p50 ms", "overhead ms", "overhead", "noise"):
        out.add_column(heading, justify="right")
    for row in rows:
        out.add_row(
            row.case, row.attention, str(row.cached_rows), f"{row.plain_p50:.3f}", f"{row.wrapped_p50:.3f}",
            f"{row.overhead:+.3f}", f"{row.overhead_percent:+.2f} %", f"{row.noise_percent:+.2f} %",
        )  # fmt: skip
    return out


def main(
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each model.")] = 300,
    layers: Annotated[int, typer.Option(min=1)] = 28,
    hidden: Annotated[int, typer.Option(min=256, help="A multiple of 256.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the default is the GPU, if there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Where the CSV file goes.")] = RESULTS,
    commit: Annotated[str | None, typer.Option(help="Name of this commit, if there is no git.")] = None,
) -> None:
    """Time decode steps of a reduced model against those of the plain one."""
    torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    about = provenance(device, commit, also=("transformers",))
    rows = [measure(case, layers, hidden, steps, device, about) for case in CASES]
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    write_csv(rows, out / f"decode-overhead-{device}.csv")


if __name__ == "__main__":
    typer.run(main)
