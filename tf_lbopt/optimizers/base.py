"""The Keras 3 side of every optimizer: arguments, variables, configuration.

What an optimizer computes is its rule (`tf_lbopt.rules`), how gradients reach it is the road
(`tf_lbopt.distribution`); a subclass here adds a constructor, `rule` and `get_config`.
"""

import abc
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.distribution.accumulation import Accumulation
from tf_lbopt.distribution.replicas import inside_scope, once_for_all_replicas
from tf_lbopt.distribution.road import Arrival, Clip, Destination, travel
from tf_lbopt.optimizers.exclusion import Exclusion, listed, path_of, tensorflow_variable
from tf_lbopt.rules.norms import Gradient, compute_dtype
from tf_lbopt.rules.rule import Layer, Rule, Step

_ACCUMULATION_KEY = "accumulation"

_COMMON_ARGUMENTS = """name: The optimizer's name. Defaults to the class's, made unique.
        clipnorm: Greatest norm of one variable's mean gradient (clipped after the reduction over
            replicas and micro-steps). At most one of the three clips can be set.
        clipvalue: Greatest magnitude of one element of the mean gradient.
        global_clipnorm: Greatest norm of the mean gradient of all variables together.
        use_ema: Whether to keep an exponential moving average of the weights, which `fit` puts in
            their place at its end. Averages once per update.
        ema_momentum: Momentum of that average. Defaults to 0.99.
        ema_overwrite_frequency: Overwrite the weights by their average every so many updates.
        loss_scale_factor: Constant to multiply the loss by; taken out of the gradients again.
        gradient_accumulation_steps: Micro-steps (calls) per update, at least 2, or `None`. Works
            under every strategy; schedules and `iterations` count updates."""


