"""The analyses of FrameFusion's paper: where and how steadily the video tokens of a prompt are redundant.

Source: arXiv:2501.01986v2. A layer's similarity is that of its input; its importance is the attention that tokens
receive in it. Only tokens that have both in question are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .observing import Observed

TOP = 0.3
"""The share of the tokens that count as the most similar, or most important, of a layer (figure 5)."""

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        layer: its index.
        similarity_5, similarity_25, similarity_50, similarity_75, similarity_95: quantiles of the similarity in percent
            (figure 3).
        similarity_variance: variance of the similarity over the tokens (figure 15).
        importance_variance: variance of the importance over the tokens, relative to the square of its mean (figure 15);
            None without attention.
        similarity_correlation: rank correlation (Spearman) of the similarity with that in the next layer (figure 4);
            None in the last layer, or where all are equal.
        importance_correlation: the same for the importance, with the next layer that has attention.
        joint_correlation: rank correlation of similarity and importance within the layer (figure 23).
    """

    layer: int
    similarity_5: float
    similarity_25: float
    similarity_50: float
    similarity_75: float
    similarity_95: float
    similarity_variance: float
    importance_variance: float | None
    similarity_correlation: float | None
    importance_correlation: float | None
    joint_correlation: float | None


@dataclass(frozen=True)
class Retention:
    """How many of the top tokens of one layer are top tokens of a later one, too (figure 5).

    Attributes:
        start: the layer in which tokens are in the top TOP.
        layer: the later layer.
        similarity, importance: share of them that are in the top there; None without attention, or where a layer has no
            order because all are equal. TOP is what chance gives.
    """

    start: int
    layer: int
    similarity: float | None
    importance: float | None


@dataclass(frozen=True)
class Redundancy:
    """All analyses of one prompt.

    Attributes:
        layers: a row per layer.
        retention: a row per pair of layers, start <= layer.
        threshold: a similarity_threshold for this model: the median similarity at the first layer, so that half of the
            tokens would merge there.
    """

    layers: Sequence[LayerRow]
    retention: Sequence[Retention]
    threshold: float


def analyse(observed: Observed) -> Redundancy:
    """Compute the figures of all layers."""
    similarity, importance = observed.similarity, observed.importance
    layers = [_layer(observed, layer) for layer in range(len(similarity))]
    pairs = [(start, layer) for start in range(len(layers)) for layer in range(start, len(layers))]
    retention = [
        Retention(a, b, kept_top(similarity[a], similarity[b]), kept_top(importance[a], importance[b]))
        for a, b in pairs
    ]
    return Redundancy(layers, retention, layers[0].similarity_50)


def _layer(observed: Observed, layer: int) -> LayerRow:
    similarity, importance = observed.similarity[layer], observed.importance[layer]
    lowest, lower, median, upper, highest = (float(value) for value in np.nanquantile(similarity, _QUANTILES))
    return LayerRow(
        layer, lowest, lower, median, upper, highest,
        similarity_variance=float(np.nanvar(similarity)),
        importance_variance=_relative_variance(importance),
        similarity_correlation=_with_next(observed.similarity, layer),
        importance_correlation=_with_next(observed.importance, layer),
        joint_correlation=rank_correlation(similarity, importance),
    )  # fmt: skip


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's correlation of two [V], over the tokens that have both; None if it is not defined."""
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < 2:
        return None
    ranks = [_ranks(values[both]) for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def kept_top(first: np.ndarray, second: np.ndarray) -> float | None:
    """The share of the top TOP of `first` [V] that is in the top TOP of `second` [V]; None if either has no order."""
    both = np.isfinite(first) & np.isfinite(second)
    if not both.any() or any(np.ptp(values[both]) == 0 for values in (first, second)):
        return None
    count = max(1, round(TOP * int(both.sum())))
    tops = [set(np.argsort(-values[both], kind="stable")[:count].tolist()) for values in (first, second)]
    return len(tops[0] & tops[1]) / count


def _with_next(values: np.ndarray, layer: int) -> float | None:
    """Rank correlation of a layer's row of [L, V] with the next one that has values."""
    following = (later for later in range(layer + 1, len(values)) if np.isfinite(values[later]).any())
    later = next(following, None)
    return None if later is None else rank_correlation(values[layer], values[later])


def _relative_variance(importance: np.ndarray) -> float | None:
    mean = np.nanmean(importance) if np.isfinite(importance).any() else 0.0
    return float(np.nanvar(importance) / mean**2) if mean > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """[V] -> [V]: ranks from 0, the mean rank for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse.reshape(-1)]
