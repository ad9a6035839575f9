"""Complete layer-wise adaptive rate scaling."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.momentum import apply_velocity
from tf_lbopt.rules.norms import norms
from tf_lbopt.rules.rule import MEAN_NORM, Layer, Rule, Step, decayed_gradient
from tf_lbopt.rules.trust_ratio import trust_ratio


@dataclasses.dataclass(frozen=True)
class CLARS(Rule):
    """CLARS: ``s ← β s − γ g``, ``w ← w + β s − γ g``, with ``g = ḡ + λ w``.

    The layer's rate is ``γ = η min(τ ‖w‖ / N, max_trust_ratio)`` with N the mean norm of the
    gradients of the sub-batches (or examples): the paper's eq. 5. Its eq. 4, Nesterov's momentum in
    terms of ``v``, is the same update; in terms of s, the velocity of Keras's SGD, nothing has to
    be initialized with the weights.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)
    statistics: ClassVar[tuple[str, ...]] = (MEAN_NORM,)

    momentum: float
    eta: float
    max_trust_ratio: float | None = None
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> None:
        """One update; see the class."""
        adapted = [layer for layer in layers if layer.adapted]
        weight_norms = norms([layer.variable for layer in adapted])
        ratios = {
            layer.index: self._ratio(layer, norm)
            for layer, norm in zip(adapted, weight_norms, strict=True)
        }
        for layer in layers:
            rate = tf.cast(step.learning_rate, layer.dtype)
            if layer.adapted:
                rate *= ratios[layer.index]
            apply_velocity(
                layer.variable,
                layer.slots.get("momentum"),
                decayed_gradient(layer, self.weight_decay),
                rate,
                self.momentum,
                nesterov=True,
            )

    def _ratio(self, layer: Layer, weight_norm: tf.Tensor) -> tf.Tensor:
        assert layer.mean_norm is not None, "the road provides what `statistics` declares"
        ratio = trust_ratio(weight_norm, layer.mean_norm, self.eta)
        if self.max_trust_ratio is None:
            return ratio
        return tf.minimum(ratio, tf.constant(self.max_trust_ratio, ratio.dtype))
