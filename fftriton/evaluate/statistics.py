"""The uncertainty of an accuracy, and a test of the difference between two."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(right: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a proportion by Wilson (1927).

    Args:
        right: number of right answers, 0 to samples.
        samples: number of answers, at least 1.
        confidence: confidence level in (0, 1).

    Returns:
        (low, high), in [0, 1].
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = right / samples
    centre = share + z * z / (2 * samples)
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    low, high = ((centre + sign * spread) / (1 + z * z / samples) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: are two methods right equally often on the same samples?

    Args:
        only_first, only_second: numbers of samples on which only the first or only the second is right.

    Returns:
        The probability of a split of these samples that is at least as uneven, if both are equally likely.
    """
    samples = only_first + only_second
    tail = sum(math.comb(samples, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**samples)
