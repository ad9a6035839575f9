"""Dynamic loss scaling that sees an overflow on every replica."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.aggregation.replicas import (
    PerReplica,
    inside_scope,
    on_each_replica,
    replica_context_of,
    sum_over_replicas,
)
from tf_lbopt.aggregation.sparse import divide
from tf_lbopt.optimizers.algorithm import build_at_first_call, check_floating
from tf_lbopt.optimizers.around import WithInnerOptimizer, stock_squares_fit
from tf_lbopt.optimizers.base import LargeBatchOptimizer
from tf_lbopt.optimizers.saved_state import SavedState
from tf_lbopt.optimizers.trained import Gradients, Variable
from tf_lbopt.rules.bounds import is_rate
from tf_lbopt.rules.norms import Gradient, all_finite, norms

# Beyond these a scale is no longer a scale: 0 and Inf would never be left again. And squares of
# gradients in its units, which VRGD takes, must be neither.
_LEAST_SCALE = 2.0**-40
_GREATEST_SCALE = 2.0**40


@keras.saving.register_keras_serializable(package="tf_lbopt")
class LossScaleOptimizer(SavedState, WithInnerOptimizer, keras.optimizers.LossScaleOptimizer):
    """Dynamic loss scaling for `mixed_float16`, right across replicas.

    The loss is multiplied by the scale and the gradients divided by it. A NaN or Inf on any one
    replica, in any micro-step, discards the whole update on all of them and halves the scale;
    `dynamic_growth_steps` updates in a row without one double it. (Keras's own class looks at
    replica 0 only.)

    `fit` multiplies the loss by itself. A custom loop does it by `scale_loss`; without, updates are
    2¹⁵ times too small under most optimizers, and nothing says so:

        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
            scaled_loss = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    Around an optimizer of this package the wrapper works under gradient accumulation too: the
    scale changes between updates, never within one. Around a stock Keras optimizer it guards
    every call, against gradients that are not finite or whose squares overflow and a learning rate
    that is none; not against steps that overflow.

    Args:
        inner_optimizer: The optimizer to wrap. Its `loss_scale_factor` is cleared.
        initial_scale: The first loss scale, > 0 and at most 2⁴⁰; it stays in [2⁻⁴⁰, 2⁴⁰]. Defaults
            to 2¹⁵.
        dynamic_growth_steps: Finite updates in a row before the scale doubles, ≥ 1. Defaults to
            2000.
        name: The optimizer's name.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the inner
            optimizer scales the loss itself or was created outside of the strategy's scope.

    Example:
        >>> optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=8.0)
        >>> w = keras.Variable([1.0])
        >>> optimizer.apply([keras.ops.convert_to_tensor([8.0])], [w])     # the gradient is 1
        >>> float(w.numpy()[0])
        0.5
        >>> optimizer.apply([keras.ops.convert_to_tensor([float("inf")])], [w])
        >>> float(w.numpy()[0]), float(optimizer.dynamic_scale.numpy())
        (0.5, 4.0)
        >>> int(optimizer.skipped_updates.numpy())
        1
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
    ):
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`inner_optimizer` must be a keras.optimizers.Optimizer, of Keras 3 (for tf_keras "
                "see tf_lbopt.tf_keras). "
                f"Received: inner_optimizer={_validation.shown(inner_optimizer)}"
            )
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "`inner_optimizer` must not scale the loss itself. "
                f"Received: {type(inner_optimizer).__name__}"
            )
        super().__init__(
            inner_optimizer,
            initial_scale=_validation.real(
                "initial_scale", initial_scale, low=0.0, low_open=True, high=_GREATEST_SCALE
            ),
            dynamic_growth_steps=_validation.integer(
                "dynamic_growth_steps", dynamic_growth_steps, low=1
            ),
            name=name,
        )
        self._let_checkpoints_say_whose()
        self._strategy = tf.distribute.get_strategy()
        self._tie_to_inner()
        # Keras creates these two in `build` and scales the loss by a constant before: a custom
        # loop traced unbuilt would keep that constant for ever.
        self.step_counter = self._add_counter("step_counter")
        self.dynamic_scale = self.add_variable(
            (),
            initializer=keras.initializers.Constant(self.initial_scale),
            dtype="float32",
            aggregation="only_first_replica",
            name="dynamic_scale",
        )
        if isinstance(inner_optimizer, LargeBatchOptimizer):
            inner_optimizer.expect_loss_scaling(right_across_replicas=True)
            self._own_skipped_updates = None
        else:
            self._own_skipped_updates = self._add_counter("skipped_updates")

    __repr__ = LargeBatchOptimizer.__repr__
    _add_counter = LargeBatchOptimizer._add_counter

    @property
    def skipped_updates(self) -> keras.Variable:
        """How many updates were discarded; an integer variable, saved with the state."""
        if self._own_skipped_updates is None:
            return self.inner_optimizer.skipped_updates
        return self._own_skipped_updates

    @property
    def accumulation_steps(self) -> int:
        """The inner optimizer's, if it is one of this package; what is assigned, too.

        Raises:
            ValueError: It is none, and a number is assigned.
        """
        return getattr(self.inner_optimizer, "accumulation_steps", 1)

    @accumulation_steps.setter
    def accumulation_steps(self, steps: int) -> None:
        if not isinstance(self.inner_optimizer, LargeBatchOptimizer):
            raise ValueError(
                "`accumulation_steps` needs an `inner_optimizer` of this package. Received: "
                f"accumulation_steps={_validation.shown(steps)} around a "
                f"{type(self.inner_optimizer).__name__}"
            )
        self.inner_optimizer.accumulation_steps = steps

    @property
    def iterations(self) -> keras.Variable:
        """The inner optimizer's (Keras's own class has counted apart before 3.9)."""
        return self.inner_optimizer.iterations

    def build(self, var_list: Sequence[Variable]) -> None:
        """Builds the inner optimizer for a list of trainable variables.

        Raises:
            TypeError: One is not of real floating-point numbers.
        """
        if self.built:
            return
        for variable in var_list:
            check_floating(self, variable)
        with inside_scope(self._strategy):
            self.inner_optimizer.build(var_list)
            super(keras.optimizers.LossScaleOptimizer, self).build(var_list)

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """The loss times the current scale, in float32 where the loss is of float16."""
        return keras.ops.multiply(loss, self.dynamic_scale)

    @tf.autograph.experimental.do_not_convert
    def apply(
        self, grads: Gradients, trainable_variables: Sequence[Variable] | None = None
    ) -> None:
        """Updates the variables with gradients of the scaled loss.

        Args:
            grads: One gradient per variable: dense, ``tf.IndexedSlices`` or ``None``.
            trainable_variables: The variables; by default those that the optimizer was built with.

        Raises:
            ValueError: As the inner optimizer's `apply`.
        """
        grads = list(grads)
        trainable_variables = build_at_first_call(self, trainable_variables, "trainable_variables")
        if isinstance(self.inner_optimizer, LargeBatchOptimizer):
            self.inner_optimizer.apply_scaled(
                grads,
                trainable_variables,
                loss_scale=lambda: tf.convert_to_tensor(self.dynamic_scale),
                after=self._adjust_scale,
            )
        else:
            self._apply_stock(grads, trainable_variables)

    def _apply_stock(
        self, grads: list[Gradient | None], trainable_variables: Sequence[Variable] | None
    ) -> None:
        context = replica_context_of(self._strategy)
        variables = trainable_variables or _compat.trained_variables(self.inner_optimizer)
        finite, sound = self._are_sound(grads, variables)
        flags = tf.cast(tf.stack([~finite, ~sound]), tf.float32)

        def apply_inner(local_grads: list[Gradient | None]) -> None:
            scale = tf.convert_to_tensor(self.dynamic_scale)
            unscaled = [
                # The gradient of a float8 scale is its next value.
                g if g is None or getattr(v, "overwrite_with_gradient", False) else divide(g, scale)
                for g, v in zip(local_grads, variables, strict=True)
            ]
            self.inner_optimizer.apply(unscaled, trainable_variables)

        def cross_replica(
            strategy: tf.distribute.Strategy, flags: PerReplica, values: list[PerReplica | None]
        ) -> None:
            anchor = self.dynamic_scale.value
            total = sum_over_replicas(strategy, [flags], [anchor])[0]
            finite, sound = tf.unstack(strategy.experimental_local_results(total)[0] == 0.0)

            def run() -> tf.Tensor:
                strategy.extended.call_for_each_replica(apply_inner, args=(values,))
                return tf.constant(True)

            def adjust(finite: tf.Tensor, sound: tf.Tensor) -> list[tf.Tensor]:
                self._adjust_scale(finite)
                self.skipped_updates.value.assign_add(tf.cast(~sound, tf.int64))
                return [sound]

            tf.cond(sound, run, lambda: tf.constant(True))
            on_each_replica(strategy, anchor, adjust, finite, sound)

        context.merge_call(cross_replica, args=(flags, grads))

    def _are_sound(
        self, grads: Gradients, variables: Sequence[Variable]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Whether this replica's gradients are finite, and whether an update can be made of them.

        It can not where squares of what they sum up to could overflow, or without a learning rate.
        """
        pairs = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
        if not pairs:
            raise ValueError("No gradients provided for any variable: all of `grads` are None.")
        local_norms = norms([gradient for gradient, _ in pairs])
        finite = all_finite(local_norms)
        factor = self._strategy.num_replicas_in_sync / tf.convert_to_tensor(self.dynamic_scale)
        gradients, variables = zip(*pairs, strict=True)
        longer = tf.stack([_repetitions(g, local_norms.dtype) for g in gradients])
        longer *= tf.cast(factor, longer.dtype)
        fits = stock_squares_fit(gradients, local_norms, variables, longer)
        # A MultiOptimizer has no rate of its own.
        for optimizer in getattr(self.inner_optimizer, "optimizers", [self.inner_optimizer]):
            fits &= is_rate(tf.convert_to_tensor(optimizer.learning_rate))
        return finite, finite & fits

    def _adjust_scale(self, finite: tf.Tensor) -> None:
        """Halves or doubles this replica's copy of the scale."""
        scale, counter = self.dynamic_scale.value, self.step_counter.value
        count = tf.where(finite, counter + 1, tf.zeros([], counter.dtype))
        grow = count >= self.dynamic_growth_steps
        factor = tf.where(finite, tf.where(grow, 2.0, 1.0), 0.5)
        scale.assign(tf.clip_by_value(scale * factor, _LEAST_SCALE, _GREATEST_SCALE))
        counter.assign(tf.where(grow, tf.zeros_like(count), count))


def _repetitions(gradient: Gradient, dtype: tf.DType) -> tf.Tensor:
    """How much longer a gradient can be than its values: all rows may belong to one index."""
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.ones([], dtype)
    return tf.cast(tf.maximum(tf.size(gradient.indices), 1), dtype)
