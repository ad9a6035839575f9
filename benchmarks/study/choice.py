"""How a value, such as a learning rate, is chosen by several seeds; pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """What counts as close, in the metric's own unit.

    Attributes:
        near: Values whose first seed is within this of the best are tried with the other seeds.
        spread: A value whose seeds lie further apart is on a cliff.
        collapse: A value is on a cliff too if the next larger one is this far below the best.
    """

    near: float = 0.02
    spread: float = 0.05
    collapse: float = 0.10


@dataclass(frozen=True)
class Choice:
    """The state of a choice.

    Attributes:
        value: What is chosen, ``None`` while runs are missing.
        repeated: The values that need all tuning seeds, rising.
    """

    value: float | None
    repeated: list[float]


def choose(
    first: Mapping[float, float], repeated: Mapping[float, Sequence[float]], rule: Rule
) -> Choice:
    """Chooses by the one-standard-error rule towards the smaller value, never on a cliff.

    One seed rules out what is not near its best. Of the others, with all seeds: those whose seeds
    are far apart, or diverged, are left out, in favor of smaller ones if none is left; then those
    above which training collapses, where there are others. Of what remains the smallest is chosen
    whose mean is within one standard error, that of the best one's seeds, of the best mean.

    Args:
        first: The score of the first seed by value; higher is better, -inf if the run diverged.
        repeated: The scores of all tuning seeds, for the values that have them.
        rule: What counts as close.

    Returns:
        The choice, or the values whose other seeds are to be run.
    """
    values = sorted(first)
    best = max(first.values())
    if best == -math.inf:
        return Choice(values[0], [])
    wanted = [value for value in values if first[value] >= best - rule.near]
    while True:
        if any(value not in repeated for value in wanted):
            return Choice(None, wanted)
        steady = [value for value in wanted if _spread(repeated[value]) <= rule.spread]
        smaller = [value for value in values if value < wanted[0]]
        if steady or not smaller:
            break
        wanted = [smaller[-1], *wanted]

    def collapses_above(value: float) -> bool:
        larger = [other for other in values if other > value]
        return bool(larger) and first[larger[0]] < best - rule.collapse

    left = steady or wanted
    left = [value for value in left if not collapses_above(value)] or left
    means = {value: statistics.fmean(repeated[value]) for value in left}
    top = max(left, key=lambda value: means[value])
    error = standard_error(repeated[top])
    return Choice(next(value for value in left if means[value] >= means[top] - error), wanted)


def standard_error(scores: Sequence[float]) -> float:
    """The standard error of a mean; 0 of a single score, or where one is infinite."""
    if len(scores) < 2 or not all(map(math.isfinite, scores)):
        return 0.0
    return statistics.stdev(scores) / math.sqrt(len(scores))


def _spread(scores: Sequence[float]) -> float:
    return max(scores) - min(scores) if all(map(math.isfinite, scores)) else math.inf
