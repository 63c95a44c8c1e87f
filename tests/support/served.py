"""Models, prompts and requests for the tests inside vLLM, and the same computed by Hugging Face with fftriton."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import rope, seeded
from PIL.Image import fromarray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import fftriton
from fftriton.layouts.layout import VideoLayout
from fftriton.methods.base import Method, MethodState, Prompt, VideoTokens, list_steps
from fftriton.needle.vocabulary import IMAGE as IMAGE_PAD
from fftriton.needle.vocabulary import SPECIAL, TOKENS, VISION_END, VISION_START
from fftriton.needle.vocabulary import VIDEO as VIDEO_PAD

TEXT = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 6, "pad_token_id": 0,
}  # fmt: skip
NEEDLE = Path(fftriton.__file__).parent / "assets" / "needle-qwen2vl"
WORDS = list(range(len(SPECIAL), len(TOKENS)))  # tokens that an answer may have
START = "<bos><sys><sys>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def write_qwen2_5_vl(folder: Path) -> Path:
    """A random Qwen2.5-VL with the shipped tokenizer; a token is 32 x 32 pixels of two frames."""
    text = TEXT | rope(rope_theta=1e4, mrope_section=[4, 6, 6])
    vision = {
        "depth": 2, "num_heads": 4, "hidden_size": 128, "intermediate_size": 128, "out_hidden_size": 128,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 64,
        "fullatt_block_indexes": [1], "tokens_per_second": 3,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_tokens())
    seeded(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    return _with_processor(folder, {"processor_class": "Qwen2_5_VLProcessor", "min_pixels": 4096, "max_pixels": 24576})


def _tokens() -> dict[str, int]:
    shipped = json.loads((NEEDLE / "config.json").read_text())
    marks = {"vision_start_token_id": TOKENS.index(VISION_START), "vision_end_token_id": TOKENS.index(VISION_END)}
    return {key: shipped[key] for key in ("image_token_id", "video_token_id")} | marks


def _with_processor(folder: Path, settings: dict[str, Any]) -> Path:
    """The shipped tokenizer and processors, for tokens of 2 x 2 patches of two frames."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NEEDLE / name, folder)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shipped = json.loads((NEEDLE / name).read_text()) | {"temporal_patch_size": 2, "merge_size": 2}
        if "size" in settings:
            shipped = {key: value for key, value in shipped.items() if not key.endswith("_pixels")}
        (folder / name).write_text(json.dumps(shipped | settings))
    return folder


