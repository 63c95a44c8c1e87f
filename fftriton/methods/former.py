"""Deprecated names of this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .base import Method
from .components import Component, make
from .framefusion import FrameFusion
from .pruners import Pruner
from .registry import FORMER, METHODS, PRUNERS, find

NAMES: dict[str, Callable[..., Method]] = {name: find(Method, name) for name in METHODS} | {
    name: partial(FrameFusion, **parameters) for name, (_, parameters) in FORMER.items()
}
CLASSES_OF_PRUNERS: dict[str, type[Pruner]] = {name: find(Pruner, name) for name in PRUNERS}


def make_method(name: str, budget: float, **parameters: Any) -> Method:
    """`parse` with parameters of its own."""
    return make([Component(name, parameters)], budget)
