"""The tf_keras side of every optimizer: constructor, variables and calls of its base class.

An algorithm (`tf_lbopt.optimizers.algorithm`) combined with `LargeBatchOptimizer` is a new-style
tf_keras optimizer.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple, TypeVar

import keras
import tensorflow as tf
import tf_keras

from tf_lbopt import _validation
from tf_lbopt.aggregation.replicas import once_for_all_replicas
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.optimizers.base import LargeBatchOptimizer as Keras3Optimizer
from tf_lbopt.optimizers.hyperparameters import Arguments, LearningRate, checked_new_learning_rate
from tf_lbopt.optimizers.trained import Variable, path_of
from tf_lbopt.rules.norms import Gradient, compute_dtype
from tf_lbopt.tf_keras import _compat
from tf_lbopt.tf_keras.schedules import KerasSchedule

_Optimizer = TypeVar("_Optimizer", bound="LargeBatchOptimizer")


class LargeBatchOptimizer(Algorithm, tf_keras.optimizers.Optimizer):
    """Base of the tf_keras optimizers of this package.

    It differs from the base class of tf_keras in what happens between a replica's gradient and the
    update: one packed reduction with the sub-batches' statistics, accumulation under every
    strategy, schedules and `iterations` by update, and an update with a non-finite value on any
    replica in any micro-step discarded as a whole; so is one that would write such values (a
    learning rate that is NaN or negative, squares of gradients or steps that overflow).
    `skipped_updates`, an integer variable saved with the state, counts the discarded ones, and
    those of which a float16 weight that overflowed kept its old value.

    Under a `tf_keras.mixed_precision.LossScaleOptimizer` all of this holds too. That wrapper counts
    micro-steps as steps before it doubles its scale.
    """

    common_arguments: ClassVar = {
        name: default
        for name, default in Keras3Optimizer.common_arguments.items()
        if name != "loss_scale_factor"
    } | {"mesh": None}

    def __repr__(self) -> str:
        # What Keras 3 says that it can not interpret, where it is given one.
        return f"<{type(self).__name__}, an optimizer for tf_keras; for Keras 3 see tf_lbopt>"

    def _start(self, learning_rate: LearningRate, arguments: Arguments) -> None:
        mesh = arguments.pop("mesh")
        if mesh is not None:
            raise ValueError(
                f"`mesh` must be None: DTensor is not supported. "
                f"Received: {_validation.shown(mesh)}"
            )
        arguments["name"] = arguments["name"] or type(self).__name__
        steps = arguments.pop("gradient_accumulation_steps")
        # Its own field of that name is for updates that are compiled variable by variable.
        tf_keras.optimizers.Optimizer.__init__(self, **arguments, jit_compile=False)
        clips = [self.clipnorm, self.clipvalue, self.global_clipnorm]
        if sum(clip is not None for clip in clips) > 1:
            raise ValueError(
                "At most one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. "
                f"Received: clipnorm={self.clipnorm}, clipvalue={self.clipvalue}, "
                f"global_clipnorm={self.global_clipnorm}"
            )
        self.gradient_accumulation_steps = steps
        _compat.set_learning_rate(self, learning_rate)

    def _schedule(self, learning_rate: LearningRate) -> LearningRate:
        schedules = tf_keras.optimizers.schedules
        if isinstance(learning_rate, dict):
            return schedules.deserialize(learning_rate)
        if isinstance(learning_rate, schedules.LearningRateSchedule):
            return learning_rate
        return KerasSchedule(learning_rate)

    @classmethod
    def from_config(
        cls: type[_Optimizer], config: Arguments, custom_objects: dict[str, type] | None = None
    ) -> _Optimizer:
        """The optimizer that `get_config` describes."""
        # What tf_keras writes into every configuration is no argument of a constructor.
        config = {key: value for key, value in config.items() if key != "is_legacy_optimizer"}
        return super().from_config(config, custom_objects)

    # -- variables ---------------------------------------------------------------------------------

    @property
    def built(self) -> bool:  # type: ignore[override]  # only `build` changes it
        """Whether the slots exist."""
        return _compat.is_built(self)

    def build(self, var_list: Sequence[Variable]) -> None:
        """Creates the slots for a list of trainable variables, wherever it is called from.

        Raises:
            ValueError: The variables live under another strategy than the optimizer.
        """
        if self.built:
            return
        var_list = list(var_list)
        once_for_all_replicas(lambda: super(LargeBatchOptimizer, self).build(var_list))

    def _check_trainable(self, variable: Variable) -> None:
        if isinstance(variable, keras.Variable):
            raise TypeError(
                f"tf_lbopt.tf_keras.{type(self).__name__} trains variables of tf_keras; for Keras "
                f"3 see tf_lbopt. Received: {path_of(variable)}, a keras.Variable"
            )
        super()._check_trainable(variable)

    def _build_framework(self, variables: list[Variable]) -> None:
        _compat.build(self, variables)

    def _add_counter(self, name: str) -> tf.Variable:
        return self.add_variable((), tf.int64, name=name)

    def _add_slot(self, variable: Variable, name: str) -> tf.Variable:
        # In float32 for half-precision weights, whose own dtype has no room for a second moment.
        return self.add_variable(
            variable.shape, compute_dtype(variable.dtype), name=f"{name}/{path_of(variable)}"
        )

    def add_variable_from_reference(
        self,
        model_variable: Variable,
        variable_name: str,
        shape: tf.TensorShape | Sequence[int] | None = None,
        initial_value: tf.Tensor | tf.Variable | None = None,
    ) -> tf.Variable:
        """Adds a variable like a trainable one; in float32 for half precision, like a slot.

        Args:
            model_variable: The trainable one.
            variable_name: What its name begins with.
            shape: Its shape; that of the trainable one by default.
            initial_value: Its values, 0 by default.
        """
        if compute_dtype(model_variable.dtype) == model_variable.dtype:
            return super().add_variable_from_reference(
                model_variable, variable_name, shape, initial_value
            )
        variable = self._add_slot(model_variable, variable_name)
        if initial_value is not None:
            variable.assign(tf.cast(initial_value, variable.dtype))
        return variable

    @property
    def learning_rate(self) -> LearningRate:
        """The current learning rate; what is assigned is checked as in the constructor."""
        return tf_keras.optimizers.Optimizer.learning_rate.fget(self)

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        rate = self._rate_or_schedule(checked_new_learning_rate(learning_rate))
        tf_keras.optimizers.Optimizer.learning_rate.fset(self, rate)

    def _read_learning_rate(self) -> tf.Tensor:
        return _compat.read_learning_rate(self)

    # -- the update --------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Gradient | None, tf.Variable]],
        name: str | None = None,
        skip_gradients_aggregation: bool = False,
        experimental_aggregate_gradients: bool = True,
    ) -> tf.Variable:
        """Updates the variables, or, in mid-accumulation, adds to the accumulators.

        Args:
            grads_and_vars: ``(gradient, variable)`` pairs; a gradient is dense,
                ``tf.IndexedSlices`` or ``None``. Under a strategy each replica passes the gradient
                of its share of the loss, that is, of its mean loss divided by the number of
                replicas (as `fit` does; in tf_keras a custom loop always divides). With
                accumulation neither loss nor gradient is divided by the number of micro-steps.
            name: Not used.
            skip_gradients_aggregation: The gradients are already summed over the replicas; not for
                optimizers that look at sub-batches.
            experimental_aggregate_gradients: The reverse of it, as older optimizers call it.

        Returns:
            `iterations`.

        Raises:
            ValueError: No gradients at all, unknown variables, called in the cross-replica context,
                or gradients that are summed already where single ones are needed.
        """
        del name
        grads_and_vars = list(grads_and_vars)
        if any(isinstance(gradient, _Applied) for gradient, _ in grads_and_vars):
            return self.iterations
        self._apply(
            grads_and_vars,
            summed=skip_gradients_aggregation or not experimental_aggregate_gradients,
        )
        return self.iterations

    @tf.autograph.experimental.do_not_convert
    def aggregate_gradients(
        self, grads_and_vars: Iterable[tuple[Gradient | None, tf.Variable]]
    ) -> "list[tuple[Gradient | _Applied | None, tf.Variable]]":
        """Sums gradients over the replicas.

        Only a `LossScaleOptimizer` calls this: to check the sums, and to call `apply_gradients`
        with them. Statistics need gradients that are not summed, and an update that is discarded
        must be counted and empty the accumulators, while the wrapper just leaves out the call; so
        around this optimizer the update is made here, and what it gets is for the check alone.

        Args:
            grads_and_vars: ``(gradient, variable)`` pairs.

        Returns:
            Pairs of sums, or of what stands for them, and variables.
        """
        grads_and_vars = list(grads_and_vars)
        if not _compat.is_loss_scaled(self):
            return super().aggregate_gradients(grads_and_vars)
        finite = self._apply(grads_and_vars)
        check = tf.where(finite, 0.0, float("nan"))
        return [(_Applied(tf.identity(check)), variable) for _, variable in grads_and_vars]

    def _apply(
        self, grads_and_vars: list[tuple[Gradient | None, tf.Variable]], summed: bool = False
    ) -> tf.Tensor:
        """The update. Returns whether gradients were finite (true before it is due)."""
        if not grads_and_vars:
            return tf.constant(True)
        grads, variables = zip(*grads_and_vars, strict=True)
        self.build(variables)
        summed = summed and self._strategy.num_replicas_in_sync > 1
        if summed and (self.statistics or self._watch_of_norms is not None):
            raise ValueError(
                f"{type(self).__name__} looks at the gradients of single sub-batches, which are "
                "lost in sums over replicas. Leave the summation to it: call `apply_gradients` "
                "with every replica's own gradients. Received: skip_gradients_aggregation=True (or "
                "experimental_aggregate_gradients=False) on "
                f"{self._strategy.num_replicas_in_sync} replicas"
            )
        return self._prepared_update(grads, variables, after=self._take_back_step, summed=summed)()

    def _take_back_step(self, finite: tf.Tensor) -> None:
        # Where this wrapper finds a NaN it counts a step, which is none here; taken back before.
        if _compat.is_loss_scaled_dynamically(self):
            self.iterations.assign_sub(tf.cast(~finite, self.iterations.dtype))

    def finalize_variable_values(self, var_list: Sequence[tf.Variable]) -> None:
        """Puts averages in the place of the weights, if asked to; warns of a `fit` of no update."""
        self._warn_of_no_update()
        if self.use_ema:
            self._put_averages(var_list)

    # -- exclusions, configuration -----------------------------------------------------------------

    def _exclude_name(self, pattern: str) -> None:
        # tf_keras searches in the whole name, which is a path.
        self._decay_exclusion.add(pattern)

    def get_config(self) -> Arguments:
        """The arguments that make an equal optimizer, for Keras serialization."""
        return {
            **super().get_config(),
            "learning_rate": _compat.serialized_learning_rate(self),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }


class _Applied(NamedTuple):
    """Stands for a gradient that was applied already; of a type that threads do not lose.

    Attributes:
        check: 0, or NaN if the gradients were not finite.
    """

    check: tf.Tensor
