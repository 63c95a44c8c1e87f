"""Runs a method inside a Hugging Face decoder, by hooks alone: no forward is replaced, and removal is exact.

A call goes through three places:

1. the modules around the decoder, the outermost first (entry.py): intake.py notes what the call was given, and
   finder.py where its videos are.
2. the decoder (decoder_hooks.py): classify.py decides whether there is something to reduce or to mask. If so, a forward
   is opened: its KV cache gets layers that may hold fewer tokens than they report (cache.py), and the decoder's layers
   get hooks (layers.py). prefill.py tells what they do to the hidden states.
3. the decoder again, when its layers are done: the invariants are checked (invariants.py), the report is made and the
   forward is closed.

What one call needs is kept in an object of that call (calls.py), and each thread has its own. Compiled code does not
notice any of this: see compiled.py.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from ..layouts.families import LayoutRule
from ..layouts.layout import VideoLayout
from ..methods.base import Method
from .cache import Permit
from .calls import Calls
from .compat import check_decoder, has_axes
from .compiled import Gates
from .decoder_hooks import DecoderHooks
from .entry import EntryHooks
from .finder import LayoutFinder
from .follower import Follower
from .hooks import Undo
from .intake import Intake
from .layers import Forward, LayerHooks
from .modules import above_hooks, check_wrapper, find_decoder, owner_of
from .notices import Notices
from .probe import check_structure
from .remote_code import find_follower
from .report import LatestReport, Report
from .sizes import check_sizes

_reduced: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # decoders that have a reduction installed
_reduced_lock = threading.Lock()


class Reduction(AbstractContextManager["Reduction"]):
    """A method at work on a model: between `install` and `remove`, or inside a `with` block."""

    def __init__(
        self, model: Any, method: Method, layout: Sequence[VideoLayout] | LayoutRule | None, verify: bool = False,
        images: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(method, Method):
            raise TypeError(f"reduce: method must be a fftriton.Method, such as FrameFusion(), got {method!r}")
        if not isinstance(verify, bool):
            raise TypeError(f"reduce: verify must be True or False, got {verify!r}")
        if not isinstance(images, bool):
            raise TypeError(f"reduce: images must be True or False, got {images!r}")
        root = getattr(model, "_orig_mod", model)  # of what torch.compile(model) returns
        check_wrapper(root)
        follower = layout if isinstance(layout, Follower) else find_follower(root)
        given = root
        if follower is not None and not follower.expands:
            root = getattr(follower.language_model, "_orig_mod", follower.language_model)
        self.decoder = find_decoder(root, given)
        self.model, self.method, self.verify = owner_of(self.decoder, root), method, verify
        method.check(len(self.decoder.layers))
        if method.renumbers and has_axes(self.decoder.config):
            raise ValueError(
                f"reduce: renumber must be False for {type(model).__name__}, whose positions have three axes (M-RoPE)"
            )
        if method.proportional:
            check_sizes(self.decoder)
        cache_name = check_decoder(self.decoder)
        check_structure(self.decoder)
        self._latest, self._notices = LatestReport(), Notices(method)
        self._finder = LayoutFinder(
            self.model, follower if layout is None else layout, partial(self._latest.set, None), images
        )
        self._modules = [module for module in root.modules() if self.decoder in module.modules()]  # outermost first
        self._permit, self._forward = Permit(), Forward()
        self._layers = LayerHooks(self.decoder, self._forward)
        self._calls = Calls(self._layers, method)
        self._gates = Gates(
            above_hooks(model, self.decoder),
            lambda *call: self._entry.acts(*call),
            lambda *call: self._entry.without_hooks(*call),
        )
        intake = Intake(
            self.model, self.decoder, self._modules, self._finder, self._calls, self._latest, self._notices,
            self._gates, follower is not None and follower.expands,
        )  # fmt: skip
        decoder_hooks = DecoderHooks(
            self.decoder, len(self._modules) - 1, cache_name, method, verify, intake=intake, calls=self._calls,
            finder=self._finder, latest=self._latest, notices=self._notices, layers=self._layers,
            forward=self._forward, permit=self._permit,
        )  # fmt: skip
        self._entry = EntryHooks(
            self.decoder, self._modules, intake, decoder_hooks, self._calls, self._forward, self._permit
        )
        self._undo: Undo = []

    @property
    def report(self) -> Report | None:
        """What was done to this thread's last prompt or, if it has had none, to the last one of any thread.

        None if that prompt held no video, was not reduced, or failed, and if there has been none in this block.
        """
        return self._latest.get()

    def __enter__(self) -> Reduction:
        return self.install()

    def __exit__(self, error: object, *details: object) -> None:
        self._take_out()
        if error is None:
            self._notices.warn_if_idle()

    def install(self) -> Reduction:
        """Hook into the model. Raises a RuntimeError if a reduction is at work on it already."""
        with _reduced_lock:
            if self.decoder in _reduced:
                raise RuntimeError("reduce: the model is being reduced already; leave or remove that reduction first")
            _reduced.add(self.decoder)
        self._latest.clear()
        self._notices.start()
        try:
            self._install()
        except BaseException:
            self._take_out()
            raise
        return self

    def _install(self) -> None:
        self._undo.append(lambda: _reduced.discard(self.decoder))
        self._layers.install(self._undo)
        self._finder.install(self._modules, self._undo)
        self._permit.active = True
        self._gates.install(self._undo)
        self._entry.install(self._undo)

    def remove(self) -> None:
        """Take everything out again: the model is as it was before. Harmless if nothing is installed.

        Waits for forwards of other threads to end. Warns if nothing was reduced although something could have been.
        """
        self._take_out()
        self._notices.warn_if_idle()

    def _take_out(self) -> None:
        self._calls.abandon_all()
        self._calls.wait_for_others()
        while self._undo:
            self._undo.pop()()
        self._permit.active = False
        self._finder.clear()
        self._calls.clear()
        self._forward.open = None
