"""What the arguments of the optimizers are: by name, since a name means the same in all of them."""

import functools
import numbers
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt import _validation

Arguments: TypeAlias = dict[str, Any]
"""Arguments of a constructor by name, as a configuration has them."""
LearningRate: TypeAlias = (
    float
    | tf.Tensor
    | keras.optimizers.schedules.LearningRateSchedule
    | Callable[[], float]
    | Callable[[tf.Variable], tf.Tensor]  # a schedule of tf_keras
)


class _Kind(NamedTuple):
    """What values an argument has.

    Attributes:
        type: Of values that are not ``None``, as configurations declare it.
        check: Called as ``check(name, value)``, for arguments that may be ``None`` with
            ``optional=True``; returns the value, or raises.
    """

    type: type
    check: Callable[..., object]


def checked(name: str, value: object, default: object) -> object:
    """Checks the value of an argument and returns it, as a float where it is a real number.

    Args:
        name: Of the argument. What is not in the table of this module passes.
        value: What the constructor was given.
        default: ``None`` if the argument may be left out.

    Raises:
        TypeError, ValueError: It is of the wrong type or outside its range.
    """
    if name not in _KINDS:
        return value
    options = {"optional": True} if default is None else {}
    return _KINDS[name].check(name, value, **options)


def type_of(name: str, default: object) -> type | types.UnionType:
    """The type of an argument, as a configuration declares it."""
    kind = _KINDS[name].type
    return kind | None if default is None or name == "weight_decay" else kind


def checked_learning_rate(name: str, value: object, optional: bool = False) -> Any:
    """Checks a learning rate; schedules, serialized ones and callables pass.

    Raises:
        TypeError: It is none of these and not a real number.
        ValueError: It is NaN, infinite or negative.
    """
    if callable(value) or isinstance(value, dict):
        return value
    try:
        return _validation.real(name, value, low=0.0, optional=optional)
    except TypeError as error:
        hint = ""
        if isinstance(value, (list, tuple, Iterator)):
            hint = " (What is to be trained is told by `compile`, `build` or `apply`.)"
        raise TypeError(
            f"`{name}` must be a real number >= 0, a LearningRateSchedule or a callable without "
            f"arguments.{hint} Received: {name}={_validation.shown(value)} "
            f"(of type {type(value).__name__})"
        ) from error


def checked_new_learning_rate(learning_rate: LearningRate) -> LearningRate:
    """`checked_learning_rate` of what is assigned to an optimizer that exists.

    That may also be an array, a tensor or a variable; in a graph only the update can look at it.
    """
    if not isinstance(learning_rate, numbers.Real) and hasattr(learning_rate, "shape"):
        if tf.inside_function():
            return learning_rate
        array = np.asarray(learning_rate)
        learning_rate = array.item() if array.size == 1 else learning_rate
    return checked_learning_rate("learning_rate", learning_rate)


def _real(**bounds: Any) -> _Kind:
    return _Kind(float, functools.partial(_validation.real, **bounds))


def _integer(low: int) -> _Kind:
    return _Kind(int, functools.partial(_validation.integer, low=low))


def _choice(*choices: str) -> _Kind:
    return _Kind(str, functools.partial(_validation.choice, choices=choices))


_RATE = _Kind(float, checked_learning_rate)
_POSITIVE = _real(low=0.0, low_open=True)
_BELOW_ONE = _real(low=0.0, high=1.0, high_open=True)
_BOOLEAN = _Kind(bool, _validation.boolean)
_EXCLUSION = _Kind(list[str], lambda name, value, optional: value)  # see `Exclusion`

_KINDS = {
    "beta_1": _BELOW_ONE,
    "beta_2": _BELOW_ONE,
    "beta_3": _BELOW_ONE,
    "clipnorm": _POSITIVE,
    "clipvalue": _POSITIVE,
    "default_trust_ratio": _POSITIVE,
    "ema_momentum": _real(low=0.0, high=1.0),
    "ema_overwrite_frequency": _integer(low=1),
    "epsilon": _real(low=0.0),
    "exclude_from_layer_adaptation": _EXCLUSION,
    "exclude_from_weight_decay": _EXCLUSION,
    "extrapolation_rate": _RATE,
    "gamma": _real(low=0.0, low_open=True, high=1.0),
    "global_clipnorm": _POSITIVE,
    "gradient_accumulation_steps": _integer(low=1),
    "jit_compile": _Kind(bool, _validation.boolean_or_auto),
    "learning_rate": _RATE,
    "loss_scale_factor": _POSITIVE,
    "max_trust_ratio": _POSITIVE,
    "momentum": _BELOW_ONE,
    "nesterov": _BOOLEAN,
    "noise": _choice("past_gradient", "stochastic_noise", "gaussian", "uniform"),
    "noise_seed": _integer(low=0),
    "norm_estimator": _choice("sub_batch", "per_example"),
    "shared_noise": _BOOLEAN,
    "sub_batches": _integer(low=1),
    "trust_coefficient": _POSITIVE,
    "trust_ratio_denominator": _choice("norm_of_sum", "sum_of_norms"),
    "use_ema": _BOOLEAN,
    "weight_decay": _real(low=0.0, optional=True),  # whatever its default is
}
