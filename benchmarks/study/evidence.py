"""The tables and plots of docs/evidence.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.study import conditions_page
from benchmarks.study.grid import Cell, Contender, Metric, Outcome, Results, Row, Study, outcomes
from benchmarks.study.panels import Line, Panel, plot_panels
from benchmarks.study.render import figure_file, plot_comparison, shown
from benchmarks.study.studies import (
    BERT,
    DLRM,
    EXCLUSIONS,
    FAMILIES,
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
            f"| {contender.label} | "
            f"{rate} | {good_rates(outcome, metric) if outcome.tried else '–'} | "
            f"{len(outcome.tried) or '–'} | "
            f"{shown(metric, [outcome.tried[outcome.best]]) if outcome.tried else '–'} | "
            f"{shown(metric, outcome.final)} | {len(outcome.final)} |"
        )
    if len(missing) == len(contenders):
        lines = []
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    return "\n".join(lines)


def good_rates(outcome: Outcome, metric: Metric) -> str:
    """The rates whose validation score is close to the best, and how far apart their ends are.

    A ``≥`` says that the grid ends there.
    """
    close, tried = outcome.close(metric), sorted(outcome.tried)
    at_least = "≥ " if {close[0], close[-1]} & {tried[0], tried[-1]} else ""
    if len(close) == 1:
        return f"{close[0]:g}"
    return f"{close[0]:g}–{close[-1]:g} ({at_least}×{close[-1] / close[0]:.2g})"


def plot_batches(study: Study, results: Results, path: Path) -> bool:
    """Draws the test result over the batch size; returns whether there was anything to draw."""
    known = outcomes(study, results)
    cells = sorted((cell for cell, _ in study.comparisons), key=_batch)
    panels = []
    for family, kinds in FAMILIES.items():
        lines: list[Line] = []
        for label in _labels(study, kinds):
            points = [
                (_batch(cell), 100 * statistics.fmean(final), 100 * _spread(final))
                for cell in cells
                if (found := known.get((cell.name, label))) and (final := _finite(found.final))
            ]
            if len(points) > 1:  # A line needs two batch sizes.
                x, y, spread = zip(*points, strict=True)
                lines.append(_line(label, len(lines), x, y, spread))
        unit = f"test {study.metric.title} (%)"
        panels.append(Panel(family, "batch size", unit, lines, log=True))
    return plot_panels(path, [panels])


def plot_rates(study: Study, results: Results, path: Path) -> bool:
    """Draws validation results over the learning rate; returns whether there was anything.

    Of the optimizers that all batch sizes have, a cell a row.
    """
    known = outcomes(study, results)
    cells = sorted((cell for cell, _ in study.comparisons), key=_batch)
    common = set.intersection(*({c.label for c in cs} for _, cs in study.comparisons))
    rows = []
    for cell in cells:
        row = []
        for family, kinds in FAMILIES.items():
            lines: list[Line] = []
            for label in _labels(study, kinds):
                if label not in common:
                    continue
                tried = sorted(known[cell.name, label].tried.items())
                points = [(v, 100 * s) for v, s in tried if math.isfinite(s)]
                lost = [v for v, s in tried if not math.isfinite(s)]
                x, y = zip(*points, strict=True) if points else ((), ())
                lines.append(_line(label, len(lines), x, y, (), lost))
            title = f"B = {_batch(cell):,}: {family}"
            unit = f"validation {study.metric.title} (%)"
            row.append(Panel(title, "learning rate (×: diverged)", unit, lines, log=True))
        rows.append(row)
    return plot_panels(path, rows)


def _line(
    label: str,
    colour: int,
    x: Sequence[float],
    y: Sequence[float],
    spread: Sequence[float],
    lost: Sequence[float] = (),
) -> Line:
    """Dashed, and said so, without warm-up, which most have."""
    kind, warmup = optimizer_and_warmup(label)
    text = kind if warmup else f"{kind}, no warm-up"
    return Line(text, x, y, spread, colour, dashed=not warmup, lost=lost)


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


def plot_regression(study: Study, results: Results, path: Path) -> bool:
    """Draws losses, weights and ratios of the first cell, and what γ and k do in all cells."""
    known = outcomes(study, results)
    cell, contenders = study.comparisons[0]
    labels = [c.label for c in contenders[:2]]
    rows = {label: known[cell.name, label].rows for label in labels}
    if not all(rows.values()):
        return False
    first = {
        label: next(r for r in found if "weights" in r["curve"]) for label, found in rows.items()
    }
    with figure_file(path, (11, 7.5)) as figure:
        axes = figure.subplots(2, 3)
        for number, label in enumerate(labels):
            for row in rows[label]:
                curve = row["curve"]
                axes[0, 0].plot(
                    curve["steps"], curve["test_loss"], color=f"C{number}", linewidth=1.2,
                    label=f"{label}, rate {row['value']:g}" if row is rows[label][0] else None,
                )  # fmt: skip
        axes[0, 0].set_yscale("log")
        axes[0, 0].set_title("test loss, three seeds")
        axes[0, 0].legend(fontsize=8)
        for index in range(10):
            for label, style in zip(labels, ("-", "--"), strict=True):
                curve = first[label]["curve"]
                axes[0, 1].plot(
                    curve["steps"], [w[index] for w in curve["weights"]], style, linewidth=1,
                    color=f"C{index}",
                )  # fmt: skip
            curve = first["VR-SGD"]["curve"]
            axes[0, 2].plot(
                curve["steps"][: len(curve["ratios"])], [r[index] for r in curve["ratios"]],
                linewidth=1, color=f"C{index}", label=f"w{index + 1}",
            )  # fmt: skip
        axes[0, 1].set_title("weights 1 to 10 (dashed: VR-SGD)")
        axes[0, 2].set_title("r of VR-SGD, a weight each")
        axes[0, 2].legend(fontsize=7, ncols=2)
        for axis in axes[0]:
            axis.set_xlabel("update")
        for axis, kind, values in (
            (axes[1, 0], "γ", GAMMAS),
            (axes[1, 1], "k", sorted({*SUB_BATCH_NUMBERS, 32})),
        ):
            for number, (each, _) in enumerate(study.comparisons):
                points = []
                for value in values:
                    main = value == (0.1 if kind == "γ" else 32)
                    label = "VR-SGD" if main else f"VR-SGD, {kind} = {value:g}"
                    if final := _finite(known[each.name, label].final):
                        points.append((value, statistics.fmean(final), _spread(final)))
                if points:
                    axis.errorbar(
                        *zip(*points, strict=True), color=f"C{number}", marker="o", markersize=4,
                        linewidth=1, capsize=2, label=each.name,
                    )  # fmt: skip
            axis.set_xscale("log")
            axis.set_xlabel(kind)
            axis.set_title(f"log₁₀ test loss by {kind}, each with its best rate", fontsize=10)
        axes[1, 2].set_visible(False)
        figure.legend(
            *axes[1, 0].get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(1, 0.2)
        )
        figure.suptitle(f"{cell.name} (upper row)")
        for axis in axes.flat:
            axis.grid(alpha=0.3)
    return True


def _labels(study: Study, kinds: Sequence[str]) -> list[str]:
    """Of all contenders with these optimizers, in the optimizers' order."""
    labels = dict.fromkeys(c.label for _, contenders in study.comparisons for c in contenders)
    found = [label for label in labels if optimizer_and_warmup(label)[0] in kinds]
    return sorted(found, key=lambda label: kinds.index(optimizer_and_warmup(label)[0]))


