"""How a report is shown: as plain text, and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report, SampleReport

Table = list[list[str]]
"""Rows of cells; the first row is the heading."""


def of_forward(report: Report) -> tuple[list[str], Table]:
    """What a report says: some sentences, and a table. Of one sample its layers, of more one row per sample."""
    seconds = ", ".join(f"{name} {value:.3g}" for name, value in report.seconds.items())
    timing = [f"seconds: {seconds}"] if seconds else []
    if len(report.samples) == 1:
        sentences, table = of_sample(report.samples[0])
        return sentences + timing, table
    heading = ["sample", "tokens", "video tokens", "budget", "least budget", "merges", "last pruning layer"]
    rows = [
        [
            str(number), str(sample.num_tokens), str(sample.num_video_tokens), f"{sample.budget_achieved:.1%}",
            f"{sample.least_budget:.1%}", str(len(sample.merge_steps)), _or_dash(sample.prune_layer),
        ]
        for number, sample in enumerate(report.samples)
    ]  # fmt: skip
    return [f"{len(rows)} samples, budget asked {report.budget:.1%}", *timing], [heading, *rows]


def of_sample(sample: SampleReport) -> tuple[list[str], Table]:
    """What the report of one sample says: some sentences, and a table of its layers."""
    sentences = [
        f"{sample.num_tokens} tokens in the prompt, {sample.num_video_tokens} of them video",
        f"budget asked {sample.budget:.1%}, achieved {sample.budget_achieved:.1%}, least possible "
        f"{sample.least_budget:.1%}",
    ]
    if sample.window is not None:
        sentences.append(f"attention to the first {sample.window.sinks} and the last {sample.window.recent} tokens")
    for scores, counts in zip(sample.frame_scores, sample.frame_counts, strict=False):
        sentences.append(
            f"video {scores.video}: {int(counts.min())} to {int(counts.max())} tokens a frame, scores "
            f"{float(scores.scores.min()):.3g} to {float(scores.scores.max()):.3g}"
        )
    if sample.relevance_seconds:
        sentences.append(f"relevance: {sample.relevance_seconds:.3g} s, {sample.relevance_macs / 1e9:.3g} GMACs")
    return sentences, [["layers", "rows", "tokens attended", "video tokens", "of all", "step"], *_layers(sample)]


def _layers(sample: SampleReport) -> Table:
    """A row for every run of layers that are alike."""
    counts = list(
        zip(sample.rows_per_layer, sample.tokens_per_layer, sample.vision_tokens_per_layer, strict=True)
    )  # fmt: skip
    steps = [_steps(sample, layer) for layer in range(len(counts))]
    starts = [layer for layer in range(len(counts)) if layer == 0 or counts[layer] != counts[layer - 1] or steps[layer]]
    total = max(sample.num_video_tokens, 1)
    return [
        [
            f"{first}-{end - 1}" if end - first > 1 else str(first),
            *map(str, counts[first]), f"{counts[first][2] / total:.1%}", steps[first],
        ]
        for first, end in zip(starts, [*starts[1:], len(counts)], strict=True)
    ]  # fmt: skip


def _steps(sample: SampleReport, layer: int) -> str:
    merges = [
        f"merge {step.tokens_before} to {step.tokens_after}" for step in sample.merge_steps if step.layer == layer
    ]
    return ", ".join(merges + ["prune"] * (sample.prune_layer == layer))


def as_text(title: str, sentences: Sequence[str], table: Table) -> str:
    """Lines of plain text, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([title, *sentences, *lines])


def as_html(title: str, sentences: Sequence[str], table: Table) -> str:
    """The same as HTML, with all text escaped."""
    heading, *rows = (
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * (len(table) - 1)], table, strict=True)
    )
    caption = "<br>".join(map(escape, [title, *sentences]))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><caption>{caption}</caption><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
