"""Layer-wise adaptive moments for batch training."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from tf_lbopt.rules.adam import apply_adam_moments
from tf_lbopt.rules.momentum import apply_delta
from tf_lbopt.rules.norms import norms
from tf_lbopt.rules.rule import Layer, Rule, Step, dense
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

    def update(self, layers: Sequence[Layer], step: Step) -> None:
        """One update; see the class."""
        first = running_means(layers, step, self.beta_1)
        second = running_means(layers, step, self.beta_2)
        epsilon = scalars(layers, self.epsilon)
        decay = scalars(layers, self.weight_decay or 0.0)
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
                fused=self.epsilon > 0,
            )
            for layer in layers
        ]
        adapted = [index for index, layer in enumerate(layers) if layer.adapted]
        all_norms = norms([layers[i].variable for i in adapted] + [directions[i] for i in adapted])
        rates = layerwise_rates(
            layers,
            step,
            lambda weight_norm, norm: trust_ratio(
                weight_norm, norm, default=self.default_trust_ratio
            ),
            all_norms[: len(adapted)],
            all_norms[len(adapted) :],
            self.default_trust_ratio,
        )
        for layer, direction, rate in zip(layers, directions, rates, strict=True):
            apply_delta(layer.variable, direction, -rate)
