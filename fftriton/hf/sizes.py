"""Sizes in attention: log(size) is added to the scores of a key that stands for `size` tokens, in every back end.

The heads get a few more channels. Those of a query are 1, and those of a key add up to log(size) / scale, so that

    scale * (<q, k> + log(size) / scale) = scale * <q, k> + log(size)

comes out of whatever computes the scores: masks, causality and softmax stay its own. Two channels, the second with what
the first has lost by rounding, make the logarithm exact in half precision, too; zeros fill up to a multiple of eight,
which flash attention demands. The values get as many zeros, which are cut off again.
Source: proportional attention in ToMe, arXiv:2210.09461, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .modules import has_attention

_MULTIPLE = 8  # of channels
_MOST_CHANNELS = 256  # of a head, in flash attention and in attention_column_sum
_SOFT_CAPS = ("attn_logit_softcapping", "attn_logit_softcap", "logits_soft_cap", "softcap")


def check_sizes(decoder: Any) -> None:
    """Check that sizes can be added to the scores of every layer of a decoder.

    Raises:
        ValueError: they cannot.
    """
    config, rule = decoder.config, "reduce: proportional must be False for"
    name = type(decoder).__name__
    if recurrent := [index for index, layer in enumerate(decoder.layers) if not has_attention(layer)]:
        raise ValueError(f"{rule} {name}, whose layer {recurrent[0]} is recurrent: a size means nothing there")
    owners = [config, *(layer.self_attn for layer in decoder.layers)]
    for cap in _SOFT_CAPS:
        if any(isinstance(getattr(owner, cap, None), int | float) for owner in owners):
            raise ValueError(f"{rule} {name}, whose scores are capped ({cap}) after a size would be added to them")
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", heads) // heads
    check_width(width)


def check_width(width: int) -> None:
    """Raise a ValueError if heads of `width` channels have no room for those that carry sizes."""
    if channels(width) > _MOST_CHANNELS:
        raise ValueError(
            f"reduce: proportional must be False for heads of more than {_MOST_CHANNELS - _MULTIPLE} channels, because "
            f"those that carry sizes would make them wider than {_MOST_CHANNELS}; got {width}"
        )


@dataclass(frozen=True)
class Carriers:
    """The channels that carry sizes.

    Args:
        keys: [B, 1, M, a], those of the keys. queries: [a], those of every query.
    """

    keys: Tensor
    queries: Tensor

    @classmethod
    def of(cls, log_sizes: Tensor, scale: float, key: Tensor) -> Carriers:
        """Those for keys [B, Hkv, M, d] whose scores at this scale get log_sizes [B, M] fp32."""
        added = channels(key.shape[-1]) - key.shape[-1]
        whole = (log_sizes / scale).to(key.device)
        high = whole.to(key.dtype)
        low = (whole - high.float()).to(key.dtype)
        ones = (torch.arange(added, device=key.device) < 2).to(key.dtype)
        return cls(F.pad(torch.stack([high, low], -1), (0, added - 2))[:, None], ones)

    def added_to(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, N, d], keys [B, Hkv, M, d] and values [B, Hkv, M, e] with them.

        Returns:
            The same with d + a channels and e + a channels, the last a of which are to be cut off what comes out.
        """
        added = len(self.queries)
        queries = torch.cat([query, self.queries.expand(*query.shape[:-1], -1)], -1)
        keys = torch.cat([key, self.keys.expand(-1, key.shape[1], -1, -1)], -1)
        return queries, keys, F.pad(value, (0, added))


def channels(width: int) -> int:
    """The channels of heads of `width` with two more, as a multiple of eight."""
    return -(-(width + 2) // _MULTIPLE) * _MULTIPLE
