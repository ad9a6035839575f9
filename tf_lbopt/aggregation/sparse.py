"""Arithmetic on gradients that may be sparse."""

from collections.abc import Iterable

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


def added(gradients: Iterable[Gradient | None]) -> Gradient | None:
    """The sum of those that are not `None`; sparse if all are."""
    several = [gradient for gradient in gradients if gradient is not None]
    if len(several) < 2:
        return several[0] if several else None
    if all(isinstance(gradient, tf.IndexedSlices) for gradient in several):
        return tf.IndexedSlices(
            tf.concat([gradient.values for gradient in several], axis=0),
            tf.concat([tf.cast(gradient.indices, tf.int64) for gradient in several], axis=0),
            dense_shape=several[0].dense_shape,
        )
    return tf.add_n([tf.convert_to_tensor(gradient) for gradient in several])


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
