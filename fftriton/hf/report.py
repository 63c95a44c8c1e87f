"""What a reduction did to the last prompt, or batch of prompts."""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import VideoLayout
from ..methods.base import FrameScores, Merge, Window
from . import report_tables


@dataclass(frozen=True)
class MergeStep:
    """One merge.

    Args:
        layer: index of the decoder layer in which it happened.
        stage: "before_attention" or "after_attention" of that layer.
        tokens_before, tokens_after: number of video tokens before and after it.
    """

    layer: int
    stage: str
    tokens_before: int
    tokens_after: int
    _merge: Merge = field(repr=False)

    @property
    def merged(self) -> Tensor:
        """[m] int64: positions in the prompt that left the sequence."""
        return self._merge.merged

    @property
    def into(self) -> Tensor:
        """[m] int64: the position of the group root that each of `merged` joined."""
        return self._merge.into

    def to_dict(self) -> dict[str, Any]:
        """The step in plain types that `json.dumps` accepts."""
        return {
            "layer": self.layer, "stage": self.stage, "tokens_before": int(self.tokens_before),
            "tokens_after": int(self.tokens_after), "merged": self.merged.tolist(), "into": self.into.tolist(),
        }  # fmt: skip


class Stopwatch:
    """Measures the seconds that each stage takes.

    On a GPU the clock is the device's, and nothing waits for it until `seconds` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.spans: list[tuple[str, object, object]] = []

    def now(self) -> object:
        """The current moment: a recorded CUDA event on a GPU, otherwise a reading of the clock."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self) -> dict[str, float]:
        """The sum over all spans of each stage."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        total: dict[str, float] = {}
        for name, start, end in self.spans:
            span = start.elapsed_time(end) / 1000 if self.cuda else end - start  # type: ignore[attr-defined, operator]
            total[name] = total.get(name, 0.0) + span
        return total

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle holds the seconds, since a CUDA event cannot be copied."""
        spans = [(name, 0.0, span) for name, span in self.seconds().items()]
        return {"cuda": False, "device": torch.device("cpu"), "spans": spans}


