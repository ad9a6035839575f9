"""Euclidean norms that neither underflow nor overflow where the result itself is representable.

Squares of float32 numbers below 1e-19 vanish and above 1e19 overflow, so the usual
``sqrt(sum(x**2))`` silently turns a small gradient into "no gradient". Here the usual one-pass form
is taken where it is exact, and a form scaled by the greatest element where it is not.
"""

from collections.abc import Sequence
from typing import TypeAlias

import tensorflow as tf

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices

# Within these bounds a float32 sum of squares has lost nothing: what underflowed (elements below
# 1.1e-19, of which there are fewer than 2**31) is less than 3e-29 in all.
_LEAST_SAFE_SQUARE = 1e-20
_GREATEST_SAFE_SQUARE = 1e37
# Up to this size the scaled form costs nothing worth a branch. Biases and normalization scales
# belong here, which are often exactly zero and would send everything else down the slow branch.
_SMALL = 1 << 14


def compute_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype arithmetic on ``dtype`` is done in: float32 for half precision, else itself."""
    dtype = tf.as_dtype(dtype)
    return tf.float32 if dtype.size < 4 else dtype


def norm(tensor: Gradient) -> tf.Tensor:
    """Euclidean norm of all elements, a scalar of the compute dtype.

    Args:
        tensor: Dense, or ``tf.IndexedSlices`` without repeated indices.

    Returns:
        A scalar: float64 for a float64 tensor, else float32. NaN or Inf if an element is.

    Example:
        >>> import numpy as np
        >>> x = np.full([4], 1e-30, np.float32)
        >>> float(np.sqrt(np.sum(x * x)))
        0.0
        >>> f"{float(norm(tf.constant(x))):.2e}"
        '2.00e-30'
    """
    return norms([tensor])[0]


def norms(tensors: Sequence[Gradient]) -> list[tf.Tensor]:
    """Euclidean norms of several tensors, each as `norm` defines it, in one go."""
    values = [_as_values(tensor) for tensor in tensors]
    results: dict[int, tf.Tensor] = {}
    one_pass = []
    for index, value in enumerate(values):
        size = value.shape.num_elements()
        if value.dtype != tf.float64 and (size is None or size > _SMALL):
            one_pass.append(index)
        elif value.dtype == tf.float64:
            results[index] = tf.sqrt(_sum_of_squares(value))
        else:
            results[index] = _scaled_norm(value)
    if one_pass:
        squares = tf.stack([_sum_of_squares(values[index]) for index in one_pass])
        safe = (squares >= _LEAST_SAFE_SQUARE) & (squares <= _GREATEST_SAFE_SQUARE)
        roots = tf.cond(
            tf.reduce_all(safe),
            lambda: tf.sqrt(squares),
            lambda: tf.stack([_scaled_norm(values[index]) for index in one_pass]),
        )
        results.update(zip(one_pass, tf.unstack(roots, num=len(one_pass)), strict=True))
    return [results[index] for index in range(len(values))]


def global_norm(layer_norms: Sequence[tf.Tensor]) -> tf.Tensor:
    """The norm of all layers together, from the norms of each; of the widest dtype among them."""
    widest = max((n.dtype for n in layer_norms), key=lambda dtype: dtype.size)
    return _scaled_norm(tf.stack([tf.cast(n, widest) for n in layer_norms]))


def all_finite(layer_norms: Sequence[tf.Tensor]) -> tf.Tensor:
    """Whether every element of every layer is finite, a boolean scalar.

    A norm is finite exactly if all elements are (and the norm itself does not overflow).
    """
    return tf.reduce_all(tf.stack([tf.math.is_finite(n) for n in layer_norms]))


def _as_values(tensor: Gradient) -> tf.Tensor:
    values = tensor.values if isinstance(tensor, tf.IndexedSlices) else tf.convert_to_tensor(tensor)
    return tf.cast(values, compute_dtype(values.dtype))


def _sum_of_squares(value: tf.Tensor) -> tf.Tensor:
    return 2.0 * tf.nn.l2_loss(value)  # one pass, without a temporary for the squares


def _scaled_norm(value: tf.Tensor) -> tf.Tensor:
    # The maximum of nothing (an IndexedSlices without rows) would be -inf.
    greatest = tf.maximum(tf.reduce_max(tf.abs(value)), tf.zeros([], value.dtype))
    return greatest * tf.sqrt(_sum_of_squares(tf.math.divide_no_nan(value, greatest)))
