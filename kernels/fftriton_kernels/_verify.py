"""Recomputes every op by the reference, to chase a wrong answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from ._ops import add_op_namespace_prefix

_NAMESPACE = add_op_namespace_prefix("").partition("::")[0]


class VerificationError(RuntimeError):
    """The result of an op differs from its formula. The message says which op, for what, where and by how much."""


def verified() -> AbstractContextManager[Any]:
    """Check every op: inside the block each result is recomputed in plain PyTorch, and a disagreement raises.

    Floating point results must be as near to fp64 as PyTorch's own, by the rule of the README. Because a few results
    say little about PyTorch's errors, one rounding per level of a sum is allowed. Integers and copied rows must be
    equal.

    The check applies to the thread that entered the block, and takes many times the time and memory of the ops alone.
    Outside the block it costs nothing. Inside it, code compiled by torch.compile runs uncompiled.

    Returns:
        A context manager. Inside its block an op raises a VerificationError if its result is wrong.
    """
    return _Verified()


class _Verified(TorchDispatchMode):
    """Sees every operator that its thread calls."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == _NAMESPACE:
            values = [*args, *(kwargs.get(a.name, a.default_value) for a in func._schema.arguments[len(args) :])]
            names = [argument.name for argument in func._schema.arguments]
            with torch.no_grad():
                _check(func._opname, dict(zip(names, values, strict=True)), out)
        return out


class _Formula(NamedTuple):
    """How the result of an operator is recomputed."""

    op: str  # the public function that calls it
    expected: Callable[..., Any]  # takes the operator's arguments by name
    outputs: tuple[str, ...] = ("result",)  # what it returns, in its order
    size: Callable[..., Tensor] | None = (
        None  # what the roundings of a floating point result, the first, are relative to
    )


def _check(operator: str, arguments: dict[str, Any], out: Any) -> None:
    """Raise unless `out` is what the operator's formula gives for its arguments."""
    formula = _FORMULAS[operator]
    outs, expected = _listed(out), _listed(formula.expected(**arguments))
    faults = [unequal(*pair) for pair in zip(outs, expected, strict=True)]
    if formula.size is not None:
        exact = {name: doubled(value) for name, value in arguments.items()}
        truth = _listed(formula.expected(**exact))[0]
        faults[0] = too_far(outs[0], expected[0], truth, formula.size(truth, **exact))
    for number, fault in enumerate(faults):
        if fault:
            name = formula.outputs[number] if formula.outputs else f"tensors[{number}]"
            given = ", ".join(f"{key} {_described(value)}" for key, value in arguments.items() if value is not None)
            raise VerificationError(
                f"{formula.op}: {name} is not what the reference gives: {fault}; {operator} of {given}"
            )


