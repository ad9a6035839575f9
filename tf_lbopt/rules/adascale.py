"""AdaScale's gain."""

from typing import NamedTuple

import tensorflow as tf

from tf_lbopt.rules.noise_scale import unbiased_estimates

# The running means forget by θ = 1 − k/1000.
_MEMORY = 1000.0


class Moments(NamedTuple):
    """Running means of a gradient's variance and squared norm; both 0 before the first update.

    Attributes:
        variance: σ², of a sub-batch's gradient.
        squared_norm: μ², of the expected gradient.
    """

    variance: tf.Tensor
    squared_norm: tf.Tensor

    def followed(
        self, mean_of_squares: tf.Tensor, square_of_mean: tf.Tensor, sub_batches: tf.Tensor
    ) -> "Moments":
        """The means with those of one more update in them; at first the latter themselves.

        The estimates (`unbiased_estimates`) are not below 0 here, as the gain needs.
        """
        found = unbiased_estimates(mean_of_squares, square_of_mean, sub_batches)
        found = [tf.maximum(estimate, 0.0) for estimate in found]
        theta = tf.maximum(1.0 - sub_batches / _MEMORY, 0.0)
        first = tf.equal(self.variance, 0.0) & tf.equal(self.squared_norm, 0.0)
        theta = tf.where(first, 0.0, theta)
        pairs = zip(self, found, strict=True)
        return Moments(*(theta * mean + (1.0 - theta) * new for mean, new in pairs))

    def gain(self, sub_batches: tf.Tensor) -> tf.Tensor:
        """The gain (σ² + μ²)/(σ²/k + μ²), from 1 to k; 1 where both are 0.

        Example:
            >>> float(Moments(tf.constant(3.0), tf.constant(1.0)).gain(tf.constant(4.0)))
            2.2857143878936768
        """
        noise = tf.math.divide_no_nan(self.variance, self.variance + self.squared_norm)
        return 1.0 / (noise / sub_batches + (1.0 - noise))
