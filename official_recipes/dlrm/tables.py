"""Rows of CSV and TSV files with any columns, as `raw_rows` has those of Criteo."""

from __future__ import annotations

import csv
import fnmatch
import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.dlrm.raw_rows import Chunk, RowError, keys_of, shown

ROWS_AT_A_TIME = 20_000
_UNFINISHED = "unexpected end of data"  # as the csv module says it


@dataclass(frozen=True)
class Table:
    """Where the columns are and what they mean.

    Attributes:
        delimiter: One character between fields.
        columns: Names of all columns, or ``None`` where each file has them in its first line.
        label: The column of the clicks.
        numeric: The columns of numbers.
        categorical: The columns of categories.
        clicks_from: The least label that is a click, or ``None`` where labels are 0 or 1.
        logarithm: Whether log(1 + x), 0 for negative ones, is written for a number x.
        multi_hot: The columns of categories of which a row may have several.
        separator: What is between them.
        limit: How many of them, the first ones, count; ``None`` for all.
    """

    delimiter: str
    columns: tuple[str, ...] | None
    label: str
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    clicks_from: float | None
    logarithm: bool
    multi_hot: tuple[str, ...] = ()
    separator: str = "|"
    limit: int | None = None


def chosen_columns(
    names: Sequence[str], label: str, numeric: Sequence[str], categorical: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The numeric and the categorical columns, in the order that they were asked for.

    A pattern takes what is not the label and was not taken before it.

    Args:
        names: All columns.
        label: The column of the clicks.
        numeric: Names and patterns.
        categorical: Names and patterns.

    Raises:
        FlagValueError: There is no such column, or one is taken twice.
    """
    known = f"columns of the data ({', '.join(names)})"
    if label not in names:
        raise FlagValueError("label", f"one of the {known}", repr(label))
    taken = {label: "label"}
    chosen: dict[str, list[str]] = {"numeric": [], "categorical": []}
    for flag, patterns in (("numeric", numeric), ("categorical", categorical)):
        for pattern in patterns:
            if pattern in names and pattern in taken:
                raise FlagValueError(
                    flag, f"columns that are not in --{taken[pattern]}", repr(pattern)
                )
            matches = [pattern] if pattern in names else fnmatch.filter(names, pattern)
            found = [name for name in matches if name not in taken]
            if not found:
                raise FlagValueError(flag, known, repr(pattern))
            chosen[flag] += found
            taken.update(dict.fromkeys(found, flag))
    return tuple(chosen["numeric"]), tuple(chosen["categorical"])


def header_of(file: Path, delimiter: str) -> tuple[str, ...]:
    """The names in the first line of a file.

    Raises:
        RowError: It cannot be read, is empty or has a name twice.
    """
    try:
        with file.open("rb") as raw, _text(raw) as text:
            names = tuple(next(csv.reader(text, delimiter=delimiter, strict=True), ()))
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise RowError(f"{file} can not be read: {error}") from error
    if not names:
        raise RowError(f"{file}: expected names of columns in the first line, received none")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RowError(f"{file}: expected different names of columns, received {twice!r} twice")
    return names


def columns_of(file: Path, table: Table) -> tuple[str, ...]:
    """The names of a file's columns.

    Raises:
        RowError: The file cannot be read, or has not all that the table needs.
    """
    names = table.columns or header_of(file, table.delimiter)
    for name in (table.label, *table.numeric, *table.categorical):
        if name not in names:
            raise RowError(
                f"{file}: expected a column {name!r} as in the first file of --source, received "
                f"{', '.join(names)}"
            )
    return names


def read_table(
    files: Sequence[Path], table: Table, progress: Callable[[int], None], skip_malformed: bool
) -> Iterator[Chunk]:
    """The rows of CSV files, plain or compressed by gzip (told by the content), in chunks.

    Args:
        files: In their order.
        table: Their columns.
        progress: Called with the number of bytes read since the last call, on disk.
        skip_malformed: Whether malformed rows are left out and counted.

    Yields:
        Rows of one file; empty lines are none.

    Raises:
        RowError: A file cannot be read, or the first malformed row, by file and line.
    """
    first_row = 0
    for file in files:
        parser = _Parser(file, table, columns_of(file, table))
        position = 0
        reader: Any = None
        try:
            with file.open("rb") as raw, _text(raw) as text:
                reader = csv.reader(text, delimiter=table.delimiter, strict=True)
                if table.columns is None:
                    next(reader)
                while rows := _some(reader):
                    yield parser.chunk(rows, first_row, skip_malformed)
                    first_row += len(rows)
                    now = raw.tell()
                    progress(now - position)
                    position = now
        except (OSError, EOFError, zlib.error) as error:
            line = 0 if reader is None else reader.line_num
            raise RowError(f"{file} can not be read after line {line}: {error}") from error


def _text(raw: Any) -> io.TextIOWrapper:
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    binary = gzip.GzipFile(fileobj=raw) if compressed else raw
    return io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="")


def _some(reader: Any) -> list[tuple[int, list[str] | str]]:
    """Some rows with the line that each ends at; in the place of a row what is wrong with it."""
    rows: list[tuple[int, list[str] | str]] = []
    while len(rows) < ROWS_AT_A_TIME:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            rows.append((reader.line_num, f"expected fields as CSV has them, received: {error}"))
            continue
        if row:
            rows.append((reader.line_num, row))
    return rows


class _Parser:
    def __init__(self, file: Path, table: Table, names: Sequence[str]) -> None:
        self._file = file
        self._table = table
        self._names = names
        self._label = names.index(table.label)
        self._numeric = [names.index(name) for name in table.numeric]
        self._categorical = [names.index(name) for name in table.categorical]
        self._separator = table.separator.encode()

    def chunk(
        self, rows: list[tuple[int, list[str] | str]], first_row: int, skip_malformed: bool
    ) -> Chunk:
        labels, numbers, categories, good = [], [], [], []
        problem = None
        for index, (line, row) in enumerate(rows):
            try:
                label, values = self._parsed(row)
            except ValueError as error:
                problem = problem or f"{self._file}, line {line}: {error}"
                # A quote that never ends has taken all rows behind it.
                if not skip_malformed or str(row).endswith(_UNFINISHED):
                    raise RowError(f"{self._file}, line {line}: {error}") from None
                continue
            labels.append(label)
            numbers.append(values)
            categories.append(
                [row[i].encode("utf-8", "surrogateescape") for i in self._categorical]
            )
            good.append(index)
        keys, counts = [], {}
        for column, name in enumerate(self._table.categorical):
            texts = [row[column] for row in categories]
            if name in self._table.multi_hot:
                several = [self._several(text) for text in texts]
                counts[column] = np.array([len(row) for row in several], np.int64)
                texts = [text for row in several for text in row]
            keys.append(keys_of(texts))
        # A row has a number, if only one that says nothing.
        dense = [list(column) for column in zip(*numbers, strict=True)] or [[]]
        return Chunk(
            first_row + np.array(good, np.uint64),
            labels,
            dense,
            keys,
            len(rows) - len(good),
            None,
            problem,
            counts,
        )

    def _several(self, text: bytes) -> list[bytes]:
        """The categories of a field: at least one, which may be a missing one."""
        found = [part for part in text.split(self._separator) if part]
        return found[: self._table.limit] or [b""]

    def _parsed(self, row: list[str] | str) -> tuple[bytes, list[bytes]]:
        if isinstance(row, str):
            raise ValueError(row)
        if len(row) != len(self._names):
            raise ValueError(
                f"expected {len(self._names)} fields separated by {self._table.delimiter!r}, "
                f"received {len(row)}"
            )
        label = self._number(row, self._label)
        least = self._table.clicks_from
        if (least is None and label not in (0, 1)) or not row[self._label]:
            expected = "0 or 1" if least is None else "a number"
            raise ValueError(
                f"expected {expected} in {self._table.label!r}, received {shown(row[self._label])}"
            )
        values = [self._number(row, index) for index in self._numeric]
        if self._table.logarithm:
            values = [math.log1p(max(value, 0.0)) for value in values]
        click = label == 1 if least is None else label >= least
        return b"1" if click else b"0", [b"%.7g" % value for value in values] or [b"0"]

    def _number(self, row: list[str], index: int) -> float:
        field = row[index]
        try:
            value = float(field or 0)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or "_" in field:
            raise ValueError(
                f"expected a number in {self._names[index]!r}, received {shown(field)}"
            )
        return value
