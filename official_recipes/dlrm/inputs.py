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
from official_recipes.dlrm.prepare_data import RECORD

_BUFFER_BYTES = 2**20
_ROWS = 8192


def recorded_columns(input_path: str) -> tuple[int, list[int]] | None:
    """What is written beside some files of their columns, or `None` if there is nothing.

    Args:
        input_path: Files or patterns, separated by commas.

    Returns:
        The number of dense features, and the vocabulary sizes of the categorical columns.

    Raises:
        FlagValueError: What is there is no record of `prepare_data`.
    """
    path = os.path.join(os.path.dirname(input_path.split(",")[0].strip()), RECORD)
    if not tf.io.gfile.exists(path):
        return None
    try:
        with tf.io.gfile.GFile(path) as file:
            record = json.load(file)
        return int(record["num_dense_features"]), [int(size) for size in record["vocab_sizes"]]
    except (ValueError, KeyError, TypeError) as error:
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
) -> tf.data.Dataset:
    """Batches for one replica of ``(features, labels)``.

    The features are ``dense_features`` (floats, batch x columns) and ``sparse_features`` (for every
    column, by its number as a string, a vector of ids). In training rows come without end, files
    and rows shuffled, every row once in an epoch. In evaluation each comes once: the last batches
    are filled up with rows that have the weight 0 in ``features["weights"]``.

    Args:
        params: `input_path`, `global_batch_size`, `is_training`, `shuffle_buffer_size` and
            `cycle_length`.
        vocab_sizes: Of the categorical columns.
        num_dense_features: How many columns come before them.
        input_context: Of the worker.

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
        return parsed_rows(rows, vocab_sizes, num_dense_features)

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
    rows: tf.Tensor, vocab_sizes: Sequence[int], num_dense_features: int
) -> tuple[dict[str, Any], tf.Tensor]:
    """The features and the labels of lines; stops at ids without an embedding.

    Args:
        rows: Lines of a prepared file.
        vocab_sizes: Of the categorical columns.
        num_dense_features: How many columns come before them.
    """
    defaults = [[0.0]] * (1 + num_dense_features) + [[0]] * len(vocab_sizes)
    label, *fields = tf.io.decode_csv(rows, defaults, field_delim="\t", use_quote_delim=False)
    ids = fields[num_dense_features:]
    with tf.control_dependencies([check_ids(ids, vocab_sizes)]):
        dense = tf.stack(fields[:num_dense_features], axis=1)
    sparse = {str(index): column for index, column in enumerate(ids)}
    return {"dense_features": dense, "sparse_features": sparse}, label


def check_ids(columns: Sequence[tf.Tensor], vocab_sizes: Sequence[int]) -> tf.Operation:
    """The operation that stops at ids without an embedding.

    A GPU would look an id that is too large up as zeros, in silence; a negative one is the last row
    of the column before where all have one table.

    Args:
        columns: Ids of rows, int32.
        vocab_sizes: Of the columns.
    """
    smallest, largest = (
        tf.stack([reduced(column) for column in columns])
        for reduced in (tf.reduce_min, tf.reduce_max)
    )
    check = tf.debugging.Assert(
        tf.reduce_all((smallest >= 0) & (largest < tf.constant(list(vocab_sizes), tf.int32))),
        ["ids in the data are negative or not below task.model.vocab_sizes"],
    )
    return tf.no_op() if check is None else check


def first_bad_row(
    files: Sequence[str], vocab_sizes: Sequence[int], num_dense_features: int
) -> str | None:
    """What is wrong with the first row that `click_logs` stops at, with its file and line.

    Args:
        files: Where to look, in this order.
        vocab_sizes: Of the categorical columns.
        num_dense_features: How many columns come before them.
    """
    for name in files:
        lines = tf.data.TextLineDataset(name, buffer_size=_BUFFER_BYTES).batch(_ROWS)
        start = 0
        try:
            for _ in lines.map(lambda rows: parsed_rows(rows, vocab_sizes, num_dense_features)):
                start += _ROWS
        except tf.errors.InvalidArgumentError:
            with tf.io.gfile.GFile(name) as file:
                for number, line in enumerate(itertools.islice(file, start, None), start + 1):
                    if problem := _problem(line.rstrip("\r\n"), vocab_sizes, num_dense_features):
                        return f"{name}, line {number}: {problem}"
    return None


def _problem(line: str, vocab_sizes: Sequence[int], num_dense_features: int) -> str | None:
    first_id = 1 + num_dense_features
    fields = line.split("\t")
    if len(fields) != first_id + len(vocab_sizes):
        return (
            f"expected {first_id + len(vocab_sizes)} fields separated by TABs, received "
            f"{len(fields)}"
        )
    for index, field in enumerate(fields):
        try:
            number = float(field or 0) if index < first_id else int(field or 0)
        except ValueError:
            return f"expected a number in field {index + 1}, received {field[:40]!r}"
        if index >= first_id and not 0 <= number < vocab_sizes[index - first_id]:
            return (
                f"expected an id from 0 to {vocab_sizes[index - first_id] - 1} in field "
                f"{index + 1}, received {number}"
            )
    return None
