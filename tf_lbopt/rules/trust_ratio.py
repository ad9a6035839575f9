"""The layer-wise trust ratio of LARS, CLARS and LAMB."""

import tensorflow as tf


def trust_ratio(
    weight_norm: tf.Tensor,
    update_norm: tf.Tensor,
    coefficient: float = 1.0,
    default: float = 1.0,
) -> tf.Tensor:
    """``coefficient · ‖w‖ / ‖update‖``, `default` where either norm is 0; finite at any rate.

    Args:
        weight_norm: The norm of one variable's weights, a scalar; or a vector of several ones'.
        update_norm: Of the same shape and dtype, the norm of what is about to be subtracted.
        coefficient: LARS's trust coefficient; LAMB has 1.
        default: The ratio where there is none.

    Returns:
        A tensor of the same shape and dtype.

    References:
        You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks", eq. 4; with
        ``‖g‖ + λ‖w‖`` in the place of ``‖update‖``, eq. 6.

    Example:
        >>> float(trust_ratio(tf.constant(3.0), tf.constant(2.0)))
        1.5
        >>> float(trust_ratio(tf.constant(0.0), tf.constant(2.0)))
        1.0
    """
    defined = (weight_norm > 0) & (update_norm > 0)
    ratio = coefficient * tf.math.divide_no_nan(weight_norm, update_norm)
    # Of an update of 1e-38 and less it can overflow, and ∞ · 0 is NaN.
    ratio = tf.minimum(ratio, ratio.dtype.max)
    return tf.where(defined, ratio, tf.constant(default, ratio.dtype))
