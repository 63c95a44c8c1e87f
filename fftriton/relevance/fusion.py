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
        """Local and global attention over the frames: images [..., T, D] -> two tensors [..., T, D]."""
        unit = F.normalize(images, dim=-1)
        similarity = unit @ unit.mT / (math.sqrt(images.shape[-1]) if self.scaled else 1.0)
        local, everywhere = similarity / self.log_temperature.exp().view(2, *[1] * similarity.ndim)
        clip = torch.arange(images.shape[-2], device=images.device) // self.clip
        local = local.masked_fill(clip[:, None] != clip, float("-inf"))
        return local.softmax(-1) @ images, everywhere.softmax(-1) @ images

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
