"""What a reduction did to the last prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layouts.layout import VideoLayout
from ..methods.base import Merge, Window


@dataclass(frozen=True)
class MergeStep:
    """One merge.

    Args:
        layer: the decoder layer it happened in.
        stage: "before_attention" or "after_attention" of that layer.
        tokens_before, tokens_after: video tokens around it.
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


class Stopwatch:
    """Seconds a stage, read when asked for: on a GPU the clock is the device's, and nothing waits for it before."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.spans: list[tuple[str, object, object]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = self.now()
        yield
        self.spans.append((name, start, self.now()))

    def now(self) -> object:
        """A moment: a recorded CUDA event on a GPU, else a reading of the clock."""
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


@dataclass
class Report:
    """What a reduction did to the last prompt that held a video. Positions count from the prompt's first token.

    Args:
        method: the method, as it prints.
        budget: the budget asked for.
        layouts: where the videos stood in the prompt.
        num_tokens, num_video_tokens: lengths of the prompt, without padding.
        kept_positions: for each layer, the positions in the prompt of the rows in its attention, so of the entries
            that its KV cache got: int64 [n], ascending. Under a window, those that the last token attends to. For a
            layer of linear attention, the rows that it sees.
        vision_tokens_per_layer: for each layer, how many of them are video tokens.
        rows_per_layer: for each layer, the rows that it computes; under a window more than in the last one's attention.
        merge_steps: the merges, in order, those that merged nothing included.
        prune_layer: the last layer that pruned, behind its attention or, layer 0, before it; None where none did.
        least_budget: the lowest budget that this prompt would have allowed.
        window: which tokens each token may attend to; None: to all in the layer.
    """

    method: str
    budget: float
    layouts: list[VideoLayout]
    num_tokens: int
    num_video_tokens: int
    kept_positions: list[Tensor] = field(default_factory=list)
    vision_tokens_per_layer: list[int] = field(default_factory=list)
    rows_per_layer: list[int] = field(default_factory=list)
    merge_steps: list[MergeStep] = field(default_factory=list)
    prune_layer: int | None = None
    least_budget: float = 1.0
    window: Window | None = None
    _prunings: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)  # positions [n] before and behind
    _stopwatch: Stopwatch = field(default_factory=lambda: Stopwatch(torch.device("cpu")), repr=False)

    @property
    def tokens_per_layer(self) -> list[int]:
        """For each layer, the tokens that a token attends to at most: the rows in its attention, or its window's."""
        return [len(kept) for kept in self.kept_positions]

    @property
    def budget_achieved(self) -> float:
        """Mean over layers of the video tokens in attention, as a fraction of the prompt's."""
        return _fraction(self.vision_tokens_per_layer, self.num_video_tokens)

    @property
    def pruned(self) -> Tensor:
        """[p] int64: the positions that pruning dropped."""
        dropped = [before[~torch.isin(before, after)] for before, after in self._prunings]
        return torch.cat(dropped) if dropped else self.kept_positions[0][:0]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, of the whole batch: "prefill" is all layers, "merge" and "prune" are the method's
        share of it."""
        return self._stopwatch.seconds()


@dataclass(frozen=True)
class BatchReport:
    """What a reduction did to a batch of prompts. Counts are sums over the samples; what cannot be added is a list
    with one entry a sample, and a sample without a video counts as text.

    Args:
        samples: one report for each row of the batch.
    """

    samples: list[Report]

    @property
    def method(self) -> str:
        return self.samples[0].method

    @property
    def budget(self) -> float:
        return self.samples[0].budget

    @property
    def layouts(self) -> list[VideoLayout]:
        """Where the videos stood, of all samples."""
        return [layout for report in self.samples for layout in report.layouts]

    @property
    def num_tokens(self) -> int:
        return sum(report.num_tokens for report in self.samples)

    @property
    def num_video_tokens(self) -> int:
        return sum(report.num_video_tokens for report in self.samples)

    @property
    def kept_positions(self) -> list[list[Tensor]]:
        """For each layer, for each sample: the positions in its padded row, int64 [n]."""
        return [list(layer) for layer in zip(*(report.kept_positions for report in self.samples), strict=True)]

    @property
    def tokens_per_layer(self) -> list[int]:
        """For each layer, the rows in its attention that are no padding."""
        return _sum_layers([report.tokens_per_layer for report in self.samples])

    @property
    def vision_tokens_per_layer(self) -> list[int]:
        """For each layer, how many of them are video tokens."""
        return _sum_layers([report.vision_tokens_per_layer for report in self.samples])

    @property
    def rows_per_layer(self) -> list[int]:
        """For each layer, the rows that it computes, without padding."""
        return _sum_layers([report.rows_per_layer for report in self.samples])

    @property
    def merge_steps(self) -> list[list[MergeStep]]:
        return [report.merge_steps for report in self.samples]

    @property
    def prune_layer(self) -> list[int | None]:
        return [report.prune_layer for report in self.samples]

    @property
    def pruned(self) -> list[Tensor]:
        return [report.pruned for report in self.samples]

    @property
    def least_budget(self) -> float:
        """The lowest budget that the prompts would have allowed, all their video tokens together."""
        return sum(report.least_budget * report.num_video_tokens for report in self.samples) / self.num_video_tokens

    @property
    def budget_achieved(self) -> float:
        """Mean over layers of the video tokens in attention, as a fraction of the prompts'."""
        return _fraction(self.vision_tokens_per_layer, self.num_video_tokens)

    @property
    def seconds(self) -> dict[str, float]:
        """As `Report.seconds`."""
        return self.samples[0].seconds


def _sum_layers(counts: list[list[int]]) -> list[int]:
    return [sum(layer) for layer in zip(*counts, strict=True)]


def _fraction(counts: list[int], total: int) -> float:
    """Mean of `counts` as a fraction of `total`; 1 where there was nothing to keep."""
    return sum(counts) / (len(counts) * total) if total else 1.0
