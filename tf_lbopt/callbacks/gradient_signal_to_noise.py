"""Looking at VRGD's signal-to-noise ratios."""

import os

from tf_lbopt import _validation
from tf_lbopt.callbacks.common import EpochNumbers, Logs, build_optimizer, without_loss_scale
from tf_lbopt.optimizers.gsnr_weighting import GSNRWeighting


class GradientSignalToNoise(EpochNumbers):
    """Logs every layer's gradient signal-to-noise ratio under a VRGD optimizer.

    For each trainable variable, at the end of every epoch, from the latest summary:

    - ``mean``: the layer mean of the GSNR ``ḡ²/σ²`` itself;
    - ``q05 … q95``: quantiles of the normalized GSNR (layer mean 1), before the clip;
    - ``at_gamma``, ``at_one``: the shares of elements that the clip leaves at γ and at 1.

    They go into `fit`'s logs as ``gsnr/<path>/<number>`` (and so into the history, CSV files and
    Keras's own TensorBoard callback, if that comes later in the list), and to TensorBoard directly
    if `log_dir` is given. Without the callback nothing of it is computed: attaching and detaching
    it makes `fit` trace the training step anew.

    Args:
        every: Updates from one summary to the next, ≥ 1. A summary sorts a sample of each layer.
            Defaults to 10.
        log_dir: Folder for TensorBoard's event files, or `None`.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.
        ValueError: When training begins, if the model is not built, or its optimizer is no VRGD
            optimizer.

    Example:
        >>> import tf_lbopt
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="top")])
        >>> optimizer = tf_lbopt.VRSGD(0.01, gradient_accumulation_steps=2)
        >>> model.compile(optimizer=optimizer, loss="mse")
        >>> x, y = keras.random.normal([8, 2], seed=0), keras.ops.ones([8, 1])
        >>> history = model.fit(x, y, batch_size=2, verbose=0, callbacks=[GradientSignalToNoise()])
        >>> names = [name for name in history.history if name.endswith("top/kernel/mean")]
        >>> len(names), history.history[names[0]][0] > 0
        (1, True)
    """

    def __init__(self, every: int = 10, log_dir: str | os.PathLike[str] | None = None):
        super().__init__(log_dir)
        self.every = _validation.integer("every", every, low=1)

    def on_train_begin(self, logs: Logs = None) -> None:
        """Makes the optimizer keep summaries."""
        optimizer = self._optimizer()
        build_optimizer(self)
        optimizer.watch_gsnr(self.every)
        self.model.make_train_function(force=True)
        super().on_train_begin(logs)

    def on_train_end(self, logs: Logs = None) -> None:
        """Makes it stop."""
        self._optimizer().unwatch_gsnr()
        self.model.make_train_function(force=True)
        super().on_train_end(logs)

    def numbers(self) -> dict[str, float]:
        """The latest summaries."""
        return {
            f"gsnr/{path}/{name}": value
            for path, summary in self._optimizer().gsnr_summaries().items()
            for name, value in summary.items()
        }

    def _optimizer(self) -> GSNRWeighting:
        optimizer = without_loss_scale(self.model)
        if not isinstance(optimizer, GSNRWeighting):
            raise ValueError(
                "GradientSignalToNoise needs a VRGD optimizer (VRSGD, VRMomentum, VRAdam, VRLARS, "
                "VRLAMB, VRLANS or VarianceReduced). "
                f"Received: {type(self.model.optimizer).__name__}"
            )
        return optimizer
