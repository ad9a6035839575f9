"""What a run's evaluations by epoch tell; pure functions of a row of the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.study.grid import Row


def updates_to(row: Row, name: str, target: float) -> float:
    """The updates after which an evaluation had first reached a target; infinite if none had.

    Args:
        row: Of a run that was evaluated by epoch.
        name: Of the evaluation, ``test_accuracy`` say; one that rises.
        target: To be reached.
    """
    for each in row["evaluations"]:
        value = each.get(name)
        if value is not None and value >= target:
            return round(each["epoch"] * row["updates"] / row["evaluations"][-1]["epoch"])
    return math.inf


def examples_to(row: Row, name: str, target: float) -> float:
    """The same in training examples."""
    return updates_to(row, name, target) * row["batch_size"]


def generalization_gap(row: Row, name: str = "accuracy") -> float | None:
    """Test − training at the end, both in evaluation mode; ``None`` if there is only one."""
    both = [row["final"].get(f"{split}_{name}") for split in ("test", "train")]
    return None if None in both else both[0] - both[1]


def mean_curve(
    rows: Sequence[Row], name: str, scale: float = 1.0
) -> tuple[list[float], list[float], list[float]]:
    """Epochs, means and standard deviations of an evaluation over the seeds' rows, times a scale.

    Only epochs that all rows have, with finite values, are kept.
    """
    by_epoch: dict[float, list[float]] = {}
    for row in rows:
        for each in row["evaluations"]:
            if (value := each.get(name)) is not None and math.isfinite(value):
                by_epoch.setdefault(each["epoch"], []).append(scale * value)
    kept = sorted(epoch for epoch, values in by_epoch.items() if len(values) == len(rows))
    return (
        kept,
        [statistics.fmean(by_epoch[epoch]) for epoch in kept],
        [statistics.stdev(v) if len(v := by_epoch[epoch]) > 1 else 0.0 for epoch in kept],
    )
