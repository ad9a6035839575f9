"""The harness for tf_keras: the same runs with its variables and optimizers."""

from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
import tf_keras
from harness import ARGUMENTS, KINDS, Case, Run

import tf_lbopt
import tf_lbopt.tf_keras

KERAS_CLASSES = {info.name: info.cls for info in tf_lbopt.list_optimizers()}
NAMES = list(KERAS_CLASSES)
CASES = [
    Case(name, getattr(tf_lbopt.tf_keras, KERAS_CLASSES[name].__name__), ARGUMENTS[name])
    for name in NAMES
]
# What all have in common is tested on one of each kind.
KIND_CASES = [case for case in CASES if case.name in KINDS]
KERAS_CASES = {name: Case(name, KERAS_CLASSES[name], ARGUMENTS[name]) for name in NAMES}


def dynamic(optimizer: Any, scale: float = 64.0, growth: int = 2000) -> Any:
    return tf_keras.mixed_precision.LossScaleOptimizer(
        optimizer, initial_scale=scale, dynamic_growth_steps=growth
    )


def fixed(optimizer: Any, scale: float = 64.0) -> Any:
    return tf_keras.mixed_precision.LossScaleOptimizer(
        optimizer, dynamic=False, initial_scale=scale
    )


class TfKerasRun(Run):
    """`Run` with tf_keras; gradients of a scaled loss are unscaled in the step, as `fit` does."""

    # What the next steps pass to `apply_gradients`.
    options: ClassVar[dict[str, Any]] = {}

    def _variable(self, value: np.ndarray, dtype: str | None, name: str) -> tf.Variable:
        return tf.Variable(value, dtype=dtype, name=name)

    def _apply(self, gradients: list[Any]) -> None:
        if hasattr(self.optimizer, "get_unscaled_gradients"):
            scale = self.optimizer.loss_scale
            gradients = [None if g is None else g * scale for g in gradients]
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        self.optimizer.apply_gradients(
            list(zip(gradients, self.variables, strict=True)), **self.options
        )
