"""Gradient clipping, with Keras's three meanings."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_lbopt.rules.norms import Gradient, global_norm, norms


def clip(
    gradients: Sequence[Gradient],
    gradient_norms: tf.Tensor,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    norms_of_all: tf.Tensor | None = None,
) -> tuple[list[Gradient], tf.Tensor]:
    """Clips the mean gradients.

    Args:
        gradients: One per variable, sparse ones without repeated indices.
        gradient_norms: [n], their norms.
        clipnorm: Greatest norm of one variable's.
        clipvalue: Greatest magnitude of one element.
        global_clipnorm: Greatest norm of all together.
        norms_of_all: The norms of these and of others that are clipped together with them;
            ``None`` if there are no others.

    Returns:
        The clipped gradients and their norms; infinite or NaN, which discards the update, where a
        gradient is so long that the number to multiply it by would be lost in denormals.
    """
    if clipvalue is not None:
        clipped = [tf.clip_by_value(gradient, -clipvalue, clipvalue) for gradient in gradients]
        return clipped, norms(clipped)
    if clipnorm is not None:
        factors = _shrink(gradient_norms, clipnorm)
    elif global_clipnorm is not None:
        together = gradient_norms if norms_of_all is None else norms_of_all
        factor = _shrink(global_norm(together), global_clipnorm)
        factors = tf.fill(gradient_norms.shape, tf.cast(factor, gradient_norms.dtype))
    else:
        return list(gradients), gradient_norms
    clipped = [
        scale(gradient, tf.cast(factor, gradient.dtype))
        for gradient, factor in zip(gradients, tf.unstack(factors, num=len(gradients)), strict=True)
    ]
    return clipped, gradient_norms * factors


def scale(gradient: Gradient, factor: tf.Tensor) -> Gradient:
    """``factor · gradient``, sparse or dense, by a scalar or element by element."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            gradient.values * factor, gradient.indices, dense_shape=gradient.dense_shape
        )
    return gradient * factor


def _shrink(norm: tf.Tensor, limit: float) -> tf.Tensor:
    limit = tf.constant(limit, norm.dtype)
    factor = limit / tf.maximum(norm, limit)
    normal = factor >= np.finfo(norm.dtype.as_numpy_dtype).tiny
    return factor / tf.cast(normal, norm.dtype)
