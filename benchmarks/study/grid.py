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

from benchmarks.study.choice import Choice, Rule, choose
from benchmarks.study.differences import paired_difference

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
        repeated_seeds: Values near the best are tried with these too, and one is chosen by
            `choice.choose`; without any the best one is.
        final_seeds: The best value is tested with these.
        more_seeds: And with these, where one of the study's claims needs them.
        final_settings: Further flags of the test's runs.
        claims: In the place of the study's, where it compares others.
    """

    name: str
    settings: Mapping[str, Scalar]
    validation_size: int | None
    tuning_seeds: tuple[int, ...] = (1,)
    final_seeds: tuple[int, ...] = (1, 2, 3)
    repeated_seeds: tuple[int, ...] = ()
    more_seeds: tuple[int, ...] = ()
    final_settings: Mapping[str, Scalar] = field(default_factory=dict)
    claims: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Contender:
    """An optimizer with one hyper-parameter to tune.

    Attributes:
        label: For results and headings.
        settings: Flags of the recipe: optimizer, its arguments, warm-up, ...
        axis: The flag that is tuned.
        values: The first grid, rising, of equal ratios between neighbors.
        takes_from: Label of the contender whose best value of its own axis this one takes over.
        takes_from_cell: The name of that contender's cell, an earlier one; its own by default.
        ratio_of: Label of a contender before it in the cell, by whose mean r (`mean_ratio`) the
            value that is taken over is multiplied; its runs are given ``ratio_sub_batches``.
    """

    label: str
    settings: Mapping[str, Scalar]
    axis: str = "learning_rate"
    values: tuple[float, ...] = ()
    takes_from: str | None = None
    takes_from_cell: str | None = None
    ratio_of: str | None = None


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
        chance: What a run that diverged counts as in means and differences, if anything.
    """

    name: str
    lower_is_better: bool = False
    close: float = 0.01
    scale: float = 100.0
    unit: str = " %"
    digits: int = 2
    label: str = ""
    chance: float | None = None

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        return self.label or self.name

    @property
    def worst(self) -> float:
        """Of a run that diverged."""
        return math.inf if self.lower_is_better else -math.inf

    def counted(self, value: float) -> float:
        """A value, or `chance` for that of a run that diverged."""
        return value if math.isfinite(value) or self.chance is None else self.chance

    def shown(self, value: float) -> str:
        """A value as people read it, without its unit."""
        return f"{self.scale * value:.{self.digits}f}"


# All image data here have ten classes.
ACCURACY = Metric("accuracy", chance=0.1)


@dataclass(frozen=True)
class Study:
    """Cells, each with its contenders.

    Attributes:
        name: Of the study.
        comparisons: Cells and the contenders in each, those that others take from first.
        metric: What is tuned for and reported.
        task: A key of `benchmarks.study.runner.TASKS`.
        claims: Labels of contenders to be told apart, the one said to be ahead first; all that
            are in a cell together, where it has no claims of its own.
    """

    name: str
    comparisons: Sequence[tuple[Cell, Sequence[Contender]]]
    metric: Metric = ACCURACY
    task: str = "cifar"
    claims: Sequence[tuple[str, str]] = ()

    def claims_of(self, cell: Cell) -> Sequence[tuple[str, str]]:
        """The pairs that are told apart in a cell, if it has both."""
        return cell.claims or self.claims


SUPERSEDED = "superseded"
"""The key of a table's line that says which earlier rows no longer count.

Its value has the fields that those rows have in common, by which they are found; ``reason`` stands
beside it.
"""


