"""Qwen2-VL and Qwen2.5-VL of vLLM, whose videos are shortened behind the vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..methods import Method
from .faults import mergers_with
from .methods import pruning_rate
from .positions import Media, add_columns, check_gaps, fill_in, lay_out, places
from .processing import OwnInfo, ShorterVideos
from .reduced import Reduced


def _speed(vision: Any, seconds: float | None) -> float:
    """Positions from one frame of tokens to the next."""
    return getattr(vision, "tokens_per_second", 1.0) * (1.0 if seconds is None else seconds)


class ReducedQwen(Reduced):
    """Mixed into a model.

    Not a subclass of the protocol for pruned videos, whose `__init__` would hide that of nn.Module.
    """

    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)  # the rate that is set below is one of this method

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.is_multimodal_pruning_enabled = False  # vLLM's own pruning, in the class that this one is mixed into

    def _prepare(self, media: Any, method: Method) -> None:
        media.video_pruning_rate = pruning_rate(method)  # so that the model runner asks for positions

    def _process_video_input(self, video_input: Mapping[str, Any]) -> tuple[Tensor, ...]:
        videos = super()._process_video_input(video_input)  # type: ignore[misc]
        if self._keeps_all:
            return videos
        merge = self.config.vision_config.spatial_merge_size
        seconds = video_input.get("second_per_grid_ts")
        out = []
        for number, (hidden, (t, h, w)) in enumerate(zip(videos, video_input["video_grid_thw"].tolist(), strict=True)):
            grid = (t, h // merge, w // merge)
            left, index = self._shortened(number, hidden, t, grid[1] * grid[2])
            speed = _speed(self.config.vision_config, None if seconds is None else float(seconds[number]))
            out.append(add_columns(left, places(index, Media(0, len(left), grid, speed))))
        return tuple(out)

    @property
    def _width(self) -> int:
        """Columns of an embedding, as vLLM knows it."""
        return self.config.get_text_config().hidden_size

    def _media(self, mm_features: Sequence[Any]) -> Iterator[Media]:
        lengths = {feature.mm_position.offset: feature.mm_position.length for feature in mm_features}
        for offset, t, h, w, speed in self.iter_mm_grid_thw(mm_features):  # type: ignore[attr-defined]
            yield Media(offset, lengths[offset], (t, h, w), speed)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        return lay_out(len(input_tokens), list(self._media(mm_features)))

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        tokens = self.config.image_token_id, self.config.video_token_id
        cleaned, positions = fill_in(
            mrope_positions, ids, tokens, multimodal_embeddings, self._width, num_computed_tokens
        )
        return cleaned, positions, int(positions.max()) + 1 - len(ids)

    def get_encoder_cudagraph_config(self) -> Any:
        """No graphs of the vision tower: they bypass what shortens videos."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        config.modalities = []
        return config


class ShorterQwenVideos(ShorterVideos):
    _measures = False  # vLLM tries out what its memory has to hold, with a prompt of nothing but images and videos

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        self._measures = True
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._measures = False

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        done = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        if self._measures:
            return done
        ranges = [(one.offset, one.length) for found in done["mm_placeholders"].values() for one in found]
        check_gaps(sorted(ranges))
        return done

    def frames_of(self, out: Mapping[str, Any]) -> list[int]:
        return out["video_grid_thw"][:, 0].tolist() if "video_grid_thw" in out else []

    def media_of(self, item: Mapping[str, Any]) -> Media:
        vision = self.info.get_hf_config().vision_config
        t, h, w = item["video_grid_thw"].data.tolist()
        seconds = item.get("second_per_grid_ts")
        grid = (t, h // vision.spatial_merge_size, w // vision.spatial_merge_size)
        return Media(0, 0, grid, _speed(vision, None if seconds is None else float(seconds.data)))


class Qwen2VLInfo(OwnInfo, qwen2_vl.Qwen2VLProcessingInfo):
    pass


class Qwen25VLInfo(OwnInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    pass


class Qwen2VLProcessor(ShorterQwenVideos, qwen2_vl.Qwen2VLMultiModalProcessor):
    pass


class Qwen25VLProcessor(ShorterQwenVideos, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class Qwen2VL(ReducedQwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with mergers_with(vllm_config.model_config.hf_config.vision_config.spatial_merge_size):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen25VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class Qwen25VL(ReducedQwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    pass
