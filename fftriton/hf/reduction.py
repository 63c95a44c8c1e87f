"""Runs a method inside a Hugging Face decoder, by hooks alone: no forward is replaced, and removal is exact.

A call passes by three places:
- the modules around the decoder, the outermost first: what was the call given, and where are the videos?
- the decoder: is there something to reduce or to mask? Then a forward is opened: its KV cache gets layers that may hold
  fewer tokens than they report, and the decoder's layers get hooks (layers.py)
- the decoder again, when its layers are done: does all hold that must (invariants.py)? The forward is closed, the
  report is made

What one call needs is an object of that call, and each thread has its own. Compiled code stays unaware of all this: see
compiled.py.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel

from ..layouts.families import LayoutRule
from ..layouts.layout import VideoLayout, check_layouts
from ..methods import KeepAll
from ..methods.base import Method
from .cache import Checkpoint, Permit, ReducedLayer, check_cache, prepare
from .compat import (
    CACHE,
    MASKS_WHEN_COMPILED,
    UnknownReleaseError,
    attention_name,
    cache_in,
    causal_mask,
    check_decoder,
    has_axes,
    past_of,
    take_deepstack,
)
from .compiled import Gates
from .finder import LayoutFinder, Video, tokens_of
from .hooks import Hook, Undo
from .invariants import check_growth, check_lengths
from .layers import Forward, LayerHooks, has_attention, hooked_in
from .prefill import Continuation, Prefill
from .probe import check_structure, check_structure_in_place
from .report import BatchReport, Report

_reduced: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # decoders that have a reduction installed
_reduced_lock = threading.Lock()
_OTHER_TOKENS = "layout: must be given where a module around the decoder puts other tokens among the prompt's, got {}"


@dataclass
class Call:
    """One call of the model on its way to the decoder's layers and back.

    Args:
        level: of the modules around the decoder, which one was called, 0 the outermost.

    Attributes:
        shape: [B, N] of the tokens that it was given; None where no module has been given any.
        videos: what it holds.
        later: how many of its last tokens are no part of the prompt.
        targets: its labels [B, N], copies that may be written to, and how far ahead of their logits they are.
        wants_states: whether hidden states are asked for; `states` are what they are.
        has_vision: whether it was given pixels, embeddings, or placeholders (a bool on the device).
        begun: whether the decoder has been reached.
        layers: the KV cache's; `checkpoint`, what they held; `expected`, how many tokens they are to stand for.
        forward: what has been opened for it.
        frame: in which the decoder runs, once it does.
        outer: the call in the midst of which this one came, by a hook of the user's.
        refused: whether one that came in the midst of this one has just been refused.
        report: what was done to it, once the decoder has ended.
        handled: the exception in whose handling it was made, if any: another one ends it.
    """

    level: int
    shape: torch.Size | None = None
    videos: list[Video] = field(default_factory=list)
    later: int = 0
    targets: list[tuple[Tensor, int]] = field(default_factory=list)
    wants_states: bool | None = None
    states: list[Tensor] | None = None
    has_vision: bool | Tensor = False
    begun: bool = False
    layers: Sequence[ReducedLayer | None] = ()
    checkpoint: Checkpoint | None = None
    expected: int = 0
    forward: Continuation | None = None
    frame: FrameType | None = None
    outer: Call | None = None
    refused: bool = False
    report: Report | BatchReport | None = None
    handled: BaseException | None = field(default_factory=lambda: sys.exc_info()[1])

    @property
    def has_failed(self) -> bool:
        """Whether an exception is on its way through it."""
        return sys.exc_info()[1] is not self.handled

    @property
    def is_running(self) -> bool:
        """Whether the decoder is at work on it: torch runs no hook of ours behind a KeyboardInterrupt."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


class _Thread(threading.local):
    """Where a thread is."""

    call: Call | None = None
    looking = False  # whether its decoder runs only to see how it is built


class _OwnReport(threading.local):
    """The report of a thread's last prompt; not known where it has had none."""

    report: Report | BatchReport | None


