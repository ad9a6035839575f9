"""How figures are shown. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = (
    "MB moved",
    "of memory",
    "all-reduces",
    "MB in them",
    "loops",
    "conditions",
    "sorts",
    "64-bit divisions",
    "program KB",
    "seconds",
)
_TF_KERAS = " tf_keras"


def cells(row: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """A row's figures, one for each of `COLUMNS`."""
    if "error" in row:
        return [row["error"].splitlines()[0][:60]]
    moved = f"{row['bytes'] / 1e6:,.0f}"
    if stored and stored["bytes"] != row["bytes"]:
        moved += f" ({(row['bytes'] - stored['bytes']) / 1e6:+,.1f})"
    return [
        moved,
        f"{row['memory_bytes'] / 1e6:,.0f}",
        str(row["all_reduces"]),
        f"{row['reduced_bytes'] / 1e6:,.1f}",
        str(row["loops"]),
        str(row["conditions"]),
        str(row["sorts"]),
        str(row["long_divisions"]),
        f"{row['program_bytes'] / 1e3:,.0f}",
        f"{row['seconds']:.0f}",
    ]


def pages(content: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/accelerators.md."""
    rows, versions = content["rows"], content["versions"]
    heading = ["one update of", *COLUMNS]
    twins = {name for name in rows if name.endswith(_TF_KERAS)}
    alike = {n for n in twins if _figures(rows[n]) == _figures(rows.get(_twin(n), {}))}
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "updates": markdown(
            heading, ([name, *cells(row, {})] for name, row in rows.items() if name not in alike)
        ),
        "twins": f"Of {len(twins)} updates of tf_keras, {len(alike)} have the figures of Keras 3's "
        "and are not shown.",
    }


def _twin(name: str) -> str:
    return name.removesuffix(_TF_KERAS)


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("seconds")}


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
