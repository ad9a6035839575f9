"""Learning-rate schedules and the rules that carry a rate from one batch size to another.

Under the optimizers of this package a schedule's step is an update, whatever
`gradient_accumulation_steps` is.
"""

import math
import numbers
from typing import Any

import keras
import tensorflow as tf
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tf_lbopt import _validation


@keras.saving.register_keras_serializable(package="tf_lbopt")
class Warmup(LearningRateSchedule):
    """Linear warm-up, then any schedule.

    With t counted from 0, W warm-up steps and a schedule η: ``start + (η(0) − start) t / W`` for
    t < W, then ``η(t − W)``.

    Args:
        schedule: η, a `keras.optimizers.schedules.LearningRateSchedule`, whose own steps begin
            with the end of the warm-up, or a constant rate ≥ 0.
        steps: W ≥ 0, in updates.
        start: The rate of the first update, ≥ 0. Defaults to 0.0.
        name: Optional name.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    Example:
        >>> decay = keras.optimizers.schedules.PolynomialDecay(1.0, 4, end_learning_rate=0.0)
        >>> schedule = Warmup(decay, steps=2)
        >>> [float(schedule(t)) for t in range(8)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        schedule: LearningRateSchedule | float,
        steps: int,
        start: float = 0.0,
        name: str | None = None,
    ):
        super().__init__()
        if isinstance(schedule, numbers.Real):
            schedule = _validation.real("schedule", schedule, low=0.0)
        elif not isinstance(schedule, LearningRateSchedule):
            expected = "a keras.optimizers.schedules.LearningRateSchedule or a real number >= 0"
            raise _validation.refusal(TypeError, "schedule", expected, schedule)
        self.schedule = schedule
        self.steps = _validation.integer("steps", steps, low=0)
        self.start = _validation.real("start", start, low=0.0)
        self.name = name

    def __call__(self, step: int | tf.Tensor) -> tf.Tensor:
        """The learning rate of the update with this number, counted from 0."""
        step = ops.convert_to_tensor(step)
        rate = self.schedule
        if callable(rate):
            rate = rate(ops.maximum(step - self.steps, 0))
        rate = ops.convert_to_tensor(rate)
        if not rate.dtype.is_floating:  # of a schedule of whole numbers
            rate = ops.cast(rate, keras.config.floatx())
        if not self.steps:
            return rate
        warming = self.start + (rate - self.start) * ops.cast(step, rate.dtype) / self.steps
        return ops.where(step < self.steps, warming, rate)

    def get_config(self) -> dict[str, object]:
        """The arguments that make an equal schedule, for Keras serialization."""
        return {
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "steps": self.steps,
            "start": self.start,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Warmup":
        """The schedule that `get_config` describes."""
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        return cls(**{**config, "schedule": schedule})


def linear_scaling(base_learning_rate: float, base_batch_size: int, batch_size: int) -> float:
    """The linear scaling rule: the rate grows with the batch size.

    Args:
        base_learning_rate: A rate that works at `base_batch_size`.
        base_batch_size: In examples, ≥ 1.
        batch_size: In examples, ≥ 1.

    Returns:
        ``base_learning_rate · batch_size / base_batch_size``.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    References:
        Goyal et al. 2017, "Accurate, Large Minibatch SGD" (arXiv:1706.02677), section 2.1.

    Example:
        >>> linear_scaling(0.1, 256, 8192)
        3.2
    """
    return _scaled(base_learning_rate, base_batch_size, batch_size, 1.0)


def sqrt_scaling(base_learning_rate: float, base_batch_size: int, batch_size: int) -> float:
    """The square-root scaling rule, as LAMB uses it.

    Args:
        base_learning_rate: A rate that works at `base_batch_size`.
        base_batch_size: In examples, ≥ 1.
        batch_size: In examples, ≥ 1.

    Returns:
        ``base_learning_rate · √(batch_size / base_batch_size)``.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    References:
        You et al. 2020, "Large Batch Optimization for Deep Learning" (arXiv:1904.00962).

    Example:
        >>> sqrt_scaling(0.1, 256, 1024)
        0.2
    """
    return _scaled(base_learning_rate, base_batch_size, batch_size, 0.5)


def sngm_corollary_1(
    gradient_budget: float,
    smoothness: float,
    noise: float,
    initial_gap: float,
    momentum: float,
) -> tuple[int, float]:
    """Batch size and learning rate that minimize SNGM's bound, from the problem's constants.

    ``B = √(C (1−β) σ² / (2 L (1+β) Δ))`` and ``η = √(2 (1−β)³ Δ B / ((1+β) L C))``, with B rounded
    to a whole number of examples (at least 1) before η is computed from it.

    Args:
        gradient_budget: C > 0, per-example gradients to be computed in all (examples × epochs).
        smoothness: L > 0, the Lipschitz constant of the gradient.
        noise: σ > 0, standard deviation of one example's gradient.
        initial_gap: Δ = F(w₀) − F(w*) > 0.
        momentum: β in [0, 1).

    Returns:
        ``(batch_size, learning_rate)``.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    References:
        Zhao et al., SNGM (arXiv:2007.13985), Corollary 1.

    Example:
        >>> batch_size, learning_rate = sngm_corollary_1(1e6, 10.0, 2.0, 1.0, momentum=0.9)
        >>> batch_size, round(learning_rate, 6)
        (103, 0.000104)
    """
    budget = _validation.positive("gradient_budget", gradient_budget)
    smoothness = _validation.positive("smoothness", smoothness)
    noise = _validation.positive("noise", noise)
    gap = _validation.positive("initial_gap", initial_gap)
    beta = _validation.real("momentum", momentum, low=0.0, high=1.0, high_open=True)
    batch_size = max(
        1, round(math.sqrt(budget * (1 - beta) * noise**2 / (2 * smoothness * (1 + beta) * gap)))
    )
    learning_rate = math.sqrt(
        2 * (1 - beta) ** 3 * gap * batch_size / ((1 + beta) * smoothness * budget)
    )
    return batch_size, learning_rate


def sngm_corollary_2(gradient_budget: float) -> tuple[int, float]:
    """Batch size and learning rate for SNGM from the gradient budget alone.

    ``B = √C``, rounded to a whole number of examples, and ``η = √(B / C)``.

    Args:
        gradient_budget: C > 0, per-example gradients to be computed in all (examples × epochs).

    Returns:
        ``(batch_size, learning_rate)``.

    Raises:
        TypeError, ValueError: The argument is of the wrong type or outside its range.

    References:
        Zhao et al., SNGM (arXiv:2007.13985), Corollary 2.

    Example:
        >>> sngm_corollary_2(1e8)
        (10000, 0.01)
    """
    budget = _validation.positive("gradient_budget", gradient_budget)
    batch_size = max(1, round(math.sqrt(budget)))
    return batch_size, math.sqrt(batch_size / budget)


def _scaled(base_rate: float, base_batch_size: int, batch_size: int, power: float) -> float:
    base_rate = _validation.real("base_learning_rate", base_rate, low=0.0)
    base_batch_size = _validation.integer("base_batch_size", base_batch_size, low=1)
    batch_size = _validation.integer("batch_size", batch_size, low=1)
    return base_rate * (batch_size / base_batch_size) ** power
