"""Entry point of ``python -m official_recipes.dlrm.prepare_data``."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    BELOW_ONE,
    CheckedParser,
    FlagValueError,
    define_integer,
    parse_unless_help,
)
from official_recipes.common.interruption import Interruption
from official_recipes.common.output_folder import (
    check_output_dir,
    exit_code_of,
    writing,
)
from official_recipes.dlrm.raw_rows import (
    CATEGORIES,
    DENSE_FEATURES,
    Chunk,
    DenseTexts,
    Lines,
    RowError,
    mix,
    parse,
    read_lines,
)
from official_recipes.dlrm.synthetic import BayesAUC, ClickModel
from official_recipes.dlrm.tables import Table, chosen_columns, columns_of, header_of, read_table
from official_recipes.dlrm.vocabulary import FrequencyCounter, FrequentIds, HashedIds, Ids

PROGRAM = "python -m official_recipes.dlrm.prepare_data"
SUMMARY = (
    "Turns raw Criteo rows (label, 13 integers, 26 categories, separated by TABs; also .gz), rows\n"
    "of CSV or TSV files with other columns (--label and so on), or made-up ones into the files\n"
    "that tf-models' CriteoTsvReader reads, in a new folder, which appears when all is written.\n"
    "Rows stream through; memory does not grow with their number."
)
RECORD = "dataset.json"
ID_SEPARATOR = ","
"""Between the ids of a multi-hot column in a prepared row."""
SPLITS = ("train", "validation", "test")
IDS = ("frequency", "hashed")
_MOST_ID = 2**31  # CriteoTsvReader reads ids as int32.
_DELIMITERS = {"comma": ",", "tab": "\t", "semicolon": ";", "space": " "}
_SCALES = ("log", "none")
_OF_TABLES = (
    *("numeric", "categorical", "columns", "delimiter", "clicks_from", "numeric_scale"),
    *("multi_hot", "multi_hot_separator", "multi_hot_limit"),
)


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        sources: Files for each split; training rows alone are held out from.
        synthetic_rows: Rows to make up instead, or ``None``.
        output_dir: The folder to make.
        ids: One of `IDS`.
        min_frequency: How often a category is in the training rows to have an id.
        buckets: Of hashed ids.
        validation_fraction: Of the training source's rows.
        test_fraction: Of the training source's rows.
        shards: Training files.
        counts_in_memory: How many counts of categories to keep before they go to disk.
        skip_malformed: Whether malformed rows are counted and left out.
        seed: Of what is held out, of the rows' order, and of made-up rows.
        table: The columns of the sources, or ``None`` for Criteo's.
    """

    sources: dict[str, tuple[Path, ...]]
    synthetic_rows: int | None
    output_dir: Path
    ids: str
    min_frequency: int
    buckets: int
    validation_fraction: float
    test_fraction: float
    shards: int
    counts_in_memory: int
    skip_malformed: bool
    seed: int
    table: Table | None = None

    @property
    def categories(self) -> int:
        """How many categorical columns there are."""
        return CATEGORIES if self.table is None else len(self.table.categorical)

    @property
    def dense_features(self) -> int:
        """How many numbers are written for a row: at least one, which may be 0 always."""
        return DENSE_FEATURES if self.table is None else max(1, len(self.table.numeric))


def main(argv: Sequence[str]) -> int:
    """Writes the data set.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code: 0, 2 for flags or data that cannot be used, 130 or 143 when interrupted.
    """
    return exit_code_of(lambda: _main(argv), RowError)


def _main(argv: Sequence[str]) -> None:
    options = _parse_options(argv)
    if options is None:
        return
    try:
        _prepare(options)
    except OSError as error:
        raise FlagValueError("output_dir", "a folder that can be written to", error) from error


# -- flags -----------------------------------------------------------------------------------------


