"""The relevance predictors that settings name by their checkpoints."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..relevance import BoundRelevance, SiglipRelevance, load_relevance
from .digests import digest_of_weights

UNRELATED = "unrelated"
"""What a setting's `question` is where the predictor is to get one about another needle: the control."""


class SampleRelevance:
    """A predictor that encodes a sample's frames once, whatever is asked about them and by how many settings.

    Args:
        relevance: the predictor.
    """

    def __init__(self, relevance: SiglipRelevance) -> None:
        self._relevance = relevance
        self._frames: Any = None
        parts = [relevance.model] if relevance.head is None else [relevance.model, relevance.head]
        self.digest = " ".join(map(digest_of_weights, parts))

    def bind(self, frames: Any, question: str) -> BoundRelevance:
        """As `SiglipRelevance.bind`."""
        if frames is not self._frames:
            self._frames, self._features = frames, self._relevance.encode(frames, progress=False)
        return self._relevance.bind(self._features, question)


@lru_cache
def sample_relevance(checkpoint: str) -> SampleRelevance:
    """The predictor of a checkpoint, loaded once."""
    return SampleRelevance(load_relevance(checkpoint))
