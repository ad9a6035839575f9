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
# Tensors up to this size branch apart from the others: biases and normalization scales are often
# exactly zero, which sends what branches with them the slow way.
_SMALL = 1 << 14


def compute_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype arithmetic on ``dtype`` is done in: float32 for half precision, else itself."""
    dtype = tf.as_dtype(dtype)
    return tf.float32 if dtype.size < 4 else dtype


def scalar(value: tf.Tensor | float, dtype: tf.DType) -> tf.Tensor:
    """A number as a tensor of ``dtype``, without passing a Python float through float32."""
    if isinstance(value, (int, float)):
        return tf.constant(value, dtype)
    return tf.cast(value, dtype)


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
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        size = value.shape.num_elements()
        if value.dtype == tf.float64:
            results[index] = _scaled_norm(value)
        else:
            groups.setdefault("large" if size is None or size > _SMALL else "small", []).append(
                index
            )
    for group in groups.values():
        roots = _norms_in_one_pass([values[index] for index in group])
        results.update(zip(group, roots, strict=True))
    return [results[index] for index in range(len(values))]


def _norms_in_one_pass(values: list[tf.Tensor]) -> list[tf.Tensor]:
    """Norms of float32 tensors; all are computed once more, scaled, if one of them needs it."""
    squares = tf.stack([_sum_of_squares(value) for value in values])
    safe = (squares >= _LEAST_SAFE_SQUARE) & (squares <= _GREATEST_SAFE_SQUARE)
    roots = tf.cond(
        tf.reduce_all(safe),
        lambda: tf.sqrt(squares),
        lambda: tf.stack([_scaled_norm(value) for value in values]),
    )
    return tf.unstack(roots, num=len(values))


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
    # A maximum may pass over NaN (it does under XLA), so NaN must survive the division: the divisor
    # is never 0. The maximum of nothing (an IndexedSlices without rows) is -inf.
    greatest = tf.reduce_max(tf.abs(value))
    divisor = tf.where(greatest > 0, greatest, tf.ones_like(greatest))
    return divisor * tf.sqrt(_sum_of_squares(value / divisor))
