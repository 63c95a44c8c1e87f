"""Gradient checkpointing: a layer that runs again in the backward pass repeats what was done to its rows.

transformers gives each layer to its `_gradient_checkpointing_func`, which runs it in the forward pass, and again in the
backward pass, when the reduction may be gone. So the first run is recorded: which rows each stage kept or merged, and
which arguments the layer got. The second run gets hooks of its own, from its start to its end, that repeat this.
Neither the method nor anything else that depends on the hidden states decides a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .compat import first_of, with_first
from .hooks import Hook, Undo
from .invariants import Invariants
from .residual import ResidualStream


def runs_again(decoder: Any) -> bool:
    """Whether gradient checkpointing runs layers of the decoder a second time."""
    return torch.is_grad_enabled() and any(map(_is_checkpointed, decoder.layers))


def check_checkpointing(decoder: Any) -> None:
    """Raise a ValueError for gradient checkpointing other than that of transformers' own layers."""
    if not torch.is_grad_enabled():
        return
    for layer in decoder.layers:
        is_on = _is_checkpointed(decoder) or _is_checkpointed(layer)
        if is_on and not isinstance(layer, GradientCheckpointingLayer):
            raise ValueError(
                "reduce: gradient checkpointing must be that of transformers (model.gradient_checkpointing_enable()), "
                f"whose second run of a layer can be followed, got layers of {type(layer).__name__}"
            )


def _is_checkpointed(module: Any) -> bool:
    return module.training and getattr(module, "gradient_checkpointing", False)


class CheckpointedLayer:
    """One layer in one prefill: a function that gradient checkpointing calls, once in each pass.

    Args:
        index: the layer's number.
        layer: the layer.
        function: what runs it.
        prefill: what is going on.
    """

    def __init__(self, index: int, layer: Any, function: Callable, prefill: Any) -> None:
        self._index, self._layer, self._function, self._prefill = index, layer, function, prefill
        self._has_run = False

    def __call__(self, *args: Any) -> Any:
        if not self._has_run:
            self._has_run = True
            return self._leave(self._prefill.residual, self._function(*args))
        residual, undo = ResidualStream(Invariants(), collects_states=False), []  # type: ResidualStream, Undo
        self._hook(residual, undo)
        try:
            return self._leave(residual, self._function(*args))
        finally:
            while undo:
                undo.pop()()

    def _leave(self, residual: ResidualStream, output: Any) -> Any:
        """The layer's output, unless its own hooks, which until transformers 5.2x run in here, have seen to it."""
        if not residual.is_pending:
            return output
        return with_first(output, residual.leave_layer(self._index, first_of(output), inside=True))

    def _hook(self, residual: ResidualStream, undo: Undo) -> None:
        thread = threading.get_ident()

        def keep(register: Callable, call: Callable, **options: Any) -> None:
            def in_this_thread(*given: Any) -> Any:
                return call(*given) if threading.get_ident() == thread else None

            undo.append(register(Hook(in_this_thread), **options).remove)

        def before_layer(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = self._select("before_attention", args[0] if args else kwargs["hidden_states"])
            kwargs = {**kwargs, **self._prefill.record.arguments[self._index]}
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def before_feed_forward(norm: nn.Module, args: tuple) -> tuple | None:
            residual.reach_norm(args[0])
            if (self._index, "after_attention") not in self._prefill.record.selections:
                return None
            left = self._select("after_attention", args[0])
            residual.keep(left)
            return (left,)

        def after_feed_forward(mlp: nn.Module, args: tuple, output: Any) -> Any:
            stand_in = residual.add_feed_forward(first_of(output))
            return None if stand_in is None else with_first(output, stand_in)

        def leave(layer: nn.Module, args: tuple, output: Any) -> Any:
            return with_first(output, residual.leave_layer(self._index, first_of(output)))

        def after_layer(layer: nn.Module, args: tuple, output: Any) -> Any:
            return with_first(output, self._prefill.outcome(self._index, first_of(output)))

        keep(self._layer.register_forward_pre_hook, before_layer, with_kwargs=True, prepend=True)
        keep(self._layer.post_attention_layernorm.register_forward_pre_hook, before_feed_forward, prepend=True)
        keep(self._layer.mlp.register_forward_hook, after_feed_forward)
        keep(self._layer.register_forward_hook, leave, prepend=True)
        keep(self._layer.register_forward_hook, after_layer)

    def _select(self, stage: str, hidden: Tensor) -> Tensor:
        selection = self._prefill.record.selections.get((self._index, stage))
        return hidden if selection is None else selection(hidden)
