"""Updates whose result is known in float64: optimizers, their arguments, inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import tf_lbopt
from benchmarks.program_files import Argument, Terms
from benchmarks.references import lamb, mean_gradients, reference, sgd
from benchmarks.shapes import Shape

OURS = {info.name: info for info in tf_lbopt.list_optimizers()}
_LARS = {"learning_rate": 0.5, "trust_coefficient": 0.1}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    **{name: {"learning_rate": 0.01} for name in OURS},
    "sngm": {"learning_rate": 10.0},
    **dict.fromkeys(("lars", "vr_lars", "clars"), _LARS),
}
_KEYS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "keras_sgd": (keras.optimizers.SGD, sgd, {"learning_rate": 0.01, "momentum": 0.9}),
    "keras_lamb": (keras.optimizers.Lamb, lamb, {"learning_rate": 0.01, "epsilon": 1e-7}),
}
NAMES = (*_KEYS, *OURS)


def create(name: str, **more: Any) -> Any:
    """An optimizer.

    Args:
        name: One of `NAMES`.
        **more: Other arguments.
    """
    if name in _KEYS:
        cls, _, arguments = _KEYS[name]
        return cls(**arguments, **more)
    # Without weight decay, as those of Keras; AdamW has it by default.
    return OURS[name].cls(**_ARGUMENTS[name], **{"weight_decay": None, **more})


def weight(number: int, shape: Shape) -> Argument:
    """The weight of this number."""
    return Argument(f"weight_{number}", "weight", shape, "float32", ((3 * number, -0.05, 0.05),))


def gradient(number: int, shape: Shape, sub_batch: int) -> Argument:
    """A sub-batch's gradient of this weight.

    Layers differ in size. Any two sub-batches differ by much, so that no variance is one of
    rounding errors.
    """
    scale = 10.0 ** -(number % 3)
    sign = scale * (-1) ** sub_batch * (1 + sub_batch // 2)
    mean, deviation = (3 * number + 1, -scale, scale), (3 * number + 2, 0.5 * sign, 1.5 * sign)
    terms: Terms = (mean, deviation)
    return Argument(f"gradient_{number}_{sub_batch}", "input", shape, "float32", terms)


def expected(
    name: str,
    weights: Sequence[np.ndarray],
    gradients: Sequence[Sequence[Sequence[np.ndarray]]],
    **more: Any,
) -> list[np.ndarray]:
    """Weights after updates, in float64.

    Args:
        name: One of `NAMES`.
        weights: Before.
        gradients: ``[update][sub-batch][layer]``.
        **more: Other arguments of the reference.
    """
    if name in _KEYS:
        _, function, arguments = _KEYS[name]
        return function(weights, mean_gradients(gradients), **arguments, **more)
    return reference(name, weights, gradients, **_ARGUMENTS[name], **{"weight_decay": None, **more})
