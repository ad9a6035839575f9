"""The one place that touches private names of tf_keras.

Each function says what it needs the private name for; all were checked on tf_keras 2.20.1.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow.python.trackable.data_structures import NoDependency

_LOSS_SCALE = "loss_scale"


def set_learning_rate(optimizer: tf_keras.optimizers.Optimizer, learning_rate: Any) -> None:
    """Gives a new optimizer its learning rate; every stock subclass does it so."""
    optimizer._learning_rate = optimizer._build_learning_rate(learning_rate)


def read_learning_rate(optimizer: tf_keras.optimizers.Optimizer) -> tf.Tensor:
    """The rate at the present `iterations`; of a schedule also what `learning_rate` then shows."""
    optimizer._compute_current_learning_rate()
    return tf.convert_to_tensor(optimizer.learning_rate)


def serialized_learning_rate(optimizer: tf_keras.optimizers.Optimizer) -> Any:
    """The learning rate as `get_config` has it."""
    rate = optimizer._serialize_hyperparameter(optimizer._learning_rate)
    return rate if isinstance(rate, dict) else float(rate)


def build(optimizer: tf_keras.optimizers.Optimizer, variables: Sequence[Any]) -> None:
    """The base class's part of `build`, which leaves it to subclasses to say that it is done."""
    tf_keras.optimizers.Optimizer.build(optimizer, variables)
    optimizer._built = True


def is_built(optimizer: tf_keras.optimizers.Optimizer) -> bool:
    """Whether `build` was called."""
    return getattr(optimizer, "_built", False)


def index_of(optimizer: tf_keras.optimizers.Optimizer, variable: Any) -> int | None:
    """The number of a variable, whichever replica's copy it is; `None` if it is unknown."""
    return optimizer._index_dict.get(optimizer._var_key(variable))


def untracked(value: Any) -> Any:
    """Set as an attribute, this is ``value``, left out of checkpoints (TensorFlow 2.20.0)."""
    return NoDependency(value)


def is_loss_scaled(optimizer: tf_keras.optimizers.Optimizer) -> bool:
    """Whether a `LossScaleOptimizer` was put around an optimizer."""
    return getattr(optimizer, "_is_wrapped_by_loss_scale_optimizer", False)


def is_loss_scaled_dynamically(optimizer: tf_keras.optimizers.Optimizer) -> bool:
    """Whether that one changes its scale: then it checks the gradients and may not apply them.

    It saves itself as the optimizer that it wraps, and its scale, if that is a variable, as an
    attribute of it.
    """
    return is_loss_scaled(optimizer) and optimizer._lookup_dependency(_LOSS_SCALE) is not None
