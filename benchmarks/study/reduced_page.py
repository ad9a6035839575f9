"""Tables and plots of the reduced studies, for docs/evidence.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.study.conditions_page import NOT_YET, batch_of, claims_table, has_results
from benchmarks.study.grid import Cell, Metric, Outcome, Results, Row, Study, outcomes
from benchmarks.study.panels import Line, Panel, plot_panels
from benchmarks.study.reduced import (
    BUDGET,
    COROLLARY,
    CRITEO,
    LOG_LOSS,
    MOMENTUM,
    SMOOTHNESS,
    SNGM_THEORY,
)
from benchmarks.study.render import not_run_yet, shown
from benchmarks.study.smoothness import largest_msgd_rate, msgd_limits
from benchmarks.study.studies import TWO_CONV
from tf_lbopt.schedules import sngm_corollary_1, sngm_corollary_2

_PLOT = "evidence_smoothness.png"
_RATIO = "‖∇f(x) − ∇f(y)‖ / ‖x − y‖"
SMOOTHNESS_METRIC = Metric(
    "smoothness", lower_is_better=True, scale=1.0, unit="", label=f"geometric mean of {_RATIO}"
)
Value = Callable[[Row], float | None]


def log_loss(row: Row) -> float | None:
    """Of the test rows, in a row of the table."""
    return row["final"].get("test_log_loss")


def mean_smoothness(row: Row) -> float | None:
    """The geometric mean along the trajectory; ``None`` of a run that diverged.

    Updates of length 0, at the begin of a warm-up, have none.
    """
    values = [value for value in row.get("smoothness", {}).get("values", []) if value]
    return None if row.get("diverged") or not values else statistics.geometric_mean(values)


def _results_table(study: Study, results: Results, others: Sequence[tuple[Metric, Value]]) -> str:
    """The test result of every contender of the study's cell, beside values of other metrics."""
    known = outcomes(study, results)
    cell, contenders = study.comparisons[0]
    headings = [f"test {study.metric.title}", *(metric.title for metric, _ in others)]
    lines = [
        f"| method | rate | {' | '.join(headings)} | seeds |",
        "|---|" + "---:|" * (len(headings) + 2),
    ]
    missing = []
    for contender in contenders:
        outcome = known[cell.name, contender.label]
        if not outcome.final:
            missing.append(contender.label)
            continue
        found = [shown(study.metric, outcome.final)]
        for metric, value in others:
            scores = [score for row in outcome.rows if (score := value(row)) is not None]
            found.append(shown(metric, scores) if scores else "–")
        rate = f"{outcome.rows[0]['flags']['learning_rate']:g}"
        cells = [contender.label, rate, *found, str(len(outcome.final))]
        lines.append(f"| {' | '.join(cells)} |")
    if missing:
        lines += ["", not_run_yet(missing)]
    return "\n".join(lines)


# --- SNGM's theory --------------------------------------------------------------------------------

_CONSTANTS = (("smoothness", "L"), ("noise", "σ"), ("gradient_norm", "‖∇F‖"), ("loss", "F"))
_MOMENTS = {0.0: "start", 0.5: "middle", 1.0: "end"}


def _constants(rows: Sequence[Row], name: str, part: float | None = None) -> list[float]:
    return [
        each[name]
        for row in rows
        for each in row.get("constants", ())
        if each[name] is not None and part in (None, each["part"])
    ]


def constants_table(results: Results) -> str:
    """Returns L, σ, ‖∇F‖ and F at a few points of the runs, means over the seeds."""
    known = outcomes(SNGM_THEORY, results)
    cell, contenders = SNGM_THEORY.comparisons[0]
    names = " | ".join(symbol for _, symbol in _CONSTANTS)
    lines = [f"| method | at the | {names} |", "|---|---|" + "---:|" * len(_CONSTANTS)]
    for contender in contenders:
        rows = known[cell.name, contender.label].rows
        for part, moment in _MOMENTS.items():
            found = [_constants(rows, name, part) for name, _ in _CONSTANTS]
            if all(found):
                numbers = " | ".join(f"{statistics.fmean(values):.3g}" for values in found)
                lines.append(f"| {contender.label} | {moment} | {numbers} |")
    return "\n".join(lines)


