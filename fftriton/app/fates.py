"""What became of each patch of a video: kept, merged into another one, or pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..hf import MergeStep, Report


@dataclass(frozen=True)
class PatchFates:
    """What happened to each patch.

    Attributes:
        root: [F, P] int64: the patch, numbered f * P + p, whose token represents this one; itself if not merged.
        pruned: [F, P] bool: whether the token that represents it was dropped.
    """

    root: np.ndarray
    pruned: np.ndarray

    @property
    def merged(self) -> np.ndarray:
        """[F, P] bool: whether another patch's token represents this one."""
        return self.root != np.arange(self.root.size).reshape(self.root.shape)


def patch_fates(report: Report, video: int = 0, layer: int | None = None) -> PatchFates:
    """Follow every patch of one video through the merges and the pruning.

    Args:
        report: report of the prefill.
        video: index of the video in the prompt.
        layer: look at the tokens in the attention of this layer; None: after all layers.

    Returns:
        What happened to each patch. Patches without a token (holes) count as pruned.
    """
    positions = report.layouts[video].positions.cpu()  # [F, P]
    root = torch.arange(report.num_tokens)
    for step in report.merge_steps:
        if layer is None or _is_before(step, layer):
            root[step.merged.cpu()] = step.into.cpu()
    while not torch.equal(root[root], root):  # a root may have joined another group in a later layer
        root = root[root]
    if layer is None:
        pruned = torch.zeros(report.num_tokens, dtype=torch.bool)
        pruned[report.pruned.cpu()] = True
    else:
        pruned = torch.ones(report.num_tokens, dtype=torch.bool)
        pruned[report.kept_positions[layer].cpu()] = False

    hole = positions < 0
    patch_at = torch.zeros(report.num_tokens, dtype=torch.int64)
    patch_at[positions[~hole]] = torch.arange(positions.numel()).view(positions.shape)[~hole]
    own = torch.arange(positions.numel()).view(positions.shape)
    root_patch = torch.where(hole, own, patch_at[root[positions.clamp(min=0)]])
    return PatchFates(root_patch.numpy(), (hole | pruned[root[positions.clamp(min=0)]]).numpy())


def patch_grid(patches: int, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of a frame's tokens: from the grid in the inputs, or else nearly square."""
    if "video_grid_thw" in inputs:
        _, height, width = inputs["video_grid_thw"][0].tolist()
        merge = round((height * width / patches) ** 0.5)
        return height // merge, width // merge
    rows = max(n for n in range(1, int(patches**0.5) + 1) if patches % n == 0)
    return rows, patches // rows


def _is_before(step: MergeStep, layer: int) -> bool:
    """Whether a merge happened before the attention of this layer."""
    return step.layer < layer or (step.layer == layer and step.stage == "before_attention")
