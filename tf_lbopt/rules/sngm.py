"""Stochastic normalized gradient descent with momentum."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.bounds import steps_fit
from tf_lbopt.rules.momentum import apply_heavy_ball
from tf_lbopt.rules.norms import global_norm
from tf_lbopt.rules.rule import Layer, Rule, Step, Update, coupled_weight_decay
from tf_lbopt.rules.sharing import scalars


@dataclasses.dataclass(frozen=True)
class SNGM(Rule):
    """SNGM, Algorithm 1: ``u ← β u + g/‖g‖``, ``w ← w − η u``, with ``g = ḡ + λ w``."""

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> Update:
        """One update; see the class."""
        gradients, layer_norms, _ = coupled_weight_decay(layers, self.weight_decay)
        norm = scalars(layers, global_norm(layer_norms))
        momentum = scalars(layers, self.momentum)
        rates = scalars(layers, step.learning_rate)
        # Not multiplied by 1/‖g‖, which is no normal number where ‖g‖ is very great.
        divisors = {d: tf.where(n > 0, n, tf.ones_like(n)) for d, n in norm.items()}

        def write() -> list[tf.Tensor]:
            written = []
            for layer, gradient in zip(layers, gradients, strict=True):
                written += apply_heavy_ball(
                    layer.variable,
                    layer.slots.get("momentum"),
                    gradient / divisors[layer.dtype],
                    step.learning_rate,
                    momentum[layer.dtype],
                )
            return written

        # The norm of g/‖g‖: 1, or 0, or NaN.
        lengths = [n / divisors[dtype] for dtype, n in norm.items()]
        return Update(steps_fit(list(rates.values()), lengths, self.momentum), write)
