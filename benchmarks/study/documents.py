"""Which pages are filled from the table of results, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.study import evidence
from benchmarks.study.grid import Results, Row
from benchmarks.study.render import comparison_table, fill, plot_comparison
from benchmarks.study.studies import EXTRAPOLATION, STUDIES

DOCS = Path(__file__).parents[2] / "docs"


def _extrapolation(results: dict[str, Results], docs: Path) -> list[Path]:
    study, known = EXTRAPOLATION, results[EXTRAPOLATION.name]
    document, image = docs / "extrapolation.md", docs / "images" / "extrapolation.png"
    (two_conv, contenders), (resnet, once) = study.comparisons
    plot_comparison(study, known, two_conv, list(contenders), image)
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
