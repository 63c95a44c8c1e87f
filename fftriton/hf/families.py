"""Where the video tokens stand in the prompts of each model family: one rule a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..layout import VideoLayout

LayoutRule = Callable[[Any, Mapping[str, Any]], "list[VideoLayout]"]


def qwen2_vl_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Qwen2-VL and Qwen2.5-VL: one run of video tokens a row of video_grid_thw, t frames of h * w / merge^2 each."""
    config = model.config
    grids = arguments.get("video_grid_thw")
    if grids is None:
        return []
    found = _find_tokens(model, arguments, config.video_token_id)
    if found is None or not bool(found.any()):
        return []
    merge = config.vision_config.spatial_merge_size
    sample, position = found.nonzero(as_tuple=True)
    sizes = [(int(t), int(h) * int(w) // merge**2) for t, h, w in grids.tolist()]
    expected = sum(frames * patches for frames, patches in sizes)
    if len(position) != expected:
        raise ValueError(
            f"video_grid_thw: must describe the {len(position)} video tokens of input_ids, but {grids.tolist()} with "
            f"spatial_merge_size {merge} makes {expected}"
        )
    layouts, first = [], 0
    for frames, patches in sizes:
        run = position[first : first + frames * patches]
        layouts.append(VideoLayout(run.view(frames, patches), sample=int(sample[first])))
        first += frames * patches
    return layouts


RULES: dict[str, LayoutRule] = {
    "qwen2_vl": qwen2_vl_layout,
    "qwen2_5_vl": qwen2_vl_layout,
}
"""The rule of each config.model_type."""


def _find_tokens(model: Any, arguments: Mapping[str, Any], token: int) -> Tensor | None:
    """[B, N] bool on the CPU: which places of the prompt hold `token`; by its embedding where there are no ids."""
    ids = arguments.get("input_ids")
    if ids is not None:
        return (ids == token).cpu()
    embeddings = arguments.get("inputs_embeds")
    if embeddings is None:
        return None
    placeholder = model.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
    return (embeddings == placeholder).all(-1).cpu()
