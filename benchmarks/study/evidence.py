"""The tables and plots of docs/evidence.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.study import answer, conditions_page, reduced_page
from benchmarks.study.claims import all_outcomes, claims_of_papers
from benchmarks.study.conditions_page import FIRST_CLAIMS, batch_of, first_differences
from benchmarks.study.differences import paired_difference
from benchmarks.study.grid import Cell, Contender, Metric, Outcome, Results, Row, Study, outcomes
from benchmarks.study.panels import Interval, Line, Panel, plot_intervals, plot_panels
from benchmarks.study.render import not_run_yet, shown
from benchmarks.study.studies import (
    BERT,
    DLRM,
    EXCLUSIONS,
    GAMMAS,
    MNIST,
    MULTI30K,
    REGRESSION,
    RESNET20,
    SLOW_SGD,
    SUB_BATCH_NUMBERS,
    TWO_CONV,
    WIKITEXT2,
    optimizer_and_warmup,
)

_NOT_RUN = "not run"
_TUNED = (TWO_CONV, EXCLUSIONS, RESNET20, MNIST, WIKITEXT2, MULTI30K, DLRM, BERT)


def tuned_table(study: Study, results: Results, cell: Cell, contenders: Sequence[Contender]) -> str:
    """Returns a Markdown table: the best rate, how wide the good rates lie, and the test result."""
    metric, known = study.metric, outcomes(study, results)
    name = metric.title
    lines = [
        f"| method | best rate | good rates | tried | validation {name} | test {name} | seeds |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    missing = []
    for contender in contenders:
        outcome = known[cell.name, contender.label]
        if outcome.best is None:
            missing.append(contender.label)
            continue
        fixed = contender.settings.get(contender.axis, outcome.best)
        rate = f"as {contender.takes_from}" if contender.takes_from else f"{fixed:g}"
        lines.append(
            f"| {contender.label}{_mark(contender)} | "
            f"{rate} | {good_rates(outcome, metric) if outcome.tried else '–'} | "
            f"{len(outcome.tried) or '–'} | "
            f"{shown(metric, [outcome.tried[outcome.best]]) if outcome.tried else '–'} | "
            f"{shown(metric, outcome.final)} | {len(outcome.final)} |"
        )
    if len(missing) == len(contenders):
        lines = []
    if missing:
        lines += ["", not_run_yet(missing)]
    if any(f"{_CONFOUNDED} |" in line for line in lines):
        lines += ["", f"{_CONFOUNDED[1:]} At τ = 0.001, {_WHY}"]
    return "\n".join(lines)


_CONFOUNDED = " †"
_WHY = (
    "where the first step of zero biases has the raw rate: "
    "[confounded](#lars-without-warm-up-confounded)."
)


def _mark(contender: Contender) -> str:
    """Of the first edition's LARS and VR-LARS, whose τ was the default and is not named."""
    kinds = ("lars", "vr_lars")
    confounded = contender.settings.get("optimizer") in kinds and (
        "trust_coefficient" not in contender.settings
    )
    return _CONFOUNDED if confounded else ""


def good_rates(outcome: Outcome, metric: Metric) -> str:
    """The rates whose validation score is close to the best, and how far apart their ends are.

    A ``≥`` says that the grid ends there.
    """
    close, tried = outcome.close(metric), sorted(outcome.tried)
    at_least = "≥ " if {close[0], close[-1]} & {tried[0], tried[-1]} else ""
    if len(close) == 1:
        return f"{close[0]:g}"
    return f"{close[0]:g}–{close[-1]:g} ({at_least}×{close[-1] / close[0]:.2g})"


# Each optimizer has its color on the whole page.
_COLORS = {
    "LARS": 0,
    "LAMB": 1,
    "SNGM": 2,
    "CLARS": 3,
    "Adam": 4,
    "momentum": 5,
    "VR-LARS": 0,
    "VR-LAMB": 1,
    "VR-Adam": 4,
    "VR-Momentum": 5,
    "LARS at τ = 0.01": 1,
}
_AGAINST = "momentum, warm-up"
_BATCH = "batch size"


def _color(label: str) -> int:
    return _COLORS[optimizer_and_warmup(label)[0]]


