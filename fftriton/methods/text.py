"""Methods as texts, as every command takes them, and as dicts, for YAML and JSON.

    framefusion
    framefusion:similarity_threshold=0.9:importance_queries=1
    uniformframes:budget=0.5 + fastv:layer=1
    kvtp:pruner=prumerge(neighbours=16):temperature=inf
    framefusion:stages=(prune,merge)
    my_module:MyMethod:alpha=0.5

A text is one or more methods, one after the other, with a plus between them. Each is a name (see `registry`) and
parameters, with colons between them. A value is a number, True, False, None, a text in quotes, a word without quotes, a
tuple in parentheses, a list in brackets, or a method or pruner with its own parameters in parentheses. The items of
tuples and lists are separated by commas, or by semicolons if commas already mean something else, as in lmms-eval's
`--model_args`. Inside of parentheses, brackets and quotes nothing else separates.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from .base import Method
from .chain import Chain
from .components import COMPONENTS, Component, build, describe, make
from .registry import is_known

_NAME = r"[A-Za-z_][\w.-]*(?::[A-Za-z_][\w.]*)?"
_WORD = re.compile(r"[A-Za-z_./~][\w./~@%-]*")  # texts that are written without quotes
_CLOSING = {"(": ")", "[": "]"}
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "none": None}


def parse(text: str, budget: float = 0.3) -> Method:
    """The method that a text describes.

    Args:
        text: see above.
        budget: fraction of the video tokens to keep, in (0, 1]: that of the last method, unless its parameter `budget`
            says otherwise. Of n methods the i-th gets this to the power of i / n, unless its parameter says otherwise.

    Raises:
        TypeError, ValueError: the parameter, the rule and the value.
    """
    return make(read(text), budget)


def split_methods(text: str) -> list[str]:
    """The texts of a list that is separated by commas: "keep-all,framefusion:stages=(prune,merge)" holds two."""
    return [part for part in map(str.strip, _split(text, ",")) if part]


def to_text(method: Method) -> str:
    """The text of a method with all its parameters: `parse` makes an equal method of it.

    Raises:
        TypeError: a method that cannot be written, because a parameter is a tensor or a function, say.
    """
    parts = method.methods if isinstance(method, Chain) else [method]
    components = map(describe, parts)
    return " + ".join(":".join([part.name, *_assignments(part)]) for part in components)


def to_dict(method: Method) -> dict[str, Any]:
    """The method as a dict of JSON types: {"method": "framefusion", "budget": 0.3, ...}.

    A chain is {"method": "chain", "methods": [...]}, and a pruner {"pruner": "prumerge", "neighbours": 16, ...}.

    Raises:
        TypeError: a method that cannot be written, because a parameter is a tensor or a function, say.
    """
    written = _as_json(describe(method))
    assert isinstance(written, dict)
    return written


def from_dict(description: Mapping[str, Any]) -> Method:
    """The method that `to_dict` wrote, or any dict of this form. A parameter that is missing has its default.

    Raises:
        TypeError, ValueError: the parameter, the rule and the value.
    """
    component = _from_json(description)
    if not isinstance(component, Component) or component.kind != "method":
        raise TypeError(f"fftriton: method must be a dict with the key 'method', got {description!r}")
    return build(component, Method)


def read(text: str) -> list[Component]:
    """The components of a text.

    Raises:
        TypeError, ValueError: something else than a text, or one that is not of the form above.
    """
    if not isinstance(text, str):
        raise TypeError(f"fftriton: method must be a text, got {text!r}")
    return [_read_method(part.strip()) for part in _split(text, "+")]


def _read_method(text: str) -> Component:
    segments: list[str] = []
    for segment in _split(text, ":"):
        if segments and len(_split(segment, "=")) == 1:  # the class of MODULE:CLASS
            segments[-1] += f":{segment}"
        else:
            segments.append(segment)
    name, *pairs = map(str.strip, segments)
    if not re.fullmatch(_NAME, name) or (":" in name and is_known(name.partition(":")[0])):
        raise ValueError(
            f"fftriton: method must be NAME or NAME:PARAMETER=VALUE, where NAME may be MODULE:CLASS, got '{text}'"
        )
    return Component(name, _read_parameters(pairs, text))


def _read_parameters(pairs: list[str], text: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = map(str.strip, pair.partition("="))
        if not equals or not key.isidentifier():
            raise ValueError(f"fftriton: a parameter must be PARAMETER=VALUE, got '{pair}' in '{text}'")
        if key in parameters:
            raise ValueError(f"fftriton: a parameter must be given once, got '{key}' twice in '{text}'")
        parameters[key] = _read_value(value, text)
    return parameters


def _read_value(text: str, whole: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[:1] in ("'", '"'):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = None
        if isinstance(value, str):
            return value
    elif text[:1] in _CLOSING and text[-1] == _CLOSING[text[0]]:
        items = [_read_value(part, whole) for part in _items(text[1:-1], whole)]
        return tuple(items) if text[0] == "(" else items
    elif match := re.fullmatch(rf"({_NAME})\s*\((.*)\)", text, re.DOTALL):
        return Component(match[1], _read_parameters(_items(match[2], whole), whole), None)
    elif text and not set(text) & set("'\"()[]=,;"):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
        return text
    raise ValueError(
        f"fftriton: a value must be a number, a word, a text in quotes or (...), got '{text}' in '{whole}'"
    )


def _items(text: str, whole: str) -> list[str]:
    items = [part.strip() for part in _split(text, ",;")]
    if not items[-1]:  # a comma may follow the last
        items.pop()
    if not all(items):
        raise ValueError(f"fftriton: an item must not be empty, got '{text}' in '{whole}'")
    return items


def _split(text: str, separators: str) -> list[str]:
    """The parts between separators that stand in no parentheses, brackets or quotes."""
    parts, start, open_until, quote, escaped = [], 0, "", "", False
    for place, character in enumerate(text):
        if quote:
            if character == quote and not escaped:
                quote = ""
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            open_until = _CLOSING[character] + open_until
        elif character in _CLOSING.values():
            if open_until[:1] != character:
                raise ValueError(f"fftriton: parentheses must be closed in order, got '{text}'")
            open_until = open_until[1:]
        elif character in separators and not open_until:
            parts.append(text[start:place])
            start = place + 1
    if quote or open_until:
        raise ValueError(f"fftriton: quotes and parentheses must be closed, got '{text}'")
    return [*parts, text[start:]]


def _assignments(component: Component) -> list[str]:
    return [f"{key}={_write(value)}" for key, value in component.parameters.items()]


def _write(value: Any) -> str:
    if isinstance(value, Component):
        return f"{value.name}({','.join(_assignments(value))})"
    if isinstance(value, tuple):
        return f"({','.join(map(_write, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{','.join(map(_write, value))}]"
    if isinstance(value, float):
        return repr(value).replace("e+", "e")  # a plus would be the next method
    if isinstance(value, str) and _WORD.fullmatch(value) and _read_value(value, value) is value:
        return value
    return repr(value)


def _as_json(value: Any) -> Any:
    if isinstance(value, Component):
        return {str(value.kind): value.name} | {key: _as_json(part) for key, part in value.parameters.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        for kind in COMPONENTS:
            if kind in value:
                name = value[kind]
                if not isinstance(name, str):
                    raise TypeError(f"fftriton: {kind} must be a name, got {name!r}")
                return Component(name, {key: _from_json(part) for key, part in value.items() if key != kind}, kind)
    if isinstance(value, list | tuple):
        return [_from_json(part) for part in value]
    return value
