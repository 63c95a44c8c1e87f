"""The rows of a batch: each sample without its padding, as a method sees it, and all samples packed together again.

A method sees one sample at a time, without padding. Between its calls the samples of a batch are packed: each one is at
the right end of its row, after padding up to the longest. A batch of one is never copied for that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from fftriton_kernels import verified

from ..layouts.layout import VideoLayout
from ..methods.base import Merge, MethodState, VideoTokens, list_steps
from .invariants import Invariants, check_left, versions
from .report import MergeStep, SampleReport, Stopwatch
from .selection import step_between


class BatchRow:
    """One row of the batch: its tokens, without padding, and the state of its method.

    Attributes:
        state: the state of its method, or None if the row has no video.
        rows: where its tokens stand in the batch's hidden states.
        places: where they stood in the padded prompt, or None if there is no padding.
        later: how many text tokens at the end are continuations of the prompt (candidates of assisted decoding, an
            answer to be scored): their attention does not count.
        past: number of tokens before those of this forward, without padding.
        steps: what the method did to the hidden states when it was last asked, if that is to be recorded.
    """

    def __init__(
        self, state: MethodState | None, report: SampleReport, rows: slice | Tensor, places: Tensor | None,
        tokens: VideoTokens, later: int, stopwatch: Stopwatch,
        records: bool = False,
    ) -> None:  # fmt: skip
        self.state, self.report, self.rows, self.places = state, report, rows, places
        self.steps: list[Callable[[Tensor], Tensor]] = []
        self._records = records
        self.tokens, self.later = tokens, later
        self.past = 0
        self._stopwatch = stopwatch

    @property
    def position(self) -> Tensor:
        """[n] int64: where the remaining tokens stood in the padded prompt."""
        return self._place(self.tokens.position[0])

    def seen(self) -> tuple[Tensor, int]:
        """The positions [n] that the last token attends to, and how many of them are video."""
        position, window = self.position, self.report.window
        if window is None:
            return position, self.tokens.num_video
        order = self.past + torch.arange(len(position), device=position.device)
        seen = (order < window.sinks) | (order >= self.past + len(position) - window.recent)
        return position[seen], int((self.tokens.patch[0, seen] >= 0).sum())

    def ask(self, stage: str, index: int, before: VideoTokens, invariants: Invariants, verify: bool) -> VideoTokens:
        """What the method leaves of the tokens; `before` itself if it changes nothing."""
        self.steps = []
        if self.state is None:
            return before
        watch, count = self._stopwatch, versions(before)
        start = watch.now()
        with verified() if verify else nullcontext():
            after = getattr(self.state, stage)(index, before)
        if count != versions(before):
            raise RuntimeError(
                f"reduce: {self.report.method}, {stage} of layer {index}: must not write to the tensors it is given"
            )
        steps = list_steps(after)
        if not steps:
            return before
        end = watch.now()
        for step in steps:
            left = check_left(self.report.method, stage, index, before, step, invariants, verify)
            if self._records:
                self.steps.append(step_between(before, left))
            self._note(stage, index, before, left)
            before = left
        watch.spans.append(("prune" if before.merge is None else "merge", start, end))
        return before

    def _note(self, stage: str, index: int, before: VideoTokens, after: VideoTokens) -> None:
        """Put one step of a call into the report."""
        if after.merge is None:
            self.report.prune_layer = index
            self.report._prunings.append((self._place(before.position[0]), self._place(after.position[0])))
        else:
            merge = Merge(after.merge.roots, self._place(after.merge.position))
            self.report.merge_steps.append(MergeStep(index, stage, before.num_video, after.num_video, merge))

    def _place(self, position: Tensor) -> Tensor:
        return position if self.places is None else self.places.to(position.device)[position]


def real_rows(valid: Tensor | None, sample: int, length: int) -> slice | Tensor:
    """Which of `length` rows of a sample are not padding: a slice if they are contiguous, else [n] int64."""
    if valid is None:
        return slice(0, length)
    rows = valid[sample].nonzero()[:, 0]
    if len(rows) == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def without_padding(layout: VideoLayout, places: Tensor) -> VideoLayout:
    """The layout of a padded prompt, counted among the `places` [n] int64 that are not padding."""
    positions, places = layout.positions, places.to(layout.positions.device)
    numbers = torch.searchsorted(places, positions.clamp(min=0).contiguous())
    return replace(layout, positions=positions.where(positions < 0, numbers), length=None)


def answer_length(targets: Tensor, shift: int) -> int:
    """How many of a sample's last tokens its labels [n] make an answer: those from the last run without -100 on.

    shift: how far the labels are ahead of their logits.
    """
    labelled = (targets != -100).tolist()
    end = next((place for place in reversed(range(len(labelled))) if labelled[place]), None)
    if end is None:
        return 0
    start = next((place for place in reversed(range(end)) if not labelled[place]), -1) + 1
    return len(labelled) - start - (1 - shift)


def rows_first(part: Tensor, batch: int) -> Tensor:
    """Rotary [1 or B, N, d] or [3, 1 or B, N, d] -> [B, N, d] or [B, N, 3, d], without a copy."""
    if part.ndim == 4:
        return part.expand(-1, batch, -1, -1).permute(1, 2, 0, 3)
    return part.expand(batch, -1, -1)


def as_rotary(part: Tensor, original: Tensor) -> Tensor:
    """Undo `rows_first`: the dimensions are ordered as in `original`; the length may differ."""
    return part.permute(2, 0, 1, 3) if original.ndim == 4 else part
