"""The output of a run: a table for each clip, and the same figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluate.agreement import Agreement
from ..evaluate.calibration import percent
from ..hf import Report
from ..methods import KVTP, Chain, Method
from ..methods.text import to_dict
from ..runtime.answers import is_right
from ..runtime.files import writing
from ..runtime.provenance import provenance
from ..runtime.shipped import MODEL_LIMITS, NEEDLE
from .request import Options
from .run import Result, Way


def describe_run(options: Options) -> dict[str, Any]:
    """The model, method, sampling and machine that the figures belong to: all that is needed to repeat the run."""
    target = options.target
    asked = {
        "revision": target.revision,
        "device_map": target.device_map,
        "dtype": str(target.torch_dtype()).removeprefix("torch."),
        "attention": target.attention,
        "max_new_tokens": target.max_new_tokens,
        "trust_remote_code": target.trust_remote_code,
        "method": options.method,
        "parameters": _parameters(options.make_method()),
        "budget": options.budget,
        "relevance": options.relevance,
        "sampling": asdict(options.sampling),
        "max_pixels": options.max_pixels,
    }
    return target.describe() | asked | provenance()


def _parameters(method: Method) -> dict[str, Any] | None:
    """All parameters of the method, defaults included; None if one cannot be written down, such as a model."""
    try:
        return to_dict(method)
    except TypeError:
        return None


def print_run(console: Console, options: Options) -> None:
    """Print one line with the model and the machine."""
    run = describe_run(options)
    threads = f", {run['threads']} thread{'s' * (run['threads'] > 1)}" if run["threads"] else ""
    versions = f"torch {run['torch']}, transformers {run['transformers']}"
    console.print(escape(f"{run['model']} on {run['device']}{threads}, {versions}"), highlight=False)


def print_result(console: Console, options: Options, result: Result) -> None:
    """Print the table of one clip, with notes that are needed to read it."""
    clip, video = result.job.clip, result.job.video
    about = f" ({clip.about})" if clip.about else ""
    console.print(f"\n[bold]{escape(clip.path.name)}[/bold]{escape(about)}")
    console.print(
        f"{len(video.frames)} of {video.total_frames} frames, {result.reduced.report.num_video_tokens} vision tokens. "
        f"Question: {escape(clip.question)}"
    )
    console.print(result_table(result))
    for note in notes(options, result):
        console.print(note, style="yellow", highlight=False, markup=False)
    pictures = ", ".join(str(path) for path in result.pictures)
    console.print(f"Pictures: {pictures}", highlight=False, markup=False, soft_wrap=True)


def describe_results(options: Options, results: Sequence[Result]) -> dict[str, Any]:
    """The run and the figures of all clips, for report.json and for programs."""
    return describe_run(options) | {"clips": [_as_dict(result) for result in results]}


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Write the figures of all clips as JSON."""
    with writing(path) as partial:
        partial.write_text(as_text(content) + "\n", encoding="utf-8")


def as_text(content: dict[str, Any]) -> str:
    """The figures of all clips as JSON."""
    return json.dumps(content, indent=2)


def summarise_layers(counts: Sequence[int]) -> str:
    """Counts per layer, grouped into runs: [9, 9, 5] -> "0-1: 9, 2: 5"."""
    runs, layer = [], 0
    for count, group in groupby(counts):
        last = layer + len(list(group)) - 1
        runs.append(f"{layer}-{last}: {count}" if last > layer else f"{layer}: {count}")
        layer = last + 1
    return ", ".join(runs)


def result_table(result: Result) -> Table:
    """The figures of one clip, for each way of running the model."""
    ways = [way for way in (result.dense, result.reduced) if way is not None]
    table = Table(show_lines=False)
    table.add_column("")
    for way in ways:
        table.add_column(way.name, overflow="fold")
    if result.dense is not None:
        table.add_column("gain")
    for label, cells, gain in _rows(result, ways):
        table.add_row(label, *cells, *([gain] if result.dense is not None else []))
    return table


def _rows(result: Result, ways: list[Way]) -> Iterator[tuple[str, list[str], str]]:
    """Rows of the table: label, one cell per way, and the gain from the reduction."""
    report = result.reduced.report
    alone = [""] * (len(ways) - 1)  # cells of the ways without reduction
    yield "answer", [_answer_cell(way.answer, result.job.clip.answer) for way in ways], ""
    if result.agreement is not None:
        yield "same answer", [*alone, _agreement_cell(result.agreement)], ""
        yield "next-token distributions", [*alone, _distance_cell(result.agreement)], ""
    yield "vision tokens in layer", [summarise_layers(_vision_tokens(way, report)) for way in ways], ""
    yield "budget asked", [*alone, f"{report.budget:.0%}"], ""
    yield "budget achieved", [*alone, f"{report.budget_achieved:.1%}"], ""
    for scores, counts in zip(report.frame_scores, report.frame_counts, strict=False):
        yield "tokens of each frame", [*alone, " ".join(map(str, counts.tolist()))], ""
        yield "score of each frame", [*alone, " ".join(f"{score:.3g}" for score in scores.scores.tolist())], ""
    if result.vision_seconds is not None:
        yield "vision encoder", [milliseconds(result.vision_seconds)] * len(ways), ""
    prefills = [way.first_token for way in ways]
    yield "prefill, to the first token", [milliseconds(seconds) for seconds in prefills], _speed_up(prefills)
    if report.frame_scores:
        yield "  of which relevance", [*alone, _relevance_cell(report)], ""
    own = sum(report.seconds.get(stage, 0.0) for stage in ("merge", "prune"))
    yield "  of which merging and pruning", [*alone, milliseconds(own)], ""
    decodes = [way.cost.decode for way in ways]
    yield "decode, per token", [milliseconds(seconds) for seconds in decodes], _speed_up(decodes)
    peaks = [way.cost.peak_memory for way in ways]
    yield "peak memory above rest", [mebibytes(peak) for peak in peaks], _saving(peaks)


