"""Which modules of a model matter: its decoder, the model that holds it, and those that get hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from transformers import PreTrainedModel


def find_decoder(model: nn.Module, root: nn.Module) -> Any:
    """The module in `model` whose `layers` are Qwen2-style decoder layers. Raises a TypeError if there is none.

    root: what the user gave, named in errors; the model is in it.
    """
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) and all(map(_is_decoder_layer, layers)):
            _check_layers(layers)
            return module
    if any(map(_is_internlm2, root.modules())):
        raise TypeError(
            f"reduce: model must not be built on InternLM2, as {type(root).__name__} is: its layers are not like "
            "Qwen2's (attention with wqkv, wo and rotary_emb, attention_norm, feed_forward, ffn_norm), its KV cache is "
            "a tuple. InternVL2.5-2B, -8B and -26B are built on it; -1B, -4B, -38B and -78B are built on Qwen2 and "
            "can be reduced"
        )
    raise TypeError(
        f"reduce: model must have a Qwen2-style decoder (layers with self_attn, post_attention_layernorm and mlp), "
        f"got {type(root).__name__}"
    )


def owner_of(decoder: nn.Module, root: nn.Module) -> Any:
    """The Hugging Face model that holds the decoder: `root`, or what it wraps (PEFT, DistributedDataParallel)."""
    models = (module for module in root.modules() if isinstance(module, PreTrainedModel))
    return next((model for model in models if decoder in model.modules()), root)


def check_wrapper(root: Any) -> None:
    """Raise a TypeError for what is no module, and for a DataParallel that makes copies of the model."""
    if not isinstance(root, nn.Module):
        raise TypeError(f"reduce: model must be a Hugging Face model, got {type(root).__name__}")
    for module in root.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise TypeError(
                f"reduce: model must not be a DataParallel over {len(module.device_ids)} devices, whose copies a "
                "reduction does not reach; use DistributedDataParallel"
            )


def has_attention(layer: nn.Module) -> bool:
    """Whether the decoder layer has softmax attention; Qwen3.5 has layers with linear attention instead."""
    return hasattr(layer, "self_attn")


def hooked_in(layers: Sequence[Any]) -> set[nn.Module]:
    """The modules of these layers that have hooks while a prompt is reduced."""
    hooked = set(layers)
    for layer in layers:
        hooked |= {layer.post_attention_layernorm, layer.mlp} | ({layer.self_attn} if has_attention(layer) else set())
    return hooked


def above_hooks(model: nn.Module, decoder: Any) -> list[nn.Module]:
    """The modules that have hooks while a prompt is reduced, and those that contain one."""
    hooked = {decoder} | hooked_in(decoder.layers)
    return [module for module in model.modules() if any(part in hooked for part in module.modules())]


def _check_layers(layers: nn.ModuleList) -> None:
    """Raise a TypeError for layers that are wrapped so that they run a second time behind the back of all hooks."""
    for layer in layers:
        if isinstance(layer, ActivationWrapper):
            raise TypeError(
                f"reduce: a decoder layer must not be within a {type(layer).__name__}; call "
                "model.gradient_checkpointing_enable() instead"
            )


def _is_internlm2(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    names = [
        type(module).__name__,
        getattr(config, "model_type", None),
        *(getattr(getattr(config, "llm_config", None), "architectures", None) or ()),
    ]
    return any("internlm2" in str(name).lower() for name in names)


def _is_decoder_layer(layer: nn.Module) -> bool:
    mixes = has_attention(layer) or hasattr(layer, "linear_attn")
    return mixes and all(hasattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm", "mlp"))
