"""Layer-wise adaptive rate scaling."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from tf_lbopt.rules.bounds import decayed_bounds, steps_fit
from tf_lbopt.rules.momentum import apply_velocities
from tf_lbopt.rules.rule import (
    Layer,
    Rule,
    Step,
    Update,
    coupled_weight_decay,
    decayed_gradients,
    dense,
)
from tf_lbopt.rules.trust_ratio import layerwise_rates, trust_ratio


@dataclasses.dataclass(frozen=True)
class LARS(Rule):
    """LARS: ``u ← β u + η ρ g``, ``w ← w − u``, with ``g = ḡ + λ w``.

    ``ρ = τ ‖w‖ / ‖g‖``, or with the denominator ``"sum_of_norms"`` the paper's eq. 6,
    ``ρ = τ ‖w‖ / (‖ḡ‖ + λ ‖w‖)``. The slot holds −u, the velocity of Keras's SGD.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float
    trust_coefficient: float
    nesterov: bool = False
    weight_decay: float | None = None
    trust_ratio_denominator: str = "norm_of_sum"
    default_trust_ratio: float = 1.0

    def update(self, layers: Sequence[Layer], step: Step) -> Update:
        """One update; see the class."""
        adapted = [layer for layer in layers if layer.adapted]
        apart = self.trust_ratio_denominator == "sum_of_norms"
        gradients, bounds, weight_norms = coupled_weight_decay(
            layers,
            None if apart else self.weight_decay,
            also=[layer.variable for layer in adapted],
        )
        if apart and self.weight_decay:
            bounds = decayed_bounds(
                layers,
                bounds,
                step,
                self.weight_decay,
                weight_norms,
                self.default_trust_ratio,
            )
            gradients = [dense(g) for g in decayed_gradients(layers, self.weight_decay)]
        rates = layerwise_rates(
            layers,
            step,
            lambda weight_norm, norm: trust_ratio(
                weight_norm, norm, self.trust_coefficient, self.default_trust_ratio
            ),
            weight_norms,
            [norm for layer, norm in zip(layers, bounds, strict=True) if layer.adapted],
            self.default_trust_ratio,
        )
        return Update(
            steps_fit(rates, bounds, self.momentum),
            lambda: apply_velocities(layers, gradients, rates, self.momentum, self.nesterov),
        )
