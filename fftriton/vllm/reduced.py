"""What all reduced models of vLLM share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import relevance
from .methods import method_of, pruning_rate, shorten, try_out


class Reduced:
    """Mixed into a model: the method, and the relevance of the videos of a call."""

    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        method, media = method_of(vllm_config.model_config.hf_config), vllm_config.model_config.multimodal_config
        try_out(method)
        if media.video_pruning_rate not in (None, pruning_rate(method)):
            raise ValueError(
                f"fftriton: --video-pruning-rate must not be given beside a method of fftriton, got "
                f"{media.video_pruning_rate}"
            )
        self._prepare(media, method)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._method = method
        self._relevance: Sequence[Tensor] | None = None

    def _prepare(self, media: Any, method: Any) -> None:
        """Change vLLM's multimodal settings before the model is made."""

    @property
    def _keeps_all(self) -> bool:
        return pruning_rate(self._method) is None

    def embed_multimodal(self, **kwargs: Any) -> Any:
        self._relevance = kwargs.pop(relevance.KEY, None)
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def _shortened(
        self, number: int, embeddings: Tensor, frames: int, patches: int, width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is left of one video of a call, see `shorten`."""
        own = None if self._relevance is None else self._relevance[number]
        return shorten(self._method, embeddings, frames, patches, own, width)