def counted(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows of runs without those that a later line marks as superseded."""
    left: list[Row] = []
    for row in rows:
        if SUPERSEDED not in row:
            left.append(row)
            continue
        marked = row[SUPERSEDED]
        flags = marked.get("flags", {})
        fields = {name: value for name, value in marked.items() if name != "flags"}
        left = [
            other
            for other in left
            if any(other.get(name) != value for name, value in fields.items())
            or any(other["flags"].get(name) != value for name, value in flags.items())
        ]
    return left


class Results:
    """The rows of one study that count, found by what identifies a run; the latest of equal ones.

    Args:
        study: Whose rows are taken.
        rows: Of the table, in its order.
    """

    def __init__(self, study: Study, rows: Iterable[Row]) -> None:
        self._metric = study.metric
        self._rows = {_key(row): row for row in counted(rows) if row.get("study") == study.name}

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
        tried: Mean validation score by value of the axis, of the first seeds.
        best: The value of the best one, ``None`` while runs are missing.
        final: Test scores at the best value, one per seed that has been run.
        missing: Runs still to be made before more can be said.
        rows: Of the table, those behind ``final``.
        repeated: Validation scores of all tuning seeds, of the values that were near the best.
    """

    tried: dict[float, float]
    best: float | None
    final: list[float]
    missing: list[Run]
    rows: list[Row] = field(default_factory=list)
    repeated: dict[float, list[float]] = field(default_factory=dict)

    def by_seed(self, metric: Metric) -> dict[int, float]:
        """Test scores by seed, as they count in means and differences."""
        seeds = [int(row["flags"]["seed"]) for row in self.rows]
        return dict(zip(seeds, map(metric.counted, self.final), strict=True))

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
    taken: dict[tuple[str, str], dict[str, float]] = {}
    axes = {(cell.name, c.label): c.axis for cell, cs in study.comparisons for c in cs}
    for cell, contenders in study.comparisons:
        for contender in contenders:
            key = (cell.name, contender.label)
            taken[key] = {}
            if contender.takes_from is not None:
                source = (contender.takes_from_cell or cell.name, contender.takes_from)
                best = found[source].best
                if best is None:
                    found[key] = Outcome({}, None, [], [])
                    continue
                factor = 1.0
                if contender.ratio_of is not None:
                    weighted = found[cell.name, contender.ratio_of]
                    if weighted.best is None or weighted.missing:
                        found[key] = Outcome({}, None, [], [])
                        continue
                    factor = mean_ratio(weighted.rows)
                taken[key] = {axes[source]: best if factor == 1.0 else _rounded(factor * best, 1.0)}
            found[key] = _outcome(study, cell, contender, taken[key], results, cell.final_seeds)
    undecided = _undecided(study, found)
    for cell, contenders in study.comparisons:
        for contender in contenders:
            key = (cell.name, contender.label)
            if key in undecided:
                seeds = (*cell.final_seeds, *cell.more_seeds)
                found[key] = _outcome(study, cell, contender, taken[key], results, seeds)
    return found


def mean_ratio(rows: Sequence[Row]) -> float:
    """VRGD's mean r over a run and over runs; 1 if no run came to the first evaluation."""
    found = measured_ratios(rows)
    return statistics.fmean(found) if found else 1.0


def measured_ratios(rows: Sequence[Row]) -> list[float]:
    """VRGD's mean r at every evaluation of the runs at which it was measured."""
    name = "train_mean_ratio"
    return [each[name] for row in rows for each in row.get("evaluations", ()) if each.get(name)]


def _undecided(study: Study, found: Mapping[tuple[str, str], Outcome]) -> set[tuple[str, str]]:
    """Contenders that a claim needs apart and whose first seeds do not tell apart."""
    undecided: set[tuple[str, str]] = set()
    for cell in {cell.name: cell for cell, _ in study.comparisons}.values():
        for pair in study.claims_of(cell) if cell.more_seeds else ():
            keys = [(cell.name, label) for label in pair]
            both = [found[key] for key in keys if key in found]
            if len(both) < 2 or any(len(o.rows) < len(cell.final_seeds) for o in both):
                continue
            difference = paired_difference(*(outcome.by_seed(study.metric) for outcome in both))
            if (
                difference is not None
                and not difference.excludes_zero
                and abs(difference.mean) > study.metric.close
            ):
                undecided.update(keys)
    return undecided


def next_runs(study: Study, results: Results) -> list[Run]:
    """The runs that can be made now; none are left when the study is complete."""
    return [run for outcome in outcomes(study, results).values() for run in outcome.missing]


def _outcome(
    study: Study,
    cell: Cell,
    contender: Contender,
    inherited: Mapping[str, float],
    results: Results,
    final_seeds: Sequence[int],
) -> Outcome:
    def run(stage: str, value: float, seed: int) -> Run:
        settings: dict[str, Scalar] = {**cell.settings, **contender.settings, **inherited}
        if contender.values:
            settings[contender.axis] = value
        settings["seed"] = seed
        if cell.validation_size is not None:
            settings["validation_size"] = cell.validation_size if stage == TUNING else 0
        if stage == FINAL:
            settings.update(cell.final_settings)
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
    repeated: dict[float, list[float]] = {}
    if contender.values and cell.repeated_seeds:
        seeds = (*cell.tuning_seeds, *cell.repeated_seeds)
        for value in tried:
            scores = [results.score(run(TUNING, value, s)) for s in seeds]
            if None not in scores:
                repeated[value] = [float(score) for score in scores if score is not None]
        choice = _choice(study.metric, tried, repeated)
        if choice.value is None:
            runs = [run(TUNING, v, s) for v in choice.repeated for s in cell.repeated_seeds]
            missing = [r for r in runs if results.score(r) is None]
            return Outcome(dict(sorted(tried.items())), None, [], missing, [], repeated)
        best = choice.value
    runs = [run(FINAL, best, seed) for seed in final_seeds]
    scores = [results.score(r) for r in runs]
    return Outcome(
        dict(sorted(tried.items())),
        best,
        [s for s in scores if s is not None],
        [r for r, s in zip(runs, scores, strict=True) if s is None],
        [row for r in runs if (row := results.row(r)) is not None],
        repeated,
    )


def _choice(
    metric: Metric, first: Mapping[float, float], repeated: Mapping[float, Sequence[float]]
) -> Choice:
    sign = -1.0 if metric.lower_is_better else 1.0
    return choose(
        {value: sign * score for value, score in first.items()},
        {value: [sign * score for score in scores] for value, scores in repeated.items()},
        Rule(near=2 * metric.close, spread=5 * metric.close, collapse=10 * metric.close),
    )


def _rounded(value: float, like: float) -> float:
    return int(value) if isinstance(like, int) else float(f"{value:.3g}")


def _key(row: Row) -> tuple[Any, ...]:
    flags = tuple(sorted((k, str(v)) for k, v in row["flags"].items()))
    return (row["study"], row["cell"], row["label"], row["stage"], flags)
