"""Tables and plots of a study, made from its table of results alone.

A document has its figures between two comment lines, ``<!-- begin NAME -->`` and
``<!-- end NAME -->``; everything else in it is written by hand.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.study.differences import Difference
from benchmarks.study.grid import (
    ACCURACY,
    Cell,
    Contender,
    Metric,
    Outcome,
    Results,
    Study,
    outcomes,
)
from official_recipes.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SHOWN = 4


def fill(document: Path, blocks: Mapping[str, str]) -> None:
    """Replaces what is between the marks of a document.

    Args:
        document: A Markdown file.
        blocks: New content by name.

    Raises:
        ValueError: The document lacks a mark, or has one that nothing is given for.
    """
    text = document.read_text(encoding="utf-8")
    names = re.findall(r"<!-- begin (\S+) -->", text)
    if sorted(names) != sorted(blocks):
        raise ValueError(f"{document} has blocks {sorted(names)}; there are {sorted(blocks)}")
    for name, content in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        head, rest = text.split(begin, 1)
        if end not in rest:
            raise ValueError(f"{document}: no {end}")
        text = f"{head}{begin}\n{content.strip()}\n{end}{rest.split(end, 1)[1]}"
    with atomic_write(document) as temporary:
        temporary.write_text(text, encoding="utf-8")


def comparison_table(
    study: Study, results: Results, cell: Cell, contenders: list[Contender]
) -> str:
    """Returns a Markdown table: what was tuned, and the metric at the best value."""
    known = outcomes(study, results)
    several = len(cell.final_seeds) > 1
    lines = [
        f"| method | {'tuned: validation ' + study.metric.title + ' | ' if several else ''}test "
        f"{study.metric.title}{', mean ± standard deviation | seeds' if several else ''} |",
        "|---|" + ("---|" if several else "") + "---:|" + ("---:|" if several else ""),
    ]
    for contender in contenders:
        outcome = known[cell.name, contender.label]
        score = shown(study.metric, outcome.final)
        if several:
            lines.append(
                f"| {contender.label} | {_tried(contender, outcome)} | {score} | "
                f"{len(outcome.final)} |"
            )
        else:
            lines.append(f"| {contender.label} | {score} |")
    return "\n".join(lines)


def shown(metric: Metric, scores: Sequence[float]) -> str:
    """Mean and standard deviation of scores, and how many runs diverged."""
    if not scores:
        return "not run"
    finite = [score for score in scores if math.isfinite(score)]
    if len(finite) < len(scores):
        diverged = f"{len(scores) - len(finite)} of {len(scores)} diverged"
        return f"{diverged}, else {shown(metric, finite)}" if finite else diverged
    mean = metric.shown(statistics.fmean(finite))
    if len(finite) == 1:
        return mean + metric.unit
    return f"{mean} ± {metric.shown(statistics.stdev(finite))}{metric.unit}"


def not_run_yet(labels: Sequence[str]) -> str:
    """One line that names what has no runs yet; many are folded up."""
    text = "; ".join(labels)
    if len(labels) <= _SHOWN:
        return f"Not run yet: {text}."
    return f"<details><summary>Not run yet: {len(labels)} methods</summary>{text}</details>"


def with_interval(metric: Metric, difference: Difference) -> str:
    """A difference and its interval, as people read them."""
    scaled = [metric.scale * v for v in (difference.mean, difference.low, difference.high)]
    digits = 1 if metric.unit == ACCURACY.unit else metric.digits
    mean, low, high = (f"{value:+.{digits}f}".replace("-", "−") for value in scaled)
    return f"{mean} [{low}, {high}]"


@contextmanager
def figure_file(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that is written as a PNG when the block ends, unless nothing was drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=size, layout="constrained")
    try:
        yield figure
        if any(axis.has_data() for axis in figure.axes):
            with atomic_write(path) as temporary:
                figure.savefig(temporary, dpi=200)
    finally:
        plt.close(figure)


def _tried(contender: Contender, outcome: Outcome) -> str:
    if not outcome.tried:
        return f"as {contender.takes_from}" if contender.takes_from else "nothing"
    parts = []
    for value, score in outcome.tried.items():
        text = f"{value:g}: " + (f"{100 * score:.1f} %" if math.isfinite(score) else "diverged")
        parts.append(f"**{text}**" if value == outcome.best else text)
    return f"{contender.axis.replace('_', ' ')} {', '.join(parts)}"
