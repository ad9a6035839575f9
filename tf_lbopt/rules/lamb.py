"""Layer-wise adaptive moments for batch training."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.adam import apply_adam_moments
from tf_lbopt.rules.momentum import apply_delta
from tf_lbopt.rules.norms import norms
from tf_lbopt.rules.rule import Layer, Rule, Step, dense
from tf_lbopt.rules.trust_ratio import trust_ratio


@dataclasses.dataclass(frozen=True)
class LAMB(Rule):
    """LAMB: ``r = m̂ / (√v̂ + ε) + λ w``, ``w ← w − η ρ r`` with ``ρ = ‖w‖ / ‖r‖``."""

    slots: ClassVar[tuple[str, ...]] = ("momentum", "velocity")

    beta_1: float
    beta_2: float
    epsilon: float
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> None:
        """One update; see the class."""
        directions = [self._direction(layer, step) for layer in layers]
        adapted = [index for index, layer in enumerate(layers) if layer.adapted]
        all_norms = norms([layers[i].variable for i in adapted] + [directions[i] for i in adapted])
        ratios = {
            index: trust_ratio(weight_norm, direction_norm)
            for index, weight_norm, direction_norm in zip(
                adapted, all_norms[: len(adapted)], all_norms[len(adapted) :], strict=True
            )
        }
        for index, (layer, direction) in enumerate(zip(layers, directions, strict=True)):
            rate = tf.cast(step.learning_rate, layer.dtype)
            apply_delta(layer.variable, direction, -rate * ratios.get(index, 1.0))

    def _direction(self, layer: Layer, step: Step) -> tf.Tensor:
        decays = self.weight_decay and layer.decayed
        return apply_adam_moments(
            layer.slots["momentum"],
            layer.slots["velocity"],
            dense(layer.gradient),
            tf.cast(step.index + 1, layer.dtype),
            self.beta_1,
            self.beta_2,
            self.epsilon,
            offset=self.weight_decay * layer.weights() if decays else None,
        )
