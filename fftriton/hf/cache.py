"""A KV cache layer that holds fewer tokens than it reports.

`get_seq_length()` stays the length of the whole sequence, so that generate, position ids, a second turn and everything
else that counts tokens see what they would without a reduction; the keys and values are the kept ones only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .compat import RecurrentLayer


class ReducedLayer(DynamicLayer):
    """A DynamicLayer that also counts the tokens that it does not hold."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.missing = 0  # tokens of the sequence that are not here
        self.fixed = 0  # the sequence's length up to its last reduction: cropping stops there
        self.valid: Tensor | None = None  # [B, rows] bool, False for padding; None: no padding

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

    def note_padding(self, valid: Tensor | None) -> None:
        """Take over which rows [B, rows] are no padding, where all tokens are here and nothing is known yet."""
        if valid is not None and self.valid is None and self.missing == 0 and valid.shape[1] == self.rows > 0:
            self.valid = valid

    def append_valid(self, past: int, new: int, valid: Tensor | None) -> Tensor | None:
        """Note which of `new` rows [B, new] are no padding (None: all); returns the flags of all rows or None."""
        if valid is not None or self.valid is not None:
            like = valid if valid is not None else self.valid
            assert like is not None
            before = like.new_ones(like.shape[0], past) if self.valid is None else self.valid
            after = like.new_ones(like.shape[0], new) if valid is None else valid
            self.valid = torch.cat([before, after.to(before.device)], 1)
        return self.valid

    def crop(self, length: int) -> None:
        """Remove -length tokens from the end or, where length is positive, all behind it. Raises a ValueError where
        that would reach into a reduced prompt."""
        logical = self.get_seq_length()
        end = logical + length if length <= 0 else min(length, logical)
        if end == logical:
            return
        if end < self.fixed:
            raise ValueError(
                f"crop: length must stay at or behind {self.fixed}, the end of the reduced prompt, got {end}"
            )
        rows = self.rows - (logical - end)
        self.keys: Tensor = self.keys[..., :rows, :]
        self.values: Tensor = self.values[..., :rows, :]
        self.valid = None if self.valid is None else self.valid[:, :rows]

    def reset(self) -> None:
        super().reset()
        self.missing, self.fixed, self.valid = 0, 0, None

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


def prepare(cache: Any, num_layers: int) -> list[ReducedLayer | None] | None:
    """Make every attention layer of a DynamicCache a ReducedLayer; None, and nothing changed, where that cannot be.

    Recurrent states have no rows: they stay as they are, and stand as None in what is returned.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    if any(type(layer) not in (DynamicLayer, ReducedLayer, RecurrentLayer) for layer in cache.layers):
        return None
    cache.layers = [ReducedLayer.adopt(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.layers += [ReducedLayer() for _ in range(num_layers - len(cache.layers))]
    return [layer if isinstance(layer, ReducedLayer) else None for layer in cache.layers]
