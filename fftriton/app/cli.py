"""The command line: `fftriton run` and `fftriton eval`.

Most modules are imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..methods.registry import names
from .bars import Bars, make_progress

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

# The options of both commands that make up a Target.
Model = Annotated[str | None, typer.Option(help="Checkpoint: a folder or a name on the Hugging Face hub.")]
Device = Annotated[str | None, typer.Option(help="Torch device (default: the GPU if there is one).")]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, else float32).")
]
Attention = Annotated[
    str | None,
    typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2 (default: the model's)."),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Maximum answer length (default: checkpoint's).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the checkpoint to run its own code.")]

_FAILED = 2  # exit code: bad input, or a file that cannot be written


@app.callback()
def main() -> None:
    """Remove redundant vision tokens inside video language models."""


@app.command()
def run(
    model: Model = None,
    video: Annotated[Path | None, typer.Option(help="Video file.")] = None,
    question: Annotated[str | None, typer.Option(help="Question about the video.")] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=f"How to reduce: {', '.join(names())}.")] = "framefusion",
    budget: Annotated[str, typer.Option(metavar="FLOAT", help="Vision tokens to keep: a fraction in (0, 1].")] = "0.3",
    relevance: Annotated[
        str | None, typer.Option(help="For kvtp: a SigLIP that scores the frames, as a folder or a name on the hub.")
    ] = None,
    compare: Annotated[
        bool | None,
        typer.Option(
            "--compare/--no-compare",
            help="Also run without reduction, for comparison (default: on for the shipped clips).",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and report.json.")] = Path("fftriton-out"),
    frames: Annotated[int, typer.Option(help="Number of frames to sample.")] = 16,
    max_pixels: Annotated[int | None, typer.Option(help="Maximum pixels per frame (default: checkpoint's).")] = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    dtype: DType = None,
    attention: Attention = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ask a model about a video with its vision tokens reduced; print the cost and draw the merged patches.

    Without --model, a small trained model that ships with fftriton is used; without --video, two shipped clips.
    """
    from ..runtime.target import Target
    from .display import print_result, print_run, write_report
    from .request import Options, prepare
    from .run import run as run_job

    console = Console()
    with _in_one_line(ValueError, TypeError, OSError):
        options = Options(
            target=Target(model, device, dtype, attention, max_new_tokens, trust_remote_code),
            video=video,
            question=question,
            method=method,
            budget=_parse_budget(budget),
            relevance=relevance,
            compare=video is None if compare is None else compare,
            out=out,
            frames=frames,
            max_pixels=max_pixels,
        )
        with make_progress(console) as progress:
            jobs = prepare(options, Bars(progress).open)
            with Bars(progress).open("Loading the model") as on_progress:
                loaded = options.target.load_model()
                on_progress(1, 1)
    with _in_one_line(OSError, ValueError):
        print_run(console, options)
        results = []
        for job in jobs:
            with make_progress(console) as progress:
                results.append(run_job(options, loaded, job, Bars(progress).open))
            print_result(console, options, results[-1])
        write_report(out / "report.json", options, results)


@app.command("eval")
def evaluate(
    task: Annotated[str, typer.Option(help="Task: needle, the name of an installed task, or module:Class.")] = "needle",
    methods: Annotated[
        str, typer.Option(help=f"Separated by commas: {', '.join(names())}; NAME:PARAMETER=VALUE sets a parameter.")
    ] = "keep-all,framefusion,fastv,streamingllm,uniformframes,randomtokens",
    budgets: Annotated[str, typer.Option(help="Vision tokens to keep, separated by commas.")] = "0.7,0.5,0.3,0.2,0.1",
    samples: Annotated[int, typer.Option(help="Number of questions, each about its own video.")] = 500,
    seed: Annotated[int, typer.Option(help="Selects the samples; training saw none of them.")] = 0,
    split: Annotated[
        str | None, typer.Option(help="Split of the task; needle: easy (the default), hard, blended, real or long.")
    ] = None,
    frames: Annotated[str, typer.Option(help="Frames per video, separated by commas (default: split's).")] = "",
    model: Model = None,
    reference: Annotated[
        str | None, typer.Option(help="Method to test the others against (default: the first that is not keep-all).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for records, results and pictures.")] = Path("fftriton-eval"),
    device: Device = None,
    dtype: DType = None,
    attention: Attention = None,
    trust_remote_code: TrustRemoteCode = False,
    max_new_tokens: MaxNewTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the results, as a JSON list.")] = False,
) -> None:
    """Measure accuracy and cost of methods, all on the same samples.

    An interrupted run resumes. Several processes share the samples: on GPUs `accelerate launch -m fftriton eval ...`,
    on CPUs `torchrun --nproc-per-node 2 -m fftriton eval ...`.
    """
    from ..evaluate import output, plan, rows, runner
    from ..methods import split_methods
    from ..runtime.target import Target

    console = Console(stderr=as_json)
    with _in_one_line(ValueError, TypeError, OSError):
        chosen = plan.Plan(
            methods=tuple(split_methods(methods)),
            budgets=tuple(_parse_budget(budget) for budget in _split(budgets)),
            task=task,
            split=split,
            samples=samples,
            seed=seed,
            num_frames=tuple(_parse_frames(length) for length in _split(frames)),
            target=Target(model, device, dtype, attention, max_new_tokens, trust_remote_code),
            out=out,
            reference=reference,
        )
        with make_progress(console) as progress:
            results, records = runner.evaluate(chosen, Bars(progress).open)
    if not runner.is_main_process():
        return
    with _in_one_line(OSError):
        files = output.write_results(chosen, results, records)
        if as_json:
            print(rows.as_json(results))
            return
        console.print(output.results_table(results))
        for row in results:
            if row.note is not None:
                console.print(
                    f"{row.method} at {row.budget:.0%}: {row.note}", markup=False, highlight=False, soft_wrap=True
                )
            if row.relevance_ms is not None:
                time = f"{row.relevance_ms:.1f} of {row.prefill_ms:.1f} ms and " if row.relevance_ms else ""
                console.print(
                    f"{row.method} at {row.budget:.0%}: relevance takes {time}{row.relevance_gigaflops:.3g} of "
                    f"{row.gigaflops:.3g} GMACs",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
        console.print("Written: " + ", ".join(str(path) for path in files), highlight=False, soft_wrap=True)


@contextmanager
def _in_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions that the user can fix into a one-line message and an exit code."""
    try:
        yield
    except kinds as error:
        Console(stderr=True, style="bold red").print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(_FAILED) from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_frames(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"frames must be numbers separated by commas, got '{text}'") from None


def _parse_budget(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"budget must be a number in (0, 1], got '{text}'") from None


if __name__ == "__main__":
    app()
