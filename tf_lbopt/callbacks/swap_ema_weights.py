"""Evaluating and saving with averages of the weights."""

from typing import Any

import keras

from tf_lbopt import _validation
from tf_lbopt.callbacks.common import Logs


class SwapEMAWeights(keras.callbacks.Callback):
    """Exchanges weights and their averages for evaluations, without loss.

    As `keras.callbacks.SwapEMAWeights`, for optimizers of this package with `use_ema=True`. Keras's
    exchanges by additions, which round both, and can not exchange averages in float32 with weights
    in half precision. Around another optimizer (in `tf_lbopt.LossScaleOptimizer`,
    `tf_lbopt.VarianceReduced`) it takes the one that keeps averages.

    Args:
        swap_on_epoch: Whether weights are averages at the end of each epoch too, for callbacks
            after this one in the list that save. Defaults to `False`: only in evaluations.

    Raises:
        TypeError: `swap_on_epoch` is not a bool.
        ValueError: When it begins, if no optimizer of this package with `use_ema=True` is there.

    Example:
        >>> import tf_lbopt
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile(optimizer=tf_lbopt.SNGM(0.1, use_ema=True), loss="mse")
        >>> x, y = keras.ops.ones([4, 2]), keras.ops.ones([4, 1])
        >>> history = model.fit(
        ...     x, y, validation_data=(x, y), callbacks=[SwapEMAWeights()], verbose=0
        ... )
        >>> sorted(history.history)
        ['loss', 'val_loss']
    """

    def __init__(self, swap_on_epoch: bool = False):
        super().__init__()
        self.swap_on_epoch = _validation.boolean("swap_on_epoch", swap_on_epoch)
        self._optimizer: Any = None

    def set_model(self, model: keras.Model) -> None:
        """Called by Keras when it begins."""
        super().set_model(model)
        outer = model.optimizer
        keeping = [
            one
            for one in (outer, getattr(outer, "inner_optimizer", None))
            if hasattr(one, "swap_averages") and getattr(one, "use_ema", False)
        ]
        if not keeping:
            raise ValueError(
                "SwapEMAWeights needs a model whose optimizer is one of tf_lbopt with "
                "`use_ema=True`; for others see keras.callbacks.SwapEMAWeights. "
                f"Received: {type(outer).__name__}"
            )
        self._optimizer = keeping[0]

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Puts the weights back."""
        self._show_averages(False)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Puts the averages into the place of the weights, if `swap_on_epoch`."""
        if self.swap_on_epoch:
            self._show_averages(True)

    def on_test_begin(self, logs: Logs = None) -> None:
        """Puts the averages into the place of the weights."""
        self._show_averages(True)

    def on_test_end(self, logs: Logs = None) -> None:
        """Puts the weights back."""
        self._show_averages(False)

    on_predict_begin = on_test_begin
    on_predict_end = on_test_end

    def _show_averages(self, shown: bool) -> None:
        if shown != self._optimizer.averages_are_swapped:
            self._optimizer.swap_averages()
