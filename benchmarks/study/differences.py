"""Differences between two methods, paired by seed; pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
LEVEL = 0.05
"""Below it an adjusted p value is one of a difference."""

LEAST_SEEDS = 3
"""Of fewer there is no difference yet: two that happen to be close have a narrow interval."""


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods over the seeds that both have.

    Attributes:
        mean: Of the differences.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p: Of the paired t-test, two-sided.
        seeds: How many there are.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does."""
        return self.low > 0 or self.high < 0


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Returns ``first`` − ``second``, by Student's t over the differences by seed.

    Args:
        first: Scores by seed.
        second: The same of the other method.

    Returns:
        The difference; ``None`` with fewer than three common seeds, or where a run diverged.
    """
    from scipy import stats

    seeds = sorted(set(first) & set(second))
    differences = [first[seed] - second[seed] for seed in seeds]
    if len(seeds) < LEAST_SEEDS or not all(map(math.isfinite, differences)):
        return None
    mean = math.fsum(differences) / len(seeds)
    if max(differences) == min(differences):  # A t statistic of 0 / 0 or x / 0.
        return Difference(mean, mean, mean, 0.0 if mean else 1.0, len(seeds))
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(mean, float(low), float(high), float(test.pvalue), len(seeds))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: the least levels at which each comparison of all is significant.

    Args:
        p_values: Of the comparisons of one family, in any order.

    Returns:
        The adjusted values in the same order.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    greatest = 0.0
    for place, index in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = greatest
    return adjusted
