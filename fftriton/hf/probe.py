"""Finds out, by running them, whether a decoder's layers are built so that rows can be taken out of them."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .compat import first_of
from .invariants import Invariants

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_checking = threading.Lock()
_HOOKS = [name for name, value in nn.Module().__dict__.items() if isinstance(value, OrderedDict)]


class _Seen(Exception):  # noqa: N818
    """Every kind of layer has been seen."""


def check_structure(decoder: Any) -> None:
    """Run the first layer of each kind on two random tokens, and check that its output is the sum that it must be.

    A bare twin of the decoder runs, which shares its weights and has none of its hooks. If that is not possible
    (weights that are offloaded, sharded or not loaded yet), the check is made on the first prompt.

    Raises:
        TypeError: a layer of another structure.
    """
    if decoder in _checked:
        return
    try:
        twin = _twin(decoder)
        invariants = _run(twin, next(decoder.parameters()))
    except Exception:  # whatever it is, the model itself will raise it
        return
    invariants.read()
    _checked.add(decoder)


def check_structure_in_place(decoder: Any, source: Tensor) -> None:
    """Like `check_structure`, if that was not possible: the decoder itself runs, once.

    Args:
        decoder: what to run; its own hooks run, too.
        source: [B, N] or [B, N, D], what it was given.
    """
    with _checking:  # a second thread's first prompt waits
        if decoder not in _checked:
            _run(decoder, source if source.is_floating_point() else next(decoder.parameters())).read()
            _checked.add(decoder)


def _run(decoder: Any, like: Tensor) -> Invariants:
    """Run random tokens, of the type and device of `like`, up to the last layer that is the first of its kind."""
    first = {_kind(layer): index for index, layer in reversed([*enumerate(decoder.layers)])}
    invariants, handles = Invariants(), []
    noise = torch.randn(1, 2, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    try:
        for index in first.values():
            handles += _listen(decoder.layers[index], index, index == max(first.values()), invariants)
        with torch.no_grad():
            mask = torch.ones(1, 2, dtype=torch.int64, device=like.device)
            decoder(inputs_embeds=noise.to(like.device, like.dtype), attention_mask=mask, use_cache=False)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return invariants


def _listen(layer: Any, index: int, last: bool, invariants: Invariants) -> list[RemovableHandle]:
    """Hooks that see what this thread runs: others may use the model meanwhile."""
    fed: list[Tensor] = []
    own = threading.get_ident()

    def note(part: Tensor) -> None:
        if threading.get_ident() == own:
            fed.append(part)

    def after_layer(layer: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() != own:
            return
        if first_of(output).is_meta:
            raise ValueError("weights must be there")
        residual, added = fed
        invariants.expect_output(index, first_of(output)[:, -1], residual[:, -1] + added[:, -1])
        if last:
            raise _Seen

    return [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda norm, args: note(args[0])),
        layer.mlp.register_forward_hook(lambda mlp, args, output: note(first_of(output))),
        layer.register_forward_hook(after_layer),
    ]


def _twin(module: nn.Module) -> Any:
    """A module of the same class, weights and attributes, without hooks, in evaluation.

    Raises:
        ValueError: the module has a forward of its own, which a twin cannot have.
    """
    twin = module.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: OrderedDict() for name in _HOOKS})
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child) for name, child in module._modules.items()
    }
    twin.__dict__.update(training=False, _compiled_call_impl=None)
    if hasattr(module, "config"):
        twin.__dict__["config"] = _Eager(module.config)
    own = twin.__dict__.pop("forward", None)
    inherited = getattr(own, "__func__", None) is type(module).forward  # transformers 4.57 leaves it on a module
    if own is not None and not inherited and not hasattr(own, "_torchdynamo_orig_callable"):
        raise ValueError("forward must be the class's")
    return twin


class _Eager:
    """A config with eager attention, which works on every device and type and needs no registration."""

    _attn_implementation = "eager"

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _kind(layer: nn.Module) -> tuple[type, ...]:
    return type(layer), type(layer.mlp), *(type(child) for child in layer.children())
