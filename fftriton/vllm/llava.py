"""LLaVA-OneVision of vLLM, whose videos are shortened behind the vision tower.

Positions are single numbers, and vLLM counts them anew: the tokens that stay follow one another without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from .positions import Media
from .processing import OwnInfo, ShorterVideos
from .reduced import Reduced


def _side(config: Any) -> int:
    """Tokens along the side of a frame, which pooling halves."""
    return math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)


class LlavaOnevisionInfo(OwnInfo, llava_onevision.LlavaOnevisionProcessingInfo):
    pass


class LlavaOnevisionProcessor(ShorterVideos, llava_onevision.LlavaOnevisionMultiModalProcessor):
    def frames_of(self, out: Mapping[str, Any]) -> list[int]:
        return [len(one) for one in out.get("pixel_values_videos", ())]

    def media_of(self, item: Mapping[str, Any]) -> Media:
        side = _side(self.info.get_hf_config())
        return Media(0, 0, (len(item["pixel_values_videos"].data), side, side))

    def placeholder(self, whole: Any, count: int) -> Any:
        return whole[:1] * (count + 1)  # a newline follows the video


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor, info=LlavaOnevisionInfo, dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder
)
class LlavaOnevision(Reduced, llava_onevision.LlavaOnevisionForConditionalGeneration):
    def _process_video_pixels(self, inputs: Any) -> Sequence[Tensor]:
        videos = [one.flatten(0, -2) for one in super()._process_video_pixels(inputs)]
        if self._keeps_all:
            return videos
        patches = _side(self.config) ** 2
        return [self._shorter(number, one, patches) for number, one in enumerate(videos)]

    def _shorter(self, number: int, embeddings: Tensor, patches: int) -> Tensor:
        *_, newline = embeddings.split([len(embeddings) - 1, 1])
        left, _ = self._shortened(number, embeddings[:-1], (len(embeddings) - 1) // patches, patches)
        return torch.cat([left, newline])
