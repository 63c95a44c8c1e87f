"""Where the videos stand in what a forward gets: `generate` hands its prompt on in pieces, repeated, or encoded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..layout import VideoLayout, check_layouts
from .families import RULES, LayoutRule

_ENCODERS = ("get_image_features", "get_video_features")


class Video(NamedTuple):
    """A video of a forward, and how many come before it in the whole batch, copies of beams left out."""

    layout: VideoLayout
    number: int


class LayoutFinder:
    """Finds the videos of each forward.

    A forward of its own is asked about by the rule. `generate` is asked about once, with the whole prompt, and each of
    its forwards holds the part that it gets; beams and returned sequences repeat the rows of the batch. Layouts that
    the caller lists are positions in the sequence, too.

    Args:
        model: a Hugging Face model.
        layout: as for `fftriton.reduce`.

    Raises:
        TypeError: a layout of another kind; None for a model that no rule is known for.
    """

    def __init__(self, model: Any, layout: Sequence[VideoLayout] | LayoutRule | None) -> None:
        self.model = model
        self._listed: list[VideoLayout] | None = None
        if callable(layout):
            self._rule = layout
        elif layout is None:
            self._rule = _known_rule(model)
        elif isinstance(layout, VideoLayout) or not all(isinstance(item, VideoLayout) for item in layout):
            raise TypeError(f"reduce: layout must be a list of VideoLayout, a callable or None, got {layout!r}")
        else:
            listed = self._listed = list(layout)
            self._rule = lambda model, arguments: listed
        self._of_prompt: list[Video] | None = None  # of the prompt that generate is at work on
        self._prompt_length = 0  # of it, the turns before included
        self._encoded: dict[str, Any] = {}  # arguments of the vision encoders' last calls

    def install(self, undo: list[Callable[[], object]]) -> None:
        """Listen to the vision encoders and to `generate`; what takes that back is appended to `undo`."""
        inner = getattr(self.model, "base_model", self.model)
        for name in _ENCODERS:
            _wrap(inner, name, self._record_encoder, undo)
        _wrap(self.model, "generate", self._within_generate, undo)
        _wrap(self.model, "_expand_inputs_for_generation", self._before_expansion, undo)

    @property
    def prompt_has_video(self) -> bool:
        """Whether generate is at work on a prompt with a video."""
        return bool(self._of_prompt)

    def find(self, arguments: Mapping[str, Any]) -> list[Video]:
        """The videos among the tokens of a forward with these arguments, counted from its first token.

        Raises:
            ValueError: a layout that does not fit the batch, or a video that lies in the forward in part.
        """
        tokens = tokens_of(arguments)
        if tokens is None or tokens.shape[1] == 1:  # decoding: no time to lose
            return []
        known = self._of_prompt
        if known is None and self._listed is not None:
            known = _numbered(self._listed)
        if known is None:
            found = _numbered(self._rule(self.model, self._with_encoded(arguments)))
        else:
            found = _lying_in(known, _past(arguments), tokens.shape[1])
        check_layouts([video.layout for video in found], *tokens.shape[:2])
        return found

    def count_later(self, arguments: Mapping[str, Any]) -> int:
        """How many of a forward's last tokens follow the prompt: candidates of assisted decoding, tokens that were
        generated without a cache, an answer whose logits are asked for."""
        tokens, keep = tokens_of(arguments), arguments.get("logits_to_keep")
        if self._of_prompt is not None and tokens is not None:
            return max(0, _past(arguments) + tokens.shape[1] - self._prompt_length)
        return max(keep - 1, 0) if isinstance(keep, int) else 0

    def _with_encoded(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments with what the encoders were called with, where they ran before the forward."""
        if not any(output is not None for output in (arguments.get("mm_encoder_outputs") or {}).values()):
            return arguments
        return {**self._encoded, **{name: value for name, value in arguments.items() if value is not None}}

    def _record_encoder(self, encode: Callable) -> Callable:
        signature = inspect.signature(encode)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self._encoded.update(signature.bind_partial(*args, **kwargs).arguments)
            return encode(*args, **kwargs)

        return recorded

    def _within_generate(self, generate: Callable) -> Callable:
        def scoped(*args: Any, **kwargs: Any) -> Any:
            outer, self._of_prompt = (
                (self._of_prompt, self._prompt_length),
                None,
            )  # an assistant may be the model itself
            try:
                return generate(*args, **kwargs)
            finally:
                self._of_prompt, self._prompt_length = outer

        return scoped

    def _before_expansion(self, expand: Callable) -> Callable:
        """`generate` repeats the rows of its prompt here: it has all arguments together, and still as they were."""

        def announced(expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
            self._of_prompt = [
                Video(VideoLayout(layout.positions, layout.sample * expand_size + copy), number)
                for layout, number in _numbered(self._find_in_prompt(kwargs))
                for copy in range(expand_size)
            ]
            return expand(expand_size, *args, **kwargs)

        return announced

    def _find_in_prompt(self, arguments: Mapping[str, Any]) -> list[VideoLayout]:
        """The videos of generate's prompt, in positions of the sequence."""
        tokens, past = tokens_of(arguments), _past(arguments)
        if tokens is None or tokens.shape[1] == 0:
            return []
        is_whole = past == 0 or _sequence_length(arguments) == tokens.shape[1]  # the earlier turns are in it again
        self._prompt_length = tokens.shape[1] if is_whole else past + tokens.shape[1]
        if self._listed is not None:
            return self._listed
        if past > 0 and is_whole:
            whole = {name: arguments.get(name) for name in ("input_ids", "inputs_embeds")}
            new = {name: part[:, past:] for name, part in whole.items() if part is not None}
            arguments = {**arguments, **new}
        found = self._rule(self.model, self._with_encoded(arguments))
        return [_moved(layout, past) for layout in found]


def tokens_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """[B, N, D] or [B, N]: what a forward gets its tokens from."""
    embeddings = arguments.get("inputs_embeds")
    return arguments.get("input_ids") if embeddings is None else embeddings


def _sequence_length(arguments: Mapping[str, Any]) -> int | None:
    """Length of the whole sequence, which generate's mask and positions have, and its tokens may have."""
    for name in ("attention_mask", "position_ids"):  # a mask of ones may have been dropped
        if arguments.get(name) is not None:
            return arguments[name].shape[-1]
    tokens = tokens_of(arguments)
    return None if tokens is None else tokens.shape[1]


def _past(arguments: Mapping[str, Any]) -> int:
    """How many tokens of the sequence the cache stands for."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _numbered(layouts: Sequence[VideoLayout]) -> list[Video]:
    """The videos in the order of their samples."""
    return [Video(layout, number) for number, layout in enumerate(sorted(layouts, key=lambda layout: layout.sample))]


def _lying_in(videos: Sequence[Video], first: int, length: int) -> list[Video]:
    """The videos in [first, first + length) of the sequence, counted from there."""
    found = []
    for layout, number in videos:
        low, high = layout.span
        if high < first or low >= first + length:
            continue
        if low < first or high >= first + length:
            raise ValueError(
                f"layout: a video must lie within one forward, but this one gets positions {first} to "
                f"{first + length - 1} of the sequence, and the video has {low} to {high}; use a prefill_chunk_size, "
                "or chunks of your own, that cut no video"
            )
        found.append(Video(_moved(layout, -first), number))
    return found


def _moved(layout: VideoLayout, by: int) -> VideoLayout:
    if by == 0:
        return layout
    positions = layout.positions
    return VideoLayout(positions.where(positions < 0, positions + by), layout.sample)


def _known_rule(model: Any) -> LayoutRule:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in RULES:
        raise TypeError(
            f"reduce: layout must be given for {type(model).__name__}; it is found without for model types "
            f"{', '.join(sorted(RULES))}, got {model_type!r}"
        )
    return RULES[model_type]


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable], undo: list[Callable[[], object]]) -> None:
    """Put wrapper(method) in the place of a method of one object; nothing where there is none."""
    method = getattr(owner, name, None)
    if method is None:
        return
    before = owner.__dict__.get(name)
    owner.__dict__[name] = functools.wraps(method)(wrapper(method))  # generate reads signatures
    if before is None:
        undo.append(lambda: owner.__dict__.pop(name))
    else:
        undo.append(lambda: owner.__dict__.update({name: before}))
