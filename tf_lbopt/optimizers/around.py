"""What the optimizers around another Keras optimizer have in common."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt import _compat, _validation, rules
from tf_lbopt.optimizers.base import LargeBatchOptimizer, check_settable
from tf_lbopt.optimizers.declared import REQUIRED
from tf_lbopt.optimizers.hyperparameters import Arguments, LearningRate, checked_new_learning_rate
from tf_lbopt.optimizers.trained import Variable, tensorflow_variable
from tf_lbopt.rules.bounds import squares_fit
from tf_lbopt.rules.norms import Gradient
from tf_lbopt.rules.writer import Writer


def require_same_strategy(
    outer: keras.optimizers.Optimizer,
    inner: keras.optimizers.Optimizer,
    strategy: tf.distribute.Strategy,
) -> None:
    """Raises if two optimizers were made under different strategies.

    Their counters and scales would be one value here and a value for each replica there.

    Raises:
        ValueError: They were; the message says what to do.
    """
    if not strategy.extended.variable_created_in_scope(tensorflow_variable(_compat.counter(inner))):
        raise ValueError(
            "`inner_optimizer` must be created under the same strategy as "
            f"{type(outer).__name__}: call both constructors inside `with strategy.scope():`. "
            f"Received: a {type(inner).__name__} from outside of it"
        )


def load_only_with(outer: Any, inner: keras.optimizers.Optimizer) -> None:
    """Has a stock optimizer's state not loaded where that of the one around it was refused.

    Keras loads an optimizer that is inside another apart, too, and of a stock one compares no more
    than the number of variables.
    """
    if isinstance(inner, LargeBatchOptimizer):
        return
    load = inner.load_own_variables

    def load_own_variables(store: Any) -> None:
        if not outer.refused_state:
            load(store)

    inner.load_own_variables = load_own_variables


def stock_squares_fit(
    gradients: Sequence[Gradient],
    norm_bounds: tf.Tensor,
    variables: Sequence[keras.Variable],
    longer: Sequence[tf.Tensor] | float = 1.0,
) -> tf.Tensor:
    """Whether the squares of gradients are finite in the dtype in which a stock optimizer has them.

    In float16 the norm of a large variable is often beyond 255 where the squares of all elements
    fit: there the greatest element is looked at.

    Args:
        gradients: One for each variable.
        norm_bounds: [n], what their norms do not exceed.
        variables: Theirs.
        longer: [n] or a number, how much longer than these the gradients of the update can be.

    Returns:
        A boolean scalar.
    """
    dtypes = [tf.as_dtype(variable.dtype) for variable in variables]
    if tf.float16 in dtypes:
        norm_bounds = tf.stack(
            [
                tf.cast(_greatest(gradient), norm.dtype) if dtype == tf.float16 else norm
                for gradient, norm, dtype in zip(
                    gradients, tf.unstack(norm_bounds, num=len(dtypes)), dtypes, strict=True
                )
            ]
        )
    return squares_fit(norm_bounds * longer, dtypes)


def _greatest(gradient: Gradient) -> tf.Tensor:
    """The greatest magnitude of an element; NaN if one is."""
    values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    return tf.reduce_max(tf.abs(values))


class WithInnerOptimizer:
    """Mix-in of an optimizer around another: one learning rate, one list of variables."""

    inner_optimizer: keras.optimizers.Optimizer

    @property
    def learning_rate(self) -> LearningRate:
        """The inner optimizer's current learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        check_settable(self.inner_optimizer, learning_rate)
        self.inner_optimizer.learning_rate = checked_new_learning_rate(learning_rate)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets all `variables`, the inner optimizer's among them.

        Raises:
            ValueError: It is not built, or the number of weights or the shape of one is wrong.
        """
        optimizer: Any = self
        variables = optimizer.variables
        expected = [tuple(variable.shape) for variable in variables]
        received = [tuple(np.shape(weight)) for weight in weights]
        if not optimizer.built or received != expected:
            raise ValueError(
                "`weights` must have a value of the same shape for each of the `variables` of a "
                f"built optimizer. Expected: {len(expected)} of shapes "
                f"{_validation.listed(expected)}{'' if optimizer.built else ', and `build`'}. "
                f"Received: {len(received)} of shapes {_validation.listed(received)}"
            )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)
        for own in (self, self.inner_optimizer):
            if isinstance(own, LargeBatchOptimizer):
                own.drop_accumulated()


class AroundOptimizer(WithInnerOptimizer, LargeBatchOptimizer):
    """Has the learning rate and the weight decay of its ``inner_optimizer``, its first argument."""

    arguments: ClassVar = {"inner_optimizer": REQUIRED}

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Excludes variables from the inner optimizer's weight decay.

        Keras's own optimizers do not keep this in their configuration: call it again for a model
        that was loaded.
        """
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def decays(self, variable: Variable) -> bool:
        """Whether the inner optimizer, if one of this package, decays a variable."""
        inner = self.inner_optimizer
        return not isinstance(inner, LargeBatchOptimizer) or inner.decays(variable)

    def adapts(self, variable: Variable) -> bool:
        """Whether the inner optimizer, if one of this package, adapts a variable's rate."""
        inner = self.inner_optimizer
        return not isinstance(inner, LargeBatchOptimizer) or inner.adapts(variable)

    def _set_up(self, values: Arguments) -> None:
        super()._set_up(values)
        require_same_strategy(self, self.inner_optimizer, self._strategy)
        load_only_with(self, self.inner_optimizer)

    @classmethod
    def rule_of(cls, values: Arguments) -> rules.Rule:
        """The inner optimizer's."""
        inner = values["inner_optimizer"]
        return inner.rule() if isinstance(inner, LargeBatchOptimizer) else _Stock(inner)

    @classmethod
    def from_config(
        cls, config: Arguments, custom_objects: dict[str, type] | None = None
    ) -> "AroundOptimizer":
        """The optimizer that `get_config` describes."""
        config = copy.deepcopy(config)  # stock optimizers write into theirs
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)


@dataclasses.dataclass(frozen=True)
class _Stock(rules.Rule):
    """A stock Keras optimizer as a rule: its slots and its rate are its own.

    What it does with the gradients is not known; it may keep their squares, in the dtype of the
    variables. Only these are checked, not its steps.
    """

    optimizer: keras.optimizers.Optimizer

    @property
    def separable(self) -> bool:
        """No: what it does with one variable may depend on the others."""
        return False

    def update(self, parameters: rules.Parameters, step: rules.Step) -> rules.Update:
        """One update by Keras's own code."""
        del step
        trained = _compat.trained_variables(self.optimizer)
        variables = [trained[index] for index in parameters.indices]
        gradients = parameters.gradients

        def write(writer: Writer) -> None:
            written = [tensorflow_variable(v) for v in (*variables, *self.optimizer.variables)]
            with writer.restoring(written):
                _compat.keras_update(self.optimizer, gradients, variables)

        return rules.Update(stock_squares_fit(gradients, parameters.norm_bounds, variables), write)
