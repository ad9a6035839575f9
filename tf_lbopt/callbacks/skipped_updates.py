"""Watching for discarded updates."""

import logging
import math
from typing import Any

import keras

from tf_lbopt import _validation

_logger = logging.getLogger(__name__)


class SkippedUpdates(keras.callbacks.Callback):
    """Logs how many updates were discarded for NaN or Inf, and stops when nothing else happens.

    The total goes into `fit`'s logs as ``skipped_updates`` at the end of every epoch (and so into
    the history, CSV files and TensorBoard). A few skips are normal under loss scaling; a run of
    `max_consecutive` without one update in between means that the weights or the data are broken,
    and training stops.

    Args:
        max_consecutive: Skipped updates in a row after which training stops, ≥ 1, or `None` never
            to stop. Defaults to 50. Checked at the end of every batch (of every group of batches
            under `steps_per_execution`).

    Raises:
        ValueError: When training begins, if the model's optimizer does not count skipped updates.

    Example:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> import tf_lbopt
        >>> model.compile(optimizer=tf_lbopt.SNGM(0.1), loss="mse")
        >>> x, y = keras.ops.ones([4, 2]), keras.ops.ones([4, 1])
        >>> history = model.fit(x, y, verbose=0, callbacks=[SkippedUpdates()])
        >>> history.history["skipped_updates"]
        [0]
    """

    def __init__(self, max_consecutive: int | None = 50):
        super().__init__()
        self.max_consecutive = _validation.integer(
            "max_consecutive", max_consecutive, low=1, optional=True
        )
        self._updates = 0
        self._skipped_at_last_update = 0
        self._last_scale: float | None = None
        self._halvings = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts counting from the optimizer's present state."""
        self._last_scale, self._halvings = None, 0
        self._updates, self._skipped_at_last_update = self._counts()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stops the training when the limit is reached."""
        updates, skipped = self._counts()
        if updates != self._updates:
            self._updates, self._skipped_at_last_update = updates, skipped
        consecutive = skipped - self._skipped_at_last_update
        if self.max_consecutive is not None and consecutive >= self.max_consecutive:
            _logger.error(
                "Training stopped: the last %d updates were all skipped for NaN or Inf in the "
                "gradients (%d updates made before). The weights are those of the last update.",
                consecutive, updates,
            )  # fmt: skip
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the total to the logs."""
        if logs is not None:
            logs["skipped_updates"] = self._counts()[1]

    def _counts(self) -> tuple[int, int]:
        outer = self.model.optimizer
        optimizer = outer
        if not hasattr(outer, "skipped_updates"):
            optimizer = getattr(outer, "inner_optimizer", outer)
        if not hasattr(optimizer, "skipped_updates"):
            raise ValueError(
                "SkippedUpdates needs an optimizer of tf_lbopt (or tf_lbopt.LossScaleOptimizer "
                f"around another). Received: {type(outer).__name__}"
            )
        if optimizer is not outer and outer.built:
            self._watch_scale(float(outer.dynamic_scale.numpy()))
        skipped = int(optimizer.skipped_updates.numpy()) + self._halvings
        return int(optimizer.iterations.numpy()), skipped

    def _watch_scale(self, scale: float) -> None:
        # What Keras's LossScaleOptimizer discards never reaches the optimizer inside; all that can
        # be seen of it is that the scale was halved.
        if self._last_scale is not None and 0 < scale < self._last_scale:
            self._halvings += round(math.log2(self._last_scale / scale))
        self._last_scale = scale