def _curve_of_differences(
    study: Study, results: Results, pairs: Sequence[tuple[str, str]], text: Callable[..., str]
) -> list[Line]:
    """Lines of `first_differences` by batch size, their intervals as error bars."""
    found = first_differences(study, results)
    lines = []
    for number, pair in enumerate(pairs):
        of_pair = sorted((key[2], found[key][0]) for key in found if key[:2] == pair)
        x, y = [b for b, _ in of_pair], [100 * d.mean for _, d in of_pair]
        spread = [100 * (d.high - d.mean) for _, d in of_pair]
        color = number if text is _both else _color(pair[0])
        dashed = text is not _both and not optimizer_and_warmup(pair[0])[1]
        lines.append(Line(text(*pair), x, y, spread, color, dashed))
    return lines


def _both(first: str, second: str) -> str:
    return f"{_short(first)} − {_short(second)}"


def _short(label: str) -> str:
    """Without the warm-up that all have, and as little as is clear."""
    kind = optimizer_and_warmup(label)[0]
    return {"Nesterov momentum": "Nesterov"}.get(kind, kind)


def plot_answer(study: Study, results: Results, path: Path) -> bool:
    """Draws test accuracy by batch size, and differences from momentum SGD with warm-up."""
    known = outcomes(study, results)
    cells = sorted((cell for cell, _ in study.comparisons), key=batch_of)
    lines = []
    for label in ("LARS, warm-up", "SNGM", _AGAINST, "momentum"):
        points = [
            (batch_of(cell), 100 * statistics.fmean(final), 100 * _spread(final))
            for cell in cells
            if (found := known.get((cell.name, label)))
            and (final := [*found.by_seed(study.metric).values()])
        ]
        x, y, spread = zip(*points, strict=True) if points else ((), (), ())
        dashed = not optimizer_and_warmup(label)[1]
        lines.append(Line(_no_warmup(label), x, y, spread, _color(label), dashed))
    pairs = [
        pair for pair in FIRST_CLAIMS if pair[1] == _AGAINST and pair[0][:2] not in ("VR", "EX")
    ]
    above = _curve_of_differences(study, results, pairs, lambda first, _: _no_warmup(first))
    unit = f"test {study.metric.title} (%)"
    return plot_panels(
        path,
        [
            [Panel("Test accuracy (± standard deviation)", _BATCH, unit, lines, log=True)],
            [
                Panel(
                    "Against momentum SGD with warm-up (95 % intervals)",
                    _BATCH,
                    "points",
                    above,
                    log=True,
                    zero="momentum",
                )
            ],
        ],
    )


def _no_warmup(label: str) -> str:
    kind, warmup = optimizer_and_warmup(label)
    return kind if warmup else f"{kind}, no warm-up"


def plot_vrgd(study: Study, results: Results, path: Path) -> bool:
    """Draws the differences of VRGD's forms from their bases by batch size."""
    pairs = [pair for pair in FIRST_CLAIMS if pair[0].startswith("VR-")]
    lines = _curve_of_differences(study, results, pairs, lambda first, _: _short(first))
    title = "VRGD, k = 8, against its base, both tuned, with warm-up (95 % intervals)"
    return plot_panels(path, [[Panel(title, _BATCH, "points", lines, log=True, zero="base")]], 3.2)


def plot_extrap(study: Study, results: Results, path: Path) -> bool:
    """Draws the differences of EXTRAP's methods from theirs by batch size."""
    pairs = [pair for pair in FIRST_CLAIMS if pair[0].startswith("EXTRAP-")]
    lines = _curve_of_differences(study, results, pairs, _both)
    title = "EXTRAP, k = 8, both tuned, with warm-up (95 % intervals)"
    return plot_panels(path, [[Panel(title, _BATCH, "points", lines, log=True, zero="equal")]], 3.2)


def _loss_line(text: str, rows: Sequence[Row], color: int) -> Line:
    """Training loss by epoch, from the second on: the first one is of another size."""
    by_epoch = list(zip(*(row["train_loss"] for row in rows), strict=False))[1:]
    x = list(range(2, len(by_epoch) + 2))
    y, spread = [statistics.fmean(v) for v in by_epoch], [_spread(v) for v in by_epoch]
    return Line(text, x, y, spread, color)