def _listed(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def unequal(out: Tensor, expected: Tensor) -> str:
    """Where a result differs from the expected one in any bit; empty where it does not."""
    if (out.dtype, out.shape) != (expected.dtype, expected.shape):
        return f"{_described(out)} for {_described(expected)}"
    if not out.numel():
        return ""
    bits, wanted = (x.contiguous().unsqueeze(-1).view(torch.uint8) for x in (out, expected))
    return _places((bits == wanted).all(-1), out, expected)


def too_far(out: Tensor, eager: Tensor, truth: Tensor, size: Tensor) -> str:
    """Where the error of `out` is above twice the worst of `eager` in that sample plus a rounding; empty where none is.

    Args:
        out: the op's result.
        eager: what plain PyTorch gives for the same arguments.
        truth: the same in fp64. NaN and Inf must stand in the same places in `out`, unless they are eager's overflow.
        size: what a rounding in fp32 is relative to: the size of the terms that are added up, times how many in a row.
    """
    if (out.dtype, out.shape) != (eager.dtype, truth.shape):
        return f"{_described(out)} for {_described(eager)}"
    if not out.numel():
        return ""
    exact, own = out.double(), (eager.double() - truth).abs()
    judged = truth.isfinite() & own.isfinite()
    worst = torch.where(judged, own, 0).amax(tuple(range(1, out.ndim)) or 0, keepdim=True)
    rounding = truth.abs() * torch.finfo(out.dtype).eps + size * torch.finfo(torch.float32).eps
    rounding += torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    near = (exact - truth).abs() <= 2 * worst + rounding
    same = (exact == truth) | (exact.isnan() & truth.isnan())
    overflow = truth.isfinite() & ~own.isfinite()
    return _places(torch.where(judged, near, same | overflow), out, truth)


def _places(right: Tensor, out: Tensor, expected: Tensor) -> str:
    wrong = (~right).nonzero()
    if not len(wrong):
        return ""
    place = tuple(wrong[0].tolist())
    first = f"{out[place].item()} for {expected[place].item()} at {list(place)}"
    if out.is_floating_point():
        first += f", {(out.double() - expected.double())[~right].abs().max():.3e} off at most"
    return f"{len(wrong)} of {right.numel()} elements differ, {first}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_described, value))})"
    return repr(value)


def doubled(value: Any) -> Any:
    """An argument in fp64 if it is a floating point tensor, and as it is otherwise."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _merge_roots(
    stride: int, predecessor: Tensor | None, bound: int | None, bounds: Tensor | None, **arguments: Any
) -> Tensor:
    links = stride if predecessor is None else predecessor
    return reference.merge_roots(predecessor=links, max_merges=bound if bounds is None else bounds, **arguments)


def _merge_mean(
    x: Tensor, roots: Tensor, predecessor: Tensor | None, stride: int, capacity: int | None
) -> tuple[Tensor, ...]:
    groups = reference.group_rows(roots, stride or None if predecessor is None else predecessor, capacity)
    return reference.group_mean(x, groups), groups.kept, groups.lengths, groups.predecessor


def _topk_keep(bound: int, bounds: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    kept = reference.topk_keep(k=bound if bounds is None else bounds, **arguments)
    kept = kept[0] if isinstance(kept, tuple) else kept
    return kept, (kept >= 0).sum(-1).view(kept.shape[:-1] or 1)


def _segmented_topk_keep(**arguments: Any) -> Tensor:
    kept = reference.segmented_topk_keep(**arguments)
    return kept[0] if isinstance(kept, tuple) else kept


def _levels(terms: int) -> float:
    """Roundings that a sum of so many terms in pairs takes one after another, and one more."""
    return 1 + math.log2(1 + terms)


def _cosine_size(truth: Tensor, x: Tensor, **_: Any) -> Tensor:
    return torch.full_like(truth, _levels(x.shape[2]))


def _mean_size(truth: Tensor, x: Tensor, **groups: Any) -> Tensor:
    return _merge_mean(x.abs(), **groups)[0] * _levels(x.shape[1])


def _score_size(truth: Tensor, q: Tensor, k: Tensor, scale: float, **_: Any) -> Tensor:
    """A rounding of a score changes its exponential by as much as the score is large."""
    longest = [x.norm(dim=-1).nan_to_num(0, 0).amax() if x.numel() else 0 for x in (q, k)]
    rows, columns = (x.shape[-2] * x.shape[-3] for x in (q, k))
    return truth.abs() * (longest[0] * longest[1] * scale + _levels(rows) + _levels(columns))


_FORMULAS = {
    "strided_cosine_similarity": _Formula(
        "strided_cosine_similarity", reference.strided_cosine_similarity, size=_cosine_size
    ),
    "linked_cosine_similarity": _Formula(
        "linked_cosine_similarity", reference.linked_cosine_similarity, size=_cosine_size
    ),
    "merge_roots": _Formula("merge_roots", _merge_roots, ("roots",)),
    "connected_components": _Formula("connected_components", reference.connected_components, ("labels",)),
    "merge_mean": _Formula("merge_mean", _merge_mean, ("x", "kept", "lengths", "predecessor"), size=_mean_size),
    "gather_rows": _Formula("gather_rows", lambda index, tensors: reference.gather_rows(index, *tensors), ()),
    "attention_column_sum": _Formula(
        "attention_column_sum",
        lambda begin, end, **arguments: reference.attention_column_sum(columns=(begin, end), **arguments),
        size=_score_size,
    ),
    "attention_column_sum_packed": _Formula("attention_column_sum", reference.attention_column_sum, size=_score_size),
    "topk_keep": _Formula("topk_keep", _topk_keep, ("kept", "lengths")),
    "segmented_topk_keep": _Formula("segmented_topk_keep", _segmented_topk_keep, ("kept",)),
}
