"""Complete layer-wise adaptive rate scaling."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.bounds import decayed_bounds, steps_fit
from tf_lbopt.rules.momentum import apply_velocities
from tf_lbopt.rules.norms import norms
from tf_lbopt.rules.rule import MEAN_NORM, Layer, Rule, Step, Update, decayed_gradients
from tf_lbopt.rules.trust_ratio import layerwise_rates, trust_ratio


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

    momentum: float
    eta: float
    max_trust_ratio: float | None = None
    weight_decay: float | None = None
    nesterov: bool = True
    default_trust_ratio: float = 1.0

    def update(self, layers: Sequence[Layer], step: Step) -> Update:
        """One update; see the class."""
        adapted = [layer for layer in layers if layer.adapted]
        weight_norms = norms([layer.variable for layer in adapted])
        rates = layerwise_rates(
            layers,
            step,
            self._ratio,
            weight_norms,
            [_mean_norm(layer) for layer in adapted],
            self.default_trust_ratio,
        )
        gradients = decayed_gradients(layers, self.weight_decay)
        bounds = decayed_bounds(
            layers,
            [layer.norm_bound for layer in layers],
            step,
            self.weight_decay,
            weight_norms,
            self.default_trust_ratio,
        )
        return Update(
            steps_fit(rates, bounds, self.momentum),
            lambda: apply_velocities(layers, gradients, rates, self.momentum, self.nesterov),
        )

    def _ratio(self, weight_norms: tf.Tensor, mean_norms: tf.Tensor) -> tf.Tensor:
        ratio = trust_ratio(weight_norms, mean_norms, self.eta, self.default_trust_ratio)
        if self.max_trust_ratio is None:
            return ratio
        return tf.minimum(ratio, tf.constant(self.max_trust_ratio, ratio.dtype))


def _mean_norm(layer: Layer) -> tf.Tensor:
    assert layer.mean_norm is not None, "the road provides what `statistics` declares"
    return layer.mean_norm
