"""Euclidean norms that neither underflow nor overflow where the result itself is representable.

Squares of float32 numbers below 1e-19 vanish and above 1e19 overflow, so the usual
``sqrt(sum(x**2))`` silently turns a small gradient into "no gradient". Here the usual form is taken
where it is exact, and one of scaled elements where it is not: in a graph by a second pass that is
rarely made. Compiled by XLA, without branches, squares are summed in float64; on a TPU, which has
no float64, three sums are taken, of squares, and of squares of enlarged and of reduced elements.
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
# Float32 tensors up to this size are copied in float64 sooner than looked at one by one; and biases
# and normalization scales are often exactly zero, which sends what branches with them the slow way.
_SMALL = 1 << 14


def compute_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype arithmetic on ``dtype`` is done in: float32 for half precision, else itself."""
    dtype = tf.as_dtype(dtype)
    return tf.float32 if dtype.size < 4 else dtype


def widest(dtypes: Sequence[tf.DType]) -> tf.DType:
    """The widest of the dtypes that arithmetic is done in; float32 if there are none."""
    return tf.float64 if tf.float64 in dtypes else tf.float32


def norms(tensors: Sequence[Gradient]) -> tf.Tensor:
    """Euclidean norms of n tensors, each of all its elements.

    Args:
        tensors: Dense, or ``tf.IndexedSlices`` without repeated indices.

    Returns:
        [n]: float64 if a tensor is, else float32. NaN or Inf if an element is.

    Example:
        >>> import numpy as np
        >>> x = np.full([4], 1e-30, np.float32)
        >>> float(np.sqrt(np.sum(x * x)))
        0.0
        >>> f"{float(norms([tf.constant(x)])[0]):.2e}"
        '2.00e-30'
    """
    compiled = _compat.in_xla_context()
    groups: dict[tuple[tf.DType, int | None], dict[int, tf.Tensor]] = {}
    for index, tensor in enumerate(tensors):
        value = tensor.values if isinstance(tensor, tf.IndexedSlices) else tensor
        value = tf.convert_to_tensor(value)
        if value.dtype not in _RANGES:
            value = tf.cast(value, tf.float32)
        size = value.shape.num_elements()
        # In what is compiled each tensor is a sum of its own anyway.
        small = not compiled and value.dtype == tf.float32 and size is not None and size <= _SMALL
        groups.setdefault((value.dtype, size if small else None), {})[index] = value
    parts = [
        _norms_of_alike(list(group.values()), compiled)
        if size is None
        else _norms_of_one_size(list(group.values()), size)
        for (_, size), group in groups.items()
    ]
    if len(parts) == 1:
        return parts[0]
    dtype = widest([part.dtype for part in parts])
    if not parts:
        return tf.zeros([0], dtype)
    order = [index for group in groups.values() for index in group]
    places = sorted(range(len(order)), key=order.__getitem__)
    return tf.gather(tf.concat([tf.cast(part, dtype) for part in parts], 0), places)


def global_norm(norms_of_all: tf.Tensor) -> tf.Tensor:
    """The norm of several tensors together, from the [n] norms of each: a scalar."""
    greatest = tf.reduce_max(norms_of_all)
    scaled = tf.math.divide_no_nan(norms_of_all, greatest)
    return greatest * tf.sqrt(tf.reduce_sum(scaled * scaled))


def all_finite(norms_of_all: tf.Tensor) -> tf.Tensor:
    """Whether every element of every tensor is finite, from their norms: a boolean scalar.

    A norm is finite exactly if all elements are (and the norm itself does not overflow).
    """
    return tf.reduce_all(tf.math.is_finite(norms_of_all))


def _norms_of_one_size(values: list[tf.Tensor], size: int) -> tf.Tensor:
    """Norms of float32 tensors in float64, where neither squares nor their sums are lost."""
    wide = tf.cast(tf.stack([tf.reshape(value, [size]) for value in values]), tf.float64)
    return tf.cast(tf.sqrt(tf.reduce_sum(wide * wide, 1)), tf.float32)


def _norms_of_alike(values: list[tf.Tensor], compiled: bool) -> tf.Tensor:
    """Norms of tensors of one dtype; in a graph all are computed again if one of them needs it."""
    if compiled:
        if values[0].dtype == tf.float32 and not _compat.in_tpu_replica():
            wide = [tf.cast(value, tf.float64) for value in values]
            return tf.cast(tf.sqrt(2.0 * tf.stack([tf.nn.l2_loss(v) for v in wide])), tf.float32)
        return _norms_of_three_sums(values)
    # `l2_loss` is half of it: one pass, without a temporary for the squares.
    squares = 2.0 * tf.stack([tf.nn.l2_loss(value) for value in values])
    # What each tensor must be multiplied by before it is squared; 1 where that loses nothing.
    safe = _RANGES[squares.dtype]
    ones = tf.ones_like(squares)
    down = tf.where(squares > safe.greatest, ones / safe.factor, ones)  # NaN stays as it is
    factors = tf.where(squares < safe.least, ones * safe.factor, down)
    return tf.cond(
        tf.reduce_all(tf.equal(factors, 1.0)),
        lambda: tf.sqrt(squares),
        lambda: _scaled_norms(values, factors),
        name="rarely",
    )


def _scaled_norms(values: list[tf.Tensor], factors: tf.Tensor) -> tf.Tensor:
    scaled = [v * f for v, f in zip(values, tf.unstack(factors, num=len(values)), strict=True)]
    return tf.sqrt(2.0 * tf.stack([tf.nn.l2_loss(value) for value in scaled])) / factors


def _norms_of_three_sums(values: list[tf.Tensor]) -> tf.Tensor:
    """Blue's way, but that every element is in each of the three sums, of which one has all."""
    safe = _RANGES[values[0].dtype]
    sums = []
    for value in values:
        magnitude = tf.abs(value)
        sums.append(tf.reduce_sum(magnitude * magnitude))
        for factor in (safe.factor, 1.0 / safe.factor):
            scaled = magnitude * factor
            # XLA makes x f x f to x x f f, whose squares vanish and overflow; but not x f |x f|.
            sums.append(tf.reduce_sum(scaled * tf.abs(scaled)))
    squares, enlarged, reduced = tf.unstack(tf.reshape(tf.stack(sums), [len(values), 3]), 3, axis=1)
    beyond = tf.where(squares > safe.greatest, tf.sqrt(reduced) * safe.factor, tf.sqrt(squares))
    return tf.where(squares < safe.least, tf.sqrt(enlarged) / safe.factor, beyond)
