"""The one place that touches private names of tf_keras.

Each function says what it needs the private name for; all were checked on tf_keras 2.20.1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from tf_lbopt.aggregation.replicas import inside_scope, once_for_all_replicas
from tf_lbopt.optimizers.hyperparameters import LearningRate

_LOSS_SCALE = "loss_scale"


def set_learning_rate(
    optimizer: tf_keras.optimizers.Optimizer, learning_rate: LearningRate
) -> None:
    """Gives a new optimizer its learning rate; every stock subclass does it so."""
    optimizer._learning_rate = optimizer._build_learning_rate(learning_rate)


def read_learning_rate(optimizer: tf_keras.optimizers.Optimizer) -> tf.Tensor:
    """The rate at the present `iterations`; of a schedule also what `learning_rate` then shows."""
    optimizer._compute_current_learning_rate()
    return tf.convert_to_tensor(optimizer.learning_rate)


def serialized_learning_rate(
    optimizer: tf_keras.optimizers.Optimizer,
) -> dict[str, object] | float:
    """The learning rate as `get_config` has it."""
    rate = optimizer._serialize_hyperparameter(optimizer._learning_rate)
    return rate if isinstance(rate, dict) else float(rate)


def build(optimizer: tf_keras.optimizers.Optimizer, variables: Sequence[tf.Variable]) -> None:
    """The base class's part of `build`, which leaves it to subclasses to say that it is done."""
    tf_keras.optimizers.Optimizer.build(optimizer, variables)
    optimizer._built = True


def is_built(optimizer: tf_keras.optimizers.Optimizer) -> bool:
    """Whether `build` was called."""
    return getattr(optimizer, "_built", False)


def is_loss_scaled(optimizer: tf_keras.optimizers.Optimizer) -> bool:
    """Whether a `LossScaleOptimizer` was put around an optimizer."""
    return getattr(optimizer, "_is_wrapped_by_loss_scale_optimizer", False)


def is_loss_scaled_dynamically(optimizer: tf_keras.optimizers.Optimizer) -> bool:
    """Whether that one changes its scale: then it checks the gradients and may not apply them.

    It saves itself as the optimizer that it wraps, and its scale, if that is a variable, as an
    attribute of it.
    """
    return is_loss_scaled(optimizer) and optimizer._lookup_dependency(_LOSS_SCALE) is not None


# -- the trainer -----------------------------------------------------------------------------------


def let_optimizers_wrap_training() -> None:
    """Makes `tf_keras.Model` offer each training step to the optimizer, from now on.

    An optimizer that has ``wrap_training`` (or, if it has not, the one inside a LossScaleOptimizer)
    is given the model, its ``train_step`` and what makes a training function of a step; it returns
    the training function. Others are not affected.

    ``make_train_function`` is public, but that it calls ``train_step`` of the model that it is
    given, and stores its result in ``train_function``, is not promised.
    """
    original = tf_keras.Model.make_train_function
    if getattr(original, "offers_training", False):
        return

    def make_train_function(model: tf_keras.Model, force: bool = False) -> Callable[..., object]:
        wrap = _wrap_training_of(getattr(model, "optimizer", None))
        if wrap is None or (model.train_function is not None and not force):
            return original(model, force)
        model.train_function = wrap(
            model, model.train_step, lambda step: original(_WithStep(model, step), True)
        )
        return model.train_function

    make_train_function.__doc__ = original.__doc__
    make_train_function.offers_training = True  # type: ignore[attr-defined]
    tf_keras.Model.make_train_function = make_train_function


def _wrap_training_of(optimizer: object) -> Callable[..., Callable[..., object]] | None:
    inner = getattr(optimizer, "inner_optimizer", None)
    return getattr(optimizer, "wrap_training", None) or getattr(inner, "wrap_training", None)


class _WithStep:
    """A model with another ``train_step``; in all else it is that model."""

    def __init__(self, model: tf_keras.Model, train_step: Callable[..., object]):
        vars(self).update(_model=model, train_step=train_step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._model, name, value)


def build_by_shapes(model: tf_keras.Model, x: object, strategy: tf.distribute.Strategy) -> None:
    """Creates the variables of a model that is not built yet, from the shapes of its inputs.

    A model that is no graph of layers has none before its first call. Called by all replicas.
    """
    if model.built:
        return
    specs = tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.type_spec_from_value(leaf), x
    )

    def build() -> None:
        with inside_scope(strategy):
            call = tf.function(lambda inputs: model(inputs, training=False))
            call.get_concrete_function(specs)

    once_for_all_replicas(build)
