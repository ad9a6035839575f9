"""What callbacks have in common."""

import abc
import math
import os
from typing import TypeAlias

import keras
import tensorflow as tf

from tf_lbopt import _validation

Logs: TypeAlias = dict[str, float] | None


def build_optimizer(callback: keras.callbacks.Callback) -> None:
    """Builds the optimizer of a callback's model, for all variables that the model trains.

    Raises:
        ValueError: The model itself is not built.
    """
    model = callback.model
    if not model.built:
        raise ValueError(
            f"{type(callback).__name__} needs a model whose variables exist. Give it a "
            "`keras.Input` or call it once before `fit`. Received the model "
            f"{model.name!r}, which is not built."
        )
    if not model.optimizer.built:
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)


def without_loss_scale(model: keras.Model) -> keras.optimizers.Optimizer:
    """The optimizer of a model, or the one inside of it if it scales the loss."""
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


class EpochNumbers(keras.callbacks.Callback, abc.ABC):
    """Puts `numbers` into `fit`'s logs at the end of every epoch, and into TensorBoard's files.

    Args:
        log_dir: Folder for TensorBoard's event files, which get the finite numbers, or `None`.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None):
        super().__init__()
        self.log_dir = _validation.path("log_dir", log_dir)
        self._writer: tf.summary.SummaryWriter | None = None

    @abc.abstractmethod
    def numbers(self) -> dict[str, float]:
        """What is to be logged now, by name."""

    def on_train_begin(self, logs: Logs = None) -> None:
        """Opens the event file."""
        if self.log_dir is not None:
            self._writer = tf.summary.create_file_writer(str(self.log_dir))

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Writes the numbers."""
        numbers = self.numbers()
        if logs is not None:
            logs.update(numbers)
        self.write(numbers, epoch)

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Writes the finite ones into the event file, if there is one."""
        if self._writer is not None:
            with self._writer.as_default(step=step):
                for name, value in numbers.items():
                    if math.isfinite(value):
                        tf.summary.scalar(name, value)
                self._writer.flush()

    def on_train_end(self, logs: Logs = None) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
