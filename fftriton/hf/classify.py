"""What a call of the decoder is: a prompt to reduce, a continuation of one, or nothing that a reduction changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from .cache import Permit, ReducedLayer, prepare
from .checkpointing import check_checkpointing, runs_again
from .compat import CACHE, attention_name, cache_in, causal_mask, past_of
from .continuation import CacheLayers
from .finder import PlacedVideo
from .modules import has_attention


class Kind(Enum):
    """What is to become of a call of the decoder."""

    DENSE = auto()  # it runs as it is
    ONE_MASK = auto()  # as it is, but for one mask that hides nothing
    CONTINUATION = auto()  # it follows a reduced prompt: each layer gets a mask of its own
    PROMPT = auto()  # it holds a video: it is reduced


@dataclass(frozen=True)
class DecoderInput:
    """What the decoder was given.

    Args:
        source: [B, N] or [B, N, D], the tokens.
        mask: the attention mask.
        cache: the KV cache; None without one.
        layers: the cache's layers, ready to hold fewer tokens than they report, or None if they cannot.
    """

    source: Tensor
    mask: Any
    cache: Any
    layers: CacheLayers

    @property
    def reducible(self) -> list[ReducedLayer]:
        """The cache's layers that can hold fewer tokens than they report."""
        return [layer for layer in self.layers or () if layer is not None]

    @property
    def follows_reduced(self) -> bool:
        """Whether the cache holds a reduced prompt."""
        return any(layer.reduced for layer in self.reducible)


def take_input(
    decoder: Any, source: Tensor, arguments: dict[str, Any], cache_name: str, permit: Permit
) -> DecoderInput:
    """What the decoder was given. Makes the KV cache that the decoder would make, and prepares its layers.

    Args:
        decoder: what is called.
        source: the tokens.
        arguments: of its forward, by name; the cache is put there.
        cache_name: what the decoder calls the cache.
        permit: for the cache's layers.

    Raises:
        ValueError: a cache that is none of transformers'.
    """
    cache, use_cache = cache_in(arguments), arguments.get("use_cache")
    if runs_again(decoder) and past_of(arguments) == 0:  # its layers would ignore it
        cache = None
        arguments.update(dict.fromkeys([name for name in CACHE if name in arguments]), use_cache=False)
    elif cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=decoder.config)
    if cache is not None:
        for name in CACHE:
            arguments.pop(name, None)
        arguments[cache_name] = cache
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"reduce: the KV cache must be a transformers.Cache, got {type(cache).__name__}: a paged cache cannot "
            "hold fewer tokens in later layers"
        )
    layers = None if cache is None else prepare(cache, len(decoder.layers), permit)
    return DecoderInput(source, arguments.get("attention_mask"), cache, layers)


def is_new_prompt(given: DecoderInput, arguments: Mapping[str, Any]) -> bool:
    """Whether these tokens begin a prompt: they do not follow a reduced one, and are not a decode step."""
    return not given.follows_reduced and (given.source.shape[1] > 1 or past_of(arguments) == 0)


def why_not(decoder: Any, given: DecoderInput) -> str | None:
    """Why nothing can be reduced in this call, or None if it can be."""
    cache, config = given.cache, decoder.config
    if cache is not None and given.layers is None:
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
        of = f" with layers of {', '.join(kinds)}" if kinds else ""
        return f"only a plain DynamicCache can hold fewer tokens in later layers, got {type(cache).__name__}{of}"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "linear_attention"}
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None) is not None:
        return f"the decoder's attention has a sliding window of {config.sliding_window}"
    if other:
        return f"the decoder has layers other than full and linear attention: {', '.join(sorted(other))}"
    if given.mask is not None and (isinstance(given.mask, dict) or getattr(given.mask, "ndim", None) != 2):
        return "attention_mask is not the two-dimensional padding mask"
    return None


class Masks:
    """Which mask the decoder must be given after a reduced prompt.

    Args:
        decoder: what is called.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._for_one_token: dict[str, bool] = {}  # per attention back end: whether it wants a mask for one token

    def are_needed(self, cache_layers: Sequence[ReducedLayer], source: Tensor) -> bool:
        """Whether the mask that the decoder makes for the whole sequence does not fit the rows that are there.

        Rows with sizes need hooks for every token, as masks do.
        """
        if source.shape[1] > 1 or any(not layer.is_plain for layer in cache_layers):
            return True
        backend = attention_name(self._decoder.config)
        if backend not in self._for_one_token:
            mask = causal_mask(self._decoder.config, source.new_empty(1, 1, 1, dtype=torch.float32), None, 1)
            self._for_one_token[backend] = mask is not None
        return self._for_one_token[backend]

    def hide_nothing(self, cache_layers: Sequence[ReducedLayer], source: Tensor) -> bool:
        """Whether one mask that hides nothing fits all layers: eager attention adds it to scores of any length."""
        one_token = source.shape[1] == 1 and all(layer.is_plain for layer in cache_layers)
        eager = attention_name(self._decoder.config) == "eager"
        return one_token and eager and all(map(has_attention, self._decoder.layers))

    def of_nothing(self, source: Tensor) -> Tensor:
        """[B, 1, 1, 1]: what is added to the scores of one token, whatever the number of keys."""
        return source.new_zeros(len(source), 1, 1, 1, dtype=self._decoder.dtype)


def classify(decoder: Any, given: DecoderInput, has_video: bool, masks: Masks) -> Kind:
    """What is to become of a call for which `why_not` knows no reason.

    Raises:
        ValueError: gradient checkpointing that a reduction cannot repeat, or with a KV cache that holds tokens.
    """
    if has_video or given.follows_reduced:
        check_checkpointing(decoder)
        if given.cache is not None and runs_again(decoder):
            raise ValueError(
                "reduce: the KV cache must be empty under gradient checkpointing, which ignores it, got "
                f"{given.cache.get_seq_length()} tokens"
            )
    if has_video:
        return Kind.PROMPT
    reducible = given.reducible
    if not given.follows_reduced or not masks.are_needed(reducible, given.source):
        return Kind.DENSE
    return Kind.ONE_MASK if masks.hide_nothing(reducible, given.source) else Kind.CONTINUATION


def reduced_layers(cache: Any) -> list[ReducedLayer]:
    """The layers of a KV cache if they hold a reduced prompt, otherwise none."""
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, ReducedLayer)]
    return layers if any(layer.reduced for layer in layers) else []


def padding(mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """[B, past + N] mask -> bool [B, past] and [B, N], False for padding; None if nothing is padded.

    A single token is assumed not to be padding: decoding does not wait for the device to say so.
    """
    if mask is None or length == 1 or bool(mask.all()):
        return None, None
    return mask[:, :-length].bool(), mask[:, -length:].bool()


def check_visible(videos: Sequence[PlacedVideo], valid: Tensor | None) -> None:
    """Raise a ValueError if padding covers a video token."""
    if valid is None:
        return
    hidden = ~valid.cpu()
    for layout, *_ in videos:
        if bool(hidden[layout.sample, layout.tokens.cpu()].any()):
            raise ValueError(f"attention_mask: must not hide video tokens, but does in sample {layout.sample}")
