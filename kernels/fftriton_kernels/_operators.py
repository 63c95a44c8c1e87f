"""Registers functions as PyTorch operators.

By the dispatcher's own means, because torch.library.custom_op costs 10 us a call. Gradients are those of an
autograd.Function around the operator, which only a call that needs them goes through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix

_NAMESPACE = add_op_namespace_prefix("").partition("::")[0]
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def operator(
    name: str, schema: str | None = None, *, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes a function of tensors, which it does not change, an operator for every device.

    Args:
        name: without the namespace.
        schema: arguments and results; None: inferred from the annotations.
        fake: gives the results' shapes and dtypes, under torch.compile.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = schema or torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        registered = getattr(getattr(torch.ops, _NAMESPACE), name).default
        torch.library.register_fake(registered, fake, lib=_LIBRARY)
        return registered

    return register


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def without_gradient(name: str, call: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """call(*arguments), a floating point result that has no gradient: asking for one raises a RuntimeError."""
    if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in arguments):
        return _WithoutFormula.apply(name, call, *arguments)
    return call(*arguments)


class _WithoutFormula(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, call: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.name = name
        return call(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name}: no autograd formula: its result is for comparing, not for training")
