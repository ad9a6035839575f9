"""Reading what `prepare_data` has written (and `CriteoTsvReader` of tf-models reads).

Unlike that reader it shuffles, evaluates on every row, and stops at ids without an embedding.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.dlrm.prepare_data import ID_SEPARATOR, RECORD

_BUFFER_BYTES = 2**20
_ROWS = 8192


def recorded_columns(input_path: str) -> tuple[int, list[int], list[int]] | None:
    """What is written beside some files of their columns, or `None` if there is nothing.

    Args:
        input_path: Files or patterns, separated by commas.

    Returns:
        The number of dense features, the vocabulary sizes of the categorical columns, and how many
        ids a row has in each at most; no such sizes where it is one in all.

    Raises:
        FlagValueError: What is there is no record of `prepare_data`.
    """
    path = os.path.join(os.path.dirname(input_path.split(",")[0].strip()), RECORD)
    if not tf.io.gfile.exists(path):
        return None
    try:
        with tf.io.gfile.GFile(path) as file:
            record = json.load(file)
        return (
            int(record["num_dense_features"]),
            [int(size) for size in record["vocab_sizes"]],
            [int(size) for size in record.get("multi_hot_sizes", [])],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlagValueError(
            "params_override", f"{path} as prepare_data.py writes it", repr(error)
        ) from error


def matching_files(input_path: str) -> list[str]:
    """The files of a split, sorted."""
    patterns = [pattern.strip() for pattern in input_path.split(",") if pattern.strip()]
    return sorted({name for pattern in patterns for name in tf.io.gfile.glob(pattern)})


def click_logs(
    params: Any,
    vocab_sizes: Sequence[int],
    num_dense_features: int,
    input_context: tf.distribute.InputContext | None = None,
    multi_hot_sizes: Sequence[int] = (),
) -> tf.data.Dataset:
    """Batches for one replica of ``(features, labels)``.

    The features are ``dense_features`` (floats, batch x columns) and ``sparse_features`` (for every
    column, by its number as a string, a vector of ids; of a multi-hot one batch x size, filled up
    with -1). In training rows come without end, files
    and rows shuffled, every row once in an epoch. In evaluation each comes once: the last batches
    are filled up with rows that have the weight 0 in ``features["weights"]``.

    Args:
        params: `input_path`, `global_batch_size`, `is_training`, `shuffle_buffer_size` and
            `cycle_length`.
        vocab_sizes: Of the categorical columns.
        num_dense_features: How many columns come before them.
        input_context: Of the worker.
        multi_hot_sizes: How many ids a row has in each column at most; empty for one in all.

    Raises:
        FlagValueError: There are fewer files than hosts, or they are empty.
    """
    files = matching_files(params.input_path)
    hosts, host, replicas = 1, 0, 1
    if input_context is not None:
        hosts, host = input_context.num_input_pipelines, input_context.input_pipeline_id
        replicas = input_context.num_replicas_in_sync // hosts
    batch = params.global_batch_size // (replicas * hosts)
    files = files[host::hosts]
    # Without rows an endless dataset would look for the first one for ever.
    if not any(tf.io.gfile.stat(name).length for name in files):
        raise FlagValueError(
            "params_override",
            f"input_path: at least {hosts} files with rows, one for each host",
            repr(params.input_path),
        )
    names = tf.data.Dataset.from_tensor_slices(files)
    if params.is_training:
        names = names.shuffle(len(files))
    lines = names.interleave(
        lambda name: tf.data.TextLineDataset(name, buffer_size=_BUFFER_BYTES),
        cycle_length=min(len(files), params.cycle_length),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=not params.is_training,
    )

    def parsed(rows: tf.Tensor) -> tuple[dict[str, Any], tf.Tensor]:
        return parsed_rows(rows, vocab_sizes, num_dense_features, multi_hot_sizes)

    if params.is_training:
        if params.shuffle_buffer_size > 1:
            lines = lines.shuffle(params.shuffle_buffer_size)
        # Repeated last: an epoch has every row once.
        batches = lines.repeat().batch(batch, drop_remainder=True)
        return batches.map(parsed, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    together = batch * replicas
    filler = "\t".join(["0"] * (1 + num_dense_features + len(vocab_sizes)))

    def filled(rows: tf.Tensor) -> tuple[dict[str, Any], tf.Tensor]:
        there = tf.shape(rows)[0]
        rows = tf.concat([rows, tf.fill([together - there], filler)], 0)
        rows.set_shape([together])
        features, labels = parsed(rows)
        features["weights"] = tf.sequence_mask(there, together, tf.float32)
        return tf.nest.map_structure(
            lambda t: tf.reshape(t, [replicas, batch, *t.shape[1:]]), (features, labels)
        )

    # So every replica gets a batch whenever one does.
    batches = lines.batch(together).map(filled, tf.data.AUTOTUNE)
    return batches.unbatch().prefetch(tf.data.AUTOTUNE)


def parsed_rows(
    rows: tf.Tensor,
    vocab_sizes: Sequence[int],
    num_dense_features: int,
    multi_hot_sizes: Sequence[int] = (),
) -> tuple[dict[str, Any], tf.Tensor]:
    """The features and the labels of lines; stops at ids without an embedding.

    Args:
        rows: Lines of a prepared file.
        vocab_sizes: Of the categorical columns.
        num_dense_features: How many columns come before them.
        multi_hot_sizes: As `click_logs` has them.
    """
    sizes = multi_hot_sizes or [1] * len(vocab_sizes)
    defaults: list[list[Any]] = [[0.0]] * (1 + num_dense_features)
    defaults += [[0] if size == 1 else ["0"] for size in sizes]
    label, *fields = tf.io.decode_csv(rows, defaults, field_delim="\t", use_quote_delim=False)
    ids = [
        field if size == 1 else _several(field, size)
        for field, size in zip(fields[num_dense_features:], sizes, strict=True)
    ]
    with tf.control_dependencies([check_ids(ids, vocab_sizes)]):
        dense = tf.stack(fields[:num_dense_features], axis=1)
    sparse = {str(index): column for index, column in enumerate(ids)}
    return {"dense_features": dense, "sparse_features": sparse}, label


def _several(fields: tf.Tensor, size: int) -> tf.Tensor:
    """The ids of a multi-hot column, filled up with -1; stops where there are more than `size`."""
    ids = tf.strings.to_number(tf.strings.split(fields, ID_SEPARATOR), tf.int32)
    check = tf.debugging.Assert(
        tf.reduce_all(ids.flat_values >= 0) & tf.reduce_all(ids.row_lengths() <= size),
        ["ids in the data are negative or more than task.model.multi_hot_sizes"],
    )
    with tf.control_dependencies([tf.no_op() if check is None else check]):
        return ids.to_tensor(-1, shape=[None, size])


def check_ids(columns: Sequence[tf.Tensor], vocab_sizes: Sequence[int]) -> tf.Operation:
    """The operation that stops at ids without an embedding.

    A GPU would look an id that is too large up as zeros, in silence; a negative one is the last row
    of the column before where all have one table.

    Args:
        columns: Ids of rows, int32; those of a multi-hot column, rows x size, may be -1 but for the
            first one.
        vocab_sizes: Of the columns.
    """
    smallest = tf.stack([tf.reduce_min(_counted_from_0(column)) for column in columns])
    largest = tf.stack([tf.reduce_max(column) for column in columns])
    check = tf.debugging.Assert(
        tf.reduce_all((smallest >= 0) & (largest < tf.constant(list(vocab_sizes), tf.int32))),
        ["ids in the data are negative or not below task.model.vocab_sizes"],
    )
    return tf.no_op() if check is None else check


def _counted_from_0(column: tf.Tensor) -> tf.Tensor:
    """The ids of a column, plus 1 where they may be -1."""
    return column if column.shape.rank == 1 else column + ([0] + [1] * (column.shape[1] - 1))


def first_bad_row(
    files: Sequence[str],
    vocab_sizes: Sequence[int],
    num_dense_features: int,
    multi_hot_sizes: Sequence[int] = (),
) -> str | None:
    """What is wrong with the first row that `click_logs` stops at, with its file and line.

    Args:
        files: Where to look, in this order.
        vocab_sizes: Of the categorical columns.
        num_dense_features: How many columns come before them.
        multi_hot_sizes: As `click_logs` has them.
    """
    columns = vocab_sizes, num_dense_features, multi_hot_sizes
    for name in files:
        lines = tf.data.TextLineDataset(name, buffer_size=_BUFFER_BYTES).batch(_ROWS)
        start = 0
        try:
            for _ in lines.map(lambda rows: parsed_rows(rows, *columns)):
                start += _ROWS
        except tf.errors.InvalidArgumentError:
            with tf.io.gfile.GFile(name) as file:
                for number, line in enumerate(itertools.islice(file, start, None), start + 1):
                    if problem := _problem(line.rstrip("\r\n"), *columns):
                        return f"{name}, line {number}: {problem}"
    return None


def _problem(
    line: str,
    vocab_sizes: Sequence[int],
    num_dense_features: int,
    multi_hot_sizes: Sequence[int],
) -> str | None:
    first_id = 1 + num_dense_features
    fields = line.split("\t")
    if len(fields) != first_id + len(vocab_sizes):
        return (
            f"expected {first_id + len(vocab_sizes)} fields separated by TABs, received "
            f"{len(fields)}"
        )
    for index, field in enumerate(fields):
        column = index - first_id
        most = multi_hot_sizes[column] if multi_hot_sizes and column >= 0 else 1
        parts = (field or "0").split(ID_SEPARATOR) if most > 1 else [field or "0"]
        try:
            numbers = [float(part) if column < 0 else int(part) for part in parts]
        except ValueError:
            return f"expected a number in field {index + 1}, received {field[:40]!r}"
        if len(parts) > most:
            return f"expected at most {most} ids in field {index + 1}, received {len(parts)}"
        for number in numbers if column >= 0 else ():
            if not 0 <= number < vocab_sizes[column]:
                return (
                    f"expected an id from 0 to {vocab_sizes[column] - 1} in field {index + 1}, "
                    f"received {number}"
                )
    return None
