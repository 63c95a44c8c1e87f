"""Relevance predictors, which settings name by their checkpoints."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..relevance import BoundRelevance, Encoded, SiglipRelevance, load_relevance
from .digests import digest_of_weights

UNRELATED = "unrelated"
"""Value of a setting's `question` that gives the predictor a question about another needle, as a control."""


_VIDEOS = 32  # whose features are kept


class SampleRelevance:
    """A predictor that encodes the frames of a video once, for all questions and settings.

    Args:
        relevance: the predictor.
    """

    def __init__(self, relevance: SiglipRelevance) -> None:
        self._relevance = relevance
        self._encoded: dict[str, Encoded] = {}
        parts = [relevance.model] if relevance.head is None else [relevance.model, relevance.head]
        self.digest = " ".join(map(digest_of_weights, parts))

    def to(self, device: torch.device | str) -> SampleRelevance:
        """Move the predictor to a device."""
        self._relevance.to(device)
        return self

    def bind(self, frames: Any, question: str, patches: bool = False) -> BoundRelevance:
        """Bind frames and a question, as `SiglipRelevance.bind` does."""
        key = _digest_of(frames)
        known = self._encoded.pop(key, None)
        if known is None or (patches and known.patches is None):
            known = self._relevance.look(frames, patches, progress=False)
            while len(self._encoded) >= (1 if patches else _VIDEOS):  # keys of patches are large
                del self._encoded[next(iter(self._encoded))]
        self._encoded[key] = known
        return self._relevance.bind(known, question, patches)


def _digest_of(frames: Any) -> str:
    """Digest of the pixels of a video."""
    digest = hashlib.blake2b()
    for frame in frames:
        pixels = np.ascontiguousarray(frame)
        digest.update(f"{pixels.shape} {pixels.dtype}".encode())
        digest.update(pixels.data)
    return digest.hexdigest()


@lru_cache
def sample_relevance(checkpoint: str) -> SampleRelevance:
    """The predictor of a checkpoint; loaded once."""
    return SampleRelevance(load_relevance(checkpoint))
