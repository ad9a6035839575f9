"""Arithmetic on gradients that may be sparse."""

import tensorflow as tf

from tf_lbopt.rules.norms import Gradient


def merge_repeated_indices(gradient: Gradient) -> Gradient:
    """Sums the rows of an ``IndexedSlices`` that have the same index; passes dense ones through.

    Before this, a square, a norm or a variance of ``gradient.values`` is not that of the gradient.

    Example:
        >>> g = tf.IndexedSlices(tf.constant([[1.0], [2.0], [4.0]]), tf.constant([3, 1, 3]), [5, 1])
        >>> merged = merge_repeated_indices(g)
        >>> merged.indices.numpy().tolist(), merged.values.numpy().tolist()
        ([3, 1], [[5.0], [2.0]])
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    indices, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, positions, tf.shape(indices)[0])
    return tf.IndexedSlices(values, indices, dense_shape=gradient.dense_shape)


def divide(gradient: Gradient, divisor: tf.Tensor) -> Gradient:
    """``gradient / divisor`` by a scalar, sparse or dense."""
    divisor = tf.cast(divisor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            gradient.values / divisor, gradient.indices, dense_shape=gradient.dense_shape
        )
    return gradient / divisor
