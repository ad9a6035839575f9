"""Which pages are filled from the table of results, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.study import evidence
from benchmarks.study.differences import paired_difference
from benchmarks.study.grid import Cell, Contender, Results, Row, Study, outcomes
from benchmarks.study.panels import Interval, plot_intervals
from benchmarks.study.render import comparison_table, fill
from benchmarks.study.studies import EXTRAPOLATION, STUDIES

DOCS = Path(__file__).parents[2] / "docs"


def plot_against_first(
    study: Study, results: Results, cell: Cell, contenders: Sequence[Contender], path: Path
) -> None:
    """Draws each contender's difference from the first one, paired by seed, with its interval."""
    known = outcomes(study, results)
    base = known[cell.name, contenders[0].label].by_seed(study.metric)
    found = []
    for label in (contender.label for contender in contenders[1:]):
        difference = paired_difference(known[cell.name, label].by_seed(study.metric), base)
        if difference is not None:
            ends = (difference.mean, difference.low, difference.high)
            found.append(Interval(label, *(study.metric.scale * value for value in ends)))
    text = f"points from {contenders[0].label}: mean and 95 % interval"
    plot_intervals(path, found, text)


def _extrapolation(results: dict[str, Results], docs: Path) -> list[Path]:
    study, known = EXTRAPOLATION, results[EXTRAPOLATION.name]
    document, image = docs / "extrapolation.md", docs / "images" / "extrapolation.png"
    (two_conv, contenders), (resnet, once) = study.comparisons
    plot_against_first(study, known, two_conv, list(contenders), image)
    fill(
        document,
        {
            "two-conv": comparison_table(study, known, two_conv, list(contenders)),
            "resnet-20": comparison_table(study, known, resnet, list(once)),
        },
    )
    return [document, image]


def _evidence(results: dict[str, Results], docs: Path) -> list[Path]:
    document = docs / "evidence.md"
    fill(document, evidence.blocks(results))
    return [document, *evidence.plots(results, docs / "images")]


PAGES: tuple[Callable[[dict[str, Results], Path], list[Path]], ...] = (_extrapolation, _evidence)


def render_pages(rows: Sequence[Row], docs: Path = DOCS) -> list[Path]:
    """Fills all pages from the table.

    Args:
        rows: Of the table of results.
        docs: The folder of the pages.

    Returns:
        What was written.
    """
    results = {study.name: Results(study, rows) for study in STUDIES.values()}
    return [path for page in PAGES for path in page(results, docs)]