def _parse_options(argv: Sequence[str]) -> Options | None:
    values = flags.FlagValues()
    for split in SPLITS:
        flags.DEFINE_string(
            "source" if split == "train" else f"{split}_source",
            None,
            f"Files of {split} rows, or patterns, separated by commas"
            + ("." if split == "train" else "; instead of a share of --source."),
            flag_values=values,
        )
    flags.DEFINE_string(
        "label",
        None,
        "The column of clicks, where rows are not Criteo's. --source then has CSV files, plain or "
        "gzip, with the names of the columns in the first line, or see --columns.",
        flag_values=values,
    )
    for name, what in (("numeric", "numbers"), ("categorical", "categories")):
        flags.DEFINE_list(
            name,
            None,
            f"With --label: columns of {what}, names or patterns as C*, separated by commas.",
            flag_values=values,
        )
    flags.DEFINE_list(
        "columns",
        None,
        "With --label: the names of all columns, for files without them in the first line.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "delimiter",
        None,
        f"With --label: {', '.join(_DELIMITERS)} or another character [default: comma].",
        flag_values=values,
    )
    flags.DEFINE(
        CheckedParser(float, math.isfinite, "a number", "float"),
        "clicks_from",
        None,
        "With --label: the least label that counts as a click [default: labels are 0 or 1].",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "numeric_scale",
        None,
        _SCALES,
        "With --label: log writes log(1 + x) for a number x, and 0 for negative ones; none writes "
        "numbers as they are [default: log].",
        flag_values=values,
    )
    flags.DEFINE_list(
        "multi_hot",
        None,
        "With --label: columns of --categorical, names or patterns, of which a row may have "
        "several categories; their embeddings are averaged.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "multi_hot_separator",
        None,
        f"With --multi_hot: what is between them: {', '.join(_DELIMITERS)} or other text "
        "[default: |].",
        flag_values=values,
    )
    define_integer(
        values,
        "multi_hot_limit",
        None,
        "With --multi_hot: how many categories of a field count, the first ones [default: all].",
    )
    define_integer(
        values,
        "synthetic_rows",
        None,
        "Make so many rows up, with planted weights, instead of reading --source.",
    )
    flags.DEFINE_string(
        "output_dir", None, "Folder to make; must be empty if it exists.", flag_values=values
    )
    flags.DEFINE_string(
        "ids",
        "frequency",
        "frequency: categories that are in the training rows --min_frequency times have an id "
        "each (two passes). hashed: ids by a hash below --buckets (one pass).",
        flag_values=values,
    )
    define_integer(values, "min_frequency", 15, "Least count of a category with an id.")
    define_integer(
        values, "buckets", 100_000, "Vocabulary size of each column.", minimum=2, maximum=_MOST_ID
    )
    for split, default in (("validation", 0.05), ("test", 0.0)):
        flags.DEFINE(
            BELOW_ONE,
            f"{split}_fraction",
            default,
            f"Share of the rows to hold out where there is no --{split}_source.",
            flag_values=values,
        )
    define_integer(
        values,
        "shards",
        16,
        "Training files; every row goes to one at random. At least one for each host.",
        maximum=512,
    )
    define_integer(
        values,
        "counts_in_memory",
        2**25,
        "Counts of categories to keep in memory, about 30 bytes each; more go to the disk of "
        "--output_dir.",
        minimum=1000,
    )
    flags.DEFINE_boolean(
        "skip_malformed", False, "Count and leave malformed rows out.", flag_values=values
    )
    define_integer(values, "seed", 1, "Of all that is random.", minimum=0)
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    return _checked(values)


def _checked(values: flags.FlagValues) -> Options:
    if values.ids not in IDS:
        raise FlagValueError("ids", f"one of {', '.join(IDS)}", repr(values.ids))
    if bool(values.source) == (values.synthetic_rows is not None):
        raise FlagValueError(
            "source",
            "files, or --synthetic_rows instead",
            "both" if values.source else "neither",
        )
    sources = {
        split: _files("source" if split == "train" else f"{split}_source", values)
        for split in SPLITS
    }
    if values.synthetic_rows is not None and any(sources.values()):
        raise FlagValueError(
            "synthetic_rows", "no --validation_source or --test_source with it", "one"
        )
    for one, other in itertools.combinations(SPLITS, 2):
        real = {path.resolve() for path in sources[one]}
        for path in sources[other]:
            if path.resolve() in real:
                first = "source" if one == "train" else f"{one}_source"
                raise FlagValueError(
                    f"{other}_source", f"files that are not in --{first}", repr(str(path))
                )
    held_out = {
        split: 0.0 if sources[split] else values[f"{split}_fraction"].value for split in SPLITS[1:]
    }
    if sum(held_out.values()) >= 1:
        raise FlagValueError(
            "test_fraction", "less than 1 with --validation_fraction", held_out["test"]
        )
    return Options(
        sources=sources,
        synthetic_rows=values.synthetic_rows,
        output_dir=check_output_dir(values.output_dir),
        ids=values.ids,
        min_frequency=values.min_frequency,
        buckets=values.buckets,
        validation_fraction=held_out["validation"],
        test_fraction=held_out["test"],
        shards=values.shards,
        counts_in_memory=values.counts_in_memory,
        skip_malformed=values.skip_malformed,
        seed=values.seed,
        table=_table(values, sources),
    )


