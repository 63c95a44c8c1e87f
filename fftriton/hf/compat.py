"""The differences between the transformers releases that fftriton supports, all in one place."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import cache_utils, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RELEASE = f"transformers {transformers.__version__}"

RecurrentLayer: type | None = getattr(cache_utils, "LinearAttentionLayer", None)
"""The cache layer of a linear-attention layer; None in 4.x, whose models have caches of their own."""

KNOWN_LAYERS = frozenset(kind for kind in vars(cache_utils).values() if isinstance(kind, type))
"""The classes that the layers of a KV cache may have in this release, other than those of single models."""

_LAYER_METHODS = (
    "update", "get_seq_length", "get_mask_sizes", "crop", "reset", "reorder_cache", "batch_repeat_interleave",
    "batch_select_indices",
)  # fmt: skip

CACHE = ("cache", "past_key_values")
"""The names under which a forward takes its KV cache: renamed in 5.24, whose forwards still accept the old name."""

MASKS_WHEN_COMPILED = not hasattr(masking_utils, "is_torchdynamo_exporting")
"""Whether compiled code makes a mask even for one token, as long as the whole sequence: until 5.2x."""


class UnknownReleaseError(RuntimeError):
    """Something that fftriton relies on is missing from this transformers release."""

    def __init__(self, rule: str) -> None:
        super().__init__(f"reduce: {rule}; {RELEASE} is not a release that this version of fftriton can work with")


def parameter(function: Callable, owner: str, *names: str) -> str:
    """The first of these names that is a parameter of the function.

    Raises:
        UnknownReleaseError: none of them is.
    """
    return _known(inspect.signature(function).parameters, owner, *names)


def _known(parameters: Mapping[str, Any], owner: str, *names: str) -> str:
    for name in names:
        if name in parameters:
            return name
    raise UnknownReleaseError(
        f"{owner} must have a parameter {' or '.join(map(repr, names))}, but it has {', '.join(parameters)}"
    )


def check_decoder(decoder: Any) -> str:
    """Check that a decoder and its layers take the arguments that a reduction reads and changes.

    Returns:
        The name under which the decoder takes its KV cache.

    Raises:
        UnknownReleaseError: naming what is missing.
    """
    owner = f"{type(decoder).__name__}.forward"
    for name in ("input_ids", "inputs_embeds", "attention_mask", "use_cache"):
        parameter(decoder.forward, owner, name)
    for layer in decoder.layers:
        for name in ("hidden_states", "attention_mask", "position_embeddings"):
            parameter(layer.forward, f"{type(layer).__name__}.forward", name)
    attention_name(decoder.config)
    for name in _LAYER_METHODS:
        if not hasattr(cache_utils.DynamicLayer, name):
            raise UnknownReleaseError(f"DynamicLayer must have a method {name!r}")
    for part, names in ((cache_utils.DynamicLayer(), ("keys", "values")), (cache_utils.DynamicCache(), ("layers",))):
        for name in names:
            if not hasattr(part, name):
                raise UnknownReleaseError(f"{type(part).__name__} must have an attribute {name!r}")
    return parameter(decoder.forward, owner, *CACHE)


def check_model(model: Any) -> None:
    """Check that a model of a known family takes the arguments in which its videos are found.

    Raises:
        UnknownReleaseError: naming what is missing.
    """
    for name in ("input_ids", "inputs_embeds"):
        parameter(model.forward, f"{type(model).__name__}.forward", name)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a forward or of `generate`, or None."""
    for name in CACHE:
        cache = arguments.get(name)
        if cache is not None:
            return cache
    return None


def past_of(arguments: Mapping[str, Any]) -> int:
    """How many tokens of the sequence the KV cache among the arguments represents."""
    cache = cache_in(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def attention_name(config: Any) -> str:
    """The attention implementation that a config names.

    Raises:
        UnknownReleaseError: it names none.
    """
    try:
        return config._attn_implementation
    except AttributeError:
        raise UnknownReleaseError(f"{type(config).__name__} must have an attribute '_attn_implementation'") from None


def causal_mask(config: Any, hidden: Tensor, valid: Tensor | None, past: int, sees: Callable | None = None) -> Any:
    """The mask for `hidden` [B, n, D] after `past` cached rows, in the form that the attention back end wants.

    valid: [B, past + n] bool, False for padding; None if nothing is padded.
    sees: which keys a query may attend to, causality aside: a function of indices of sample, head, query and key.

    Raises:
        UnknownReleaseError: the mask function has unknown parameters.
    """
    make = getattr(masking_utils, "create_causal_mask", None)
    if make is None:
        raise UnknownReleaseError("transformers.masking_utils must have a function 'create_causal_mask'")
    parameters = inspect.signature(make).parameters
    name = functools.partial(_known, parameters, "create_causal_mask")
    arguments: dict[str, Any] = {
        name("config"): config, name("attention_mask"): valid, name(*CACHE): _CachedRows(past),
        name("inputs_embeds", "input_embeds"): hidden,  # renamed in 5.x
    }  # fmt: skip
    if "cache_position" in parameters:  # until 5.x
        arguments["cache_position"] = torch.arange(past, past + hidden.shape[1], device=hidden.device)
    if sees is not None:
        arguments[name("and_mask_function")] = sees
    return make(**arguments)


def has_axes(config: Any) -> bool:
    """Whether a decoder's positions are times, heights and widths (M-RoPE) rather than single numbers."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}  # 5.x, 4.x
    return "mrope_section" in rope


def attention_function(attention: Any) -> Callable:
    """The function that this attention module would call on its queries, keys and values."""
    name = attention_name(attention.config)
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(attention).__module__].eager_attention_forward


def head_group(attention: Any, heads: int) -> Any:
    """The processes over which tensor parallelism splits the heads of a module that has `heads` of them here.

    Returns:
        A torch.distributed.ProcessGroup, or None if all heads are here.

    Raises:
        RuntimeError: there are heads in other processes, and no parameter says in which.
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
    """The tensor in what an encoder's get_..._features returns: itself in 4.x, an output that holds it from 5.x on."""
    return features if isinstance(features, Tensor) else features.pooler_output


def take_deepstack(decoder_arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Take from the arguments what Qwen3-VL's decoder adds to the outputs of its first layers.

    Args:
        decoder_arguments: those of the decoder's forward, by name; the features are removed from them.

    Returns:
        A tensor [B, N, D] for each of the first layers, at places of the full prompt; zero if nothing is added there.
    """
    features, places = decoder_arguments.get("deepstack_visual_embeds"), decoder_arguments.get("visual_pos_masks")
    if features is None or places is None:
        return ()
    decoder_arguments.update(deepstack_visual_embeds=None, visual_pos_masks=None)
    return tuple(
        part.new_zeros(*places.shape, part.shape[-1]).index_put((places.to(part.device),), part) for part in features
    )


class _CachedRows:
    """Stands in for a cache of `past` rows when only its length matters."""

    is_compileable = False

    def __init__(self, past: int) -> None:
        self.past = past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        return self.past + (query if isinstance(query, int) else query.shape[0]), 0
