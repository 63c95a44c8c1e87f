"""The hooks of the decoder's layers while a prompt is reduced. prefill.py tells the walk of the hidden states.

The layers have hooks only while some thread has a forward open that needs them. They do nothing in the other threads.
Each layer gets its hooks while the one before it runs: on a GPU the host is ahead by then, so this costs no time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .checkpointing import CheckpointedLayer
from .compat import UnknownReleaseError, causal_mask, first_of, with_first
from .continuation import Continuation
from .hooks import Hook, Undo, wrap
from .importance import Attention, AttentionTap
from .invariants import check_no_rows
from .modules import has_attention
from .prefill import Prefill


class Forward(threading.local):
    """The forward that this thread has open, or None if it has none that needs hooks."""

    open: Continuation | None = None


class LayerHooks:
    """Hooks of the layers, for as long as a forward is open.

    Args:
        decoder: whose layers they are.
        forward: which forward a thread has open.
    """

    def __init__(self, decoder: Any, forward: Forward) -> None:
        self._decoder, self._forward = decoder, forward
        self._tap = AttentionTap()
        self._lock = threading.RLock()
        self._masked, self._reduced = _Shared(self._before), _Shared(self._around)
        self._heard = _Shared(self._around_attention)
        self._all = (self._masked, self._heard, self._reduced)

    def install(self, undo: Undo) -> None:
        """Prepare to listen to attention; what takes everything back is appended to `undo`."""
        self._tap.install()
        undo += [self._tap.remove, self._clear]

    def _clear(self) -> None:
        with self._lock:
            for shared in self._all:
                shared.clear()

    def open(self, forward: Continuation) -> None:
        """Start a forward of this thread. Without a video, only masks and sizes need hooks."""
        with self._lock:
            self._forward.open = forward
            self._masked.enter()
            if forward.hears:
                self._heard.enter()
            if isinstance(forward, Prefill):
                self._reduced.enter()
        self._reach(0)

    def _reach(self, index: int) -> None:
        """See that a layer has its hooks before it is called."""
        if index == len(self._decoder.layers):
            return
        with self._lock:
            for shared in self._all:
                shared.reach(index)

    def retire(self) -> None:
        """Take the hooks away, unless another thread needs them: this one's layers have run, though it may yet wait."""
        with self._lock:
            for shared in self._all:
                shared.retire()

    def close(self) -> Continuation | None:
        """End this thread's forward. If it was the only one, the layers are as before."""
        forward = self._forward.open
        if forward is None:
            return None
        try:
            self._tap.end()  # a KeyboardInterrupt may have left it open: torch runs no hook after one
            with self._lock:
                for shared in self._all:
                    shared.leave()
        finally:
            self._forward.open = None
        return forward

    def _before(self, index: int, undo: Undo) -> None:
        hook = Hook(partial(self._before_layer, index))
        undo.append(self._decoder.layers[index].register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)

    def _around_attention(self, index: int, undo: Undo) -> None:
        layer = self._decoder.layers[index]
        if not has_attention(layer):
            return
        attention = layer.self_attn
        undo.append(partial(self._tap.close, attention))
        self._tap.open(attention)
        undo.append(attention.register_forward_pre_hook(Hook(partial(self._before_attention, index))).remove)
        after = Hook(partial(self._after_attention, index))
        undo.append(attention.register_forward_hook(after, always_call=True).remove)

    def _around(self, index: int, undo: Undo) -> None:
        """Placed so that the user's hooks of a layer, its norm and its mlp see what the layer itself has."""

        def keep(handle: RemovableHandle) -> None:
            undo.append(handle.remove)

        layer = self._decoder.layers[index]
        before_feed_forward = Hook(partial(self._before_feed_forward, index))
        keep(layer.post_attention_layernorm.register_forward_pre_hook(before_feed_forward, prepend=True))
        keep(layer.mlp.register_forward_hook(Hook(self._after_feed_forward)))
        keep(layer.register_forward_hook(Hook(partial(self._output, index)), prepend=True))
        keep(layer.register_forward_hook(Hook(partial(self._after_layer, index))))
        wrap(layer, "_gradient_checkpointing_func", partial(self._checkpoint, index, layer), undo)

    def _checkpoint(self, index: int, layer: nn.Module, checkpoint: Callable) -> Callable:
        def repeatable(function: Callable, *args: Any) -> Any:
            prefill = self._prefill
            if prefill is None or prefill.record is None:
                return checkpoint(function, *args)
            return checkpoint(CheckpointedLayer(index, layer, function, prefill), *args)

        return repeatable

    @property
    def _prefill(self) -> Prefill | None:
        forward = self._forward.open
        return forward if isinstance(forward, Prefill) else None

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        forward = self._forward.open
        if forward is None:
            return None
        self._reach(index + 1)
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(forward, Prefill):
            if index == 0:
                forward.begin(hidden, kwargs, self._decoder.config, partial(self._first_layers, kwargs))
                forward.residual.note_state(hidden)
            hidden = forward.before_attention(index, hidden)
            if forward.packed:
                check_no_rows(layer, index, args, kwargs, forward.batch, forward.length)
        kwargs.update(forward.layer_arguments(index, hidden, kwargs, self._decoder.config))
        self._tap.weigh(forward.log_sizes_of_keys)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _first_layers(
        self, given: dict[str, Any], hidden: Tensor, rotary: tuple[Tensor, ...], additions: Sequence[Tensor], last: int,
        log_sizes: Tensor | None,
    ) -> Attention:  # fmt: skip
        """Run the layers up to the attention of one of them on some tokens, beside the forward that is open.

        Args:
            given: the arguments of layer 0.
            hidden: [1, M, D]: the tokens.
            rotary: their rotary embeddings.
            additions: [1, M, D] each, what the decoder adds to the outputs of its first layers.
            last: index of the layer whose attention is returned.
            log_sizes: [1, M] fp32, of the tokens that each stands for; None: each for itself.
        """
        config, layers = self._decoder.config, self._decoder.layers
        own = {"past_key_values": None, "cache": None, "use_cache": False, "position_ids": None, "cache_position": None}
        arguments = given | {name: value for name, value in own.items() if name in given}
        arguments |= {"attention_mask": causal_mask(config, hidden, None, 0), "position_embeddings": rotary or None}
        arguments.pop("hidden_states", None)
        for index in range(last + 1):
            self._reach(index)
        forward = self._forward.open
        handles: list[RemovableHandle] = []
        try:
            self._forward.open = None  # the hooks of the layers do nothing meanwhile
            handles.append(layers[last].self_attn.register_forward_pre_hook(lambda *_: self._tap.listen()))
            handles.append(layers[last].self_attn.register_forward_hook(_stop))
            with torch.no_grad():
                for index, layer in enumerate(layers):
                    self._tap.weigh(log_sizes)
                    masks = {} if has_attention(layer) else {"attention_mask": None}
                    hidden = first_of(layer(hidden, **(arguments | masks)))
                    if index < len(additions):
                        hidden = hidden + additions[index].to(hidden.device, hidden.dtype)
        except _Heard:
            pass
        finally:
            for handle in handles:
                handle.remove()
            self._tap.stop()
            self._tap.weigh(None)
            self._forward.open = forward
        heard = self._tap.take()
        if heard is None:
            raise UnknownReleaseError(
                f"the attention of layer {last} must choose its function by config._attn_implementation, but does not"
            )
        return heard

    def _before_attention(self, index: int, attention: nn.Module, args: tuple) -> None:
        prefill = self._prefill
        if prefill is not None and prefill.wants_attention(index):
            self._tap.listen()

    def _after_attention(self, index: int, attention: nn.Module, args: tuple, output: Any) -> None:
        self._tap.stop()
        has_sizes_left = self._tap.is_weighing
        self._tap.weigh(None)
        if has_sizes_left and output is not None:  # without an exception
            raise UnknownReleaseError(
                f"rows have sizes, which the attention of layer {index} has not got: it must choose its function by "
                "config._attn_implementation, but does not"
            )

    def _before_feed_forward(self, index: int, norm: nn.Module, args: tuple) -> tuple | None:
        prefill = self._prefill
        if prefill is None:
            return None
        left = prefill.after_attention(index, args[0], self._tap.take())
        return None if left is None else (left,)

    def _after_feed_forward(self, mlp: nn.Module, args: tuple, output: Any) -> Any:
        prefill = self._prefill
        stand_in = None if prefill is None else prefill.residual.add_feed_forward(first_of(output))
        return None if stand_in is None else with_first(output, stand_in)

    def _output(self, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        prefill = self._prefill
        if prefill is None:
            return None
        given = first_of(output)
        hidden = prefill.residual.leave_layer(index, given)
        return None if hidden is given else with_first(output, hidden)

    def _after_layer(self, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        prefill = self._prefill
        if prefill is None:
            return None
        given = first_of(output)
        hidden = prefill.after_layer(index, given)
        prefill.residual.note_state(hidden)
        return None if hidden is given else with_first(output, hidden)


class _Heard(Exception):  # noqa: N818
    """The attention of the last of the first layers has been heard."""


def _stop(attention: nn.Module, args: tuple, output: Any) -> None:
    raise _Heard


class _Shared:
    """What the layers have while at least one thread needs it, each from when it is reached."""

    def __init__(self, make: Callable[[int, Undo], None]) -> None:
        self._make = make
        self._users: list[threading.Thread] = []
        self._undo: dict[int, Undo] = {}

    def enter(self) -> None:
        if not self._users:
            self._take_away()  # what a KeyboardInterrupt has left
        if threading.current_thread() not in self._users:
            self._users.append(threading.current_thread())

    def reach(self, index: int) -> None:
        if not self._users or index in self._undo:
            return
        undo: Undo = []
        try:
            self._make(index, undo)
        except BaseException:
            _undo_all(undo)
            raise
        self._undo[index] = undo

    def retire(self) -> None:
        """Take it away, unless another thread needs it."""
        if not self.has_others():
            self._take_away()

    def leave(self) -> None:
        self._users = [user for user in self._users if user is not threading.current_thread()]
        if not self._users:
            self._take_away()

    def clear(self) -> None:
        """Take it away, whoever still needs it."""
        self._users.clear()
        self._take_away()

    def _take_away(self) -> None:
        for index in list(self._undo):
            _undo_all(self._undo[index])
            del self._undo[index]

    def has_others(self) -> bool:
        """Whether another thread, one that is alive, needs it."""
        return any(user.is_alive() and user is not threading.current_thread() for user in self._users)


def _undo_all(undo: Undo) -> None:
    while undo:
        undo.pop()()
