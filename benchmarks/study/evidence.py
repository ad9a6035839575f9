"""The tables and plots of docs/evidence.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.study.grid import Cell, Contender, Metric, Outcome, Results, Row, Study, outcomes
from benchmarks.study.render import figure_file, plot_comparison, shown
from benchmarks.study.studies import (
    BASELINES,
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    seen = [c for c in cells if any(o.final for (name, _), o in known.items() if name == c.name)]
    if len(seen) < 2:  # A line needs two batch sizes.
        return False
    with figure_file(path, (13, 6)) as figure:
        axes = figure.subplots(1, len(FAMILIES), sharex=True, sharey=True)
        for axis, (family, kinds) in zip(axes, FAMILIES.items(), strict=True):
            place = 0
            for label in _labels(study, kinds):
                points = [
                    (_batch(cell), statistics.fmean(final), _spread(final))
                    for cell in seen
                    if (found := known.get((cell.name, label))) and (final := _finite(found.final))
                ]
                if not points:
                    continue
                x, y, spread = zip(*points, strict=True)
                axis.errorbar(
                    # Slightly apart, so that no error bar hides another.
                    [value * 1.02 ** (place - 4) for value in x],
                    [100 * value for value in y],
                    [100 * value for value in spread],
                    label=label,
                    capsize=2,
                    **_style(label, kinds),
                )
                place += 1
            axis.set_xscale("log", base=2)
            axis.set_xticks([_batch(cell) for cell in seen], [str(_batch(cell)) for cell in seen])
            axis.set_xlabel("batch size")
            axis.set_title(family, fontsize=10)
            axis.grid(alpha=0.3)
            _legend(axis, below=0.12)
        axes[0].set_ylabel(f"test {study.metric.title} (%), mean and standard deviation")
    return True


def plot_rates(study: Study, results: Results, path: Path) -> bool:
    """Draws validation results over the learning rate; returns whether there was anything."""
    from matplotlib.ticker import LogLocator, NullFormatter

    known = outcomes(study, results)
    cells = sorted((cell for cell, _ in study.comparisons), key=_batch)
    cells = [c for c in cells if any(o.tried for (name, _), o in known.items() if name == c.name)]
    if not cells:
        return False
    with figure_file(path, (13, 0.6 + 5 * len(cells))) as figure:
        axes = figure.subplots(len(cells), len(FAMILIES), squeeze=False, sharey="row")
        for line, cell in zip(axes, cells, strict=True):
            for axis, (family, kinds) in zip(line, FAMILIES.items(), strict=True):
                for label in _labels(study, kinds):
                    outcome = known.get((cell.name, label))
                    tried = sorted(outcome.tried.items()) if outcome else []
                    points = [(v, 100 * s) for v, s in tried if math.isfinite(s)]
                    style = _style(label, kinds)
                    if points:
                        axis.plot(*zip(*points, strict=True), label=label, **style)
                    for value, score in tried:
                        if not math.isfinite(score):
                            axis.plot(
                                [value], [0.02], **{**style, "marker": "x", "markersize": 7},
                                transform=axis.get_xaxis_transform(),
                            )  # fmt: skip
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter(NullFormatter())
                axis.set_title(f"{cell.name}: {family}", fontsize=10)
                axis.set_xlabel("learning rate (×: diverged)")
                axis.grid(alpha=0.3, which="both")
                _legend(axis, below=0.18)
            line[0].set_ylabel(f"validation {study.metric.title} (%), one seed")
    return True


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


def _style(label: str, kinds: Sequence[str]) -> dict[str, Any]:
    """A colour for each optimizer, dashed without warm-up, squares for the baselines."""
    kind, warmup = optimizer_and_warmup(label)
    return {
        "color": f"C{kinds.index(kind)}",
        "linestyle": "-" if warmup else "--",
        "marker": "s" if kind in BASELINES else "o",
        "markersize": 4,
        "linewidth": 1.3,
    }


def _legend(axis: Axes, below: float) -> None:
    """Beneath the axis, as lines go from one corner to the other; ``below`` in its height."""
    if axis.get_legend_handles_labels()[1]:
        axis.legend(
            fontsize=8,
            handlelength=3,  # long enough to see dashes
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -below),
        )


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
    return found


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
    return written
