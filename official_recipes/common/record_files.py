"""Saying which record of which file made tf.data fail, since its own errors do not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from official_recipes.common.flag_parsing import FlagValueError

FaultOf = Callable[[bytes], str | None]
"""What is wrong with a record, or ``None``."""

_FROM_INPUT = "GetNext"  # of the operations that take a batch from a dataset


def fault_in(files: list[str], fault_of: FaultOf | None = None) -> str | None:
    """What is wrong with TFRecord files: the first fault, in one line.

    Args:
        files: Their paths.
        fault_of: What else a record must be than whole.

    Returns:
        The file, the record's number from 0 and the fault; ``None`` if there is none.
    """
    import tensorflow as tf

    for file in files:
        number = 0
        try:
            for record in tf.data.TFRecordDataset(file):
                fault = None if fault_of is None else fault_of(record.numpy())
                if fault is not None:
                    return f"{file}, record {number}: {fault}"
                number += 1
        except tf.errors.DataLossError:
            return f"{file}, which is no TFRecord file or ends early: {number} records can be read"
    return None


@contextlib.contextmanager
def naming_faults(task: Any, splits: tuple[str, ...]) -> Iterator[None]:
    """Names file and record where a task's input fails in the block.

    Files are read again for it, from their beginning. Only the task knows what records must be: it
    may have a method `record_fault` of a record and the parameters of its split.

    Args:
        task: Of tf-models.
        splits: Names of the fields of its configuration that are read in the block.

    Raises:
        FlagValueError: The input failed, and a fault was found.
    """
    import tensorflow as tf
    from official.core import config_definitions, input_reader

    try:
        yield
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        checks = hasattr(task, "record_fault")
        if _FROM_INPUT not in str(error) or not (
            checks or isinstance(error, tf.errors.DataLossError)
        ):
            raise
        for split in splits:
            data = getattr(task.task_config, split, None)
            if not isinstance(data, config_definitions.DataConfig) or not isinstance(
                data.input_path, str | list | tuple
            ):
                continue
            if not data.input_path or getattr(data, "file_type", "tfrecord") != "tfrecord":
                continue
            files = [f for f in input_reader.match_files(data.input_path) if tf.io.gfile.exists(f)]
            fault = fault_in(files, _fault_of(task, data))
            if fault is not None:
                raise FlagValueError(
                    "params_override", f"task.{split}.input_path: records for this task", fault
                ) from error
        raise


def _fault_of(task: Any, data: Any) -> FaultOf | None:
    method = getattr(task, "record_fault", None)
    return None if method is None else lambda record: method(record, data)
