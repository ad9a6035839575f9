"""Exponential running means with bias correction, and what Adam makes of two of them."""

import tensorflow as tf


class RunningMean:
    """``x ← β x + (1−β) y`` from 0, and ``x̂ = x / (1−βᵗ)``, in one update.

    What depends on β and t alone is computed once, for all variables that are updated with it.

    Args:
        beta: β in [0, 1), a scalar of the dtype of the arithmetic.
        step: t, the number of the update, from 1, of the same dtype.

    Example:
        >>> mean = RunningMean(0.5, step=1)
        >>> x = mean.updated(0.0, 8.0)
        >>> x, mean.corrected(x)
        (4.0, 8.0)
    """

    def __init__(self, beta: tf.Tensor, step: tf.Tensor):
        self.beta = beta
        self.rest = 1.0 - beta
        self.power = beta**step
        self.correction = 1.0 - self.power

    def updated(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """``β x + (1−β) y``."""
        return self.beta * x + self.rest * y

    def corrected(self, x: tf.Tensor) -> tf.Tensor:
        """``x / (1−βᵗ)``."""
        return x / self.correction


def moments(
    m: tf.Tensor, v: tf.Tensor, gradient: tf.Tensor, first: RunningMean, second: RunningMean
) -> tuple[tf.Tensor, tf.Tensor]:
    """Adam's moments after a gradient: ``m ← β₁ m + (1−β₁) g``, ``v ← β₂ v + (1−β₂) g²``."""
    m = first.beta * m + first.rest * gradient
    return m, second.beta * v + second.rest * (gradient * gradient)


def adam(
    m: tf.Tensor,
    v: tf.Tensor,
    first: RunningMean,
    second: RunningMean,
    epsilon: tf.Tensor | float,
) -> tf.Tensor:
    """Adam's direction, with bias correction: ``m̂ / (√v̂ + ε)``; 0 where v and ε are 0.

    ``m̂ = m / (1−β₁ᵗ)`` and ``v̂ = v / (1−β₂ᵗ)``, with the `moments` after the update's gradient.

    References:
        Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", Algorithm 1.
    """
    root = tf.sqrt(v / second.correction)
    return tf.math.divide_no_nan(m / first.correction, root + epsilon)


def preconditioned(
    gradient: tf.Tensor, v: tf.Tensor, second: RunningMean, epsilon: float
) -> tf.Tensor:
    """``g √(1−β₂ᵗ) / (√v + ε)``: a gradient in Adam's units, by the second moment as it stands.

    t is how many gradients v has seen. 0 where g is 0 (with ε = 0 too).
    """
    return tf.math.divide_no_nan(gradient * tf.sqrt(second.correction), tf.sqrt(v) + epsilon)
