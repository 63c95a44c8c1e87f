"""One forward on a KV cache that holds fewer rows than there are tokens: masks, sizes and the cache's bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import ReducedLayer
from .compat import UnknownReleaseError, attention_name, causal_mask
from .window import Windows

CacheLayers = Sequence[ReducedLayer | None] | None
"""A KV cache's layers, with None for each recurrent one; None without a cache."""


class Continuation:
    """A forward without a video that follows a reduced prompt.

    Args:
        source: [B, N] or [B, N, D], what the decoder gets.
        valid: [B, N] bool, False for padding; None if nothing is padded.
        cache_layers: where keys and values go.

    Attributes:
        packed: whether the rows are other than the tokens that the decoder got.
        window: which tokens those of this forward may attend to.
        free_tail: this many tokens at the end are the last rows of every sample, so a crop can remove them.
        asking: whether a method is being asked.
        hears: whether the layers' attention has to be listened to, or to take sizes into account.
        log_sizes: [B, rows] fp32, of the tokens that each of its rows stands for; None: each for itself.
        log_sizes_of_keys: [B, past + rows] fp32, the same for the keys of the layer that is about to run.
    """

    hears = False

    def __init__(self, source: Tensor, valid: Tensor | None, cache_layers: CacheLayers) -> None:
        self.batch, self.length = source.shape[:2]
        self.valid, self.cache_layers = valid, cache_layers
        self.packed = self.asking = False
        self.window: Windows | None = None
        self.free_tail = 0
        self.log_sizes: Tensor | None = None
        self.log_sizes_of_keys: Tensor | None = None
        self.hears = self.hears or any(
            layer is not None and layer.log_sizes is not None for layer in cache_layers or ()
        )
        self._masks: dict[tuple, tuple] = {}
        self._joins: dict[tuple, tuple] = {}

    def layer_arguments(self, index: int, hidden: Tensor, given: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """The layer's keyword arguments that differ from what the decoder gave, and the cache's bookkeeping."""
        cached = None if self.cache_layers is None else self.cache_layers[index]
        self.log_sizes_of_keys = self.log_sizes
        window = self.window if cached is None else cached.window
        if not self.packed and window is None and (cached is None or not cached.reduced):
            return {}
        past, rows = (0 if cached is None else cached.rows), hidden.shape[1]
        valid = self.valid
        if cached is not None:
            valid = cached.valid = self._joined(cached.valid, valid, past, rows, fill=True)
            cached.log_sizes = self._joined(cached.log_sizes, self.log_sizes, past, rows, fill=0.0)
            self.log_sizes_of_keys = cached.log_sizes
            cached.missing += self.length - rows
            cached.reduced = True
            if self.packed:
                cached.fixed = past + rows + cached.missing - self.free_tail
        changed: dict[str, Any] = {}
        if "attention_mask" not in given:
            raise UnknownReleaseError(f"the decoder must call its layers with 'attention_mask', got {', '.join(given)}")
        narrow = window if rows > 1 else None  # for one token the cache holds no more than it may attend to
        if given["attention_mask"] is not None or valid is not None or (rows > 1 and past > 0) or narrow:
            changed["attention_mask"] = self._mask(config, hidden, valid, past, narrow)
        return changed

    def _joined(self, held: Tensor | None, given: Tensor | None, past: int, new: int, fill: float) -> Tensor | None:
        """[B, past + new]: what a layer holds of `past` rows, and what is given of `new` ones; `fill` where it is None.

        Layers that share what they hold continue to do so.
        """
        like = held if given is None else given
        if like is None:
            return None
        key = _place(held), _place(given), past, new
        if key not in self._joins:
            before = like.new_full((like.shape[0], past), fill) if held is None else held
            after = like.new_full((like.shape[0], new), fill) if given is None else given
            joined = torch.cat([before, after.to(before.device)], 1)
            self._joins[key] = held, given, joined  # kept alive, so that their places stay theirs
        return self._joins[key][-1]

    def _mask(self, config: Any, hidden: Tensor, valid: Tensor | None, past: int, window: Windows | None) -> Any:
        key = (id(valid), past, hidden.shape[1], hidden.device, id(window))
        if key not in self._masks:
            flags = None if valid is None else valid.to(hidden.device)
            sees = None if window is None else window.mask(flags, past + hidden.shape[1], hidden.device)
            mask = causal_mask(config, hidden, flags, past, sees)
            if window is not None and (mask is None or (isinstance(mask, Tensor) and mask.ndim < 4)):
                raise ValueError(
                    "reduce: attn_implementation must be one that takes a mask of queries and keys, such as sdpa or "
                    f"eager, for a method that restricts attention; got {attention_name(config)!r}"
                )
            self._masks = {key: (valid, window, mask)}
        return self._masks[key][-1]


def _place(part: Tensor | None) -> tuple | None:
    """Where a tensor lies: a crop gives each layer a view of its own of what it shares with others."""
    return None if part is None else (part.data_ptr(), part.shape, part.stride(), part.device)
