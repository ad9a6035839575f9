"""The layer-wise trust ratio of LARS and LAMB."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from tf_lbopt.rules.rule import Layer, Step
from tf_lbopt.rules.sharing import elementwise, scalars


def trust_ratio(
    weight_norm: tf.Tensor,
    update_norm: tf.Tensor,
    coefficient: float = 1.0,
    default: float = 1.0,
) -> tf.Tensor:
    """``coefficient · ‖w‖ / ‖update‖``, `default` where either norm is 0; finite at any rate.

    Args:
        weight_norm: The norm of one layer's weights, a scalar; or a vector of several layers'.
        update_norm: Of the same shape and dtype, the norm of what is about to be subtracted.
        coefficient: LARS's trust coefficient; LAMB has 1.
        default: The ratio where there is none.

    Returns:
        A tensor of the same shape and dtype.

    References:
        You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks", eq. 4; with
        ``‖g‖ + λ‖w‖`` in the place of ``‖update‖``, eq. 6.

    Example:
        >>> float(trust_ratio(tf.constant(3.0), tf.constant(2.0)))
        1.5
        >>> float(trust_ratio(tf.constant(0.0), tf.constant(2.0)))
        1.0
    """
    defined = (weight_norm > 0) & (update_norm > 0)
    ratio = _finite(coefficient * tf.math.divide_no_nan(weight_norm, update_norm))
    return tf.where(defined, ratio, tf.constant(default, ratio.dtype))


def _finite(rates: tf.Tensor) -> tf.Tensor:
    # Of an update of 1e-38 and less a rate can overflow, and ∞ · 0 is NaN.
    return tf.minimum(rates, rates.dtype.max)


def layerwise_rates(
    layers: Sequence[Layer],
    step: Step,
    ratio: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    weight_norms: Sequence[tf.Tensor],
    update_norms: Sequence[tf.Tensor],
    default: float = 1.0,
) -> list[tf.Tensor]:
    """The learning rate of each layer: η times its ratio, or the default if it is not adapted.

    Args:
        layers: The layers.
        step: Gives η.
        ratio: The trust ratio as a function of vectors of weight norms and update norms.
        weight_norms: Of the adapted layers.
        update_norms: Of the adapted layers.
        default: The ratio of the other layers.
    """
    rates = scalars(layers, step.learning_rate)
    adapted = elementwise(
        lambda weight_norm, update_norm: _finite(
            rates[weight_norm.dtype] * ratio(weight_norm, update_norm)
        ),
        weight_norms,
        update_norms,
    )
    of_adapted = iter(adapted)
    return [next(of_adapted) if layer.adapted else default * rates[layer.dtype] for layer in layers]
