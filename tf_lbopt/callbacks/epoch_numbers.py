"""What callbacks have in common that log numbers."""

import math
from typing import Any

import keras
import tensorflow as tf


class EpochNumbers(keras.callbacks.Callback):
    """Puts `numbers` into `fit`'s logs at the end of every epoch, and into TensorBoard's files.

    Args:
        log_dir: Folder for TensorBoard's event files, which get the finite numbers, or `None`.
    """

    def __init__(self, log_dir: str | None):
        super().__init__()
        self.log_dir = log_dir
        self._writer: tf.summary.SummaryWriter | None = None

    def numbers(self) -> dict[str, float]:
        """What is to be logged now, by name."""
        raise NotImplementedError

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Opens the event file."""
        if self.log_dir is not None:
            self._writer = tf.summary.create_file_writer(str(self.log_dir))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the numbers."""
        numbers = self.numbers()
        if logs is not None:
            logs.update(numbers)
        if self._writer is not None:
            with self._writer.as_default(step=epoch):
                for name, value in numbers.items():
                    if math.isfinite(value):
                        tf.summary.scalar(name, value)
                self._writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
