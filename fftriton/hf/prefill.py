"""One forward of a reduced decoder: the rows that are left, and all that has to fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layout import VideoLayout, patch_ids
from ..methods.base import Method, Prompt, VideoTokens
from .cache import ReducedLayer
from .compat import causal_mask
from .importance import AttentionTap
from .report import MergeStep, Report, Stopwatch


class Prefill:
    """One forward of the decoder: the tokens left, and what goes with them. Without a video it only keeps masks."""

    def __init__(
        self, method: Method, layouts: list[VideoLayout], source: Tensor,
        cache_layers: list[ReducedLayer | None] | None, valid: Tensor | None, attends: Sequence[bool],
        additions: tuple[Tensor, ...] = (),
    ) -> None:  # fmt: skip
        self.batch, self.length = source.shape[:2]
        self.layouts, self.cache_layers, self.valid = layouts, cache_layers, valid
        self.attends = attends  # for each layer, whether it has attention; else it is recurrent
        self.additions = additions  # [B, N, D] each, what the first layers' outputs get added
        self.tokens: VideoTokens | None = None
        self.residual: Tensor | None = None  # [B, M, D] rows kept, waiting for their feed-forward output
        self.layer_output: Tensor | None = None  # [B, M, D] what the layer is to return
        self.report: Report | None = None
        self._masks: dict[tuple, Any] = {}
        self._rotary_like: Sequence[Tensor] = ()
        if layouts:
            prompt = Prompt(len(attends), self.length, layouts, attends)
            self.calls = method.begin(prompt)
            self.stopwatch = Stopwatch(source.device)
            self.report = Report(
                str(method), method.budget, layouts, self.length, prompt.num_video_tokens, _stopwatch=self.stopwatch
            )

    def begin(self, hidden: Tensor, rotary: Sequence[Tensor] | None) -> None:
        """Take the prompt's hidden states [B, N, D] and rotary embeddings, before layer 0."""
        if self.report is None:
            return
        self._started = self.stopwatch.now()
        position = torch.arange(self.length, device=hidden.device).expand(self.batch, -1)
        patch = patch_ids(self.layouts, self.batch, self.length, hidden.device)
        self._rotary_like = rotary or ()
        companions = tuple(_rows_first(part, self.batch) for part in self._rotary_like)
        count = self.report.num_video_tokens
        self.tokens = VideoTokens(hidden, position, patch, count, companions, additions=self.additions)

    @property
    def is_shorter(self) -> bool:
        """Whether rows have left the sequence."""
        return self.tokens is not None and self.tokens.length < self.length

    def wants_attention(self, index: int) -> bool:
        return self.tokens is not None and self.calls.wants_attention(index)

    def before_attention(self, index: int, hidden: Tensor) -> Tensor:
        """The rows [B, M, D] that the layer is to see."""
        if self.tokens is None or self.report is None:
            return hidden
        before = self.tokens.at(hidden, None)
        after = self._call("before_attention", index, before)
        tokens = before if after is None else after
        self.report.kept_positions.append(tokens.position[0])
        self.report.vision_tokens_per_layer.append(tokens.num_video)
        self.tokens = tokens.at(tokens.hidden.new_empty(0), None)  # a layer's input is not held while it runs
        return tokens.hidden

    def after_attention(self, index: int, hidden: Tensor, tap: AttentionTap) -> Tensor | None:
        """The rows [B, M, D] that the feed-forward block is to see; None for all."""
        if self.tokens is None:
            return None
        before = self.tokens.at(hidden, tap.scores(self._valid_rows(index)))
        after = self._call("after_attention", index, before)
        if after is None or after.length == before.length:
            return None
        self.tokens, self.residual = after.at(hidden.new_empty(0), None), after.hidden
        return after.hidden

    def after_layer(self, hidden: Tensor) -> Tensor:
        """The layer's output [B, M, D] with what the decoder would have added to it."""
        if self.tokens is None or not self.tokens.additions:
            return hidden
        first, *later = self.tokens.additions
        self.tokens = replace(self.tokens, additions=tuple(later))
        return hidden + first.to(hidden.device, hidden.dtype)

    def layer_arguments(self, index: int, hidden: Tensor, given: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """The layer's keyword arguments that differ from what the decoder gave, and the cache's bookkeeping."""
        cached = self.cache_layers[index] if self.cache_layers is not None else None
        past, rows = (0 if cached is None else cached.rows), hidden.shape[1]
        valid = self.valid
        if valid is not None and self.tokens is not None:
            valid = valid.gather(1, self.tokens.position)
        shorter_past = cached is not None and cached.missing > 0
        if not self.attends[index]:  # takes the padding mask of its rows
            return {"attention_mask": valid} if self.is_shorter else {}
        if cached is not None:
            valid = cached.append_valid(past, rows, valid)
            cached.missing += self.length - rows
            if rows < self.length:
                cached.fixed = past + rows + cached.missing
        changed: dict[str, Any] = {}
        if self.is_shorter:
            assert self.tokens is not None
            changed["position_ids"] = None  # flash attention takes ids with gaps for packed sequences
            changed["position_embeddings"] = tuple(
                _like(part, original) for part, original in zip(self.tokens.companions, self._rotary_like, strict=True)
            )
        if (self.is_shorter or shorter_past) and (given.get("attention_mask") is not None or (rows > 1 and past > 0)):
            changed["attention_mask"] = self._mask(config, hidden, valid, past)
        return changed

    def restore(self, hidden: Tensor) -> Tensor:
        """[B, M, D] -> [B, N, D]: every row back in its place in the prompt, zeros elsewhere."""
        assert self.tokens is not None
        full = hidden.new_zeros(self.batch, self.length, hidden.shape[-1])
        return full.scatter(1, self.tokens.position[..., None].to(hidden.device).expand_as(hidden), hidden)

    def finish(self) -> Report:
        """The report of a prefill that went through."""
        assert self.report is not None
        self.report.least_budget = self.calls.least_budget
        self.stopwatch.spans.append(("prefill", self._started, self.stopwatch.now()))
        return self.report

    def _call(self, stage: str, index: int, tokens: VideoTokens) -> VideoTokens | None:
        assert self.report is not None
        start = self.stopwatch.now()
        after = getattr(self.calls, stage)(index, tokens)
        if after is None:
            return None
        name = "prune" if after.merge is None else "merge"
        self.stopwatch.spans.append((name, start, self.stopwatch.now()))
        if after.merge is None:
            self.report.prune_layer = index
            self.report._prunings.append((tokens.position[0], after.position[0]))
        else:
            step = MergeStep(index, stage, tokens.num_video, after.num_video, after.merge)
            self.report.merge_steps.append(step)
        return after

    def _valid_rows(self, index: int) -> Tensor | None:
        """[B, past + n] bool: which rows of the layer's keys are no padding; None: all."""
        cached = self.cache_layers[index] if self.cache_layers is not None else None
        if cached is not None:
            return cached.valid
        assert self.tokens is not None
        return None if self.valid is None else self.valid.gather(1, self.tokens.position)

    def _mask(self, config: Any, hidden: Tensor, valid: Tensor | None, past: int) -> Any:
        key = (past, hidden.shape[1], hidden.device)
        if key not in self._masks:
            self._masks = {key: causal_mask(config, hidden, valid, past)}
        return self._masks[key]


def _rows_first(part: Tensor, batch: int) -> Tensor:
    """Rotary [1 or B, N, d] or [3, 1 or B, N, d] -> [B, N, d] or [B, N, 3, d], without a copy."""
    if part.ndim == 4:
        return part.expand(-1, batch, -1, -1).permute(1, 2, 0, 3)
    return part.expand(batch, -1, -1)


def _like(part: Tensor, original: Tensor) -> Tensor:
    """Undo `_rows_first`, up to the length."""
    return part.permute(2, 0, 1, 3) if original.ndim == 4 else part
