"""Which documents a study fills, and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.study.grid import Results, Study
from benchmarks.study.render import comparison_table, fill, plot_comparison
from benchmarks.study.studies import EXTRAPOLATION

DOCS = Path(__file__).parents[2] / "docs"


def extrapolation(study: Study, results: Results, docs: Path) -> list[Path]:
    """Fills docs/extrapolation.md; returns what was written."""
    document, image = docs / "extrapolation.md", docs / "images" / "extrapolation.png"
    (two_conv, contenders), (resnet, once) = study.comparisons
    plot_comparison(study, results, two_conv, list(contenders), image)
    fill(
        document,
        {
            "two-conv": comparison_table(study, results, two_conv, list(contenders)),
            "resnet-20": comparison_table(study, results, resnet, list(once)),
        },
    )
    return [document, image]


DOCUMENTS: dict[str, Callable[[Study, Results, Path], list[Path]]] = {
    EXTRAPOLATION.name: extrapolation
}
