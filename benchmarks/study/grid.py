"""What a study runs: contenders that are tuned on a validation split, then tested with seeds.

Nothing here trains. A study is a function of the results so far: `next_runs` says what is still
to be run, so that an interrupted study goes on where it was and a best value at the edge of its
grid leads to one more run beyond.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Scalar = float | int | bool | str
Row = dict[str, Any]

TUNING, FINAL = "tuning", "final"
_SPLITS = {TUNING: "validation", FINAL: "test"}
_AT_MOST = 9
_UNTUNED = (1.0,)


@dataclass(frozen=True)
class Cell:
    """What all contenders of a comparison have in common.

    Attributes:
        name: For results and headings.
        settings: Flags of the recipe: model, batch_size, epochs, schedule, ...
        validation_size: Training examples set apart for tuning; ``None`` where the task has a
            validation split of its own.
        tuning_seeds: Each value of a grid is tried with these.
        final_seeds: The best value is tested with these.
    """

    name: str
    settings: Mapping[str, Scalar]
    validation_size: int | None
    tuning_seeds: tuple[int, ...] = (1,)
    final_seeds: tuple[int, ...] = (1, 2, 3)


@dataclass(frozen=True)
class Contender:
    """An optimizer with one hyper-parameter to tune.

    Attributes:
        label: For results and headings.
        settings: Flags of the recipe: optimizer, its arguments, warm-up, ...
        axis: The flag that is tuned.
        values: The first grid, rising, of equal ratios between neighbours.
        takes_from: Label of the contender whose best value of its own axis this one takes over.
    """

    label: str
    settings: Mapping[str, Scalar]
    axis: str = "learning_rate"
    values: tuple[float, ...] = ()
    takes_from: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        study: The study's name.
        cell: The cell's name.
        label: The contender's.
        stage: `TUNING` or `FINAL`.
        value: Of the contender's axis.
        settings: All flags of the recipe, the axis and the seed among them.
    """

    study: str
    cell: str
    label: str
    stage: str
    value: float
    settings: Mapping[str, Scalar] = field(hash=False)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings["seed"])

    def head(self) -> Row:
        """What identifies the run in the table."""
        return {
            "study": self.study,
            "cell": self.cell,
            "label": self.label,
            "stage": self.stage,
            "value": self.value,
            "flags": dict(self.settings),
        }


@dataclass(frozen=True)
class Metric:
    """What a run is judged by.

    Attributes:
        name: In the results' ``final``, without its split.
        lower_is_better: Whether it is a loss.
        close: Two values that differ by no more count as equally good.
        scale: What a value is multiplied by where it is shown.
        unit: Behind a shown value.
        digits: Of a shown value, behind the point.
        label: In tables and plots; the name by default.
    """

    name: str
    lower_is_better: bool = False
    close: float = 0.01
    scale: float = 100.0
    unit: str = " %"
    digits: int = 2
    label: str = ""

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        return self.label or self.name

    @property
    def worst(self) -> float:
        """Of a run that diverged."""
        return math.inf if self.lower_is_better else -math.inf

    def shown(self, value: float) -> str:
        """A value as people read it, without its unit."""
        return f"{self.scale * value:.{self.digits}f}"


ACCURACY = Metric("accuracy")


@dataclass(frozen=True)
class Study:
    """Cells, each with its contenders.

    Attributes:
        name: Of the study.
        comparisons: Cells and the contenders in each, those that others take from first.
        metric: What is tuned for and reported.
        task: A key of `benchmarks.study.runner.TASKS`.
    """

    name: str
    comparisons: Sequence[tuple[Cell, Sequence[Contender]]]
    metric: Metric = ACCURACY
    task: str = "cifar"


class Results:
    """The rows of one study, found by what identifies a run; the latest of equal ones counts."""

    def __init__(self, study: Study, rows: Iterable[Row]) -> None:
        self._metric = study.metric
        self._rows = {_key(row): row for row in rows if row.get("study") == study.name}

    def row(self, run: Run) -> Row | None:
        """The result of a run, if there is one."""
        return self._rows.get(_key(run.head()))

    def score(self, run: Run) -> float | None:
        """The metric at the end; a run that diverged has the worst there is."""
        row = self.row(run)
        if row is None:
            return None
        found = row["final"].get(f"{_SPLITS[run.stage]}_{self._metric.name}")
        return self._metric.worst if row["diverged"] or found is None else float(found)

    def loss(self, run: Run) -> float:
        """The loss at the end; 0 where there is none beside the metric, infinite if it diverged."""
        row = self.row(run)
        if row is None or row["diverged"]:
            return math.inf
        found = row["final"].get(f"{_SPLITS[run.stage]}_loss", 0.0)
        return math.inf if found is None else float(found)