def _table(values: flags.FlagValues, sources: dict[str, tuple[Path, ...]]) -> Table | None:
    if values.label is None:
        for flag in _OF_TABLES:
            if values[flag].value is not None:
                raise FlagValueError(flag, "no value without --label", values[flag].value)
        return None
    files = [file for split in SPLITS for file in sources[split]]
    if not files:
        raise FlagValueError("label", "no value with --synthetic_rows", repr(values.label))
    given = "comma" if values.delimiter is None else values.delimiter
    delimiter = _DELIMITERS.get(given, given)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise FlagValueError(
            "delimiter", f"one of {', '.join(_DELIMITERS)}, or one character", repr(given)
        )
    if not values.categorical:
        raise FlagValueError("categorical", "at least one column, with --label", "none")
    columns = None if values.columns is None else tuple(values.columns)
    if columns is not None and len({*columns}) < len(columns):
        raise FlagValueError("columns", "different names", ",".join(columns))
    numeric, categorical = chosen_columns(
        columns or header_of(files[0], delimiter),
        values.label,
        values.numeric or (),
        values.categorical,
    )
    multi_hot = _multi_hot(values, categorical)
    given = "|" if values.multi_hot_separator is None else values.multi_hot_separator
    table = Table(
        delimiter,
        columns,
        values.label,
        numeric,
        categorical,
        values.clicks_from,
        values.numeric_scale != "none",
        multi_hot,
        _DELIMITERS.get(given, given),
        values.multi_hot_limit,
    )
    for file in files:
        columns_of(file, table)
    return table


def _multi_hot(values: flags.FlagValues, categorical: Sequence[str]) -> tuple[str, ...]:
    found: set[str] = set()
    for pattern in values.multi_hot or ():
        matches = [pattern] if pattern in categorical else fnmatch.filter(categorical, pattern)
        if not matches:
            raise FlagValueError(
                "multi_hot", f"columns of --categorical ({', '.join(categorical)})", repr(pattern)
            )
        found.update(matches)
    for flag in ("multi_hot_separator", "multi_hot_limit"):
        if values[flag].value is not None and not found:
            raise FlagValueError(flag, "no value without --multi_hot", values[flag].value)
    if values.multi_hot_separator == "":
        raise FlagValueError("multi_hot_separator", "at least one character", "''")
    return tuple(name for name in categorical if name in found)


def _files(flag: str, values: flags.FlagValues) -> tuple[Path, ...]:
    found: list[Path] = []
    for pattern in (values[flag].value or "").split(","):
        if not pattern.strip():
            continue
        matches = [Path(name) for name in sorted(glob.glob(pattern.strip()))]
        files = [path for path in matches if path.is_file()]
        if not files:
            raise FlagValueError(
                flag,
                "files or patterns of files that exist",
                f"{pattern.strip()!r}, which is a folder" if matches else repr(pattern.strip()),
            )
        found.extend(path for path in files if path not in found)
    return tuple(found)


# -- two passes ------------------------------------------------------------------------------------


