"""Runs a method inside a Hugging Face decoder, by hooks alone: no forward is replaced, and removal is exact.

- before the model's forward: where are the video tokens?
- before the decoder's forward: opens a prefill, gives the KV cache layers that may hold fewer tokens than they report.
  Only while a prefill is open do the layers have hooks, so a decode step that needs none pays for none
- before a layer: the method's call before attention; the layer gets the rotary embeddings and the mask of its rows
- before a layer's post_attention_layernorm: the method's call between attention and feed-forward. The layer has bound
  its residual already, so the feed-forward block adds to the rows kept, and the layer's own sum is thrown away
- behind the last layer: rows go back to their places in the prompt, zeros for those that left

Compiled code stays unaware of all this: see compiled.py.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from ..layout import VideoLayout
from ..methods.base import Method
from .cache import Checkpoint, Permit, ReducedLayer, prepare
from .compat import causal_mask, first_of, has_axes, with_first
from .compiled import Gates
from .families import LayoutRule, take_deepstack
from .finder import LayoutFinder, Video, tokens_of
from .importance import AttentionTap
from .prefill import Continuation, Prefill
from .report import BatchReport, Report

_reduced: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # decoders that have a reduction installed
_reduced_lock = threading.Lock()


class Reduction(AbstractContextManager["Reduction"]):
    """A method at work on a model: between `install` and `remove`, or inside a `with` block.

    Attributes:
        report: of the last prompt that held a video, a BatchReport for a batch of more than one; None before.
    """

    def __init__(self, model: Any, method: Method, layout: Sequence[VideoLayout] | LayoutRule | None) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"reduce: method must be a fftriton.Method, such as FrameFusion(), got {method!r}")
        self.model, self.method = getattr(model, "_orig_mod", model), method  # of what torch.compile(model) returns
        self.decoder = find_decoder(model)
        method.check(len(self.decoder.layers))
        if method.renumbers and has_axes(self.decoder.config):
            raise ValueError(
                f"reduce: renumber must be False for {type(model).__name__}, whose positions have three axes (M-RoPE)"
            )
        self.report: Report | BatchReport | None = None
        self._finder = LayoutFinder(self.model, layout)
        self._signature = inspect.signature(self.model.forward)
        self._gates = Gates(_above_hooks(model, self.decoder), self._acts, self._without_hooks)
        self._videos: list[Video] = []  # of the forward that begins
        self._was_called = False  # whether it came through the model's own hooks
        self._later = 0  # how many of its last tokens are no part of the prompt
        self._wants_states = False
        self._states: list[Tensor] | None = None  # the hidden states that are asked for
        self._targets: list[tuple[Tensor, int]] = []  # its labels [B, N], and how far ahead of their logits they are
        self._forward: Continuation | None = None
        self._checkpoint = Checkpoint(None)
        self._permit = Permit()
        self._tap = AttentionTap()
        self._undo: list[Callable[[], object]] = []
        self._entry_hooks: list[RemovableHandle] = []
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
        try:
            self._install()
        except BaseException:
            self.remove()
            raise
        return self

    def _install(self) -> None:
        self._undo.append(lambda: _reduced.discard(self.decoder))
        self._tap.install()
        self._undo.append(self._tap.remove)
        self._finder.install(self._undo)
        self._permit.active = True
        self._gates.install(self._undo)
        self._undo.append(self._remove_entry_hooks)
        self._add_entry_hooks()

    def remove(self) -> None:
        """Take everything out again: the model is as it was before. Harmless when nothing is installed."""
        self._abandon()
        while self._undo:
            self._undo.pop()()
        self._permit.active = False

    def _add_entry_hooks(self) -> None:
        keep = self._entry_hooks.append
        keep(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        keep(self.model.register_forward_hook(self._after_model))
        keep(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        keep(self.decoder.register_forward_hook(self._after_decoder, always_call=True))

    def _remove_entry_hooks(self) -> None:
        while self._entry_hooks:
            self._entry_hooks.pop().remove()

    def _open(self, forward: Continuation) -> None:
        """Start a forward: from here on the layers have hooks. Without a video there are only the masks to see to."""
        self._forward = forward
        keep, at = self._layer_hooks.append, functools.partial
        for index, layer in enumerate(self.decoder.layers):
            keep(layer.register_forward_pre_hook(at(self._before_layer, forward, index), with_kwargs=True))
            if not isinstance(forward, Prefill):
                continue
            if has_attention(layer):
                keep(layer.self_attn.register_forward_pre_hook(at(self._before_attention, forward, index)))
                keep(layer.self_attn.register_forward_hook(self._after_attention, always_call=True))
            before_feed_forward = at(self._before_feed_forward, forward, index)
            keep(layer.post_attention_layernorm.register_forward_pre_hook(before_feed_forward))
            keep(layer.mlp.register_forward_hook(at(self._after_feed_forward, forward)))
            keep(layer.register_forward_hook(at(self._after_layer, forward, index)))

    def _close(self) -> Continuation | None:
        """End the forward: the layers are as before."""
        forward, self._forward = self._forward, None
        if forward is None:
            return None
        for handle in self._layer_hooks:
            handle.remove()
        self._layer_hooks.clear()
        for layer in filter(has_attention, self.decoder.layers):
            self._tap.close(layer.self_attn)  # where a KeyboardInterrupt left it open: torch runs no hook behind one
        return forward

    def _abandon(self) -> None:
        """End a forward that did not come to its end: the KV cache, too, is as it was before it."""
        if self._close() is not None:
            self._checkpoint.restore()

    # ---- the model and its decoder

    def _before_model(self, model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        bound = self._signature.bind_partial(*args, **kwargs)
        given = {**bound.arguments.get("kwargs", {}), **bound.arguments}
        self._videos, self._targets, self._was_called = self._finder.find(given), [], True
        if self._videos:
            self._gates.check()
        self._later = self._finder.count_later(given) if self._videos else 0
        self._states, wanted = None, given.get("output_hidden_states")
        self._wants_states = self.decoder.config.output_hidden_states if wanted is None else wanted
        if not self._videos:
            return None
        if self._wants_states and given.get("return_dict", getattr(self.model.config, "return_dict", True)) is False:
            raise ValueError("reduce: return_dict must not be False where hidden states are asked for")
        if given.get("labels") is None and given.get("shift_labels") is None:
            return None
        return self._with_own_targets(bound)

    def _after_model(self, model: Any, args: tuple, output: Any) -> None:
        """transformers may have noted what the layers themselves return, which is thrown away where rows leave."""
        states, self._states = self._states, None
        if states is None:
            return
        *_, last = given = output.hidden_states
        own = [None if noted is None else state for noted, state in zip(given, states, strict=True)]
        if last is not None and last.shape == states[-1].shape:  # from behind the decoder's norm
            own[-1] = last
        output.hidden_states = tuple(own)

    def _with_own_targets(self, bound: inspect.BoundArguments) -> tuple[tuple, dict]:
        """The arguments with copies of the labels, for the reduction to write to."""
        for holder in (bound.arguments, bound.arguments.get("kwargs", {})):
            for name, shift in (("labels", 1), ("shift_labels", 0)):
                if holder.get(name) is not None:
                    holder[name] = holder[name].clone()
                    self._targets.append((holder[name], shift))
        return bound.args, bound.kwargs

    def _acts(self, module: nn.Module, hooks_ran: bool, args: tuple, kwargs: dict) -> bool:
        """Whether a compiled module's call has something to reduce or to mask."""
        if self._forward is not None:  # the decoder is at work
            return True
        if not hooks_ran and self.model in (module, getattr(module, "_orig_mod", None)):
            self._before_model(self.model, args, kwargs)
        cache_layers = _reduced_layers(kwargs.get("past_key_values"))
        source = args[0] if args else tokens_of(kwargs)
        masks = source is not None and cache_layers and self._needs_masks(cache_layers, source)
        return bool(self._videos or masks)

    @contextmanager
    def _without_hooks(self, kwargs: dict) -> Iterator[None]:
        """Around a call of compiled code, which is to be as without a reduction: nothing in it is padded."""
        if _reduced_layers(kwargs.get("past_key_values")):
            kwargs["attention_mask"] = None  # being traced, transformers would make a mask for the whole sequence of it
        self._remove_entry_hooks()
        try:
            yield
        finally:
            self._add_entry_hooks()

    def _before_decoder(self, decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        videos, self._videos = self._videos, []
        was_called, self._was_called = self._was_called, False
        self._abandon()
        if self._finder.prompt_has_video and not was_called:  # 4.x runs the chunks of a prompt like that
            raise ValueError(
                "reduce: prefill_chunk_size must not be given before transformers 5: it passes by all hooks"
            )
        cache = kwargs.get("past_key_values")
        use_cache = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if cache is None and use_cache:
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        cache_layers = None if cache is None else prepare(cache, len(decoder.layers), self._permit)
        reducible = [layer for layer in cache_layers or () if layer is not None]
        reduced = any(layer.reduced for layer in reducible)
        reason = self._why_not(decoder, cache, cache_layers, kwargs.get("attention_mask"))
        if reason is not None:
            if reduced:
                raise ValueError(f"reduce: nothing can follow the reduced prompt in the KV cache, because {reason}")
            if videos:
                self._warn_once("unreduced", f"fftriton: running without reduction, because {reason}")
            return args, kwargs
        if videos and torch.is_grad_enabled() and any(map(_runs_again, decoder.layers)):
            raise ValueError("reduce: gradient checkpointing must be off: it runs layers again without their reduction")
        source = args[0] if args else tokens_of(kwargs)
        assert source is not None  # the decoder would refuse it
        if not videos and not (reduced and self._needs_masks(reducible, source)):
            return args, kwargs
        if not videos and self._sees_all(reducible, source):
            kwargs["attention_mask"] = source.new_zeros(len(source), 1, 1, 1, dtype=decoder.dtype)  # fits any layer
            return args, kwargs
        length = source.shape[1]
        past_valid, valid = _padding(kwargs.get("attention_mask"), length)
        _check_visible(videos, valid)
        for layer in reducible:
            if not layer.reduced and length > 1:
                layer.valid = past_valid
        self._checkpoint = Checkpoint(cache)
        if not videos:
            self._open(Continuation(source, valid, cache_layers))
            return args, kwargs
        attends, additions = [*map(has_attention, decoder.layers)], take_deepstack(kwargs)
        prefill = Prefill(source, valid, cache_layers, self.method, videos, attends, additions, later=self._later)
        prefill.states = [] if self._wants_states else None
        self._open(prefill)
        return args, kwargs

    def _needs_masks(self, cache_layers: Sequence[ReducedLayer], source: Tensor) -> bool:
        """Whether the mask that the decoder makes for the whole sequence does not do for the rows that are there."""
        if source.shape[1] > 1 or any(layer.valid is not None for layer in cache_layers):
            return True
        backend = self.decoder.config._attn_implementation
        if backend not in self._masks_one_token:
            mask = causal_mask(self.decoder.config, source.new_empty(1, 1, 1, dtype=torch.float32), None, 1)
            self._masks_one_token[backend] = mask is not None
        return self._masks_one_token[backend]

    def _sees_all(self, cache_layers: Sequence[ReducedLayer], source: Tensor) -> bool:
        """Whether one mask that hides nothing does for all layers: eager attention adds it to scores of any length."""
        one_token = source.shape[1] == 1 and all(layer.valid is None for layer in cache_layers)
        eager = self.decoder.config._attn_implementation == "eager"
        return one_token and eager and all(map(has_attention, self.decoder.layers))

    def _why_not(self, decoder: Any, cache: Any, cache_layers: Any, mask: Any) -> str | None:
        if cache is not None and cache_layers is None:
            return f"only a plain DynamicCache can hold fewer tokens in later layers, got {type(cache).__name__}"
        other = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "linear_attention"}
        if other:
            return f"the decoder has layers other than full and linear attention: {', '.join(sorted(other))}"
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            return "attention_mask is not the two-dimensional padding mask"
        return None

    def _after_decoder(self, decoder: Any, args: tuple, output: Any) -> Any:
        if output is None:  # an exception on its way
            return self._abandon()
        try:
            if isinstance(self._forward, Prefill):
                self._finish(self._forward)
        except BaseException:
            self._abandon()
            raise
        self._close()
        return output

    def _finish(self, prefill: Prefill) -> None:
        """Make the report, and see to what else depends on what has been kept."""
        for targets, shift in self._targets:
            prefill.hide_targets(targets, shift)
        self._states = prefill.states
        self.report = prefill.finish()
        reports = self.report.samples if isinstance(self.report, BatchReport) else [self.report]
        for report in reports:
            if report.window is None and report.budget_achieved > report.budget + 1 / max(report.num_video_tokens, 1):
                self._warn_once(
                    "budget",
                    f"fftriton: the budget {report.budget:g} cannot be reached on this prompt; the least possible is "
                    f"{report.least_budget:.4g}, and {report.budget_achieved:.4g} of the video tokens were kept",
                )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    # ---- one layer

    def _before_layer(
        self, forward: Continuation, index: int, layer: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(forward, Prefill):
            if index == 0:
                forward.begin(hidden, kwargs.get("position_embeddings"))
                forward.note_state(hidden)
            hidden = forward.before_attention(index, hidden)
        kwargs.update(forward.layer_arguments(index, hidden, kwargs, self.decoder.config))
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _before_attention(self, prefill: Prefill, index: int, attention: nn.Module, args: tuple) -> None:
        if prefill.wants_attention(index):
            self._tap.open(attention)

    def _after_attention(self, attention: nn.Module, args: tuple, output: Any) -> None:
        self._tap.close(attention)

    def _before_feed_forward(self, prefill: Prefill, index: int, norm: nn.Module, args: tuple) -> tuple | None:
        left = prefill.after_attention(index, args[0], self._tap)
        return None if left is None else (left,)

    def _after_feed_forward(self, prefill: Prefill, mlp: nn.Module, args: tuple, output: Any) -> Tensor | None:
        if prefill.residual is None:
            return None
        added = first_of(output)  # a mixture of experts may return its routing, too
        prefill.layer_output, prefill.residual = prefill.residual + added, None
        return added.new_zeros(1)

    def _after_layer(self, prefill: Prefill, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        given = first_of(output)
        hidden, prefill.layer_output = given if prefill.layer_output is None else prefill.layer_output, None
        hidden = prefill.after_layer(hidden)
        if index == len(self.decoder.layers) - 1 and prefill.packed:
            hidden = prefill.restore(hidden)
        prefill.note_state(hidden)
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


def _above_hooks(model: nn.Module, decoder: Any) -> list[nn.Module]:
    """The modules that have hooks while a prompt is reduced, and those that contain one."""
    hooked = {decoder, *decoder.layers}
    for layer in decoder.layers:
        hooked |= {layer.post_attention_layernorm, layer.mlp} | ({layer.self_attn} if has_attention(layer) else set())
    return [module for module in model.modules() if any(part in hooked for part in module.modules())]


def _reduced_layers(cache: Any) -> list[ReducedLayer]:
    """The layers of a KV cache where they hold a reduced prompt."""
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, ReducedLayer)]
    return layers if any(layer.reduced for layer in layers) else []


def has_attention(layer: nn.Module) -> bool:
    """Whether the decoder layer has softmax attention; Qwen3.5 has layers with linear attention instead."""
    return hasattr(layer, "self_attn")


def _runs_again(layer: nn.Module) -> bool:
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def _is_decoder_layer(layer: nn.Module) -> bool:
    mixes = has_attention(layer) or hasattr(layer, "linear_attn")
    return mixes and all(hasattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm", "mlp"))


def _check_visible(videos: Sequence[Video], valid: Tensor | None) -> None:
    """Raise a ValueError where padding covers a video token."""
    if valid is None:
        return
    hidden = ~valid.cpu()
    for layout, _ in videos:
        if bool(hidden[layout.sample, layout.tokens.cpu()].any()):
            raise ValueError(f"attention_mask: must not hide video tokens, but does in sample {layout.sample}")


def _padding(mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """[B, past + N] mask -> bool [B, past] and [B, N], False for padding; None where nothing is padded.

    A single token is taken to be none: decoding does not wait for the device to say so.
    """
    if mask is None or length == 1 or bool(mask.all()):
        return None, None
    return mask[:, :-length].bool(), mask[:, -length:].bool()
