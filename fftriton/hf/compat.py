"""The differences between the transformers releases that fftriton runs on, all in one place."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RecurrentLayer: type | None = getattr(cache_utils, "LinearAttentionLayer", None)
"""The cache layer of a linear-attention layer; None in 4.x, whose models have caches of their own."""

_MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters


def causal_mask(config: Any, hidden: Tensor, valid: Tensor | None, past: int, sees: Callable | None = None) -> Any:
    """The mask for `hidden` [B, n, D] behind `past` cached rows, in the form that the attention back end wants.

    valid: [B, past + n] bool, False for padding; None when nothing is padded.
    sees: which keys a query may attend to, causality aside: a function of indices of sample, head, query and key.
    """
    arguments: dict[str, Any] = {"config": config, "attention_mask": valid, "past_key_values": _CachedRows(past)}
    arguments["inputs_embeds" if "inputs_embeds" in _MASK_PARAMETERS else "input_embeds"] = hidden  # renamed in 5.x
    if "cache_position" in _MASK_PARAMETERS:  # until 5.x
        arguments["cache_position"] = torch.arange(past, past + hidden.shape[1], device=hidden.device)
    if sees is not None:
        arguments["and_mask_function"] = sees
    return create_causal_mask(**arguments)


def has_axes(config: Any) -> bool:
    """Whether a decoder's positions are times, heights and widths (M-RoPE) rather than single numbers."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}  # 5.x, 4.x
    return "mrope_section" in rope


def attention_function(attention: Any) -> Callable:
    """The function that this attention module would call on its queries, keys and values."""
    name = attention.config._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(attention).__module__].eager_attention_forward


def head_group(attention: Any, heads: int) -> Any:
    """The processes over which tensor parallelism splits the heads of a module that has `heads` of them here.

    Returns:
        A torch.distributed.ProcessGroup; None where all heads are here.

    Raises:
        RuntimeError: heads are elsewhere, and no parameter says where.
    """
    total = getattr(attention.config, "num_attention_heads", heads)
    if heads == total:
        return None
    for parameter in attention.parameters():
        mesh = getattr(parameter, "device_mesh", None)  # of a DTensor
        if mesh is not None:
            return mesh.get_group("tp" if "tp" in (mesh.mesh_dim_names or ()) else None)
    raise RuntimeError(
        f"reduce: importance is a mean over all heads, but only {heads} of {total} are in this process, and no "
        "parameter is a DTensor that says where the others are; split the model with the tp_plan of transformers"
    )


def first_of(output: Any) -> Tensor:
    """A decoder layer's hidden states: some layers return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, hidden: Tensor) -> Any:
    """A decoder layer's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def pooled(features: Any) -> Tensor:
    """What an encoder's get_..._features gives: a tensor in 4.x, an output that holds it from 5.x on."""
    return features if isinstance(features, Tensor) else features.pooler_output


class _CachedRows:
    """Stands in for a cache of `past` rows where only its length matters."""

    is_compileable = False

    def __init__(self, past: int) -> None:
        self.past = past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        return self.past + (query if isinstance(query, int) else query.shape[0]), 0
