"""The extrapolation step of extrapolated SGD: where a sub-batch's gradient is taken."""

from collections.abc import Sequence

import tensorflow as tf

from tf_lbopt.rules.norms import compute_dtype
from tf_lbopt.rules.writer import Writer


def apply_extrapolation(
    variable: tf.Variable,
    velocity: tf.Variable | None,
    noise: tf.Tensor | None,
    rate: tf.Tensor,
    momentum: float,
) -> None:
    """Moves a variable to ``x − γ̂ ζ + β v``, the point of the gradient.

    Args:
        variable: Holds x.
        velocity: v, or ``None`` for 0.
        noise: ζ, or ``None`` for 0.
        rate: γ̂, a scalar.
        momentum: β.

    References:
        Lin et al. 2020, "Extrapolation for Large-batch Training in Deep Learning", Algorithm 1,
        lines 2 and 3, and section 3.2.
    """
    dtype = compute_dtype(variable.dtype)
    rate = tf.cast(rate, dtype)
    if dtype != variable.dtype:  # one rounding to half precision, not two
        moved = tf.cast(variable, dtype)
        if noise is not None:
            moved -= rate * noise
        if velocity is not None:
            moved += momentum * tf.cast(velocity, dtype)
        variable.assign(tf.cast(moved, variable.dtype))
        return
    writer = Writer()
    if noise is not None:
        writer.subtract(variable, noise, rate)
    if velocity is not None:
        writer.subtract(variable, tf.convert_to_tensor(velocity), tf.constant(-momentum, dtype))


def filter_axes(rank: int, kind: str = "kernel") -> list[int]:
    """The axes that one filter of a variable extends over.

    A filter is one output unit: a slice along the last axis of a Dense or Conv kernel, along the
    last but one of a transposed convolution's, one channel of a depthwise kernel, one row of an
    embedding; a vector is a single filter.

    Args:
        rank: The variable's rank.
        kind: ``"kernel"``, ``"transposed"``, ``"depthwise"`` or ``"embedding"``.

    Example:
        >>> filter_axes(4), filter_axes(4, "depthwise"), filter_axes(2, "embedding"), filter_axes(1)
        ([0, 1, 2], [0, 1], [1], [0])
        >>> filter_axes(4, "transposed")
        [0, 1, 3]
    """
    if rank < 2:
        return list(range(rank))
    if kind == "embedding":
        return list(range(1, rank))
    if kind == "depthwise":
        return list(range(rank - 2))
    if kind == "transposed":
        return [*range(rank - 2), rank - 1]
    return list(range(rank - 1))


def filter_scaled(noise: tf.Tensor, weights: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Raw noise ζ̂ as ``‖filter‖ · ζ̂ / ‖ζ̂‖``, filter by filter; 0 where ζ̂ is.

    References:
        Lin et al. 2020, section 3.2.
    """
    axes = list(axes)
    length = tf.math.reduce_euclidean_norm(noise, axes, keepdims=True)
    wanted = tf.math.reduce_euclidean_norm(weights, axes, keepdims=True)
    return noise * tf.math.divide_no_nan(wanted, length)


def raw_noise(distribution: str, shape: Sequence[int], dtype: tf.DType, seed: tf.Tensor):
    """Noise of a seed alone: ``"gaussian"``, standard normal, or ``"uniform"`` in [−1, 1)."""
    if distribution == "gaussian":
        return tf.random.stateless_normal(shape, seed, dtype=dtype)
    return tf.random.stateless_uniform(shape, seed, -1.0, 1.0, dtype=dtype)
