"""The needle model: Qwen2-VL with a small vision tower and a small decoder, made and saved."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from bench.needle.make_assets import write_processor
from fftriton.needle.digits import PATCH
from fftriton.needle.scenes import GRID
from fftriton.needle.vocabulary import BOS, EOS, IDS, IMAGE, PAD, VIDEO, VISION_END, VISION_START
from fftriton.runtime.shipped import MODEL

PATCHES = GRID * GRID  # of a frame, each a token

_WIDTH = 128
_VOCABULARY = 64
ROPE_THETA = 1e6  # Qwen2-VL's own; its slowest temporal angle turns once in 84 frames, so that 64 stay apart
HARDER_ROPE_THETA = 2e7  # turns once in 147 frames, so that 128 stay apart
_SPECIAL = {"bos_token_id": IDS[BOS], "eos_token_id": IDS[EOS], "pad_token_id": IDS[PAD]}


def make_model(seed: int, rope_theta: float = ROPE_THETA, max_positions: int = 2048) -> Qwen2VLForConditionalGeneration:
    """An untrained model, float32 on the CPU; the seed fixes its weights."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(_config(rope_theta, max_positions))
    # answers are one token long; greedy, whatever the seed
    model.generation_config = GenerationConfig(max_new_tokens=1, do_sample=False, **_SPECIAL)
    return model


def make_harder_model(seed: int) -> Qwen2VLForConditionalGeneration:
    """A model for videos of up to 128 frames that starts with the weights of the one that ships."""
    model = make_model(seed, HARDER_ROPE_THETA, max_positions=4096)
    shipped = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
    model.load_state_dict(shipped.state_dict())
    return model


def save_model(model: Qwen2VLForConditionalGeneration, folder: Path, vocabulary: dict[str, int] = IDS) -> None:
    """Write bf16 weights, configuration and processor files, as `from_pretrained` reads them."""
    copy.deepcopy(model).cpu().to(torch.bfloat16).save_pretrained(folder)
    write_processor(folder, vocabulary)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    text |= _transformers_4(text.get("rope_parameters", text)["rope_theta"])
    path.write_text(json.dumps(config, indent=2) + "\n")


def batch_frames(model: Qwen2VLForConditionalGeneration) -> None:
    """Let the vision tower attend to all frames at once, which are of one size here, and not to one after the other."""
    for block in model.model.visual.blocks:
        block.attn.forward = partial(_attend_to_frames, block.attn)


def _attend_to_frames(attention: nn.Module, hidden: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
    """What Qwen2-VL's vision attention computes, for hidden [N * PATCHES, D] of frames of PATCHES patches."""
    query, key, value = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    frames = (x.view(-1, PATCHES, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    seen = F.scaled_dot_product_attention(*frames)  # [N, heads, PATCHES, d]
    return attention.proj(seen.transpose(1, 2).reshape(hidden.shape))


def _transformers_4(rope_theta: float) -> dict[str, Any]:
    """What transformers 4 reads in the decoder's configuration; 5 understands it and writes it elsewhere."""
    return {
        "tie_word_embeddings": True,
        "rope_theta": rope_theta,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
    }


def _config(rope_theta: float, max_positions: int) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config={
            "vocab_size": _VOCABULARY,
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": max_positions,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            **_transformers_4(rope_theta),
            **_SPECIAL,
        },
        vision_config={
            "depth": 2,
            "embed_dim": _WIDTH,
            "hidden_size": _WIDTH,
            "num_heads": 4,
            "mlp_ratio": 4,
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "spatial_merge_size": 1,
            "initializer_range": 0.05,
        },
        image_token_id=IDS[IMAGE],
        video_token_id=IDS[VIDEO],
        vision_start_token_id=IDS[VISION_START],
        vision_end_token_id=IDS[VISION_END],
        tie_word_embeddings=True,
        **_SPECIAL,
    )
