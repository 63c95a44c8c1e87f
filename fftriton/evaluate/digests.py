"""Digests of what answers depend on: the weights, and the code that chooses the tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from torch import nn

import fftriton_kernels

from ..methods import Method, Pruner

_ROOTS = (Path(__file__).parents[1], Path(fftriton_kernels.__file__).parent)


def digest_of_weights(model: nn.Module) -> str:
    """Digest of the names and shapes of all parameters and the first values of each; all values would take too long."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        part = parameter.detach().flatten()[:256].float().cpu().numpy().tobytes()
        weights.update(f"{name} {tuple(parameter.shape)}".encode() + part)
    return weights.hexdigest()


def digest_of_method(method: Method) -> str:
    """Digest of all code that decides what a method keeps: this library, the method and its parts."""
    return _digest([digest_of_library(), *sorted({digest_of_code(kind) for kind in _kinds(method)})])


@lru_cache
def digest_of_library() -> str:
    """Digest of the source code of fftriton and fftriton_kernels."""
    return _digest(path.read_text(encoding="utf-8") for root in _ROOTS for path in sorted(root.rglob("*.py")))


def digest_of_code(kind: type) -> str:
    """Digest of the modules that define a class and its bases, or of their byte code if there is no source."""
    return _digest(_source(base) for base in kind.__mro__ if base is not object)


def _source(kind: type) -> str:
    module = inspect.getmodule(kind)
    try:
        return inspect.getsource(module if isinstance(module, ModuleType) and hasattr(module, "__file__") else kind)
    except (OSError, TypeError):
        codes = [getattr(member, "__code__", None) for member in vars(kind).values()]
        return "".join(_text(code) for code in codes if code is not None)


def _text(code: CodeType) -> str:
    """Byte code and constants, including inner functions; without addresses, which differ between runs."""
    inner = [_text(part) if isinstance(part, CodeType) else _constant(part) for part in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {' '.join(inner)}"


def _constant(value: Any) -> str:
    """A text that is the same in every process, also for sets, which have no order."""
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _kinds(part: Any) -> set[type]:
    """The classes of a method and of the methods and other parts in its fields."""
    if isinstance(part, (list, tuple)):
        return set().union(*map(_kinds, part))
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return {type(part)} if isinstance(part, (Method, Pruner)) else set()
    return {type(part)}.union(*(_kinds(getattr(part, field.name)) for field in dataclasses.fields(part)))


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
