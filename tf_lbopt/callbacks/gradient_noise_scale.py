"""Measuring which batch size is worth using."""

import os

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.callbacks.common import EpochNumbers, Logs, build_optimizer, without_loss_scale
from tf_lbopt.optimizers.base import LargeBatchOptimizer
from tf_lbopt.optimizers.trained import path_of
from tf_lbopt.per_example import PerExampleNormsModel
from tf_lbopt.rules.noise_scale import RunningNoiseScale, unbiased_estimates


class GradientNoiseScale(EpochNumbers):
    """Logs the gradient noise scale, in examples: the batch size that is worth using.

        B_simple = tr Σ / ‖G‖²

    with G the expected gradient and Σ the covariance of a single example's. A batch much smaller
    than that takes updates in proportion, a much larger one hardly saves any; `tf_lbopt.batch_size`
    makes a recommendation of it. It grows in training, as the loss falls.

    Both are estimated without bias from an update's k sub-batches of b examples, one for each
    replica and accumulation micro-step, of gradients g_d:

        tr Σ ≈ b k/(k − 1) (mean ‖g_d‖² − ‖ḡ‖²),    ‖G‖² ≈ (k ‖ḡ‖² − mean ‖g_d‖²)/(k − 1)

    and averaged apart over the updates, because the ratio of one update's is biased and may be
    negative. The fewer the sub-batches, and the smaller the batch against B_simple, the more
    updates it takes: the standard error says how right the ratio is. A
    `tf_lbopt.PerExampleNormsModel` measures from single examples (b = 1) instead, also with one
    sub-batch, at the cost of their norms; the gradient must then be that of the examples' losses
    alone.

    At the end of every epoch `fit`'s logs get (and so the history, CSV files and Keras's own
    TensorBoard callback, if that comes later in the list):

    - ``noise_scale``: B_simple; infinite where the mean of the estimates of ‖G‖² is not positive;
    - ``noise_scale_standard_error``: of that, by the delta method over the updates in the average;
    - ``examples_per_update``: how many the last update was made from;
    - ``noise_scale/<path>``: of every trainable variable alone, with `per_layer`;
    - ``gain``: of the last update, under `tf_lbopt.AdaScale`.

    TensorBoard gets them every `every` updates, by the number of updates, if `log_dir` is given.

    Gradients are those of the loss, before clipping and weight decay. Their squared norms are of
    float32 or wider: a noise scale a million times below a sub-batch is lost in the difference. A
    discarded update does not enter, nor one whose micro-steps began before the callback did, nor
    one with fewer than 2 sub-batches with a gradient. Sub-batches count as of one size: use
    `drop_remainder`. Under `ExtrapSGD` and `ExtrapAdam`, whose sub-batches take their gradients at
    different points, it is of these.

    Every `fit` with it begins anew. It adds a number for each variable to the reduction that an
    update makes anyway. Without the callback nothing of it is computed: attaching and detaching it
    makes `fit` trace the training step anew.

    Args:
        every: Updates from one look at the optimizer to the next, ≥ 1. Each waits for the update
            under way. Defaults to 10.
        ema: By what the weight of an update decreases from one to the next, in [0, 1). Defaults to
            0.95, about the last 40 updates.
        per_layer: Whether to log every trainable variable. Defaults to `False`.
        log_dir: Folder for TensorBoard's event files, or `None`.

    Attributes:
        noise_scale: B_simple at the last look, `None` before there is one.
        noise_scale_standard_error: Its standard error, likewise.
        examples_per_update: Of the last update, likewise.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.
        ValueError: When training begins, if the model is not built, its optimizer is none of
            tf_lbopt that sums gradients, or there is a single sub-batch. When the first step is
            traced, if a `PerExampleNormsModel` has regularizers or `add_loss`.

    Example:
        >>> import tf_lbopt
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> optimizer = tf_lbopt.SGD(0.01, gradient_accumulation_steps=4)
        >>> model.compile(optimizer=optimizer, loss="mse")
        >>> x, y = keras.random.normal([64, 2], seed=0), keras.random.normal([64, 1], seed=1)
        >>> history = model.fit(x, y, batch_size=4, verbose=0, callbacks=[GradientNoiseScale()])
        >>> history.history["examples_per_update"], history.history["noise_scale"][0] > 0
        ([16.0], True)

    References:
        McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training"
        (arXiv:1812.06162), eq. 2.9 and appendix A.1.
    """

    def __init__(
        self,
        every: int = 10,
        ema: float = 0.95,
        per_layer: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
    ):
        super().__init__(log_dir)
        self.every = _validation.integer("every", every, low=1)
        self.ema = _validation.real("ema", ema, low=0.0, high=1.0, high_open=True)
        self.per_layer = _validation.boolean("per_layer", per_layer)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._running = RunningNoiseScale(self.ema)
        self._examples = float("nan")
        self._written = 0  # updates that have entered
        self._steps = self._batch = 0  # since the last look; in this epoch

    def on_train_begin(self, logs: Logs = None) -> None:
        """Makes the optimizer keep squared norms, and the training step count examples."""
        optimizer = self._optimizer()
        build_optimizer(self)
        model = self.model
        # As many updates as are made between two looks, whatever becomes of the accumulation.
        per_step = int(model.steps_per_execution)
        optimizer.watch_squared_norms(
            self.every + per_step, of_examples=isinstance(model, PerExampleNormsModel)
        )
        self._begin_anew()
        _count_examples(model, optimizer)
        model.make_train_function(force=True)
        super().on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Notes that batches are numbered anew."""
        self._batch = 0

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Looks at the optimizer every `every` updates."""
        self._steps += batch + 1 - self._batch
        self._batch = batch + 1
        if self._steps >= self.every * self._optimizer().accumulation_steps:
            self._look()
            if self._writer is not None:
                self.write(self.numbers(), int(self._optimizer().iterations.numpy()))

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Adds the numbers to the logs."""
        self._look()
        if logs is not None:
            logs.update(self.numbers())

    def on_train_end(self, logs: Logs = None) -> None:
        """Makes both stop."""
        self._optimizer().unwatch_squared_norms()
        _do_not_count_examples(self.model)
        self.model.make_train_function(force=True)
        super().on_train_end(logs)

    @property
    def noise_scale(self) -> float | None:
        """B_simple at the last look, or `None`."""
        return _or_none(self._running.ratio()[0])

    @property
    def noise_scale_standard_error(self) -> float | None:
        """Its standard error, or `None`."""
        return _or_none(self._running.standard_error()[0])

    @property
    def examples_per_update(self) -> float | None:
        """Of the last update at the last look, or `None`."""
        return _or_none(self._examples)

    def numbers(self) -> dict[str, float]:
        """What was found at the last look."""
        scales, errors = self._running.ratio(), self._running.standard_error()
        found = {
            "noise_scale": float(scales[0]),
            "noise_scale_standard_error": float(errors[0]),
            "examples_per_update": self._examples,
        }
        gain = getattr(self._optimizer(), "gain", None)
        if gain is not None:
            found["gain"] = float(gain.numpy())
        if self.per_layer:
            variables = self._optimizer().trained.variables
            of_layers = scales[1:] if len(scales) > 1 else [float("nan")] * len(variables)
            for variable, scale in zip(variables, of_layers, strict=True):
                found[f"noise_scale/{path_of(variable)}"] = float(scale)
        return found

    def _look(self) -> None:
        self._steps = 0
        self._written, rows = self._optimizer().squared_norms_since(self._written)
        for row in rows:
            *of_layers, sub_batches, examples = row
            squares, of_mean = np.split(np.asarray(of_layers), 2)
            # Of all variables together, and of each.
            variances, signals = unbiased_estimates(
                np.append(squares.sum(), squares), np.append(of_mean.sum(), of_mean), sub_batches
            )
            self._running.add(variances * (examples / sub_batches), signals)
            self._examples = float(examples)

    def _optimizer(self) -> LargeBatchOptimizer:
        optimizer = without_loss_scale(self.model)
        if not isinstance(optimizer, LargeBatchOptimizer):
            raise ValueError(
                "GradientNoiseScale needs a model whose optimizer is one of tf_lbopt. "
                f"Received: {type(self.model.optimizer).__name__}"
            )
        return optimizer


def _or_none(number: float) -> float | None:
    return None if np.isnan(number) else float(number)


_FORMER = "without_counting"


def _count_examples(model: keras.Model, optimizer: LargeBatchOptimizer) -> None:
    """Has a model's training step tell the optimizer how many examples it is given."""
    _do_not_count_examples(model)  # an error may have ended an earlier `fit`
    train_step = model.train_step

    @tf.autograph.experimental.do_not_convert
    def counting(data: object) -> dict[str, tf.Tensor]:
        first = next(
            leaf for leaf in keras.tree.flatten(data) if leaf is not None and leaf.shape.rank != 0
        )
        ragged = isinstance(first, tf.RaggedTensor)
        with optimizer.batch_of(first.nrows() if ragged else tf.shape(first)[0]):
            return train_step(data)

    setattr(counting, _FORMER, vars(model).get("train_step"))
    model.train_step = counting


def _do_not_count_examples(model: keras.Model) -> None:
    own = vars(model).get("train_step")
    if hasattr(own, _FORMER):
        del model.train_step
        former = getattr(own, _FORMER)
        if former is not None:
            model.train_step = former
