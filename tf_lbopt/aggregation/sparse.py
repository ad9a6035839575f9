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


def rows_at(indices: tf.Tensor, values: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
    """The rows of a sparse tensor at ``wanted``, which has all of ``indices``; 0 where it has none.

    Args:
        indices: [n], without repetition.
        values: [n, ...].
        wanted: [m], without repetition, a superset of ``indices`` in any order.

    Returns:
        [m, ...].
    """
    wanted = tf.cast(wanted, tf.int64)
    _, positions = tf.unique(tf.concat([wanted, tf.cast(indices, tf.int64)], 0))
    size = tf.shape(wanted)[0]
    return tf.math.unsorted_segment_sum(values, positions[size:], size)
