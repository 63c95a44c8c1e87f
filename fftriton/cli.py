"""The command line: `fftriton run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .display import Bars, make_progress, print_result, print_run, write_report
from .methods import NAMES
from .request import Options, load_model, prepare
from .run import run as run_prompt

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_BAD_INPUT = 2  # exit code


@app.callback()
def main() -> None:
    """Remove redundant vision tokens inside video language models."""


@app.command()
def run(
    model: Annotated[str | None, typer.Option(help="Checkpoint: a folder or a name on the Hugging Face hub.")] = None,
    video: Annotated[Path | None, typer.Option(help="Video file.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=f"How to reduce: {', '.join(NAMES)}.")] = "framefusion",
    budget: Annotated[str, typer.Option(metavar="FLOAT", help="Vision tokens to keep: a fraction in (0, 1].")] = "0.3",
    compare: Annotated[
        bool | None,
        typer.Option("--compare/--no-compare", help="Run with all tokens, too; on where no video is given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and report.json.")] = Path("fftriton-out"),
    frames: Annotated[int, typer.Option(help="Frames to sample.")] = 16,
    max_pixels: Annotated[int | None, typer.Option(help="Most pixels of a frame; else the checkpoint's own.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; else the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; else the GPU where there is one.")] = None,
) -> None:
    """Ask a model about a video with its vision tokens reduced; print what it costs, draw what merged.

    Without --model it is a small trained model that ships in the package, and without --video two clips that do.
    """
    console = Console()
    try:
        options = Options(
            model=model,
            video=video,
            question=question,
            method=method,
            budget=_parse_budget(budget),
            compare=video is None if compare is None else compare,
            out=out,
            frames=frames,
            max_pixels=max_pixels,
            max_new_tokens=max_new_tokens,
            device=device,
        )
        with make_progress(console) as progress:
            prompts = prepare(options, Bars(progress).open)
            with Bars(progress).open("Loading the model") as on_progress:
                loaded = load_model(options)
                on_progress(1, 1)
    except (ValueError, TypeError) as error:
        Console(stderr=True, style="bold red").print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(_BAD_INPUT) from None
    print_run(console, options)
    results = []
    for prompt in prompts:
        with make_progress(console) as progress:
            results.append(run_prompt(options, loaded, prompt, Bars(progress).open))
        print_result(console, options, results[-1])
    write_report(out / "report.json", options, results)


def _parse_budget(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"budget must be a number in (0, 1], got '{text}'") from None
