"""The hooks of the modules around the decoder, and what is to happen to their compiled code."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .cache import Permit
from .calls import Calls
from .classify import reduced_layers
from .compat import MASKS_WHEN_COMPILED, attention_name, cache_in, past_of
from .decoder_hooks import DecoderHooks
from .finder import tokens_of
from .hooks import Hook, Undo, torchs_frame
from .intake import Intake
from .layers import Forward

_LABELS = {"labels": 1, "shift_labels": 0}  # how far they are ahead of their logits


class EntryHooks:
    """Hooks of the modules by which a call enters.

    Args:
        decoder: the module whose layers are reduced.
        modules: those around the decoder, the outermost first, and the decoder itself.
        intake: notes what they are given.
        decoder_hooks: those of the decoder.
        calls, forward: the calls of each thread, and the forward that it has open.
        permit: for the KV caches.
    """

    def __init__(
        self, decoder: Any, modules: Sequence[nn.Module], intake: Intake, decoder_hooks: DecoderHooks, calls: Calls,
        forward: Forward, permit: Permit,
    ) -> None:  # fmt: skip
        self._decoder, self._modules = decoder, modules
        self._intake, self._decoder_hooks, self._calls = intake, decoder_hooks, calls
        self._forward, self._permit = forward, permit
        self._handles: list[tuple[int, RemovableHandle]] = []

    def install(self, undo: Undo) -> None:
        """Hook into the modules; what takes that back is appended to `undo`."""
        undo.append(self._remove)
        self._add()

    def _add(self, level: int = 0) -> None:
        """Hook into the modules from this level on."""

        def keep(handle: RemovableHandle) -> None:
            self._handles.append((at, handle))

        for at, module in enumerate(self._modules):
            if at < level:
                continue
            if module is self._decoder:
                before: Any = self._decoder_hooks.before
                after: Any = self._decoder_hooks.after
            else:
                before, after = partial(self._before_module, at), partial(self._after_module, at)
            keep(module.register_forward_pre_hook(Hook(before), with_kwargs=True))
            keep(module.register_forward_hook(Hook(after), always_call=True))

    def _remove(self, level: int = 0) -> None:
        for at, handle in self._handles:
            if at >= level:
                handle.remove()
        self._handles = [(at, handle) for at, handle in self._handles if at < level]

    # ---- modules around the decoder

    def _before_module(self, level: int, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        given = self._intake.named(level, args, kwargs)
        call = self._intake.enter(level, given, torchs_frame())
        if call is None:
            return None
        targets = [(name, shift) for name, shift in _LABELS.items() if _are_targets(given.get(name), call.shape)]
        if not targets or call.targets:
            return None
        own = {name: given[name].clone() for name, _ in targets}
        call.targets = [(own[name], shift) for name, shift in targets]
        return (), {**given, **own}

    def _after_module(self, level: int, module: Any, args: tuple, output: Any) -> None:
        """End the call, and put the hidden states right: transformers may have noted what the layers themselves
        return, which is thrown away if rows leave."""
        call = self._calls.current
        if call is None or (call.has_failed and call.take_refusal()):
            return
        if call.level == level and call.has_failed:
            self._calls.abandon()
        elif call.level == level:
            self._decoder_hooks.leave(call)
        states = call.states
        if states is None or getattr(output, "hidden_states", None) is None:
            return
        *_, last = given = output.hidden_states
        own = [None if noted is None else state for noted, state in zip(given, states, strict=True)]
        if last is not None and last.shape == states[-1].shape:  # taken after the decoder's norm
            own[-1] = last
        output.hidden_states = tuple(own)

    # ---- compiled code

    def acts(self, module: nn.Module, hooks_ran: bool, args: tuple, kwargs: dict) -> bool:
        """Whether a compiled module's call has something to reduce or to mask."""
        if self._forward.open is not None or self._calls.looking:  # the decoder is at work
            return True
        level = self._level_of(module)
        if level is None and self._decoder in module.modules():  # it is around the model that is followed
            return True
        given = kwargs if level is None else self._intake.named(level, args, kwargs)
        if not hooks_ran and level is not None:
            self._intake.enter(level, given, sys._getframe(1))
        if level is not None and module is not self._decoder and self._intake.may_expand(given):
            return True
        call, layers, source = self._calls.current, reduced_layers(cache_in(given)), tokens_of(given)
        if call is not None and call.videos:
            return True
        if source is not None and layers and self._decoder_hooks.masks.are_needed(layers, source):
            return True
        if level is not None and source is not None and not layers and (source.shape[1] > 1 or past_of(given) == 0):
            self._intake.note_dense(call is not None and call.has_vision)
        return False

    @contextmanager
    def without_hooks(self, module: nn.Module, runs_hooks: bool, kwargs: dict) -> Iterator[None]:
        """Around a call of compiled code, which is to run as it would without a reduction: nothing in it is padded."""
        source = tokens_of(kwargs)
        if source is not None and reduced_layers(cache_in(kwargs)):  # a mask would be made for the whole sequence
            own_mask = MASKS_WHEN_COMPILED and attention_name(self._decoder.config) == "sdpa"
            kwargs["attention_mask"] = self._decoder_hooks.masks.of_nothing(source) if own_mask else None
        level = self._level_of(module)
        if level is None:
            inside = getattr(module, "_orig_mod", module).modules()
            level = 0 if self._decoder in set(inside) else len(self._modules)
        else:
            level += not runs_hooks
        self._remove(level)
        self._permit.compiled = True
        try:
            yield
        finally:
            self._permit.compiled = False
            self._add(level)

    def _level_of(self, module: nn.Module) -> int | None:
        plain = getattr(module, "_orig_mod", module)
        return next((level for level, known in enumerate(self._modules) if known is plain), None)


def _are_targets(labels: Any, shape: torch.Size | None) -> bool:
    """Whether there is a label for each token; not so for a head that classifies, say."""
    return isinstance(labels, Tensor) and labels.shape == shape
