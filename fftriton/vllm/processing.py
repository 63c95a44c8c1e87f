"""What vLLM's processors of requests do otherwise: fewer placeholders, and relevance that belongs to its video.

All of it runs before the engine, where an error is that of one request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement

from ..methods import KVTP, Method
from . import relevance
from .methods import method_of, pruning_rate
from .positions import LARGEST, Media, extent


class OwnInfo:
    """Mixed into a ProcessingInfo: relevance is no argument of Hugging Face's processor."""

    def get_hf_processor(self, **kwargs: Any) -> Any:
        return super().get_hf_processor(**_without_relevance(kwargs))  # type: ignore[misc]

    @cached_property
    def method(self) -> Method:
        return method_of(self.get_hf_config())  # type: ignore[attr-defined]


class ShorterVideos:
    """Mixed into a multimodal processor."""

    info: Any

    def frames_of(self, out: Mapping[str, Any]) -> list[int]:
        """Frames of tokens of each video, from what Hugging Face's processor returned for all of them."""
        raise NotImplementedError(f"{type(self).__name__} must define frames_of")

    def media_of(self, item: Mapping[str, Any]) -> Media:
        """A video by what Hugging Face's processor returned for it; offset and length do not matter."""
        raise NotImplementedError(f"{type(self).__name__} must define media_of")

    def placeholder(self, whole: Any, count: int) -> Any:
        """A video's part of the prompt with `count` video tokens, made from that of the whole video."""
        return whole[:1] * count

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, _without_relevance(hf_processor_mm_kwargs), out_mm_kwargs
        )

        if pruning_rate(self.info.method) is None:
            return updates

        def shorter(item: int, original: Callable[[int], Any]) -> Any:
            media = self.media_of(out_mm_kwargs["video"][item])
            frames, height, width = media.grid
            count = self.info.method.count(frames, height * width)
            if not count:
                raise ValueError(
                    f"fftriton: budget must leave a token of each video, got {self.info.method.budget} of {frames} "
                    f"frames of {height} x {width}"
                )
            if extent(media) > LARGEST:
                raise ValueError(f"fftriton: a video must end below position {LARGEST}, got {extent(media)}")
            return self.placeholder(original(item), count)

        return [
            PromptReplacement("video", update.target, partial(shorter, original=update.replacement))
            if update.modality == "video"
            else update
            for update in updates
        ]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """With each video's own relevance: no cache may answer one question with another one's tokens."""
        kwargs = inputs.hf_processor_mm_kwargs
        bare = replace(inputs, hf_processor_mm_kwargs=_without_relevance(kwargs))
        hashes = dict(super()._get_mm_hashes(bare))  # type: ignore[misc]
        scores = relevance.of_request(kwargs, len(hashes.get("video", ())))
        if scores is None:
            return hashes
        if not isinstance(self.info.method, KVTP):
            raise ValueError(
                f"fftriton: {relevance.KEY} must only come with requests to a server with kvtp, which this one, with "
                f"{type(self.info.method).__name__}, is not"
            )
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        hashes["video"] = [
            MultiModalHasher.hash_kwargs(algorithm, mm_hash=one, relevance=own.numpy())
            for one, own in zip(hashes["video"], scores, strict=True)
        ]
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Mapping[str, Any]) -> Mapping[str, Any]:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        scores = inputs.hf_processor_mm_kwargs.get(relevance.KEY)
        if scores is None:
            return kwargs
        missing = [one for one, hit in zip(scores, mm_is_cached.get("video", ()), strict=True) if not hit]
        return {**kwargs, relevance.KEY: missing}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        out = super()._apply_hf_processor_main(mm_items, _without_relevance(hf_kwargs))  # type: ignore[misc]
        videos = self.frames_of(out)
        scores = relevance.of_request(hf_kwargs, len(videos))
        if scores:
            for own, frames in zip(scores, videos, strict=True):
                relevance.check_frames(own, frames)
            out[relevance.KEY] = scores
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        return fields | {relevance.KEY: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}


def _without_relevance(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != relevance.KEY}
