"""A KV cache layer that holds fewer tokens than it reports.

`get_seq_length()` stays the length of the whole sequence, so that generate, position ids, a second turn and everything
else that counts tokens see what they would without a reduction; the keys and values are the kept ones only, and those
of a batch stand at the right end of their rows, behind padding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .compat import RecurrentLayer


class Permit:
    """Says whether reduced caches can be used now. Copies of a cache share it."""

    def __init__(self) -> None:
        self.active = False

    def __deepcopy__(self, memo: dict) -> Permit:
        return self


class ReducedLayer(DynamicLayer):
    """A DynamicLayer that also counts the tokens that it does not hold.

    Attributes:
        reduced: whether the rows are other than the sequence's tokens one after the other.
        missing: how many more tokens the sequence has than there are rows.
        fixed: the sequence's length up to which it cannot be cropped.
        valid: [B, rows] bool, False for padding; None: no padding, or nothing known while `reduced` is False.
        permit: a reduced layer can be used while it is active.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()
        self.permit = Permit()

    def _forget(self) -> None:
        self.reduced, self.missing, self.fixed = False, 0, 0
        self.valid: Tensor | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> ReducedLayer:
        """A ReducedLayer with what `layer` holds."""
        reduced = cls()
        reduced.__dict__.update(layer.__dict__)
        return reduced

    @property
    def rows(self) -> int:
        """Tokens that are here."""
        return super().get_seq_length()

    def get_seq_length(self, *args: Any) -> int:
        return super().get_seq_length() + self.missing

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if self.reduced and not self.permit.active:
            raise RuntimeError(
                "the KV cache holds a reduced prompt, which only a model that is being reduced can read: use it inside "
                "`with fftriton.reduce(...)`"
            )
        return super().update(*args, **kwargs)

    def append_valid(self, past: int, new: int, valid: Tensor | None) -> None:
        """Note which of `new` rows [B, new] behind `past` ones are no padding. None: all."""
        like = self.valid if valid is None else valid
        if like is None:
            return
        before = like.new_ones(like.shape[0], past) if self.valid is None else self.valid
        after = like.new_ones(like.shape[0], new) if valid is None else valid
        self.valid = torch.cat([before, after], 1)

    def crop(self, length: int) -> None:
        """Remove -length tokens from the end or, where length is positive, all behind it. Raises a ValueError where
        that would reach into what has been reduced."""
        logical = self.get_seq_length()
        end = logical + length if length <= 0 else min(length, logical)
        if end == logical:
            return
        if end < self.fixed:
            raise ValueError(
                f"crop: length must stay at or behind {self.fixed}, the end of the reduced video, got {end}"
            )
        rows = self.rows - (logical - end)
        self.keys: Tensor = self.keys[..., :rows, :]
        self.values: Tensor = self.values[..., :rows, :]
        self.valid = None if self.valid is None else self.valid[:, :rows]

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]  # as a new layer has them
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.valid is not None:
            self.valid = self.valid[indices]


class Checkpoint:
    """What the layers of a cache held, so that a forward that fails can be taken back. Holds no keys or values."""

    def __init__(self, layers: Iterable[ReducedLayer]) -> None:
        self._states = [(layer, layer.rows, _notes(layer)) for layer in layers]

    def restore(self) -> None:
        """Take out of each layer what has come since."""
        for layer, rows, notes in self._states:
            if rows == 0:
                layer.reset()
            elif layer.rows > rows:
                layer.keys, layer.values = layer.keys[..., :rows, :], layer.values[..., :rows, :]
            layer.__dict__.update(notes)


def _notes(layer: ReducedLayer) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("reduced", "missing", "fixed", "valid")}


def prepare(cache: Any, num_layers: int, permit: Permit) -> list[ReducedLayer | None] | None:
    """Make every attention layer of a DynamicCache a ReducedLayer; None, and nothing changed, where that cannot be.

    Recurrent states have no rows: they stay as they are, and stand as None in what is returned.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    if any(type(layer) not in (DynamicLayer, ReducedLayer, RecurrentLayer) for layer in cache.layers):
        return None
    cache.layers = [ReducedLayer.adopt(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.layers += [ReducedLayer() for _ in range(num_layers - len(cache.layers))]
    layers = [layer if isinstance(layer, ReducedLayer) else None for layer in cache.layers]
    for layer in filter(None, layers):
        layer.permit = permit
    return layers
