"""Stochastic normalized gradient descent with momentum."""

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.bounds import steps_fit
from tf_lbopt.rules.norms import global_norm
from tf_lbopt.rules.rule import Parameters, Rule, Step, Update, decayed_gradients, dense
from tf_lbopt.rules.writer import Writer


@dataclasses.dataclass(frozen=True)
class SNGM(Rule):
    """SNGM, Algorithm 1: ``u ← β u + g/‖g‖``, ``w ← w − η u``, with ``g = ḡ + λ w``."""

    slots: ClassVar[tuple[str, ...]] = ("momentum",)
    separable = False  # ‖g‖ is the norm of all gradients together

    momentum: float
    weight_decay: float | None = None

    @property
    def takes_norms_with_decay(self) -> bool:
        """If weights decay."""
        return bool(self.weight_decay)

    def update(self, parameters: Parameters, step: Step) -> Update:
        """One update; see the class."""
        gradients = [dense(g) for g in decayed_gradients(parameters, self.weight_decay)]
        if self.weight_decay:
            norm = global_norm(parameters.norms_with_decay(gradients))
        else:
            norm = global_norm(parameters.own_norms())
        # Not multiplied by 1/‖g‖, which is no normal number where ‖g‖ is very great.
        # Where it is 0 any other number does. One that depends on the rate keeps XLA on a TPU from
        # splitting the all-reduce that the gradients come from into one for each variable.
        other = 1.0 + tf.cast(step.learning_rate, norm.dtype)
        divisor = tf.where(norm > 0, norm, other)
        divisors, rates = parameters.split(divisor), parameters.split(step.learning_rate)

        def write(writer: Writer) -> None:
            momentum = parameters.constants(self.momentum)
            buffers = parameters.slots.get("momentum", [None] * len(gradients))
            for variable, buffer, gradient, by, rate in zip(
                parameters.variables, buffers, gradients, divisors, rates, strict=True
            ):
                writer.heavy_ball(variable, buffer, gradient / by, rate, momentum[by.dtype])

        # The norm of g/‖g‖: 1, or 0, or NaN.
        rate = tf.cast(step.learning_rate, norm.dtype)
        return Update(steps_fit(rate, norm / divisor, parameters.dtypes, self.momentum), write)