class Reduction(AbstractContextManager["Reduction"]):
    """A method at work on a model: between `install` and `remove`, or inside a `with` block."""

    def __init__(
        self, model: Any, method: Method, layout: Sequence[VideoLayout] | LayoutRule | None, verify: bool = False
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"reduce: method must be a fftriton.Method, such as FrameFusion(), got {method!r}")
        if not isinstance(verify, bool):
            raise TypeError(f"reduce: verify must be True or False, got {verify!r}")
        self.decoder = find_decoder(model)
        root = getattr(model, "_orig_mod", model)  # of what torch.compile(model) returns
        _check_wrapper(root)
        self.model, self.method, self.verify = _owner(root, self.decoder), method, verify
        method.check(len(self.decoder.layers))
        if method.renumbers and has_axes(self.decoder.config):
            raise ValueError(
                f"reduce: renumber must be False for {type(model).__name__}, whose positions have three axes (M-RoPE)"
            )
        self._cache_name = check_decoder(self.decoder)
        check_structure(self.decoder)
        self._finder = LayoutFinder(self.model, layout)
        self._modules = [module for module in root.modules() if self.decoder in module.modules()]  # outermost first
        self._signatures = [inspect.signature(module.forward) for module in self._modules]
        self._gates = Gates(_above_hooks(model, self.decoder), self._acts, self._without_hooks)
        self._permit = Permit()
        self._forward = Forward()
        self._layers = LayerHooks(self.decoder, self._forward)
        self._thread = _Thread()
        self._own = _OwnReport()
        self._last_report: Report | BatchReport | None = None
        self._undo: Undo = []
        self._entry_hooks: list[tuple[int, RemovableHandle]] = []
        self._warned: set[str] = set()
        self._has_reduced = False
        self._ran_dense: bool | Tensor = False  # whether something with vision did
        self._masks_one_token: dict[str, bool] = {}  # by attention back end: whether it wants a mask for one token

    @property
    def report(self) -> Report | BatchReport | None:
        """What was done to this thread's last prompt, or where it had none to the last one of any: None where that held
        no video or was not reduced, a BatchReport for a batch of more than one."""
        return getattr(self._own, "report", self._last_report)

    def _note_report(self, report: Report | BatchReport | None) -> None:
        self._own.report = self._last_report = report

    def __enter__(self) -> Reduction:
        return self.install()

    def __exit__(self, error: object, *details: object) -> None:
        self._take_out()
        if error is None:
            self._warn_if_idle()

    def install(self) -> Reduction:
        """Hook into the model. Raises a RuntimeError where a reduction is at work on it already."""
        with _reduced_lock:
            if self.decoder in _reduced:
                raise RuntimeError("reduce: the model is being reduced already; leave or remove that reduction first")
            _reduced.add(self.decoder)
        self._has_reduced, self._ran_dense = False, False
        try:
            self._install()
        except BaseException:
            self._take_out()
            raise
        return self

    def _install(self) -> None:
        self._undo.append(lambda: _reduced.discard(self.decoder))
        self._layers.install(self._undo)
        self._finder.install(self._modules, self._undo)
        self._permit.active = True
        self._gates.install(self._undo)
        self._undo.append(self._remove_entry_hooks)
        self._add_entry_hooks()

    def remove(self) -> None:
        """Take everything out again: the model is as it was before. Harmless when nothing is installed.

        Waits for forwards of other threads to end. Warns where nothing was reduced that could have been.
        """
        self._take_out()
        self._warn_if_idle()

    def _take_out(self) -> None:
        while self._thread.call is not None:
            self._abandon()
        self._layers.wait_for_others()
        while self._undo:
            self._undo.pop()()
        self._permit.active = False
        self._finder.clear()
        self._thread, self._forward.open = _Thread(), None

    def _add_entry_hooks(self, level: int = 0) -> None:
        """Hook into the modules from this level on."""

        def keep(handle: RemovableHandle) -> None:
            self._entry_hooks.append((at, handle))

        for at, module in enumerate(self._modules):
            if at < level:
                continue
            if module is self.decoder:
                keep(module.register_forward_pre_hook(Hook(self._before_decoder), with_kwargs=True))
                keep(module.register_forward_hook(Hook(self._after_decoder), always_call=True))
            else:
                keep(module.register_forward_pre_hook(Hook(partial(self._before_module, at)), with_kwargs=True))
                keep(module.register_forward_hook(Hook(partial(self._after_module, at)), always_call=True))

    def _remove_entry_hooks(self, level: int = 0) -> None:
        for at, handle in self._entry_hooks:
            if at >= level:
                handle.remove()
        self._entry_hooks = [(at, handle) for at, handle in self._entry_hooks if at < level]

    def _abandon(self) -> None:
        """End a call of this thread that did not come to its end: the KV cache, too, is as it was before it."""
        self._layers.close()
        call = self._thread.call
        if call is None:
            return
        self._thread.call = call.outer
        if call.checkpoint is not None:
            call.checkpoint.restore()

    # ---- the modules around the decoder

    def _before_module(self, level: int, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        given = self._named(level, args, kwargs)
        call = self._enter(level, given)
        if call is None:
            return None
        shifts = {"labels": 1, "shift_labels": 0}
        targets = [(name, shift) for name, shift in shifts.items() if _are_targets(given.get(name), call.shape)]
        if not targets or call.targets:
            return None
        own = {name: given[name].clone() for name, _ in targets}
        call.targets = [(own[name], shift) for name, shift in targets]
        return (), {**given, **own}

    def _enter(self, level: int, given: Mapping[str, Any]) -> Call | None:
        """Note what a module is given; None where the call is on its way already, and known, or has nothing to note."""
        call = self._thread.call
        if call is None or call.begun or call.level >= level:  # no call of a module around this one is on its way
            call = self._begin(Call(level))
        tokens, moved = tokens_of(given), False
        if tokens is None:
            call.has_vision = call.has_vision or _has_pixels(given)
            return None
        if call.shape is None:
            call.shape, call.level = tokens.shape[:2], level
            call.has_vision = call.has_vision or given.get("inputs_embeds") is not None
        elif call.shape != tokens.shape[:2] and self._finder.has_rule:  # a module has put tokens before the others
            moved, call.shape, call.videos = bool(call.videos), tokens.shape[:2], []
        if tokens.shape[1] == 1:
            return None
        call.later = max(call.later, self._finder.count_later(given))
        if call.wants_states is None:
            call.wants_states = given.get("output_hidden_states")
        if call.has_vision is False:
            call.has_vision = _has_pixels(given) or self._has_placeholders(given)
        if not self._finder.is_listed:
            self._look(call, given)
        if moved and not call.videos:
            raise ValueError(_OTHER_TOKENS.format(list(call.shape)))
        as_tuple = given.get("return_dict", getattr(self.model.config, "return_dict", True)) is False
        if as_tuple and (call.videos or self._finder.is_listed) and self._states_are_wanted(call):
            raise ValueError("reduce: return_dict must not be False where hidden states are asked for")
        return call

    def _begin(self, call: Call) -> Call:
        """Start a call of this thread.

        Raises:
            RuntimeError: in the midst of one that is being reduced.
        """
        while (before := self._thread.call) is not None and not before.is_running:
            self._abandon()  # a KeyboardInterrupt has ended it
        if before is not None and before.forward is not None:
            before.refused = True
            who = self.method if getattr(before.forward, "asking", False) else "a hook"
            raise RuntimeError(f"reduce: {who} must not call the model while a call of it is being reduced")
        call.outer, self._thread.call = before, call
        return call

    def _look(self, call: Call, given: Mapping[str, Any]) -> None:
        """Look for videos, where no module around has found any."""
        if not call.videos:
            call.videos = self._finder.find(given)
            if call.videos:
                self._gates.check()

    def _states_are_wanted(self, call: Call) -> bool:
        return self.decoder.config.output_hidden_states if call.wants_states is None else call.wants_states

    def _named(self, level: int, args: tuple, kwargs: dict) -> Mapping[str, Any]:
        """The arguments of a module's forward by name, as far as they have one."""
        if not args:
            return kwargs
        try:
            bound = self._signatures[level].bind_partial(*args, **kwargs).arguments
        except TypeError:  # the forward will say so
            return kwargs
        return {**bound.pop("kwargs", {}), **bound}

    def _after_module(self, level: int, module: Any, args: tuple, output: Any) -> None:
        """transformers may have noted what the layers themselves return, which is thrown away where rows leave."""
        call = self._thread.call
        if call is None or (call.has_failed and self._was_refused(call)):
            return
        if call.level == level and call.has_failed:
            self._abandon()
        elif call.level == level:
            self._leave(call)
        states = call.states
        if states is None or getattr(output, "hidden_states", None) is None:
            return
        *_, last = given = output.hidden_states
        own = [None if noted is None else state for noted, state in zip(given, states, strict=True)]
        if last is not None and last.shape == states[-1].shape:  # from behind the decoder's norm
            own[-1] = last
        output.hidden_states = tuple(own)

    @staticmethod
    def _was_refused(call: Call | None) -> bool:
        """Whether an exception comes from a call in the midst of this one."""
        if call is None or not call.refused:
            return False
        call.refused = False
        return True

    def _has_placeholders(self, given: Mapping[str, Any]) -> bool | Tensor:
        """Whether there are tokens that stand for images or videos; a device is not waited for."""
        ids = given.get("input_ids")
        known = (getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        found = [(ids == token).any() for token in known if token is not None and ids is not None]
        return torch.stack(found).any() if found else False

    # ---- compiled code

    def _acts(self, module: nn.Module, hooks_ran: bool, args: tuple, kwargs: dict) -> bool:
        """Whether a compiled module's call has something to reduce or to mask."""
        if self._forward.open is not None or self._thread.looking:  # the decoder is at work
            return True
        level = self._level_of(module)
        given = kwargs if level is None else self._named(level, args, kwargs)
        if not hooks_ran and level is not None:
            self._enter(level, given)
        call, layers, source = self._thread.call, _reduced_layers(cache_in(given)), tokens_of(given)
        if (call is not None and call.videos) or (source is not None and layers and self._needs_masks(layers, source)):
            return True
        if level is not None and source is not None and not layers and (source.shape[1] > 1 or past_of(given) == 0):
            self._note_dense(call or Call(level))
        return False

    def _level_of(self, module: nn.Module) -> int | None:
        plain = getattr(module, "_orig_mod", module)
        return next((level for level, known in enumerate(self._modules) if known is plain), None)

    @contextmanager
    def _without_hooks(self, module: nn.Module, runs_hooks: bool, kwargs: dict) -> Iterator[None]:
        """Around a call of compiled code, which is to be as without a reduction: nothing in it is padded."""
        source = tokens_of(kwargs)
        if source is not None and _reduced_layers(cache_in(kwargs)):  # a mask would be made for the whole sequence
            own_mask = MASKS_WHEN_COMPILED and attention_name(self.decoder.config) == "sdpa"
            kwargs["attention_mask"] = self._mask_of_nothing(source) if own_mask else None
        level = self._level_of(module)
        if level is None:
            inside = getattr(module, "_orig_mod", module).modules()
            level = 0 if self.decoder in set(inside) else len(self._modules)
        else:
            level += not runs_hooks
        self._remove_entry_hooks(level)
        self._permit.compiled = True
        try:
            yield
        finally:
            self._permit.compiled = False
            self._add_entry_hooks(level)

    # ---- the decoder

    def _before_decoder(self, decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self._thread.looking:
            return args, kwargs
        if args:
            args, kwargs = (), dict(self._named(len(self._modules) - 1, args, kwargs))
        source = tokens_of(kwargs)
        if source is None:
            return args, kwargs  # the decoder refuses it
        call = self._arrive(kwargs, source)
        cache, use_cache = cache_in(kwargs), kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=decoder.config)
        if cache is not None:
            for name in CACHE:
                kwargs.pop(name, None)
            kwargs[self._cache_name] = cache
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"reduce: the KV cache must be a transformers.Cache, got {type(cache).__name__}: a paged cache cannot "
                "hold fewer tokens in later layers"
            )
        layers = None if cache is None else prepare(cache, len(decoder.layers), self._permit)
        reducible = [layer for layer in layers or () if layer is not None]
        reduced = any(layer.reduced for layer in reducible)
        if not call.videos and not reduced and (source.shape[1] > 1 or past_of(kwargs) == 0):
            self._note_dense(call)
        call.checkpoint, call.layers = Checkpoint(cache if reducible else None), layers or ()
        call.expected = check_lengths(reducible) + source.shape[1]
        reason = self._why_not(decoder, cache, layers, kwargs.get("attention_mask"))
        if reason is not None:
            if reduced:
                raise ValueError(f"reduce: nothing can follow the reduced prompt in the KV cache, because {reason}")
            if call.videos:
                check_cache(cache)
                self._warn_once("unreduced", f"fftriton: running without reduction, because {reason}")
                self._note_report(None)
            return args, kwargs
        if call.videos and torch.is_grad_enabled() and any(map(_runs_again, decoder.layers)):
            raise ValueError("reduce: gradient checkpointing must be off: it runs layers again without their reduction")
        if not call.videos and not reduced:
            return args, kwargs
        if not call.videos and not self._needs_masks(reducible, source):
            return args, kwargs
        if not call.videos and self._sees_all(reducible, source):
            kwargs["attention_mask"] = self._mask_of_nothing(source)
            return args, kwargs
        past_valid, valid = _padding(kwargs.get("attention_mask"), source.shape[1])
        _check_visible(call.videos, valid)
        for layer in reducible:
            if not layer.reduced and source.shape[1] > 1:
                layer.valid = past_valid
        if call.videos:
            self._check_structure(source)
            attends, additions = [*map(has_attention, decoder.layers)], take_deepstack(kwargs)
            call.forward = prefill = Prefill(
                source, valid, layers, self.method, call.videos, attends, additions, call.later, call.targets,
                self.verify,
            )  # fmt: skip
            prefill.states = [] if self._states_are_wanted(call) else None
            if kwargs.get("attention_mask") is None:
                prefill.expect_one_sequence(kwargs.get("position_ids"))
        else:
            call.forward = Continuation(source, valid, layers)
        self._layers.open(call.forward)
        return args, kwargs

    def _arrive(self, kwargs: Mapping[str, Any], source: Tensor) -> Call:
        """The call that has come to the decoder.

        Raises:
            ValueError: a call that passed by all hooks, or tokens that are not those of the call.
            UnknownReleaseError: pixels, and no tokens under a known name.
        """
        call = self._thread.call
        if call is None or call.begun:  # no module around has been called
            if len(self._modules) > 1 and self._finder.prompt_has_video:  # 4.x runs chunks of a prompt like that
                raise ValueError(
                    "reduce: prefill_chunk_size must not be given before transformers 5: it passes by all hooks"
                )
            call = self._begin(Call(len(self._modules) - 1, has_vision=kwargs.get("inputs_embeds") is not None))
        elif call.shape is None and call.has_vision is not False:
            raise UnknownReleaseError(
                "a call with images or videos must pass 'input_ids' or 'inputs_embeds' to a module around the decoder"
            )
        call.begun, call.frame = True, sys._getframe(3)  # torch's, which calls hooks and forward
        if call.shape is None or self._finder.is_listed:
            self._look(call, kwargs)
        elif call.videos and call.shape != source.shape[:2]:
            if self._finder.has_rule:
                raise ValueError(_OTHER_TOKENS.format(list(source.shape[:2])))
            call.later = 0
            check_layouts([video.layout for video in call.videos], *source.shape[:2])
        return call

    def _check_structure(self, source: Tensor) -> None:
        """Before the first prompt that is reduced, where it could not be done before."""
        self._thread.looking = True
        try:
            check_structure_in_place(self.decoder, source)
        finally:
            self._thread.looking = False

    def _needs_masks(self, cache_layers: Sequence[ReducedLayer], source: Tensor) -> bool:
        """Whether the mask that the decoder makes for the whole sequence does not do for the rows that are there."""
        if source.shape[1] > 1 or any(layer.valid is not None for layer in cache_layers):
            return True
        backend = attention_name(self.decoder.config)
        if backend not in self._masks_one_token:
            mask = causal_mask(self.decoder.config, source.new_empty(1, 1, 1, dtype=torch.float32), None, 1)
            self._masks_one_token[backend] = mask is not None
        return self._masks_one_token[backend]

    def _sees_all(self, cache_layers: Sequence[ReducedLayer], source: Tensor) -> bool:
        """Whether one mask that hides nothing does for all layers: eager attention adds it to scores of any length."""
        one_token = source.shape[1] == 1 and all(layer.valid is None for layer in cache_layers)
        eager = attention_name(self.decoder.config) == "eager"
        return one_token and eager and all(map(has_attention, self.decoder.layers))

    def _mask_of_nothing(self, source: Tensor) -> Tensor:
        """[B, 1, 1, 1]: what is added to the scores of one token, whatever the number of keys."""
        return source.new_zeros(len(source), 1, 1, 1, dtype=self.decoder.dtype)

    def _why_not(self, decoder: Any, cache: Any, cache_layers: Any, mask: Any) -> str | None:
        if cache is not None and cache_layers is None:
            kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
            of = f" with layers of {', '.join(kinds)}" if kinds else ""
            return f"only a plain DynamicCache can hold fewer tokens in later layers, got {type(cache).__name__}{of}"
        other = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "linear_attention"}
        config = decoder.config
        if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None) is not None:
            return f"the decoder's attention has a sliding window of {config.sliding_window}"
        if other:
            return f"the decoder has layers other than full and linear attention: {', '.join(sorted(other))}"
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            return "attention_mask is not the two-dimensional padding mask"
        return None

    def _after_decoder(self, decoder: Any, args: tuple, output: Any) -> Any:
        call = self._thread.call
        if self._thread.looking:
            return output
        if output is None:  # an exception on its way
            return None if self._was_refused(call) else self._abandon()
        try:
            if call is None or self._forward.open is not call.forward:
                raise RuntimeError(
                    "reduce: the model was called while a call of it was at work; hooks must not do that"
                )
            if isinstance(call.forward, Prefill):
                call.forward.check_depth(len(self.decoder.layers))
            check_growth(call.layers, call.expected, self.method)
            if isinstance(call.forward, Prefill):
                self._finish(call, call.forward)
        except BaseException:
            self._abandon()
            raise
        self._layers.close()
        call.forward, call.layers = None, ()
        if call.level == len(self._modules) - 1:
            self._leave(call)
        return output

    def _leave(self, call: Call) -> None:
        """A call went through."""
        self._thread.call = call.outer
        if call.report is not None:
            self._note_report(call.report)
        if call.checkpoint is not None:
            call.checkpoint.release()
        self._finder.forget()

    def _finish(self, call: Call, prefill: Prefill) -> None:
        """Make the report, and see to what else depends on what has been kept."""
        report = call.report = prefill.finish()
        prefill.hide_targets()
        call.states = prefill.states
        self._has_reduced = True
        for sample in report.samples if isinstance(report, BatchReport) else [report]:
            if sample.window is None and sample.budget_achieved > sample.budget + 1 / max(sample.num_video_tokens, 1):
                self._warn_once(
                    "budget",
                    f"fftriton: the budget {sample.budget:g} cannot be reached on this prompt; the least possible is "
                    f"{sample.least_budget:.4g}, and {sample.budget_achieved:.4g} of the video tokens were kept",
                )

    def _note_dense(self, call: Call) -> None:
        """Remember that a prompt runs without a video that is known of."""
        if self._finder.depth > 1 or self._finder.prompt_has_video:  # an assistant's, or candidates
            return
        self._note_report(None)
        if call.has_vision is not False and not self._has_reduced:
            seen = self._ran_dense
            self._ran_dense = (
                call.has_vision if seen is False else torch.as_tensor(seen) | torch.as_tensor(call.has_vision)
            )

    def _warn_if_idle(self) -> None:
        if self._has_reduced or "unreduced" in self._warned or isinstance(self.method, KeepAll):
            return
        if bool(self._ran_dense):
            self._warn_once(
                "idle",
                f"fftriton: nothing was reduced, though the model ran on images, videos or embeddings: no call showed "
                f"{self.method} a video. Call the model that was given to reduce, or give a layout",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=3)


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


