"""What tests over the whole table of optimizers need: arguments, variables and updates."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from harness import taking_gradients

from tf_lbopt import OptimizerInfo


def minimal_arguments(info: OptimizerInfo) -> dict[str, Any]:
    """The fewest keyword arguments under which one process can train with an optimizer."""
    arguments: dict[str, Any] = {"learning_rate": 0.1}
    if info.needs_sub_batches:
        arguments["gradient_accumulation_steps"] = 2
    return arguments


def accepts(info: OptimizerInfo, argument: str) -> bool:
    """Whether the constructor names an argument."""
    return argument in inspect.signature(info.cls).parameters


def named_variables() -> list[keras.Variable]:
    """Three layers' variables with paths as in a model; the same values on every call."""
    rng = np.random.default_rng(7)
    variables = []
    for scope, name, shape in (
        ("dense", "kernel", (4, 3)),
        ("dense", "bias", (3,)),
        ("norm", "gamma", (5,)),
    ):
        with keras.name_scope(scope):
            variables.append(keras.Variable(rng.normal(size=shape).astype("float32"), name=name))
    return variables


def gradients_for(variables: Sequence[Any], seed: int = 3) -> list[Any]:
    """One dense gradient per variable, of different sizes; the same on every call."""
    rng = np.random.default_rng(seed)
    return [
        keras.ops.convert_to_tensor((0.1 + i) * rng.normal(size=tuple(v.shape)), dtype="float32")
        for i, v in enumerate(variables)
    ]


def make_updates(optimizer: Any, variables: Sequence[Any], updates: int = 2) -> list[np.ndarray]:
    """Whole updates, whatever the number of micro-steps; returns the weights afterwards."""
    for call in range(updates * (optimizer.gradient_accumulation_steps or 1)):
        with taking_gradients(optimizer, variables):
            optimizer.apply(gradients_for(variables, seed=call), variables)
    assert int(optimizer.iterations.numpy()) == updates
    return [v.numpy() for v in variables]
