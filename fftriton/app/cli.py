"""The command line: `fftriton run`, `batch`, `eval` and `calibrate`.

Most modules are imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from ..methods.registry import names
from .bars import Bars, make_progress

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

# The options of all commands that make up a Target.
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

# The options of run and batch.
Frames = Annotated[int | None, typer.Option(help="Number of frames to sample (default: checkpoint's rule).")]
FPS = Annotated[float | None, typer.Option(help="Frames to sample per second of video.")]
MinFrames = Annotated[int | None, typer.Option(help="Minimum number of frames to sample.")]
MaxFrames = Annotated[int | None, typer.Option(help="Maximum number of frames to sample.")]
Start = Annotated[float | None, typer.Option(help="Second of the video to start from.")]
End = Annotated[float | None, typer.Option(help="Second of the video to end at.")]
MaxPixels = Annotated[int | None, typer.Option(help="Maximum pixels per frame (default: checkpoint's).")]

MethodName = Annotated[str, typer.Option(metavar="NAME", help=f"How to reduce: {', '.join(names())}.")]
Budget = Annotated[str, typer.Option(metavar="FLOAT", help="Vision tokens to keep: a fraction in (0, 1].")]

SettingsFile = Annotated[
    Path | None, typer.Option(help="File of fftriton calibrate, which chooses method, budget and frames.")
]

_FAILED = 2  # exit code: bad input, or a file that cannot be written
_INTERRUPTED = 130


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fftriton {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Remove redundant vision tokens inside video language models."""


