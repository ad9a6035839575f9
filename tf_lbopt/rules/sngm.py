"""Stochastic normalized gradient descent with momentum."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.momentum import apply_heavy_ball
from tf_lbopt.rules.norms import global_norm
from tf_lbopt.rules.rule import Layer, Rule, Step, coupled_weight_decay


def normalize(gradient: tf.Tensor, norm: tf.Tensor) -> tf.Tensor:
    """``g / ‖g‖``, and 0 where ``‖g‖`` is 0.

    Args:
        gradient: g, or one layer of it.
        norm: ‖g‖, a scalar; of all layers together for SNGM.
    """
    return gradient * tf.cast(tf.math.reciprocal_no_nan(norm), gradient.dtype)


@dataclasses.dataclass(frozen=True)
class SNGM(Rule):
    """SNGM, Algorithm 1: ``u ← β u + g/‖g‖``, ``w ← w − η u``, with ``g = ḡ + λ w``."""

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> None:
        """One update; see the class."""
        gradients = coupled_weight_decay(layers, self.weight_decay)
        norm = global_norm([layer_norm for _, layer_norm in gradients])
        for layer, (gradient, _) in zip(layers, gradients, strict=True):
            apply_heavy_ball(
                layer.variable,
                layer.slots.get("momentum"),
                normalize(gradient, norm),
                step.learning_rate,
                self.momentum,
            )