class LargeBatchOptimizer(keras.optimizers.Optimizer):
    """Base of the optimizers of this package.

    It differs from Keras's base class in what happens between a replica's gradient and the update:
    clipping after the reduction, accumulation under every strategy, schedules and `iterations`
    by update, repeated sparse indices merged, and an update with a non-finite value on any replica
    in any micro-step discarded as a whole. `skipped_updates`, an integer variable saved with the
    state, counts the discarded ones.

    Args:
        learning_rate: A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments.
        weight_decay: Non-negative float or `None`; what it means is the algorithm's.
        exclude_from_weight_decay: Variables, or regexes over the variable path, that do not decay.
        **kwargs: The other arguments of Keras's optimizers.
    """

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the variables kept for each trainable variable."""

    statistics: ClassVar[tuple[str, ...]] = ()
    """What must be known of the sub-batches beyond their mean gradient."""

    gradient_accumulation_steps: int | None

    def __init__(
        self,
        learning_rate: Any,
        *,
        weight_decay: float | None = None,
        exclude_from_weight_decay: Sequence[Any] | None = None,
        **kwargs: Any,
    ):
        for argument in ("clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor"):
            if argument in kwargs:
                kwargs[argument] = _validation.real(
                    argument, kwargs[argument], low=0.0, low_open=True, optional=True
                )
        if "gradient_accumulation_steps" in kwargs:
            kwargs["gradient_accumulation_steps"] = _validation.integer(
                "gradient_accumulation_steps",
                kwargs["gradient_accumulation_steps"],
                low=2,
                optional=True,
            )
        _check_averaging(kwargs)
        super().__init__(_checked_learning_rate(learning_rate), **kwargs)
        # Not handed to Keras's base class, which would apply it a second time, decoupled.
        self.weight_decay = _validation.real("weight_decay", weight_decay, low=0.0, optional=True)
        self._decay_exclusion = Exclusion("exclude_from_weight_decay", exclude_from_weight_decay)
        self._decay_excluded_by_argument = exclude_from_weight_decay is not None
        self.skipped_updates = self.add_variable(
            shape=(),
            dtype="int64",
            aggregation="only_first_replica",
            name="skipped_updates",
        )
        self._strategy = tf.distribute.get_strategy()
        self._slots: dict[str, list[keras.Variable]] = {}
        self._loss_scaled_from_outside = False
        self._accumulation = (
            Accumulation(
                self._strategy,
                self.gradient_accumulation_steps,
                self.statistics,
            )
            if self.gradient_accumulation_steps
            else None
        )

    @abc.abstractmethod
    def rule(self) -> Rule:
        """The algorithm with the current hyper-parameters."""

    def slot_names(self) -> tuple[str, ...]:
        """The slots that this configuration of the rule keeps."""
        return self.slots

    # -- variables ---------------------------------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the slots (and accumulators) for a list of trainable variables.

        Raises:
            ValueError: The variables live under another strategy than the optimizer, or are
                overwritten by their gradients (float8 scales).
        """
        if self.built:
            return
        variables = list(variables)
        for variable in variables:
            self._check_trainable(variable)
        with inside_scope(self._strategy):
            self._create_variables(variables)

    def _create_variables(self, variables: list[Any]) -> None:
        # Keras's accumulators are mirrored, ours are not: it must not make its own.
        steps, self.gradient_accumulation_steps = self.gradient_accumulation_steps, None
        try:
            super().build(variables)
        finally:
            self.gradient_accumulation_steps = steps
        self._slots = {name: [] for name in self.slot_names()}
        for variable in variables:
            for name, slots in self._slots.items():
                slots.append(self._add_slot(variable, name))

    def _add_slot(self, variable: Any, name: str) -> keras.Variable:
        # In float32 for half-precision weights, whose own dtype has no room for a second moment.
        with self._strategy.extended.colocate_vars_with(tensorflow_variable(variable)):
            return self.add_variable(
                shape=variable.shape,
                dtype=compute_dtype(variable.dtype).name,
                name=f"{path_of(variable).replace('/', '_')}_{name}",
            )

    def _check_trainable(self, variable: Any) -> None:
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                f"{type(self).__name__} can not train variables that are overwritten by their "
                f"gradients (float8 scales). Received: {path_of(variable)}"
            )
        if not self._strategy.extended.variable_created_in_scope(tensorflow_variable(variable)):
            raise ValueError(
                f"{type(self).__name__} must be created under the strategy of the variables that "
                "it trains: call its constructor inside `with strategy.scope():`. Received: the "
                f"variable {path_of(variable)}, which was not created under the optimizer's "
                f"strategy ({type(self._strategy).__name__})."
            )

    @property
    def iterations(self) -> keras.Variable:
        """How many updates were made; skipped ones and micro-steps do not count."""
        return self._iterations

    # -- the update --------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Updates the variables, or, in mid-accumulation, adds to the accumulators.

        Args:
            grads: One gradient per variable: dense, ``tf.IndexedSlices`` or ``None``. Under a
                strategy each replica passes the gradient of its share of the loss, that is, of
                its mean loss divided by the number of replicas (as `fit` does).
            trainable_variables: The variables; by default those that the optimizer was built with.

        Raises:
            ValueError: No gradients at all, unknown variables, or called in the cross-replica
                context.
        """
        self.apply_scaled(grads, trainable_variables)

    def apply_scaled(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any] | None = None,
        loss_scale: Callable[[], tf.Tensor] | None = None,
        after: Callable[[tf.Tensor], None] | None = None,
    ) -> None:
        """`apply` for gradients of a scaled loss. See `tf_lbopt.LossScaleOptimizer`.

        Args:
            grads: As in `apply`, but multiplied by the loss scale.
            trainable_variables: As in `apply`.
            loss_scale: Reads the scale, on each replica; default `loss_scale_factor`.
            after: Told on each replica, once per update, whether it was finite.
        """
        grads = list(grads)
        if not grads:
            return
        given = trainable_variables
        variables = list(self._trainable_variables if given is None else given)
        if not self.built:
            if given is None:
                raise ValueError(
                    "`trainable_variables` must be given to the first call, or the optimizer built "
                    "before by `optimizer.build(trainable_variables)`. Received: None"
                )
            once_for_all_replicas(lambda: self.build(variables))
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must have one entry per trainable variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        self._check_known(variables)
        self._warn_of_foreign_loss_scaling()
        pairs = _without_missing(grads, variables)
        if loss_scale is None and self.loss_scale_factor is not None:
            loss_scale = self._constant_loss_scale
        travel(
            [gradient for gradient, _ in pairs],
            [self._get_variable_index(variable) for _, variable in pairs],
            [tensorflow_variable(variable) for _, variable in pairs],
            Destination(
                apply=self._apply_on_replica,
                discard=self._discard_on_replica,
                prepare=lambda: tf.convert_to_tensor(self.learning_rate),
                statistics=self.statistics,
                loss_scale=loss_scale,
                after=after,
            ),
            anchor=self._iterations.value,
            clip=Clip(self.clipnorm, self.clipvalue, self.global_clipnorm),
            accumulation=self._accumulation,
            gradient_norms=self._gradient_norms([variable for _, variable in pairs], loss_scale),
        )

    def _gradient_norms(
        self, variables: Sequence[Any], loss_scale: Callable[[], tf.Tensor] | None
    ) -> Sequence[tf.Tensor] | None:
        """What stands for the norms of this replica's gradients in the mean norm, in their units.

        `None` for the norms themselves.
        """
        del variables, loss_scale
        return None

    def _apply_on_replica(self, arrival: Arrival) -> None:
        layers = [
            Layer(
                index=index,
                variable=tensorflow_variable(self._trainable_variables[index]),
                gradient=gradient,
                gradient_norm=norm,
                slots=self._slots_of(index),
                decayed=self.decays(self._trainable_variables[index]),
                adapted=self.adapts(self._trainable_variables[index]),
                moments=moments,
                mean_norm=mean_norm,
            )
            for index, gradient, norm, moments, mean_norm in zip(
                arrival.indices,
                arrival.gradients,
                arrival.norms,
                arrival.moments,
                arrival.mean_norms,
                strict=True,
            )
        ]
        step = Step(arrival.prepared, tf.convert_to_tensor(self._iterations))
        self.rule().update(layers, step)
        for index in arrival.indices:
            variable = self._trainable_variables[index]
            constraint = getattr(variable, "constraint", None)
            if constraint is not None:
                target = tensorflow_variable(variable)
                target.assign(constraint(tf.convert_to_tensor(target)))
        if self.use_ema:
            self._average_on_replica()
        self._iterations.value.assign_add(1)

    def _slots_of(self, index: int) -> dict[str, tf.Variable]:
        return {name: slots[index].value for name, slots in self._slots.items()}

    def _discard_on_replica(self) -> None:
        self.skipped_updates.value.assign_add(1)

    def _average_on_replica(self) -> None:
        iterations = tf.convert_to_tensor(self._iterations)
        pairs = [
            (tensorflow_variable(variable), average.value)
            for variable, average in zip(
                self._trainable_variables, self._model_variables_moving_average, strict=True
            )
        ]
        for variable, average in pairs:
            momentum = tf.where(iterations == 0, 0.0, self.ema_momentum)
            momentum = tf.cast(momentum, variable.dtype)
            average.assign(momentum * average + (1 - momentum) * variable)
        if self.ema_overwrite_frequency:

            def overwrite() -> tf.Tensor:
                for variable, average in pairs:
                    variable.assign(average)
                return tf.constant(True)

            due = (iterations + 1) % self.ema_overwrite_frequency == 0
            tf.cond(due, overwrite, lambda: tf.constant(True))

    def _check_known(self, variables: Sequence[Any]) -> None:
        for variable in variables:
            if self._var_key(variable) not in self._trainable_variables_indices:
                raise ValueError(
                    f"Unknown variable: {path_of(variable)}. {type(self).__name__} can only be "
                    "called for the variables it was built with; create a new optimizer for others."
                )

    def _constant_loss_scale(self) -> tf.Tensor:
        return tf.constant(self.loss_scale_factor, tf.float32)

    # -- loss scaling from outside -----------------------------------------------------------------

    def expect_loss_scaling(self, right_across_replicas: bool) -> None:
        """Tells the optimizer that a wrapper scales the loss, and how well."""
        self._loss_scaled_from_outside = not right_across_replicas

    def __setattr__(self, name: str, value: Any) -> None:
        # Keras's LossScaleOptimizer gives no other sign of itself to the optimizer it wraps.
        if name == "loss_scale_factor" and "_loss_scaled_from_outside" in self.__dict__:
            self.expect_loss_scaling(right_across_replicas=value is not None)
        super().__setattr__(name, value)

    def _warn_of_foreign_loss_scaling(self) -> None:
        if self._loss_scaled_from_outside and self._strategy.num_replicas_in_sync > 1:
            self._loss_scaled_from_outside = False
            warnings.warn(
                "This optimizer is wrapped by Keras's LossScaleOptimizer, which looks for overflow "
                "on replica 0 only: after an overflow on another replica the update is skipped "
                "here, but the loss scale stays as it is. Use tf_lbopt.LossScaleOptimizer("
                f"{type(self).__name__}(...)) instead.",
                stacklevel=2,
            )

    # -- exclusions --------------------------------------------------------------------------------

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from weight decay, in Keras's way; kept by `get_config`.

        Args:
            var_list: Variables.
            var_names: Regexes that are searched for in the variables' own names (not paths).

        Raises:
            ValueError: The optimizer is built already.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay()` must be called before the optimizer is built."
            )
        for variable in listed("var_list", var_list):
            if isinstance(variable, str):
                raise TypeError(
                    "`var_list` must be a list of variables; names go into `var_names`. "
                    f"Received an entry of type str: {variable!r}"
                )
            self._decay_exclusion.add(variable)
        for name in listed("var_names", var_names):
            self._decay_exclusion.add_name(name)
        self._decay_excluded_by_argument = True

    def decays(self, variable: Any) -> bool:
        """Whether weight decay applies to a variable."""
        return variable not in self._decay_exclusion

    def adapts(self, variable: Any) -> bool:
        """Whether layer-wise adaptation applies to a variable."""
        del variable
        return True

    # -- configuration and state -------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        config = super().get_config()
        config["exclude_from_weight_decay"] = (
            self._decay_exclusion.config() if self._decay_excluded_by_argument else None
        )
        return config

    def save_own_variables(self, store: Any) -> None:
        """Keras saving: all variables and, in mid-accumulation, every replica's sums."""
        super().save_own_variables(store)
        if self._accumulation is not None:
            sums = self._accumulation.serialize()
            if sums:
                store[_ACCUMULATION_KEY] = np.frombuffer(sums, np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Keras loading, of what `save_own_variables` saved."""
        keys = list(store.keys())
        super().load_own_variables({key: store[key] for key in keys if key != _ACCUMULATION_KEY})
        if self._accumulation is not None:
            sums = np.asarray(store[_ACCUMULATION_KEY]) if _ACCUMULATION_KEY in keys else None
            self._accumulation.deserialize(b"" if sums is None else sums.tobytes())


class LayerwiseOptimizer(LargeBatchOptimizer):
    """Base of optimizers with a trust ratio per layer.

    Args:
        learning_rate: As in `LargeBatchOptimizer`.
        exclude_from_layer_adaptation: Variables, or regexes over the variable path, whose trust
            ratio is 1. `None` means those excluded from weight decay; `[]` means none.
        **kwargs: As in `LargeBatchOptimizer`.
    """

    def __init__(
        self,
        learning_rate: Any,
        *,
        exclude_from_layer_adaptation: Sequence[Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(learning_rate, **kwargs)
        self._adaptation_exclusion = (
            None
            if exclude_from_layer_adaptation is None
            else Exclusion("exclude_from_layer_adaptation", exclude_from_layer_adaptation)
        )

    def adapts(self, variable: Any) -> bool:
        """Whether the trust ratio applies to a variable."""
        if self._adaptation_exclusion is None:
            return self.decays(variable)
        return variable not in self._adaptation_exclusion

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        config = super().get_config()
        config["exclude_from_layer_adaptation"] = (
            None if self._adaptation_exclusion is None else self._adaptation_exclusion.config()
        )
        return config


def with_common_arguments(cls: type) -> type:
    """Class decorator: writes the arguments common to all optimizers into the docstring."""
    cls.__doc__ = (cls.__doc__ or "").replace("{common_arguments}", _COMMON_ARGUMENTS)
    return cls


def _checked_learning_rate(learning_rate: Any) -> Any:
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule) or callable(
        learning_rate
    ):
        return learning_rate
    if isinstance(learning_rate, dict):  # a serialized schedule, inside from_config
        return keras.saving.deserialize_keras_object(learning_rate)
    try:
        return _validation.real("learning_rate", learning_rate, low=0.0)
    except TypeError as error:
        raise TypeError(
            "`learning_rate` must be a real number >= 0, a LearningRateSchedule or a callable "
            f"without arguments. Received: learning_rate={learning_rate!r} "
            f"(of type {type(learning_rate).__name__})"
        ) from error


def _check_averaging(kwargs: dict[str, Any]) -> None:
    _validation.boolean("use_ema", kwargs.get("use_ema", False))
    _validation.real("ema_momentum", kwargs.get("ema_momentum", 0.99), low=0.0, high=1.0)
    _validation.integer(
        "ema_overwrite_frequency", kwargs.get("ema_overwrite_frequency"), low=1, optional=True
    )


def _without_missing(grads: Sequence[Any], variables: Sequence[Any]) -> list[tuple[Gradient, Any]]:
    pairs = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
    if not pairs:
        raise ValueError(
            "No gradients provided for any variable: all of `grads` are None. "
            f"Received variables: {[path_of(v) for v in variables]}"
        )
    missing = [path_of(v) for g, v in zip(grads, variables, strict=True) if g is None]
    if missing:
        warnings.warn(
            f"Gradients do not exist for variables {missing}; they are left unchanged.",
            stacklevel=4,
        )
    return pairs
