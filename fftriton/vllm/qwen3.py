"""Qwen3-VL of vLLM, dense and mixture of experts, whose videos are shortened behind the vision tower.

Each frame follows its time, as text, which stays whether or not any token of the frame does. vLLM takes all of a video,
text included, for its part of the prompt; the number of tokens in each frame is known only behind the tower, so the
prompt has them all in the first frame, and the embeddings are in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails

from .positions import Media, add_columns, all_places
from .processing import OwnInfo
from .qwen import ReducedQwen, ShorterQwenVideos


def _media(grid: Sequence[int], merge: int, timestamps: Any, tokenizer: Any, offset: int = 0, length: int = 0) -> Media:
    """A video by its grid in patches and the times of its frames."""
    t, h, w = grid
    times = [len(tokenizer.encode(_text(time), add_special_tokens=False)) for time in timestamps]
    before = [times[0] + 1, *(1 + time + 1 for time in times[1:]), 1]  # with what begins and ends each frame
    return Media(offset, length, (t, h // merge, w // merge), texts=before)


def _text(time: Any) -> str:
    """What vLLM writes before a frame."""
    return f"<{float(time):.1f} seconds>"


class ReducedQwen3(ReducedQwen):
    """Mixed into a model, see ReducedQwen."""

    visual_dim: int
    multiscale_dim: int
    use_deepstack: bool
    get_language_model: Any
    _tokenizer: Any

    @property
    def _width(self) -> int:
        return self.visual_dim + (self.multiscale_dim if self.use_deepstack else 0)

    def _process_video_input(self, video_input: Mapping[str, Any]) -> tuple[Tensor, ...]:
        videos = super(ReducedQwen, self)._process_video_input(video_input)  # type: ignore[misc]
        if self._keeps_all:
            return videos
        return tuple(
            self._shorter(number, embeddings, grid, video_input["timestamps"][number])
            for number, (embeddings, grid) in enumerate(
                zip(videos, video_input["video_grid_thw"].tolist(), strict=True)
            )
        )

    def _shorter(self, number: int, embeddings: Tensor, grid: Sequence[int], timestamps: Any) -> Tensor:
        """[N, _width + COLUMNS]: a video's part of the prompt."""
        media = _media(grid, self.config.vision_config.spatial_merge_size, timestamps, self._tokenizer)
        t, h, w = media.grid
        left, index = self._shortened(number, embeddings, t, h * w, self.visual_dim)
        ids = qwen3_vl.Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=torch.bincount(index // (h * w), minlength=t).tolist(),
            timestamps=timestamps,
            tokenizer=self._tokenizer,
            vision_start_token_id=self.config.vision_start_token_id,
            vision_end_token_id=self.config.vision_end_token_id,
            video_token_id=self.config.video_token_id,
        ).full
        prompt = torch.tensor(ids, device=left.device)
        text = self.get_language_model().embed_input_ids(prompt).to(left.dtype)
        rows = torch.cat([text, text.new_zeros(len(text), self._width - text.shape[1])], 1)
        rows[prompt == self.config.video_token_id] = left
        return add_columns(rows, all_places(index, media), anchor=media.texts[0])

    def _media(self, mm_features: Sequence[Any]) -> Iterator[Media]:
        merge = self.config.vision_config.spatial_merge_size
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            offset, length, data = feature.mm_position.offset, feature.mm_position.length, feature.data
            grid = data[f"{feature.modality}_grid_thw"].data.tolist()
            if feature.modality == "image":
                yield Media(offset, length, (1, grid[1] // merge, grid[2] // merge))
            else:
                yield _media(grid, merge, data["timestamps"].data, self._tokenizer, offset, length)


class ShorterQwen3Videos(ShorterQwenVideos):
    def media_of(self, item: Mapping[str, Any]) -> Media:
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return _media(item["video_grid_thw"].data.tolist(), merge, item["timestamps"].data, self.info.get_tokenizer())

    def placeholder(self, whole: Any, count: int) -> Any:
        config = self.info.get_hf_config()
        text = [token for token in whole.full if token != config.video_token_id]
        begin = text.index(config.vision_start_token_id) + 1
        return PromptUpdateDetails.from_seq([*text[:begin], *[config.video_token_id] * count, *text[begin:]])


class Qwen3VLInfo(OwnInfo, qwen3_vl.Qwen3VLProcessingInfo):
    pass


class Qwen3VLMoeInfo(OwnInfo, qwen3_vl_moe.Qwen3VLMoeProcessingInfo):
    pass


class Qwen3VLProcessor(ShorterQwen3Videos, qwen3_vl.Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class Qwen3VL(ReducedQwen3, qwen3_vl.Qwen3VLForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLMoeInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class Qwen3VLMoe(ReducedQwen3, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    pass