def _batch(cell: Cell) -> int:
    return int(cell.settings["batch_size"])


def _finite(scores: Sequence[float]) -> list[float]:
    return [score for score in scores if math.isfinite(score)]


def _spread(scores: Sequence[float]) -> float:
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def blocks(results: dict[str, Results]) -> dict[str, str]:
    """Returns the tables of the page by their names."""
    found: dict[str, str] = {}
    for study in _TUNED:
        for cell, contenders in study.comparisons:
            name = f"{study.name}-{_batch(cell)}"
            found[name] = tuned_table(study, results[study.name], cell, list(contenders))
    found["regression"] = regression_table(REGRESSION, results[REGRESSION.name])
    return found | conditions_page.blocks(results)


def plots(results: dict[str, Results], images: Path) -> list[Path]:
    """Draws the plots of the page that have something to show; returns their files."""
    drawn: list[tuple[Callable[[Study, Results, Path], bool], Study, str]] = [
        (plot_batches, TWO_CONV, "evidence_batches.png"),
        (plot_rates, TWO_CONV, "evidence_rates.png"),
        (plot_regression, REGRESSION, "evidence_regression.png"),
    ]
    written = [
        images / name
        for plot, study, name in drawn
        if plot(study, results[study.name], images / name)
    ]
    for study in _TUNED:
        known = outcomes(study, results[study.name])
        for cell, contenders in study.comparisons:
            finished = [c for c in contenders if known[cell.name, c.label].final]
            if len(finished) > 1:
                path = images / f"evidence_{study.name}_{_batch(cell)}.png"
                plot_comparison(study, results[study.name], cell, finished, path)
                written.append(path)
    return written + conditions_page.plots(results, images)
