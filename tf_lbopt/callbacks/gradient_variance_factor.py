"""Looking at how much a layer's gradient varies from example to example."""

import os
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.callbacks.common import EpochNumbers, Logs
from tf_lbopt.optimizers.trained import path_of
from tf_lbopt.per_example import per_example_gradient_norms
from tf_lbopt.per_example.losses import AnyLoss, Structure


class GradientVarianceFactor(EpochNumbers):
    """Logs every layer's gradient variance factor, the quantity behind CLARS and warm-up.

        M_k = (1/n) Σ ‖∇_k f_i(w)‖²  /  ‖(1/n) Σ ∇_k f_i(w)‖²

    over n examples, for each trainable variable k, at the end of every epoch; 1 where all examples
    agree, larger where their gradients cancel. A layer with a large M_k bears only a small rate
    (Theorem 2 of the paper).

    They go into `fit`'s logs as ``variance_factor/<path>`` (and so into the history, CSV files and
    Keras's own TensorBoard callback, if that comes later in the list), and to TensorBoard directly
    if `log_dir` is given. A layer whose mean gradient is 0 has infinity.

    The model is called in inference form: dropout is off, and batch normalization takes its moving
    statistics, because with those of the batch the gradient of a single example is not defined. The
    cost is that of a pass over the examples; see `tf_lbopt.per_example_gradient_norms`.

    Args:
        x: Examples, an array or a structure of arrays; a sample of the training data.
        y: Their labels, likewise.
        sample_weight: Their weights, or `None`.
        loss: A loss as in `compile`; `None`, the default, for the one that the model was compiled
            with (a single one).
        batch_size: Examples at a time, ≥ 1. Defaults to 128.
        every: Epochs from one measurement to the next, ≥ 1. Defaults to 1.
        log_dir: Folder for TensorBoard's event files, or `None`.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.
        ValueError: When training begins, if the model was compiled with several losses and none
            is given.

    Example:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="top")])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.eye(2, dtype="float32"), np.ones([2, 1], "float32")
        >>> callback = GradientVarianceFactor(x, y)
        >>> history = model.fit(x, y, verbose=0, callbacks=[callback]).history
        >>> factors = {name.split("/")[-1]: m for name, m in history.items() if "variance" in name}
        >>> sorted(factors), factors["bias"][0] >= 1
        (['bias', 'kernel'], True)

    References:
        Huo, Gu, Huang 2021, "Large Batch Optimization for Deep Learning Using New Complete
        Layer-Wise Adaptive Rate Scaling" (AAAI), section "Variations of Gradient Variance",
        Figure 2.
    """

    def __init__(
        self,
        x: Structure,
        y: Structure,
        sample_weight: Structure = None,
        loss: AnyLoss | None = None,
        batch_size: int = 128,
        every: int = 1,
        log_dir: str | os.PathLike[str] | None = None,
    ):
        super().__init__(log_dir)
        self.batch_size = _validation.integer("batch_size", batch_size, low=1)
        self.every = _validation.integer("every", every, low=1)
        self.loss = loss
        given = {"x": x, "y": y}
        if sample_weight is not None:
            given["sample_weight"] = sample_weight
        self._data = tuple(_arrays(name, structure) for name, structure in given.items())
        sizes = {len(leaf) for leaf in keras.tree.flatten(self._data)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                "`x`, `y` and `sample_weight` must have the same number of examples, at least 1. "
                f"Received: {sorted(sizes)}"
            )
        (self._examples,) = sizes
        self._measure: Callable[..., tuple[list[tf.Tensor], list[tf.Tensor]]] | None = None
        self._measured: list[int] = []  # the variables that `_measure` was made for

    def on_train_begin(self, logs: Logs = None) -> None:
        """Looks for the loss."""
        loss = self._loss()
        if loss is None or isinstance(loss, (list, tuple, dict)):
            raise ValueError(
                "GradientVarianceFactor needs one loss: give `loss`, a callable of labels and "
                "predictions that returns [batch] values. Received: a model compiled with "
                f"{_validation.shown(loss)}"
            )
        self._measure = None
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Measures, and writes what it finds."""
        if (epoch + 1) % self.every == 0:
            super().on_epoch_end(epoch, logs)

    def numbers(self) -> dict[str, float]:
        """M_k of the model as it is, by the path of each trainable variable."""
        paths = map(path_of, self.model.trainable_variables)
        named = zip(paths, self.factors(), strict=True)
        return {f"variance_factor/{path}": factor for path, factor in named}

    def factors(self) -> list[float]:
        """M_k of the model as it is, in the order of its trainable variables."""
        variables = [id(variable) for variable in self.model.trainable_variables]
        # Anew for every training, and when other callbacks freeze layers in between.
        if self._measure is None or self._measured != variables:
            self._measure = tf.function(self._squares_and_gradients, reduce_retracing=True)
            self._measured = variables
        squares, means = np.zeros(len(variables)), [0.0] * len(variables)
        for start in range(0, self._examples, self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = keras.tree.map_structure(
                lambda leaf, rows=rows: tf.constant(leaf[rows]), self._data
            )
            share = min(self.batch_size, self._examples - start) / self._examples
            sums, gradients = self._measure(*batch)
            squares += np.array([float(value) for value in sums]) / self._examples
            for number, gradient in enumerate(gradients):
                means[number] += gradient.numpy().astype(float) * share
        with np.errstate(divide="ignore", invalid="ignore"):
            return [float(s / np.sum(m**2)) for s, m in zip(squares, means, strict=True)]

    def _squares_and_gradients(
        self, x: Structure, y: Structure, weight: Structure = None
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """For each variable, the sum of the squared norms of a batch and the mean gradient."""
        norms, gradients = per_example_gradient_norms(
            self.model, x, y, self._loss(), weight, training=False
        )
        dense = [
            tf.zeros(variable.shape) if gradient is None else tf.convert_to_tensor(gradient)
            for gradient, variable in zip(gradients, self.model.trainable_variables, strict=True)
        ]
        return [tf.reduce_sum(tf.cast(n, tf.float64) ** 2) for n in norms], dense

    def _loss(self) -> AnyLoss | None:
        return getattr(self.model, "loss", None) if self.loss is None else self.loss


def _arrays(name: str, structure: Structure) -> Structure:
    """The arrays of an argument.

    Raises:
        TypeError: It has something without an axis for the examples, as a data set.
    """
    arrays = keras.tree.map_structure(np.asarray, structure)
    if any(array.ndim == 0 for array in keras.tree.flatten(arrays)):
        expected = "an array with the examples on its first axis, or a structure of such arrays"
        raise _validation.refusal(TypeError, name, expected, structure)
    return arrays
