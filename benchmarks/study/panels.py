"""Plots with direct labels, in colors that color-blind people tell apart.

They are 6 inches wide: shown 700 pixels wide, or 360 on a phone, their text can still be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import isotonic_regression

from benchmarks.study.render import figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, without the yellow that is too light for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MOST_LINES = len(COLORS)
_MARKERS = "osD^vP"
_WIDTH = 6.0
# Between two labels, in inches.
_APART = 0.16
# Between the error bars of two lines at one x, in parts of x.
_DODGE = 0.08
_CURVE = 12
"""A line of so many points is a curve: without markers, its spread is a band."""


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Attributes:
        label: Written at its end, if not empty.
        x: Rising.
        y: Of the same length.
        spread: Half lengths of error bars, or of the band about a curve, or nothing.
        color: Its place in `COLORS`.
        dashed: Whether it is.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot of at most `MOST_LINES` lines.

    Attributes:
        title: Above it.
        x_label: Below it.
        y_label: At its left.
        lines: In any order.
        log: Whether x is on a logarithmic scale.
        zero: What y = 0 is, written there; nothing for no such line.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = False
    zero: str = ""


@dataclass(frozen=True)
class Interval:
    """A mean with an interval, on a line of `plot_intervals`.

    Attributes:
        label: At the left; those with one label share a line.
        middle: The mean.
        low: Lower end of the interval.
        high: Upper end.
        color: Its place in `COLORS`.
    """

    label: str
    middle: float
    low: float
    high: float
    color: int = 0


def plot_panels(path: Path, rows: Sequence[Sequence[Panel]], height: float = 2.6) -> bool:
    """Draws panels in rows, as a PNG; returns whether there was anything to draw.

    Args:
        path: Of the PNG.
        rows: Of one or two panels. Two share their y axis, and only the second has labels where
            both have the same lines.
        height: Of a row, in inches.

    Raises:
        ValueError: A panel has more lines than can be told apart, or a row more than two panels.
    """
    for panel in (panel for row in rows for panel in row):
        if len(panel.lines) > MOST_LINES:
            raise ValueError(f"{panel.title}: at most {MOST_LINES} lines, not {len(panel.lines)}")
    columns = max(map(len, rows))
    if columns > 2:
        raise ValueError(f"at most 2 panels beside each other, not {columns}")
    if not any(line.x for row in rows for panel in row for line in panel.lines):
        return False
    alike = [row[0] for row in rows if len(row) > 1 and _labels(row[0]) == _labels(row[1])]
    with figure_file(path, (_WIDTH, height * len(rows))) as figure:
        axes = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
        pairs = [*zip(axes.flat, (panel for row in rows for panel in row), strict=True)]
        for axis, panel in pairs:
            _draw(axis, panel, ticks=10 if columns == 1 else 3)
        for of_row, row in zip(axes, rows, strict=True):
            if not any(line.x for panel in row for line in panel.lines):
                of_row[0].set_yticks([])
        for axis, panel in pairs:
            if not axis.get_subplotspec().is_first_col():
                axis.set_ylabel("")
            if panel not in alike:
                _label_ends(axis, panel, height)
    return True


def _labels(panel: Panel) -> list[str]:
    return [line.label for line in panel.lines if line.x]


def plot_intervals(
    path: Path, intervals: Sequence[Interval], x_label: str, legend: Sequence[str] = ()
) -> bool:
    """Draws means with their intervals, a label a line, beside a line at 0.

    Args:
        path: Of the PNG.
        intervals: From the top.
        x_label: Below.
        legend: What the colors are, if several.

    Returns:
        Whether there was anything to draw.
    """
    labels = list(dict.fromkeys(each.label for each in intervals))
    if not labels:
        return False
    with figure_file(path, (_WIDTH, 0.27 * len(labels) + 0.9 + 0.3 * bool(legend))) as figure:
        axis = figure.subplots()
        axis.axvline(0, color="black", linewidth=1)
        for each in intervals:
            color = COLORS[each.color]
            place = labels.index(each.label) + (0.3 * each.color - 0.15 if legend else 0)
            ends = [[each.middle - each.low], [each.high - each.middle]]
            axis.errorbar(
                [each.middle], [place], xerr=ends, color=color, marker=_MARKERS[each.color],
                markersize=5, linewidth=1.5, capsize=3,
            )  # fmt: skip
        axis.set_yticks(range(len(labels)), labels, fontsize=9)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_xlabel(x_label, fontsize=9)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.25, axis="x")
        axis.spines[["top", "right", "left"]].set_visible(False)
        for color, text in enumerate(legend):
            axis.plot([], [], _MARKERS[color], color=COLORS[color], label=text)
        if legend:
            figure.legend(loc="outside upper center", ncols=len(legend), fontsize=9, frameon=False)
    return True


def _draw(axis: Axes, panel: Panel, ticks: int) -> None:
    lines = [line for line in panel.lines if line.x]
    middle = (len(lines) - 1) / 2
    for place, line in enumerate(lines):
        color, style = COLORS[line.color], "--" if line.dashed else "-"
        if len(line.x) >= _CURVE:
            axis.plot(line.x, line.y, style, color=color, linewidth=1.5)
            if line.spread:
                low, high = zip(
                    *((y - s, y + s) for y, s in zip(line.y, line.spread, strict=True)), strict=True
                )
                axis.fill_between(line.x, low, high, color=color, alpha=0.15, linewidth=0)
            continue
        aside = 1 + _DODGE * (place - middle) if panel.log and line.spread else 1
        axis.errorbar(
            [aside * x for x in line.x], line.y, yerr=line.spread or None, color=color,
            linestyle=style, linewidth=1.5, elinewidth=1, capsize=2,
            marker=_MARKERS[line.color], markersize=4,
        )  # fmt: skip
    if panel.zero:
        axis.axhline(0, color="black", linewidth=1)
    if panel.log:
        axis.set_xscale("log", base=2)
        values = {x for line in lines for x in line.x}
        if len(values) == 1:  # else the lines, which are set aside a little, are at the ends
            (only,) = values
            axis.set_xlim(only / 2, 2 * only)
        at = spaced(values, ticks)
        axis.set_xticks(at, [f"{x:.2g}" if x < 1 else f"{x:,g}" for x in at])
        axis.minorticks_off()
    else:
        axis.locator_params(axis="x", integer=True)
    if not lines:
        axis.set_xticks([])
        axis.text(0.5, 0.5, "not run yet", transform=axis.transAxes, ha="center", fontsize=9)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.x_label, fontsize=9)
    axis.set_ylabel(panel.y_label, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _label_ends(axis: Axes, panel: Panel, height: float) -> None:
    """Writes each line's label beside its end, moved up or down where two would meet."""
    ends = [
        (line.label, line.x[-1], line.y[-1], COLORS[line.color])
        for line in panel.lines
        if line.x and line.label
    ]
    if panel.zero:
        ends.append((panel.zero, axis.get_xlim()[1], 0.0, "black"))
    axis.autoscale_view()  # Else the limits may still be those of an empty axis.
    to_axes = axis.transAxes.inverted()
    points = [to_axes.transform(axis.transData.transform((x, y))) for _, x, y, _ in ends]
    # An axis is about as high as its row without title and labels.
    places = spread_out([float(point[1]) for point in points], _APART / (height - 0.8))
    for (label, x, y, color), place in zip(ends, places, strict=True):
        axis.annotate(
            label,
            xy=(x, y),
            xytext=(1.07, place),
            textcoords="axes fraction",
            color=color,
            fontsize=9,
            va="center",
            arrowprops={
                "arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 1, "color": color,
                "linewidth": 0.5, "alpha": 0.6,
            },
            annotation_clip=False,
        )  # fmt: skip


def spaced(values: Iterable[float], most: int = 4) -> list[float]:
    """Those of positive values that have room as ticks of a logarithmic scale.

    Args:
        values: In any order.
        most: About how many have room.

    Returns:
        The greatest of them and others, falling.
    """
    ordered = sorted(values, reverse=True)
    kept = ordered[:1]
    for value in ordered[1:]:
        if value < kept[-1] / max(1.6, 0.99 * (ordered[0] / ordered[-1]) ** (1 / most)):
            kept.append(value)
    return kept


def spread_out(places: Sequence[float], apart: float) -> list[float]:
    """Moves places as little as can be, in their order, until all are ``apart``.

    Args:
        places: In any order, parts of a height.
        apart: The least distance between two of them.

    Returns:
        The new places, in the order given, below 0.97; below 0 only if there is no room.
    """
    if not places:
        return []
    order = np.argsort(places, kind="stable")
    gaps = apart * np.arange(len(places))
    moved = np.empty(len(places))
    # Least squares; the highest are pressed together below the title.
    moved[order] = gaps + np.minimum(
        isotonic_regression(np.asarray(places)[order] - gaps).x, 0.97 - gaps[-1]
    )
    return [float(place) for place in moved]
