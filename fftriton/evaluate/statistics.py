"""How sure a measured accuracy is, and a difference between two."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(right: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of Wilson (1927) for a proportion: which true accuracies `right` of `samples` are likely under.

    Args:
        right: correct answers, 0 to samples.
        samples: answers, at least 1.
        confidence: in (0, 1).

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
    """McNemar's exact test, two-sided: are two ways equally often right on the same samples?

    Args:
        only_first, only_second: samples on which one is right and the other is wrong.

    Returns:
        The probability of a split of these samples at least as uneven, if either way is as likely.
    """
    samples = only_first + only_second
    tail = sum(math.comb(samples, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**samples)
