"""The command line: `fftriton run`, `batch`, `eval`, `calibrate`, `inspect` and `doctor`.

Most modules are imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from ..methods.registry import names
from ..runtime.options import (
    BUDGET,
    METHOD,
    CommonOptions,
    MaxPixels,
    ModelOptions,
    ReductionOptions,
    SamplingOptions,
    with_options,
)
from ..runtime.terminal import say, warn, working
from .bars import Bars, make_progress

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Question = Annotated[list[str] | None, typer.Option(help="Question about each video; may be repeated.")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", help="HTML file to write with everything that was found, to open in a browser."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only the results, as JSON.")]


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
@with_options
def run(
    *,
    video: Annotated[list[Path] | None, typer.Option(help="Video file; may be repeated.")] = None,
    question: Question = None,
    model: ModelOptions,
    reduction: ReductionOptions,
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
    report: ReportFile = None,
    as_json: AsJson = False,
    sampling: SamplingOptions,
    common: CommonOptions,
) -> None:
    """Ask a model about a video with its vision tokens reduced; print the cost and draw the merged patches.

    Without --model, a small trained model that ships with fftriton is used; without --video, two shipped clips.
    """
    with working(common.quiet, common.verbose) as messages:
        from dataclasses import replace

        from .display import as_text, describe_results, print_result, print_run, write_report
        from .request import Options, prepare, told_apart
        from .run import run as run_job

        _check_report(report)
        console = Console(quiet=as_json)
        target = model.target()
        chosen = _choose(reduction, target, sampling.sampling())
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
        with make_progress(messages) as progress:
            jobs = told_apart([job for each in asked for job in prepare(each, Bars(progress).open)])
            with Bars(progress).open("Loading the model") as on_progress:
                loaded = options.target.load_model()
                on_progress(1, 1)
        replaced = os.path.exists(out / "report.json")
        if replaced:
            say(messages, f"{out} holds the report of an earlier run, which this one replaces.")
        print_run(console, options)
        results = []
        for job in jobs:
            with make_progress(messages) as progress:
                results.append(run_job(options, loaded, job, Bars(progress).open))
            print_result(console, options, results[-1])
        content = describe_results(options, results)
        write_report(out / "report.json", content)
        say(console, f"{out / 'report.json'}: {'replaced that of an earlier run' if replaced else 'written'}")
        if report is not None:
            from .report import write_run_page

            write_run_page(report, options, results)
            say(console, f"Report: {report}")
        if as_json:
            print(as_text(content))


@app.command("eval")
@with_options
def evaluate(
    *,
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
        str | None,
        typer.Option(
            help="Split of the task; needle: easy (the default), hard, blended, real, long, or for another model that "
            "ships relations, small, brief, moving or longer.",
        ),
    ] = None,
    frames: Annotated[str, typer.Option(help="Frames per video, separated by commas (default: split's).")] = "",
    model: ModelOptions,
    reference: Annotated[
        str | None, typer.Option(help="Method to test the others against (default: keep-all, or else the first).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for records, results and pictures.")] = Path("fftriton-eval"),
    as_json: AsJson = False,
    common: CommonOptions,
) -> None:
    """Measure accuracy and cost of methods, all on the same samples.

    An interrupted run resumes. Several processes share the samples: on GPUs `accelerate launch -m fftriton eval ...`,
    on CPUs `torchrun --nproc-per-node 2 -m fftriton eval ...`.
    """
    resumes = f"The answers so far are in {out}: the same command resumes."
    with working(common.quiet, common.verbose, resumes) as messages:
        from ..evaluate import output, plan, rows, runner
        from ..evaluate.tasks import make_task, sample_count
        from ..methods import split_methods
        from ..runtime.processes import this_process

        lengths = tuple(_parse_frames(length) for length in _split(frames))
        chosen = plan.Plan(
            methods=tuple(split_methods(methods)),
            budgets=tuple(_parse_budget(budget) for budget in _split(budgets)),
            task=task,
            split=split,
            samples=sample_count(make_task(task, split, seed, lengths), samples),
            seed=seed,
            num_frames=lengths,
            target=model.target(),
            out=out,
            reference=reference,
        )
        replaced = os.path.exists(out / output.RESULTS)
        if replaced:
            say(messages, f"{out} holds the results of an earlier run, which this one replaces; its answers are kept.")
        with make_progress(messages) as progress:
            results, records = runner.evaluate(chosen, Bars(progress).open)
        if not this_process().is_main:
            return
        files = output.write_results(chosen, results, records)
        if as_json:
            print(rows.as_json(results))
            return
        output.print_results(Console(), results)
        say(Console(), "Written: " + ", ".join(map(str, files)))


@app.command()
@with_options
def batch(
    *,
    requests: Annotated[
        str,
        typer.Argument(
            help="JSON lines with a video, a question, and whatever differs from the options; a list of videos; "
            "a folder of videos; a video; or - for lines from standard input."
        ),
    ],
    out: Annotated[str, typer.Option(help="File for the answers, a JSON line each; - prints them.")] = "answers.jsonl",
    question: Question = None,
    model: ModelOptions,
    reduction: ReductionOptions,
    batch_size: Annotated[int, typer.Option(help="Number of videos that go through the model together.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of answers.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Ask again what failed in an earlier run.")] = False,
    sampling: SamplingOptions,
    common: CommonOptions,
) -> None:
    """Answer many questions about many videos, with the vision tokens reduced.

    An interrupted run resumes. A video that fails is a line with an error. --question is asked about videos that come
    without one. Several processes share the requests: on GPUs `accelerate launch -m fftriton batch ...`, on CPUs
    `torchrun --nproc-per-node 2 -m fftriton batch ...`.
    """
    resumes = "" if out == "-" else f"What is answered is in {out}: the same command resumes."
    with working(common.quiet, common.verbose, resumes) as messages:
        from dataclasses import asdict

        from ..checks import check_count
        from ..runtime.processes import this_process, wait_for_all
        from .answer_file import AnswerFile, StandardOutput
        from .batch import run_batch
        from .clips import make_tasks
        from .requests import Defaults, read_requests

        process = this_process()
        check_count("fftriton", "batch_size", batch_size, 1)
        target = model.target()
        chosen = _choose(reduction, target, sampling.sampling())
        values = {"method": chosen.method, "budget": chosen.budget, "max_pixels": chosen.max_pixels}
        defaults = Defaults(question or [_question(model.model)], values | asdict(chosen.sampling))
        tasks = make_tasks(read_requests(requests, defaults), target)
        if (overwrite or retry) and not process.is_main:
            wait_for_all()  # for the main process, which has the file to itself until then
        if out == "-":
            answers: AnswerFile | StandardOutput = StandardOutput()
        else:
            answers = AnswerFile(Path(out), overwrite and process.is_main, retry and process.is_main)
        if (overwrite or retry) and process.is_main:
            wait_for_all()
        keys = [task.key for task in tasks]
        if len(answers.done(keys)) == len(keys):
            none = answers.all_failed(keys)
            say(messages, f"All {len(keys)} requests {'have failed' if none else 'are answered'}: {out}")
            raise typer.Exit(int(none))
        own = process.own_target(target)
        with make_progress(messages, rate=True) as progress, own.own_threads():
            with Bars(progress).open("Loading the model") as on_progress:
                loaded = own.load_model()
                on_progress(1, 1)
            with Bars(progress).open(f"Answering {len(tasks)} requests") as on_progress:
                written, failed = run_batch(tasks, answers, own, loaded, batch_size, process, on_progress)
        say(messages, f"{written - failed} answered, {failed} failed: {out}")
        if answers.all_failed(keys):
            raise typer.Exit(1)


@app.command()
@with_options
def calibrate(
    *,
    requests: Annotated[
        str,
        typer.Argument(help="As for batch; a line may have an answer, which is the label, and options."),
    ],
    methods: Annotated[
        str, typer.Option(help=f"Separated by commas: {', '.join(names())}; NAME:PARAMETER=VALUE sets a parameter.")
    ] = "framefusion,anchors,fastv,uniformframes",
    budgets: Annotated[str, typer.Option(help="Vision tokens to keep, separated by commas.")] = "0.7,0.5,0.3,0.2,0.1",
    keep: Annotated[
        float, typer.Option(help="Overlap with the unreduced model's next-token distributions, from 0.5 to below 1.")
    ] = 0.98,
    out: Annotated[Path, typer.Option(help="Folder for records, results and settings.json.")] = Path(
        "fftriton-calibrate"
    ),
    question: Question = None,
    model: ModelOptions,
    sampling: SamplingOptions,
    max_pixels: MaxPixels = None,
    report: ReportFile = None,
    as_json: AsJson = False,
    common: CommonOptions,
) -> None:
    """Find out which method and budget keep the unreduced model's answers to your own requests, without labels.

    An interrupted run resumes. Several processes share the videos: on GPUs `accelerate launch -m fftriton calibrate
    ...`, on CPUs `torchrun --nproc-per-node 2 -m fftriton calibrate ...`.
    """
    resumes = f"What is compared is in {out}: the same command resumes."
    with working(common.quiet, common.verbose, resumes) as messages:
        from dataclasses import asdict

        from ..methods import split_methods
        from ..runtime.files import check_out
        from ..runtime.processes import this_process
        from .calibrate import Calibration
        from .calibrate import calibrate as run_calibration
        from .calibrate_output import as_json as found_as_json
        from .calibrate_output import notes, results_table, write_results
        from .requests import Defaults, read_requests

        _check_report(report)
        dense = {"method": "keep-all", "budget": 1.0, "max_pixels": max_pixels}
        defaults = Defaults(question or [_question(model.model)], dense | asdict(sampling.sampling()))
        plan = Calibration(
            requests=read_requests(requests, defaults),
            methods=tuple(split_methods(methods)),
            budgets=tuple(_parse_budget(budget) for budget in _split(budgets)),
            keep=keep,
            target=model.target(),
            out=out,
            sampling=sampling.sampling(),
            max_pixels=max_pixels,
        )
        check_out(out)
        with make_progress(messages, rate=True) as progress:
            found = run_calibration(plan, Bars(progress).open, with_example=report is not None)
        if not this_process().is_main:
            return
        files = write_results(plan, found)
        if report is not None:
            from .report import write_calibration_page

            write_calibration_page(report, plan, found, files)
            files.append(report)
        console = Console(quiet=as_json)
        if as_json:
            print(found_as_json(found))
        console.print(results_table(found.results))
        for note in notes(found):
            console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
        console.print(found.results.advice, style="bold", markup=False, highlight=False, soft_wrap=True)
        say(console, "Written: " + ", ".join(map(str, files)))
    if not found.results.requests:
        raise typer.Exit(1)


@app.command()
@with_options
def inspect(
    *,
    video: Annotated[Path | None, typer.Option(help="Video file (default: a shipped clip).")] = None,
    question: Annotated[str | None, typer.Option(help="Question about the video.")] = None,
    model: ModelOptions,
    out: Annotated[Path, typer.Option(help="Folder for pictures and tables.")] = Path("fftriton-inspect"),
    report: ReportFile = None,
    as_json: AsJson = False,
    sampling: SamplingOptions,
    max_pixels: MaxPixels = None,
    common: CommonOptions,
) -> None:
    """Show where a video is redundant to a model: similarity and importance of its tokens in every layer.

    Draws the analyses of FrameFusion's paper, writes their figures as CSV, and suggests a similarity threshold.
    """
    with working(common.quiet, common.verbose) as messages:
        from .inspect import as_json as inspection_as_json
        from .inspect import default_video, layers_table, write_inspection
        from .inspect import inspect as run_inspection
        from .request import Options, prepare

        _check_report(report)
        options = Options(
            target=model.target(),
            video=default_video(video),
            question=question,
            method="keep-all",
            budget=1.0,
            out=out,
            sampling=sampling.sampling(),
            max_pixels=max_pixels,
        )
        with make_progress(messages) as progress:
            bars = Bars(progress)
            (job,) = prepare(options, bars.open)
            with bars.open("Loading the model") as on_progress:
                loaded = options.target.load_model()
                on_progress(1, 1)
            inspection = run_inspection(options, loaded, job, bars.open)
            files = write_inspection(options, inspection, bars.open)
        if report is not None:
            from .report import write_inspection_page

            write_inspection_page(report, options, inspection, files)
            files.append(report)
        console = Console(quiet=as_json)
        if as_json:
            print(inspection_as_json(options, inspection, files))
        console.print(layers_table(inspection))
        say(console, f"Half of the tokens are at least {inspection.threshold} similar at the first layer:")
        say(console, f"  --method {inspection.method}")
        say(console, "Written: " + ", ".join(map(str, files)))


@app.command()
@with_options
def doctor(
    *,
    device: Annotated[
        str | None, typer.Option(help="Torch device to test the ops on (default: the GPU if there is one).")
    ] = None,
    as_json: AsJson = False,
    common: CommonOptions,
) -> None:
    """Say what is installed and whether it works, test every op against its formula, and say what to install for what.

    The exit code is 1 if anything is wrong: something that fftriton needs is missing, something installed is broken or
    not supported, or an op fails.
    """
    with working(common.quiet, common.verbose, uses_transformers=False) as messages:
        from .doctor import examine
        from .doctor_output import as_json as diagnosis_as_json
        from .doctor_output import print_diagnosis

        with make_progress(messages) as progress, Bars(progress).open("Examining") as on_progress:
            diagnosis = examine(device, on_progress)
        print_diagnosis(Console(quiet=as_json), diagnosis)
        if as_json:
            print(diagnosis_as_json(diagnosis))
    if diagnosis.faults:
        raise typer.Exit(1)


def _choose(reduction: ReductionOptions, target: Any, sampling: Any) -> Any:
    """The method, the budget and the frames: from the options, or from a file of settings."""
    from .chosen import Chosen, choose

    method, budget, pixels = reduction.method, reduction.budget, reduction.max_pixels
    if reduction.settings is None:
        return Chosen(method or METHOD, _parse_budget(budget or BUDGET), sampling, pixels)
    given = {"method": method is not None, "budget": budget is not None}
    chosen = choose(reduction.settings, given, target, sampling, pixels)
    for note in chosen.notes:
        warn(note)
    return chosen


def _check_report(report: Path | None) -> None:
    """Raise a ValueError if the report cannot be written."""
    from ..runtime.files import check_file

    if report is not None:
        check_file("report", report)


def _question(model: str | None) -> str:
    """The question about a video that comes without one."""
    from ..runtime.shipped import DEFAULT_QUESTION, NEEDLE

    return NEEDLE.question if model is None else DEFAULT_QUESTION


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