def theory_table(results: Results, tuned: dict[tuple[str, str], Outcome]) -> str:
    """Returns what the corollaries and eq. 4 to 6 give, and what was tuned.

    Args:
        results: Of the study.
        tuned: What is known of the first edition's contenders, by names of cell and contender.
    """
    known = outcomes(SNGM_THEORY, results)
    cell, contenders = SNGM_THEORY.comparisons[0]
    every = [row for c in contenders for row in known[cell.name, c.label].rows]
    of_corollary = known[cell.name, COROLLARY]
    lines = [
        "| from | numbers put in | batch | rate | test accuracy there |",
        "|---|---|---:|---:|---:|",
    ]
    gap = _constants(every, "loss", 0.0)
    of_problem = {
        "largest seen": [max(_constants(every, n), default=0.0) for n in ("smoothness", "noise")],
        "at the end of Corollary 2's runs": [
            statistics.fmean(_constants(of_corollary.rows, n, 1.0) or [0.0])
            for n in ("smoothness", "noise")
        ],
    }
    budget = f"C = {BUDGET:,}"
    for text, (smoothness, noise) in of_problem.items():
        if not (gap and smoothness and noise):
            continue
        start = statistics.fmean(gap)
        numbers = f"{budget}, β = {MOMENTUM}, L = {smoothness:.3g}"
        batch, rate = sngm_corollary_1(BUDGET, smoothness, noise, start, MOMENTUM)
        lines.append(
            f"| Corollary 1, L and σ {text} | {numbers}, σ = {noise:.3g}, F(w₀) − 0 = {start:.3g} "
            f"| {batch:,} | {rate:.2g} | not run |"
        )
        of_rate, of_budget = msgd_limits(BUDGET, smoothness, MOMENTUM)
        most = largest_msgd_rate(smoothness, MOMENTUM)
        lines.append(
            f"| momentum SGD, eq. 4 to 6, L {text} | {numbers} "
            f"| ≤ min({of_rate:.2g}, {of_budget:.3g}) | ≤ {most:.2g} | not run |"
        )
    batch, rate = sngm_corollary_2(BUDGET)
    accuracy = shown(SNGM_THEORY.metric, of_corollary.final)
    lines.append(f"| Corollary 2 | {budget} | {batch:,} | {rate:.3g} | {accuracy} |")
    for label in ("SNGM", "momentum"):
        for each in sorted((each for each, _ in TWO_CONV.comparisons), key=batch_of):
            outcome = tuned.get((each.name, label))
            if outcome is not None and outcome.best is not None and outcome.final:
                lines.append(
                    f"| {label}, tuned (first edition, decayed) | – | {batch_of(each):,} | "
                    f"{outcome.best:g} | {shown(SNGM_THEORY.metric, outcome.final)} |"
                )
    return "\n".join(lines)


# --- Smoothness along the trajectory --------------------------------------------------------------


def plot_smoothness(results: Results, path: Path) -> bool:
    """Draws the smoothness by update; returns whether there was anything to draw."""
    known = outcomes(SMOOTHNESS, results)
    cell, contenders = SMOOTHNESS.comparisons[0]
    lines = []
    for color, contender in enumerate(contenders):
        by_update: dict[float, list[float]] = {}
        rows = [r for r in known[cell.name, contender.label].rows if "smoothness" in r]
        for row in rows:
            curve = row["smoothness"]
            for update, value in zip(curve["updates"], curve["values"], strict=True):
                if value is not None:
                    by_update.setdefault(update, []).append(math.log10(value))
        x = sorted(update for update, values in by_update.items() if len(values) == len(rows))
        y = [statistics.fmean(by_update[update]) for update in x]
        spread = [statistics.stdev(v) if len(v := by_update[u]) > 1 else 0.0 for u in x]
        lines.append(Line(contender.label, x, y, spread, color))
    title = f"{cell.name} (± standard deviation)"
    return plot_panels(path, [[Panel(title, "update", f"log₁₀ {_RATIO}", lines)]], 3.2)


# --- The page -------------------------------------------------------------------------------------


def blocks(results: dict[str, Results]) -> dict[str, str]:
    """Returns the studies' sections by their names on the page."""
    found = dict.fromkeys((CRITEO.name, SNGM_THEORY.name, SMOOTHNESS.name), NOT_YET)
    if has_results(CRITEO, known := results[CRITEO.name]):
        cell = _cell(CRITEO)
        found[CRITEO.name] = _joined(
            _results_table(CRITEO, known, [(LOG_LOSS, log_loss)]),
            claims_table(CRITEO, known, cell),
            claims_table(CRITEO, known, cell, LOG_LOSS, log_loss),
        )
    if has_results(SNGM_THEORY, known := results[SNGM_THEORY.name]):
        found[SNGM_THEORY.name] = _joined(
            constants_table(known),
            theory_table(known, outcomes(TWO_CONV, results[TWO_CONV.name])),
            _results_table(SNGM_THEORY, known, []),
            claims_table(SNGM_THEORY, known, _cell(SNGM_THEORY)),
        )
    if has_results(SMOOTHNESS, known := results[SMOOTHNESS.name]):
        others = [(SMOOTHNESS_METRIC, mean_smoothness)]
        found[SMOOTHNESS.name] = _joined(
            f"![smoothness by update](images/{_PLOT})",
            _results_table(SMOOTHNESS, known, others),
            claims_table(SMOOTHNESS, known, _cell(SMOOTHNESS), *others[0]),
        )
    return found


def _cell(study: Study) -> Cell:
    return study.comparisons[0][0]


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part != NOT_YET)


def plots(results: dict[str, Results], images: Path) -> list[Path]:
    """Draws the plot of smoothness if there is something to draw; returns its file."""
    path = images / _PLOT
    return [path] if plot_smoothness(results[SMOOTHNESS.name], path) else []
