"""What a module holds while its model is being reduced: hooks and wrapped methods that refuse to be copied."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

Undo = list[Callable[[], object]]
"""Callables that take an installation back, called from the last to the first."""


class Hook:
    """A callable that cannot be copied or pickled with its module: it belongs to this model's reduction."""

    def __init__(self, call: Callable, original: Callable | None = None) -> None:
        """original: the method that is wrapped, whose name, signature and docstring are shown."""
        if original is not None:
            functools.update_wrapper(self, original)  # generate reads signatures
        self._call = call  # after that: the original may be a Hook, too

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise RuntimeError(
            "reduce: a model cannot be copied or pickled while it is being reduced; leave the block, or remove the "
            "reduction, before"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__deepcopy__({})


def torchs_frame() -> FrameType:
    """For a function that a Hook calls: the frame of torch's in which the module's hooks and its forward run."""
    return sys._getframe(3)  # this function, the other, and the Hook


def wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable], undo: Undo) -> None:
    """Replace a method of one object with wrapper(method); do nothing if there is no such method."""
    method = getattr(owner, name, None)
    if method is None:
        return
    before = owner.__dict__.get(name)
    owner.__dict__[name] = Hook(wrapper(method), method)
    if before is None:
        undo.append(lambda: owner.__dict__.pop(name))
    else:
        undo.append(lambda: owner.__dict__.update({name: before}))
