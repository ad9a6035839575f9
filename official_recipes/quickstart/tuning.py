"""A search for learning rates that treats every optimizer the same way."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from official_recipes.common.keras_options import TrainingOptions
from official_recipes.common.keras_training import RunResult

# Two rates per decade. The search looks at five around the rate it starts from.
_MANTISSAS = (1.0, 3.0)
_RATES_AT_FIRST = 5
_RATES_AT_MOST = 9
_SEEDS = 2


@dataclass(frozen=True)
class RateScore:
    """A learning rate with its means over seeds, at the end of training."""

    learning_rate: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class TuningResult:
    """All rates tried for one optimizer at one batch, in rising order, and the best."""

    optimizer: str
    batch_size: int
    scores: list[RateScore]
    best: RateScore


def tune_learning_rate(
    start: TrainingOptions,
    train: Callable[[TrainingOptions], RunResult],
    rates: Sequence[float] | None = None,
) -> TuningResult:
    """Finds the rate of the best mean validation accuracy; ties go to the lower loss.

    Five rates, half a decade apart, are tried around the starting rate, each with two seeds.
    While the best lies at an end, the next rate beyond is tried too.

    Args:
        start: The run to vary; its learning rate is the middle of the grid.
        train: Trains once, with a validation split in the place of the test split.
        rates: Try exactly these instead.

    Returns:
        Every rate's score and the best one.
    """
    if rates is not None:
        return _result(start, [_score(start, rate, train) for rate in rates])
    middle = _nearest_index(start.schedule.learning_rate)
    scores = {
        index: _score(start, _rate(index), train)
        for index in range(middle - _RATES_AT_FIRST // 2, middle + _RATES_AT_FIRST // 2 + 1)
    }
    while True:
        best = max(scores, key=lambda index: _quality(scores[index]))
        beyond = {min(scores): best - 1, max(scores): best + 1}.get(best)
        if beyond is None or len(scores) >= _RATES_AT_MOST:
            break
        scores[beyond] = _score(start, _rate(beyond), train)
    return _result(start, [scores[index] for index in sorted(scores)])


def _result(start: TrainingOptions, scores: list[RateScore]) -> TuningResult:
    best = max(scores, key=_quality)
    return TuningResult(start.optimizer, start.batch_size, scores, best)


def _quality(score: RateScore) -> tuple[float, float]:
    # Rounded, so that the order of a sum does not decide a tie.
    return round(score.accuracy, 9), -score.loss


def record(data_name: str, results: list[TuningResult]) -> dict[str, Any]:
    """Returns a search as plain data."""
    return {"data": data_name, "results": [asdict(result) for result in results]}


def tuning_table(data_name: str, results: list[TuningResult]) -> Table:
    """Returns one row per optimizer and rate, the best ones marked."""
    table = Table(title=f"{data_name}: validation accuracy, mean of {_SEEDS} seeds")
    table.add_column("optimizer")
    for heading in ("batch", "learning rate", "validation accuracy", "validation loss"):
        table.add_column(heading, justify="right")
    for result in results:
        for score in result.scores:
            table.add_row(
                result.optimizer,
                str(result.batch_size),
                f"{score.learning_rate:g}",
                f"{score.accuracy:.2%}",
                f"{score.loss:.4f}",
                style="bold" if score == result.best else None,
            )
        table.add_section()
    return table


def _score(
    start: TrainingOptions, rate: float, train: Callable[[TrainingOptions], RunResult]
) -> RateScore:
    schedule = replace(start.schedule, learning_rate=rate)
    seeds = range(start.seed, start.seed + _SEEDS)
    runs = [train(replace(start, schedule=schedule, seed=seed)) for seed in seeds]
    if any(run.diverged for run in runs):
        return RateScore(rate, 0.0, float("inf"))
    return RateScore(
        rate,
        statistics.fmean(run.metrics[-1]["validation_accuracy"] for run in runs),
        statistics.fmean(run.metrics[-1]["validation_loss"] for run in runs),
    )


def _rate(index: int) -> float:
    """Returns the grid's rate: index 0 is 1, 1 is 3, 2 is 10, -1 is 0.3."""
    decade, step = divmod(index, len(_MANTISSAS))
    return float(f"{_MANTISSAS[step]:g}e{decade}")


def _nearest_index(rate: float) -> int:
    return min(range(-20, 21), key=lambda index: abs(_rate(index) - rate) / _rate(index))
