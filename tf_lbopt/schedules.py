"""Learning-rate schedules and the rules that carry a rate from one batch size to another.

Under the optimizers of this package a schedule's step is an update, whatever
`gradient_accumulation_steps` is.
"""

import math
from typing import Any

import keras
from keras import ops

from tf_lbopt import _validation


class _Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, then a decay that a subclass defines over its own progress."""

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: int,
        warmup_steps: int,
        name: str | None,
    ):
        super().__init__()
        self.initial_learning_rate = _validation.real(
            "initial_learning_rate", initial_learning_rate, low=0.0
        )
        self.decay_steps = _validation.integer("decay_steps", decay_steps, low=1)
        self.warmup_steps = _validation.integer("warmup_steps", warmup_steps, low=0)
        self.name = name

    def _decayed(self, progress: Any) -> Any:
        raise AssertionError("defined by each schedule")

    def __call__(self, step: Any) -> Any:
        """The learning rate of the update with this number, counted from 0."""
        step = ops.cast(step, "float32")
        progress = ops.clip((step - self.warmup_steps) / self.decay_steps, 0.0, 1.0)
        decayed = self._decayed(progress)
        if not self.warmup_steps:
            return decayed
        warming = self.initial_learning_rate * step / self.warmup_steps
        return ops.where(step < self.warmup_steps, warming, decayed)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal schedule, for Keras serialization."""
        return {
            "initial_learning_rate": self.initial_learning_rate,
            "decay_steps": self.decay_steps,
            "warmup_steps": self.warmup_steps,
            "name": self.name,
        }


@keras.saving.register_keras_serializable(package="tf_lbopt")
class WarmupPolynomialDecay(_Warmup):
    """Linear warm-up, then polynomial decay.

    With t counted from 0 and W warm-up steps: η t / W for t < W, then
    ``(η − end) (1 − (t − W)/T)^power + end`` with T = `decay_steps`, and ``end`` ever after.

    Args:
        initial_learning_rate: η ≥ 0, the rate at the end of the warm-up.
        decay_steps: T ≥ 1, in updates, counted after the warm-up.
        warmup_steps: W ≥ 0, in updates. Defaults to 0.
        power: > 0. Defaults to 1.0; the SNGM paper has 1.1 (CIFAR-10) and 2 (ImageNet).
        end_learning_rate: ≥ 0. Defaults to 0.0.
        name: Optional name.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    Example:
        >>> schedule = WarmupPolynomialDecay(1.0, decay_steps=4, warmup_steps=2)
        >>> [float(schedule(t)) for t in range(8)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: int,
        warmup_steps: int = 0,
        power: float = 1.0,
        end_learning_rate: float = 0.0,
        name: str | None = None,
    ):
        super().__init__(initial_learning_rate, decay_steps, warmup_steps, name)
        self.power = _validation.real("power", power, low=0.0, low_open=True)
        self.end_learning_rate = _validation.real("end_learning_rate", end_learning_rate, low=0.0)

    def _decayed(self, progress: Any) -> Any:
        span = self.initial_learning_rate - self.end_learning_rate
        return span * ops.power(1.0 - progress, self.power) + self.end_learning_rate

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal schedule, for Keras serialization."""
        return {
            **super().get_config(),
            "power": self.power,
            "end_learning_rate": self.end_learning_rate,
        }


@keras.saving.register_keras_serializable(package="tf_lbopt")
class WarmupCosineDecay(_Warmup):
    """Linear warm-up, then cosine decay.

    With t counted from 0 and W warm-up steps: η t / W for t < W, then
    ``η ((1 − α) (1 + cos(π (t − W)/T))/2 + α)`` with T = `decay_steps`, and ``α η`` ever after.

    Args:
        initial_learning_rate: η ≥ 0, the rate at the end of the warm-up.
        decay_steps: T ≥ 1, in updates, counted after the warm-up.
        warmup_steps: W ≥ 0, in updates. Defaults to 0.
        alpha: α in [0, 1], the last rate as a share of η. Defaults to 0.0.
        name: Optional name.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    Example:
        >>> schedule = WarmupCosineDecay(1.0, decay_steps=4, warmup_steps=2)
        >>> [round(float(schedule(t)), 4) for t in (0, 1, 2, 4, 6, 7)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: int,
        warmup_steps: int = 0,
        alpha: float = 0.0,
        name: str | None = None,
    ):
        super().__init__(initial_learning_rate, decay_steps, warmup_steps, name)
        self.alpha = _validation.real("alpha", alpha, low=0.0, high=1.0)

    def _decayed(self, progress: Any) -> Any:
        cosine = 0.5 * (1.0 + ops.cos(math.pi * progress))
        return self.initial_learning_rate * ((1.0 - self.alpha) * cosine + self.alpha)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal schedule, for Keras serialization."""
        return {**super().get_config(), "alpha": self.alpha}


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
    budget = _positive("gradient_budget", gradient_budget)
    smoothness = _positive("smoothness", smoothness)
    noise = _positive("noise", noise)
    gap = _positive("initial_gap", initial_gap)
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
    budget = _positive("gradient_budget", gradient_budget)
    batch_size = max(1, round(math.sqrt(budget)))
    return batch_size, math.sqrt(batch_size / budget)


def _positive(name: str, value: float) -> float:
    return _validation.real(name, value, low=0.0, low_open=True)


def _scaled(base_rate: float, base_batch_size: int, batch_size: int, power: float) -> float:
    base_rate = _validation.real("base_learning_rate", base_rate, low=0.0)
    base_batch_size = _validation.integer("base_batch_size", base_batch_size, low=1)
    batch_size = _validation.integer("batch_size", batch_size, low=1)
    return base_rate * (batch_size / base_batch_size) ** power
