"""Tables and plots of the second edition's studies, for docs/evidence.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.study.conditions import (
    ALIKE,
    COEFFICIENTS,
    CONDITIONS,
    CONTROL,
    GAP,
    SCALED,
    SCALED_BATCHES,
    TRUST,
    WEIGHTED,
    scaled_label,
    trust_label,
)
from benchmarks.study.curves import (
    examples_to,
    generalization_gap,
    mean_curve,
    updates_to,
)
from benchmarks.study.differences import LEVEL, Difference, holm, paired_difference
from benchmarks.study.grid import (
    Cell,
    Contender,
    Metric,
    Outcome,
    Results,
    Row,
    Study,
    measured_ratios,
    outcomes,
)
from benchmarks.study.panels import Line, Panel, plot_panels
from benchmarks.study.render import not_run_yet, shown, with_interval
from benchmarks.study.studies import TWO_CONV

TARGETS = {
    "two-conv, B=4096": 0.55,
    "two-conv, B=8192, constant rate": 0.45,
    "two-conv, B=8192, decayed rate": 0.45,
}
"""The test accuracy that "updates to" is about, by cell."""
NOT_YET = "Not run yet."
GAP_METRIC = Metric("gap")

# Of the first edition, whose three seeds have the same weights and order of the data too.
FIRST_CLAIMS = (
    ("LARS, warm-up", "momentum, warm-up"),
    ("SNGM", "momentum, warm-up"),
    ("CLARS", "momentum, warm-up"),
    ("LAMB, warm-up", "momentum, warm-up"),
    ("Adam, warm-up", "momentum, warm-up"),
    ("VR-Momentum, warm-up", "momentum, warm-up"),
    ("VR-LARS, warm-up", "LARS, warm-up"),
    ("VR-Adam, warm-up", "Adam, warm-up"),
    ("VR-LAMB, warm-up", "LAMB, warm-up"),
    ("EXTRAP-SGD, warm-up", "Nesterov momentum, warm-up"),
    ("EXTRAP-SGD, warm-up", "momentum, warm-up"),
    ("EXTRAP-ADAM, warm-up", "Adam, warm-up"),
)


def results_table(study: Study, results: Results, cell: Cell) -> str:
    """Returns the test result of every contender of a cell, its training loss and its gap.

    Where r was measured, its mean over the runs and their epochs has a column.
    """
    known = outcomes(study, results)
    target = TARGETS.get(cell.name)
    headings = ["method", "rate", f"test {study.metric.title}", "training loss", "gap"]
    if target is not None:
        headings.append(f"updates (examples) to {100 * target:g} %")
    of_cell = [known[cell.name, contender.label].rows for contender in _contenders(study, cell)]
    weighed = any(measured_ratios(rows) for rows in of_cell)
    if weighed:
        headings.append("mean r")
    headings.append("seeds")
    lines = [
        "| " + " | ".join(headings) + " |",
        "|---|" + "---:|" * (len(headings) - 1),
    ]
    missing = []
    for contender in _contenders(study, cell):
        outcome = known[cell.name, contender.label]
        if not outcome.final:
            missing.append(contender.label)
            continue
        values = [
            contender.label,
            f"{outcome.rows[0]['flags']['learning_rate']:g}",
            shown(study.metric, outcome.final),
            _mean_of(outcome.rows, lambda row: row["final"].get("train_loss"), 1.0, 3),
            _mean_of(outcome.rows, generalization_gap, 100.0, 1),
        ]
        if target is not None:
            values.append(_to_target(outcome.rows, target))
        if weighed:
            ratios = measured_ratios(outcome.rows)
            values.append(f"{statistics.fmean(ratios):.2f}" if ratios else "–")
        lines.append("| " + " | ".join([*values, str(len(outcome.final))]) + " |")
    if len(lines) == 2:
        return NOT_YET
    if missing:
        lines += ["", not_run_yet(missing)]
    return "\n".join(lines)


def _contenders(study: Study, cell: Cell) -> list[Contender]:
    return [c for other, cs in study.comparisons if other.name == cell.name for c in cs]


def _mean_of(
    rows: Sequence[Row], value: Callable[[Row], float | None], scale: float, digits: int
) -> str:
    values = [v for row in rows if (v := value(row)) is not None and math.isfinite(v)]
    if not values:
        return "–"
    mean = scale * statistics.fmean(values)
    # Of a run that nearly overflowed the loss has 30 digits.
    text = f"{mean:.{digits}f}" if abs(mean) < 1e4 else f"{mean:.1e}"
    return text.replace("-", "−")


def _to_target(rows: Sequence[Row], target: float) -> str:
    needed = [updates_to(row, "test_accuracy", target) for row in rows]
    middle = statistics.median(needed)
    if not math.isfinite(middle):
        return "not reached"
    examples = statistics.median(examples_to(row, "test_accuracy", target) for row in rows)
    return f"{middle:g} ({examples / 1e6:.2f} M)"


def verdict(metric: Metric, difference: Difference, adjusted: float) -> str:
    """What a paired difference, and its p value with Holm's correction, allow to be said."""
    if not difference.excludes_zero:
        return "not told apart"
    ahead = "ahead" if (difference.mean < 0) == metric.lower_is_better else "behind"
    return ahead if adjusted < LEVEL else f"{ahead}, before the correction"


