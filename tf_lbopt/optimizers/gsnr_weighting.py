"""What the VRGD optimizers have in common: a weighting in front of a base optimizer."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, cast

import tensorflow as tf

from tf_lbopt import _validation, rules
from tf_lbopt.aggregation.replicas import inside_scope
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.optimizers.hyperparameters import Arguments
from tf_lbopt.rules.gsnr import SUMMARY, summarize

# With fewer sub-batches the ratio of two random numbers is not that of their means.
_ENOUGH = 8


class GSNRWeighting(Algorithm):
    """Mix-in, placed before a base optimizer, that weights its mean gradient by r.

    Of its arguments ``gamma`` and ``beta_3`` are the weighting's: γ, the lower bound of r, and the
    decay of r's running mean; without the latter, or with ``None``, there is no such mean.

    Raises:
        ValueError: With the first gradients, if there is only one sub-batch.
    """

    statistics = rules.VRGD.statistics

    gamma: float
    _watch: "_Watch | None" = None
    _warned_of_few = False

    @classmethod
    def rule_of(cls, values: Arguments) -> rules.Rule:
        """The base's algorithm behind the weighting."""
        return rules.VRGD(super().rule_of(values), values["gamma"], values.get("beta_3"))

    def rule(self) -> rules.Rule:
        """The algorithm with the current hyper-parameters."""
        rule = cast(rules.VRGD, super().rule())
        watch = self._watch
        return rule if watch is None else dataclasses.replace(rule, observe=watch.observe)

    # -- looking at GSNR ---------------------------------------------------------------------------

    def watch_gsnr(self, every: int = 1) -> None:
        """Keeps a summary of every layer's GSNR from the next trace on.

        See `tf_lbopt.callbacks.GradientSignalToNoise`, which calls this.

        Args:
            every: Updates from one summary to the next.

        Raises:
            ValueError: The optimizer is not built yet.
        """
        if not self.built:
            raise ValueError("`watch_gsnr` needs a built optimizer: call `build` before.")
        every = _validation.integer("every", every, low=1)
        with inside_scope(self._strategy):
            numbers = tf.Variable(
                tf.fill([len(self.trained.variables), len(SUMMARY)], float("nan")),
                trainable=False,
                name="gsnr_summaries",
            )
        self._watch = _Watch(numbers, every, self.gamma)

    def unwatch_gsnr(self) -> None:
        """Stops keeping summaries, from the next trace on."""
        self._watch = None

    def gsnr_summaries(self) -> dict[str, dict[str, float]]:
        """The latest summaries: for each variable's path the numbers that `SUMMARY` names.

        Layers without a gradient, and updates with fewer than two live sub-batches, have NaN.
        """
        if self._watch is None:
            return {}
        rows = zip(self.trained.paths, self._watch.numbers.numpy(), strict=True)
        return {path: dict(zip(SUMMARY, map(float, row), strict=True)) for path, row in rows}

    def _prepared_update(self, *args: Any, **kwargs: Any) -> Callable[[], tf.Tensor]:
        # Not in `build`: a model that was trained on several replicas is loaded on one, too.
        self._check_sub_batches(self.accumulation_steps)
        return super()._prepared_update(*args, **kwargs)

    def _check_sub_batches(self, steps: int) -> None:
        sub_batches = self._strategy.num_replicas_in_sync * steps
        if sub_batches < 2:
            raise ValueError(
                f"{type(self).__name__} estimates the variance of the gradient over sub-batches, "
                "one per replica and accumulation micro-step, and needs at least 2 (8 or more to "
                "mean something). Use a strategy with more replicas or set "
                "`gradient_accumulation_steps`. Received: 1 replica, "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
                + (f", accumulation_steps={steps}" if self._accumulation is not None else "")
            )
        if sub_batches < _ENOUGH and self.gamma < 1.0 and not self._warned_of_few:
            self._warned_of_few = True
            warnings.warn(
                f"{type(self).__name__} has {sub_batches} sub-batches (replicas times "
                f"`accumulation_steps`), fewer than {_ENOUGH}: so few tell little of the "
                f"variance, most elements are weighted by gamma={self.gamma:g}, and what is left "
                "is the base optimizer with a smaller step. See `tf_lbopt.VRSGD`.",
                stacklevel=3,
            )


@dataclasses.dataclass(frozen=True)
class _Watch:
    """Where summaries are kept; apart from the optimizer, so that no checkpoint has them."""

    numbers: tf.Variable
    every: int
    gamma: float

    def observe(self, parameters: rules.Parameters, step: rules.Step) -> None:
        statistics = parameters.statistics
        assert statistics is not None

        def write() -> tf.Tensor:
            rows = summarize(statistics, self.gamma)
            self.numbers.scatter_update(tf.IndexedSlices(rows, tf.constant(parameters.indices)))
            return tf.constant(True)

        due = tf.cast(step.index, tf.int32) % self.every == 0  # XLA emulates 64 bits on a TPU
        tf.cond(due, write, lambda: tf.constant(True))
