"""What the optimizers around another Keras optimizer have in common."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from tf_lbopt import _compat, _validation, rules
from tf_lbopt.optimizers.base import LargeBatchOptimizer, check_settable
from tf_lbopt.optimizers.declared import REQUIRED
from tf_lbopt.optimizers.hyperparameters import Arguments, LearningRate, checked_new_learning_rate
from tf_lbopt.optimizers.saved_state import Store
from tf_lbopt.optimizers.trained import Variable, tensorflow_variable
from tf_lbopt.rules.bounds import squares_fit
from tf_lbopt.rules.norms import Gradient
from tf_lbopt.rules.writer import Writer

_Optimizer = TypeVar("_Optimizer", bound="WithInnerOptimizer")

_OF_PIPELINE = (
    "gradient_accumulation_steps",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "loss_scale_factor",
)


def require_new_and_plain(inner: keras.optimizers.Optimizer, refusal: str) -> None:
    """Raises if an inner optimizer is built, or has a setting that belongs to the pipeline.

    Args:
        inner: The optimizer.
        refusal: What is said of such a setting.

    Raises:
        ValueError: It is or has.
    """
    received = f"Received: {type(inner).__name__}"
    if inner.built:
        raise ValueError(f"`inner_optimizer` must not be built yet. {received}, built")
    for name in _OF_PIPELINE:
        if getattr(inner, name, None):
            value = getattr(inner, name)
            raise ValueError(f"`{name}` {refusal}. {received} with {name}={value!r}")


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
    """Mix-in of an optimizer around another: one learning rate, decay and list of variables."""

    inner_optimizer: keras.optimizers.Optimizer
    refused_state: bool
    _strategy: tf.distribute.Strategy

    def _tie_to_inner(self) -> None:
        """To be called in the constructor, when both optimizers are there.

        Under different strategies their counters and scales would be one value here and a value for
        each replica there. And a stock optimizer's state must not be loaded where that of the one
        around it was refused: Keras loads it apart, too, and compares no more than the number of
        variables.

        Raises:
            ValueError: They were made under different strategies; the message says what to do.
        """
        inner = self.inner_optimizer
        counter = tensorflow_variable(_compat.counter(inner))
        if not self._strategy.extended.variable_created_in_scope(counter):
            raise ValueError(
                "`inner_optimizer` must be created under the same strategy as "
                f"{type(self).__name__}: call both constructors inside `with strategy.scope():`. "
                f"Received: a {type(inner).__name__} from outside of it"
            )
        if isinstance(inner, LargeBatchOptimizer):
            return
        load = inner.load_own_variables

        def load_own_variables(store: Store) -> None:
            if not self.refused_state:
                load(store)

        inner.load_own_variables = load_own_variables

    @classmethod
    def from_config(
        cls: type[_Optimizer], config: Arguments, custom_objects: dict[str, type] | None = None
    ) -> _Optimizer:
        """The optimizer that `get_config` describes."""
        config = copy.deepcopy(config)  # stock optimizers write into theirs
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)  # type: ignore[call-arg]  # of the class with this mix-in

    @property
    def learning_rate(self) -> LearningRate:
        """The inner optimizer's current learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        check_settable(self.inner_optimizer, learning_rate)
        self.inner_optimizer.learning_rate = checked_new_learning_rate(learning_rate)

    def exclude_from_weight_decay(
        self, var_list: Sequence[Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from the inner optimizer's weight decay.

        Keras's own optimizers do not keep this in their configuration: call it again for a model
        that was loaded.
        """
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights: Sequence[ArrayLike]) -> None:
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

    @property
    def iterations(self) -> keras.Variable:
        """The inner optimizer's, by which its schedule and its bias corrections go."""
        return _compat.counter(self.inner_optimizer)

    def own_slots(self) -> tuple[str, ...]:
        """None: they are the inner optimizer's."""
        return ()

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
        self._tie_to_inner()

    @classmethod
    def rule_of(cls, values: Arguments) -> rules.Rule:
        """The inner optimizer's."""
        inner = values["inner_optimizer"]
        return inner.rule() if isinstance(inner, LargeBatchOptimizer) else _Stock(inner)


class PipelineAroundOptimizer(AroundOptimizer):
    """The pipeline of this package, with the update of another optimizer at its end.

    What belongs to the pipeline (accumulation, clipping, the average of the weights, the loss
    scale) is given to it and refused on the inner optimizer, so that nothing is done twice; rate
    and weight decay are the inner optimizer's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        for argument in ("learning_rate", "weight_decay", "exclude_from_weight_decay"):
            if kwargs.pop(argument, None) is not None:
                raise ValueError(
                    f"`{argument}` must be set on the `inner_optimizer`. "
                    f"Received it on {type(self).__name__}"
                )
        super().__init__(*args, **kwargs)

    def _set_up(self, values: Arguments) -> None:
        self._check_inner(values["inner_optimizer"])
        super()._set_up(values)

    def _check_inner(self, inner: object) -> None:
        if not isinstance(inner, keras.optimizers.Optimizer):
            raise TypeError(
                "`inner_optimizer` must be a keras.optimizers.Optimizer, of Keras 3 (for tf_keras "
                "see tf_lbopt.tf_keras). "
                f"Received: inner_optimizer={_validation.shown(inner)}"
            )
        own, received = type(self).__name__, f"Received: {type(inner).__name__}"
        if isinstance(inner, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "`inner_optimizer` must not scale the loss: put tf_lbopt.LossScaleOptimizer around "
                f"{own} instead. {received}"
            )
        if _compat.is_multi_optimizer(inner):
            raise ValueError(
                "`inner_optimizer` must be one optimizer, not several, which share out the "
                f"variables in a way of their own. {received}"
            )
        if getattr(inner, "statistics", ()):
            raise ValueError(
                "`inner_optimizer` must not look at sub-batches itself: it sees one gradient. "
                f"{received}"
            )
        if hasattr(inner, "inner_optimizer"):
            raise ValueError(
                "`inner_optimizer` must not be around another optimizer itself. "
                f"{received} around {type(inner.inner_optimizer).__name__}"
            )
        require_new_and_plain(inner, f"must be given to {own} and not to its `inner_optimizer`")

    @property
    def variables(self) -> list[keras.Variable]:
        """Its own variables and the inner optimizer's."""
        return [*super().variables, *self.inner_optimizer.variables]

    def _create_variables(self, variables: list[Variable]) -> None:
        self.inner_optimizer.build(variables)
        super()._create_variables(variables)
        if isinstance(self.inner_optimizer, LargeBatchOptimizer):
            self.trained.slots.update(self.inner_optimizer.trained.slots)

    def get_config(self) -> Arguments:
        """The arguments that make an equal optimizer, for Keras serialization."""
        config = super().get_config()
        del config["learning_rate"]
        config["inner_optimizer"] = keras.saving.serialize_keras_object(self.inner_optimizer)
        return config


@dataclasses.dataclass(frozen=True)
class _Stock(rules.Rule):
    """A stock Keras optimizer as a rule: its slots and its rate are its own.

    What it does with the gradients is not known; it may keep their squares, in the dtype of the
    variables. Only these are checked, not its steps.
    """

    separable = False  # what it does with one variable may depend on the others

    optimizer: keras.optimizers.Optimizer

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
