"""Runs a method inside a Hugging Face decoder, by hooks alone: no forward is replaced, and removal is exact.

- before the model's forward: where are the video tokens?
- before the decoder's forward: opens a prefill, gives the KV cache layers that may hold fewer tokens than they report.
  Only while a prefill is open do the layers have hooks, so a decode step that needs none pays for none
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
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from ..layout import VideoLayout, check_layouts
from ..methods.base import Method
from .cache import ReducedLayer, prepare
from .compat import causal_mask, first_of, with_first
from .families import RULES, LayoutRule, take_deepstack
from .importance import AttentionTap
from .prefill import Prefill
from .report import Report

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
        self._prefill: Prefill | None = None
        self._tap = AttentionTap()
        self._undo: list[Callable[[], object]] = []
        self._layer_hooks: list[RemovableHandle] = []
        self._warned: set[str] = set()
        self._masks_one_token: dict[str, bool] = {}  # by attention back end: whether it wants a mask for one token

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
        for handle in (
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder, always_call=True),
        ):
            self._undo.append(handle.remove)
        self._undo.append(self._close)
        return self

    def remove(self) -> None:
        """Take everything out again: the model is as it was before. Harmless when nothing is installed."""
        while self._undo:
            self._undo.pop()()

    def _open(self, prefill: Prefill) -> None:
        """Start a prefill: from here on the layers have hooks. Without a video there are only the masks to see to."""
        self._prefill = prefill
        keep, at = self._layer_hooks.append, functools.partial
        for index, layer in enumerate(self.decoder.layers):
            keep(layer.register_forward_pre_hook(at(self._before_layer, prefill, index), with_kwargs=True))
            if not prefill.layouts:
                continue
            if has_attention(layer):
                keep(layer.self_attn.register_forward_pre_hook(at(self._before_attention, prefill, index)))
                keep(layer.self_attn.register_forward_hook(self._after_attention, always_call=True))
            before_feed_forward = at(self._before_feed_forward, prefill, index)
            keep(layer.post_attention_layernorm.register_forward_pre_hook(before_feed_forward))
            keep(layer.mlp.register_forward_hook(at(self._after_feed_forward, prefill)))
            keep(layer.register_forward_hook(at(self._after_layer, prefill, index)))

    def _close(self) -> Prefill | None:
        """End the prefill, one that an exception broke off too: the layers are as before."""
        prefill, self._prefill = self._prefill, None
        if prefill is None:
            return None
        for handle in self._layer_hooks:
            handle.remove()
        self._layer_hooks.clear()
        for layer in filter(has_attention, self.decoder.layers):
            self._tap.close(layer.self_attn)  # where a KeyboardInterrupt left it open: torch runs no hook behind one
        return prefill

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
        self._close()
        cache = kwargs.get("past_key_values")
        use_cache = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if cache is None and use_cache:
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        cache_layers = None if cache is None else prepare(cache, len(decoder.layers))
        reason = self._why_not(decoder, cache, cache_layers, kwargs.get("attention_mask"))
        if reason is not None:
            if layouts:
                self._warn_once("unreduced", f"fftriton: running without reduction, because {reason}")
            return args, kwargs
        source = args[0] if args else _embeddings_or_ids(kwargs)
        assert source is not None  # the decoder would refuse it
        reduced_layers = [layer for layer in cache_layers or () if layer is not None]
        if layouts or self._needs_masks(reduced_layers, source):
            past_valid, valid = _padding(kwargs.get("attention_mask"), source.shape[1])
            for layer in reduced_layers:
                layer.note_padding(past_valid)
            attends = [*map(has_attention, decoder.layers)]
            additions = take_deepstack(kwargs) if layouts else ()
            self._open(Prefill(self.method, layouts, source, cache_layers, valid, attends, additions))
        return args, kwargs

    def _needs_masks(self, cache_layers: Sequence[ReducedLayer], source: Tensor) -> bool:
        """Whether the mask that the decoder makes for the whole sequence does not do for the rows that are there."""
        if not any(layer.missing for layer in cache_layers):
            return False
        if source.shape[1] > 1 or any(layer.valid is not None for layer in cache_layers):
            return True
        backend = self.decoder.config._attn_implementation
        if backend not in self._masks_one_token:
            mask = causal_mask(self.decoder.config, source.new_empty(1, 1, 1, dtype=torch.float32), None, 1)
            self._masks_one_token[backend] = mask is not None
        return self._masks_one_token[backend]

    def _why_not(self, decoder: Any, cache: Any, cache_layers: Any, mask: Any) -> str | None:
        if cache is not None and cache_layers is None:
            return f"only a plain DynamicCache can hold fewer tokens in later layers, got {type(cache).__name__}"
        other = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "linear_attention"}
        if other:
            return f"the decoder has layers other than full and linear attention: {', '.join(sorted(other))}"
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            return "attention_mask is not the two-dimensional padding mask"
        return None

    def _after_decoder(self, decoder: Any, args: tuple, output: Any) -> None:
        prefill = self._close()
        if prefill is None or prefill.report is None or output is None:
            return  # a decode step, or an exception on its way
        self.report = prefill.finish()
        if self.report.budget_achieved > self.report.budget + 1 / self.report.num_video_tokens:
            self._warn_once(
                "budget",
                f"fftriton: the budget {self.report.budget:g} cannot be reached on this prompt; the least possible is "
                f"{self.report.least_budget:.4g}, and {self.report.budget_achieved:.4g} of the video tokens were kept",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    # ---- one layer

    def _before_layer(
        self, prefill: Prefill, index: int, layer: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            prefill.begin(hidden, kwargs.get("position_embeddings"))
        hidden = prefill.before_attention(index, hidden)
        kwargs.update(prefill.layer_arguments(index, hidden, kwargs, self.decoder.config))
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _before_attention(self, prefill: Prefill, index: int, attention: nn.Module, args: tuple) -> None:
        if prefill.wants_attention(index):
            self._tap.open(attention)

    def _after_attention(self, attention: nn.Module, args: tuple, output: Any) -> None:
        self._tap.close(attention)

    def _before_feed_forward(self, prefill: Prefill, index: int, norm: nn.Module, args: tuple) -> tuple | None:
        shorter = prefill.after_attention(index, args[0], self._tap)
        return None if shorter is None else (shorter,)

    def _after_feed_forward(self, prefill: Prefill, mlp: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if prefill.residual is None:
            return None
        prefill.layer_output, prefill.residual = prefill.residual + output, None
        return output.new_zeros(1)

    def _after_layer(self, prefill: Prefill, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        given = first_of(output)
        hidden, prefill.layer_output = given if prefill.layer_output is None else prefill.layer_output, None
        hidden = prefill.after_layer(hidden)
        if index == len(self.decoder.layers) - 1 and prefill.is_shorter:
            hidden = prefill.restore(hidden)
        return None if hidden is given else with_first(output, hidden)


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


def has_attention(layer: nn.Module) -> bool:
    """Whether the decoder layer has softmax attention; Qwen3.5 has layers with linear attention instead."""
    return hasattr(layer, "self_attn")


def _is_decoder_layer(layer: nn.Module) -> bool:
    mixes = has_attention(layer) or hasattr(layer, "linear_attn")
    return mixes and all(hasattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm", "mlp"))


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
