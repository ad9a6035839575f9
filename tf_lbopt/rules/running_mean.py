"""Exponential running means that start at zero, with bias correction."""

from collections.abc import Sequence

import tensorflow as tf

from tf_lbopt.rules.rule import Layer, Step
from tf_lbopt.rules.sharing import scalars


class RunningMean:
    """``x ← β x + (1−β) y``, and ``x̂ = x / (1−βᵗ)``, in one update.

    What depends on β and t alone is computed once, for all the layers that are updated with it.

    Args:
        beta: β in [0, 1), a scalar of the dtype of the arithmetic.
        step: t, the number of the update, from 1, of the same dtype.

    Example:
        >>> mean = RunningMean(0.5, step=1)
        >>> x = mean.updated(0.0, 8.0)
        >>> x, mean.corrected(x)
        (4.0, 8.0)
    """

    def __init__(self, beta: tf.Tensor | float, step: tf.Tensor | float):
        self.beta = beta
        self.rest = 1.0 - beta
        self.power = beta**step
        self.correction = 1.0 - self.power

    def updated(self, x, y):
        """``β x + (1−β) y``."""
        return self.beta * x + self.rest * y

    def corrected(self, x):
        """``x / (1−βᵗ)``."""
        return x / self.correction


def running_means(layers: Sequence[Layer], step: Step, beta: float) -> dict[tf.DType, RunningMean]:
    """The running mean of β in one update, for each dtype that the layers compute in."""
    numbers = scalars(layers, step.index + 1)
    return {dtype: RunningMean(tf.constant(beta, dtype), t) for dtype, t in numbers.items()}