def plot_loss(study: Study, results: Results, path: Path) -> bool:
    """Draws training loss by epoch: momentum SGD by batch, and methods at the first cell's batch.

    The methods without warm-up, then with it.
    """
    known, cell = outcomes(study, results), study.comparisons[0][0]
    unit = "training loss"
    by_batch = [
        _loss_line(f"B = {batch_of(each):,}", found.rows, color)
        for color, each in enumerate(sorted((c for c, _ in study.comparisons), key=batch_of))
        if (found := known.get((each.name, "momentum")))
    ]
    panels = [[Panel("momentum SGD, no warm-up", "epoch", unit, by_batch)]]
    for warmup in (False, True):
        lines = []
        for kind in ("momentum", "Adam", "LARS", "LARS at τ = 0.01", "SNGM", "CLARS", "LAMB"):
            label = f"{kind}, warm-up" if warmup else kind
            skipped = "LAMB" if not warmup else "LARS at τ = 0.01"
            if kind != skipped and (found := known.get((cell.name, label))):
                text = "LARS at τ = 0.001" if label == "LARS" else kind
                lines.append(_loss_line(text, found.rows, _color(label)))
        title = f"B = {batch_of(cell):,}, {'two epochs of' if warmup else 'no'} warm-up"
        panels.append([Panel(title, "epoch", unit, lines)])
    return plot_panels(path, panels, 2.4)


def plot_warmup(study: Study, results: Results, path: Path) -> bool:
    """Draws what warm-up brings at the first cell's batch, an optimizer a line."""
    known, (cell, contenders) = outcomes(study, results), study.comparisons[0]
    found = []
    for contender in contenders:
        label = contender.label
        both = [known.get((cell.name, each)) for each in (f"{label}, warm-up", label)]
        if None not in both:
            difference = paired_difference(*(each.by_seed(study.metric) for each in both if each))
            if difference is not None:
                ends = (difference.mean, difference.low, difference.high)
                text = label + _mark(contender)
                found.append(Interval(text, *(100 * value for value in ends)))
    found.sort(key=lambda each: -each.middle)
    text = f"points that two epochs of warm-up bring at B = {batch_of(cell):,} (95 % intervals)"
    return plot_intervals(path, found, text)


def plot_rates(study: Study, results: Results, path: Path) -> bool:
    """Draws what half and twice the best rate cost, means and ranges over the batch sizes.

    Of the optimizers that all batch sizes have; a run that diverged has the accuracy of chance.
    """
    known = outcomes(study, results)
    common = set.intersection(*({c.label for c in cs} for _, cs in study.comparisons))
    found = []
    for label in sorted(common):
        lost: dict[int, list[float]] = {0: [], 1: []}
        for cell, _ in study.comparisons:
            tried, best = known[cell.name, label].tried, known[cell.name, label].best
            values = sorted(tried)
            if best in tried and values[0] < best < values[-1]:
                for color, step in ((0, -1), (1, 1)):
                    score = study.metric.counted(tried[values[values.index(best) + step]])
                    lost[color].append(100 * (score - tried[best]))
        for color, losses in lost.items():
            if losses:
                mean = statistics.fmean(losses)
                found.append(Interval(_no_warmup(label), mean, min(losses), max(losses), color))
    found.sort(key=lambda each: (each.label, each.color))
    order = {each.label: -each.middle for each in found if each.color == 1}
    found.sort(key=lambda each: order.get(each.label, 0.0))
    text = "validation accuracy from the best rate's, points: mean and range"
    return plot_intervals(path, found, text, ("half the best rate", "twice the best rate"))


