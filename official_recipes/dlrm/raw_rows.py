"""Raw Criteo rows: a click (0 or 1), 13 integers and 26 hashed categories, separated by TABs."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

DENSE_FEATURES = 13
CATEGORIES = 26
FIELDS = 1 + DENSE_FEATURES + CATEGORIES
CHUNK_BYTES = 4 * 2**20
"""How much text is taken at a time: what memory depends on, whatever the number of rows is."""

_INTEGER = re.compile(rb"-?[0-9]+")
_KEY_BYTES = 8
_DIGEST = np.uint64(1 << 63)


class RowError(Exception):
    """A file that can not be read, or a row that is none; the message names file and line."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows.

    Attributes:
        row_numbers: Of each row that is there; malformed ones that were left out count.
        labels: The clicks as they are written, ``b"0"`` or ``b"1"``.
        dense: For each column of numbers the values as `CriteoTsvReader` takes them.
        keys: For each categorical column numbers that tell categories apart, 0 for a missing one;
            those of a row after each other where it has several.
        skipped: Malformed rows that were left out.
        logits: The true log-odds of a click, where they are known.
        problem: What is wrong with the first row that was left out, with its file and line.
        counts: By the number of a multi-hot column, how many keys each row has there.
    """

    row_numbers: npt.NDArray[np.uint64]
    labels: list[bytes]
    dense: list[list[bytes]]
    keys: Sequence[npt.NDArray[np.uint64]]
    skipped: int = 0
    logits: npt.NDArray[np.float64] | None = None
    problem: str | None = None
    counts: Mapping[int, npt.NDArray[np.int64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Lines:
    """Some consecutive lines without their ends.

    Attributes:
        source: For messages.
        first_line: The number of the first one in its source, from 1.
        lines: The lines.
        logits: The true log-odds of a click, where they are known.
    """

    source: str
    first_line: int
    lines: list[bytes]
    logits: npt.NDArray[np.float64] | None = None


def read_lines(
    files: Sequence[Path], progress: Callable[[int], None], chunk_bytes: int | None = None
) -> Iterator[Lines]:
    """The lines of text files, plain or compressed by gzip (told by the content), in chunks.

    Args:
        files: In their order.
        progress: Called with the number of bytes read since the last call, on disk.
        chunk_bytes: About how much text is in a chunk; `CHUNK_BYTES` if not given.

    Yields:
        Lines of one file.

    Raises:
        RowError: A file can not be read or is damaged.
    """
    chunk_bytes = chunk_bytes or CHUNK_BYTES
    for file in files:
        number, position = 1, 0
        try:
            with file.open("rb") as raw:
                compressed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                text = gzip.GzipFile(fileobj=raw) if compressed else raw
                while lines := text.readlines(chunk_bytes):
                    if number == 1:
                        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
                    yield Lines(str(file), number, [line.rstrip(b"\r\n") for line in lines])
                    number += len(lines)
                    now = raw.tell()
                    progress(now - position)
                    position = now
        except (OSError, EOFError, zlib.error) as error:
            raise RowError(f"{file} can not be read after line {number - 1}: {error}") from error


def parse(
    lines: Lines, texts: DenseTexts, first_row: int = 0, skip_malformed: bool = False
) -> Chunk:
    """Rows from lines.

    Args:
        lines: Where they are.
        texts: Turns integers to what is written for them.
        first_row: The number of the first one.
        skip_malformed: Whether malformed rows are left out and counted.

    Raises:
        RowError: The first malformed row, by file and line.
    """
    given = lines.lines
    row_numbers = first_row + np.arange(len(given), dtype=np.uint64)
    logits = lines.logits
    first = None
    try:
        labels, dense, keys = _parse_columns(given, texts)
    except ValueError:
        problems = [_problem(line, texts) for line in given]
        wrong = next(index for index, problem in enumerate(problems) if problem)
        first = f"{lines.source}, line {lines.first_line + wrong}: {problems[wrong]}"
        if not skip_malformed:
            raise RowError(first) from None
        good = np.array([not problem for problem in problems])
        row_numbers, given = row_numbers[good], [x for x, ok in zip(given, good, strict=True) if ok]
        logits = None if logits is None else logits[good]
        labels, dense, keys = _parse_columns(given, texts)
    skipped = len(lines.lines) - len(given)
    return Chunk(row_numbers, labels, dense, keys, skipped, logits, first)


class DenseTexts(dict[bytes, bytes]):
    """What is written for an integer: log(1 + x), where missing and negative ones count as 0.

    Raises:
        ValueError: It is no integer, or larger than any float.
    """

    _MOST = 2**20  # Almost all values are small and come again.

    def __missing__(self, value: bytes) -> bytes:
        if value and not _INTEGER.fullmatch(value):
            raise ValueError
        try:
            text = b"%.7g" % math.log1p(max(int(value or b"0"), 0))
        except OverflowError as error:
            raise ValueError from error
        if len(self) >= self._MOST:
            self.clear()
        self[value] = text
        return text


def _parse_columns(
    lines: list[bytes], texts: DenseTexts
) -> tuple[list[bytes], list[list[bytes]], list[npt.NDArray[np.uint64]]]:
    if any(line.count(b"\t") != FIELDS - 1 for line in lines):
        raise ValueError
    fields = b"\t".join(lines).split(b"\t") if lines else []
    labels = fields[::FIELDS]
    if not {b"0", b"1"}.issuperset(labels):
        raise ValueError
    dense = [[texts[x] for x in fields[i::FIELDS]] for i in range(1, 1 + DENSE_FEATURES)]
    keys = [keys_of(fields[1 + DENSE_FEATURES + i :: FIELDS]) for i in range(CATEGORIES)]
    return labels, dense, keys


def keys_of(values: list[bytes]) -> npt.NDArray[np.uint64]:
    """The eight bytes of each value as a number, so that none are confused; digests of longer."""
    array = np.array(values, dtype=f"S{_KEY_BYTES}").view("<u8")
    if values and max(map(len, values)) > _KEY_BYTES:
        array = array.copy()
        for index, value in enumerate(values):
            if len(value) > _KEY_BYTES:
                digest = hashlib.blake2b(value, digest_size=_KEY_BYTES).digest()
                array[index] = np.frombuffer(digest, "<u8")[0] | _DIGEST
    return array


def _problem(line: bytes, texts: DenseTexts) -> str | None:
    fields = line.split(b"\t")
    if len(fields) != FIELDS:
        return f"expected {FIELDS} fields separated by TABs, received {len(fields)}"
    if fields[0] not in (b"0", b"1"):
        return f"expected 0 or 1 in field 1, received {shown(fields[0])}"
    for index in range(1, 1 + DENSE_FEATURES):
        try:
            texts[fields[index]]
        except ValueError:
            return f"expected an integer in field {index + 1}, received {shown(fields[index])}"
    return None


def shown(field: bytes | str) -> str:
    """The beginning of a field, for errors."""
    text = field if isinstance(field, str) else field.decode(errors="replace")
    return repr(text[:40]) + ("..." if len(text) > 40 else "")


def mix(numbers: npt.NDArray[np.uint64], salt: int) -> npt.NDArray[np.uint64]:
    """A hash of 64-bit numbers (the finalizer of SplitMix64): equally spread, the same everywhere.

    Args:
        numbers: To be hashed.
        salt: Another number, another hash.
    """
    with np.errstate(over="ignore"):
        x = numbers + np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * salt + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
