"""Gradient clipping, with Keras's three meanings."""

from collections.abc import Sequence

import tensorflow as tf

from tf_lbopt.rules.norms import Gradient, global_norm


def clip(
    gradients: Sequence[Gradient],
    layer_norms: Sequence[tf.Tensor],
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
) -> tuple[list[Gradient], list[tf.Tensor] | None]:
    """Clips the mean gradient.

    Args:
        gradients: One per layer, sparse ones without repeated indices.
        layer_norms: Their norms.
        clipnorm: Greatest norm of one layer.
        clipvalue: Greatest magnitude of one element.
        global_clipnorm: Greatest norm of all layers together.

    Returns:
        The clipped gradients and their norms; ``None`` for the norms where they must be computed
        anew (after ``clipvalue``).
    """
    if clipvalue is not None:
        return [_clip_elements(g, clipvalue) for g in gradients], None
    if clipnorm is not None:
        factors = [_shrink(n, clipnorm) for n in layer_norms]
    elif global_clipnorm is not None:
        factor = _shrink(global_norm(layer_norms), global_clipnorm)
        factors = [tf.cast(factor, n.dtype) for n in layer_norms]
    else:
        return list(gradients), list(layer_norms)
    return (
        [scale(g, factor) for g, factor in zip(gradients, factors, strict=True)],
        [n * factor for n, factor in zip(layer_norms, factors, strict=True)],
    )


def scale(gradient: Gradient, factor: tf.Tensor) -> Gradient:
    """``factor · gradient``, sparse or dense, by a scalar or element by element."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            gradient.values * factor, gradient.indices, dense_shape=gradient.dense_shape
        )
    return gradient * factor


def _shrink(norm: tf.Tensor, limit: float) -> tf.Tensor:
    limit = tf.constant(limit, norm.dtype)
    return limit / tf.maximum(norm, limit)


def _clip_elements(gradient: Gradient, limit: float) -> Gradient:
    return tf.clip_by_value(gradient, -limit, limit)
