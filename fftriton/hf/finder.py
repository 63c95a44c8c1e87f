"""Finds the videos in what a forward gets: `generate` passes its prompt on in pieces, repeated, or encoded."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from ..layouts.families import RULES, LayoutRule, NoPlaceholderError, encoder_of
from ..layouts.images import count_alike, with_images
from ..layouts.layout import VideoLayout, check_layouts, check_length
from .compat import UnknownReleaseError, check_model, past_of
from .follower import Follower
from .hooks import Hook, Undo, wrap
from .remote_code import FOLLOWERS, why_unknown

_ENCODERS = ("get_image_features", "get_video_features")
_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class PlacedVideo(NamedTuple):
    """A video's place in a forward, how many come before it in the batch, and how many there are, without copies for
    beams."""

    layout: VideoLayout
    number: int
    total: int


class _Prompt(threading.local):
    """What this thread's `generate` is working on, and what its encoders were called with."""

    depth = 0  # of nested calls of generate: an assistant may be the model itself
    videos: list[PlacedVideo] | None = None
    length = 0  # of the prompt, including the turns before it
    by_ids = True  # whether it was given as ids
    ids: Tensor | None = None  # [B, n], those of its last tokens in each row, copies for beams included
    encoded: Mapping[str, Any] = {}


class LayoutFinder:
    """Finds the videos of each forward.

    For a forward that the user calls, the rule is asked about that forward. For `generate` it is asked once, about
    the whole prompt, and each of its forwards holds the videos in the part that it gets; beams and returned sequences
    repeat the rows of the batch. Layouts that the caller lists are positions in the whole sequence, too.

    Args:
        model: a Hugging Face model.
        layout: as for `fftriton.reduce`.
        on_prompt: called whenever a prompt with a video begins, or fails to.
        images: whether each image is a video of one frame, too.

    Raises:
        TypeError: a layout of another kind; None for a model for which no rule is known.
        ValueError: images, for a model for which no rule finds them.
    """

    def __init__(
        self, model: Any, layout: Sequence[VideoLayout] | LayoutRule | None, on_prompt: Callable[[], object],
        images: bool = False,
    ) -> None:  # fmt: skip
        self.model = model
        self._on_prompt = on_prompt
        self._listed: list[VideoLayout] | None = None
        self._follower = layout if isinstance(layout, Follower) else None
        if callable(layout):
            self._rule = layout
        elif layout is None:
            self._rule = _known_rule(model)
        elif isinstance(layout, VideoLayout) or not all(isinstance(item, VideoLayout) for item in layout):
            raise TypeError(f"reduce: layout must be a list of VideoLayout, a callable or None, got {layout!r}")
        else:
            listed = self._listed = list(layout)
            self._rule = lambda model, arguments: listed
        self._has_rule = self._rule in RULES.values()
        if images:
            _check_images(model, layout)
            self._rule = with_images(self._rule)
        self._prompt = _Prompt()

    def install(self, modules: Iterable[nn.Module], undo: Undo) -> None:
        """Listen to the vision encoders and to `generate` of these modules; what takes that back goes to `undo`."""
        for name in _ENCODERS:
            wrap(_owner_of(self.model, name), name, self._record_encoder, undo)
        if self._follower is not None:
            self._follower.install(undo)
        for module in modules:
            module.__dict__["__getstate__"] = Hook(_refuse_copies)
            undo.append(partial(module.__dict__.pop, "__getstate__"))
            if isinstance(module, GenerationMixin):
                if not hasattr(module, "_expand_inputs_for_generation"):
                    raise UnknownReleaseError("GenerationMixin must have a method '_expand_inputs_for_generation'")
                wrap(module, "generate", self._within_generate, undo)
                wrap(module, "_expand_inputs_for_generation", self._before_expansion, undo)
                for name in _CONTINUOUS:
                    wrap(module, name, _refuse_continuous_batching, undo)

    def forget(self) -> None:
        """Keep nothing of what this thread has encoded, unless its generate still needs it."""
        if self._prompt.depth == 0:
            self._prompt.encoded = {}

    def clear(self) -> None:
        """Keep nothing of any thread."""
        self._prompt = _Prompt()

    @property
    def depth(self) -> int:
        """How many nested calls of generate this thread is in: an assistant may be the model itself."""
        return self._prompt.depth

    @property
    def prompt_has_video(self) -> bool:
        """Whether this thread's generate is working on a prompt with a video."""
        return bool(self._prompt.videos)

    @property
    def has_rule(self) -> bool:
        """Whether the model's family says where its videos are."""
        return self._has_rule

    @property
    def is_listed(self) -> bool:
        """Whether the caller listed the layouts, as positions in the sequence."""
        return self._listed is not None

    @property
    def shows_vision(self) -> bool:
        """Whether embeddings that reach the decoder may hold images or videos."""
        return self._follower is None or self._follower.has_vision

    def count_images(self, arguments: Mapping[str, Any]) -> int:
        """How many images of one size a forward without a layout has in a sample, if they could be reduced.

        It waits for a GPU.
        """
        could = self.has_rule and hasattr(self.model.config, "image_token_id")
        return count_alike(self.model, arguments) if could else 0

    def labels(self, embeddings: Tensor) -> Tensor | None:
        """[B, N] labels of a prompt that a module further out computes a loss with, if it is known."""
        return None if self._follower is None else self._follower.labels(embeddings)

    def find(self, arguments: Mapping[str, Any]) -> list[PlacedVideo]:
        """The videos among the tokens of a forward with these arguments, counted from its first token.

        Raises:
            ValueError: a layout that does not fit the batch, or a video of which only a part is in the forward.
        """
        tokens = tokens_of(arguments)
        if tokens is None or tokens.shape[1] == 1:  # decoding: no time to lose
            return []
        with self._noting_failure():
            found = self._find(arguments, tokens)
        if found:
            self._on_prompt()
        return found

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """A prompt whose videos cannot be found has begun, too."""
        try:
            yield
        except BaseException:
            self._on_prompt()
            raise

    def _find(self, arguments: Mapping[str, Any], tokens: Tensor) -> list[PlacedVideo]:
        known = self._prompt.videos
        if known and not self._is_of_prompt(arguments):
            known = [] if self._listed is not None else None
        if known is None and self._listed is not None:
            known = _numbered(self._listed)
            if past_of(arguments) == 0:
                _check_lengths(self._listed, tokens.shape[1])
        if known is None:
            found = _numbered(self._ask_rule(arguments))
        else:
            if self._prompt.videos and self._prompt.by_ids and arguments.get("input_ids") is None and self.has_rule:
                raise ValueError(
                    "layout: must be given if generate is called with input_ids but passes on embeddings, some of "
                    "which may not belong to the prompt"
                )
            found = _lying_in(known, past_of(arguments), tokens.shape[1])
        check_layouts([video.layout for video in found], *tokens.shape[:2])
        return found

    def _is_of_prompt(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a forward within generate has tokens of its prompt, or what follows it: not those of another prompt,
        which a logits processor sends through the model (classifier-free guidance)."""
        given, ids = arguments.get("input_ids"), self._prompt.ids
        if given is None or ids is None:
            return True
        first, past = self._prompt.length - ids.shape[1], past_of(arguments)
        low, high = max(past, first), min(past + given.shape[1], self._prompt.length)
        if low >= high:
            return True
        return len(given) == len(ids) and torch.equal(
            given[:, low - past : high - past], ids[:, low - first : high - first]
        )

    def count_later(self, arguments: Mapping[str, Any]) -> int:
        """How many of a forward's last tokens follow the prompt: candidates of assisted decoding, tokens that were
        generated without a cache, an answer whose logits are asked for."""
        tokens, keep = tokens_of(arguments), arguments.get("logits_to_keep")
        if self._prompt.videos is not None and tokens is not None:
            return max(0, past_of(arguments) + tokens.shape[1] - self._prompt.length)
        return max(keep - 1, 0) if isinstance(keep, int) else 0

    def _with_encoded(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments, with those of the encoders added if they ran before the forward."""
        if not any(output is not None for output in (arguments.get("mm_encoder_outputs") or {}).values()):
            return arguments
        return {**self._prompt.encoded, **{name: value for name, value in arguments.items() if value is not None}}

    def _record_encoder(self, encode: Callable) -> Callable:
        signature = inspect.signature(encode)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self._prompt.encoded = {**self._prompt.encoded, **signature.bind_partial(*args, **kwargs).arguments}
            return encode(*args, **kwargs)

        return recorded

    def _within_generate(self, generate: Callable) -> Callable:
        def scoped(*args: Any, **kwargs: Any) -> Any:
            prompt = self._prompt
            outer = prompt.depth, prompt.videos, prompt.length, prompt.by_ids, prompt.ids
            prompt.depth, prompt.videos, prompt.ids = prompt.depth + 1, None, None
            try:
                return generate(*args, **kwargs)
            finally:
                prompt.depth, prompt.videos, prompt.length, prompt.by_ids, prompt.ids = outer
                self.forget()

        return scoped

    def _before_expansion(self, expand: Callable) -> Callable:
        """`generate` repeats the rows of its prompt here. It has all arguments together, and has not changed them."""

        def announced(expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
            if self._prompt.depth == 0:
                raise RuntimeError(
                    "reduce: generate must be looked up while the model is being reduced, but this one was looked up "
                    "before, or on the class: call model.generate(...) inside the block"
                )
            with self._noting_failure():
                found = self._find_in_prompt(kwargs)
            if found and self._listed is None:  # those that are listed may belong to an earlier turn
                self._on_prompt()
            self._prompt.videos = [
                video._replace(
                    layout=replace(video.layout, sample=video.layout.sample * expand_size + copy, length=None)
                )
                for video in _numbered(found)
                for copy in range(expand_size)
            ]
            ids = kwargs.get("input_ids") if self._prompt.by_ids else None
            self._prompt.ids = None if ids is None else ids.repeat_interleave(expand_size, 0)
            return expand(expand_size, *args, **kwargs)

        return announced

    def _ask_rule(self, arguments: Mapping[str, Any]) -> list[VideoLayout]:
        """The layouts of the videos in a forward."""
        try:
            return self._rule(self.model, self._with_encoded(arguments))
        except NoPlaceholderError:
            if past_of(arguments) == 0:
                raise
            return []  # the video is in an earlier part of the prompt

    def _find_in_prompt(self, arguments: Mapping[str, Any]) -> list[VideoLayout]:
        """The videos of generate's prompt, in positions of the sequence."""
        tokens, past = tokens_of(arguments), past_of(arguments)
        if tokens is None or tokens.shape[1] == 0:
            return []
        self._prompt.by_ids = tokens.ndim == 2
        is_whole = past == 0 or _sequence_length(arguments) == tokens.shape[1]  # the earlier turns are in it again
        self._prompt.length = tokens.shape[1] if is_whole else past + tokens.shape[1]
        if self._listed is not None:
            if past == 0:
                _check_lengths(self._listed, self._prompt.length)
            return self._listed
        if self._follower is not None and is_whole:  # it knows the whole prompt, as the object that it is
            past = 0
        if past > 0 and is_whole:
            whole = {name: arguments.get(name) for name in ("input_ids", "inputs_embeds")}
            new = {name: part[:, past:] for name, part in whole.items() if part is not None}
            arguments = {**arguments, **new}
        found = self._ask_rule(arguments)
        asked = tokens_of(arguments)
        assert asked is not None
        check_layouts(found, *asked.shape[:2])
        return [_moved(layout, past) for layout in found]


def tokens_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """[B, N, D] or [B, N]: what a forward gets its tokens from, or None if it is something else."""
    embeddings = arguments.get("inputs_embeds")
    tokens = arguments.get("input_ids") if embeddings is None else embeddings
    return tokens if isinstance(tokens, Tensor) and tokens.ndim == (2 if embeddings is None else 3) else None


def _refuse_copies() -> NoReturn:
    Hook(_refuse_copies).__deepcopy__({})


def _refuse_continuous_batching(method: Callable) -> Callable:
    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"reduce: {method.__name__} must not be called while the model is being reduced: its paged KV cache cannot "
            "hold fewer tokens in later layers; use generate"
        )

    return refused


def _sequence_length(arguments: Mapping[str, Any]) -> int | None:
    """Length of the whole sequence: that of generate's mask and positions, and maybe of its tokens."""
    for name in ("attention_mask", "position_ids"):  # a mask of ones may have been dropped
        if arguments.get(name) is not None:
            return arguments[name].shape[-1]
    tokens = tokens_of(arguments)
    return None if tokens is None else tokens.shape[1]


def _numbered(layouts: Sequence[VideoLayout]) -> list[PlacedVideo]:
    """The videos, numbered in the order of their samples."""
    return [
        PlacedVideo(layout, number, len(layouts))
        for number, layout in enumerate(sorted(layouts, key=lambda layout: layout.sample))
    ]


def _check_lengths(layouts: Sequence[VideoLayout], length: int) -> None:
    for layout in layouts:
        check_length(layout, length)


def _lying_in(videos: Sequence[PlacedVideo], first: int, length: int) -> list[PlacedVideo]:
    """The videos in [first, first + length) of the sequence, counted from there."""
    found = []
    for video in videos:
        layout = video.layout
        low, high = layout.span
        if high < first or low >= first + length:
            continue
        if low < first or high >= first + length:
            raise ValueError(
                f"layout: a video must lie within one forward, but this one gets positions {first} to "
                f"{first + length - 1} of the sequence, and the video has {low} to {high}; use a prefill_chunk_size, "
                "or chunks of your own, that cut no video"
            )
        found.append(video._replace(layout=_moved(layout, -first)))
    return found


def _moved(layout: VideoLayout, by: int) -> VideoLayout:
    if by == 0:
        return layout
    positions = layout.positions
    return replace(layout, positions=positions.where(positions < 0, positions + by), length=None)


def _owner_of(model: Any, encoder: str) -> Any:
    """The model inside `model` that has this method, as its base model; Video-LLaVA of 4.x does not call it that."""
    inner = getattr(model, "base_model", model)
    return inner if hasattr(inner, encoder) else getattr(model, "model", inner)


def _check_images(model: Any, layout: Any) -> None:
    """Raise a ValueError unless the images of a model can be found."""
    if layout is not None:
        given = "remote code" if isinstance(layout, Follower) else "a layout"
        raise ValueError(
            f"reduce: images must be False with {given}: those of families in transformers are found, no others; a "
            "layout may have a video of one frame for each image"
        )
    if not isinstance(getattr(model.config, "image_token_id", None), int):
        raise ValueError(f"reduce: images must be False for {type(model).__name__}, whose config has no image_token_id")


def _known_rule(model: Any) -> LayoutRule:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in RULES:
        lacking = why_unknown(model)
        raise TypeError(
            f"reduce: layout must be given for {type(model).__name__}; it is found without for model types "
            f"{', '.join(sorted([*RULES, *FOLLOWERS]))}, got {model_type!r}" + (f", but {lacking}" if lacking else "")
        )
    encoder = encoder_of(model_type)
    owner = _owner_of(model, encoder)
    if not hasattr(owner, encoder):
        raise UnknownReleaseError(f"{type(owner).__name__} must have a method {encoder!r}")
    check_model(model)
    return RULES[model_type]