def _prepare(options: Options) -> None:
    with writing(options.output_dir) as (partial, bar, stop):
        rows = _Rows(options, bar, stop)
        counter = FrequencyCounter(partial, options.counts_in_memory, options.categories)
        ids: Ids = HashedIds(options.buckets, options.categories)
        if options.ids == "frequency":
            for split, chunk in rows.read(("train",), "counting"):
                if split == "train":
                    counter.add(chunk.keys)
            ids = FrequentIds(counter.frequent(options.min_frequency))
        record = _write(options, rows, ids, partial)
        write_json(partial / RECORD, record)
    described = ", ".join(f"{record['rows'][split]} {split}" for split in SPLITS)
    print(
        f"wrote {described} rows, {sum(record['vocab_sizes'])} ids in {options.categories} "
        f"columns, to {options.output_dir}"
    )
    if record["skipped_rows"]:
        print(f"left {record['skipped_rows']} malformed rows out", file=sys.stderr)
    best = record.get("bayes_auc", {}).get("validation")
    if best is not None:
        print(f"best possible AUC on the validation rows: {best['of_these_clicks']:.4f}")


class _Rows:
    """Reads the rows of the splits, the same every time it is asked."""

    def __init__(self, options: Options, bar: Any, stop: Interruption) -> None:
        self.skipped = 0
        # By the sources they are from, whatever split their rows come to.
        self.good = dict.fromkeys(SPLITS, 0)
        self.first_problem: dict[str, str] = {}
        self._options = options
        self._bar = bar
        self._stop = stop
        self._texts = DenseTexts()

    def read(self, splits: Sequence[str], description: str) -> Iterator[tuple[str, Chunk]]:
        """Rows with the split they belong to, the sources of some splits after each other."""
        self.skipped = 0
        options = self._options
        with contextlib.closing(_Progress(self._bar, self._stop, description)) as progress:
            progress.total = options.synthetic_rows or sum(
                file.stat().st_size for split in splits for file in options.sources[split]
            )
            for split in splits:
                for chunk in self._chunks(split, progress):
                    self.skipped += chunk.skipped
                    self.good[split] += len(chunk.labels)
                    if chunk.problem is not None:
                        self.first_problem.setdefault(split, chunk.problem)
                    yield from self._split(split, chunk)

    def _chunks(self, split: str, progress: Callable[[int], None]) -> Iterator[Chunk]:
        options = self._options
        if options.table is not None:
            yield from read_table(
                options.sources[split], options.table, progress, options.skip_malformed
            )
            return
        first_row = 0
        for lines in self._lines(split, progress):
            yield parse(lines, self._texts, first_row, options.skip_malformed)
            first_row += len(lines.lines)

    def _lines(self, split: str, progress: Callable[[int], None]) -> Iterator[Lines]:
        options = self._options
        if split == "train" and options.synthetic_rows:
            return ClickModel(options.seed).lines(options.synthetic_rows, progress)
        return read_lines(options.sources[split], progress)

    def _split(self, split: str, chunk: Chunk) -> Iterator[tuple[str, Chunk]]:
        options = self._options
        if split != "train":
            yield split, chunk
            return
        if not chunk.labels:
            return
        position = uniform(chunk.row_numbers, 2 * options.seed)
        held_out = options.validation_fraction + options.test_fraction
        for name, chosen in (
            ("train", position >= held_out),
            ("validation", position < options.validation_fraction),
            ("test", (position >= options.validation_fraction) & (position < held_out)),
        ):
            if chosen.all():
                yield name, chunk
            elif chosen.any():
                yield name, _selected(chunk, chosen)


class _Progress:
    """A bar, and the place where an interrupted run ends."""

    def __init__(self, bar: Any, stop: Interruption, description: str) -> None:
        self._bar = bar
        self._stop = stop
        self._task = bar.add_task(description, total=None)
        self._total = 0

    @property
    def total(self) -> int:
        """How much there is to do."""
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        self._total = total
        self._bar.update(self._task, total=total)

    def __call__(self, done: int) -> None:
        self._stop.check()
        self._bar.advance(self._task, done)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.remove_task(self._task)


def uniform(row_numbers: Any, salt: int) -> Any:
    """Numbers in [0, 1) for row numbers, as good as random but the same every time."""
    return (mix(row_numbers, salt) >> np.uint64(11)) * 2.0**-53


