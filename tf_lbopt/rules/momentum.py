"""Momentum: the two textbook forms."""

import tensorflow as tf


def heavy_ball(buffer: tf.Tensor, direction: tf.Tensor, momentum: tf.Tensor) -> tf.Tensor:
    """Momentum with the learning rate outside: ``u ← β u + d``, and then ``w ← w − η u``."""
    return momentum * buffer + direction


def velocity(
    velocity: tf.Tensor, direction: tf.Tensor, learning_rate: tf.Tensor, momentum: tf.Tensor
) -> tf.Tensor:
    """Momentum with the learning rate inside: ``v ← β v − η d``, and then ``w ← w + v``.

    The form of Keras's SGD. With Nesterov's momentum the same formula gives what is added to the
    weights, from the new v: ``w ← w + β v − η d``.
    """
    return momentum * velocity - learning_rate * direction
