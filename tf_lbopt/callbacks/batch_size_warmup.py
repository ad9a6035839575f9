"""A batch size that follows the gradient's noise scale."""

import math
from typing import Protocol

from tf_lbopt import _validation
from tf_lbopt.callbacks.common import Logs
from tf_lbopt.callbacks.growing_batch import GrowingBatch


class NoiseScale(Protocol):
    """What measures the noise scale: `tf_lbopt.callbacks.GradientNoiseScale`, or alike.

    Attributes:
        noise_scale: The latest estimate, in examples, or `None` before there is one.
        examples_per_update: Of how many examples the latest update was, or `None`.
    """

    noise_scale: float | None
    examples_per_update: float | None


class BatchSizeWarmup(GrowingBatch):
    """Doubles the number of micro-steps of an update as the gradient's noise scale grows.

    Every `every` updates: if the batch, twice as large, would still be at most `fraction` times the
    measured noise scale B_noise, the number of micro-steps is doubled, up to `max_steps`. It never
    shrinks. At B = `fraction` · B_noise a training takes 1 + 1/`fraction` times the least possible
    number of updates, and 1 + `fraction` times the least number of examples (1 means twice as many
    of each).

    Merrill et al. double the batch as measured critical batch sizes grow, and scale the rate by
    the square root; the noise scale in the place of the critical batch size, which it need not
    equal, and the threshold are this package's.

    How a number comes into force, and what `learning_rate_rule` does, is said of
    `BatchSizeSchedule`. The number is saved with the optimizer's state, decisions are made at
    multiples of `every` in `iterations`: so a training that is resumed goes on likewise, as far as
    the noise scale does.

    Args:
        noise_scale: The callback that measures it, which must be among `fit`'s callbacks too, in
            front of this one: an object with ``noise_scale`` and ``examples_per_update``, in
            examples, `None` or NaN as long as they are not known.
        max_steps: The greatest number of micro-steps, ≥ 1.
        every: Updates from one decision to the next, ≥ 1; more than the estimate needs to follow
            a change of the batch. Defaults to 100.
        fraction: How much of the noise scale the batch may be, > 0. Defaults to 1.0.
        learning_rate_rule: `"linear"`, `"sqrt"`, or `None` for the same rate. Defaults to `None`.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.
        ValueError: When training begins or a number is assigned, as `BatchSizeSchedule`.

    Example:
        >>> import types
        >>> import keras, tf_lbopt
        >>> measured = types.SimpleNamespace(noise_scale=20.0, examples_per_update=8)
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile(tf_lbopt.SNGM(0.1, gradient_accumulation_steps=1), loss="mse")
        >>> x, y = keras.ops.ones([32, 2]), keras.ops.ones([32, 1])
        >>> warmup = BatchSizeWarmup(measured, max_steps=4, every=2)
        >>> history = model.fit(x, y, batch_size=8, verbose=0, callbacks=[warmup])
        >>> int(model.optimizer.iterations.numpy()), history.history["accumulation_steps"]
        (3, [2])

    References:
        Merrill et al. 2025, "Critical Batch Size Revisited" (arXiv:2505.23971); McCandlish et al.
        2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162), section 2.
    """

    def __init__(
        self,
        noise_scale: NoiseScale,
        max_steps: int,
        every: int = 100,
        fraction: float = 1.0,
        learning_rate_rule: str | None = None,
    ):
        super().__init__(learning_rate_rule)
        if not all(hasattr(noise_scale, name) for name in ("noise_scale", "examples_per_update")):
            expected = (
                "a callback that measures it, with the attributes `noise_scale` and "
                "`examples_per_update`"
            )
            raise _validation.refusal(TypeError, "noise_scale", expected, noise_scale)
        self.noise_scale = noise_scale
        self.max_steps = _validation.integer("max_steps", max_steps, low=1)
        self.every = _validation.integer("every", every, low=1)
        self.fraction = _validation.positive("fraction", fraction)
        self._period = 0

    def on_train_begin(self, logs: Logs = None) -> None:
        """Notes when the next decision is due."""
        self._period = int(self._accumulating().iterations.numpy()) // self.every
        super().on_train_begin(logs)

    def wanted(self, updates: int, steps: int) -> int:
        """Twice as many, if a decision is due and the noise scale allows it."""
        if updates // self.every == self._period:
            return steps
        self._period = updates // self.every
        noise, examples = self.noise_scale.noise_scale, self.noise_scale.examples_per_update
        if noise is None or examples is None or not math.isfinite(noise):
            return steps
        grows = 0 < 2 * examples <= self.fraction * noise
        return max(steps, min(2 * steps, self.max_steps)) if grows else steps

    def next_change(self, updates: int) -> float:
        """The next multiple of `every`."""
        return (updates // self.every + 1) * self.every
