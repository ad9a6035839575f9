"""Stochastic normalized gradient descent with momentum."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.momentum import apply_heavy_ball
from tf_lbopt.rules.norms import global_norm
from tf_lbopt.rules.rule import Layer, Rule, Step, coupled_weight_decay
from tf_lbopt.rules.sharing import scalars


@dataclasses.dataclass(frozen=True)
class SNGM(Rule):
    """SNGM, Algorithm 1: ``u ← β u + g/‖g‖``, ``w ← w − η u``, with ``g = ḡ + λ w``."""

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> None:
        """One update; see the class."""
        gradients, layer_norms, _ = coupled_weight_decay(layers, self.weight_decay)
        norm = global_norm(layer_norms)
        inverse = tf.math.reciprocal_no_nan(norm)  # 0 where there is no gradient at all
        momentum = scalars(layers, self.momentum)
        for layer, gradient in zip(layers, gradients, strict=True):
            apply_heavy_ball(
                layer.variable,
                layer.slots.get("momentum"),
                gradient * tf.cast(inverse, gradient.dtype),
                step.learning_rate,
                momentum[layer.dtype],
            )
