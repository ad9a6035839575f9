"""Layer-wise adaptive moments for batch training."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.adam import adam_steps_fit, apply_adam_moments, direction_limit, may_fuse
from tf_lbopt.rules.momentum import apply_delta
from tf_lbopt.rules.norms import norms
from tf_lbopt.rules.rule import Layer, Rule, Step, Update, dense
from tf_lbopt.rules.running_mean import running_means
from tf_lbopt.rules.sharing import scalars
from tf_lbopt.rules.trust_ratio import layerwise_rates, trust_ratio


@dataclasses.dataclass(frozen=True)
class LAMB(Rule):
    """LAMB: ``r = m̂ / (√v̂ + ε) + λ w``, ``w ← w − η ρ r`` with ``ρ = ‖w‖ / ‖r‖``."""

    slots: ClassVar[tuple[str, ...]] = ("momentum", "velocity")

    beta_1: float
    beta_2: float
    epsilon: float
    weight_decay: float | None = None
    default_trust_ratio: float = 1.0

    def update(self, layers: Sequence[Layer], step: Step) -> Update:
        """One update; see the class."""
        first = running_means(layers, step, self.beta_1)
        second = running_means(layers, step, self.beta_2)
        epsilon = scalars(layers, self.epsilon)
        decay = scalars(layers, self.weight_decay or 0.0)
        adapted = [layer for layer in layers if layer.adapted]
        weight_norms = norms([layer.variable for layer in adapted])

        def write() -> list[tf.Tensor]:
            directions = [
                apply_adam_moments(
                    layer.slots["momentum"],
                    layer.slots["velocity"],
                    dense(layer.gradient),
                    first[layer.dtype],
                    second[layer.dtype],
                    epsilon[layer.dtype],
                    decay[layer.dtype] * layer.weights()
                    if self.weight_decay and layer.decayed
                    else None,
                    limit=direction_limit(self.beta_1, self.beta_2),
                    fused=may_fuse(self.epsilon),
                )
                for layer in layers
            ]
            direction_norms = norms(
                [d for d, layer in zip(directions, layers, strict=True) if layer.adapted]
            )
            rates = layerwise_rates(
                layers,
                step,
                lambda weight_norm, norm: trust_ratio(
                    weight_norm, norm, default=self.default_trust_ratio
                ),
                weight_norms,
                direction_norms,
                self.default_trust_ratio,
            )
            written = []
            for layer, direction, rate in zip(layers, directions, rates, strict=True):
                written += apply_delta(layer.variable, direction, -rate)
            return written

        sound = adam_steps_fit(
            layers,
            step,
            (self.beta_1, self.beta_2, self.epsilon),
            self.weight_decay,
            weight_norms,
            max(1.0, self.default_trust_ratio),
        )
        return Update(sound, write)