def regression_table(study: Study, results: Results) -> str:
    """Returns how SGD and VR-SGD compare, cell by cell."""
    known = outcomes(study, results)
    lines = [
        "| inputs, labels, updates | method | rate | log₁₀ test loss | updates to SGD's | "
        "to slow SGD's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for cell, contenders in study.comparisons:
        goals = [known[cell.name, label].final for label in ("SGD", SLOW_SGD)]
        for contender in contenders[:4]:
            outcome = known[cell.name, contender.label]
            if outcome.best is None:
                lines.append(f"| {cell.name} | {contender.label} | {_NOT_RUN} | – | – | – |")
                continue
            fixed = contender.settings.get("learning_rate", outcome.best)
            rate = "as SGD" if contender.takes_from else f"{fixed:g}"
            needed = " | ".join(_updates_to(outcome.rows, goal) for goal in goals)
            lines.append(
                f"| {cell.name} | {contender.label} | {rate} | "
                f"{shown(study.metric, outcome.final)} | {needed} |"
            )
    return "\n".join(lines)


def _updates_to(rows: Sequence[Row], goal: Sequence[float]) -> str:
    """Median over the seeds of the first kept update with at most SGD's last loss on that seed."""
    if not rows or len(goal) != len(rows):
        return "–"
    needed = []
    for row, score in zip(rows, goal, strict=True):
        curve = row["curve"]
        pairs = zip(curve["steps"], curve["test_loss"], strict=True)
        needed.append(next((step for step, loss in pairs if loss <= 1.001 * 10**score), math.inf))
    middle = statistics.median(needed)
    return f"{middle:g}" if math.isfinite(middle) else "not reached"


_SETTINGS = ("uniform, no noise", "uniform, noise", "normal, no noise", "normal, noise")
"""Short names of the regression study's cells."""


def plot_regression(study: Study, results: Results, path: Path) -> bool:
    """Draws losses and weights of the first cell, and what k and γ do in all cells."""
    known = outcomes(study, results)
    cell, contenders = study.comparisons[0]
    rows = {c.label: known[cell.name, c.label].rows for c in contenders[:4]}
    if not all(rows.values()):
        return False
    losses, weights = [], []
    for color, (label, found) in enumerate(rows.items()):
        curves = [row["curve"]["test_loss"] for row in found]
        logs = [[math.log10(loss) for loss in at] for at in zip(*curves, strict=True)]
        y, spread = [statistics.fmean(at) for at in logs], [_spread(at) for at in logs]
        losses.append(Line(label, found[0]["curve"]["steps"], y, spread, color))
    for label in ("SGD", "VR-SGD"):
        curve = next(row["curve"] for row in rows[label] if "weights" in row["curve"])
        for color, index in enumerate((0, 4, 9)):
            text = f"w{index + 1}" if label == "SGD" else ""
            y = [each[index] for each in curve["weights"]]
            weights.append(Line(text, curve["steps"], y, (), color, dashed=label != "SGD"))
    panels = [
        Panel(f"{_SETTINGS[0]} (± standard deviation)", "update", "log₁₀ test loss", losses),
        Panel(f"{_SETTINGS[0]}: w1, w5, w10 (dashed: VR-SGD)", "update", "weight", weights),
    ]
    for kind, main, values in (("k", 32, (*SUB_BATCH_NUMBERS, 32)), ("γ", 0.1, GAMMAS)):
        lines = []
        for color, (each, _) in enumerate(study.comparisons):
            points = []
            for value in sorted(values):
                label = "VR-SGD" if value == main else f"VR-SGD, {kind} = {value:g}"
                if final := _finite(known[each.name, label].final):
                    points.append((value, statistics.fmean(final), _spread(final)))
            x, y, spread = zip(*points, strict=True) if points else ((), (), ())
            lines.append(Line(_SETTINGS[color], x, y, spread, color))
        title = f"VR-SGD by {kind}, each at its best rate (± standard deviation)"
        panels.append(Panel(title, kind, "log₁₀ test loss", lines, log=True))
    return plot_panels(path, [[panel] for panel in panels], 2.4)


def _finite(scores: Sequence[float]) -> list[float]:
    return [score for score in scores if math.isfinite(score)]


def _spread(scores: Sequence[float]) -> float:
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def blocks(results: dict[str, Results]) -> dict[str, str]:
    """Returns the tables of the page by their names."""
    known = all_outcomes(results)
    found: dict[str, str] = {"claims": claims_of_papers(known)}
    found |= answer.blocks(known, first_differences(TWO_CONV, results[TWO_CONV.name]))
    for study in _TUNED:
        for cell, contenders in study.comparisons:
            name = f"{study.name}-{batch_of(cell)}"
            found[name] = tuned_table(study, results[study.name], cell, list(contenders))
    found["regression"] = regression_table(REGRESSION, results[REGRESSION.name])
    return found | conditions_page.blocks(results) | reduced_page.blocks(results)


_PLOTS: dict[str, tuple[Callable[[Study, Results, Path], bool], Study]] = {
    "evidence_batches.png": (plot_answer, TWO_CONV),
    "evidence_loss.png": (plot_loss, TWO_CONV),
    "evidence_warmup.png": (plot_warmup, TWO_CONV),
    "evidence_vrgd.png": (plot_vrgd, TWO_CONV),
    "evidence_extrap.png": (plot_extrap, TWO_CONV),
    "evidence_rates.png": (plot_rates, TWO_CONV),
    "evidence_regression.png": (plot_regression, REGRESSION),
}


def plots(results: dict[str, Results], images: Path) -> list[Path]:
    """Draws the plots of the page that have something to show; returns their files."""
    written = [
        images / name
        for name, (plot, study) in _PLOTS.items()
        if plot(study, results[study.name], images / name)
    ]
    written += conditions_page.plots(results, images)
    return written + reduced_page.plots(results, images)
