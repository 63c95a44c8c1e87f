"""Models compiled with torch.compile: calls that are to be reduced run eagerly, all others in the compiled code.

Compiled code does not notice hooks that are added later, and code that is traced with hooks keeps them after they are
removed. So every compiled module that could contain a hook of ours gets a gate: a call that is to be reduced takes the
plain code, and any other call the compiled code, without hooks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

Acts = Callable[[nn.Module, bool, tuple, dict], bool]
Compiled = Callable[[nn.Module, bool, dict], AbstractContextManager]


class Gates:
    """Choose between the compiled and the plain code of modules, call by call.

    Args:
        modules: `install` finds out which of them are compiled.
        acts: (module, whether its hooks have run, args, kwargs) -> whether the call is to take the plain code.
        compiled: a context around each call of compiled code; it gets the module, whether the module's hooks are part
            of that code, and the keyword arguments, which it may change.
    """

    def __init__(self, modules: Iterable[nn.Module], acts: Acts, compiled: Compiled) -> None:
        self._modules, self._acts, self._around = list(modules), acts, compiled
        self._thread: threading.Thread | None = None  # that is in compiled code

    def install(self, undo: list[Callable[[], object]]) -> None:
        """Put the gates in place; what takes them out again is appended to `undo`."""
        for module in self._modules:
            for name in ("forward", "_compiled_call_impl"):
                compiled: Any = module.__dict__.get(name)
                if not _is_compiled(compiled):
                    continue
                # the hooks of a module run in its __call__, which is what `torch.compile(module)` and .compile() wrap
                hooks_ran = name == "forward" and not hasattr(module, "_orig_mod")
                gate = self._gate(module, compiled, compiled._torchdynamo_orig_callable, hooks_ran)
                undo.append(functools.partial(module.__dict__.__setitem__, name, compiled))
                module.__dict__[name] = gate

    def check(self) -> None:
        """Raise a RuntimeError if a module has been compiled since `install`."""
        for module in self._modules:
            if any(_is_compiled(module.__dict__.get(name)) for name in ("forward", "_compiled_call_impl")):
                raise RuntimeError(
                    f"reduce: {type(module).__name__} has been compiled while it is being reduced; compile it before"
                )

    def _gate(self, module: nn.Module, compiled: Callable, plain: Callable, hooks_ran: bool) -> Callable:
        def gate(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return plain(*args, **kwargs)
            with self._alone():
                if self._acts(module, hooks_ran, args, kwargs):
                    return plain(*args, **kwargs)
                with self._around(module, not hooks_ran, kwargs):
                    return compiled(*args, **kwargs)

        gate.__wrapped__ = plain  # type: ignore[attr-defined]  # generate reads the signature of a forward
        return gate

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second thread: hooks are taken out for compiled code, and the other thread may need them."""
        outer, current = self._thread, threading.current_thread()
        if outer is not None and outer is not current:
            raise RuntimeError(
                f"reduce: a compiled model must not be called by two threads at once while it is being reduced, but "
                f"{outer.name} is in it"
            )
        self._thread = current
        try:
            yield
        finally:
            self._thread = outer


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")
