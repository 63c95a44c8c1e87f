"""The context fusion head: a frame's relevance also takes its clip and the whole video into account."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import check_count

_BLOCK = 256

WEIGHTS = (0.9, 0.05, 0.05)
"""Weights of the frame's own logit, its clip's and its video's."""


class ContextFusion(nn.Module):
    """Relevance logits that mix each frame with its clip and its video; two learned temperatures are the only weights.

        local  l_i = sum over j in the clip of i of softmax_j(<u_i, u_j> / (tau_l sqrt(d))) e_j,  u = e / |e|
        global g_i = the same over all frames, with tau_g
        logit = 0.9 z(e) + 0.05 z(l) + 0.05 z(g),  z(x) = logit_scale cos(x, question) + logit_bias

    e are the embeddings of the frames. The published form divides by sqrt(d) although u are unit vectors: at d = 1152
    the attention is almost uniform, and g_i is almost the mean of the video. `scaled=False` omits this factor.

    Args:
        clip: frames per clip, at least 1; the last clip of a video may be shorter.
        scaled: whether to divide by sqrt(d).

    Source:
        KVTP, ICCV 2025, arXiv:2503.10742. The authors' code trains this head but does not use it for inference.
    """

    def __init__(self, clip: int = 8, scaled: bool = True) -> None:
        check_count("ContextFusion", "clip", clip, 1)
        super().__init__()
        self.clip, self.scaled = clip, bool(scaled)
        self.log_temperature = nn.Parameter(torch.zeros(2))  # of the local and the global attention

    def extra_repr(self) -> str:
        return f"clip={self.clip}, scaled={self.scaled}"

    def context(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Local and global attention over the frames: images [..., T, D] -> two tensors [..., T, D].

        Frames attend to the video in blocks of 256, so that memory is linear in T.
        """
        unit = F.normalize(images, dim=-1)
        factor = self.log_temperature.neg().exp() / (math.sqrt(images.shape[-1]) if self.scaled else 1.0)
        everywhere = torch.cat([_attend(block, unit, images, factor[1]) for block in unit.split(_BLOCK, -2)], -2)
        return self._local(unit, images, factor[0]), everywhere

    def _local(self, unit: Tensor, images: Tensor, factor: Tensor) -> Tensor:
        """Attention inside of each clip; the last one may be short."""
        length = images.shape[-2]
        missing = -length % self.clip
        clips, values = (F.pad(part, (0, 0, 0, missing)).unflatten(-2, (-1, self.clip)) for part in (unit, images))
        exists = (torch.arange(length + missing, device=images.device) < length).view(-1, 1, self.clip)
        return _attend(clips, clips, values, factor, exists).flatten(-3, -2)[..., :length, :]

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Fused cosines: images [..., T, D], texts [..., C, D] -> [..., T, C]."""
        parts = (images, *self.context(images))
        question = F.normalize(texts, dim=-1).mT
        cosines = [weight * (F.normalize(part, dim=-1) @ question) for weight, part in zip(WEIGHTS, parts, strict=True)]
        return torch.stack(cosines).sum(0)

    def save(self, path: str | Path) -> None:
        """Write the head to a safetensors file."""
        settings = {"clip": str(self.clip), "scaled": str(self.scaled)}
        save_file({"log_temperature": self.log_temperature.detach().cpu()}, path, settings)

    @classmethod
    def load(cls, path: str | Path) -> ContextFusion:
        """Load a head that `save` wrote.

        Raises:
            ValueError: the file contains something else.
            OSError: the file does not exist.
        """
        with safe_open(path, framework="pt") as file:
            settings = file.metadata() or {}
            if set(file.keys()) != {"log_temperature"} or not {"clip", "scaled"} <= set(settings):
                raise ValueError(f"ContextFusion: path must hold what ContextFusion.save wrote, got {path}")
            head = cls(int(settings["clip"]), settings["scaled"] == "True")
            head.load_state_dict({"log_temperature": file.get_tensor("log_temperature")})
        return head


def _attend(queries: Tensor, keys: Tensor, values: Tensor, factor: Tensor, exists: Tensor | None = None) -> Tensor:
    """softmax(factor * queries keys^T) values, over the keys that exist."""
    logits = queries @ keys.mT * factor
    if exists is not None:
        logits = logits.masked_fill(~exists, float("-inf"))
    return logits.softmax(-1) @ values