ClaimDifferences = dict[tuple[str, str], tuple[Difference, float]]


def claim_differences(
    study: Study,
    known: Mapping[tuple[str, str], Outcome],
    cell: Cell,
    value: Callable[[Row], float | None] | None = None,
) -> ClaimDifferences:
    """The paired differences of a study's claims that there are runs for, by pair of methods.

    Beside each is its p value with Holm's correction for all of them.

    Args:
        study: Of the runs.
        known: Its outcomes by cell and method.
        cell: Where they are compared.
        value: Of a run's row; the study's test result by default.
    """
    found: dict[tuple[str, str], Difference] = {}
    for pair in study.claims_of(cell):
        keys = [(cell.name, label) for label in pair]
        if all(key in known for key in keys):
            scores = [_by_seed(study.metric, known[key], value) for key in keys]
            difference = paired_difference(*scores)
            if difference is not None:
                found[pair] = difference
    adjusted = holm([difference.p for difference in found.values()])
    return {pair: (d, p) for (pair, d), p in zip(found.items(), adjusted, strict=True)}


def claims_table(
    study: Study,
    results: Results,
    cell: Cell,
    metric: Metric | None = None,
    value: Callable[[Row], float | None] | None = None,
) -> str:
    """Returns the paired differences of a study's claims that there are runs for, one a row.

    Args:
        study: Of the runs.
        results: Its rows.
        cell: Where they are compared.
        metric: In what; in the study's test result by default.
        value: Of a run's row, where the metric is another one.
    """
    metric = metric or study.metric
    found = claim_differences(study, outcomes(study, results), cell, value)
    if not found:
        return NOT_YET
    lines = [
        f"| method | against | {metric.title}, difference "
        f"[95 % interval] | p | p of Holm, "
        f"{len(found)} comparisons | seeds | the first is |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for (first, second), (difference, p) in found.items():
        lines.append(
            f"| {first} | {second} | {with_interval(metric, difference)} | "
            f"{difference.p:.3f} | {p:.3f} | {difference.seeds} | "
            f"{verdict(metric, difference, p)} |"
        )
    return "\n".join(lines)


def _by_seed(
    metric: Metric, outcome: Outcome, value: Callable[[Row], float | None] | None
) -> dict[int, float]:
    if value is None:
        return outcome.by_seed(metric)
    found = {int(row["flags"]["seed"]): value(row) for row in outcome.rows}
    return {seed: score for seed, score in found.items() if score is not None}


FirstDifferences = dict[tuple[str, str, int], tuple[Difference, float]]


def first_differences(study: Study, results: Results) -> FirstDifferences:
    """The first edition's differences by method, the other one and batch size.

    Beside each is its p value with Holm's correction for all of them.
    """
    known = outcomes(study, results)
    found: dict[tuple[str, str, int], Difference] = {}
    for pair in FIRST_CLAIMS:
        for cell, _ in study.comparisons:
            both = [known.get((cell.name, label), Outcome({}, None, [], [])) for label in pair]
            difference = paired_difference(*(each.by_seed(study.metric) for each in both))
            if difference is not None:
                found[(*pair, batch_of(cell))] = difference
    adjusted = holm([difference.p for difference in found.values()])
    return {key: (d, p) for (key, d), p in zip(found.items(), adjusted, strict=True)}


def batch_of(cell: Cell) -> int:
    """The batch size of a cell."""
    return int(cell.settings["batch_size"])


def differences_by_batch(study: Study, results: Results) -> str:
    """Returns the first edition's differences, a pair a row and a batch size a column.

    Bold where the interval excludes 0, with two stars where that holds after Holm's correction
    for all of them.
    """
    found = first_differences(study, results)
    sizes = sorted(batch_of(cell) for cell, _ in study.comparisons)
    lines = [
        f"| method | against | {' | '.join(f'B = {size:,}' for size in sizes)} |",
        "|---|---|" + "---:|" * len(sizes),
    ]
    for pair in FIRST_CLAIMS:
        shown_ones = []
        for size in sizes:
            if (*pair, size) not in found:
                shown_ones.append("–")
                continue
            difference, adjusted = found[(*pair, size)]
            text = with_interval(study.metric, difference)
            text = f"**{text}**" if difference.excludes_zero else text
            shown_ones.append(text + (" \\*\\*" if adjusted < LEVEL else ""))
        lines.append(f"| {pair[0]} | {pair[1]} | {' | '.join(shown_ones)} |")
    return "\n".join(lines)


def _trust_lines(warmup: bool, name: str) -> list[tuple[str, str, int, float]]:
    """Short label, label, color and τ of what a panel shows."""
    found = [(ALIKE, trust_label(name, None, warmup=warmup), 0, 0.01)]
    for color, tau in enumerate(COEFFICIENTS, start=1):
        found.append((f"τ = {tau:g}", trust_label(name, tau, warmup=warmup), color, tau))
    return found


_PANELS = [(name, warmup) for name in ("LARS", "CLARS") for warmup in (False, True)]


def _title(name: str, warmup: bool) -> str:
    return f"{name}, {'warm-up' if warmup else 'no warm-up'}"


def plot_trust_rates(results: Results, path: Path) -> bool:
    """Validation accuracy over η τ; returns whether there was anything to draw."""
    known = outcomes(TRUST, results)
    cell = TRUST.comparisons[0][0]
    panels = []
    for name, warmup in _PANELS:
        lines = []
        for short, label, color, tau in _trust_lines(warmup, name):
            outcome = known[cell.name, label]
            points = []
            for value, score in sorted(outcome.tried.items()):
                scores = [100 * each for each in outcome.repeated.get(value, [score])]
                if math.isfinite(sum(scores)):
                    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                    points.append((value * tau, statistics.fmean(scores), spread))
            x, y, spreads = zip(*points, strict=True) if points else ((), (), ())
            lines.append(Line(short, x, y, spreads, color))
        panels.append(
            Panel(_title(name, warmup), "η τ", "validation accuracy (%)", lines, log=True)
        )
    return plot_panels(path, [panels[:2], panels[2:]])


def plot_trust_curves(results: Results, path: Path) -> bool:
    """Training loss and test accuracy by epoch; returns whether there was anything to draw."""
    known = outcomes(TRUST, results)
    cell = TRUST.comparisons[0][0]
    rows: list[list[Panel]] = []
    for evaluation, text, scale in (
        ("train_loss", "training loss", 1.0),
        ("test_accuracy", "test accuracy (%)", 100.0),
    ):
        row = []
        for name, warmup in _PANELS:
            lines = []
            for short, label, color, _ in _trust_lines(warmup, name):
                curve = mean_curve(known[cell.name, label].rows, evaluation, scale)
                lines.append(Line(short, *curve, color))
            row.append(Panel(_title(name, warmup), "epoch", text, lines))
        rows += [row[:2], row[2:]]
    return plot_panels(path, rows)


def plot_scaled(results: Results, path: Path) -> bool:
    """Test accuracy by batch size at scaled rates; returns whether there was anything to draw."""
    known = outcomes(SCALED, results)
    rows = []
    for name, (weighted, _) in WEIGHTED.items():
        row = []
        for warmup in (False, True):
            lines = []
            labels = [name, f"{weighted}, k = 8", f"{weighted}, k = 32"]
            labels.append(f"{name} × {CONTROL}")
            for color, label in enumerate(labels):
                points = []
                for batch_size in SCALED_BATCHES:
                    key = (f"two-conv, B={batch_size}", scaled_label(label, warmup))
                    if key in known and (final := [*known[key].by_seed(SCALED.metric).values()]):
                        deviation = statistics.stdev(final) if len(final) > 1 else 0.0
                        points.append((batch_size, 100 * statistics.fmean(final), 100 * deviation))
                if points:
                    x, y, spread = zip(*points, strict=True)
                    lines.append(Line(label, x, y, spread, color, dashed="×" in label))
            row.append(
                Panel(_title(name, warmup), "batch size", "test accuracy (%)", lines, log=True)
            )
        rows.append(row)
    return plot_panels(path, rows)


def plot_gap(results: Results, path: Path) -> bool:
    """Training and test accuracy by epoch; returns whether there was anything to draw."""
    known = outcomes(GAP, results)
    rows = []
    for cell, _ in GAP.comparisons:
        row = []
        for reduced, base in GAP.claims:
            lines = []
            for color, (label, short) in enumerate(((base, "base"), (reduced, "VR"))):
                for split, text in (("train", "training"), ("test", "test")):
                    curve = mean_curve(known[cell.name, label].rows, f"{split}_accuracy", 100.0)
                    lines.append(Line(f"{short}, {text}", *curve, color, split == "train"))
            title = f"{base}, B = {batch_of(cell):,}"
            row.append(Panel(title, "epoch", "accuracy (%)", lines))
        rows.append(row)
    return plot_panels(path, rows)


_PLOTS: dict[str, tuple[Study, Callable[[Results, Path], bool], str]] = {
    "evidence_trust_rates.png": (TRUST, plot_trust_rates, "validation accuracy by η τ"),
    "evidence_trust_curves.png": (TRUST, plot_trust_curves, "training loss and test accuracy"),
    "evidence_scaled.png": (SCALED, plot_scaled, "test accuracy by batch size"),
    "evidence_gap.png": (GAP, plot_gap, "training and test accuracy by epoch"),
}


def has_results(study: Study, results: Results) -> bool:
    return any(outcome.final for outcome in outcomes(study, results).values())


def blocks(results: dict[str, Results]) -> dict[str, str]:
    """Returns this edition's tables by their names on the page."""
    found = {
        "differences": differences_by_batch(TWO_CONV, results[TWO_CONV.name]),
    }
    for study in CONDITIONS:
        known = results[study.name]
        parts = [
            f"![{text}](images/{name})"
            for name, (of, _, text) in _PLOTS.items()
            if of is study and has_results(study, known)
        ]
        for cell in {cell.name: cell for cell, _ in study.comparisons}.values():
            tables = [results_table(study, known, cell), claims_table(study, known, cell)]
            if study is GAP:
                tables.append(claims_table(study, known, cell, GAP_METRIC, generalization_gap))
            if tables[0] != NOT_YET:
                parts += [f"**{cell.name}**", *(t for t in tables if t != NOT_YET)]
        found[study.name] = "\n\n".join(parts) or NOT_YET
    return found


def plots(results: dict[str, Results], images: Path) -> list[Path]:
    """Draws this edition's plots of studies that have a result; returns their files."""
    return [
        images / name
        for name, (study, plot, _) in _PLOTS.items()
        if has_results(study, results[study.name]) and plot(results[study.name], images / name)
    ]
