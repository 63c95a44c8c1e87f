"""The commands of SparseKV-QA: python -m fftriton.labels read, label and split."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from ..runtime.files import check_out
from ..runtime.options import CommonOptions, with_options
from ..runtime.terminal import say, working
from .datasets import SETS, Files
from .questions import read_questions, write_questions
from .splitting import split as split_questions

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Set = Enum("Set", {name: name for name in SETS}, type=str)  # type: ignore[misc]

_SHOWN = 5  # failures that are printed


@app.command()
@with_options
def read(
    *,
    data_set: Annotated[Set, typer.Argument(metavar="SET", help=f"One of {', '.join(SETS)}.")],
    annotations: Annotated[Path, typer.Argument(help="Its questions: a .parquet, .csv or .json file.")],
    videos: Annotated[Path, typer.Option(help="Folder of its videos.")],
    out: Annotated[Path, typer.Option(help="File for the questions, a JSON line each.")],
    answers: Annotated[Path | None, typer.Option(help="EgoSchema's subset_answers.json.")] = None,
    spans: Annotated[Path | None, typer.Option(help="NExT-GQA's gsub_val.json or gsub_test.json.")] = None,
    video_map: Annotated[Path | None, typer.Option("--map", help="NExT-QA's map_vid_vidorID.json.")] = None,
    common: CommonOptions,
) -> None:
    """Read the annotations of a public data set. Questions whose videos are not in the folder are left out."""
    with working(common.quiet, common.verbose) as messages:
        questions = SETS[data_set.value](Files(annotations, videos, answers, spans, video_map))
        present = [question for question in questions if question.video.is_file()]
        if not present:
            raise ValueError(f"labels: videos must be a folder with '{questions[0].video.name}', got '{videos}'")
        write_questions(out, present)
        say(messages, f"{len(present)} questions: {out}")
        if missing := sorted({question.video.name for question in questions if not question.video.is_file()}):
            left_out, some = len(questions) - len(present), f"{len(missing)} videos are not in '{videos}'"
            say(messages, f"{left_out} questions left out: {some}, such as {missing[0]}")


@app.command()
@with_options
def label(
    *,
    questions: Annotated[list[Path], typer.Argument(help="Files of questions.")],
    out: Annotated[Path, typer.Option(help="File for the labelled questions.")],
    captioner: Annotated[
        str | None,
        typer.Option(help="Describes clips: a video model's checkpoint, MODULE:FUNCTION, or MODEL@URL of an endpoint."),
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="Scores clips by their captions; as the captioner.")] = None,
    rewriter: Annotated[
        str | None, typer.Option(help="Makes questions short; as the captioner. Without it, they stay as they are.")
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help="SigLIP whose tokenizer measures short questions (default: counting words).")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="File that keeps all replies (default: OUT.cache).")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Videos at a time, if all models are endpoints.")] = 1,
    api_key: Annotated[str, typer.Option(help="Environment variable with the key of endpoints.")] = "OPENAI_API_KEY",
    parameters: Annotated[
        str, typer.Option(help="JSON object: other fields of requests to endpoints.")
    ] = '{"temperature": 0}',
    caption_prompt: Annotated[str | None, typer.Option(help="What the captioner is asked about each clip.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device of checkpoints (default: the GPU if any).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, for checkpoints.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As for fftriton eval.")] = False,
    common: CommonOptions,
) -> None:
    """Label questions: caption all clips, then score each against the question. An interrupted run resumes.

    Questions that have their relevance keep it. A question that fails is listed in OUT.failed, and is asked again by
    the same command.
    """
    from .cache import Cache
    from .labelling import Labeller
    from .models import Settings, make_captioner, make_reader
    from .prompts import CAPTION, count_words

    resumes = "The replies so far are kept: the same command resumes."
    with working(common.quiet, common.verbose, resumes) as messages:
        check_out(out.parent)
        if out.resolve() in [path.resolve() for path in questions]:
            raise ValueError(f"labels: out must be another file than the questions, got '{out}'")
        asked = read_questions(questions)
        settings = Settings(
            device, dtype, trust_remote_code, os.environ.get(api_key) or None, tuple(_read_object(parameters).items())
        )
        labeller = Labeller(
            Cache(cache or out.with_name(out.name + ".cache")),
            None if captioner is None else make_captioner(captioner, settings),
            None if scorer is None else make_reader("scorer", scorer, settings),
            None if rewriter is None else make_reader("rewriter", rewriter, settings),
            caption=caption_prompt or CAPTION,
            count=count_words if predictor is None else _token_counter(predictor),
            counter=predictor or "",
        )
        with Progress(console=messages) as progress:
            task = progress.add_task("Labelling videos", total=None)
            labelled, failures = labeller.label(
                asked, lambda done, total: progress.update(task, completed=done, total=total), workers
            )
        write_questions(out, labelled)
        failed = out.with_name(out.name + ".failed")
        failed.unlink(missing_ok=True)
        if failures:
            lines = [json.dumps({"id": one.question.id, "error": one.reason}, ensure_ascii=False) for one in failures]
            failed.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        say(messages, f"{len(labelled)} questions labelled: {out}")
        if failures:
            say(messages, f"{len(failures)} failed: {failed}")
        for one in failures[:_SHOWN]:
            say(messages, f"  {one.question.id}: {one.reason}")
    if not labelled:
        raise typer.Exit(1)


@app.command()
@with_options
def split(
    *,
    questions: Annotated[list[Path], typer.Argument(help="Files of labelled questions.")],
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl, sparse.jsonl and dense.jsonl.")],
    share: Annotated[float, typer.Option(help="Share of the videos that are trained on.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Draws the videos.")] = 0,
    common: CommonOptions,
) -> None:
    """Split labelled questions: train.jsonl, and to evaluate sparse.jsonl and dense.jsonl, with other videos."""
    with working(common.quiet, common.verbose) as messages:
        found = split_questions(read_questions(questions), share, seed)
        for name in ("train", "sparse", "dense"):
            part = getattr(found, name)
            write_questions(out / f"{name}.jsonl", part)
            videos = len({question.video for question in part})
            say(messages, f"{out / name}.jsonl: {len(part)} questions about {videos} videos")
        if found.unused:
            say(
                messages,
                f"{len(found.unused)} questions left out: level labels in training, or no answer in evaluation",
            )


def _token_counter(checkpoint: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    from ..runtime.checkpoints import load_part

    tokenizer: Any = load_part(AutoTokenizer, checkpoint, False)
    return lambda text: len(tokenizer(text.lower())["input_ids"])


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"labels: parameters must be a JSON object, got '{text}'")
    return value


if __name__ == "__main__":
    app()
