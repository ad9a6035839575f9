"""From categories to ids: by a hash, or by a vocabulary of those that are frequent enough."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from official_recipes.dlrm.raw_rows import CATEGORIES, mix

Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.uint32]


class Ids(abc.ABC):
    """Gives each category of each column an id below its column's vocabulary size.

    Attributes:
        vocab_sizes: One for each column.
    """

    vocab_sizes: list[int]

    @abc.abstractmethod
    def ids(self, column: int, keys: Keys) -> npt.NDArray[np.int64]:
        """The ids of one column's keys."""


class HashedIds(Ids):
    """Id 0 for a missing value, else a hash from 1 up to, but without, `buckets`.

    Args:
        buckets: The vocabulary size of every column, at least 2.
        columns: How many there are.
    """

    def __init__(self, buckets: int, columns: int = CATEGORIES) -> None:
        self.vocab_sizes = [buckets] * columns
        self._buckets = buckets

    def ids(self, column: int, keys: Keys) -> npt.NDArray[np.int64]:
        """The ids of one column's keys."""
        hashed = 1 + (mix(keys, column) % np.uint64(self._buckets - 1)).astype(np.int64)
        return np.where(keys == 0, 0, hashed)


class FrequentIds(Ids):
    """Id 0 for what is not in the vocabulary, else one of its own; so for missing values too.

    Args:
        vocabularies: The keys of each column that have an id, rising.
    """

    def __init__(self, vocabularies: list[Keys]) -> None:
        self.vocab_sizes = [1 + len(keys) for keys in vocabularies]
        self._vocabularies = vocabularies

    def ids(self, column: int, keys: Keys) -> npt.NDArray[np.int64]:
        """The ids of one column's keys."""
        vocabulary = self._vocabularies[column]
        if not len(vocabulary):
            return np.zeros(len(keys), np.int64)
        found = np.minimum(np.searchsorted(vocabulary, keys), len(vocabulary) - 1)
        return np.where(vocabulary[found] == keys, 1 + found, 0)


class FrequencyCounter:
    """Counts the categories of every column exactly, in limited memory.

    What has been counted is kept sorted; when there is more of it than the limit, the column that
    has most is written to disk as a run, and all runs of a column are merged at the end, piece by
    piece. So memory is for the limit and for the vocabulary that comes out.

    Args:
        folder: For the runs; they are removed at the end.
        limit: Counts to keep in memory, of all columns together (12 bytes each, some times over
            while they are merged).
        columns: How many there are.
    """

    def __init__(self, folder: Path, limit: int, columns: int = CATEGORIES) -> None:
        self._columns = range(columns)
        self.limit = limit
        self.most_in_memory = 0
        self._folder = folder
        self._counted: list[tuple[Keys, Counts]] = [_nothing() for _ in self._columns]
        self._fresh: list[list[Keys]] = [[] for _ in self._columns]
        self._fresh_keys = 0
        self._runs: list[list[Path]] = [[] for _ in self._columns]

    def add(self, keys: Sequence[Keys]) -> None:
        """Counts the keys of some rows, of each column."""
        for column in self._columns:
            self._fresh[column].append(keys[column])
        self._fresh_keys += sum(map(len, keys))
        self._note()
        if self._fresh_keys >= self.limit // 2:
            self._fold()

    def frequent(self, minimum: int) -> list[Keys]:
        """The keys of each column that were counted so often, rising."""
        self._fold()
        return [self._frequent(column, minimum) for column in self._columns]

    def _note(self) -> None:
        entries = self._fresh_keys + sum(len(keys) for keys, _ in self._counted)
        self.most_in_memory = max(self.most_in_memory, entries)

    def _fold(self) -> None:
        for column, arrays in enumerate(self._fresh):
            if arrays:
                keys, counts = np.unique(np.concatenate(arrays), return_counts=True)
                self._counted[column] = _merged(
                    [self._counted[column], (keys, counts.astype(np.uint32))]
                )
                self._fresh_keys -= sum(len(keys) for keys in arrays)
                self._fresh[column] = []
        self._note()
        while sum(len(keys) for keys, _ in self._counted) > self.limit // 2:
            self._spill(max(self._columns, key=lambda c: len(self._counted[c][0])))

    def _spill(self, column: int) -> None:
        path = self._folder / f"counts-{column:02d}-{len(self._runs[column]):05d}"
        keys, counts = self._counted[column]
        np.save(path.with_suffix(".keys.npy"), keys)
        np.save(path.with_suffix(".counts.npy"), counts)
        self._runs[column].append(path)
        self._counted[column] = _nothing()

    def _frequent(self, column: int, minimum: int) -> Keys:
        runs: list[tuple[Keys, Counts]] = [self._counted[column]]
        for path in self._runs[column]:
            runs.append(
                (
                    np.load(path.with_suffix(".keys.npy"), mmap_mode="r"),
                    np.load(path.with_suffix(".counts.npy"), mmap_mode="r"),
                )
            )
        longest = max((keys for keys, _ in runs), key=len)
        step = max(1, self.limit // (2 * len(runs)))
        bounds = [int(key) for key in longest[step::step]]
        starts = [0] * len(runs)
        kept: list[Keys] = []
        for bound in [*bounds, None]:
            pieces = []
            for index, (keys, counts) in enumerate(runs):
                end = len(keys) if bound is None else int(np.searchsorted(keys, np.uint64(bound)))
                pieces.append((keys[starts[index] : end], counts[starts[index] : end]))
                starts[index] = end
            keys, counts = _merged(pieces)
            kept.append(keys[counts >= minimum])
        del runs, longest
        for path in self._runs[column]:
            path.with_suffix(".keys.npy").unlink()
            path.with_suffix(".counts.npy").unlink()
        self._runs[column] = []
        return np.concatenate(kept)


def _nothing() -> tuple[Keys, Counts]:
    return np.empty(0, np.uint64), np.empty(0, np.uint32)


def _merged(pieces: list[tuple[Keys, Counts]]) -> tuple[Keys, Counts]:
    """One sorted list of different keys with the sums of their counts (which stay below 2^32)."""
    keys = np.concatenate([keys for keys, _ in pieces])
    counts = np.concatenate([counts for _, counts in pieces])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    if not len(keys):
        return _nothing()
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sums = np.add.reduceat(counts.astype(np.uint64), first)
    return keys[first], np.minimum(sums, np.iinfo(np.uint32).max).astype(np.uint32)