@app.command()
def run(
    context: typer.Context,
    model: Model = None,
    video: Annotated[list[Path] | None, typer.Option(help="Video file; may be repeated.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Question about each video; may be repeated.")] = None,
    method: MethodName = "framefusion",
    budget: Budget = "0.3",
    settings: SettingsFile = None,
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
    frames: Frames = None,
    fps: FPS = None,
    min_frames: MinFrames = None,
    max_frames: MaxFrames = None,
    start: Start = None,
    end: End = None,
    max_pixels: MaxPixels = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    dtype: DType = None,
    attention: Attention = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ask a model about a video with its vision tokens reduced; print the cost and draw the merged patches.

    Without --model, a small trained model that ships with fftriton is used; without --video, two shipped clips.
    """
    from dataclasses import replace

    from ..runtime.sampling import Sampling
    from ..runtime.target import Target
    from .display import print_result, print_run, write_report
    from .request import Options, prepare, told_apart
    from .run import run as run_job

    console = Console()
    with _in_one_line(ValueError, TypeError, OSError):
        target = Target(model, device, dtype, attention, max_new_tokens, trust_remote_code)
        sampling = Sampling(frames, fps, min_frames, max_frames, start, end)
        chosen = _choose(context, console, settings, method, budget, target, sampling, max_pixels)
        options = Options(
            target=target,
            method=chosen.method,
            budget=chosen.budget,
            relevance=relevance,
            compare=not video if compare is None else compare,
            out=out,
            sampling=chosen.sampling,
            max_pixels=chosen.max_pixels,
        )
        videos: list[Path | None] = [*video] if video else [None]
        questions: list[str | None] = [*question] if question else [None]
        asked = [replace(options, video=one, question=text) for one in videos for text in questions]
        with make_progress(console) as progress:
            jobs = told_apart([job for each in asked for job in prepare(each, Bars(progress).open)])
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
        earlier = (out / "report.json").exists()
        write_report(out / "report.json", options, results)
        told = "replaced that of an earlier run" if earlier else "written"
        console.print(f"{out / 'report.json'}: {told}", markup=False, highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    task: Annotated[
        str, typer.Option(help="Task: needle, the name of an installed task, module:Class, or FILE.jsonl.")
    ] = "needle",
    methods: Annotated[
        str, typer.Option(help=f"Separated by commas: {', '.join(names())}; NAME:PARAMETER=VALUE sets a parameter.")
    ] = "keep-all,framefusion,fastv,streamingllm,uniformframes,randomtokens",
    budgets: Annotated[str, typer.Option(help="Vision tokens to keep, separated by commas.")] = "0.7,0.5,0.3,0.2,0.1",
    samples: Annotated[int | None, typer.Option(help="Number of questions (default: 500, or all of a file).")] = None,
    seed: Annotated[int, typer.Option(help="Selects the samples; training saw none of them.")] = 0,
    split: Annotated[
        str | None, typer.Option(help="Split of the task; needle: easy (the default), hard, blended, real or long.")
    ] = None,
    frames: Annotated[str, typer.Option(help="Frames per video, separated by commas (default: split's).")] = "",
    model: Model = None,
    reference: Annotated[
        str | None, typer.Option(help="Method to test the others against (default: keep-all, or else the first).")
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
    from ..evaluate.tasks import make_task, sample_count
    from ..methods import split_methods
    from ..runtime.processes import this_process
    from ..runtime.target import Target

    console = Console(stderr=as_json)
    with _in_one_line(ValueError, TypeError, OSError, ImportError):
        lengths = tuple(_parse_frames(length) for length in _split(frames))
        chosen = plan.Plan(
            methods=tuple(split_methods(methods)),
            budgets=tuple(_parse_budget(budget) for budget in _split(budgets)),
            task=task,
            split=split,
            samples=sample_count(make_task(task, split, seed, lengths), samples),
            seed=seed,
            num_frames=lengths,
            target=Target(model, device, dtype, attention, max_new_tokens, trust_remote_code),
            out=out,
            reference=reference,
        )
        with make_progress(console) as progress:
            results, records = runner.evaluate(chosen, Bars(progress).open)
    if not this_process().is_main:
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


@app.command()
def batch(
    context: typer.Context,
    requests: Annotated[
        str,
        typer.Argument(
            help="JSON lines with a video, a question, and whatever differs from the options; a list of videos; "
            "a folder of videos; a video; or - for lines from standard input."
        ),
    ],
    out: Annotated[str, typer.Option(help="File for the answers, a JSON line each; - prints them.")] = "answers.jsonl",
    question: Annotated[
        list[str] | None, typer.Option(help="Question about each video that comes without one; may be repeated.")
    ] = None,
    model: Model = None,
    method: MethodName = "framefusion",
    budget: Budget = "0.3",
    settings: SettingsFile = None,
    batch_size: Annotated[int, typer.Option(help="Number of videos that go through the model together.")] = 1,
    frames: Frames = None,
    fps: FPS = None,
    min_frames: MinFrames = None,
    max_frames: MaxFrames = None,
    start: Start = None,
    end: End = None,
    max_pixels: MaxPixels = None,
    max_new_tokens: MaxNewTokens = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of answers.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Ask again what failed in an earlier run.")] = False,
    device: Device = None,
    dtype: DType = None,
    attention: Attention = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of each failure.")] = False,
) -> None:
    """Answer many questions about many videos, with the vision tokens reduced.

    An interrupted run resumes. A video that fails is a line with an error. Several processes share the requests: on
    GPUs `accelerate launch -m fftriton batch ...`, on CPUs `torchrun --nproc-per-node 2 -m fftriton batch ...`.
    """
    from dataclasses import asdict

    from ..checks import check_count
    from ..runtime.processes import this_process, wait_for_all
    from ..runtime.sampling import Sampling
    from ..runtime.target import Target
    from .answer_file import AnswerFile, StandardOutput
    from .batch import run_batch
    from .clips import make_tasks
    from .requests import Defaults, read_requests

    console, process = Console(stderr=True, quiet=quiet), this_process()
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    with _in_one_line(ValueError, TypeError, OSError), _resumable(console, out):
        check_count("fftriton", "batch_size", batch_size, 1)
        target = Target(model, device, dtype, attention, max_new_tokens, trust_remote_code)
        sampling = Sampling(frames, fps, min_frames, max_frames, start, end)
        chosen = _choose(context, console, settings, method, budget, target, sampling, max_pixels)
        values = {"method": chosen.method, "budget": chosen.budget, "max_pixels": chosen.max_pixels}
        defaults = Defaults(question or [_question(model)], values | asdict(chosen.sampling))
        tasks = make_tasks(read_requests(requests, defaults), target)
        if out == "-":
            answers: AnswerFile | StandardOutput = StandardOutput()
        else:
            answers = AnswerFile(Path(out), overwrite and process.is_main, retry and process.is_main)
        if overwrite or retry:
            wait_for_all()
        keys = [task.key for task in tasks]
        if len(answers.done(keys)) == len(keys):
            console.print(
                f"All {len(keys)} requests are answered: {out}", markup=False, highlight=False, soft_wrap=True
            )
            return
        own = process.own_target(target)
        with make_progress(console, rate=True) as progress, own.own_threads():
            with Bars(progress).open("Loading the model") as on_progress:
                loaded = own.load_model()
                on_progress(1, 1)
            with Bars(progress).open(f"Answering {len(tasks)} requests") as on_progress:
                written, failed = run_batch(tasks, answers, own, loaded, batch_size, process, on_progress)
    console.print(f"{written - failed} answered, {failed} failed: {out}", markup=False, highlight=False, soft_wrap=True)
    if failed == written > 0:
        raise typer.Exit(1)


@app.command()
def calibrate(
    requests: Annotated[
        str,
        typer.Argument(help="As for batch; a line may have an answer, which is the label, and options."),
    ],
    methods: Annotated[
        str, typer.Option(help=f"Separated by commas: {', '.join(names())}; NAME:PARAMETER=VALUE sets a parameter.")
    ] = "framefusion,fastv,uniformframes",
    budgets: Annotated[str, typer.Option(help="Vision tokens to keep, separated by commas.")] = "0.7,0.5,0.3,0.2,0.1",
    keep: Annotated[
        float, typer.Option(help="Overlap with the unreduced model's next-token distributions to keep, 0.5 to 1.")
    ] = 0.98,
    out: Annotated[Path, typer.Option(help="Folder for records, results and settings.json.")] = Path(
        "fftriton-calibrate"
    ),
    question: Annotated[
        list[str] | None, typer.Option(help="Question about each video that comes without one; may be repeated.")
    ] = None,
    model: Model = None,
    frames: Frames = None,
    fps: FPS = None,
    min_frames: MinFrames = None,
    max_frames: MaxFrames = None,
    start: Start = None,
    end: End = None,
    max_pixels: MaxPixels = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    dtype: DType = None,
    attention: Attention = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only what was found, as JSON.")] = False,
) -> None:
    """Find out which method and budget keep the unreduced model's answers to your own requests, without labels.

    An interrupted run resumes. Several processes share the videos: on GPUs `accelerate launch -m fftriton calibrate
    ...`, on CPUs `torchrun --nproc-per-node 2 -m fftriton calibrate ...`.
    """
    from dataclasses import asdict

    from ..methods import split_methods
    from ..runtime.processes import this_process
    from ..runtime.sampling import Sampling
    from ..runtime.target import Target
    from .calibrate import Calibration
    from .calibrate import calibrate as run_calibration
    from .calibrate_output import as_json as found_as_json
    from .calibrate_output import notes, results_table, write_results
    from .requests import Defaults, read_requests

    console = Console(stderr=as_json)
    with _in_one_line(ValueError, TypeError, OSError), _resumable(console, str(out)):
        target = Target(model, device, dtype, attention, max_new_tokens, trust_remote_code)
        sampling = Sampling(frames, fps, min_frames, max_frames, start, end)
        dense = {"method": "keep-all", "budget": 1.0, "max_pixels": max_pixels}
        defaults = Defaults(question or [_question(model)], dense | asdict(sampling))
        plan = Calibration(
            requests=read_requests(requests, defaults),
            methods=tuple(split_methods(methods)),
            budgets=tuple(_parse_budget(budget) for budget in _split(budgets)),
            keep=keep,
            target=target,
            out=out,
            sampling=sampling,
            max_pixels=max_pixels,
        )
        with make_progress(console, rate=True) as progress:
            found = run_calibration(plan, Bars(progress).open)
        if not this_process().is_main:
            return
        files = write_results(plan, found)
        if as_json:
            print(found_as_json(found))
        else:
            console.print(results_table(found.results))
            for note in notes(found):
                console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
            console.print(found.results.advice, style="bold", markup=False, highlight=False, soft_wrap=True)
            console.print("Written: " + ", ".join(map(str, files)), markup=False, highlight=False, soft_wrap=True)
    if not found.results.requests:
        raise typer.Exit(1)


def _choose(
    context: typer.Context, console: Console, settings: Path | None, method: str, budget: str, target: Any,
    sampling: Any, max_pixels: int | None,
) -> Any:  # fmt: skip
    """The method, the budget and the frames: from the options, or from a file of settings."""
    from .chosen import Chosen, choose

    if settings is None:
        return Chosen(method, _parse_budget(budget), sampling, max_pixels)
    sources = {name: context.get_parameter_source(name) for name in ("method", "budget")}
    given = {name: source is not None and source.name != "DEFAULT" for name, source in sources.items()}
    chosen = choose(settings, given, target, sampling, max_pixels)
    for note in chosen.notes:
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return chosen


def _question(model: str | None) -> str:
    """The question about a video that comes without one."""
    from ..runtime.shipped import DEFAULT_QUESTION, NEEDLE

    return NEEDLE.question if model is None else DEFAULT_QUESTION


@contextmanager
def _resumable(console: Console, out: str) -> Iterator[None]:
    """Say on Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        rest = "" if out == "-" else f" What is answered is in {out}: the same command resumes."
        console.print(f"Interrupted.{rest}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None


@contextmanager
def _in_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions that the user can fix into a one-line message and an exit code."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has had enough
        raise
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
