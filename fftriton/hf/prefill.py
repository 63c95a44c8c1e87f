"""One forward of a reduced decoder: the rows that are left, and all that has to fit them.

A method sees one sample at a time, without padding. In between the samples of a batch are packed: each stands at the
right end of its row, behind padding up to the longest. A batch of one is never copied for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fftriton_kernels import verified

from ..layouts.layout import VideoLayout, patch_ids
from ..methods.base import Merge, Method, MethodState, Prompt, VideoTokens, Window, list_steps, start
from .cache import ReducedLayer
from .compat import UnknownReleaseError, attention_name, causal_mask
from .finder import Video
from .importance import Attention
from .invariants import STRUCTURE, Invariants, check_left, versions
from .report import BatchReport, MergeStep, Report, Stopwatch
from .window import Windows

_STAND_IN = 0.5  # what a layer adds to a residual that is thrown away; not 0, so that its sum can be checked

CacheLayers = Sequence[ReducedLayer | None] | None
"""A KV cache's layers, None for a recurrent one; None without a cache."""


class Continuation:
    """A forward without a video behind a reduced prompt: masks and the cache's bookkeeping.

    Args:
        source: [B, N] or [B, N, D], what the decoder gets.
        valid: [B, N] bool, False for padding; None when nothing is padded.
        cache_layers: where keys and values go.
    """

    def __init__(
        self, source: Tensor, valid: Tensor | None, cache_layers: Sequence[ReducedLayer | None] | None
    ) -> None:
        self.batch, self.length = source.shape[:2]
        self.valid, self.cache_layers = valid, cache_layers
        self.packed = False  # whether the rows are other than the tokens that the decoder got
        self.window: Windows | None = None  # what the tokens of this forward may attend to
        self.free_tail = 0  # so many tokens at the end are the last rows of every sample: a crop can remove them
        self._masks: dict[tuple, tuple] = {}
        self._flags: dict[tuple, tuple] = {}

    def layer_arguments(self, index: int, hidden: Tensor, given: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """The layer's keyword arguments that differ from what the decoder gave, and the cache's bookkeeping."""
        cached = None if self.cache_layers is None else self.cache_layers[index]
        window = self.window if cached is None else cached.window
        if not self.packed and window is None and (cached is None or not cached.reduced):
            return {}
        past, rows = (0 if cached is None else cached.rows), hidden.shape[1]
        valid = self.valid
        if cached is not None:
            valid = self._append_flags(cached, past, rows)
            cached.missing += self.length - rows
            cached.reduced = True
            if self.packed:
                cached.fixed = past + rows + cached.missing - self.free_tail
        changed: dict[str, Any] = {}
        if "attention_mask" not in given:
            raise UnknownReleaseError(f"the decoder must call its layers with 'attention_mask', got {', '.join(given)}")
        narrow = window if rows > 1 else None  # for one token the cache holds no more than it may attend to
        if given["attention_mask"] is not None or valid is not None or (rows > 1 and past > 0) or narrow:
            changed["attention_mask"] = self._mask(config, hidden, valid, past, narrow)
        return changed

    def _append_flags(self, cached: ReducedLayer, past: int, rows: int) -> Tensor | None:
        """The flags of all rows of a layer; layers that share them go on to do so."""
        key = (id(cached.valid), id(self.valid), past)
        if key in self._flags:
            *_, cached.valid = self._flags[key]
        else:
            before = cached.valid
            cached.append_valid(past, rows, self.valid)
            self._flags[key] = before, self.valid, cached.valid  # alive, so that their ids stay theirs
        return cached.valid

    def _mask(self, config: Any, hidden: Tensor, valid: Tensor | None, past: int, window: Windows | None) -> Any:
        key = (id(valid), past, hidden.shape[1], hidden.device, id(window))
        if key not in self._masks:
            flags = None if valid is None else valid.to(hidden.device)
            sees = None if window is None else window.mask(flags, past + hidden.shape[1], hidden.device)
            mask = causal_mask(config, hidden, flags, past, sees)
            if window is not None and (mask is None or (isinstance(mask, Tensor) and mask.ndim < 4)):
                raise ValueError(
                    "reduce: attn_implementation must be one that takes a mask of queries and keys, such as sdpa or "
                    f"eager, for a method that restricts attention; got {attention_name(config)!r}"
                )
            self._masks = {key: (valid, window, mask)}
        return self._masks[key][-1]


class Sample:
    """One row of the batch: its tokens, without padding, and what its method keeps in mind.

    Attributes:
        rows: where its tokens stand in the batch's hidden states.
        places: where they stood in the padded prompt; None where those are their numbers.
        later: how many text tokens at the end are continuations of the prompt (candidates of assisted decoding, an
            answer to be scored): their attention does not count.
        past: tokens before those of this forward.
    """

    def __init__(
        self, calls: MethodState | None, report: Report, rows: slice | Tensor, places: Tensor | None,
        tokens: VideoTokens, later: int,
    ) -> None:  # fmt: skip
        self.calls, self.report, self.rows, self.places = calls, report, rows, places
        self.tokens, self.later = tokens, later
        self.past = 0

    @property
    def position(self) -> Tensor:
        """[n] int64: where the tokens that are left stood in the padded prompt."""
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
        """What the method leaves of the tokens; `before` itself where it changes nothing."""
        if self.calls is None:
            return before
        watch, count = self.report._stopwatch, versions(before)
        start = watch.now()
        with verified() if verify else nullcontext():
            after = getattr(self.calls, stage)(index, before)
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


class Prefill(Continuation):
    """A forward with a video.

    Args:
        source, valid, cache_layers: as for Continuation.
        method, videos: what to keep of what.
        attends: for each layer, whether it has attention; else it is recurrent.
        additions: [B, N, D] each, what the decoder would have added to the outputs of its first layers.
        later: how many tokens at the end are continuations of the prompt.
        targets: labels [B, N] that the reduction may write to, and how far ahead of their logits they are. The last
            that are given without a gap are an answer, a continuation like the others.
        verify: check all that a method and its ops do, at any cost.
    """

    def __init__(
        self, source: Tensor, valid: Tensor | None, cache_layers: CacheLayers,
        method: Method, videos: Sequence[Video], attends: Sequence[bool], additions: Sequence[Tensor], later: int = 0,
        targets: Sequence[tuple[Tensor, int]] = (), verify: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(source, valid, cache_layers)
        self.method, self.videos, self.attends, self.later = method, videos, attends, later
        self.targets, self.verify = targets, verify
        self.asking = False  # whether the method is at work
        self._additions = additions
        self._invariants = Invariants()
        self._fed: Tensor | None = None  # [B, D] the last row that this layer's post_attention_layernorm got
        self._sum: Tensor | None = None  # [B, D] what the layer is to return there
        self.samples: list[Sample] = []
        self.residual: Tensor | None = None  # [B, M, D] rows kept, waiting for their feed-forward output
        self.layer_output: Tensor | None = None  # [B, M, D] what the layer is to return
        self.states: list[Tensor] | None = None  # what went into the first layer and came out of each, where asked for
        self._rotary_like: Sequence[Tensor] = ()
        self._stopwatch = Stopwatch(source.device)

    def begin(self, hidden: Tensor, given: Mapping[str, Any]) -> None:
        """Take the prompt's hidden states [B, N, D] and the arguments of layer 0."""
        if given.get("position_embeddings") is None and any(self.attends):
            raise UnknownReleaseError(
                f"the decoder must call its layers with 'position_embeddings', got {', '.join(given)}"
            )
        self._started = self._stopwatch.now()
        self._rotary_like = given.get("position_embeddings") or ()
        companions = [_rows_first(part, self.batch) for part in self._rotary_like]
        patch = patch_ids([video.layout for video in self.videos], self.batch, self.length, hidden.device)
        for index in range(self.batch):
            rows = _real_rows(self.valid, index, self.length)
            number = torch.arange(self.length, device=hidden.device)
            places = number[rows]
            is_padded = len(places) < self.length
            number = number[: len(places)]
            videos = [video for video in self.videos if video.layout.sample == index]
            layouts = [video.layout for video in videos]
            own, count = slice(index, index + 1), sum(len(layout.tokens) for layout in layouts)
            tokens = VideoTokens(
                hidden.new_empty(0), number[None], patch[own][:, rows], count,
                tuple(part[own][:, rows] for part in companions),
                additions=tuple(part[own][:, rows].to(hidden.device) for part in self._additions),
            )  # fmt: skip
            calls = None
            if videos:
                own_layouts = [_numbered(layout, places) for layout in layouts] if is_padded else layouts
                prompt = Prompt(len(self.attends), tokens.length, own_layouts, self.attends, videos[0].number)
                calls = start(self.method, prompt)
            report = Report(
                str(self.method), self.method.budget, layouts, tokens.length, count, _stopwatch=self._stopwatch
            )
            tail = self._tail(layouts, rows)
            later = max(self.later if self.later <= tail else 0, self._answer_length(index, rows, tokens.patch[0]))
            self.samples.append(Sample(calls, report, rows, places if is_padded else None, tokens, later))
            self.free_tail = min(tail, self.free_tail if index else tail)

    def _answer_length(self, index: int, rows: slice | Tensor, patch: Tensor) -> int:
        """How many of a sample's last tokens its labels make an answer to what stands before."""
        if not self.targets or not bool((patch >= 0).any()):
            return 0
        tail = len(patch) - 1 - int((patch >= 0).nonzero()[-1])
        lengths = [_answer_length(targets[index, rows], shift) for targets, shift in self.targets]
        return max((length for length in lengths if length < tail), default=0)

    def expect_one_sequence(self, position_ids: Tensor | None) -> None:
        """That positions [1, N], or [4, 1, N] with the text's first, do not start anew as a packed sequence's do."""
        if position_ids is None or (position_ids.ndim == 3 and len(position_ids) != 4):
            return
        text = position_ids if position_ids.ndim == 2 else position_ids[0]
        self._invariants.expect(
            (text.diff() >= 0).all(), "reduce: position_ids must not start anew: packed sequences cannot be reduced"
        )

    def check_depth(self, num_layers: int) -> None:
        """Raise a RuntimeError unless every layer has run."""
        ran = len(self.samples[0].report.kept_positions) if self.samples else 0
        if ran != num_layers:
            raise RuntimeError(f"reduce: the decoder must run each of its {num_layers} layers, but ran {ran}")

    def _tail(self, layouts: list[VideoLayout], rows: slice | Tensor) -> int:
        """How many tokens stand behind a sample's last video; none where the sample ends before its row does."""
        if not isinstance(rows, slice) or rows.stop < self.length:
            return 0
        return self.length - 1 - max((layout.span[1] for layout in layouts), default=-1)

    def wants_attention(self, index: int) -> bool:
        return any(sample.calls is not None and sample.calls.wants_attention(index) for sample in self.samples)

    def before_attention(self, index: int, hidden: Tensor) -> Tensor:
        """The rows [B, M, D] that the layer is to see."""
        hidden = self._reduce("before_attention", index, hidden, None)
        if index == 0:
            self._restrict()
        for sample in self.samples:
            position, count = sample.seen()
            sample.report.kept_positions.append(position)
            sample.report.vision_tokens_per_layer.append(count)
            sample.report.rows_per_layer.append(sample.tokens.length)
        return hidden

    def _restrict(self) -> None:
        """Ask the method about every sample's window, which does not grow with what follows the prompt."""
        layers = [layer for layer in self.cache_layers or () if layer is not None]
        past = layers[0].get_seq_length() if layers else 0
        for sample in self.samples:
            if sample.calls is not None:
                sample.past = past
                window = sample.calls.window(past + sample.tokens.length - sample.later)
                if not isinstance(window, Window | type(None)):
                    raise TypeError(
                        f"reduce: {self.method}: window must return a Window or None, got {type(window).__name__}"
                    )
                sample.report.window = window
        self.window = Windows.of([sample.report.window for sample in self.samples])
        for layer in layers:
            layer.window = self.window

    def after_attention(self, index: int, hidden: Tensor, heard: Attention | None) -> Tensor | None:
        """The rows [B, M, D] that the feed-forward block is to see; None where nothing changed."""
        if heard is None and self.attends[index] and self.wants_attention(index):
            raise UnknownReleaseError(
                f"{self.method} wants the attention scores of layer {index}, whose attention must choose its function "
                "by config._attn_implementation, but does not"
            )
        self._fed = hidden[:, -1]
        left = self._reduce("after_attention", index, hidden, heard)
        if left is hidden:
            return None
        self.residual = left
        return left

    def after_feed_forward(self, added: Tensor) -> Tensor | None:
        """What the layer is to add to the residual that it holds, where that is not `added` [B, M, D] itself."""
        assert self._fed is not None  # torch calls the norm's hook before
        if self.residual is None:
            self._sum, self._fed = self._fed + added[:, -1], None
            return None
        self.layer_output, self.residual = self.residual + added, None
        stand_in = added.new_full((1,), _STAND_IN)
        self._sum, self._fed = self._fed + stand_in, None
        return stand_in

    def output(self, index: int, given: Tensor) -> Tensor:
        """The layer's output [B, M, D], where it returned `given`."""
        if self._sum is None:
            raise TypeError(f"reduce: layer {index} of the decoder {STRUCTURE}")
        self._invariants.expect_output(index, given[:, -1], self._sum)
        self._sum = None
        hidden, self.layer_output = given if self.layer_output is None else self.layer_output, None
        return hidden

    def layer_arguments(self, index: int, hidden: Tensor, given: Mapping[str, Any], config: Any) -> dict[str, Any]:
        if not self.attends[index]:  # takes the padding mask of its rows
            return {"attention_mask": self.valid} if self.packed else {}
        changed = super().layer_arguments(index, hidden, given, config)
        if self.packed:
            changed["position_ids"] = None  # flash attention takes ids with gaps for packed sequences
            if self._rotary_like:
                changed["position_embeddings"] = self._rotary
        return changed

    def after_layer(self, hidden: Tensor) -> Tensor:
        """The layer's output [B, M, D] with what the decoder would have added to it."""
        if not self._additions:
            return hidden
        first, *self._additions = self._additions
        for sample in self.samples:
            sample.tokens = replace(sample.tokens, additions=sample.tokens.additions[1:])
        return hidden + first.to(hidden.device, hidden.dtype)

    def note_state(self, hidden: Tensor) -> None:
        """Keep [B, M, D] hidden states, where they are asked for."""
        if self.states is not None:
            self.states.append(hidden)

    def restore(self, hidden: Tensor) -> Tensor:
        """[B, M, D] -> [B, N, D]: every row back in its place in the prompt, zeros elsewhere."""
        full = hidden.new_zeros(self.batch, self.length, hidden.shape[-1])
        for index, sample in enumerate(self.samples):
            full[index].index_copy_(0, sample.position.to(hidden.device), hidden[index, sample.rows])
        return full

    def hide_targets(self) -> None:
        """Set the labels that dropped tokens are, or were to predict, to -100."""
        if not self.packed:
            return
        for targets, shift in self.targets:
            dropped = torch.ones(self.batch, self.length, dtype=torch.bool, device=targets.device)
            for index, sample in enumerate(self.samples):
                dropped[index, sample.position.to(targets.device)] = False
            targets[dropped] = -100
            targets[:, shift:][dropped[:, : self.length - shift]] = -100

    def finish(self) -> Report | BatchReport:
        """The report of a prefill that went through. Raises where something did not hold that must."""
        self._invariants.read()
        if self.packed:  # in the layers before the first reduction, too: a crop that one refuses all refuse
            held = [layer for layer in self.cache_layers or () if layer is not None]
            for layer in held:
                layer.fixed = max(other.fixed for other in held)
        self._stopwatch.spans.append(("prefill", self._started, self._stopwatch.now()))
        for sample in self.samples:
            if sample.calls is not None:
                sample.report.least_budget = sample.calls.least_budget
        reports = [sample.report for sample in self.samples]
        return reports[0] if len(reports) == 1 else BatchReport(reports)

    def _reduce(self, stage: str, index: int, hidden: Tensor, attention: Attention | None) -> Tensor:
        """Ask the method about every sample; `hidden` itself where nothing changed."""
        before = [
            sample.tokens.at(hidden[row : row + 1, sample.rows], self._scores(attention, index, row))
            for row, sample in enumerate(self.samples)
        ]
        self.asking = True
        try:
            after = [
                sample.ask(stage, index, tokens, self._invariants, self.verify)
                for sample, tokens in zip(self.samples, before, strict=True)
            ]
        finally:
            self.asking = False
        for sample, tokens in zip(self.samples, after, strict=True):
            sample.tokens = tokens.at(hidden.new_empty(0), None)  # a layer's input is not held while it runs
        if all(left.hidden is given.hidden for left, given in zip(after, before, strict=True)):
            return hidden
        return self._pack([tokens.hidden for tokens in after])

    def _scores(self, attention: Attention | None, index: int, row: int) -> Any:
        """What `VideoTokens.attention` is to be for one sample."""
        if attention is None:
            return None
        sample = self.samples[row]
        past = attention.k.shape[2] - attention.q.shape[2]
        cached = None if self.cache_layers is None else self.cache_layers[index]
        known = None if cached is None or past == 0 else cached.valid
        past_valid = None if known is None else known[:, :past].to(attention.k.device)
        return partial(attention.received, row, sample.rows, past_valid, sample.later)

    def _pack(self, parts: list[Tensor]) -> Tensor:
        """The samples' rows [1, n, D] -> [B, M, D], and everything else that has to fit them."""
        lengths = [part.shape[1] for part in parts]
        longest = max(lengths)
        for sample, length in zip(self.samples, lengths, strict=True):
            sample.rows = slice(longest - length, longest)
        padded = self.valid is not None or min(lengths) < longest
        self.packed, self.valid = True, None
        if padded:  # where the padding is gone, too: the decoder goes on to make masks for it
            starts = torch.tensor([longest - length for length in lengths])
            self.valid = (torch.arange(longest) >= starts[:, None]).to(parts[0].device)
        companions = zip(*(sample.tokens.companions for sample in self.samples), strict=True)
        additions = zip(*(sample.tokens.additions for sample in self.samples), strict=True)
        self._rotary = tuple(
            _like(_left_padded(part), original) for part, original in zip(companions, self._rotary_like, strict=True)
        )
        self._additions = [_left_padded(part) for part in additions]
        return _left_padded(parts)


def _left_padded(parts: Sequence[Tensor]) -> Tensor:
    """[1, n, ...] each -> [B, M, ...], M the longest n; zeros on the left. One alone is not copied."""
    if len(parts) == 1:
        return parts[0]
    return pad_sequence([part[0] for part in parts], batch_first=True, padding_side="left")


def _numbered(layout: VideoLayout, places: Tensor) -> VideoLayout:
    """The layout of a padded prompt, counted among the `places` [n] int64 that are no padding."""
    positions, places = layout.positions, places.to(layout.positions.device)
    numbers = torch.searchsorted(places, positions.clamp(min=0).contiguous())
    return VideoLayout(positions.where(positions < 0, numbers), layout.sample)


def _answer_length(targets: Tensor, shift: int) -> int:
    """How many of a sample's last tokens its labels [n] make an answer: those from the last run without -100 on."""
    labelled = (targets != -100).tolist()
    end = next((place for place in reversed(range(len(labelled))) if labelled[place]), None)
    if end is None:
        return 0
    start = next((place for place in reversed(range(end)) if not labelled[place]), -1) + 1
    return len(labelled) - start - (1 - shift)


def _real_rows(valid: Tensor | None, sample: int, length: int) -> slice | Tensor:
    """Which of `length` rows of a sample are no padding: a slice where they stand together, else [n] int64."""
    if valid is None:
        return slice(0, length)
    rows = valid[sample].nonzero()[:, 0]
    if len(rows) == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _rows_first(part: Tensor, batch: int) -> Tensor:
    """Rotary [1 or B, N, d] or [3, 1 or B, N, d] -> [B, N, d] or [B, N, 3, d], without a copy."""
    if part.ndim == 4:
        return part.expand(-1, batch, -1, -1).permute(1, 2, 0, 3)
    return part.expand(batch, -1, -1)


def _like(part: Tensor, original: Tensor) -> Tensor:
    """Undo `_rows_first`, up to the length."""
    return part.permute(2, 0, 1, 3) if original.ndim == 4 else part