def _agreement_cell(agreement: Agreement) -> str:
    """Whether greedy generation gives the same tokens."""
    if agreement.first_difference is None:
        return "[green]yes[/green]"
    same = f"token {agreement.first_difference + 1} of {agreement.tokens} is the first that differs"
    return f"[red]no[/red]: {same}" if agreement.tokens > 1 else "[red]no[/red]"


def _distance_cell(agreement: Agreement) -> str:
    """How far apart the distributions are, mean over the tokens of the dense answer."""
    return f"overlap {percent(agreement.overlap)}, KL {agreement.kl:.2g} nats"


def _relevance_cell(report: Report) -> str:
    """What the scores of the frames cost."""
    seconds = f"{milliseconds(report.relevance_seconds)}, " if report.relevance_seconds else ""
    return f"{seconds}{report.relevance_macs / 1e9:.3g} GMACs"


def _vision_tokens(way: Way, report: Report) -> list[int]:
    if way.method is not None:
        return way.report.vision_tokens_per_layer
    return [report.num_video_tokens] * len(report.vision_tokens_per_layer)


def _answer_cell(answer: str, expected: str | None) -> str:
    if expected is None:
        return escape(answer)
    verdict = "[green]right[/green]" if is_right(answer, expected) else f"[red]wrong, it is {escape(expected)}[/red]"
    return f"{escape(answer)} ({verdict})"


def milliseconds(seconds: float) -> str:
    """A duration for readers."""
    return f"{seconds * 1000:.1f} ms"


def _speed_up(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return ""
    ratio = seconds[0] / seconds[1]
    return f"[green]{ratio:.2f}x faster[/green]" if ratio >= 1 else f"[red]{1 / ratio:.2f}x slower[/red]"


def mebibytes(peak: int | None) -> str:
    """An amount of memory for readers."""
    return "-" if peak is None else f"{peak / 2**20:.1f} MiB"


def _saving(peaks: list[int | None]) -> str:
    if len(peaks) < 2 or None in peaks:
        return ""
    dense, reduced = peaks
    return f"{(reduced - dense) / 2**20:+.1f} MiB"  # type: ignore[operator]


def notes(options: Options, result: Result) -> Iterator[str]:
    """What a reader must know besides the figures."""
    report = result.reduced.report
    if result.job.unknown_words:
        words = ", ".join(f"'{word}'" for word in result.job.unknown_words)
        yield f"The model's vocabulary does not contain {words}. The model read only the rest of the question."
    if options.target.is_shipped and result.job.clip.path != NEEDLE.path:
        yield MODEL_LIMITS
    if _lacks_relevance(result.reduced.method):
        yield (
            "KVTP gave every frame the same number of tokens, because it knows no relevance. Give --relevance the "
            "checkpoint of a SigLIP, or take --method kvtp:relevance=attention."
        )
    if report.budget < report.least_budget:
        yield f"No budget below {report.least_budget:.1%} can be met for this prompt with this method."


def _lacks_relevance(method: Method | None) -> bool:
    """Whether a KVTP is among the methods and has no scores."""
    parts = method.methods if isinstance(method, Chain) else [method]
    return any(isinstance(part, KVTP) and part.relevance is None for part in parts)


def _as_dict(result: Result) -> dict[str, Any]:
    report = result.reduced.report
    return {
        "video": result.job.clip.path.name,
        "path": str(result.job.clip.path.resolve()),
        "question": result.job.clip.question,
        "right_answer": result.job.clip.answer,
        "frames": len(result.job.video.frames),
        "frame_numbers": result.job.video.indices,
        "frame_seconds": [round(float(time), 6) for time in result.job.video.times],
        "vision_tokens": report.num_video_tokens,
        "budget": report.budget,
        "budget_achieved": report.budget_achieved,
        "least_budget": report.least_budget,
        "prune_layer": report.prune_layer,
        "seconds_vision_encoder": result.vision_seconds,
        "seconds_of_stages": report.seconds,
        "relevance": [
            {"scores": scores.scores.tolist(), "seconds": scores.seconds, "macs": scores.macs}
            for scores in report.frame_scores
        ],
        "tokens_of_frames": [counts.tolist() for counts in report.frame_counts],
        "agreement": asdict(result.agreement) if result.agreement else None,
        "dense": _way_as_dict(result.dense, report) if result.dense else None,
        "reduced": _way_as_dict(result.reduced, report),
        "pictures": [path.name for path in result.pictures],
    }


def _way_as_dict(way: Way, report: Report) -> dict[str, Any]:
    return {
        "answer": way.answer,
        "vision_tokens_per_layer": _vision_tokens(way, report),
        "seconds_prefill": way.cost.prefill,
        "seconds_to_first_token": way.first_token,
        "seconds_per_decoded_token": way.cost.decode,
        "peak_memory_bytes": way.cost.peak_memory,
    }
