"""Euclidean norms that neither underflow nor overflow where the result itself is representable.

Squares of float32 numbers below 1e-19 vanish and above 1e19 overflow, so the usual
``sqrt(sum(x**2))`` silently turns a small gradient into "no gradient". Here the usual form is taken
where it is exact, and one of scaled elements where it is not: in a graph by a second pass that is
rarely made, compiled by XLA by three sums in one pass.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import tensorflow as tf

from tf_lbopt import _compat

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


def widest(dtypes: Sequence[tf.DType]) -> tf.DType:
    """The widest of the dtypes that arithmetic is done in; float32 if there are none."""
    return tf.float64 if tf.float64 in dtypes else tf.float32


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


def norms(tensors: Sequence[Gradient]) -> tf.Tensor:
    """Euclidean norms of n tensors, each as `norm` defines it: [n], of the widest dtype."""
    values = [values_of(tensor) for tensor in tensors]
    groups: dict[tuple[tf.DType, bool], list[int]] = {}
    for index, value in enumerate(values):
        size = value.shape.num_elements()
        groups.setdefault((value.dtype, size is None or size > _SMALL), []).append(index)
    dtype = widest([value.dtype for value in values])
    parts = [tf.cast(_norms_of_alike([values[i] for i in g]), dtype) for g in groups.values()]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return tf.zeros([0], dtype)
    order = [index for group in groups.values() for index in group]
    return tf.gather(tf.concat(parts, 0), sorted(range(len(order)), key=order.__getitem__))


def values_of(tensor: Gradient) -> tf.Tensor:
    """The elements, in the compute dtype; of a sparse tensor its values."""
    values = tensor.values if isinstance(tensor, tf.IndexedSlices) else tf.convert_to_tensor(tensor)
    return tf.cast(values, compute_dtype(values.dtype))


def global_norm(norms_of_all: tf.Tensor) -> tf.Tensor:
    """The norm of several tensors together, from the [n] norms of each: a scalar."""
    squares = _sums_of_squares([norms_of_all])
    return _scaled_norms([norms_of_all], _factors(squares))[0]


def all_finite(norms_of_all: tf.Tensor) -> tf.Tensor:
    """Whether every element of every tensor is finite, from their norms: a boolean scalar.

    A norm is finite exactly if all elements are (and the norm itself does not overflow).
    """
    return tf.reduce_all(tf.math.is_finite(norms_of_all))


def _norms_of_alike(values: list[tf.Tensor]) -> tf.Tensor:
    """Norms of tensors of one dtype; in a graph all are computed again if one of them needs it."""
    squares = _sums_of_squares(values)
    factors = _factors(squares)
    usual = tf.sqrt(squares)
    if not _compat.in_xla_context():
        return tf.cond(
            tf.reduce_all(tf.equal(factors, 1.0)),
            lambda: usual,
            lambda: _scaled_norms(values, factors),
        )
    up = _RANGES[squares.dtype].factor
    enlarged, reduced = (
        _scaled_norms(values, tf.fill(factors.shape, tf.constant(f, factors.dtype)))
        for f in (up, 1 / up)
    )
    return tf.where(factors == 1.0, usual, tf.where(factors > 1.0, enlarged, reduced))


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
