"""Gradient descent, with and without momentum, as Keras has it, with coupled weight decay."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.bounds import decay_norms, steps_fit
from tf_lbopt.rules.momentum import apply_velocity
from tf_lbopt.rules.rule import Layer, Rule, Step, Update, decayed_gradients, dense
from tf_lbopt.rules.sharing import scalars


@dataclasses.dataclass(frozen=True)
class SGD(Rule):
    """``g = ḡ + λ w``; with momentum ``u ← β u − η g``, ``w ← w + u``, else ``w ← w − η g``.

    Without momentum and decay a sparse gradient touches its own rows only.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> Update:
        """One update; see the class."""
        rates = scalars(layers, step.learning_rate)
        momentum = scalars(layers, self.momentum)
        gradients = decayed_gradients(layers, self.weight_decay)
        decay = decay_norms(layers, step, self.weight_decay)

        def write() -> list[tf.Tensor]:
            written = []
            for layer, gradient in zip(layers, gradients, strict=True):
                written += apply_velocity(
                    layer.variable,
                    layer.slots.get("momentum"),
                    dense(gradient) if self.momentum else gradient,
                    rates[layer.dtype],
                    momentum[layer.dtype],
                    self.nesterov,
                )
            return written

        sound = steps_fit(
            [rates[layer.dtype] for layer in layers],
            [layer.norm_bound + decay.get(layer.index, 0.0) for layer in layers],
            self.momentum,
        )
        return Update(sound, write)
