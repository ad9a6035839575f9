"""Plots of lines with direct labels, in colours that colour-blind people tell apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.study.render import figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, without the yellow that is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MOST_LINES = len(COLOURS)
_MARKERS = "osD^vP"
# Between two labels, in parts of an axis's height.
_APART = 0.075


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Attributes:
        label: Written at its end.
        x: Rising.
        y: Of the same length.
        spread: Half lengths of error bars, or nothing.
        colour: Its place in `COLOURS`.
        dashed: Whether it is.
        lost: Where runs diverged: marked at the bottom.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()
    colour: int = 0
    dashed: bool = False
    lost: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """A plot of at most `MOST_LINES` lines.

    Attributes:
        title: Above it.
        x_label: Below it.
        y_label: At its left.
        lines: From the first in the legend's order.
        log: Whether x is on a logarithmic scale of base 2.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = False


def plot_panels(path: Path, rows: Sequence[Sequence[Panel]], share_y: bool = True) -> bool:
    """Draws panels in rows, as a PNG; returns whether there was anything to draw.

    Raises:
        ValueError: A panel has more lines than can be told apart.
    """
    for panel in (panel for row in rows for panel in row):
        if len(panel.lines) > MOST_LINES:
            raise ValueError(f"{panel.title}: at most {MOST_LINES} lines, not {len(panel.lines)}")
    if not any(line.x for row in rows for panel in row for line in panel.lines):
        return False
    columns = max(map(len, rows))
    # As wide as text is still read at the width of a page.
    width = 10.2 if columns > 2 else 4.6 * columns
    with figure_file(path, (width, 3.1 * len(rows))) as figure:
        axes = figure.subplots(
            len(rows), columns, squeeze=False, sharey="row" if share_y else False
        )
        for line_of_axes, row in zip(axes, rows, strict=True):
            for axis in line_of_axes[len(row) :]:
                axis.set_visible(False)
            for axis, panel in zip(line_of_axes, row, strict=False):
                _draw(axis, panel)
        for line_of_axes, row in zip(axes, rows, strict=True):
            for axis, panel in zip(line_of_axes, row, strict=False):
                _label_ends(axis, panel)
    return True


def _draw(axis: Axes, panel: Panel) -> None:
    for line in panel.lines:
        for x in line.lost:
            axis.plot(
                [x], [0.02], "x", color=COLOURS[line.colour], markersize=7,
                transform=axis.get_xaxis_transform(),
            )  # fmt: skip
        if not line.x:
            continue
        axis.errorbar(
            line.x,
            line.y,
            yerr=line.spread or None,
            color=COLOURS[line.colour],
            linestyle="--" if line.dashed else "-",
            marker=_MARKERS[line.colour] if len(line.x) < 12 else "",
            markersize=4,
            linewidth=1.5,
            capsize=2,
        )
    if panel.log:
        axis.set_xscale("log", base=2)
        every = {x for line in panel.lines for x in (*line.x, *line.lost)}
        ticks = spaced(every)
        axis.set_xticks(ticks, [f"{x:.2g}" if x < 1 else f"{x:g}" for x in ticks])
        axis.minorticks_off()
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.x_label, fontsize=9)
    axis.set_ylabel(panel.y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _label_ends(axis: Axes, panel: Panel) -> None:
    """Writes each line's label beside its end, moved up or down where two would meet."""
    low, high = axis.get_ylim()
    drawn = [line for line in panel.lines if line.x]
    places = spread_out([(line.y[-1] - low) / (high - low) for line in drawn], _APART)
    for line, place in zip(drawn, places, strict=True):
        colour = COLOURS[line.colour]
        axis.annotate(
            line.label,
            xy=(line.x[-1], line.y[-1]),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
            annotation_clip=False,
        )


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
    """Moves places as little as is simple, in their order, until all are ``apart``.

    Args:
        places: In any order, parts of a height.
        apart: The least distance between two of them.

    Returns:
        The new places, in the order given, below 0.97; below 0 only if there is no room.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, index in itertools.pairwise(order):
        moved[index] = max(moved[index], moved[before] + apart)
    top = 0.97  # Below the title.
    for index in reversed(order):
        moved[index] = min(moved[index], top)
        top = moved[index] - apart
    return moved
