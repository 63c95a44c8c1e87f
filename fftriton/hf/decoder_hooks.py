"""The hooks of the decoder itself: they open the forward that a call needs, and close it with a report."""

from __future__ import annotations

from typing import Any

from .cache import Permit, Snapshot, check_cache
from .calls import Call, Calls
from .checkpointing import runs_again
from .classify import DecoderInput, Kind, Masks, check_visible, classify, is_new_prompt, padding, take_input, why_not
from .compat import take_deepstack
from .continuation import Continuation
from .finder import LayoutFinder, tokens_of
from .hooks import torchs_frame
from .intake import Intake
from .invariants import check_growth, check_lengths
from .layers import Forward, LayerHooks
from .modules import has_attention
from .notices import Notices
from .prefill import Prefill
from .probe import check_structure_in_place
from .report import LatestReport


class DecoderHooks:
    """What happens before and after the decoder runs.

    Args:
        decoder: whose hooks they are.
        level: its place among the modules around it.
        cache_name: what it calls its KV cache.
        method, verify: as for `fftriton.reduce`.
        intake: knows the call that arrives.
        calls, finder, latest, notices: told when it ends.
        layers, forward: hooks of the layers, and which forward a thread has open.
        permit: for the KV caches.
    """

    def __init__(
        self, decoder: Any, level: int, cache_name: str, method: Any, verify: bool, *, intake: Intake, calls: Calls,
        finder: LayoutFinder, latest: LatestReport, notices: Notices, layers: LayerHooks, forward: Forward,
        permit: Permit,
    ) -> None:  # fmt: skip
        self._decoder, self._level, self._cache_name = decoder, level, cache_name
        self._method, self._verify = method, verify
        self._intake, self._calls, self._finder = intake, calls, finder
        self._latest, self._notices = latest, notices
        self._layers, self._forward, self._permit = layers, forward, permit
        self.masks = Masks(decoder)

    def before(self, decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Find out what the call is, and open a forward if it needs one."""
        if self._calls.looking:
            return args, kwargs
        if args:
            args, kwargs = (), dict(self._intake.named(self._level, args, kwargs))
        source = tokens_of(kwargs)
        if source is None:
            return args, kwargs  # the decoder refuses it
        call = self._intake.arrive(kwargs, source, torchs_frame())
        given = take_input(decoder, source, kwargs, self._cache_name, self._permit)
        if not call.videos and is_new_prompt(given, kwargs):
            self._intake.note_dense(call.has_vision)
        self._take_snapshot(call, given)
        kind = self._classify(call, given)
        if kind is Kind.ONE_MASK:
            kwargs["attention_mask"] = self.masks.of_nothing(source)
        elif kind is not Kind.DENSE:
            self._open(call, given, kind, kwargs)
        return args, kwargs

    def _take_snapshot(self, call: Call, given: DecoderInput) -> None:
        """Note what the KV cache holds, and what it is to hold after the call."""
        reducible = given.reducible
        call.snapshot = Snapshot(given.cache if reducible else None, call.is_running)
        call.layers = given.layers or ()
        call.expected = check_lengths(reducible) + given.source.shape[1]

    def _classify(self, call: Call, given: DecoderInput) -> Kind:
        """What is to become of the call.

        Raises:
            ValueError: it follows a reduced prompt, but cannot.
        """
        reason = why_not(self._decoder, given)
        if reason is None:
            return classify(self._decoder, given, bool(call.videos), self.masks)
        if given.follows_reduced:
            raise ValueError(f"reduce: nothing can follow the reduced prompt in the KV cache, because {reason}")
        if call.videos:
            check_cache(given.cache)
            self._notices.warn_unreduced(reason)
        return Kind.DENSE

    def _open(self, call: Call, given: DecoderInput, kind: Kind, arguments: dict[str, Any]) -> None:
        """Open the forward of a prompt or a continuation: from here on the layers have hooks."""
        length = given.source.shape[1]
        past_valid, valid = padding(given.mask, length)
        check_visible(call.videos, valid)
        for layer in given.reducible:
            if not layer.reduced and length > 1:
                layer.valid = past_valid
        if kind is Kind.PROMPT:
            forward: Continuation = self._prefill(call, given, valid, arguments)
        else:
            forward = Continuation(given.source, valid, given.layers)
        self._calls.open(call, forward)

    def _prefill(self, call: Call, given: DecoderInput, valid: Any, arguments: dict[str, Any]) -> Prefill:
        """The forward of a prompt with a video."""
        if self._method.proportional and runs_again(self._decoder):
            raise ValueError(
                "reduce: proportional must be False under gradient checkpointing, whose second run of a layer does not "
                "know the sizes"
            )
        self._check_structure(given)
        attends, additions = [*map(has_attention, self._decoder.layers)], take_deepstack(arguments)
        prefill = Prefill(
            given.source, valid, given.layers, self._method, call.videos, attends, additions, call.later, call.targets,
            self._verify, self._intake.wants_states(call), runs_again(self._decoder),
        )  # fmt: skip
        if arguments.get("attention_mask") is None:
            prefill.expect_one_sequence(arguments.get("position_ids"))
        return prefill

    def _check_structure(self, given: DecoderInput) -> None:
        """Look at the decoder's structure before the first prompt, if that was not possible earlier."""
        self._calls.looking = True
        try:
            check_structure_in_place(self._decoder, given.source)
        finally:
            self._calls.looking = False

    def after(self, decoder: Any, args: tuple, output: Any) -> Any:
        """Check what has to hold, and close the forward."""
        call = self._calls.current
        if self._calls.looking:
            return output
        if output is None:  # an exception on its way
            if call is None or not call.take_refusal():
                self._calls.abandon()
            return None
        try:
            if call is None or self._forward.open is not call.forward:
                raise RuntimeError(
                    "reduce: the model was called while another call of it was running; hooks must not do that"
                )
            if isinstance(call.forward, Prefill):
                call.forward.check_depth(len(self._decoder.layers))
            check_growth(call.layers, call.expected, self._method)
            self._layers.retire()  # before a GPU is waited for: it has enough to do meanwhile
            if isinstance(call.forward, Prefill):
                self._finish(call, call.forward)
        except BaseException:
            self._calls.abandon()
            raise
        self._layers.close()
        call.forward, call.layers = None, ()
        if call.level == self._level:
            self.leave(call)
        return output

    def _finish(self, call: Call, prefill: Prefill) -> None:
        """Make the report, and see to what else depends on what has been kept."""
        call.report = prefill.finish()
        prefill.hide_targets()
        call.states = prefill.residual.states
        self._notices.note_reduced(call.report)

    def leave(self, call: Call) -> None:
        """A call has gone through, up to the outermost module that knows its tokens."""
        self._calls.end(call)
        if call.report is not None:
            self._latest.set(call.report)
        self._finder.forget()
