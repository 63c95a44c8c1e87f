"""The uncertainty of an accuracy, and a test of the difference between two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean


def wilson_interval(right: float, samples: float, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a proportion by Wilson (1927).

    Args:
        right: number of right answers, 0 to samples.
        samples: number of answers, above 0.
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


def clustered_interval(
    values: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of the mean of values in [0, 1] that come in clusters, such as questions about one video.

    Wilson's interval with the effective number of values: their number over the design effect, which is the variance of
    the mean over that of independent proportions, and at least 1. One more cluster, of which all values differ from the
    others, is added to both, so that a few different values do not make the variance seem small: if all values are
    equal, each cluster counts once. Few clusters make the interval wider by Student's t.

    Args:
        values: one or more.
        clusters: the cluster of each value.
        confidence: confidence level in (0, 1).

    Returns:
        (low, high), in [0, 1].

    Source:
        Korn and Graubard, Confidence intervals for proportions with small expected number of positive counts estimated
        from survey data, Survey Methodology 24, 1998; with Wilson's interval instead of Clopper and Pearson's.
    """
    mean, count = fmean(values), len(values)
    sums: dict[Hashable, float] = {}
    sizes = Counter(clusters)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    groups = len(sums)
    if groups == 1:
        return wilson_interval(mean, 1, confidence)
    size = sum(number**2 for number in sizes.values()) / count  # of the cluster that is added
    observed = groups / (groups - 1) * sum(total**2 for total in sums.values()) + size**2
    independent = count * mean * (1 - mean) + size
    effective = count / max(1.0, observed / independent)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    effective *= (z / _student_quantile(z, groups - 1)) ** 2
    return wilson_interval(mean * effective, effective, confidence)


def _student_quantile(z: float, freedom: int) -> float:
    """Student's quantile from the normal one, by the Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


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
