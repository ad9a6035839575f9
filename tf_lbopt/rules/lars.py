"""Layer-wise adaptive rate scaling."""

import dataclasses
from typing import ClassVar

from tf_lbopt.rules.bounds import with_decay
from tf_lbopt.rules.rule import Parameters, Rule, Step, Update, decayed_gradients, dense
from tf_lbopt.rules.sgd import velocity_update
from tf_lbopt.rules.trust_ratio import trust_ratio


@dataclasses.dataclass(frozen=True)
class LARS(Rule):
    """LARS: ``u ← β u + η ρ g``, ``w ← w − u``, with ``g = ḡ + λ w``.

    ``ρ = τ ‖w‖ / ‖g‖``, or with the denominator ``"sum_of_norms"`` the paper's eq. 6,
    ``ρ = τ ‖w‖ / (‖ḡ‖ + λ ‖w‖)``. The slot holds −u, the velocity of Keras's SGD.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)
    takes_weight_norms = True

    momentum: float
    trust_coefficient: float
    nesterov: bool = False
    weight_decay: float | None = None
    trust_ratio_denominator: str = "norm_of_sum"
    default_trust_ratio: float = 1.0

    @property
    def takes_norms_with_decay(self) -> bool:
        """For the one denominator."""
        return bool(self.weight_decay) and self.trust_ratio_denominator == "norm_of_sum"

    def update(self, parameters: Parameters, step: Step) -> Update:
        """One update; see the class."""
        weight_norms = parameters.weight_norms()
        gradients = [dense(g) for g in decayed_gradients(parameters, self.weight_decay)]
        if self.takes_norms_with_decay:
            lengths = parameters.norms_with_decay(gradients)
        else:
            lengths = with_decay(
                parameters,
                parameters.own_norms(),
                step,
                self.weight_decay,
                weight_norms,
                self.default_trust_ratio,
            )
        ratios = trust_ratio(
            weight_norms, lengths, self.trust_coefficient, self.default_trust_ratio
        )
        return velocity_update(
            parameters, gradients, step.rates(ratios), lengths, self.momentum, self.nesterov
        )
