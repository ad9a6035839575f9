"""Complete layer-wise adaptive rate scaling."""

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.bounds import with_decay
from tf_lbopt.rules.rule import MEAN_NORM, Parameters, Rule, Step, Update, decayed_gradients
from tf_lbopt.rules.sgd import velocity_update
from tf_lbopt.rules.trust_ratio import trust_ratio


@dataclasses.dataclass(frozen=True)
class CLARS(Rule):
    """CLARS: ``s ← β s − γ g``, ``w ← w + β s − γ g``, with ``g = ḡ + λ w``.

    The layer's rate is ``γ = η min(τ ‖w‖ / N, max_trust_ratio)`` with N the mean norm of the
    gradients of the sub-batches (or examples): the paper's eq. 5. Its eq. 4, Nesterov's momentum in
    terms of ``v``, is the same update; in terms of s, the velocity of Keras's SGD, nothing has to
    be initialized with the weights. Without ``nesterov`` ``w ← w + s``.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)
    statistics: ClassVar[tuple[str, ...]] = (MEAN_NORM,)
    takes_weight_norms = True

    momentum: float
    trust_coefficient: float
    max_trust_ratio: float | None = None
    weight_decay: float | None = None
    nesterov: bool = True
    default_trust_ratio: float = 1.0

    def update(self, parameters: Parameters, step: Step) -> Update:
        """One update; see the class."""
        assert parameters.mean_norms is not None, "`statistics` declares them"
        weight_norms, default = parameters.weight_norms(), self.default_trust_ratio
        ratios = trust_ratio(weight_norms, parameters.mean_norms, self.trust_coefficient, default)
        if self.max_trust_ratio is not None:
            bounded = tf.minimum(ratios, tf.constant(self.max_trust_ratio, ratios.dtype))
            ratios = tf.where(list(parameters.adapted), bounded, ratios)
        return velocity_update(
            parameters,
            decayed_gradients(parameters, self.weight_decay),
            step.rates(ratios),
            with_decay(
                parameters, parameters.norm_bounds, step, self.weight_decay, weight_norms, default
            ),
            self.momentum,
            self.nesterov,
        )
