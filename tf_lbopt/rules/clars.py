"""Complete layer-wise adaptive rate scaling."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.bounds import decay_norms, steps_fit
from tf_lbopt.rules.momentum import apply_velocity
from tf_lbopt.rules.norms import norms
from tf_lbopt.rules.rule import MEAN_NORM, Layer, Rule, Step, Update, decayed_gradients, dense
from tf_lbopt.rules.sharing import scalars
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
        momentum = scalars(layers, self.momentum)
        decay = decay_norms(
            [layer for layer in layers if not layer.adapted], step, self.weight_decay
        )
        if self.weight_decay:
            decay |= {
                layer.index: self.weight_decay * norm
                for layer, norm in zip(adapted, weight_norms, strict=True)
                if layer.decayed
            }

        def write() -> list[tf.Tensor]:
            written = []
            for layer, gradient, rate in zip(layers, gradients, rates, strict=True):
                written += apply_velocity(
                    layer.variable,
                    layer.slots.get("momentum"),
                    dense(gradient),
                    rate,
                    momentum[layer.dtype],
                    self.nesterov,
                )
            return written

        sound = steps_fit(
            rates,
            [layer.norm_bound + decay.get(layer.index, 0.0) for layer in layers],
            self.momentum,
        )
        return Update(sound, write)

    def _ratio(self, weight_norms: tf.Tensor, mean_norms: tf.Tensor) -> tf.Tensor:
        ratio = trust_ratio(weight_norms, mean_norms, self.eta, self.default_trust_ratio)
        if self.max_trust_ratio is None:
            return ratio
        return tf.minimum(ratio, tf.constant(self.max_trust_ratio, ratio.dtype))


def _mean_norm(layer: Layer) -> tf.Tensor:
    assert layer.mean_norm is not None, "the road provides what `statistics` declares"
    return layer.mean_norm
