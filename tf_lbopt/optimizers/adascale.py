"""AdaScale."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.optimizers.algorithm import Common
from tf_lbopt.optimizers.around import PipelineAroundOptimizer
from tf_lbopt.optimizers.base import registered
from tf_lbopt.optimizers.declared import REQUIRED
from tf_lbopt.optimizers.hyperparameters import Arguments
from tf_lbopt.optimizers.sgd import SGD
from tf_lbopt.optimizers.trained import Variable, tensorflow_variable
from tf_lbopt.rules.adascale import Moments
from tf_lbopt.rules.bounds import is_rate
from tf_lbopt.rules.rule import MEAN_SQUARED_NORM


@registered
class AdaScale(PipelineAroundOptimizer):
    """Momentum SGD whose rate grows with the batch as far as the gradient's noise allows.

    The inner optimizer has the rate and the schedule of a small batch, one sub-batch (one replica's
    and accumulation micro-step's); an update is made from k of them. With the mean gradient's
    squared norm and the sub-batches' an update estimates the variance σ² of a sub-batch's gradient
    and the squared norm μ² of the expected one, and takes

        r = (σ² + μ²) / (σ²/k + μ²)        the gain, from 1 to k
        w ← w − r η(⌊τ⌋) ...               the inner optimizer's update at r times its rate
        τ ← τ + r

    Where noise outweighs the signal r is near k (the linear scaling rule), else near 1 (more
    examples bring no more). The schedule goes by τ, the scale-invariant steps, each worth an update
    from one sub-batch; so training ends where `scale_invariant_steps` reaches the number of updates
    that the small batch was to take, after fewer of `iterations`.

    σ² and μ² are running means of the estimates

        σ̂² = k/(k − 1) (mean ‖g_d‖² − ‖ḡ‖²),    μ̂² = ‖ḡ‖² − σ̂²/k

    over all variables together with θ = max(1 − k/1000, 0); the first update has its estimates
    themselves. Decided here: an estimate below 0 enters as 0; k is the number of sub-batches with a
    gradient; an update with fewer than 2 of these, or whose squares overflow, is made with r = 1
    and enters no mean; gradients are those of the loss, before clipping and weight decay. A
    discarded update changes neither means nor τ. With momentum the inner optimizer's velocity has
    the scaled rates of former updates in it, as Keras's has of scheduled ones.

    ⌊τ⌋ is the inner optimizer's `iterations`, which its schedule reads, and saved with it. The
    attribute `gain` is the last update's r, a variable; `callbacks.GradientNoiseScale` logs it, or

        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: logs.update(gain=float(optimizer.gain))
        )

    Args:
        inner_optimizer: A `tf_lbopt.SGD`, with momentum or without, not yet built.
        {common_arguments}

    Raises:
        {raises}; the inner optimizer is another one, is built, was created outside of the
            strategy's scope, or has one of the settings that belong here; with the first gradients,
            one replica without accumulation.

    Example:
        >>> import tf_lbopt
        >>> w = keras.Variable([0.0])
        >>> optimizer = AdaScale(tf_lbopt.SGD(1.0), gradient_accumulation_steps=2)
        >>> for gradient in (1.0, 3.0):
        ...     optimizer.apply([keras.ops.convert_to_tensor([gradient])], [w])
        >>> float(optimizer.gain.numpy())       # σ² = 2, μ² = 4 − 1: (2 + 3) / (1 + 3)
        1.25
        >>> float(w.numpy()[0]), optimizer.scale_invariant_steps
        (-2.5, 1.25)

    References:
        Johnson, Agrawal, Gu, Guestrin 2020, "AdaScale SGD: A User-Friendly Algorithm for
        Distributed Training" (arXiv:2007.05105), Algorithm 1 and section 3.2.
    """

    statistics = (MEAN_SQUARED_NORM,)
    arguments: ClassVar = {"inner_optimizer": REQUIRED}

    def _set_up(self, values: Arguments) -> None:
        super()._set_up(values)
        # ``_fraction`` is τ − ⌊τ⌋: in float32 a sum of many gains would lose its last digits.
        self.gain, self._fraction, self._variance, self._squared_norm = (
            self.add_variable((), dtype="float32", aggregation="only_first_replica", name=name)
            for name in ("gain", "fraction_of_step", "gradient_variance", "gradient_squared_norm")
        )

    def _check_inner(self, inner: object) -> None:
        super()._check_inner(inner)
        if type(inner) is not SGD:
            raise ValueError(
                "`inner_optimizer` of AdaScale must be a tf_lbopt.SGD, with or without momentum: "
                "its gain is derived for steps in proportion to the gradient. "
                f"Received: {type(inner).__name__}"
            )

    @property
    def iterations(self) -> Variable:
        """How many updates were made; skipped ones and micro-steps do not count."""
        return _compat.counter(self)

    @property
    def scale_invariant_steps(self) -> float:
        """τ, how many updates from one sub-batch each those made so far are worth."""
        return int(_compat.counter(self.inner_optimizer).numpy()) + float(self._fraction.numpy())

    def _prepared_update(self, *args: Any, **kwargs: Any) -> Callable[[], tf.Tensor]:
        if self._strategy.num_replicas_in_sync == 1 and self._accumulation is None:
            raise ValueError(
                "AdaScale scales the rate for 2 sub-batches or more, one for each replica and "
                "accumulation micro-step. Use a strategy with more replicas or set "
                "`gradient_accumulation_steps`. Received: 1 replica, "
                "gradient_accumulation_steps=None"
            )
        return super()._prepared_update(*args, **kwargs)

    def _moments(self, common: Common) -> tuple[Moments, tf.Tensor]:
        """The running means with this update in them, and the gain, on one replica."""
        squared = common.squared_norms
        assert squared is not None
        kept = (self._variance, self._squared_norm)
        before = Moments(*(tf.convert_to_tensor(tensorflow_variable(v)) for v in kept))
        sums = (tf.reduce_sum(squared.mean_of_squares), tf.reduce_sum(squared.square_of_mean))
        numbers = [tf.cast(number, tf.float32) for number in (*sums, squared.sub_batches)]
        valid = squared.valid & tf.reduce_all(tf.math.is_finite(numbers))
        found = before.followed(*numbers)
        gain = tf.where(valid, found.gain(numbers[-1]), 1.0)
        pairs = zip(found, before, strict=True)
        return Moments(*(tf.where(valid, new, old) for new, old in pairs)), gain

    def _common(self, *args: Any) -> Common:
        common = super()._common(*args)
        _, gain = self._moments(common)
        rate = tf.convert_to_tensor(common.step.learning_rate)
        step = dataclasses.replace(common.step, learning_rate=rate * tf.cast(gain, rate.dtype))
        sound = common.sound & is_rate(step.learning_rate)
        return dataclasses.replace(common, step=step, sound=sound)

    def _finished(self, common: Common, made: tf.Tensor, *args: Any) -> list[tf.Tensor]:
        means, gain = self._moments(common)
        fraction = tf.convert_to_tensor(tensorflow_variable(self._fraction)) + gain
        whole = tf.floor(fraction)
        for variable, value in (
            (self.gain, gain),
            (self._fraction, fraction - whole),
            (self._variance, means.variance),
            (self._squared_norm, means.squared_norm),
        ):
            target = tensorflow_variable(variable)
            target.assign(tf.where(made, value, tf.convert_to_tensor(target)))
        steps = tensorflow_variable(_compat.counter(self.inner_optimizer))
        steps.assign_add(tf.where(made, tf.cast(whole, steps.dtype), 0))
        return super()._finished(common, made, *args)
