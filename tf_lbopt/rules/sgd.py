"""Gradient descent, with and without momentum, as Keras has it, with coupled weight decay."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from tf_lbopt.rules.bounds import decayed_bounds, steps_fit
from tf_lbopt.rules.momentum import apply_velocities
from tf_lbopt.rules.rule import Layer, Rule, Step, Update, decayed_gradients
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
        shared = scalars(layers, step.learning_rate)
        rates = [shared[layer.dtype] for layer in layers]
        gradients = decayed_gradients(layers, self.weight_decay)
        bounds = decayed_bounds(
            layers, [layer.norm_bound for layer in layers], step, self.weight_decay
        )
        return Update(
            steps_fit(rates, bounds, self.momentum),
            lambda: apply_velocities(layers, gradients, rates, self.momentum, self.nesterov),
        )