def _owner(root: nn.Module, decoder: nn.Module) -> Any:
    """The Hugging Face model that holds the decoder: `root`, or what it wraps (PEFT, DistributedDataParallel)."""
    models = (module for module in root.modules() if isinstance(module, PreTrainedModel))
    return next((model for model in models if decoder in model.modules()), root)


def _check_wrapper(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise TypeError(
                f"reduce: model must not be a DataParallel over {len(module.device_ids)} devices, whose copies a "
                "reduction does not reach; use DistributedDataParallel"
            )


def _are_targets(labels: Any, shape: torch.Size | None) -> bool:
    """Whether there is a label for each token: not so for a head that classifies, say."""
    return isinstance(labels, Tensor) and labels.shape == shape


def _has_pixels(given: Mapping[str, Any]) -> bool:
    """Whether a forward is given images or videos, encoded or not."""
    encoded = given.get("mm_encoder_outputs") or {}
    return any(value is not None and name.startswith("pixel_values") for name, value in given.items()) or any(
        value is not None for value in encoded.values()
    )


def _above_hooks(model: nn.Module, decoder: Any) -> list[nn.Module]:
    """The modules that have hooks while a prompt is reduced, and those that contain one."""
    hooked = {decoder} | hooked_in(decoder.layers)
    return [module for module in model.modules() if any(part in hooked for part in module.modules())]


def _reduced_layers(cache: Any) -> list[ReducedLayer]:
    """The layers of a KV cache where they hold a reduced prompt."""
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, ReducedLayer)]
    return layers if any(layer.reduced for layer in layers) else []


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
