"""`fftriton inspect`: how redundant the tokens of a video are in each layer of a model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from ..evaluate.observing import Observed, Observer
from ..evaluate.redundancy import TOP, LayerRow, Redundancy, analyse
from ..evaluate.rows import write_csv
from ..hf import reduce
from ..runtime.answers import TokenClock, generate
from ..runtime.progress import OpenBar
from ..runtime.shipped import NEEDLE
from ..runtime.target import to_model
from .display import describe_run
from .inspect_pictures import draw
from .request import Job, Options


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        job: the clip and the question.
        observed: the tokens.
        found: the analyses.
    """

    job: Job
    observed: Observed
    found: Redundancy

    @property
    def threshold(self) -> float:
        """The threshold, rounded down to four digits: rounded up, it could be more than any similarity."""
        return math.floor(self.found.threshold * 1e4) / 1e4

    @property
    def method(self) -> str:
        """The method to paste after --method, with the threshold that was found."""
        return f"framefusion:similarity_threshold={self.threshold}"


@dataclass(frozen=True)
class TokenRow:
    """A line of tokens.csv: one token in one layer; None where it has no such figure."""

    layer: int
    frame: int
    patch: int
    similarity: float | None
    importance: float | None


@dataclass(frozen=True)
class DistanceRow:
    """A line of distances.csv: mean similarity at the first layer of two tokens that are so far apart."""

    distance: int
    similarity: float


@torch.no_grad()
def inspect(options: Options, model: Any, job: Job, open_bar: OpenBar) -> Inspection:
    """Run the prompt once through the unreduced model, and analyse what its layers see.

    Args:
        options: the options of the run.
        model: the model from `Target.load_model`.
        job: the job from `prepare`.
        open_bar: opens a progress bar for each step.

    Raises:
        ValueError: no token has the same patch one frame earlier.
    """
    observer = Observer()
    with options.target.own_threads(), open_bar("Observing the layers") as on_progress:
        with reduce(model, observer):
            generate(model, to_model(job.inputs, model), TokenClock(), 1)
        on_progress(1, 1)
    observed = observer.observed
    return Inspection(job, observed, analyse(observed))


def default_video(video: Path | None) -> Path:
    """The clip to inspect."""
    return NEEDLE.path if video is None else video


def write_inspection(options: Options, inspection: Inspection, open_bar: OpenBar) -> list[Path]:
    """Write the pictures and the tables.

    Returns:
        The paths of the files.
    """
    origin = _origin(options, inspection)
    observed, found, out = inspection.observed, inspection.found, options.out
    distances = [DistanceRow(k, float(value)) for k, value in enumerate(observed.by_distance, 1)]
    tables = {
        "layers.csv": found.layers, "retention.csv": found.retention, "distances.csv": distances,
        "tokens.csv": _token_rows(observed),
    }  # fmt: skip
    with open_bar("Drawing") as on_progress:
        title = f"{options.target.name}, {inspection.job.clip.path.name}"
        written = draw(out, observed, found, title)
        for number, (name, rows) in enumerate(tables.items(), 1):
            write_csv(out / name, rows, {} if name == "tokens.csv" else origin)
            written.append(out / name)
            on_progress(number, len(tables))
    return written


def as_json(options: Options, inspection: Inspection, files: list[Path]) -> str:
    """Everything that was found, for programs."""
    found, observed, job = inspection.found, inspection.observed, inspection.job
    content = describe_run(options) | {
        "video": job.clip.path.name,
        "path": str(job.clip.path.resolve()),
        "question": job.clip.question,
        "frames": len(job.video.frames),
        "vision_tokens": len(observed.frame),
        "tokens_per_frame": observed.patches,
        "similarity_threshold": inspection.threshold,
        "method_to_paste": inspection.method,
        "layers": [asdict(row) for row in found.layers],
        "top": TOP,
        "retention": [asdict(pair) for pair in found.retention],
        "files": [path.name for path in files],
    }
    return json.dumps(content, indent=2)


def layers_table(inspection: Inspection) -> Table:
    """A row per layer, for 80 columns."""
    title = "Similarity of tokens with the same patch one frame earlier, and its rank correlations"
    table = Table(title=title, header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0))
    headings = (
        "layer",
        "median",
        "5 to 95 %",
        "variance",
        "in the\nnext layer",
        "importance in\nthe next layer",
        "with\nimportance",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in inspection.found.layers:
        table.add_row(*_cells(row))
    return table


def _cells(row: LayerRow) -> list[str]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return [
        str(row.layer), f"{row.similarity_50:.3f}", f"{row.similarity_5:.2f} to {row.similarity_95:.2f}",
        f"{row.similarity_variance:.2g}", text(row.similarity_correlation), text(row.importance_correlation),
        text(row.joint_correlation),
    ]  # fmt: skip


def _token_rows(observed: Observed) -> list[TokenRow]:
    def known(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return [
        TokenRow(layer, int(frame), int(patch), known(similarity), known(importance))
        for layer in range(len(observed.similarity))
        for frame, patch, similarity, importance in zip(
            observed.frame, observed.patch, observed.similarity[layer], observed.importance[layer], strict=True
        )
    ]


def _origin(options: Options, inspection: Inspection) -> dict[str, Any]:
    """What repeats the run, in each line of the tables."""
    run = describe_run(options)
    kept = ("model", "device", "dtype", "fftriton", "commit", "torch", "transformers", "date", "command")
    return {"video": inspection.job.clip.path.name} | {name: run[name] for name in kept}