@dataclass(frozen=True)
class Outcome:
    """What is known of a contender.

    Attributes:
        tried: Mean validation score by value of the axis.
        best: The value of the best one, ``None`` while runs are missing.
        final: Test scores at the best value, one per seed that has been run.
        missing: Runs still to be made before more can be said.
        rows: Of the table, those behind ``final``.
    """

    tried: dict[float, float]
    best: float | None
    final: list[float]
    missing: list[Run]
    rows: list[Row] = field(default_factory=list)

    def close(self, metric: Metric) -> list[float]:
        """The values around the best one whose validation score is close to its own, rising."""
        values = sorted(self.tried)
        if self.best is None or self.best not in self.tried:
            return []
        good = [abs(self.tried[value] - self.tried[self.best]) <= metric.close for value in values]
        first = last = values.index(self.best)
        while first > 0 and good[first - 1]:
            first -= 1
        while last + 1 < len(values) and good[last + 1]:
            last += 1
        return values[first : last + 1]


def outcomes(study: Study, results: Results) -> dict[tuple[str, str], Outcome]:
    """What is known of every contender, by names of cell and contender."""
    found: dict[tuple[str, str], Outcome] = {}
    for cell, contenders in study.comparisons:
        for contender in contenders:
            inherited: dict[str, float] = {}
            if contender.takes_from is not None:
                source = found[cell.name, contender.takes_from]
                giver = next(c for c in contenders if c.label == contender.takes_from)
                if source.best is None:
                    found[cell.name, contender.label] = Outcome({}, None, [], [])
                    continue
                inherited[giver.axis] = source.best
            found[cell.name, contender.label] = _outcome(study, cell, contender, inherited, results)
    return found


def next_runs(study: Study, results: Results) -> list[Run]:
    """The runs that can be made now; none are left when the study is complete."""
    return [run for outcome in outcomes(study, results).values() for run in outcome.missing]


def _outcome(
    study: Study,
    cell: Cell,
    contender: Contender,
    inherited: Mapping[str, float],
    results: Results,
) -> Outcome:
    def run(stage: str, value: float, seed: int) -> Run:
        settings: dict[str, Scalar] = {**cell.settings, **contender.settings, **inherited}
        if contender.values:
            settings[contender.axis] = value
        settings["seed"] = seed
        if cell.validation_size is not None:
            settings["validation_size"] = cell.validation_size if stage == TUNING else 0
        return Run(study.name, cell.name, contender.label, stage, value, settings)

    tried: dict[float, float] = {}
    losses: dict[float, float] = {}
    if contender.values:
        grid = list(contender.values)
        while True:
            runs = [run(TUNING, v, s) for v in grid if v not in tried for s in cell.tuning_seeds]
            missing = [r for r in runs if results.score(r) is None]
            if missing:
                return Outcome(tried, None, [], missing)
            for value in grid:
                scores = [results.score(run(TUNING, value, s)) for s in cell.tuning_seeds]
                tried[value] = statistics.fmean(s for s in scores if s is not None)
                # Between runs that learned equally little, it tells which was nearer to learning.
                losses[value] = statistics.fmean(
                    results.loss(run(TUNING, value, s)) for s in cell.tuning_seeds
                )
            sign = -1 if study.metric.lower_is_better else 1
            best = max(grid, key=lambda value: (sign * tried[value], -losses[value]))
            ratio = grid[1] / grid[0] if len(grid) > 1 else 2.0
            if len(grid) >= _AT_MOST:
                break
            # Whole numbers, such as a period, have a lower end; one beyond 1 there is none.
            if best == grid[-1]:
                grid.append(_rounded(best * ratio, best))
            elif best == grid[0] and not (isinstance(best, int) and best / ratio < 1):
                grid.insert(0, _rounded(best / ratio, best))
            else:
                break
    else:
        best = _UNTUNED[0]
    runs = [run(FINAL, best, seed) for seed in cell.final_seeds]
    scores = [results.score(r) for r in runs]
    return Outcome(
        dict(sorted(tried.items())),
        best,
        [s for s in scores if s is not None],
        [r for r, s in zip(runs, scores, strict=True) if s is None],
        [row for r in runs if (row := results.row(r)) is not None],
    )


def _rounded(value: float, like: float) -> float:
    return int(value) if isinstance(like, int) else float(f"{value:.3g}")


def _key(row: Row) -> tuple[Any, ...]:
    flags = tuple(sorted((k, str(v)) for k, v in row["flags"].items()))
    return (row["study"], row["cell"], row["label"], row["stage"], flags)
