"""The calls of the model that are on their way, each thread's own: how they begin, are taken back and end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor

from ..methods.base import Method
from .cache import ReducedLayer, Snapshot
from .continuation import Continuation
from .finder import PlacedVideo
from .layers import LayerHooks
from .report import Report


@dataclass
class Call:
    """One call of the model on its way to the decoder's layers and back.

    Args:
        level: which of the modules around the decoder was called, 0 for the outermost.
        frame: a frame that lasts as long as the call.

    Attributes:
        shape: [B, N] of the tokens that it was given, or None if no module has been given any.
        videos: what it holds.
        later: how many of its last tokens are not part of the prompt.
        targets: its labels [B, N], copies that may be written to, and how far ahead of their logits they are.
        wants_states: whether hidden states are asked for, or None if no module has been told.
        as_tuple: whether a module is to return its output without names.
        states: these hidden states, once the decoder has ended.
        has_vision: whether it was given pixels, embeddings, or placeholders (a bool on the device).
        begun: whether the decoder has been reached.
        layers: those of the KV cache.
        snapshot: what they held before.
        expected: how many tokens they are to stand for after it.
        forward: what has been opened for it.
        thread: in which it runs.
        outer: the call during which this one came, made by a hook of the user's.
        refused: whether a call that came during this one has just been refused.
        report: what was done to it, once the decoder has ended.
        handled: the exception during whose handling it was made, if any: only another one ends it.
    """

    level: int
    frame: FrameType
    shape: torch.Size | None = None
    videos: list[PlacedVideo] = field(default_factory=list)
    later: int = 0
    targets: list[tuple[Tensor, int]] = field(default_factory=list)
    wants_states: bool | None = None
    as_tuple: bool = False
    states: list[Tensor] | None = None
    has_vision: bool | Tensor = False
    begun: bool = False
    layers: Sequence[ReducedLayer | None] = ()
    snapshot: Snapshot | None = None
    expected: int = 0
    forward: Continuation | None = None
    thread: int = field(default_factory=threading.get_ident)
    outer: Call | None = None
    refused: bool = False
    report: Report | None = None
    handled: BaseException | None = field(default_factory=lambda: sys.exc_info()[1])

    @property
    def has_failed(self) -> bool:
        """Whether an exception is on its way through it."""
        return sys.exc_info()[1] is not self.handled

    def is_running(self) -> bool:
        """Whether it is still on its way: torch runs no hook of ours after a KeyboardInterrupt."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def take_refusal(self) -> bool:
        """Whether the exception on its way comes from a call during this one that was refused; True only once."""
        was_refused, self.refused = self.refused, False
        return was_refused


class _Thread(threading.local):
    """What a thread is doing."""

    call: Call | None = None
    looking = False  # whether its decoder runs only to see how it is built


class Calls:
    """The calls of each thread.

    Args:
        layers: the hooks of the decoder's layers, which a call that is abandoned closes.
        method: named in errors.
    """

    def __init__(self, layers: LayerHooks, method: Method) -> None:
        self._layers, self._method = layers, method
        self._thread = _Thread()
        self._opened: dict[int, Call] = {}  # of all threads, by id

    @property
    def current(self) -> Call | None:
        """This thread's innermost call."""
        return self._thread.call

    @property
    def looking(self) -> bool:
        """Whether this thread's decoder runs only to see how it is built."""
        return self._thread.looking

    @looking.setter
    def looking(self, looking: bool) -> None:
        self._thread.looking = looking

    def begin(self, call: Call) -> Call:
        """Start a call of this thread.

        Raises:
            RuntimeError: during a call that is being reduced.
        """
        while (before := self._thread.call) is not None and not before.is_running():
            self.abandon()  # a KeyboardInterrupt has ended it
        if before is not None and before.forward is not None:
            before.refused = True
            who = self._method if before.forward.asking else "a hook"
            raise RuntimeError(f"reduce: {who} must not call the model while a call of it is being reduced")
        call.outer, self._thread.call = before, call
        return call

    def open(self, call: Call, forward: Continuation) -> None:
        """A call of this thread needs hooks of the layers."""
        call.forward = forward
        self._opened[id(call)] = call
        self._layers.open(forward)

    def wait_for_others(self) -> None:
        """Return as soon as no other thread is in a call that needed hooks, up to what follows the decoder."""
        while any(call.thread != threading.get_ident() and call.is_running() for call in list(self._opened.values())):
            time.sleep(0.01)

    def _forget(self, call: Call) -> None:
        self._thread.call = call.outer
        self._opened.pop(id(call), None)

    def end(self, call: Call) -> None:
        """A call of this thread went through."""
        self._forget(call)
        if call.snapshot is not None:
            call.snapshot.release()

    def abandon(self) -> None:
        """End a call of this thread that did not reach its end: its KV cache is restored, too."""
        self._layers.close()
        call = self._thread.call
        if call is None:
            return
        self._forget(call)
        if call.snapshot is not None:
            call.snapshot.restore()

    def abandon_all(self) -> None:
        """Abandon every call of this thread."""
        while self._thread.call is not None:
            self.abandon()

    def clear(self) -> None:
        """Forget the calls of all threads."""
        self._thread = _Thread()
