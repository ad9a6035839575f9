"""Watching for discarded updates."""

import logging
import math

import keras
from keras.optimizers import Optimizer

from tf_lbopt import _compat, _validation
from tf_lbopt.callbacks.common import Logs

_logger = logging.getLogger(__name__)


class SkippedUpdates(keras.callbacks.Callback):
    """Logs how many updates were discarded, and stops when nothing else happens.

    They are for NaN or Inf in the gradients, for a learning rate that is none (NaN, negative) and
    for steps or squares of gradients that overflow.

    The total goes into `fit`'s logs as ``skipped_updates`` at the end of every epoch (and so into
    the history, CSV files and TensorBoard). A few skips are normal under loss scaling; a run of
    `max_consecutive` without one update in between means that the weights or the data are broken,
    and training stops.

    Args:
        max_consecutive: Skipped updates in a row after which training stops, ≥ 1, or `None` never
            to stop. Defaults to 50. Of a `keras.optimizers.MultiOptimizer` each group counts, and
            the total is that of all. Checked at the end of every batch (of every group of batches
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
        # For each optimizer, how many it had made and skipped at its last update.
        self._last: dict[int, tuple[int, int]] = {}
        self._scale = math.inf
        self._halvings = 0

    def on_train_begin(self, logs: Logs = None) -> None:
        """Starts counting from the optimizer's present state."""
        self._scale, self._halvings = math.inf, 0
        self._last = self._counts()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Stops the training when the limit is reached."""
        for key, (updates, skipped) in self._counts().items():
            skipped += self._halvings
            if updates != self._last.setdefault(key, (0, 0))[0]:
                self._last[key] = updates, skipped
            consecutive = skipped - self._last[key][1]
            if self.max_consecutive is not None and consecutive >= self.max_consecutive:
                _logger.error(
                    "Training stopped: the last %d updates were all skipped for NaN, Inf or "
                    "overflow (%d updates made before). The weights are those of the last update.",
                    consecutive, updates,
                )  # fmt: skip
                self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Adds the total to the logs."""
        if logs is not None:
            skipped = sum(skipped for _, skipped in self._counts().values())
            logs["skipped_updates"] = skipped + self._halvings

    def _counts(self) -> dict[int, tuple[int, int]]:
        """Updates that each optimizer made and skipped: a `MultiOptimizer` has several."""
        outer = self.model.optimizer
        optimizers = _counting(outer)
        # One that is given a function knows its optimizers when it is built.
        unknown = _compat.is_multi_optimizer(outer) and not outer.built
        if not optimizers and not unknown:
            raise ValueError(
                "SkippedUpdates needs an optimizer of tf_lbopt (or tf_lbopt.LossScaleOptimizer "
                f"around another). Received: {type(outer).__name__}"
            )
        if not hasattr(outer, "skipped_updates") and hasattr(outer, "dynamic_scale"):
            # What Keras's LossScaleOptimizer discards never reaches the optimizer inside; all that
            # can be seen of it is that the scale was halved.
            scale, before = float(outer.dynamic_scale.numpy()), self._scale
            if 0 < scale < before < math.inf:
                self._halvings += round(math.log2(before / scale))
            self._scale = scale
        return {
            id(one): (int(one.iterations.numpy()), int(one.skipped_updates.numpy()))
            for one in optimizers
        }


def _counting(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that count what they skip: this one, or those in it."""
    if hasattr(optimizer, "skipped_updates"):
        return [optimizer]
    inner = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
    return [counting for one in inner if one is not None for counting in _counting(one)]
