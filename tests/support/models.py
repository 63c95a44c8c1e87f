"""Tiny models and inputs for the integration tests."""

import functools
import inspect
import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fftriton

TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
VISION_KEYS = (
    "depth", "embed_dim", "hidden_size", "mlp_ratio", "num_heads", "in_channels", "patch_size",
    "spatial_merge_size", "temporal_patch_size",
)  # fmt: skip
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


CACHE = "cache" if "cache" in inspect.signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"
"""What this release of transformers calls the KV cache."""


def behind(cache):
    """The argument of a forward, or of generate, that puts its tokens behind what a KV cache holds."""
    return {CACHE: cache}


def cache_of(output):
    """The KV cache that a forward, or generate, filled."""
    return getattr(output, CACHE)


def patch_layout(patch):
    """The layout of one video whose tokens carry their patch index, -1 for text, frame after frame."""
    positions = (patch >= 0).nonzero()[:, 0]
    return fftriton.VideoLayout(positions.view(-1, int(patch.max()) + 1))


def rope(**more):
    """Rotary settings under the names of every transformers release: 5.x reads the first, 4.x the others."""
    parameters = {"rope_type": "default", **more}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {"rope_parameters": parameters, "rope_theta": parameters["rope_theta"], "rope_scaling": scaling}


@functools.cache
def golden_model(folder, name):
    """A model of the recorded cases; weights are stored as bf16, exactly."""
    config = json.loads((folder / f"{name}.config.json").read_text())
    weights = {key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()}
    text = {key: config[key] for key in TEXT_KEYS} | NO_SPECIAL
    if config["model_type"] == "qwen2":
        settings = Qwen2Config(
            **text, tie_word_embeddings=config["tie_word_embeddings"], **rope(rope_theta=config["rope_theta"])
        )
        model = Qwen2ForCausalLM(settings)
    else:
        section = config["rope_scaling"]["mrope_section"]
        text |= rope(rope_theta=config["rope_theta"], mrope_section=section)
        vision = {key: config["vision_config"][key] for key in VISION_KEYS if key in config["vision_config"]}
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        settings = Qwen2VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=config["tie_word_embeddings"],
            **{key: config[key] for key in ids},
        )  # fmt: skip
        model = Qwen2VLForConditionalGeneration(settings)
        weights = {_renamed(key): value for key, value in weights.items()}
    model.load_state_dict(weights, strict=True)
    return model.float().eval()


def _renamed(key):
    if key.startswith("visual."):
        return "model." + key
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


TEXT = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, **NO_SPECIAL,
}  # fmt: skip
TOKENS = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def seeded(model, std=0.12):
    """The model with weights of fixed random values."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith(("A_log", "class_embedding", "image_newline")):
            parameter.data.normal_(std=std, generator=generator)
    return model.float().eval()


@functools.cache
def tiny_qwen2(num_layers=5, attention="sdpa"):
    """A random Qwen2ForCausalLM of `num_layers` layers."""
    config = Qwen2Config(**TEXT, num_hidden_layers=num_layers, **rope(rope_theta=1e4))
    return seeded(Qwen2ForCausalLM._from_config(config, attn_implementation=attention))


@functools.cache
def tiny_qwen2_vl(num_layers=5, attention="sdpa"):
    """A random Qwen2VLForConditionalGeneration."""
    text = TEXT | {"num_hidden_layers": num_layers} | rope(rope_theta=1e4, mrope_section=[2, 3, 3])
    vision = VISION | {"embed_dim": 32, "hidden_size": 64}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return seeded(Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attention))


@functools.cache
def tiny_qwen2_5_vl(num_layers=5, attention="sdpa"):
    """A random Qwen2_5_VLForConditionalGeneration."""
    text = TEXT | {"num_hidden_layers": num_layers} | rope(rope_theta=1e4, mrope_section=[2, 3, 3])
    vision = VISION | {
        "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "window_size": 16,
        "fullatt_block_indexes": [0], "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return seeded(Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention))


def video_prompt(grids=((4, 4, 6), (3, 4, 4)), image=True, motion=0.3, seed=0):
    """Inputs of the Qwen2-VL families: text, an image, videos of t frames that change by `motion`, text."""
    generator = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(2, 140, (count,), generator=generator).tolist()

    def patches(t, h, w):
        first = torch.randn(1, h * w, 96, generator=generator)
        change = torch.randn(t, h * w, 96, generator=generator) * motion
        return (first + change.cumsum(0)).reshape(t * h * w, 96)

    ids, inputs = words(5), {}
    if image:
        ids += [152] + [150] * 4 + [153] + words(3)
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "pixel_values": patches(1, 4, 4)}
    for t, h, w in grids:
        ids += [152] + [151] * (t * h * w // 4) + [153] + words(4)
    ids = torch.tensor([ids + words(6)])
    if "mm_token_type_ids" in inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters:  # from 5.x on
        inputs["mm_token_type_ids"] = (ids == 150).int() + 2 * (ids == 151).int()
    inputs |= {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "video_grid_thw": torch.tensor(grids),
        "pixel_values_videos": torch.cat([patches(*grid) for grid in grids]),
    }
    return inputs


def video_embeddings(frames, patches, kind="mixed", before=3, after=4, seed=0):
    """[1, N, 64] embeddings of a video between text, and its layout. kind: static, mixed or unrelated frames."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, patches, 64, generator=generator)
    noise = torch.randn(frames, patches, 64, generator=generator)
    fresh = torch.rand(frames, patches, 1, generator=generator) < 0.4
    video = {"static": first + 0.05 * noise, "mixed": torch.where(fresh, noise, first), "unrelated": noise}[kind]
    text = torch.randn(2, before + after, 64, generator=generator)
    row = torch.cat([text[0, :before], video.flatten(0, 1), text[1, :after]])
    positions = torch.arange(before, before + frames * patches).view(frames, patches)
    return row[None], [fftriton.VideoLayout(positions)]


def qwen2():
    """A model, its inputs and their layout, as the next two; this one has no videos of its own."""
    embeddings, layout = video_embeddings(6, 8)
    return tiny_qwen2(), {"inputs_embeds": embeddings}, layout


def qwen2_vl():
    return tiny_qwen2_vl(), video_prompt(), None


def qwen2_5_vl():
    return tiny_qwen2_5_vl(), video_prompt(), None


QWEN_FAMILIES = pytest.mark.parametrize("family", [qwen2, qwen2_vl, qwen2_5_vl])


@dataclass(frozen=True)
class Listening(fftriton.Method):
    """Keeps everything, and notes the attention that tokens receive.

    Args:
        queries: the last ones whose attention counts; None for all.
        layers: that are asked; None for all.
        received: [N] by layer.
    """

    queries: int | None = None
    layers: tuple[int, ...] | None = None
    received: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)

    def begin(self, prompt):
        return _ListeningState(self, prompt)


class _ListeningState(fftriton.methods.MethodState):
    def wants_attention(self, layer):
        return self.method.layers is None or layer in self.method.layers

    def after_attention(self, layer, tokens):
        if tokens.attention is not None:
            self.method.received[layer] = tokens.attention(self.method.queries)[0]
        return []


def snapshot(model):
    """All that a reduction touches, by module: attributes and hooks; and transformers' registry of attentions."""
    state = {"registry": sorted(ALL_ATTENTION_FUNCTIONS)}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key != "rope_deltas":  # the models' own note of their last prompt
                state[name, key] = list(value) if "hook" in key and isinstance(value, dict) else id(value)
    return state
