"""Bounds below which nothing that an update writes overflows.

An update is judged before anything is written, by a few numbers that are there anyway: norms, rates
and ratios. All are written so that NaN is beyond every bound.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_lbopt.rules.norms import norms, scalar
from tf_lbopt.rules.rule import Layer, Step, Update
from tf_lbopt.rules.sharing import elementwise, scalars


def greatest_step(dtype: tf.DType) -> float:
    """Steps up to this length never make finite weights infinite (5e30 in float32).

    It is less than half a unit in the last place of the greatest number: that plus a step is
    rounded back to it.
    """
    limits = np.finfo(dtype.as_numpy_dtype)
    return float(limits.max * limits.eps / 8)


def is_rate(learning_rate: tf.Tensor) -> tf.Tensor:
    """Whether a number is a learning rate: finite and not negative; a boolean scalar."""
    return (learning_rate >= 0) & (learning_rate <= learning_rate.dtype.max)


def _greatest_squared(dtype: tf.DType) -> float:
    # A little less than the square root, for a norm that is a rounding too small.
    return 0.999 * math.sqrt(dtype.max)


def _all(conditions: dict[tf.DType, tf.Tensor]) -> tf.Tensor:
    return tf.reduce_all(tf.stack([tf.reduce_all(c) for c in conditions.values()]))


def _by_dtype(numbers: Sequence[tf.Tensor]) -> dict[tf.DType, tf.Tensor]:
    groups: dict[tf.DType, list[tf.Tensor]] = {}
    for number in numbers:
        groups.setdefault(number.dtype, []).append(number)
    return {dtype: tf.stack(group) for dtype, group in groups.items()}


def squares_fit(layer_norms: Sequence[tf.Tensor], dtype: tf.DType | None = None) -> tf.Tensor:
    """Whether the sum of the squares of every layer is finite.

    Args:
        layer_norms: A norm for each layer, or a bound of it.
        dtype: Of the squares; that of the norms by default.

    Returns:
        A boolean scalar.

    Example:
        >>> [bool(squares_fit([tf.constant(norm)])) for norm in (1e18, 1e20, float("nan"))]
        [True, False, False]
    """
    return _all(
        {of: n <= _greatest_squared(dtype or of) for of, n in _by_dtype(layer_norms).items()}
    )


def steps_fit(
    rates: Sequence[tf.Tensor], layer_norms: Sequence[tf.Tensor], momentum: float = 0.0
) -> tf.Tensor:
    """Whether the steps of all layers can be made: none overflows, none is lost in denormals.

    Args:
        rates: For each layer what its direction is multiplied by.
        layer_norms: For each layer the norm of its direction, or a bound of it.
        momentum: β; a velocity is up to 1 / (1−β) times as long as a step.

    Returns:
        A boolean scalar.

    Example:
        >>> rates = [tf.constant(0.1), tf.constant(1e-39)]
        >>> bool(steps_fit(rates, [tf.constant(1e30), tf.constant(1.0)]))
        True
        >>> bool(steps_fit(rates, [tf.constant(1e32), tf.constant(1.0)]))  # overflows
        False
        >>> bool(steps_fit(rates, [tf.constant(1.0), tf.constant(1e30)]))  # is lost
        False
    """
    conditions = {}
    directions = _by_dtype(layer_norms)
    for dtype, rate in _by_dtype(rates).items():
        direction = directions[dtype]
        short = rate * direction <= (1.0 - momentum) * greatest_step(dtype)
        # The rate for a very long direction may be no normal number, which is as good as 0.
        tiny = np.finfo(dtype.as_numpy_dtype).tiny
        conditions[dtype] = short & ((rate >= tiny) | (direction <= _greatest_squared(dtype)))
    return _all(conditions)


def decayed_bounds(
    layers: Sequence[Layer],
    bounds: Sequence[tf.Tensor],
    step: Step,
    weight_decay: float | None,
    adapted_norms: Sequence[tf.Tensor] | None = None,
    ratio: float = 1.0,
) -> list[tf.Tensor]:
    """What the norms of directions with decay, d + λ w, do not exceed: bound + λ ‖w‖.

    Up to η λ = 1 decay lets no weight grow, so that λ ‖w‖ may be left out. Norms that are not there
    are computed beyond that only; and always with λ > 1, where λ w itself may overflow at any rate.

    Args:
        layers: The layers.
        bounds: For each layer what the norm of d does not exceed.
        step: Gives η.
        weight_decay: λ, or ``None``.
        adapted_norms: ‖w‖ of the adapted layers, or ``None`` if they are not there.
        ratio: What η is multiplied by in layers without.

    Returns:
        A scalar for each layer.
    """
    if not weight_decay or not any(layer.decayed for layer in layers):
        return list(bounds)
    known = {}
    if adapted_norms is not None:
        adapted = [layer.index for layer in layers if layer.adapted]
        known = dict(zip(adapted, adapted_norms, strict=True))
    others = [layer for layer in layers if layer.decayed and layer.index not in known]
    if others:
        rate = scalar(step.learning_rate, tf.float32) * ratio
        found = tf.cond(
            tf.constant(True) if weight_decay > 1.0 else rate * weight_decay > 1.0,
            lambda: norms([layer.variable for layer in others]),
            lambda: [tf.zeros([], layer.dtype) for layer in others],
        )
        known |= zip((layer.index for layer in others), found, strict=True)
    decay, zero = scalars(layers, weight_decay), scalars(layers, 0.0)
    return elementwise(
        lambda bound, norm: bound + decay[norm.dtype] * norm,
        bounds,
        [known[layer.index] if layer.decayed else zero[layer.dtype] for layer in layers],
    )


def write_if_sound(finite: tf.Tensor, update: Update) -> tf.Tensor:
    """Writes an update of finite gradients if it is sound.

    Args:
        finite: Whether the gradients are finite, a boolean scalar.
        update: What a rule computed of them.

    Returns:
        Whether all of it was written, a boolean scalar.
    """

    def write() -> tf.Tensor:
        return tf.reduce_all(tf.stack([tf.constant(True), *update.write()]))

    return tf.cond(finite & update.sound, write, lambda: tf.constant(False))