def write_qwen3_vl(folder: Path, mixture: bool = False) -> Path:
    """A random Qwen3-VL with the shipped tokenizer, which knows no times; a token is 32 x 32 pixels of two frames.

    mixture: of experts.
    """
    experts = {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1,
        "norm_topk_prob": True,  # as transformers does; vLLM asks for it
    }  # fmt: skip
    text = TEXT | {"head_dim": 32, **rope(rope_theta=1e4, mrope_section=[6, 5, 5], mrope_interleaved=True)}
    vision = {
        "depth": 3, "num_heads": 4, "hidden_size": 128, "intermediate_size": 128, "out_hidden_size": 128,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0, 2],
        "num_position_embeddings": 64,
    }  # fmt: skip
    config_class, model_class = (
        (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
        if mixture
        else (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
    )
    config = config_class(
        text_config=text | experts if mixture else text, vision_config=vision, tie_word_embeddings=False, **_tokens()
    )
    seeded(model_class(config)).save_pretrained(folder)
    if mixture:  # published checkpoints have the matrices of experts the other way round
        weights = load_file(folder / "model.safetensors")
        turned = {k: v.mT.contiguous() if k.endswith(("gate_up_proj", "down_proj")) else v for k, v in weights.items()}
        save_file(turned, folder / "model.safetensors", {"format": "pt"})
    kinds = {"processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}
    size = {"size": {"shortest_edge": 4096, "longest_edge": 10**6}}
    return _with_processor(folder, kinds | size)


def write_llava_onevision(folder: Path) -> Path:
    """A random LLaVA-OneVision with the shipped tokenizer; a token is a quarter of a frame."""
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2"} | rope(rope_theta=1e4),
        vision_config=vision | {"model_type": "siglip_vision_model"},
        image_grid_pinpoints=[[64, 64]], tie_word_embeddings=False, image_token_id=TOKENS.index(IMAGE_PAD),
        video_token_id=TOKENS.index(VIDEO_PAD),
    )  # fmt: skip
    model = seeded(LlavaOnevisionForConditionalGeneration(config))
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    tower = "vision_tower."  # published checkpoints have the names of transformers 4, which vLLM knows
    renamed = {key.replace(tower, f"{tower}vision_model."): value for key, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    size = {"height": 64, "width": 64}
    shipped = AutoTokenizer.from_pretrained(NEEDLE)
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[64, 64]]), shipped,
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=64, vision_feature_select_strategy="full",
        image_token=IMAGE_PAD, video_token=VIDEO_PAD,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def make_frames(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """[T, H, W, 3] uint8: blocks, some of which change from frame to frame."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 255, (1, height // 16, width // 16, 3))
    fresh = draw.integers(0, 255, (frames, height // 16, width // 16, 3))
    changed = draw.random((frames, height // 16, width // 16, 1)) < 0.3
    return np.where(changed, fresh, blocks).repeat(16, 1).repeat(16, 2).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Request:
    """One request.

    Args:
        text: the prompt, with placeholders.
        videos: [T, H, W, 3] uint8 each.
        images: [H, W, 3] uint8 each.
        relevance: of each video, one number a frame of tokens.
        fps: frames a second.
    """

    text: str
    videos: list[np.ndarray] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    relevance: list[list[float]] | None = None
    fps: float = 2.0

    def metadata(self, frames: np.ndarray) -> dict[str, Any]:
        count = len(frames)
        return {
            "total_num_frames": count, "fps": self.fps, "duration": count / self.fps,
            "frames_indices": list(range(count)),
        }  # fmt: skip

    def for_vllm(self) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if self.videos:
            data["video"] = [(one, self.metadata(one) | {"do_sample_frames": False}) for one in self.videos]
        if self.images:
            data["image"] = [fromarray(one) for one in self.images]
        request: dict[str, Any] = {"prompt": self.text, "multi_modal_data": data}
        if self.relevance is not None:
            request["mm_processor_kwargs"] = {"fftriton_relevance": self.relevance}
        return request


class EachVideo(Method):
    """A method before the first layer, applied to each video by itself, as vLLM has to do."""

    def __init__(self, method: Method, relevance: list[list[float]] | None, renumber: bool) -> None:
        self.method, self.relevance, self.renumber, self.budget = method, relevance, renumber, method.budget

    @property
    def renumbers(self) -> bool:
        return self.renumber

    def begin(self, prompt: Prompt) -> MethodState:
        return _EachVideoState(self, prompt)


class _EachVideoState(MethodState):
    def before_attention(self, layer: int, tokens: VideoTokens) -> Any:
        if layer:
            return []
        stays = tokens.patch[0] < 0
        parts = [part.clone() for part in (tokens.hidden, *tokens.additions)]
        for number, layout in enumerate(self.prompt.layouts):
            rows, (frames, patches) = layout.positions.flatten(), layout.positions.shape
            method = self.method.method
            if self.method.relevance is not None:
                method = replace(method, relevance=torch.tensor(self.method.relevance[number]))
            place = torch.arange(len(rows))[None]
            hidden, *additions = [part[:, rows] for part in parts]
            video = VideoTokens(hidden, place, place % patches, len(rows), additions=tuple(additions))
            alone = Prompt(1, len(rows), [VideoLayout(place.view(frames, patches))])
            left = [video, *list_steps(method.begin(alone).before_attention(0, video))][-1]
            kept = rows[left.position[0]]
            stays[kept] = True
            for part, shorter in zip(parts, (left.hidden, *left.additions), strict=True):
                part[0, kept] = shorter[0]
        kept = stays.nonzero()[:, 0][None]
        whole = replace(tokens, hidden=parts[0], additions=tuple(parts[1:]))
        left = whole.keep(kept, kept.shape[1] - int((tokens.patch < 0).sum()))
        if not self.method.renumber:
            return left
        return replace(left, companions=tuple(part[:, : left.length] for part in tokens.companions))


class HuggingFace:
    """A checkpoint in Hugging Face, whose positions are counted as in vLLM: on behind the largest one of a video."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self._answers: dict[Any, list[int]] = {}

    def log_probabilities(self, request: Request, method: Method, further: list[int] | None = None) -> Tensor:
        """[vocabulary] of the token after the prompt and `further` tokens."""
        inputs = self._inputs(request)
        more = torch.tensor([further or []], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs.pop("mm_token_type_ids", None)
        grids = hasattr(self.model.config.vision_config, "spatial_merge_size")
        if grids:
            inputs["position_ids"] = self._positions(inputs)
        with torch.no_grad(), fftriton.reduce(self.model, EachVideo(method, request.relevance, renumber=not grids)):
            return self.model(**inputs).logits[0, -1].log_softmax(-1)

    def answer(self, request: Request, method: Method, count: int) -> list[int]:
        """The likeliest tokens, one after the other, without a cache of keys and values."""
        media = [hashlib.sha256(one.tobytes()).digest() for one in (*request.videos, *request.images)]
        tokens = self._answers.setdefault((request.text, *media, str(request.relevance), str(method)), [])
        while len(tokens) < count:
            tokens.append(WORDS[int(self.log_probabilities(request, method, tokens)[WORDS].argmax())])
        return tokens[:count]

    def _inputs(self, request: Request) -> dict[str, Tensor]:
        arguments: dict[str, Any] = {"text": [request.text], "return_tensors": "pt"}
        if request.videos:
            arguments["videos"] = request.videos
            metadata = [request.metadata(one) for one in request.videos]
            arguments["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
        if request.images:
            arguments["images"] = [fromarray(one) for one in request.images]
        return dict(self.processor(**arguments))

    def _positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """[3, 1, N]."""
        config = self.model.config
        merge, ids = config.vision_config.spatial_merge_size, inputs["input_ids"][0].tolist()
        speeds = inputs.get("second_per_grid_ts")
        per_second = getattr(config.vision_config, "tokens_per_second", 1)
        grids_of = {key: inputs.get(f"{key}_grid_thw", torch.empty(0, 3)).tolist() for key in ("image", "video")}
        if config.model_type.startswith("qwen3"):  # text stands between frames
            grids_of["video"] = [[1, h, w] for t, h, w in grids_of["video"] for _ in range(t)]
        grids = {key: iter(found) for key, found in grids_of.items()}
        seconds = iter([1.0] * 99 if speeds is None else [float(one) for one in speeds])
        positions: list[tuple[int, ...]] = []
        following = at = 0
        while at < len(ids):
            kind = {config.image_token_id: "image", config.video_token_id: "video"}.get(ids[at])
            if kind is None:
                positions.append((following,) * 3)
                following, at = following + 1, at + 1
                continue
            t, h, w = next(grids[kind])
            h, w, speed = h // merge, w // merge, per_second * next(seconds) if kind == "video" else 1
            grid = [(int(i * speed), j, k) for i in range(t) for j in range(h) for k in range(w)]
            positions += [tuple(following + part for part in one) for one in grid]
            following, at = following + 1 + max(map(max, grid)), at + t * h * w
        return torch.tensor(positions).T[:, None]
