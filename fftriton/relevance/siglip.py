"""Relevance of frames by SigLIP: one logit per frame and question; the features of a video serve for all questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from ..checks import check_count, first_line
from ..hf.compat import pooled
from .bound import BoundRelevance, Encoded
from .fusion import ContextFusion
from .patches import Heard, join_patches, listening, patch_grid

HEAD_FILE = "context_fusion.safetensors"
"""File name of the head in a checkpoint folder."""

Frames = np.ndarray | Tensor | Sequence[Any]


class SiglipRelevance:
    """Scores frames by a SigLIP or SigLIP 2 model: logit_scale * cos(frame, question) + logit_bias.

        relevance = SiglipRelevance.from_pretrained("google/siglip-so400m-patch14-384")
        features = relevance.encode(video.frames)                  # once per video
        with fftriton.reduce(model, fftriton.KVTP(0.2, relevance.bind(features, question))):
            ...

    A question that is too long for the text tower is split, and the highest logit counts. Questions are converted to
    lower case and padded to the full length, as in the training of SigLIP.

    Args:
        model: a SiglipModel or Siglip2Model (NaFlex).
        tokenizer, image_processor: those of the model.
        head: context fusion head; None scores each frame by itself.
        batch_size: number of frames that are encoded at a time.

    Raises:
        TypeError: the model is of another kind.
        ValueError: a parameter is out of range.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, image_processor: Any,
        head: ContextFusion | None = None, batch_size: int = 32,
    ) -> None:  # fmt: skip
        check_count("SiglipRelevance", "batch_size", batch_size, 1)
        if not all(hasattr(model, name) for name in ("get_image_features", "get_text_features", "logit_bias")):
            raise TypeError(f"SiglipRelevance: model must be a SiglipModel or Siglip2Model, got {type(model).__name__}")
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.head = None if head is None else head.to(model.device)
        self.batch_size = batch_size
        self._macs: dict[Any, float] = {}

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path, head: str | Path | ContextFusion | None = None, batch_size: int = 32,
        trust_remote_code: bool = False, **arguments: Any,
    ) -> SiglipRelevance:  # fmt: skip
        """Load a checkpoint, with the head in its folder if there is one.

        Args:
            checkpoint: folder, or name on the Hugging Face hub.
            head: a head, or the path of its file, to use instead.
            batch_size: as for the class.
            trust_remote_code: whether to run the checkpoint's own code if it has any.
            arguments: passed to the model's `from_pretrained`, such as dtype and device_map.

        Raises:
            OSError: the checkpoint cannot be read.
            TypeError: the checkpoint is not a SigLIP.
            ValueError: the checkpoint needs code that is not trusted.
        """
        model = AutoModel.from_pretrained(checkpoint, trust_remote_code=trust_remote_code, **arguments).eval()
        inside = Path(checkpoint) / HEAD_FILE
        if head is None and inside.is_file():
            head = inside
        if isinstance(head, str | Path):
            head = ContextFusion.load(head)
        tokenizer, image_processor = (
            part.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
            for part in (AutoTokenizer, AutoImageProcessor)
        )
        return cls(model, tokenizer, image_processor, head, batch_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model, tokenizer, image processor and head to a folder."""
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)
        if self.head is not None:
            self.head.save(Path(folder) / HEAD_FILE)

    def to(self, device: torch.device | str) -> SiglipRelevance:
        """Move the model and the head to a device."""
        self.model.to(device)
        if self.head is not None:
            self.head.to(device)
        return self

    def encode(self, frames: Frames, progress: bool = True) -> Tensor:
        """Compute the features of a video's frames, which serve for any question.

        Args:
            frames: [T, H, W, 3] uint8, as an array or a tensor, or a list of T pictures.
            progress: whether to show a progress bar on standard error.

        Returns:
            [T, D] fp32 on the model's device, not normalised.

        Raises:
            ValueError: frames is empty or has another shape.
        """
        return self.look(frames, progress=progress).features

    def look(self, frames: Frames, patches: bool = False, progress: bool = True) -> Encoded:
        """Compute all that `bind` needs of a video, once for all questions.

        Args:
            frames, progress: as for `encode`.
            patches: whether also to keep the attention and the keys of the vision tower's pooling head.

        Raises:
            ValueError: frames is empty or has another shape, or the tower has no such head.
        """
        frames = _as_pictures(frames)
        starts = range(0, len(frames), self.batch_size)
        bar = track(starts, "frames", console=Console(stderr=True), transient=True, disable=not progress)
        parts, shapes, begin = [], [], self._now()
        hearing: AbstractContextManager[Heard] = listening(self.model) if patches else nullcontext([])
        with torch.no_grad(), hearing as heard:
            for low in bar:
                pixels = self.pixels(frames[low : low + self.batch_size])
                shapes.append(patch_grid(self.model, pixels))
                parts.append(self.embed_images(pixels))
        features, seconds = torch.cat(parts), self._now() - begin
        found = join_patches(heard, shapes, frames[0]) if patches else None
        return Encoded(features, found, seconds, len(features) * self._macs_of_a_frame(frames))

    def score(self, features: Tensor, question: str) -> Tensor:
        """Relevance logits [T] fp32 from features [T, D] of `encode`; higher is more relevant."""
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"SiglipRelevance: question must be a non-empty string, got {question!r}")
        with torch.no_grad():
            return self.logits(features, self.embed_texts(self.chunks(question))).amax(-1)

    def __call__(self, frames: Frames, question: str) -> Tensor:
        """Relevance logits [T] fp32 of frames, given as for `encode`."""
        return self.score(self.encode(frames), question)

    def bind(self, video: Frames | Encoded, question: str, patches: bool = False) -> BoundRelevance:
        """The relevance of one video to one question, for `fftriton.KVTP`.

        Args:
            video: what `look` or `encode` returned, or frames as they take them: the T frames that the language model
                gets, in order.
            question: question about the video.
            patches: whether the relevance is to bring along the importance and keys of patches, for pruners.

        Raises:
            ValueError: an empty question, or patches of features that were made without them.
        """
        if isinstance(video, Tensor) and video.ndim == 2:
            video = Encoded(video)
        elif not isinstance(video, Encoded):
            video = self.look(video, patches)
        if patches and video.patches is None:
            raise ValueError("SiglipRelevance: video must be frames or made by look(frames, patches=True) for patches")
        begin = self._now()
        scores = self.score(video.features, question)
        seconds = self._now() - begin
        return BoundRelevance(
            scores,
            video.seconds + seconds,
            video.macs + self._macs_of_texts(question),
            video.patches if patches else None,
        )  # fmt: skip

    def _now(self) -> float:
        """Seconds on a clock, once the device has done its work."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _macs_of_a_frame(self, frames: Any) -> float:
        """Multiply-accumulates of the vision tower for a picture of this size; counted once."""
        shape = tuple(np.asarray(frames[0]).shape)
        if shape not in self._macs:
            self._macs[shape] = count_macs(lambda: self.embed_images(self.pixels(frames[:1])))
        return self._macs[shape]

    def _macs_of_texts(self, question: str) -> float:
        """Multiply-accumulates of the text tower for a question."""
        if "text" not in self._macs:
            self._macs["text"] = count_macs(lambda: self.embed_texts([""]))
        return len(self.chunks(question)) * self._macs["text"]

    # ---- the steps, with gradients

    def pixels(self, pictures: np.ndarray | Sequence[Any]) -> dict[str, Tensor]:
        """Inputs of the vision tower for pictures, on the model's device."""
        pixels = self.image_processor(images=list(pictures), return_tensors="pt")
        return {name: value.to(self.model.device) for name, value in pixels.items()}

    def embed_images(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Embeddings [T, D] fp32 of the output of `pixels`."""
        images = {**pixels, "pixel_values": pixels["pixel_values"].to(self.model.dtype)}
        return pooled(self.model.get_image_features(**images)).float()

    def chunks(self, question: str) -> list[str]:
        """The question in lower case, split in halves between words until no part has too many tokens."""
        words = question.lower().split()
        if len(words) == 1 or len(self.tokenizer(" ".join(words))["input_ids"]) <= self._longest:
            return [" ".join(words)]
        middle = len(words) // 2
        return self.chunks(" ".join(words[:middle])) + self.chunks(" ".join(words[middle:]))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [C, D] fp32 of texts, none of which is too long for the text tower."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self._longest, truncation=True, return_tensors="pt"
        )
        return pooled(self.model.get_text_features(input_ids=tokens["input_ids"].to(self.model.device))).float()

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits: images [..., T, D], texts [..., C, D] -> [..., T, C], fused by the head if there is one."""
        if self.head is not None:
            cosine = self.head(images, texts)
        else:
            cosine = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).mT
        return self.model.logit_scale.float().exp() * cosine + self.model.logit_bias.float()

    @property
    def _longest(self) -> int:
        return self.model.config.text_config.max_position_embeddings


def count_macs(function: Callable[[], Any]) -> float:
    """The multiply-accumulates of the products in a call, each of which counts once."""
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        function()
    return counter.get_total_flops() / 2


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the attention on a CPU, which the counter does not know; the arguments are shapes."""
    return sdpa_flop_count(query, key, value)


def _as_pictures(frames: Frames) -> np.ndarray | Sequence[Any]:
    """A sequence of pictures that image processors accept."""
    if isinstance(frames, Tensor):
        frames = frames.cpu().numpy()
    if isinstance(frames, np.ndarray) and (frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8):
        raise ValueError(
            f"SiglipRelevance: frames must be [T, H, W, 3] uint8, got {list(frames.shape)} of {frames.dtype}"
        )
    if len(frames) == 0:
        raise ValueError("SiglipRelevance: frames must contain at least one picture, got none")
    return frames


def load_relevance(checkpoint: str, head: ContextFusion | None = None) -> SiglipRelevance:
    """Load the predictor of a checkpoint, with the head in its folder if none is given.

    Raises:
        ValueError: the checkpoint cannot be read, is not a SigLIP, or needs its own code, which no SigLIP does.
    """
    try:
        return SiglipRelevance.from_pretrained(checkpoint, head)
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"relevance must be the checkpoint of a SigLIP, got '{checkpoint}': {reason}") from error
