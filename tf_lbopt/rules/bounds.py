"""Bounds below which nothing that an update writes overflows.

An update is judged before anything is written, by a few numbers that are there anyway: norms, rates
and ratios, a number for each variable. All comparisons are such that NaN is beyond every bound.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.rule import Parameters, Step

_INFO: dict[tf.DType, np.finfo] = {t: np.finfo(t.as_numpy_dtype) for t in (tf.float32, tf.float64)}
# Steps up to this length never make finite weights infinite (5e30 in float32): it is less than half
# a unit in the last place of the greatest number, and that plus a step is rounded back to it.
_GREATEST_STEP = {dtype: float(info.max * info.eps / 8) for dtype, info in _INFO.items()}
_TINY = {dtype: float(info.tiny) for dtype, info in _INFO.items()}
# A norm up to this has a finite square: a little less than the square root of the greatest number.
_GREATEST_SQUARED = {
    dtype: 0.999 * math.sqrt(dtype.max)
    for dtype in (tf.float16, tf.bfloat16, tf.float32, tf.float64)
}


def is_rate(learning_rate: tf.Tensor) -> tf.Tensor:
    """Whether a number is a learning rate: finite and not negative; a boolean scalar."""
    return (learning_rate >= 0) & (learning_rate <= learning_rate.dtype.max)


def _each(
    dtypes: Sequence[tf.DType], *limits: dict[tf.DType, float]
) -> list[np.ndarray] | list[float]:
    """Of each kind of limit one for each variable, or one for all if it is the same."""
    if len(set(dtypes)) == 1:
        return [of[dtypes[0]] for of in limits]
    return [np.array([of[dtype] for dtype in dtypes]) for of in limits]


def squares_fit(lengths: tf.Tensor, dtypes: Sequence[tf.DType]) -> tf.Tensor:
    """Whether the sum of the squares of every variable's gradient is finite.

    Args:
        lengths: [n], norms or bounds of them.
        dtypes: Of the squares, one for each or one for all.

    Returns:
        A boolean scalar.

    Example:
        >>> [bool(squares_fit(tf.constant([x]), [tf.float32])) for x in (1e18, 1e20, float("nan"))]
        [True, False, False]
    """
    return tf.reduce_all(lengths <= _each(dtypes, _GREATEST_SQUARED)[0])


def steps_fit(
    rates: tf.Tensor, lengths: tf.Tensor, dtypes: Sequence[tf.DType], momentum: float = 0.0
) -> tf.Tensor:
    """Whether all steps can be made: none overflows, none is lost in denormals.

    Args:
        rates: [n] or a scalar, what the directions are multiplied by.
        lengths: [n] or a scalar, the norms of the directions, or bounds of them.
        dtypes: Of the n variables.
        momentum: β; a velocity is up to 1 / (1−β) times as long as a step.

    Returns:
        A boolean scalar.

    Example:
        >>> def fit(rate, length):
        ...     return bool(steps_fit(tf.constant([rate]), tf.constant([length]), [tf.float32]))
        >>> fit(0.1, 1e30), fit(0.1, 1e32)  # this overflows
        (True, False)
        >>> fit(1e-39, 1e30)  # is lost
        False
    """
    greatest_step, tiny, squared = _each(dtypes, _GREATEST_STEP, _TINY, _GREATEST_SQUARED)
    short = rates * lengths <= (1.0 - momentum) * greatest_step
    # The rate for a very long direction may be no normal number, which is as good as 0.
    kept = (rates >= tiny) | (lengths <= squared)
    return tf.reduce_all(short & kept)


def with_decay(
    parameters: Parameters,
    lengths: tf.Tensor | float,
    step: Step,
    weight_decay: float | None,
    weight_norms: tf.Tensor | None = None,
    ratio: float = 1.0,
) -> tf.Tensor | float:
    """What the norms of directions with decay, d + λ w, do not exceed: bound + λ ‖w‖.

    Up to η λ = 1 decay lets no weight grow, so that λ ‖w‖ may be left out. Norms that are not there
    matter beyond that only; and always with λ > 1, where λ w itself may overflow at any rate.

    Args:
        parameters: The variables.
        lengths: [n], what the norms of d do not exceed.
        step: Gives η.
        weight_decay: λ, or ``None``.
        weight_norms: [n], ‖w‖ of the adapted variables, or ``None`` if they are not there.
        ratio: What η is multiplied by for the others.

    Returns:
        [n].
    """
    decayed = np.array(parameters.decayed)
    if not weight_decay or not decayed.any():
        return lengths
    known = np.array(parameters.adapted) & (weight_norms is not None)
    missing = decayed & ~known
    total = tf.zeros(decayed.shape, parameters.dtype)
    if known.any():
        total = tf.where(decayed & known, weight_norms, total)
    if missing.any():

        def others() -> tf.Tensor:
            return parameters.norms_of(missing.tolist(), parameters.variables)[0]

        if weight_decay > 1.0 or _compat.in_xla_context():
            found = others()
        else:
            strong = tf.cast(step.learning_rate, tf.float32) * ratio * weight_decay > 1.0
            found = tf.cond(strong, others, lambda: tf.zeros_like(total), name="rarely")
        total += found
    return lengths + weight_decay * total
