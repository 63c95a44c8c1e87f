"""Runs a method inside a Hugging Face decoder, by hooks alone: no forward is replaced, and removal is exact.

- before the model's forward: where are the video tokens?
- before the decoder's forward: opens a prefill, gives the KV cache layers that may hold fewer tokens than they report
- before a layer: the method's call before attention; the layer gets the rotary embeddings and the mask of its rows
- before a layer's post_attention_layernorm: the method's call between attention and feed-forward. The layer has bound
  its residual already, so the feed-forward block adds to the rows kept, and the layer's own sum is thrown away
- behind the last layer: rows go back to their places in the prompt, zeros for those that left
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..layout import VideoLayout, check_layouts, patch_ids
from ..methods.base import Method, Prompt, VideoTokens
from .cache import ReducedLayer, prepare
from .compat import causal_mask, first_of, with_first
from .families import RULES, LayoutRule
from .importance import AttentionTap
from .report import MergeStep, Report, Stopwatch

_reduced: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # decoders that have a reduction installed
_reduced_lock = threading.Lock()


class Reduction(AbstractContextManager["Reduction"]):
    """A method at work on a model: between `install` and `remove`, or inside a `with` block.

    Attributes:
        report: of the last prompt that held a video; None before.
    """

    def __init__(self, model: Any, method: Method, layout: Sequence[VideoLayout] | LayoutRule | None) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"reduce: method must be a fftriton.Method, such as FrameFusion(), got {method!r}")
        self.model, self.method = model, method
        self.decoder = find_decoder(model)
        self.layout = _layout_rule(model, layout)
        method.check(len(self.decoder.layers))
        self.report: Report | None = None
        self._signature = inspect.signature(model.forward)
        self._layouts: list[VideoLayout] = []
        self._encoder_arguments: dict[str, Any] = {}
        self._prefill: _Prefill | None = None
        self._tap = AttentionTap()
        self._undo: list[Callable[[], object]] = []
        self._warned: set[str] = set()

    def __enter__(self) -> Reduction:
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def install(self) -> Reduction:
        """Hook into the model. Raises a RuntimeError where a reduction is at work on it already."""
        with _reduced_lock:
            if self.decoder in _reduced:
                raise RuntimeError("reduce: the model is being reduced already; leave or remove that reduction first")
            _reduced.add(self.decoder)
        self._undo.append(lambda: _reduced.discard(self.decoder))
        self._tap.install()
        self._undo.append(self._tap.remove)
        self._record_video_encoder()
        hook, at = self._hook, functools.partial
        hook(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        hook(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        hook(self.decoder.register_forward_hook(self._after_decoder, always_call=True))
        for index, layer in enumerate(self.decoder.layers):
            hook(layer.register_forward_pre_hook(at(self._before_layer, index), with_kwargs=True))
            hook(layer.self_attn.register_forward_pre_hook(at(self._before_attention, index)))
            hook(layer.self_attn.register_forward_hook(self._after_attention, always_call=True))
            self._undo.append(at(self._tap.close, layer.self_attn))
            hook(layer.post_attention_layernorm.register_forward_pre_hook(at(self._before_feed_forward, index)))
            hook(layer.mlp.register_forward_hook(self._after_feed_forward))
            hook(layer.register_forward_hook(at(self._after_layer, index)))
        return self

    def remove(self) -> None:
        """Take everything out again: the model is as it was before. Harmless when nothing is installed."""
        while self._undo:
            self._undo.pop()()
        self._prefill = None

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _record_video_encoder(self) -> None:
        """`generate` may encode the video before the forward, which then no longer sees the grid: note it here."""
        inner = getattr(self.model, "base_model", self.model)
        encode = getattr(inner, "get_video_features", None)
        if encode is None:
            return
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self._encoder_arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
            return encode(*args, **kwargs)

        before = inner.__dict__.get("get_video_features")
        inner.__dict__["get_video_features"] = recorded
        if before is None:
            self._undo.append(lambda: inner.__dict__.pop("get_video_features"))
        else:
            self._undo.append(lambda: inner.__dict__.update(get_video_features=before))

    # ---- the model and its decoder

    def _before_model(self, model: Any, args: tuple, kwargs: dict) -> None:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        self._layouts = []
        tokens = _embeddings_or_ids(given)
        if tokens is None or tokens.shape[1] == 1:  # decoding: no time to lose
            return
        if (given.get("mm_encoder_outputs") or {}).get("video") is not None:
            given = {**self._encoder_arguments, **{name: value for name, value in given.items() if value is not None}}
        layouts = self.layout(model, given)
        if layouts and len(tokens) > 1:
            raise ValueError(f"reduce: the batch size must be 1 for a prompt with a video, got {len(tokens)}")
        check_layouts(layouts, *tokens.shape[:2])
        self._layouts = layouts

    def _before_decoder(self, decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        layouts, self._layouts = self._layouts, []
        self._prefill = None
        cache = kwargs.get("past_key_values")
        use_cache = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if cache is None and use_cache:
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        cache_layers = None if cache is None else prepare(cache, len(decoder.layers))
        reason = self._why_not(decoder, cache, cache_layers, kwargs.get("attention_mask"))
        if reason is not None:
            if layouts:
                self._warn_once(f"fftriton: running without reduction, because {reason}")
            return args, kwargs
        if layouts or any(layer.missing for layer in cache_layers or ()):
            source = args[0] if args else _embeddings_or_ids(kwargs)
            assert source is not None  # the decoder would refuse it
            past_valid, valid = _padding(kwargs.get("attention_mask"), source.shape[1])
            for layer in cache_layers or ():
                layer.note_padding(past_valid)
            self._prefill = _Prefill(self.method, layouts, source, cache_layers, valid, len(decoder.layers))
        return args, kwargs

    def _why_not(self, decoder: Any, cache: Any, cache_layers: Any, mask: Any) -> str | None:
        if cache is not None and cache_layers is None:
            return f"only a plain DynamicCache can hold fewer tokens in later layers, got {type(cache).__name__}"
        if any(kind != "full_attention" for kind in getattr(decoder.config, "layer_types", None) or ()):
            return "the decoder has layers other than full attention"
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            return "attention_mask is not the two-dimensional padding mask"
        return None

    def _after_decoder(self, decoder: Any, args: tuple, output: Any) -> None:
        prefill, self._prefill = self._prefill, None
        if prefill is None or prefill.report is None or output is None:
            return  # a decode step, or an exception on its way
        self.report = prefill.finish()
        if self.report.budget_achieved > self.report.budget + 1 / self.report.num_video_tokens:
            self._warn_once(
                f"fftriton: the budget {self.report.budget:g} cannot be reached on this prompt; the least possible is "
                f"{self.report.least_budget:.4g}, and {self.report.budget_achieved:.4g} of the video tokens were kept"
            )

    def _warn_once(self, message: str) -> None:
        kind = message[:40]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    # ---- one layer

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        prefill = self._prefill
        if prefill is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if prefill.tokens is None and index == 0:
            prefill.begin(hidden, kwargs.get("position_embeddings"))
        hidden = prefill.before_attention(index, hidden)
        kwargs.update(prefill.layer_arguments(index, hidden, kwargs, self.decoder.config))
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _before_attention(self, index: int, attention: nn.Module, args: tuple) -> None:
        if self._prefill is not None and self._prefill.wants_attention(index):
            self._tap.open(attention)

    def _after_attention(self, attention: nn.Module, args: tuple, output: Any) -> None:
        self._tap.close(attention)

    def _before_feed_forward(self, index: int, norm: nn.Module, args: tuple) -> tuple | None:
        if self._prefill is None:
            return None
        shorter = self._prefill.after_attention(index, args[0], self._tap)
        return None if shorter is None else (shorter,)

    def _after_feed_forward(self, mlp: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        prefill = self._prefill
        if prefill is None or prefill.residual is None:
            return None
        prefill.layer_output, prefill.residual = prefill.residual + output, None
        return output.new_zeros(1)

    def _after_layer(self, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        prefill = self._prefill
        if prefill is None:
            return None
        shorter, prefill.layer_output = prefill.layer_output, None
        if index == len(self.decoder.layers) - 1 and prefill.is_shorter:
            return with_first(output, prefill.restore(first_of(output) if shorter is None else shorter))
        return None if shorter is None else with_first(output, shorter)


class _Prefill:
    """One forward of the decoder: the tokens left, and what goes with them. Without a video it only keeps masks."""

    def __init__(
        self, method: Method, layouts: list[VideoLayout], source: Tensor,
        cache_layers: list[ReducedLayer] | None, valid: Tensor | None, num_layers: int,
    ) -> None:  # fmt: skip
        self.batch, self.length = source.shape[:2]
        self.layouts, self.cache_layers, self.valid = layouts, cache_layers, valid
        self.tokens: VideoTokens | None = None
        self.residual: Tensor | None = None  # [B, M, D] rows kept, waiting for their feed-forward output
        self.layer_output: Tensor | None = None  # [B, M, D] what the layer is to return
        self.report: Report | None = None
        self._masks: dict[tuple, Any] = {}
        self._rotary_like: Sequence[Tensor] = ()
        if layouts:
            count = sum(len(layout.tokens) for layout in layouts)
            self.calls = method.begin(Prompt(num_layers, count))
            self.stopwatch = Stopwatch(source.device)
            self.report = Report(str(method), method.budget, layouts, self.length, count, _stopwatch=self.stopwatch)

    def begin(self, hidden: Tensor, rotary: Sequence[Tensor] | None) -> None:
        """Take the prompt's hidden states [B, N, D] and rotary embeddings, before layer 0."""
        if self.report is None:
            return
        self._started = self.stopwatch.now()
        position = torch.arange(self.length, device=hidden.device).expand(self.batch, -1)
        patch = patch_ids(self.layouts, self.batch, self.length, hidden.device)
        self._rotary_like = rotary or ()
        companions = tuple(_rows_first(part, self.batch) for part in self._rotary_like)
        self.tokens = VideoTokens(hidden, position, patch, self.report.num_video_tokens, companions)

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

    def layer_arguments(self, index: int, hidden: Tensor, given: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """The layer's keyword arguments that differ from what the decoder gave, and the cache's bookkeeping."""
        cached = self.cache_layers[index] if self.cache_layers is not None else None
        past, rows = (0 if cached is None else cached.rows), hidden.shape[1]
        valid = self.valid
        if valid is not None and self.tokens is not None:
            valid = valid.gather(1, self.tokens.position)
        shorter_past = cached is not None and cached.missing > 0
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
        else:
            step = MergeStep(index, stage, tokens.num_video, after.num_video, after.merge)
            self.report.merge_steps.append(step)
        return after

    def _valid_rows(self, index: int) -> Tensor | None:
        """[B, past + n] bool: which rows of the layer's keys are no padding; None: all."""
        if self.cache_layers is not None:
            return self.cache_layers[index].valid
        assert self.tokens is not None
        return None if self.valid is None else self.valid.gather(1, self.tokens.position)

    def _mask(self, config: Any, hidden: Tensor, valid: Tensor | None, past: int) -> Any:
        key = (past, hidden.shape[1], hidden.device)
        if key not in self._masks:
            self._masks = {key: causal_mask(config, hidden, valid, past)}
        return self._masks[key]


def find_decoder(model: Any) -> Any:
    """The module whose `layers` are Qwen2-style decoder layers. Raises a TypeError where there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"reduce: model must be a Hugging Face model, got {type(model).__name__}")
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) and all(map(_is_decoder_layer, layers)):
            return module
    raise TypeError(
        f"reduce: model must have a Qwen2-style decoder (layers with self_attn, post_attention_layernorm and mlp), "
        f"got {type(model).__name__}"
    )


def _is_decoder_layer(layer: nn.Module) -> bool:
    return all(hasattr(layer, name) for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"))


def _layout_rule(model: Any, layout: Sequence[VideoLayout] | LayoutRule | None) -> LayoutRule:
    if callable(layout):
        return layout
    if layout is not None:
        if isinstance(layout, VideoLayout) or not all(isinstance(item, VideoLayout) for item in layout):
            raise TypeError(f"reduce: layout must be a list of VideoLayout, a callable or None, got {layout!r}")
        return functools.partial(_fixed_layout, list(layout))
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in RULES:
        raise TypeError(
            f"reduce: layout must be given for {type(model).__name__}; it is found without for model types "
            f"{', '.join(sorted(RULES))}, got {model_type!r}"
        )
    return RULES[model_type]


def _fixed_layout(layouts: list[VideoLayout], model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """The caller's layouts, for every prompt from the first token on."""
    cache = arguments.get("past_key_values")
    return [] if cache is not None and cache.get_seq_length() > 0 else layouts


def _embeddings_or_ids(arguments: Mapping[str, Any]) -> Tensor | None:
    """[B, N, D] or [B, N]: what a forward gets its tokens from."""
    embeddings = arguments.get("inputs_embeds")
    return arguments.get("input_ids") if embeddings is None else embeddings


def _padding(mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """[B, past + N] mask -> bool [B, past] and [B, N], False for padding; None where nothing is padded.

    A single token is taken to be none: decoding does not wait for the device to say so.
    """
    if mask is None or length == 1 or bool(mask.all()):
        return None, None
    return mask[:, :-length].bool(), mask[:, -length:].bool()


def _rows_first(part: Tensor, batch: int) -> Tensor:
    """Rotary [1 or B, N, d] or [3, 1 or B, N, d] -> [B, N, d] or [B, N, 3, d], without a copy."""
    if part.ndim == 4:
        return part.expand(-1, batch, -1, -1).permute(1, 2, 0, 3)
    return part.expand(batch, -1, -1)


def _like(part: Tensor, original: Tensor) -> Tensor:
    """Undo `_rows_first`, up to the length."""
    return part.permute(2, 0, 1, 3) if original.ndim == 4 else part
