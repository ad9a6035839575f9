"""Layer-wise adaptive rate scaling."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.momentum import apply_velocity
from tf_lbopt.rules.norms import norms
from tf_lbopt.rules.rule import Layer, Rule, Step, coupled_weight_decay
from tf_lbopt.rules.trust_ratio import trust_ratio


@dataclasses.dataclass(frozen=True)
class LARS(Rule):
    """LARS: ``u ← β u + η ρ g``, ``w ← w − u``, with ``g = ḡ + λ w`` and ``ρ = τ ‖w‖ / ‖g‖``.

    The slot holds −u, the velocity of Keras's SGD.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float
    trust_coefficient: float
    nesterov: bool = False
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> None:
        """One update; see the class."""
        gradients = coupled_weight_decay(layers, self.weight_decay)
        adapted = [index for index, layer in enumerate(layers) if layer.adapted]
        weight_norms = dict(zip(adapted, norms([layers[i].variable for i in adapted]), strict=True))
        for index, (layer, (gradient, norm)) in enumerate(zip(layers, gradients, strict=True)):
            rate = tf.cast(step.learning_rate, layer.dtype)
            if layer.adapted:
                rate *= trust_ratio(weight_norms[index], norm, self.trust_coefficient)
            apply_velocity(
                layer.variable,
                layer.slots.get("momentum"),
                gradient,
                rate,
                self.momentum,
                self.nesterov,
            )
