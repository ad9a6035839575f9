"""The append-only table of results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.study.grid import Row

RESULTS = Path(__file__).parent / "results.jsonl"


def read_rows(path: Path) -> list[Row]:
    """Returns all rows of the table; a part of a line at the end, of a killed writer, is left out.

    Raises:
        ValueError: A line in the middle is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return rows
