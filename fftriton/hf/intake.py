"""What a call is given on its way to the decoder: noted at the outermost module that knows, completed further in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..layouts.layout import check_layouts
from .calls import Call, Calls
from .compat import UnknownReleaseError
from .compiled import Gates
from .finder import LayoutFinder, tokens_of
from .notices import Notices
from .report import LatestReport

_OTHER_TOKENS = "layout: must be given if a module around the decoder adds tokens to those of the prompt, got {}"


class Intake:
    """Notes what the calls of a model are given.

    Args:
        model: the Hugging Face model.
        decoder: the module in it whose layers are reduced.
        modules: those around the decoder, the outermost first, and the decoder itself.
        finder: finds the videos.
        calls, latest, notices: where it is noted.
        gates: refuse to reduce what has been compiled since they were installed.
        expands: whether ids that a module around the decoder is given may not be what the decoder gets.
    """

    def __init__(
        self, model: Any, decoder: Any, modules: Sequence[nn.Module], finder: LayoutFinder, calls: Calls,
        latest: LatestReport, notices: Notices, gates: Gates, expands: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._decoder, self._modules, self._finder = model, decoder, modules, finder
        self._calls, self._latest, self._notices, self._gates = calls, latest, notices, gates
        self._expands = expands
        self._signatures = [inspect.signature(module.forward) for module in modules]

    def named(self, level: int, args: tuple, kwargs: dict) -> Mapping[str, Any]:
        """The arguments of a module's forward by name, as far as they have one."""
        if not args:
            return kwargs
        try:
            bound = self._signatures[level].bind_partial(*args, **kwargs).arguments
        except TypeError:  # the forward will say so
            return kwargs
        return {**bound.pop("kwargs", {}), **bound}

    def enter(self, level: int, given: Mapping[str, Any], frame: FrameType) -> Call | None:
        """Note what the module at this level is given. frame: one that lasts as long as the module's forward.

        Returns:
            The call, or None if there is nothing more to note.

        Raises:
            ValueError: tokens that a module added where the videos can no longer be found, or an output without names
                for the hidden states that are asked for.
        """
        call = self._calls.current
        if call is None or call.begun or call.level >= level:  # no call of a module around this one is on its way
            call = self._calls.begin(Call(level, frame))
        if call.wants_states is None:
            call.wants_states = given.get("output_hidden_states")
        if given.get("return_dict", getattr(self._model.config, "return_dict", True)) is False:
            call.as_tuple = True
        tokens, moved = tokens_of(given), False
        if self._expands and given.get("inputs_embeds") is None:
            return None
        if tokens is None:
            call.has_vision = call.has_vision or _has_pixels(given)
            return None
        if call.shape is None:
            call.shape, call.level = tokens.shape[:2], level
            call.has_vision = call.has_vision or given.get("inputs_embeds") is not None
        elif call.shape != tokens.shape[:2] and self._finder.has_rule:  # a module has put tokens before the others
            moved, call.shape, call.videos = bool(call.videos), tokens.shape[:2], []
        if tokens.shape[1] == 1:
            return None
        call.later = max(call.later, self._finder.count_later(given))
        if call.has_vision is False:
            call.has_vision = _has_pixels(given) or self._has_placeholders(given)
        if not self._finder.is_listed:
            self._look(call, given)
        if moved and not call.videos:
            raise ValueError(_OTHER_TOKENS.format(list(call.shape)))
        if call.videos or self._finder.is_listed:
            self._check_names(call)
        return call

    def arrive(self, given: Mapping[str, Any], source: Tensor, frame: FrameType) -> Call:
        """The call that has reached the decoder.

        Args:
            given: the decoder's arguments by name.
            source: the tokens among them.
            frame: one that lasts as long as the decoder's forward.

        Raises:
            ValueError: a call that passed by all hooks, or tokens that are not those of the call.
            UnknownReleaseError: pixels, and no tokens under a known name.
        """
        call = self._calls.current
        if call is None or call.begun:  # no module around has been called
            if len(self._modules) > 1 and self._finder.prompt_has_video:  # 4.x runs chunks of a prompt like that
                raise ValueError(
                    "reduce: prefill_chunk_size must not be given before transformers 5: it passes by all hooks"
                )
            has_vision = given.get("inputs_embeds") is not None
            call = self._calls.begin(Call(len(self._modules) - 1, frame, has_vision=has_vision))
        elif call.shape is None and call.has_vision is not False:
            raise UnknownReleaseError(
                "a call with images or videos must pass 'input_ids' or 'inputs_embeds' to a module around the decoder"
            )
        call.begun = True
        if call.shape is None or self._finder.is_listed:
            self._look(call, given)
        elif call.videos and call.shape != source.shape[:2]:
            if self._finder.has_rule:
                raise ValueError(_OTHER_TOKENS.format(list(source.shape[:2])))
            call.later = 0
            check_layouts([video.layout for video in call.videos], *source.shape[:2])
        if call.shape is None:  # only now is it known what the decoder gets
            call.has_vision = call.has_vision or given.get("inputs_embeds") is not None
        if call.videos:
            self._check_names(call)
            labels = self._finder.labels(source)
            call.targets = call.targets or ([] if labels is None else [(labels, 1)])
        elif given.get("inputs_embeds") is not None:
            call.has_vision = call.has_vision and self._finder.shows_vision
        return call

    def may_expand(self, given: Mapping[str, Any]) -> bool:
        """Whether a module around the decoder may make other tokens of a prompt that it is given as ids."""
        ids = given.get("input_ids")
        return self._expands and given.get("inputs_embeds") is None and ids is not None and ids.shape[1] > 1

    def _check_names(self, call: Call) -> None:
        """Raise a ValueError for an output without names for the hidden states that are asked for."""
        if call.as_tuple and self.wants_states(call):
            raise ValueError("reduce: return_dict must not be False if hidden states are asked for")

    def wants_states(self, call: Call) -> bool:
        """Whether hidden states are asked for."""
        return self._decoder.config.output_hidden_states if call.wants_states is None else call.wants_states

    def note_dense(self, has_vision: bool | Tensor) -> None:
        """Note that a prompt runs in which no video is known. has_vision: whether it has pixels or embeddings."""
        if self._finder.depth > 1 or self._finder.prompt_has_video:  # an assistant's, or candidates
            return
        self._latest.set(None)
        self._notices.note_dense(has_vision)

    def _look(self, call: Call, given: Mapping[str, Any]) -> None:
        """Look for videos, unless a module further out has found some."""
        if not call.videos:
            call.videos = self._finder.find(given)
            if call.videos:
                self._gates.check()
            elif _has_pixels(given) and self._notices.may_warn_of_images:
                self._notices.note_images(self._finder.count_images(given))

    def _has_placeholders(self, given: Mapping[str, Any]) -> bool | Tensor:
        """Whether there are tokens that stand for images or videos; a device is not waited for."""
        ids = given.get("input_ids")
        known = (getattr(self._model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        found = [(ids == token).any() for token in known if token is not None and ids is not None]
        return torch.stack(found).any() if found else False


def _has_pixels(given: Mapping[str, Any]) -> bool:
    """Whether a forward is given images or videos, encoded or not."""
    encoded = given.get("mm_encoder_outputs") or {}
    return any(value is not None and name.startswith("pixel_values") for name, value in given.items()) or any(
        value is not None for value in encoded.values()
    )
