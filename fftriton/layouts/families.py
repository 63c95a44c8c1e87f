"""Positions of video tokens in the prompts of each model family: one rule per family.

A rule gets the model and the arguments of its forward by name, including those of `get_video_features` if `generate`
has encoded the video beforehand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import VideoLayout
from .remote_code import frames_of_runs

LayoutRule = Callable[[Any, Mapping[str, Any]], "list[VideoLayout]"]


class NoPlaceholderError(ValueError):
    """The arguments describe a video, but the prompt's embeddings contain no placeholder for it."""


def grid_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of the Qwen-VL models: one row of video_grid_thw per video, t frames of h * w / merge^2 tokens each.

    In Qwen3-VL and Qwen3.5 every frame follows its timestamp, and in the Omni models tokens of the sound may stand
    between frames; the order of the tokens is the same.
    """
    return _grid_layout(model, arguments, model.config.video_token_id)


def glm4v_moe_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of GLM-4.5V: as for the Qwen-VL models, but videos are made of image tokens, and a prompt with videos
    cannot have images."""
    return _grid_layout(model, arguments, model.config.image_token_id)


def _grid_layout(model: Any, arguments: Mapping[str, Any], token: int) -> list[VideoLayout]:
    grids = _encoder_argument(arguments, "video_grid_thw")
    if grids is None:
        return []
    merge = model.config.vision_config.spatial_merge_size
    shapes = [(int(t), int(h) * int(w) // merge**2) for t, h, w in grids.tolist()]
    source = f"video_grid_thw {grids.tolist()} with spatial_merge_size {merge}"
    runs = _deal_out(model, arguments, token, [frames * patches for frames, patches in shapes], source)
    columns = [int(w) // merge for _, _, w in grids.tolist()]
    return [
        VideoLayout(run.view(shape), sample, columns=width)
        for shape, width, (sample, run) in zip(shapes, columns, runs, strict=False)
    ]


def llava_onevision_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of LLaVA-OneVision: frames of ceil(g / 2)^2 tokens; the newline after the last one counts as text."""
    pixels = _encoder_argument(arguments, "pixel_values_videos")  # [videos, frames, 3, height, width]
    if pixels is None:
        return []
    side = math.ceil(_vision_side(model.config) / 2)
    shape = (pixels.shape[1], side**2)
    tokens = math.prod(shape)
    source = f"pixel_values_videos of shape {list(pixels.shape)}"
    runs = _deal_out(model, arguments, model.config.video_token_id, [tokens + 1] * len(pixels), source)
    return [VideoLayout(run[:tokens].view(shape), sample, columns=side) for sample, run in runs]


def llava_next_video_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of LLaVA-NeXT-Video: frames of (g // spatial_pool_stride)^2 tokens, one after another."""
    side = _vision_side(model.config) // model.config.spatial_pool_stride
    return _frames_layout(model, arguments, side**2, side)


def video_llava_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of Video-LLaVA: frames of 1 + g^2 tokens, one after another; the first one is the frame's class token."""
    return _frames_layout(model, arguments, 1 + _vision_side(model.config) ** 2)


def _frames_layout(
    model: Any, arguments: Mapping[str, Any], patches: int, columns: int | None = None
) -> list[VideoLayout]:
    pixels = _encoder_argument(arguments, "pixel_values_videos")  # [videos, frames, 3, height, width]
    if pixels is None:
        return []
    shape = (pixels.shape[1], patches)
    source = f"pixel_values_videos of shape {list(pixels.shape)}"
    runs = _deal_out(model, arguments, model.config.video_token_id, [math.prod(shape)] * len(pixels), source)
    return [VideoLayout(run.view(shape), sample, columns=columns) for sample, run in runs]


def internvl_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of InternVL: images and frames share a token; a frame is a run of exactly image_seq_length of them.

    The tiles of one image form one longer run, which is ignored. Two or more frames in a sample are one video; a single
    one is an image.
    """
    found = find_tokens(model, arguments, model.config.image_token_id)
    if found is None:
        return []
    patches, vision = model.config.image_seq_length, model.config.vision_config
    width, size = (one if isinstance(one, int) else one[-1] for one in (vision.image_size, vision.patch_size))
    columns = int(width // size * model.config.downsample_ratio)
    return frames_of_runs(found, patches, columns if columns > 0 and patches % columns == 0 else None)


def kimi_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of Kimi K2.5: one row of video_grid_thw per chunk of frames, which share h * w / merge^2 tokens.

    Nothing says where a video ends, so chunks of one size that follow one another in a sample are one video.
    """
    grids = _encoder_argument(arguments, "video_grid_thw")
    if grids is None:
        return []
    kernel = model.config.vision_config.merge_kernel_size
    merge = math.prod(kernel)
    sides = [(h, w) for _, h, w in grids.tolist()]
    source = f"video_grid_thw {grids.tolist()} with merge_kernel_size {kernel}"
    sizes = [h * w // merge for h, w in sides]
    chunks = zip(sides, _deal_out(model, arguments, model.config.video_token_id, sizes, source), strict=False)
    videos = itertools.groupby(chunks, key=lambda chunk: (chunk[0], chunk[1][0]))
    return [
        VideoLayout(torch.stack([run for _, (_, run) in same]), sample, columns=width // kernel[1])
        for ((_, width), sample), same in videos
    ]


def smolvlm_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of SmolVLM2: images, their tiles and frames are runs of one length, each after a token that opens it.

    Frames and whole images share an opener, and tiles have openers of their own: the row and the column. So a video is
    two or more runs with the same opener; the first one after tiles is the whole image that they are from.
    """
    config = model.config
    found = find_tokens(model, arguments, config.image_token_id)
    if found is None:
        return []
    length = _vision_side(config) ** 2 // config.scale_factor**2
    columns = _vision_side(config) // config.scale_factor
    layouts = []
    for sample, is_token in enumerate(found):
        prompt, runs = _ids_or_embeddings(arguments)[sample].cpu(), is_token.nonzero()[:, 0]
        if len(runs) % length:
            raise ValueError(f"layout: the {len(runs)} image tokens of a prompt must be a multiple of {length}")
        videos: list[list[Tensor]] = []
        opener = None
        for run in runs.view(-1, length):
            before = prompt[max(int(run[0]) - 1, 0)]
            if opener is None:
                videos.append([run])
            elif torch.equal(before, opener):
                videos[-1].append(run)
            else:
                videos.append([])
            opener = before
        layouts += [VideoLayout(torch.stack(frames), sample, columns=columns) for frames in videos if len(frames) > 1]
    return layouts


def video_llama_3_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of VideoLLaMA3: a grid per video as in Qwen2-VL; tokens removed by video_compression_mask are holes."""
    grids = _encoder_argument(arguments, "video_grid_thw")
    if grids is None:
        return []
    merges = arguments["video_merge_sizes"].tolist()
    shapes = [(int(t), int(h) * int(w) // merge**2) for (t, h, w), merge in zip(grids.tolist(), merges, strict=True)]
    sizes = [frames * patches for frames, patches in shapes]
    there = arguments.get("video_compression_mask")
    there = torch.ones(sum(sizes), dtype=torch.bool) if there is None else there.cpu().bool()
    if len(there) != sum(sizes):
        raise ValueError(
            f"video_compression_mask: must have {sum(sizes)} entries, as video_grid_thw says, got {len(there)}"
        )
    masks = there.split(sizes)
    source = f"video_grid_thw {grids.tolist()} with video_compression_mask"
    runs = _deal_out(model, arguments, model.config.video_token_id, [int(mask.sum()) for mask in masks], source)
    columns = [int(w) // merge for (_, _, w), merge in zip(grids.tolist(), merges, strict=True)]
    layouts = []
    for shape, width, mask, (sample, run) in zip(shapes, columns, masks, runs, strict=False):
        positions = torch.full(mask.shape, -1).masked_scatter(mask, run)
        layouts.append(VideoLayout(positions.view(shape), sample, columns=width))
    return layouts


def minicpm_v_layout(model: Any, arguments: Mapping[str, Any]) -> list[VideoLayout]:
    """Layouts of MiniCPM-V 4.6: one row of target_sizes_videos per frame or slice; slices are part of their frame.

    The token that opens the first unit opens every frame; slices are opened by another token. Frames of one video
    follow one another directly. If the frames of a video differ in size, as stacked frames do, each size gets a layout.
    """
    targets = _encoder_argument(arguments, "target_sizes_videos")
    if targets is None:
        return []
    sizes = [_minicpm_tokens(model.config, arguments, int(h), int(w)) for h, w in targets.tolist()]
    source = f"target_sizes_videos {targets.tolist()}"
    units = _deal_out(model, arguments, model.config.video_token_id, sizes, source)
    layouts = []
    for sample, of_sample in itertools.groupby(units, key=lambda unit: unit[0]):
        prompt = _ids_or_embeddings(arguments)[sample].cpu()
        for frames in _minicpm_videos(prompt, [run for _, run in of_sample]):
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for frame in frames:
                by_shape.setdefault(tuple(map(len, frame)), []).append(torch.cat(frame))
            layouts += [VideoLayout(torch.stack(same), sample) for same in by_shape.values()]
    return layouts


def _minicpm_tokens(config: Any, arguments: Mapping[str, Any], height: int, width: int) -> int:
    """Tokens of one frame or slice of height x width patches."""
    if (arguments.get("downsample_mode") or config.downsample_mode) != "4x":
        height, width = height // 2, width // 2
    for _ in range(config.merger_times):
        height, width = height // config.merge_kernel_size[0], width // config.merge_kernel_size[1]
    return height * width


def _minicpm_videos(prompt: Tensor, units: Sequence[Tensor]) -> list[list[list[Tensor]]]:
    """The videos of one sample, each a list of frames, each a list of units; prompt is [N] ids or [N, D] embeddings."""
    opener = prompt[int(units[0][0]) - 1]
    videos: list[list[list[Tensor]]] = []
    end = 0  # of the last unit
    for unit in units:
        start = int(unit[0])
        if not torch.equal(prompt[start - 1], opener):
            videos[-1][-1].append(unit)
        elif videos and start - end <= 3:  # only an end token and a start token in between
            videos[-1].append([unit])
        else:
            videos.append([[unit]])
        end = int(unit[-1])
    return videos


RULES: dict[str, LayoutRule] = {
    "cosmos3_edge": grid_layout,
    "cosmos3_omni": grid_layout,
    "glm4v_moe": glm4v_moe_layout,
    "internvl": internvl_layout,
    "kimi_k25": kimi_layout,
    "llava_next_video": llava_next_video_layout,
    "llava_onevision": llava_onevision_layout,
    "minicpm_ocr": minicpm_v_layout,
    "minicpmv4_6": minicpm_v_layout,
    "minicpmv4_7": minicpm_v_layout,
    "qwen2_5_omni_thinker": grid_layout,
    "qwen2_5_vl": grid_layout,
    "qwen2_vl": grid_layout,
    "qwen3_5": grid_layout,
    "qwen3_5_moe": grid_layout,
    "qwen3_omni_moe_thinker": grid_layout,
    "qwen3_vl": grid_layout,
    "qwen3_vl_moe": grid_layout,
    "smolvlm": smolvlm_layout,
    "video_llama_3": video_llama_3_layout,
    "video_llava": video_llava_layout,
}
"""The rule of each config.model_type."""


def encoder_of(model_type: str) -> str:
    """The method by which a family encodes its videos. If `generate` calls it before the forward, the forward's own
    arguments no longer contain what a rule reads."""
    return "get_image_features" if model_type in ("internvl", "smolvlm") else "get_video_features"


def _encoder_argument(arguments: Mapping[str, Any], name: str) -> Any:
    """An argument of the video encoder, or None if the prompt has no video.

    Raises:
        ValueError: the video was encoded before the block, and only its features are left.
    """
    value = arguments.get(name)
    if value is None and (arguments.get("mm_encoder_outputs") or {}).get("video") is not None:
        raise ValueError(
            f"{name}: must be known, but the video was encoded outside; encode it inside, or give a layout"
        )
    return value


def _vision_side(config: Any) -> int:
    """Number of patches along the side of a frame, before pooling."""
    return config.vision_config.image_size // config.vision_config.patch_size


def _deal_out(
    model: Any, arguments: Mapping[str, Any], token: int, sizes: Sequence[int], source: str
) -> Iterator[tuple[int, Tensor]]:
    """Divide the positions of `token` among the videos, in order: (sample, positions [size]) for each.

    Raises:
        ValueError: the sizes, which come from `source`, do not add up to the prompt's tokens, sample by sample.
        NoPlaceholderError: the prompt consists of embeddings, none of which is the placeholder's.
    """
    found = find_tokens(model, arguments, token)
    if found is None or not bool(found.any()):
        if arguments.get("input_ids") is None and sizes:
            raise NoPlaceholderError(
                f"layout: must be given if inputs_embeds contain the video already: {source} describes a video, but no "
                "token is a placeholder for it"
            )
        return
    sample, position = found.nonzero(as_tuple=True)
    if len(position) != sum(sizes):
        raise ValueError(
            f"layout: {source} must describe the {len(position)} video tokens of the prompt, but makes {sum(sizes)}"
        )
    for owners, positions in zip(sample.split(list(sizes)), position.split(list(sizes)), strict=True):
        if bool((owners != owners[0]).any()):
            raise ValueError(f"layout: {source} must not spread a video over two samples")
        yield int(owners[0]), positions


def _ids_or_embeddings(arguments: Mapping[str, Any]) -> Tensor:
    ids = arguments.get("input_ids")
    return arguments["inputs_embeds"] if ids is None else ids


def find_tokens(model: Any, arguments: Mapping[str, Any], token: int) -> Tensor | None:
    """[B, N] bool on the CPU: which positions hold `token`, found by its embedding if there are no ids."""
    ids = arguments.get("input_ids")
    if ids is not None:
        return (ids == token).cpu()
    embeddings = arguments.get("inputs_embeds")
    if embeddings is None:
        return None
    placeholder = model.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
    return (embeddings == placeholder).all(-1).cpu()
