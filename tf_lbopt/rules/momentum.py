"""Momentum: the two textbook forms."""

import tensorflow as tf


def heavy_ball(
    buffer: tf.Tensor, direction: tf.Tensor, learning_rate: tf.Tensor, momentum: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
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


def velocity(
    velocity: tf.Tensor,
    direction: tf.Tensor,
    learning_rate: tf.Tensor,
    momentum: tf.Tensor,
    nesterov: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
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
