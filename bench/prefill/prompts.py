"""The models and prompts that prefills are timed on: real shapes, random weights, videos of given redundancy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import fftriton

PATCHES = 210  # of a frame, as LLaVA-Video has them
TEXT = 40  # tokens on either side of the video
NOISE = 0.5  # added to repeated patches, whose cosine with the one before is then about 0.8
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
SHAPES = {
    "toy": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "0.5B": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "1.5B": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
    "7B": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Videos between two texts.

    Args:
        embeddings: [B, N, D], the same number of tokens in each sample.
        layout: where the videos stand, one a sample.
    """

    embeddings: Tensor
    layout: list[fftriton.VideoLayout]


def make_model(
    shape: str, dtype: torch.dtype, device: str, *, attention: str = "sdpa", **changes: int
) -> Qwen2ForCausalLM:
    """A Qwen2 of this shape with random weights, which are made on the device; `changes` are fields of its config."""
    config = Qwen2Config(**SHAPES[shape] | SPECIAL | changes, max_position_embeddings=2**17, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype).eval()


def make_prompt(
    model: Any, frames: int, *, batch: int = 1, patches: int = PATCHES, text: int = TEXT, redundancy: float = 0.5
) -> Prompt:
    """Videos as hidden states in which a share `redundancy` of the patches repeats that of the frame before."""
    like, positions = next(model.parameters()), torch.arange(frames * patches).view(frames, patches) + text
    generator = torch.Generator(like.device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=like.device, dtype=like.dtype)

    width = model.config.hidden_size
    fresh = torch.rand(batch, frames, patches, generator=generator, device=like.device) >= redundancy
    fresh[:, 0] = True
    frame = torch.arange(frames, device=like.device)[:, None]
    shown_since = torch.where(fresh, frame, 0).cummax(1).values  # [B, F, P], the frame that a patch repeats
    video = random(batch, frames, patches, width)
    video = video.gather(1, shown_since[..., None].expand_as(video)).add_(random(*video.shape), alpha=NOISE)
    parts = (random(batch, text, width), video.flatten(1, 2), random(batch, text, width))
    layout = [fftriton.VideoLayout(positions, sample=sample) for sample in range(batch)]
    return Prompt(torch.cat(parts, 1), layout)


def methods(budget: float, frames: int) -> dict[str, fftriton.Method]:
    """What is compared with the dense prefill, by name. KVTP's scores are given, so no predictor runs."""
    relevance = torch.linspace(-1, 1, frames)
    return {
        "framefusion": fftriton.FrameFusion(budget),
        "fastv": fftriton.FastV(budget),
        "kvtp": fftriton.KVTP(budget, relevance=lambda _: relevance),
        "temporalmerge": fftriton.TemporalMerge(budget),
        "anchors": fftriton.Anchors(budget),
    }
