"""Gradient descent, with and without momentum, as Keras has it, with coupled weight decay."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.bounds import steps_fit, with_decay
from tf_lbopt.rules.norms import Gradient
from tf_lbopt.rules.rule import Parameters, Rule, Step, Update, decayed_gradients, dense
from tf_lbopt.rules.writer import Writer


@dataclasses.dataclass(frozen=True)
class SGD(Rule):
    """``g = ḡ + λ w``; with momentum ``u ← β u − η g``, ``w ← w + u``, else ``w ← w − η g``.

    Without momentum and decay a sparse gradient touches its own rows only.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float | None = None

    def update(self, parameters: Parameters, step: Step) -> Update:
        """One update; see the class."""
        return velocity_update(
            parameters,
            decayed_gradients(parameters, self.weight_decay),
            tf.cast(step.learning_rate, parameters.dtype),
            with_decay(parameters, parameters.norm_bounds, step, self.weight_decay),
            self.momentum,
            self.nesterov,
        )


def velocity_update(
    parameters: Parameters,
    directions: Sequence[Gradient],
    rates: tf.Tensor,
    lengths: tf.Tensor,
    momentum: float,
    nesterov: bool,
) -> Update:
    """An update by `velocity`, with the slot "momentum" if there is momentum.

    Args:
        parameters: The variables.
        directions: What takes the place of the gradients.
        rates: [n] or a scalar.
        lengths: [n], what the norms of the directions do not exceed.
        momentum: β in [0, 1).
        nesterov: Whether to look one step ahead.
    """

    def write(writer: Writer) -> None:
        shared = parameters.constants(momentum)
        slots = parameters.slots.get("momentum", [None] * len(directions))
        for variable, slot, direction, rate in zip(
            parameters.variables, slots, directions, parameters.split(rates), strict=True
        ):
            direction = direction if slot is None else dense(direction)
            writer.velocity(variable, slot, direction, rate, shared[direction.dtype], nesterov)

    return Update(steps_fit(rates, lengths, parameters.dtypes, momentum), write)
