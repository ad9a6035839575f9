"""Gradient descent, with and without momentum, as Keras has it, with coupled weight decay."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.momentum import apply_delta, apply_velocity
from tf_lbopt.rules.rule import Layer, Rule, Step, dense


@dataclasses.dataclass(frozen=True)
class SGD(Rule):
    """``g = ḡ + λ w``; with momentum ``u ← β u − η g``, ``w ← w + u``, else ``w ← w − η g``.

    Without momentum and decay a sparse gradient touches its own rows only.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> None:
        """One update; see the class."""
        for layer in layers:
            rate = tf.cast(step.learning_rate, layer.dtype)
            decays = self.weight_decay and layer.decayed
            if not self.momentum and not decays:
                apply_delta(layer.variable, layer.gradient, -rate)
                continue
            gradient = dense(layer.gradient)
            if decays:
                gradient += self.weight_decay * layer.weights()
            apply_velocity(
                layer.variable,
                layer.slots.get("momentum"),
                gradient,
                rate,
                self.momentum,
                self.nesterov,
            )
