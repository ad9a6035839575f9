"""Momentum: the two textbook forms, each as a pure function and as an in-place update.

The in-place updates are what rules call. They take TensorFlow's fused kernels, which read and write
every byte once, and fall back on the pure form where there is no kernel (half precision, which is
computed in float32). They return booleans: for a float16 variable, whether all elements were
written; one that overflows keeps its old value. In the other dtypes none does, after the checks of
`tf_lbopt.rules.bounds`.
"""

from collections.abc import Sequence

import tensorflow as tf

from tf_lbopt.rules.norms import Gradient, compute_dtype, scalar
from tf_lbopt.rules.rule import Layer, dense
from tf_lbopt.rules.sharing import scalars

_FUSED_DTYPES = (tf.float32, tf.float64)


def heavy_ball(buffer, direction, learning_rate, momentum):
    """Momentum with the learning rate outside: ``u ← β u + d``, ``w ← w − η u``.

    Args:
        buffer: u, the momentum buffer.
        direction: d, what one update adds to it.
        learning_rate: η, a scalar.
        momentum: β in [0, 1).

    Returns:
        ``(u, delta)``, where ``delta`` is added to the weights.
    """
    buffer = momentum * buffer + direction
    return buffer, -learning_rate * buffer


def velocity(velocity, direction, learning_rate, momentum, nesterov=False):
    """Momentum with the learning rate inside: ``v ← β v − η d``, ``w ← w + v``.

    The form of Keras's SGD. With ``nesterov``, ``w ← w + β v − η d``.

    Args:
        velocity: v, the velocity.
        direction: d, the gradient or what stands for it.
        learning_rate: η, a scalar.
        momentum: β in [0, 1).
        nesterov: Whether to look one step ahead.

    Returns:
        ``(v, delta)``, where ``delta`` is added to the weights.
    """
    velocity = momentum * velocity - learning_rate * direction
    delta = momentum * velocity - learning_rate * direction if nesterov else velocity
    return velocity, delta


def apply_heavy_ball(variable, buffer, direction, learning_rate, momentum) -> list[tf.Tensor]:
    """`heavy_ball` on variables, in place; ``buffer`` is ``None`` where ``momentum`` is 0."""
    if buffer is None:
        return apply_delta(variable, direction, -learning_rate)
    if variable.dtype in _FUSED_DTYPES:
        tf.raw_ops.ResourceApplyMomentum(
            var=variable.handle,
            accum=buffer.handle,
            lr=scalar(learning_rate, variable.dtype),
            grad=direction,
            momentum=scalar(momentum, variable.dtype),
        )
        return []
    return _assign_pure(heavy_ball, variable, buffer, direction, learning_rate, momentum)


def apply_velocity(
    variable, velocity_variable, direction, learning_rate, momentum, nesterov=False
) -> list[tf.Tensor]:
    """`velocity` on variables, in place; ``velocity_variable`` is ``None`` where momentum is 0."""
    if velocity_variable is None:
        return apply_delta(variable, direction, -learning_rate)
    if variable.dtype in _FUSED_DTYPES:
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=velocity_variable.handle,
            lr=scalar(learning_rate, variable.dtype),
            grad=direction,
            momentum=scalar(momentum, variable.dtype),
            use_nesterov=nesterov,
        )
        return []
    return _assign_pure(
        velocity, variable, velocity_variable, direction, learning_rate, momentum, nesterov
    )


def apply_velocities(
    layers: Sequence[Layer],
    directions: Sequence[Gradient],
    rates: Sequence[tf.Tensor],
    momentum: float,
    nesterov: bool,
) -> list[tf.Tensor]:
    """`apply_velocity` on all layers, with the slot "momentum" where there is one.

    Without one a sparse direction touches its own rows only.
    """
    shared = scalars(layers, momentum)
    written = []
    for layer, direction, rate in zip(layers, directions, rates, strict=True):
        slot = layer.slots.get("momentum")
        written += apply_velocity(
            layer.variable,
            slot,
            direction if slot is None else dense(direction),
            rate,
            shared[layer.dtype],
            nesterov,
        )
    return written


def apply_delta(variable, direction, scale) -> list[tf.Tensor]:
    """``w ← w + scale · direction``, in place; a sparse direction touches its own rows only."""
    dtype = compute_dtype(variable.dtype)
    if isinstance(direction, tf.IndexedSlices):
        rows = direction.values * scalar(scale, dtype)
        if variable.dtype == dtype:
            variable.scatter_add(tf.IndexedSlices(rows, direction.indices))
            return []
        old = tf.gather(variable, direction.indices)
        new, written = _in_half_precision(tf.cast(old, dtype) + rows, old)
        variable.scatter_update(tf.IndexedSlices(new, direction.indices))
        return written
    if variable.dtype in _FUSED_DTYPES:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=variable.handle, alpha=-scalar(scale, variable.dtype), delta=direction
        )
        return []
    return assign_finite(variable, tf.cast(variable, dtype) + scalar(scale, dtype) * direction)


def _assign_pure(step, variable, slot, direction, learning_rate, momentum, *args):
    dtype = compute_dtype(variable.dtype)
    new_slot, delta = step(
        tf.cast(slot, dtype), direction, scalar(learning_rate, dtype), momentum, *args
    )
    return [
        *assign_finite(slot, new_slot),
        *assign_finite(variable, tf.cast(variable, dtype) + delta),
    ]


def assign_finite(variable, new) -> list[tf.Tensor]:
    """Writes values of the compute dtype; see the module on what is returned."""
    new, written = _in_half_precision(new, variable)
    variable.assign(new)
    return written


def _in_half_precision(new, old):
    """New values in the dtype of the old, which stay where a float16 one overflows; see above."""
    new = tf.cast(new, old.dtype)
    if old.dtype != tf.float16:
        return new, []
    finite = tf.math.is_finite(new)
    return tf.where(finite, new, old), [tf.reduce_all(finite)]
