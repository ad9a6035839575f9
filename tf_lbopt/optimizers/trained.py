"""The variables that an optimizer was built with, of either framework."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.norms import Gradient, compute_dtype

Variable: TypeAlias = keras.Variable | tf.Variable
Gradients: TypeAlias = Sequence[Gradient | None]
"""One for each variable of a call, `None` where there is none."""


def path_of(variable: Variable) -> str:
    """The path of a Keras variable, or the name of a TensorFlow one without its output number."""
    return getattr(variable, "path", None) or variable.name.split(":")[0]


def tensorflow_variable(variable: Variable) -> tf.Variable:
    """The TensorFlow variable in a Keras one (or the thing itself)."""
    return variable.value if isinstance(variable, keras.Variable) else variable


@dataclasses.dataclass(frozen=True)
class Trained:
    """What updates need of the variables that an optimizer was built with, by their numbers.

    A class of its own, so that Keras and TensorFlow do not track what is in it a second time.

    Attributes:
        variables: Those of the framework.
        targets: The TensorFlow variables in them.
        slots: By the slot's name, one for each variable.
        decayed: Whether weight decay applies to each.
        adapted: Whether layer-wise adaptation does.
        iterations: Counts the updates.
        skipped_updates: Counts those that were discarded.
        on_gpu: Whether the variables are on GPUs.
        dtypes: In which arithmetic on the variables is done.
        paths: Of the variables.
        numbers: Of the variables, by what `_compat.key_of` says.
    """

    variables: list[Variable]
    targets: list[tf.Variable]
    slots: dict[str, list[tf.Variable]]
    decayed: list[bool]
    adapted: list[bool]
    iterations: tf.Variable
    skipped_updates: tf.Variable
    on_gpu: bool
    dtypes: list[tf.DType] = dataclasses.field(init=False, default_factory=list)
    paths: list[str] = dataclasses.field(init=False, default_factory=list)
    numbers: dict[str, int] = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for number, variable in enumerate(self.variables):
            self.dtypes.append(compute_dtype(variable.dtype))
            self.paths.append(path_of(variable))
            self.numbers[_compat.key_of(variable)] = number
