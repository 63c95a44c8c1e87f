"""Model inputs from a video and a question.

If torchvision can be imported, Hugging Face's own processor makes the inputs, for every model that has one. Otherwise
(PyPI has no build of torchvision for a CPU build of torch) `QwenProcessor` makes those of Qwen2-VL, Qwen2.5-VL and the
small shipped model; its outputs equal Hugging Face's bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .checkpoints import load_config, load_part
from .sampling import FrameRule, Sampling, frame_rule
from .unusable import torchvision_works
from .video import Video

QWEN_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")


class Processor(Protocol):
    """A function from a video and a question to the arguments of `model.generate`."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, video: Video, question: str) -> dict[str, Tensor]: ...

    def frame_rule(self, sampling: Sampling) -> FrameRule:
        """Which frames to take from a video; what `sampling` leaves open is decided by the checkpoint."""


def load_processor(
    checkpoint: str | Path,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Processor:
    """Load the processor of a checkpoint.

    Args:
        checkpoint: folder, or name on the Hugging Face hub.
        max_pixels: maximum pixels per frame after resizing; None for the checkpoint's own.
        trust_remote_code: whether to run the checkpoint's own code if it has any.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.

    Returns:
        Hugging Face's processor if torchvision can be imported, otherwise a `QwenProcessor`.

    Raises:
        ValueError: torchvision cannot be imported and the checkpoint is of another family; or the checkpoint cannot be
            read, or needs code that is not trusted.
    """
    model_type = load_config(checkpoint, trust_remote_code, revision).model_type  # raises if its code cannot be run
    if torchvision_works():
        return HubProcessor(checkpoint, max_pixels, trust_remote_code, revision)
    if model_type not in QWEN_MODEL_TYPES:
        raise ValueError(
            f"model must be one of {', '.join(QWEN_MODEL_TYPES)} if torchvision cannot be imported, got {model_type}"
        )
    return QwenProcessor(checkpoint, max_pixels, trust_remote_code, revision)


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Words of `text` that are missing from a word-level vocabulary; empty for vocabularies of subwords."""
    if tokenizer.unk_token_id is None:
        return []
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [text[start:end] for token, (start, end) in spans if token == tokenizer.unk_token_id]


class HubProcessor:
    """Hugging Face's processor. Needs torchvision.

    Args:
        checkpoint: folder, or name on the hub.
        max_pixels: maximum pixels per frame, if the processor supports it; None for the checkpoint's own.
        trust_remote_code: whether to run the checkpoint's own code if it has any.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.

    Raises:
        ValueError: the checkpoint has no processor for videos, has frames of a fixed size although `max_pixels` is
            given, or needs code that is not trusted.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        max_pixels: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ):
        self._processor = load_part(AutoProcessor, checkpoint, trust_remote_code, revision)
        if getattr(self._processor, "video_processor", None) is None:
            raise ValueError(f"model must have a processor for videos, got '{checkpoint}'")
        self.tokenizer: PreTrainedTokenizerBase = self._processor.tokenizer
        self._max_pixels = max_pixels
        if max_pixels is not None:
            size = dict(self._processor.video_processor.size)
            if size.get("longest_edge") is None or size.get("shortest_edge") is None:
                raise ValueError(
                    f"max_pixels must be None for a model whose frames have a fixed size, got {max_pixels}"
                )
            self._size, self._of_video = size, _bounds_videos(self._processor.video_processor)

    def __call__(self, video: Video, question: str) -> dict[str, Tensor]:
        """Tokens and pixels for one video and one question, by the names of the model's arguments.

        Raises:
            ValueError: the question contains a placeholder of a video or an image.
        """
        names = ("video_token", "image_token")
        _check_question(question, [getattr(self._processor, name, None) for name in names])
        text = self._processor.apply_chat_template(_messages(question), tokenize=False, add_generation_prompt=True)
        limit = self._max_pixels
        bounds = {} if limit is None else {"size": self._bounds(limit, len(video.frames))}
        encoded = self._processor(
            text=[text],
            videos=[video.frames],
            video_metadata=[_metadata(video)],
            fps=video.sampled_fps,  # transformers 4 reads it here, 5 in the metadata
            do_sample_frames=False,
            return_tensors="pt",
            **bounds,
        )
        return dict(encoded)

    def frame_rule(self, sampling: Sampling) -> FrameRule:
        """Which frames to take from a video; what `sampling` leaves open is decided by the checkpoint's processor."""
        return frame_rule(sampling, self._processor.video_processor)

    def _bounds(self, max_pixels: int, frames: int) -> dict[str, int]:
        """The size by which the video processor bounds the pixels of each of so many frames."""
        longest, shortest = self._size["longest_edge"], self._size["shortest_edge"]
        if self._of_video:
            together = getattr(self._processor.video_processor, "temporal_patch_size", None) or 1
            counted = min(frames, max(1, round(frames / together)) * together)  # by some processors
            return {"longest_edge": min(max_pixels * counted, longest), "shortest_edge": min(shortest, max_pixels)}
        return {"longest_edge": max_pixels, "shortest_edge": min(shortest, max_pixels)}


