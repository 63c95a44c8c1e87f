"""One reduced prefill: the hidden states on their way through the decoder's layers.

This is the walk, in order, with the hooks that make the calls in parentheses; those of the layers are in layers.py. N
is the length of the prompt, M the number of rows that are left.

    before the decoder (decoder_hooks.py, DecoderHooks.before)
        LayerHooks.open             the layers get their hooks, and this thread has the forward open
    at the start of layer 0 (_before_layer)
        Prefill.begin               a BatchRow for each sample: its tokens without padding, and the state of its method
    in every layer
      before it (_before_layer)
        Prefill.before_attention    [B, M, D] in; the method is asked; the rows that the layer is to see, out
        Prefill.layer_arguments     the mask and the rotary embeddings of these rows; the KV cache counts what it lacks
      before its post_attention_layernorm (_before_feed_forward)
        Prefill.after_attention     the method is asked again, now with the attention scores that AttentionTap heard;
                                    if rows leave, the norm gets those that are kept
      after its mlp (_after_feed_forward)
        ResidualStream.add_feed_forward
                                    the layer holds the residual of all its rows, so what it adds to that is thrown
                                    away; the mlp's output is added to the rows kept here instead
      after it (_output, then the user's hooks, then _after_layer)
        ResidualStream.leave_layer  the layer's output is replaced by that sum
        Prefill.after_layer         what the decoder would have added to it (Qwen3-VL's deepstack features); after the
                                    last layer [B, M, D] -> [B, N, D]: every row in its place, zeros for those that left
    after the decoder (decoder_hooks.py, DecoderHooks.after)
        Prefill.check_depth         have all layers run?
        Prefill.finish              do the invariants hold? The report
        Prefill.hide_targets        labels of rows that left become -100

If gradient checkpointing is on, all this is recorded (selection.py), and checkpointing.py repeats it in the backward
pass, layer by layer.

Each time the method is asked, Prefill._reduce hands every sample to BatchRow.ask. If anything has changed,
Prefill._pack puts the samples together again, and everything else that has to fit them: rotary embeddings, deepstack
features and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import VideoLayout, patch_ids
from ..methods.base import Method, Prompt, VideoTokens, Window, start
from .compat import UnknownReleaseError
from .continuation import CacheLayers, Continuation
from .finder import PlacedVideo
from .flops import prefill_flops
from .importance import Attention
from .invariants import Invariants
from .report import Report, SampleReport, Stopwatch
from .residual import ResidualStream
from .rows import BatchRow, answer_length, as_rotary, real_rows, rows_first, without_padding
from .selection import Record, Selection, left_padded
from .window import Windows


class Prefill(Continuation):
    """A forward with a video.

    Args:
        source, valid, cache_layers: as for Continuation.
        method: what to keep.
        videos: of what.
        attends: per layer, whether it has attention; otherwise it is recurrent.
        additions: [B, N, D] each, what the decoder would have added to the outputs of its first layers.
        later: how many tokens at the end are continuations of the prompt.
        targets: labels [B, N] that the reduction may write to, and how far ahead of their logits they are. The last
            run of labels without a gap is an answer, a continuation like the others.
        verify: check everything that a method and its ops do, at any cost.
        wants_states: whether hidden states are asked for.
        runs_again: whether gradient checkpointing runs layers a second time.

    Attributes:
        samples: one row per sample, from `begin` on.
        residual: what is pending between the hooks of a layer, and the hidden states that were asked for.
        record: what is done to the hidden states, if layers run a second time; otherwise None.
    """

    hears = True

    def __init__(
        self, source: Tensor, valid: Tensor | None, cache_layers: CacheLayers,
        method: Method, videos: Sequence[PlacedVideo], attends: Sequence[bool], additions: Sequence[Tensor],
        later: int = 0, targets: Sequence[tuple[Tensor, int]] = (), verify: bool = False, wants_states: bool = False,
        runs_again: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(source, valid, cache_layers)
        self.method, self.videos, self.attends, self.later = method, videos, attends, later
        self.targets, self.verify = targets, verify
        self.samples: list[BatchRow] = []
        self._additions = additions
        self.record = Record(additions) if runs_again else None
        self._invariants = Invariants()
        self.residual = ResidualStream(self._invariants, wants_states)
        self._rotary_like: Sequence[Tensor] = ()
        self._stopwatch = Stopwatch(source.device)

    def begin(
        self, hidden: Tensor, given: Mapping[str, Any], config: Any, first_layers: Callable[..., Attention]
    ) -> None:
        """Take the prompt's hidden states [B, N, D] and the arguments of layer 0.

        Args:
            hidden, given: these.
            config: the decoder's.
            first_layers: runs the first layers beside this forward, see LayerHooks.
        """
        self._config, self._run_first_layers = config, first_layers
        self.samples.clear()  # transformers 4 runs a forward again after a TypeError
        if given.get("position_embeddings") is None and any(self.attends):
            raise UnknownReleaseError(
                f"the decoder must call its layers with 'position_embeddings', got {', '.join(given)}"
            )
        self._started = self._stopwatch.now()
        self._rotary_like = given.get("position_embeddings") or ()
        companions = [rows_first(part, self.batch) for part in self._rotary_like]
        patch = patch_ids([video.layout for video in self.videos], self.batch, self.length, hidden.device)
        for index in range(self.batch):
            rows = real_rows(self.valid, index, self.length)
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
                additions=tuple(part[own][:, rows].to(hidden.device, hidden.dtype) for part in self._additions),
            )  # fmt: skip
            state = None
            if videos:
                own_layouts = [without_padding(layout, places) for layout in layouts] if is_padded else layouts
                prompt = Prompt(
                    len(self.attends), tokens.length, own_layouts, self.attends, [video.number for video in videos],
                    self.videos[0].total,
                )  # fmt: skip
                state = start(self.method, prompt)
            report = SampleReport(str(self.method), self.method.budget, layouts, tokens.length, count)
            tail = self._tail(layouts, rows)
            later = max(self.later if self.later <= tail else 0, self._answer_length(index, rows, tokens.patch[0]))
            self.samples.append(
                BatchRow(
                    state,
                    report,
                    rows,
                    places if is_padded else None,
                    tokens,
                    later,
                    self._stopwatch,
                    bool(self.record),
                )
            )
            self.free_tail = min(tail, self.free_tail if index else tail)

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

    def layer_arguments(self, index: int, hidden: Tensor, given: Mapping[str, Any], config: Any) -> dict[str, Any]:
        if not self.attends[index]:  # a recurrent layer takes the padding mask of its rows
            changed: dict[str, Any] = {"attention_mask": self.valid} if self.packed else {}
        else:
            changed = super().layer_arguments(index, hidden, given, config)
            if self.log_sizes_of_keys is not None:
                for sample in self.samples:
                    sample.report.sized_layers.append(index)
            if self.packed:
                changed["position_ids"] = None  # flash attention takes ids with gaps for packed sequences
                if self._rotary_like:
                    changed["position_embeddings"] = self._rotary
        if self.record is not None:
            self.record.arguments[index] = changed
        return changed

    def _first_layers(self, row: int, tokens: VideoTokens, layer: int, queries: int | None) -> tuple[Tensor, float]:
        """See `VideoTokens.first_layers`, for one sample."""
        rotary = tuple(
            as_rotary(part, original) for part, original in zip(tokens.companions, self._rotary_like, strict=True)
        )
        log_sizes = None if tokens.sizes is None else tokens.sizes.log()
        heard = self._run_first_layers(tokens.hidden, rotary, tokens.additions, layer, log_sizes)
        later = min(self.samples[row].later, tokens.length - 1)
        received = heard.received(0, slice(0, tokens.length), None, later, queries)
        counts = [tokens.length] * (layer + 1) + [0]  # the last one ends after its attention
        sized = range(layer + 1) if tokens.sizes is not None else ()
        return received.to(tokens.hidden.device), prefill_flops(self._config, counts, counts, sized)

    def after_attention(self, index: int, hidden: Tensor, heard: Attention | None) -> Tensor | None:
        """The rows [B, M, D] that the feed-forward block is to see, or None if nothing changed."""
        if heard is None and self.attends[index] and self.wants_attention(index):
            raise UnknownReleaseError(
                f"{self.method} wants the attention scores of layer {index}, whose attention must choose its function "
                "by config._attn_implementation, but does not"
            )
        self.residual.reach_norm(hidden)
        left = self._reduce("after_attention", index, hidden, heard)
        if left is hidden:
            return None
        self.residual.keep(left)
        return left

    def after_layer(self, index: int, hidden: Tensor) -> Tensor:
        """The layer's output [B, M, D] with what the decoder would have added to it; after the last one [B, N, D]."""
        addition = None
        if self._additions:
            addition, *self._additions = self._additions
            for sample in self.samples:
                sample.tokens = replace(sample.tokens, additions=sample.tokens.additions[1:])
        return self.outcome(index, hidden, addition)

    def outcome(self, index: int, hidden: Tensor, addition: Tensor | None = None) -> Tensor:
        """The same for an addition [B, M, D] that has the layer's rows, and for one that has been recorded."""
        if self.record is not None:
            hidden = self.record.add(index, hidden)
        elif addition is not None:
            hidden = hidden + addition.to(hidden.device, hidden.dtype)
        return self.restore(hidden) if self.packed and index == len(self.attends) - 1 else hidden

    def restore(self, hidden: Tensor) -> Tensor:
        """[B, M, D] -> [B, N, D]: every row back in its place in the prompt, zeros elsewhere."""
        full = hidden.new_zeros(self.batch, self.length, hidden.shape[-1])
        for index, sample in enumerate(self.samples):
            full[index].index_copy_(0, sample.position.to(hidden.device), hidden[index, sample.rows])
        return full

    def check_depth(self, num_layers: int) -> None:
        """Raise a RuntimeError unless every layer has run."""
        ran = len(self.samples[0].report.kept_positions) if self.samples else 0
        if ran != num_layers:
            raise RuntimeError(f"reduce: the decoder must run each of its {num_layers} layers, but ran {ran}")

    def finish(self) -> Report:
        """The report of a prefill that went through. Raises if an invariant did not hold."""
        self._invariants.read()
        if self.packed:  # also in the layers before the first reduction: a crop that one refuses all refuse
            held = [layer for layer in self.cache_layers or () if layer is not None]
            for layer in held:
                layer.fixed = max(other.fixed for other in held)
        self._stopwatch.spans.append(("prefill", self._started, self._stopwatch.now()))
        for sample in self.samples:
            if sample.state is not None:
                sample.report.least_budget = sample.state.least_budget
                sample.report.frame_scores = list(sample.state.frame_scores)
        return Report([sample.report for sample in self.samples], self._stopwatch)

    def hide_targets(self) -> None:
        """Set the labels of dropped tokens, and those that they were to predict, to -100."""
        if not self.packed:
            return
        for targets, shift in self.targets:
            dropped = torch.ones(self.batch, self.length, dtype=torch.bool, device=targets.device)
            for index, sample in enumerate(self.samples):
                dropped[index, sample.position.to(targets.device)] = False
            targets[dropped] = -100
            targets[:, shift:][dropped[:, : self.length - shift]] = -100

    def wants_attention(self, index: int) -> bool:
        """Whether the method may ask for the attention scores of this layer."""
        return any(sample.state is not None and sample.state.wants_attention(index) for sample in self.samples)

    def expect_one_sequence(self, position_ids: Tensor | None) -> None:
        """Check that positions [1, N], or [4, 1, N] with the text's first, do not start anew as in packed sequences."""
        if position_ids is None or (position_ids.ndim == 3 and len(position_ids) != 4):
            return
        text = position_ids if position_ids.ndim == 2 else position_ids[0]
        self._invariants.expect(
            (text.diff() >= 0).all(), "reduce: position_ids must not start anew: packed sequences cannot be reduced"
        )

    def _answer_length(self, index: int, rows: slice | Tensor, patch: Tensor) -> int:
        """How many of a sample's last tokens its labels make an answer to what comes before."""
        if not self.targets or not bool((patch >= 0).any()):
            return 0
        tail = len(patch) - 1 - int((patch >= 0).nonzero()[-1])
        lengths = [answer_length(targets[index, rows], shift) for targets, shift in self.targets]
        return max((length for length in lengths if length < tail), default=0)

    def _tail(self, layouts: list[VideoLayout], rows: slice | Tensor) -> int:
        """How many tokens follow a sample's last video; 0 if the sample ends before its row does."""
        if not isinstance(rows, slice) or rows.stop < self.length:
            return 0
        return self.length - 1 - max((layout.span[1] for layout in layouts), default=-1)

    def _restrict(self) -> None:
        """Ask the method for every sample's window, which does not grow with what follows the prompt."""
        layers = [layer for layer in self.cache_layers or () if layer is not None]
        past = layers[0].get_seq_length() if layers else 0
        valid = layers[0].valid if layers else None
        padding = [0] * self.batch if valid is None else (~valid).sum(1).tolist()
        for sample, padded in zip(self.samples, padding, strict=True):
            if sample.state is not None:
                sample.past = past - padded
                window = sample.state.window(sample.past + sample.tokens.length - sample.later)
                if not isinstance(window, Window | type(None)):
                    raise TypeError(
                        f"reduce: {self.method}: window must return a Window or None, got {type(window).__name__}"
                    )
                sample.report.window = window
        self.window = Windows.of([sample.report.window for sample in self.samples])
        for layer in layers:
            layer.window = self.window

    def _reduce(self, stage: str, index: int, hidden: Tensor, attention: Attention | None) -> Tensor:
        """Ask the method about every sample. Returns `hidden` itself if nothing changed."""
        before = [
            sample.tokens.at(hidden[row : row + 1, sample.rows], *self._senses(stage, attention, index, row))
            for row, sample in enumerate(self.samples)
        ]
        self.asking = True
        try:
            with nullcontext() if self.record is None else torch.no_grad():
                after = [
                    sample.ask(stage, index, tokens, self._invariants, self.verify)
                    for sample, tokens in zip(self.samples, before, strict=True)
                ]
        finally:
            self.asking = False
        if not self.method.proportional and any(tokens.sizes is not None for tokens in after):
            raise RuntimeError(
                f"reduce: {self.method}, {stage} of layer {index}: sizes must be None unless the method is proportional"
            )
        for sample, tokens in zip(self.samples, after, strict=True):
            sample.tokens = tokens.at(hidden.new_empty(0), None)  # a layer's input is not held while it runs
        same = (
            left.hidden is given.hidden and left.sizes is given.sizes for left, given in zip(after, before, strict=True)
        )
        if all(same):
            return hidden
        if self.record is None:
            return self._pack([tokens.hidden for tokens in after])
        selection = Selection([sample.rows for sample in self.samples], [sample.steps for sample in self.samples])
        with torch.no_grad():
            expected = self._pack([tokens.hidden for tokens in after])
        return self.record.select(index, stage, selection, hidden, expected, str(self.method))

    def _senses(self, stage: str, attention: Attention | None, index: int, row: int) -> tuple[Any, Any]:
        """What `VideoTokens.attention` and `VideoTokens.first_layers` are to be for one sample."""
        first = partial(self._first_layers, row) if stage == "before_attention" and index == 0 else None
        return self._scores(attention, index, row), first

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
        if padded:  # also if the padding is gone: the decoder still makes masks for it
            starts = torch.tensor([longest - length for length in lengths])
            self.valid = (torch.arange(longest) >= starts[:, None]).to(parts[0].device)
        companions = zip(*(sample.tokens.companions for sample in self.samples), strict=True)
        additions = zip(*(sample.tokens.additions for sample in self.samples), strict=True)
        self._rotary = tuple(
            as_rotary(left_padded(part), original) for part, original in zip(companions, self._rotary_like, strict=True)
        )
        self._additions = [left_padded(part) for part in additions]
        self.log_sizes = self._log_sizes()
        return left_padded(parts)

    def _log_sizes(self) -> Tensor | None:
        """[B, M] fp32: the logarithm of how many tokens each row stands for, 0 for padding; None: each for itself."""
        sizes = [sample.tokens.sizes for sample in self.samples]
        if all(part is None for part in sizes):
            return None
        alone = [
            sample.tokens.position.new_ones(1, sample.tokens.length, dtype=torch.float32) for sample in self.samples
        ]
        return left_padded([(one if part is None else part).log() for part, one in zip(sizes, alone, strict=True)])
