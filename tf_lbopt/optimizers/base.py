"""The Keras 3 side of every optimizer: constructor, variables and calls of Keras's base class.

An algorithm (`tf_lbopt.optimizers.algorithm`) combined with `LargeBatchOptimizer` is a Keras 3
optimizer.
"""

import functools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import keras
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.aggregation.replicas import inside_scope
from tf_lbopt.optimizers.algorithm import Algorithm, build_at_first_call
from tf_lbopt.optimizers.documentation import completed
from tf_lbopt.optimizers.hyperparameters import Arguments, LearningRate, checked_new_learning_rate
from tf_lbopt.optimizers.trained import Gradients, Variable, path_of, tensorflow_variable
from tf_lbopt.rules.norms import compute_dtype

OPTIMIZERS: dict[str, type["LargeBatchOptimizer"]] = {}
"""The optimizers by the names that recipes and configurations use."""

_Class = TypeVar("_Class", bound=type)


def optimizer(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: enters an optimizer in the table, under a lower-case name."""

    def enter(cls: _Class) -> _Class:
        OPTIMIZERS[name] = cls
        return registered(cls)

    return enter


def registered(cls: _Class) -> _Class:
    """Class decorator: completes the docstring, and has Keras save objects of the class."""
    of_base = cls.__bases__[-1].__doc__
    cls.__doc__ = completed(cls.__doc__, LargeBatchOptimizer.common_arguments, of_base)
    return keras.saving.register_keras_serializable(package="tf_lbopt")(cls)


def check_settable(optimizer: keras.optimizers.Optimizer, learning_rate: LearningRate) -> None:
    """Raises if an optimizer's learning rate is no number, and is to be set to one.

    Keras says so of a schedule, and calls `assign` of a plain callable.

    Raises:
        TypeError: It is.
    """
    if _compat.has_schedule(optimizer) and not callable(learning_rate):
        raise TypeError(
            f"This {type(optimizer).__name__} was created with a `LearningRateSchedule` or a "
            "callable as its `learning_rate`, which can not be set to a number (as "
            "ReduceLROnPlateau does). Make the optimizer with a number for that. "
            f"Received: learning_rate={_validation.shown(learning_rate)}"
        )


class LargeBatchOptimizer(Algorithm, keras.optimizers.Optimizer):
    """Base of the optimizers of this package.

    It differs from Keras's base class in what happens between a replica's gradient and the update:
    clipping after the reduction, accumulation under every strategy, schedules and `iterations`
    by update, repeated sparse indices merged, and an update with a non-finite value on any replica
    in any micro-step discarded as a whole; so is one that would write such values (a learning rate
    that is NaN or negative, squares of gradients or steps that overflow; of the steps of a stock
    optimizer inside a wrapper nothing is known). `skipped_updates`, an integer variable saved with
    the state, counts the discarded ones, and those of which a float16 weight that overflowed kept
    its old value.
    """

    common_arguments: ClassVar = {
        "name": None,
        "clipnorm": None,
        "clipvalue": None,
        "global_clipnorm": None,
        "use_ema": False,
        "ema_momentum": 0.99,
        "ema_overwrite_frequency": None,
        "loss_scale_factor": None,
        "gradient_accumulation_steps": None,
        "jit_compile": "auto",
    }

    steps_of_its_own: ClassVar[bool] = False
    """Whether it changes training steps, beyond the update that they end with."""

    def __repr__(self) -> str:
        # What tf_keras says that it can not interpret, where it is given one.
        return (
            f"<{type(self).__name__}, an optimizer for Keras 3; for tf_keras (which tf.keras is "
            "under TF_USE_LEGACY_KERAS=1) see tf_lbopt.tf_keras>"
        )

    def _start(self, learning_rate: LearningRate, arguments: Arguments) -> None:
        # Of Keras's own check 1 is none.
        steps = arguments.pop("gradient_accumulation_steps")
        keras.optimizers.Optimizer.__init__(self, learning_rate, **arguments)
        self.gradient_accumulation_steps = steps
        self._loss_scaled_from_outside = False
        # What averages lost when they were put into the place of half-precision weights. Not a
        # dictionary itself, which Keras and TensorFlow would track, and save what is in it.
        self._rounding_errors = types.SimpleNamespace(by_index={})

    def _schedule(self, learning_rate: LearningRate) -> LearningRate:
        if isinstance(learning_rate, dict):
            return keras.saving.deserialize_keras_object(learning_rate)
        return learning_rate

    # -- variables ---------------------------------------------------------------------------------

    def _add_counter(self, name: str) -> keras.Variable:
        return self.add_variable(
            shape=(), dtype="int64", aggregation="only_first_replica", name=name
        )

    def _build_framework(self, variables: list[Variable]) -> None:
        replicas = self._strategy.num_replicas_in_sync
        if replicas > 1 and not _compat.fit_divides_by_replicas():
            warnings.warn(
                f"`fit` of Keras {keras.__version__} does not divide the loss by the number of "
                f"replicas: its gradients are {replicas} times those of the mean loss, for every "
                "optimizer. Use Keras 3.8 or later, or a training loop of your own that divides.",
                stacklevel=2,
            )
        # Keras's accumulators are mirrored, ours are not: it must not make its own.
        steps = self.gradient_accumulation_steps
        self.__dict__["gradient_accumulation_steps"] = None
        try:
            keras.optimizers.Optimizer.build(self, variables)
        finally:
            self.__dict__["gradient_accumulation_steps"] = steps
        if self.use_ema:
            # Keras begins with zeros, of which more is left if `iterations` is set beforehand.
            for variable, average in zip(variables, _compat.averages(self), strict=True):
                value = tf.convert_to_tensor(tensorflow_variable(variable))
                average.assign(tf.cast(value, average.dtype))

    def _add_slot(self, variable: Variable, name: str) -> keras.Variable:
        return self.add_variable_from_reference(variable, name)

    def add_variable_from_reference(
        self,
        reference_variable: Variable,
        name: str | None = None,
        initializer: str | keras.initializers.Initializer = "zeros",
    ) -> keras.Variable:
        """Adds a variable like a trainable one, as Keras's own optimizers do.

        Half precision has no room for a second moment, nor for an average: it is in float32 then.

        Args:
            reference_variable: The trainable one.
            name: What is appended to its path.
            initializer: Of its values.
        """
        return self.add_variable(
            shape=reference_variable.shape,
            initializer=initializer,
            dtype=compute_dtype(reference_variable.dtype).name,
            name=f"{path_of(reference_variable).replace('/', '_')}_{name or 'var'}",
        )

    def _read_learning_rate(self) -> tf.Tensor:
        return tf.convert_to_tensor(self.learning_rate)

    @property
    def learning_rate(self) -> LearningRate:
        """The current learning rate; what is assigned is checked as in the constructor."""
        return keras.optimizers.Optimizer.learning_rate.fget(self)

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        check_settable(self, learning_rate)
        rate = self._rate_or_schedule(checked_new_learning_rate(learning_rate))
        keras.optimizers.Optimizer.learning_rate.fset(self, rate)

    @property
    def iterations(self) -> keras.Variable:
        """How many updates were made; skipped ones and micro-steps do not count."""
        return _compat.counter(self)

    # -- the update --------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def apply(
        self, grads: Gradients, trainable_variables: Sequence[Variable] | None = None
    ) -> None:
        """Updates the variables, or, in mid-accumulation, adds to the accumulators.

        Args:
            grads: One gradient per variable: dense, ``tf.IndexedSlices`` or ``None``. Under a
                strategy each replica passes the gradient of its share of the loss, that is, of
                its mean loss divided by the number of replicas (as `fit` does). A
                `keras.losses.Loss` object has divided already, a function has not. With
                accumulation neither loss nor gradient is divided by the number of micro-steps.
            trainable_variables: The variables; by default those that the optimizer was built with.

        Raises:
            ValueError: No gradients at all, unknown variables, one that is given twice, or called
                in the cross-replica context.
        """
        self._checked_update(grads, trainable_variables)()

    def apply_scaled(
        self,
        grads: Gradients,
        trainable_variables: Sequence[Variable] | None,
        loss_scale: Callable[[], tf.Tensor],
        after: Callable[[tf.Tensor], None],
    ) -> None:
        """`apply` for gradients of a scaled loss. See `tf_lbopt.LossScaleOptimizer`.

        Args:
            grads: As in `apply`, but multiplied by the loss scale.
            trainable_variables: As in `apply`.
            loss_scale: Reads the scale, on each replica.
            after: Told on each replica, once per update, whether it was finite.
        """
        self._checked_update(grads, trainable_variables, loss_scale, after)()

    def _checked_update(
        self,
        grads: Gradients,
        trainable_variables: Sequence[Variable] | None,
        loss_scale: Callable[[], tf.Tensor] | None = None,
        after: Callable[[tf.Tensor], None] | None = None,
    ) -> Callable[[], object]:
        grads = list(grads)
        if not grads:
            return lambda: None
        given = build_at_first_call(self, trainable_variables, "trainable_variables")
        variables = self.trained.variables if given is None else given
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must have one entry per trainable variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        if self._loss_scaled_from_outside:
            self._check_foreign_loss_scaling()
        if loss_scale is None and self.loss_scale_factor is not None:
            loss_scale = functools.partial(tf.constant, self.loss_scale_factor, tf.float32)
        return self._prepared_update(grads, variables, loss_scale, after)

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Puts their averages into the place of these variables, at the end of `fit`.

        Warns if that `fit` was too short for one update.

        Args:
            var_list: The variables that are trained; those frozen since are none of them, which
                Keras's own pairs wrongly.
        """
        self._warn_of_no_update()
        if self.use_ema and self.averages_are_swapped:
            self._keep_averages()
        elif self.use_ema:
            self._put_averages(var_list)

    def swap_averages(self) -> None:
        """Exchanges the weights and their averages, for `callbacks.SwapEMAWeights`.

        What an average in float32 has beyond the half precision of its weights is kept beside, and
        is there again after the next exchange.
        """
        if not self.averages_are_swapped:
            self._begin_averages()
        self.averages_are_swapped = not self.averages_are_swapped
        errors = self._rounding_errors.by_index
        with inside_scope(self._strategy):
            for index, (variable, average) in enumerate(self._weights_and_averages()):
                weights = tf.identity(variable)
                mean = tf.identity(average)
                variable.assign(tf.cast(mean, variable.dtype))
                average.assign(tf.cast(weights, average.dtype) + errors.pop(index, 0.0))
                if variable.dtype != average.dtype:
                    errors[index] = mean - tf.cast(tf.identity(variable), mean.dtype)

    def _restore_swapped(self, swapped: bool) -> None:
        super()._restore_swapped(swapped)
        self._rounding_errors.by_index.clear()

    def _keep_averages(self) -> None:
        """Makes the weights, which are averages now, the averages."""
        self.averages_are_swapped = False
        errors = self._rounding_errors.by_index
        with inside_scope(self._strategy):
            for index, (variable, average) in enumerate(self._weights_and_averages()):
                weights = tf.cast(tf.identity(variable), average.dtype)
                average.assign(weights + errors.pop(index, 0.0))

    # -- loss scaling from outside -----------------------------------------------------------------

    def expect_loss_scaling(self, right_across_replicas: bool) -> None:
        """Tells the optimizer that a wrapper scales the loss, and how well."""
        self._loss_scaled_from_outside = not right_across_replicas

    def __setattr__(self, name: str, value: object) -> None:
        if name == "loss_scale_factor":
            # The optimizers around this one give it no other sign of themselves.
            setter = _compat.caller_of_caller()
            if self.steps_of_its_own and _compat.is_multi_optimizer(setter):
                raise ValueError(
                    f"{type(self).__name__} can not be one of the optimizers of a "
                    "keras.optimizers.MultiOptimizer: it changes the whole training step, for all "
                    "of the model's variables. Received: MultiOptimizer"
                )
            scaled = isinstance(setter, keras.optimizers.LossScaleOptimizer)
            if "_loss_scaled_from_outside" in self.__dict__ and (value is not None or scaled):
                self.expect_loss_scaling(right_across_replicas=value is not None)
        if name == "gradient_accumulation_steps" and "_accumulation" in self.__dict__:
            raise AttributeError(
                "`gradient_accumulation_steps` must be given to the constructor, which makes the "
                "accumulators; what can be set later is `accumulation_steps`. "
                f"Received: {type(self).__name__}.{name} = "
                f"{_validation.shown(value)}"
            )
        super().__setattr__(name, value)

    def _check_foreign_loss_scaling(self) -> None:
        if self._strategy.num_replicas_in_sync > 1:
            self._loss_scaled_from_outside = False
            warnings.warn(
                "This optimizer is wrapped by Keras's LossScaleOptimizer, which looks for overflow "
                "on replica 0 only: after an overflow on another replica the update is skipped "
                "here, but the loss scale stays as it is. Use tf_lbopt.LossScaleOptimizer("
                f"{type(self).__name__}(...)) instead.",
                stacklevel=2,
            )
