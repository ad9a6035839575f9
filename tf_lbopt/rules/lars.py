"""Layer-wise adaptive rate scaling."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from tf_lbopt.rules.momentum import apply_velocity
from tf_lbopt.rules.rule import Layer, Rule, Step, coupled_weight_decay
from tf_lbopt.rules.sharing import scalars
from tf_lbopt.rules.trust_ratio import layerwise_rates, trust_ratio


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
        gradients, gradient_norms, weight_norms = coupled_weight_decay(
            layers,
            self.weight_decay,
            also=[layer.variable for layer in layers if layer.adapted],
        )
        rates = layerwise_rates(
            layers,
            step,
            lambda weight_norm, norm: trust_ratio(weight_norm, norm, self.trust_coefficient),
            weight_norms,
            [norm for layer, norm in zip(layers, gradient_norms, strict=True) if layer.adapted],
        )
        momentum = scalars(layers, self.momentum)
        for layer, gradient, rate in zip(layers, gradients, rates, strict=True):
            apply_velocity(
                layer.variable,
                layer.slots.get("momentum"),
                gradient,
                rate,
                momentum[layer.dtype],
                self.nesterov,
            )
