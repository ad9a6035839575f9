"""Adam, and what LAMB has from it."""

import dataclasses
from typing import ClassVar

import numpy as np
import tensorflow as tf

from tf_lbopt.rules.bounds import squares_fit, steps_fit, with_decay
from tf_lbopt.rules.moments import RunningMean
from tf_lbopt.rules.rule import Parameters, Rule, Step, Update, dense
from tf_lbopt.rules.writer import Writer

# At a rate of 0 it is not too long either: its square is finite.
_GREATEST_DIRECTION = 2.0**60


def direction_bound(beta_1: float, beta_2: float, epsilon: float, dtype: tf.DType) -> float:
    """What no element of Adam's direction exceeds, whatever gradients came before.

    By the Cauchy-Schwarz inequality ``m ≤ √v (1−β₁)/√(1−β₂) / √(1−β₁²/β₂)``, and a bias correction
    is no more than that of t = 1, or none. Of a gradient whose square vanishes there is m without
    v, over ε. Where β₁² ≥ β₂, the first moment outlives the second, and a direction would grow
    without bound, or up to one of ε alone, which may be very small: there it is clipped.

    Args:
        beta_1: β₁.
        beta_2: β₂.
        epsilon: ε.
        dtype: Of the moments; squares of gradients are finite in it.

    Example:
        >>> round(direction_bound(0.9, 0.999, 1e-6, tf.float32), 1)
        7.3
        >>> direction_bound(0.95, 0.9, 1e-6, tf.float32) == 2.0**60
        True
    """
    if beta_1**2 >= beta_2:
        return _GREATEST_DIRECTION
    bound = max(1.0, (1 - beta_1) / (1 - beta_2) ** 0.5) / (1 - beta_1**2 / beta_2) ** 0.5
    vanishing = (float(np.finfo(dtype.as_numpy_dtype).tiny) / (1 - beta_2)) ** 0.5
    return max(bound, vanishing / epsilon) if epsilon else bound


@dataclasses.dataclass(frozen=True)
class AdamMoments(Rule):
    """Base of rules along Adam's direction."""

    slots: ClassVar[tuple[str, ...]] = ("momentum", "velocity")

    beta_1: float
    beta_2: float
    epsilon: float
    weight_decay: float | None = None

    @property
    def direction_limit(self) -> float | None:
        """What the direction has to be clipped to, or ``None``; see `direction_bound`."""
        return _GREATEST_DIRECTION if self.beta_1**2 >= self.beta_2 else None

    def direction_bound(self, dtype: tf.DType) -> float:
        """What no element of the direction exceeds, without decay."""
        return direction_bound(self.beta_1, self.beta_2, self.epsilon, dtype)

    def running_means(
        self, parameters: Parameters, step: Step
    ) -> dict[tf.DType, tuple[RunningMean, RunningMean]]:
        """Those of β₁ and β₂ in this update, for each dtype that is computed in."""
        return {
            dtype: (
                RunningMean(tf.constant(self.beta_1, dtype), t),
                RunningMean(tf.constant(self.beta_2, dtype), t),
            )
            for dtype, t in step.numbers(parameters).items()
        }

    def steps_fit(
        self,
        parameters: Parameters,
        step: Step,
        weight_norms: tf.Tensor | None = None,
        ratio: float = 1.0,
    ) -> tf.Tensor:
        """Whether second moments stay finite, and steps along the direction and that of decay.

        Args:
            parameters: The variables.
            step: Gives η.
            weight_norms: [n], ‖w‖ of the adapted variables, whose steps are η ‖w‖ long; ``None`` if
                all steps are η times the direction.
            ratio: What η is multiplied by at most for the others.

        Returns:
            A boolean scalar.
        """
        dtypes = parameters.dtypes
        bounds = {dtype: self.direction_bound(dtype) for dtype in dict.fromkeys(dtypes)}
        direction = tf.constant([bounds[dtype] for dtype in dtypes], parameters.dtype)
        lengths = with_decay(parameters, direction, step, self.weight_decay, weight_norms, ratio)
        if weight_norms is not None:
            lengths += weight_norms
        rate = ratio * tf.cast(step.learning_rate, parameters.dtype)
        return squares_fit(parameters.norm_bounds, dtypes) & steps_fit(rate, lengths, dtypes)


@dataclasses.dataclass(frozen=True)
class Adam(AdamMoments):
    """Adam as `keras.optimizers.Adam` has it, with the decoupled weight decay of its AdamW.

    ``w ← w − η λ w``, then ``w ← w − η √(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε)``: ε is added before the
    bias correction, which is where Keras and LAMB differ.
    """

    def update(self, parameters: Parameters, step: Step) -> Update:
        """One update; see the class."""
        means = self.running_means(parameters, step)
        epsilons = {
            d: self.epsilon / tf.sqrt(second.correction) for d, (_, second) in means.items()
        }
        rates = {d: tf.cast(step.learning_rate, d) for d in means}
        decays = {d: rate * (self.weight_decay or 0.0) for d, rate in rates.items()}

        def write(writer: Writer) -> None:
            weights, limit = parameters.weights(), self.direction_limit
            for index, (variable, dtype) in enumerate(
                zip(parameters.variables, parameters.dtypes, strict=True)
            ):
                if self.weight_decay and parameters.decayed[index]:
                    writer.subtract(variable, weights[index], decays[dtype])
                direction = writer.adam(
                    parameters.slots["momentum"][index],
                    parameters.slots["velocity"][index],
                    dense(parameters.gradients[index]),
                    *means[dtype],
                    epsilons[dtype],
                    limit=limit,
                    least_epsilon=self.epsilon,
                )
                writer.subtract(variable, direction, rates[dtype])

        return Update(self.steps_fit(parameters, step), write)
