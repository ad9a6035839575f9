"""Layer-wise adaptive rate scaling."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.bounds import decay_norms, steps_fit
from tf_lbopt.rules.momentum import apply_velocity
from tf_lbopt.rules.rule import (
    Layer,
    Rule,
    Step,
    Update,
    coupled_weight_decay,
    decayed_gradients,
    dense,
)
from tf_lbopt.rules.sharing import scalars
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
        gradients, bounds, weight_norms, denominators = self._gradients_and_norms(layers, step)
        rates = layerwise_rates(
            layers,
            step,
            lambda weight_norm, norm: trust_ratio(
                weight_norm, norm, self.trust_coefficient, self.default_trust_ratio
            ),
            weight_norms,
            denominators,
            self.default_trust_ratio,
        )
        momentum = scalars(layers, self.momentum)

        def write() -> list[tf.Tensor]:
            written = []
            for layer, gradient, rate in zip(layers, gradients, rates, strict=True):
                written += apply_velocity(
                    layer.variable,
                    layer.slots.get("momentum"),
                    gradient,
                    rate,
                    momentum[layer.dtype],
                    self.nesterov,
                )
            return written

        return Update(steps_fit(rates, bounds, self.momentum), write)

    def _gradients_and_norms(
        self, layers: Sequence[Layer], step: Step
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
        """All g, and what their norms do not exceed; ‖w‖ of the adapted, and its divisors."""
        adapted = [index for index, layer in enumerate(layers) if layer.adapted]
        apart = self.trust_ratio_denominator == "sum_of_norms"
        gradients, bounds, weight_norms = coupled_weight_decay(
            layers,
            None if apart else self.weight_decay,
            also=[layers[index].variable for index in adapted],
        )
        if apart and self.weight_decay:
            decay = scalars(layers, self.weight_decay)
            others = [layer for layer in layers if not layer.adapted]
            added = decay_norms(others, step, self.weight_decay) | {
                layers[index].index: decay[norm.dtype] * norm
                for index, norm in zip(adapted, weight_norms, strict=True)
                if layers[index].decayed
            }
            bounds = [
                norm + added[layer.index] if layer.index in added else norm
                for layer, norm in zip(layers, bounds, strict=True)
            ]
            gradients = [dense(g) for g in decayed_gradients(layers, self.weight_decay)]
        return gradients, bounds, weight_norms, [bounds[index] for index in adapted]
