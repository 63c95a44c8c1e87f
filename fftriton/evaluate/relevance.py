"""Relevance predictors, which settings name by their checkpoints."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..relevance import BoundRelevance, Encoded, SiglipRelevance, load_relevance
from .digests import digest_of_weights

UNRELATED = "unrelated"
"""Value of a setting's `question` that gives the predictor a question about another needle, as a control."""


class SampleRelevance:
    """A predictor that encodes the frames of a sample once, for all questions and settings.

    Args:
        relevance: the predictor.
    """

    def __init__(self, relevance: SiglipRelevance) -> None:
        self._relevance = relevance
        self._frames: Any = None
        self._encoded: Encoded | None = None
        parts = [relevance.model] if relevance.head is None else [relevance.model, relevance.head]
        self.digest = " ".join(map(digest_of_weights, parts))

    def bind(self, frames: Any, question: str, patches: bool = False) -> BoundRelevance:
        """Bind frames and a question, as `SiglipRelevance.bind` does."""
        if frames is not self._frames or self._encoded is None or (patches and self._encoded.patches is None):
            self._frames, self._encoded = frames, self._relevance.look(frames, patches, progress=False)
        return self._relevance.bind(self._encoded, question, patches)


@lru_cache
def sample_relevance(checkpoint: str) -> SampleRelevance:
    """The predictor of a checkpoint; loaded once."""
    return SampleRelevance(load_relevance(checkpoint))
