"""Methods from names and parameters, and back: what texts and dicts have in common."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any

from ..checks import check_budget
from .base import Method
from .before_layers import BeforeLayers
from .chain import Chain
from .own_attention import OwnAttention
from .pruners import Pruner
from .registry import closest, find, name_of, unfold

COMPONENTS: dict[str, type] = {"method": Method, "pruner": Pruner, "relevance": OwnAttention}
"""The classes that a parameter may be an instance of, by the key that names them in a dict."""

_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # that JSON has no numbers for


@dataclass(frozen=True)
class Component:
    """A method or a pruner before it is made.

    Args:
        name: as in `registry`.
        parameters: numbers, texts, booleans, None, lists and tuples of these, and components.
        kind: a key of COMPONENTS; None if the parameter that it is for decides.
    """

    name: str
    parameters: Mapping[str, Any]
    kind: str | None = "method"


def make(components: Sequence[Component], budget: float) -> Method:
    """The method, or the chain of methods, at a budget.

    Args:
        components: one or more methods. The last gets the budget, unless it has a parameter `budget`; of n methods the
            i-th gets that to the power of i / n, so that each keeps the same fraction of what it gets.
        budget: fraction of the video tokens to keep, in (0, 1].

    Raises:
        TypeError, ValueError: an unknown name or parameter, or a parameter out of range.
    """
    check_budget("fftriton", "budget", budget)
    *_, last = components
    total = last.parameters.get("budget", budget)
    check_budget(last.name, "budget", total)
    methods = []
    for number, component in enumerate(components, 1):
        cls, parameters = _resolve(component, Method)
        if cls is Chain:
            raise ValueError(
                f"fftriton: method must have plus signs between the methods of a chain, got '{component.name}'"
            )
        if number < len(components) and not issubclass(cls, BeforeLayers):
            raise ValueError(
                f"fftriton: method '{component.name}' cannot come before '{components[number].name}', because it works "
                "inside the layers"
            )
        if "budget" in parameters_of(cls):
            parameters.setdefault("budget", _share(total, number, len(components)))
        methods.append(_create(cls, component.name, parameters))
    return methods[0] if len(methods) == 1 else Chain(methods)


def _share(total: float, number: int, count: int) -> float:
    if number == count:
        return total
    return math.sqrt(total) if 2 * number == count else total ** (number / count)


def build(component: Component, kind: type) -> Any:
    """The instance of `kind` that a component describes.

    Raises:
        TypeError, ValueError: an unknown name or parameter, or a parameter out of range.
    """
    cls, parameters = _resolve(component, kind)
    return _create(cls, component.name, parameters)


def _resolve(component: Component, kind: type) -> tuple[type, dict[str, Any]]:
    name, parameters = component.name, dict(component.parameters)
    if kind is Method:
        name, parameters = unfold(name, parameters)
    return find(kind, name), parameters


def describe(value: Any, kind: str = "method") -> Component:
    """The component that `build` makes this method or pruner of.

    Raises:
        TypeError: something else than a dataclass, or a parameter that is no number, text, boolean, None, method,
            pruner or list of these.
    """
    if not isinstance(value, COMPONENTS[kind]):
        raise TypeError(f"fftriton: {kind} must be a {COMPONENTS[kind].__name__}, got {type(value).__name__}")
    if not is_dataclass(value):
        raise TypeError(f"fftriton: {kind} must be a dataclass to be written, got {type(value).__name__}")
    owner = type(value).__name__
    parameters = {
        field.name: _plain(owner, field.name, getattr(value, field.name)) for field in fields(value) if field.init
    }
    if {"method", kind} & parameters.keys():
        raise TypeError(f"fftriton: {owner}: a parameter must not be called '{kind}' to be written")
    return Component(name_of(COMPONENTS[kind], type(value)), parameters, kind)


def class_of(component: Component) -> type:
    """The class of a method's component. Raises a ValueError if there is none."""
    return _resolve(component, Method)[0]


def parameters_of(cls: type) -> list[str]:
    """The names of a class's parameters."""
    if is_dataclass(cls):
        return [field.name for field in fields(cls) if field.init]
    return [part.name for part in inspect.signature(cls).parameters.values() if part.kind is not part.VAR_KEYWORD]


def _create(cls: type, name: str, parameters: dict[str, Any]) -> Any:
    known, hints = parameters_of(cls), _hints(cls)
    for parameter in parameters:
        if parameter not in known:
            raise TypeError(
                f"fftriton: parameters of '{name}' must be among {', '.join(known) or 'none'}, got '{parameter}'"
                f"{closest(parameter, known)}"
            )
    values = {key: _fit(value, hints.get(key, Any)) for key, value in parameters.items()}
    try:
        inspect.signature(cls).bind(**values)
    except TypeError as error:
        raise TypeError(f"fftriton: parameters of '{name}': {error}") from None
    return cls(**values)


def _fit(value: Any, hint: Any) -> Any:
    """A value as a parameter with this type hint wants it: components are made, lists become tuples."""
    options = _options(hint)
    origins = [typing.get_origin(option) or option for option in options]
    if isinstance(value, str) and str not in origins:
        if float in origins and value in _SPECIAL:
            return _SPECIAL[value]
        if any(_kinds(origin) for origin in origins):
            value = Component(value, {}, None)
    if isinstance(value, Component):
        return build(value, _kind(value, [kind for origin in origins for kind in _kinds(origin)]))
    if not isinstance(value, list | tuple):
        return value
    lists = [option for option, origin in zip(options, origins, strict=True) if _is_list(origin)]
    items = typing.get_args(lists[0]) if lists else ()
    if len(items) == len(value) and ... not in items:
        parts = [_fit(part, item) for part, item in zip(value, items, strict=True)]
    else:
        parts = [_fit(part, items[0] if items else Any) for part in value]
    return tuple(parts) if isinstance(value, tuple) or (tuple in origins and list not in origins) else parts


def _kind(component: Component, wanted: list[type]) -> type:
    if component.kind is not None:
        return COMPONENTS[component.kind]
    kinds = wanted or list(COMPONENTS.values())
    for kind in kinds:
        with suppress(ValueError):
            find(kind, component.name)
            return kind
    return kinds[0]


def _is_list(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str


def _kinds(origin: Any) -> list[type]:
    return [kind for kind in COMPONENTS.values() if isinstance(origin, type) and issubclass(origin, kind)]


def _options(hint: Any) -> list[Any]:
    """The types of a union, or the one type that a hint is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    return [hint]


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):  # names that only type checkers know
        return {}


def _plain(owner: str, name: str, value: Any) -> Any:
    for kind, cls in COMPONENTS.items():
        if isinstance(value, cls):
            return describe(value, kind)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list | tuple):
        items = [_plain(owner, name, part) for part in value]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(
        f"fftriton: {owner}: {name} must be a number, a text, True, False, None, a method, a pruner or a list of these "
        f"to be written, got {type(value).__name__}"
    )