@dataclass(eq=False, repr=False)
class SampleReport:
    """What a reduction did to one sample of a batch. Positions count from the first token of its (padded) row.

    Args:
        method: the method, as it prints.
        budget: the budget that was asked for.
        layouts: the positions of the videos in the prompt; empty if the sample has none.
        num_tokens, num_video_tokens: lengths of the prompt, without padding.
        kept_positions: per layer, the positions in the prompt of the rows in its attention, which are also the entries
            that its KV cache received: int64 [n], ascending. Under a window, those that the last token attends to. For
            a layer with linear attention, the rows that it sees.
        vision_tokens_per_layer: per layer, how many of them are video tokens.
        rows_per_layer: per layer, the rows that it computes; under a window these are more than the last token attends
            to.
        sized_layers: the layers whose attention counts sizes.
        merge_steps: the merges, in order, including those that merged nothing.
        prune_layer: index of the layer that pruned last (after its attention; layer 0: before it), or None.
        least_budget: the lowest budget that could have been met on this prompt.
        window: which tokens each token may attend to, or None if to all in the layer.
        frame_scores: the scores by which the method shared its budget among the frames, one per video; empty if it did
            not.
    """

    method: str
    budget: float
    layouts: list[VideoLayout]
    num_tokens: int
    num_video_tokens: int
    kept_positions: list[Tensor] = field(default_factory=list)
    vision_tokens_per_layer: list[int] = field(default_factory=list)
    rows_per_layer: list[int] = field(default_factory=list)
    sized_layers: list[int] = field(default_factory=list)
    merge_steps: list[MergeStep] = field(default_factory=list)
    prune_layer: int | None = None
    least_budget: float = 1.0
    window: Window | None = None
    frame_scores: list[FrameScores] = field(default_factory=list)
    _prunings: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # positions [n] before and after

    @property
    def tokens_per_layer(self) -> list[int]:
        """Per layer, the most tokens that one token attends to: the rows in its attention, or those in its window."""
        return [len(kept) for kept in self.kept_positions]

    @property
    def frame_counts(self) -> list[Tensor]:
        """Per video, how many tokens of each frame are in the attention of the first layer: int64 [F]."""
        kept = self.kept_positions[0].cpu()
        return [torch.isin(layout.positions.cpu(), kept).sum(1) for layout in self.layouts]

    @property
    def relevance_seconds(self) -> float:
        """Seconds that predictors took before the forward to score the frames; not part of "prefill"."""
        return sum(scores.seconds for scores in self.frame_scores)

    @property
    def relevance_macs(self) -> float:
        """Multiply-accumulates of these predictors, each of which counts once."""
        return sum(scores.macs for scores in self.frame_scores)

    @property
    def budget_achieved(self) -> float:
        """Mean over layers of the video tokens in attention, as a fraction of the prompt's; 1 if it has none."""
        kept, total = self.vision_tokens_per_layer, self.num_video_tokens
        return sum(kept) / (len(kept) * total) if total else 1.0

    @property
    def pruned(self) -> Tensor:
        """[p] int64: the positions that pruning dropped."""
        dropped = [before[~torch.isin(before, after)].cpu() for before, after in self._prunings]  # of any device
        return torch.cat(dropped) if dropped else self.kept_positions[0][:0].cpu()

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types (lists, ints, floats, text, None) that `json.dumps` accepts."""
        window = self.window
        return {
            "method": self.method,
            "budget": float(self.budget),
            "budget_achieved": float(self.budget_achieved),
            "least_budget": float(self.least_budget),
            "num_tokens": int(self.num_tokens),
            "num_video_tokens": int(self.num_video_tokens),
            "layouts": [{"sample": one.sample, "positions": one.positions.tolist()} for one in self.layouts],
            "kept_positions": [kept.tolist() for kept in self.kept_positions],
            "tokens_per_layer": self.tokens_per_layer,
            "vision_tokens_per_layer": [int(count) for count in self.vision_tokens_per_layer],
            "rows_per_layer": [int(count) for count in self.rows_per_layer],
            "sized_layers": list(self.sized_layers),
            "merge_steps": [step.to_dict() for step in self.merge_steps],
            "prune_layer": self.prune_layer,
            "pruned": self.pruned.tolist(),
            "window": None if window is None else {"sinks": window.sinks, "recent": window.recent},
            "relevance_seconds": float(self.relevance_seconds),
            "relevance_macs": float(self.relevance_macs),
            "frame_counts": [counts.tolist() for counts in self.frame_counts],
            "frame_scores": [
                {"video": one.video, "scores": one.scores.tolist(), "seconds": one.seconds, "macs": one.macs}
                for one in self.frame_scores
            ],
        }

    def __repr__(self) -> str:
        return (
            f"SampleReport(method={self.method!r}, num_tokens={self.num_tokens}, "
            f"num_video_tokens={self.num_video_tokens}, budget={self.budget:g}, "
            f"budget_achieved={self.budget_achieved:.4g})"
        )

    def __str__(self) -> str:
        return report_tables.as_text(self.method, *report_tables.of_sample(self))

    def _repr_html_(self) -> str:
        return report_tables.as_html(self.method, *report_tables.of_sample(self))


@dataclass(eq=False, repr=False)
class Report:
    """What a reduction did in the last forward that held a video, whatever the size of its batch.

    `report.samples[i]` reports on row i of the batch; a sample without a video has `num_video_tokens` 0. `method`,
    `budget` and `seconds` belong to the whole forward. All other properties of a `SampleReport` are here, too, for a
    forward of one sample; for a larger batch they raise an AttributeError, so `hasattr` is False for them.

    Args:
        samples: one report per row of the batch.
    """

    samples: list[SampleReport]
    _stopwatch: Stopwatch = field(default_factory=lambda: Stopwatch(torch.device("cpu")))

    @property
    def method(self) -> str:
        """The method, as it prints."""
        return self.samples[0].method

    @property
    def budget(self) -> float:
        """The budget that was asked for."""
        return self.samples[0].budget

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, for the whole batch: "prefill" is all layers, "merge" and "prune" are the method's
        share of it."""
        return self._stopwatch.seconds()

    # ---- of the only sample

    @property
    def layouts(self) -> list[VideoLayout]:
        """As `SampleReport.layouts`."""
        return self._only("layouts").layouts

    @property
    def num_tokens(self) -> int:
        """As `SampleReport.num_tokens`."""
        return self._only("num_tokens").num_tokens

    @property
    def num_video_tokens(self) -> int:
        """As `SampleReport.num_video_tokens`."""
        return self._only("num_video_tokens").num_video_tokens

    @property
    def kept_positions(self) -> list[Tensor]:
        """As `SampleReport.kept_positions`."""
        return self._only("kept_positions").kept_positions

    @property
    def tokens_per_layer(self) -> list[int]:
        """As `SampleReport.tokens_per_layer`."""
        return self._only("tokens_per_layer").tokens_per_layer

    @property
    def vision_tokens_per_layer(self) -> list[int]:
        """As `SampleReport.vision_tokens_per_layer`."""
        return self._only("vision_tokens_per_layer").vision_tokens_per_layer

    @property
    def rows_per_layer(self) -> list[int]:
        """As `SampleReport.rows_per_layer`."""
        return self._only("rows_per_layer").rows_per_layer

    @property
    def sized_layers(self) -> list[int]:
        """As `SampleReport.sized_layers`."""
        return self._only("sized_layers").sized_layers

    @property
    def merge_steps(self) -> list[MergeStep]:
        """As `SampleReport.merge_steps`."""
        return self._only("merge_steps").merge_steps

    @property
    def prune_layer(self) -> int | None:
        """As `SampleReport.prune_layer`."""
        return self._only("prune_layer").prune_layer

    @property
    def pruned(self) -> Tensor:
        """As `SampleReport.pruned`."""
        return self._only("pruned").pruned

    @property
    def budget_achieved(self) -> float:
        """As `SampleReport.budget_achieved`."""
        return self._only("budget_achieved").budget_achieved

    @property
    def least_budget(self) -> float:
        """As `SampleReport.least_budget`."""
        return self._only("least_budget").least_budget

    @property
    def window(self) -> Window | None:
        """As `SampleReport.window`."""
        return self._only("window").window

    @property
    def frame_scores(self) -> list[FrameScores]:
        """As `SampleReport.frame_scores`."""
        return self._only("frame_scores").frame_scores

    @property
    def frame_counts(self) -> list[Tensor]:
        """As `SampleReport.frame_counts`."""
        return self._only("frame_counts").frame_counts

    @property
    def relevance_seconds(self) -> float:
        """As `SampleReport.relevance_seconds`."""
        return self._only("relevance_seconds").relevance_seconds

    @property
    def relevance_macs(self) -> float:
        """As `SampleReport.relevance_macs`."""
        return self._only("relevance_macs").relevance_macs

    def _only(self, name: str) -> SampleReport:
        # an AttributeError: hasattr, inspect.getmembers and a notebook's completion take any other error for a failure
        if len(self.samples) != 1:
            raise AttributeError(
                f"report: {name} belongs to one sample, but the batch has {len(self.samples)}; use "
                f"report.samples[i].{name}"
            )
        return self.samples[0]

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types (lists, ints, floats, text, None) that `json.dumps` accepts."""
        return {
            "method": self.method,
            "budget": float(self.budget),
            "seconds": self.seconds,
            "samples": [sample.to_dict() for sample in self.samples],
        }

    def __repr__(self) -> str:
        achieved = ", ".join(f"{sample.budget_achieved:.4g}" for sample in self.samples)
        if len(self.samples) == 1:
            return f"Report(method={self.method!r}, budget={self.budget:g}, budget_achieved={achieved})"
        return (
            f"Report(method={self.method!r}, budget={self.budget:g}, samples={len(self.samples)}, "
            f"budget_achieved=[{achieved}])"
        )

    def __str__(self) -> str:
        return report_tables.as_text(self.method, *report_tables.of_forward(self))

    def _repr_html_(self) -> str:
        return report_tables.as_html(self.method, *report_tables.of_forward(self))


class LatestReport:
    """The report of each thread's last prompt."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the reports of all threads."""
        self._own = _OwnReport()
        self._of_any: Report | None = None

    def get(self) -> Report | None:
        """That of this thread's last prompt or, if it has had none, that of the last prompt of any thread."""
        return getattr(self._own, "report", self._of_any)

    def set(self, report: Report | None) -> None:
        """Note what became of this thread's last prompt; None if it was not reduced, or failed."""
        self._own.report = self._of_any = report


class _OwnReport(threading.local):
    """A thread's last report. The attribute is missing while the thread has had no prompt."""

    report: Report | None


class _ForMoreThanOne(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Report) and len(instance.samples) > 1


class _BatchReport(metaclass=_ForMoreThanOne):
    """The former type of the report of a batch of more than one: a Report that `isinstance` still tells apart."""

    def __new__(cls, samples: list[SampleReport]) -> Report:  # type: ignore[misc]
        return Report(samples)


def deprecated(module: str, name: str) -> Any:
    """What a module still gives for a name that is going to leave it, with a DeprecationWarning.

    Raises:
        AttributeError: any other name.
    """
    if name != "BatchReport":
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(
        "BatchReport is deprecated and will be removed in the next release: every report is a Report, with "
        "report.samples for the samples of a batch",
        DeprecationWarning,
        stacklevel=3,
    )
    return _BatchReport


def __getattr__(name: str) -> Any:
    return deprecated(__name__, name)