def _bounds_videos(processor: Any) -> bool:
    """Whether the `size` of a video processor bounds the pixels of whole videos (as Qwen3-VL's), not of frames.

    Raises:
        ValueError: it does not say how it has cut its frames.
    """
    size, areas = processor.size, []
    try:
        processor.size = {"longest_edge": 128 * 128, "shortest_edge": 32 * 32}
        for count in (2, 8):
            frames = np.zeros((count, 256, 256, 3), np.uint8)
            metadata = _metadata(Video(frames, list(range(count)), count, 1.0))
            cut = processor(videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
            if "video_grid_thw" not in cut:
                raise ValueError(f"max_pixels must be None for {type(processor).__name__}, which returns no grid")
            areas.append(int(torch.as_tensor(cut["video_grid_thw"])[0, 1:].prod()))
    finally:
        processor.size = size
    return areas[1] < areas[0]


@dataclass(frozen=True)
class QwenPixels:
    """Parameters by which Qwen2-VL cuts frames into patches.

    Attributes:
        patch_size: pixels along the side of a patch.
        temporal_patch_size: frames per patch.
        merge_size: patches along the side of the square that becomes one token.
        min_pixels, max_pixels: bounds on the pixels of a frame after resizing.
        mean, std: mean and standard deviation of the colour channels, for values in [0, 1].
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path, revision: str | None = None) -> QwenPixels:
        """Read the checkpoint's configuration files; the defaults above are those of Hugging Face."""
        config = _video_config(checkpoint, revision)
        size = config.get("size") or {}
        named = {
            "patch_size": config.get("patch_size"),
            "temporal_patch_size": config.get("temporal_patch_size"),
            "merge_size": config.get("merge_size"),
            "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
            "mean": config.get("image_mean"),
            "std": config.get("image_std"),
        }
        return cls(**{name: value for name, value in named.items() if value is not None})

    def patchify(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Resize and normalise frames and cut them into rows of one patch each.

        The last frame is repeated up to a multiple of temporal_patch_size. Rows are ordered by frame, and inside a
        frame by merge square, so that merge_size**2 consecutive rows become one token.

        Args:
            frames: [F, 3, H, W] uint8.

        Returns:
            pixels [t * h * w, 3 * temporal_patch_size * patch_size**2] float32, grid [1, 3] int64 holding (t, h, w).
        """
        height, width = frames.shape[-2:]
        height, width = smart_resize(height, width, self.patch_size * self.merge_size, self.min_pixels, self.max_pixels)
        if frames.shape[-2:] != (height, width):
            frames = F.interpolate(frames, size=(height, width), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255.0 for values in (self.mean, self.std))
        video = (frames.float() - mean) / std
        padding = -len(video) % self.temporal_patch_size
        video = torch.cat([video, video[-1:].expand(padding, -1, -1, -1)])
        t, h, w = len(video) // self.temporal_patch_size, height // self.patch_size, width // self.patch_size
        blocks = video.view(
            t, self.temporal_patch_size, 3,
            h // self.merge_size, self.merge_size, self.patch_size,
            w // self.merge_size, self.merge_size, self.patch_size,
        )  # fmt: skip
        rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # [t, h/m, w/m, m, m, 3, tp, p, p]
        return rows.reshape(t * h * w, -1), torch.tensor([[t, h, w]])


class QwenProcessor:
    """The processor of Qwen2-VL and Qwen2.5-VL, without torchvision.

    Args:
        checkpoint: folder, or name on the hub.
        max_pixels: maximum pixels per frame after resizing; None for the checkpoint's own.
        trust_remote_code: whether to run the checkpoint's own code if it has any.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        max_pixels: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ):
        pixels = QwenPixels.from_checkpoint(checkpoint, revision)
        if max_pixels is not None:
            pixels = replace(pixels, max_pixels=max_pixels, min_pixels=min(pixels.min_pixels, max_pixels))
        config = load_config(checkpoint, trust_remote_code, revision)
        self.tokenizer: PreTrainedTokenizerBase = load_part(AutoTokenizer, checkpoint, trust_remote_code, revision)
        self._pixels = pixels
        self._video_token_id = config.video_token_id
        self._has_seconds = config.model_type == "qwen2_5_vl"  # its positions count seconds
        self._template = chat_template(checkpoint, revision)
        frames = {"min_frames": 4, "max_frames": 768, "temporal_patch_size": pixels.temporal_patch_size}
        self._frames = SimpleNamespace(**frames | _video_config(checkpoint, revision) | {"do_sample_frames": False})

    def __call__(self, video: Video, question: str) -> dict[str, Tensor]:
        """Tokens and pixels for one video and one question.

        Returns:
            input_ids, attention_mask, mm_token_type_ids [1, N] int64 (2 marks video), pixel_values_videos [n, D]
            float32, video_grid_thw [1, 3] int64 and, for Qwen2.5-VL, second_per_grid_ts [1] float32.

        Raises:
            ValueError: the question contains the placeholder of a video.
        """
        placeholder = str(self.tokenizer.convert_ids_to_tokens(self._video_token_id))
        _check_question(question, [placeholder])
        frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2).contiguous()
        pixels, grid = self._pixels.patchify(frames)
        text = self.tokenizer.apply_chat_template(
            _messages(question), chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        num_tokens = len(pixels) // self._pixels.merge_size**2
        encoded = self.tokenizer(str(text).replace(placeholder, placeholder * num_tokens), return_tensors="pt")
        inputs = {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "mm_token_type_ids": 2 * (encoded["input_ids"] == self._video_token_id).long(),
            "pixel_values_videos": pixels,
            "video_grid_thw": grid,
        }
        if self._has_seconds:
            inputs["second_per_grid_ts"] = torch.tensor([self._pixels.temporal_patch_size / video.sampled_fps])
        return inputs

    def frame_rule(self, sampling: Sampling) -> FrameRule:
        """Which frames to take from a video; what `sampling` leaves open is decided by the checkpoint's files."""
        return frame_rule(sampling, self._frames)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen2-VL's frame size: multiples of `factor`, min_pixels to max_pixels in total, aspect ratio almost kept.

    Args:
        height, width: size of the frame.
        factor: pixels along the side of one token's square.
        min_pixels, max_pixels: bounds of height * width.

    Returns:
        (height, width) to resize to.

    Raises:
        ValueError: one side is more than 200 times as long as the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"video must have sides within a factor of 200, got frames of {width}x{height}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def _metadata(video: Video) -> dict[str, Any]:
    """What Hugging Face's processors know of a video; they take a frame's number over the rate as its time."""
    places = [time * video.fps for time in video.times]
    regular = all(abs(place - index) < 0.5 for place, index in zip(places, video.indices, strict=True))
    total = video.total_frames if video.seconds is None else video.seconds * video.fps
    return {
        "total_num_frames": total,
        "fps": video.fps,
        "frames_indices": video.indices if regular else places,
    }


def _check_question(question: str, placeholders: Iterable[Any]) -> None:
    """Raise if a question contains what stands for a video or an image in the prompt."""
    for placeholder in placeholders:
        if isinstance(placeholder, str) and placeholder and placeholder in question:
            raise ValueError(f"question must not contain '{placeholder}', which stands for a video, got '{question}'")


def _messages(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def _read_file(checkpoint: str | Path, name: str, revision: str | None) -> str | None:
    """The text of a checkpoint's file, local or from the hub; None if it does not exist."""
    path = cached_file(str(checkpoint), name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path).read_text(encoding="utf-8")


def _video_config(checkpoint: str | Path, revision: str | None) -> dict[str, Any]:
    """The configuration of the video processor, from the first file in which Hugging Face looks for it."""
    nested = _read_file(checkpoint, "processor_config.json", revision)
    if nested is not None and "video_processor" in json.loads(nested):
        return json.loads(nested)["video_processor"]
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        text = _read_file(checkpoint, name, revision)
        if text is not None:
            return json.loads(text)
    return {}


def chat_template(checkpoint: str | Path, revision: str | None = None) -> str | None:
    """The processor's template, which supports videos; None to use the tokenizer's."""
    text = _read_file(checkpoint, "chat_template.jinja", revision)
    if text is not None:
        return text
    legacy = _read_file(checkpoint, "chat_template.json", revision)
    return None if legacy is None else json.loads(legacy)["chat_template"]
