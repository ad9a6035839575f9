"""The layer-wise trust ratio of LARS and LAMB."""

import tensorflow as tf


def trust_ratio(
    weight_norm: tf.Tensor, update_norm: tf.Tensor, coefficient: float = 1.0
) -> tf.Tensor:
    """``coefficient · ‖w‖ / ‖update‖``, and 1 where either norm is 0.

    Args:
        weight_norm: Scalar, the norm of one layer's weights.
        update_norm: Scalar of the same dtype, the norm of what is about to be subtracted.
        coefficient: LARS's trust coefficient; LAMB has 1.

    Returns:
        A scalar of the same dtype.

    References:
        You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks", eq. 6.

    Example:
        >>> float(trust_ratio(tf.constant(3.0), tf.constant(2.0)))
        1.5
        >>> float(trust_ratio(tf.constant(0.0), tf.constant(2.0)))
        1.0
    """
    defined = (weight_norm > 0) & (update_norm > 0)
    ratio = coefficient * tf.math.divide_no_nan(weight_norm, update_norm)
    return tf.where(defined, ratio, tf.ones_like(ratio))
