"""Euclidean norms that neither underflow nor overflow where the result itself is representable.

Squares of float32 numbers below 1e-19 vanish and above 1e19 overflow, so the usual
``sqrt(sum(x**2))`` silently turns a small gradient into "no gradient". Here the usual one-pass form
is taken where it is exact, and a second pass over scaled elements is made where it is not.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import tensorflow as tf

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices


@dataclasses.dataclass(frozen=True)
class _Range:
    """Where a sum of squares has lost nothing, and the power of 2 that brings one back to there."""

    least: float
    greatest: float
    factor: float


# What underflowed in a sum of at least ``least`` (in float32 elements below 1.1e-19, of which there
# are fewer than 2**31) is less than 3e-9 of it. The factor takes the least element that there is,
# denormal, above that, and what is left below ``least`` not beyond ``greatest``; its inverse takes
# the greatest one back.
_RANGES = {
    tf.float32: _Range(1e-20, 1e37, 2.0**90),
    tf.float64: _Range(1e-280, 1e300, 2.0**600),
}
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
    groups: dict[tuple[tf.DType, bool], list[int]] = {}
    for index, value in enumerate(values):
        size = value.shape.num_elements()
        groups.setdefault((value.dtype, size is None or size > _SMALL), []).append(index)
    results: dict[int, tf.Tensor] = {}
    for group in groups.values():
        of_group = _norms_of_alike([values[index] for index in group])
        results.update(zip(group, tf.unstack(of_group, num=len(group)), strict=True))
    return [results[index] for index in range(len(values))]


def _norms_of_alike(values: list[tf.Tensor]) -> tf.Tensor:
    """Norms of tensors of one dtype; all are computed once more if one of them needs it."""
    squares = _sums_of_squares(values)
    factors = _factors(squares)
    return tf.cond(
        tf.reduce_all(tf.equal(factors, 1.0)),
        lambda: tf.sqrt(squares),
        lambda: _scaled_norms(values, factors),
    )


def greatest(tensor: Gradient) -> tf.Tensor:
    """The greatest magnitude of an element, a scalar of the compute dtype; NaN if one is."""
    return tf.reduce_max(tf.abs(_as_values(tensor)))


def global_norm(layer_norms: Sequence[tf.Tensor]) -> tf.Tensor:
    """The norm of all layers together, from the norms of each; of the widest dtype among them."""
    stacked = _stacked(layer_norms)
    factors = _factors(_sums_of_squares([stacked]))
    return _scaled_norms([stacked], factors)[0]


def all_finite(layer_norms: Sequence[tf.Tensor]) -> tf.Tensor:
    """Whether every element of every layer is finite, a boolean scalar.

    A norm is finite exactly if all elements are (and the norm itself does not overflow).
    """
    return tf.reduce_all(tf.math.is_finite(_stacked(layer_norms)))


def _stacked(numbers: Sequence[tf.Tensor]) -> tf.Tensor:
    widest = max((number.dtype for number in numbers), key=lambda dtype: dtype.size)
    return tf.stack([tf.cast(number, widest) for number in numbers])


def _as_values(tensor: Gradient) -> tf.Tensor:
    values = tensor.values if isinstance(tensor, tf.IndexedSlices) else tf.convert_to_tensor(tensor)
    return tf.cast(values, compute_dtype(values.dtype))


def _sums_of_squares(values: Sequence[tf.Tensor]) -> tf.Tensor:
    # `l2_loss` is half of it: one pass, without a temporary for the squares.
    return 2.0 * tf.stack([tf.nn.l2_loss(value) for value in values])


def _factors(squares: tf.Tensor) -> tf.Tensor:
    """What each tensor must be multiplied by before it is squared; 1 where that loses nothing."""
    safe = _RANGES[squares.dtype]
    ones = tf.ones_like(squares)
    down = tf.where(squares > safe.greatest, ones / safe.factor, ones)  # NaN stays as it is
    return tf.where(squares < safe.least, ones * safe.factor, down)


def _scaled_norms(values: list[tf.Tensor], factors: tf.Tensor) -> tf.Tensor:
    # Through `maximum` XLA can not square value and factor apart from each other. Else it does so
    # where it knows the value: 0 is then multiplied by a square that overflows.
    scaled = [
        tf.maximum(tf.abs(v * f), 0)
        for v, f in zip(values, tf.unstack(factors, num=len(values)), strict=True)
    ]
    return tf.sqrt(_sums_of_squares(scaled)) / factors
