"""What the pooling head of a vision tower says about the patches of its pictures: importance and keys for pruners."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods import FrameContext

Heard = list[tuple[Tensor, Tensor]]
"""For each batch of pictures the attention [T, N] of a pooling head and its keys [T, N, E]."""


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of a video's T pictures, as the pooling head of a tower sees them.

    Args:
        attention: [T, h, w] fp32: the head's attention to each patch, the mean over its heads.
        keys: [T, h, w, E] fp32: its keys.
        aspect: height of a picture divided by its width.
    """

    attention: Tensor
    keys: Tensor
    aspect: float

    def importance(self, context: FrameContext) -> Tensor:
        """[F, P] fp32: the mean attention to the patches under each token."""
        return self._pooled(self.attention[..., None], context)[..., 0]

    def vectors(self, context: FrameContext) -> Tensor:
        """[F, P, E] fp32: the mean key of the patches under each token."""
        return self._pooled(self.keys, context)

    def _pooled(self, values: Tensor, context: FrameContext) -> Tensor:
        """[T, h, w, E] -> [F, P, E]: the mean over the place and the frames of each token."""
        frames, patches = context.present.shape
        grid = token_grid(patches, self.aspect)
        pooled = F.adaptive_avg_pool2d(values.movedim(-1, 1), grid).flatten(2).mT  # [T, P, E]
        size = group_size(len(pooled), frames)
        padding = pooled[-1:].expand(size * frames - len(pooled), -1, -1)
        return torch.cat([pooled, padding]).view(frames, size, patches, -1).mean(1)


def group_size(taken: int, frames: int) -> int:
    """How many of the frames that were taken a frame of tokens stands for: 1, or 2 as in Qwen2-VL.

    Raises:
        ValueError: neither fits.
    """
    size = -(-taken // frames)
    if size > 2 or -(-taken // size) != frames:
        raise ValueError(
            f"BoundRelevance: scores must be of the frames that the model gets, whose tokens make {frames} frames, "
            f"got {taken}"
        )
    return size


def token_grid(patches: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of a frame of P tokens: the divisors of P that fit its height by its width best."""
    rows = [n for n in range(1, patches + 1) if patches % n == 0]
    best = min(rows, key=lambda n: abs(math.log(n * n / patches / aspect)))
    return best, patches // best


@contextmanager
def listening(model: Any) -> Iterator[Heard]:
    """Inside the block, each call of the model's vision tower adds its attention [T, N] and its keys [T, N, E].

    Raises:
        ValueError: the tower has no pooling head of the kind that SigLIP has.
    """
    attention = getattr(getattr(model.vision_model, "head", None), "attention", None)
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        raise ValueError(
            "SiglipRelevance: model must have a pooling head with attention to score patches, got "
            f"{type(model.vision_model).__name__} without vision_model.head.attention"
        )
    heard: Heard = []

    def note(module: nn.MultiheadAttention, args: tuple, kwargs: dict, output: Any) -> None:
        keys = kwargs["key"] if "key" in kwargs else args[1]
        if not isinstance(output[1], Tensor):
            raise ValueError("SiglipRelevance: the pooling head must return its attention, got none")
        width = module.embed_dim
        bias = None if module.in_proj_bias is None else module.in_proj_bias[width : 2 * width]
        projected = F.linear(keys, module.in_proj_weight[width : 2 * width], bias)
        heard.append((output[1].mean(1).float(), projected.float()))

    handle = attention.register_forward_hook(note, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()


def patch_grid(model: Any, pixels: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of patches of pictures that are about to be encoded, which are all alike."""
    if "spatial_shapes" in pixels:  # SigLIP 2 with pictures of any shape
        rows, columns = pixels["spatial_shapes"][0].tolist()
        return rows, columns
    side = model.config.vision_config.patch_size
    height, width = pixels["pixel_values"].shape[-2:]
    return height // side, width // side


def join_patches(heard: Sequence[tuple[Tensor, Tensor]], shapes: Sequence[tuple[int, int]], picture: Any) -> Patches:
    """The patches of a video from what was heard of its batches of pictures.

    Raises:
        ValueError: the tower was not heard in every batch, or the pictures have several shapes.
    """
    if len(heard) != len(shapes) or len(set(shapes)) > 1:
        raise ValueError(
            f"SiglipRelevance: frames must be of one shape and pass through the pooling head, got shapes {set(shapes)} "
            f"in {len(shapes)} batches, of which {len(heard)} passed"
        )
    rows, columns = shapes[0]
    attention, keys = (torch.cat([part[:, : rows * columns] for part in parts]) for parts in zip(*heard, strict=True))
    height, width = np.asarray(picture).shape[:2]
    return Patches(attention.view(-1, rows, columns), keys.view(len(keys), rows, columns, -1), height / width)