def _selected(chunk: Chunk, chosen: Any) -> Chunk:
    rows = np.flatnonzero(chosen)
    numbers = rows.tolist()
    return Chunk(
        chunk.row_numbers[rows],
        [chunk.labels[i] for i in numbers],
        [[column[i] for i in numbers] for column in chunk.dense],
        [
            keys[np.repeat(chosen, chunk.counts[column]) if column in chunk.counts else rows]
            for column, keys in enumerate(chunk.keys)
        ],
        0,
        None if chunk.logits is None else chunk.logits[rows],
        None,
        {column: counts[rows] for column, counts in chunk.counts.items()},
    )


def _write(options: Options, rows: _Rows, ids: Ids, folder: Path) -> dict[str, Any]:
    counts = dict.fromkeys(SPLITS, 0)
    clicks = dict.fromkeys(SPLITS, 0)
    best = {split: BayesAUC() for split in SPLITS}
    most = [1] * options.categories
    with contextlib.ExitStack() as files:
        outputs = {}
        for split, shards in zip(SPLITS, (options.shards, 1, 1), strict=True):
            if split == "train" or options.sources[split] or _fraction(options, split):
                outputs[split] = [
                    files.enter_context(
                        (folder / f"{split}-{i:05d}-of-{shards:05d}.tsv").open("wb")
                    )
                    for i in range(shards)
                ]
        for split, chunk in rows.read([s for s in SPLITS if s in outputs], "writing"):
            texts = _texts(chunk, ids)
            shard_of = uniform(chunk.row_numbers, 2 * options.seed + 1) * len(outputs[split])
            for shard, output in enumerate(outputs[split]):
                chosen = np.flatnonzero(shard_of.astype(int) == shard).tolist()
                output.writelines([texts[i] for i in chosen])
            counts[split] += len(texts)
            for column, several in chunk.counts.items():
                most[column] = int(several.max(initial=most[column]))
            clicks[split] += chunk.labels.count(b"1")
            if chunk.logits is not None:
                best[split].add(chunk.logits, np.array([x == b"1" for x in chunk.labels]))
    for split in outputs:
        if not counts[split]:
            raise RowError(_no_rows(options, split, sum(counts.values()), rows))
    record: dict[str, Any] = {
        "rows": counts,
        "clicks": clicks,
        "skipped_rows": rows.skipped,
        "num_dense_features": options.dense_features,
        "vocab_sizes": ids.vocab_sizes,
        "ids": options.ids,
        **(
            {"min_frequency": options.min_frequency}
            if options.ids == "frequency"
            else {"buckets": options.buckets}
        ),
    }
    if options.table is not None:
        record["columns"] = {
            "label": options.table.label,
            "numeric": list(options.table.numeric),
            "categorical": list(options.table.categorical),
        }
        if options.table.multi_hot:
            record["multi_hot_sizes"] = most
    if options.synthetic_rows:
        record["bayes_auc"] = {
            split: {
                "of_these_clicks": best[split].of_these_clicks,
                "expected": best[split].expected,
            }
            for split in SPLITS
            if 0 < clicks[split] < counts[split]
        }
    return record


def _no_rows(options: Options, split: str, written: int, rows: _Rows) -> str:
    source = split if options.sources[split] else "train"
    if not rows.good[source] and source in rows.first_problem:
        flag = "source" if source == "train" else f"{source}_source"
        return f"all rows of --{flag} are malformed; the first: {rows.first_problem[source]}"
    if split == "train":
        return "--source has no rows to train on"
    if options.sources[split]:
        return f"--{split}_source has no rows"
    fraction = _fraction(options, split)
    return (
        f"no row of {written} is held out: expected more rows, or a --{split}_fraction of 0 or "
        f"larger than the one received, {fraction:g}"
    )


def _fraction(options: Options, split: str) -> float:
    return options.validation_fraction if split == "validation" else options.test_fraction


def _texts(chunk: Chunk, ids: Ids) -> list[bytes]:
    columns: list[list[bytes]] = [chunk.labels, *chunk.dense]
    for column, keys in enumerate(chunk.keys):
        texts = [b"%d" % i for i in ids.ids(column, keys).tolist()]
        if column in chunk.counts:
            left = iter(texts)
            counts = chunk.counts[column].tolist()
            texts = [ID_SEPARATOR.encode().join(itertools.islice(left, count)) for count in counts]
        columns.append(texts)
    return [b"\t".join(fields) + b"\n" for fields in zip(*columns, strict=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
