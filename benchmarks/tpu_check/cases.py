"""What is compiled: one update of every optimizer, as TPUStrategy runs it on each replica.

And the training steps of `benchmarks.tpu_check.steps`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

import tf_lbopt
import tf_lbopt.tf_keras
from benchmarks.shapes import Shape, bert_base, resnet50
from benchmarks.tpu_check._compat import lowered, only_first_copies, tpu_strategy_of
from benchmarks.tpu_check.steps import TrainingStep, training_steps

EIGHT: tuple[Shape, ...] = (*[(2048, 1024)] * 4, *[(1024,)] * 4)
"""8.4 million parameters."""

# The first of the eight as an embedding, and how many indices a batch has.
_TABLE = (8192, 256)
_LOOKED_UP = 1024

MODELS = {"eight": lambda: list(EIGHT), "resnet50": resnet50, "bert_base": bert_base}

_BASES = ("lars", "lamb")
_OURS = {info.name: info for info in tf_lbopt.list_optimizers()}


@dataclasses.dataclass(frozen=True)
class Update:
    """One update of one optimizer.

    Attributes:
        optimizer: One of `tf_lbopt.list_optimizers()`, "keras_sgd" (with momentum) or "keras_lamb".
        model: Whose variables are updated, one of `MODELS`.
        chips: How many replicas there are, one on each.
        micro_steps: Calls per update. The program is that of a call: the micro-step's, and under a
            condition that of the update.
        gradient: "dense", or "embedding" where the first variable is a table of 8,192 rows, whose
            gradient comes as 1,024 rows.
        dtype: Of the variables and their gradients.
        framework: "keras" or "tf_keras".
    """

    optimizer: str
    model: str = "eight"
    chips: int = 4
    micro_steps: int = 1
    gradient: str = "dense"
    dtype: str = "float32"
    framework: str = "keras"

    @property
    def name(self) -> str:
        """What tells it from the others."""
        of_model = "" if self.model == "eight" else f" {self.model}"
        steps = "" if self.micro_steps == 1 else f" {self.micro_steps} micro-steps"
        others = [
            value
            for value, usual in (
                (self.gradient, "dense"), (self.dtype, "float32"), (self.framework, "keras")
            )
            if value != usual
        ]  # fmt: skip
        chips = "1 chip" if self.chips == 1 else f"{self.chips} chips"
        return " ".join([f"{self.optimizer}{of_model} {chips}{steps}", *others])

    @property
    def shapes(self) -> list[Shape]:
        """Of the variables."""
        shapes = MODELS[self.model]()
        return [_TABLE, *shapes[1:]] if self.gradient == "embedding" else shapes

    def lower(self) -> tuple[bytes, int]:
        """See `lowered`."""
        strategy = tpu_strategy_of(self.chips)
        with only_first_copies(), strategy.scope():
            variables = [self._variable(shape, i) for i, shape in enumerate(self.shapes)]
            optimizer = self._optimizer()
            optimizer.build(variables)

        def on_replica(*arguments: tf.Tensor) -> None:
            gradients: list[Any] = list(arguments)
            if self.gradient == "embedding":
                indices, rows, *rest = arguments
                gradients = [tf.IndexedSlices(rows, indices, self.shapes[0]), *rest]
            moved = hasattr(optimizer, "extrapolated")
            with optimizer.extrapolated(variables) if moved else contextlib.nullcontext():
                if self.framework == "keras":
                    optimizer.apply(gradients, variables)
                else:
                    optimizer.apply_gradients(zip(gradients, variables, strict=True))

        return lowered(strategy, on_replica, self._arguments())

    def _variable(self, shape: Shape, number: int) -> Any:
        # Vectors are biases and scales of normalizations, which the models' recipes leave out.
        name = f"{'vector' if len(shape) == 1 else 'matrix'}_{number}"
        if self.framework == "keras":
            return keras.Variable(tf.zeros(shape, self.dtype), dtype=self.dtype, name=name)
        return tf.Variable(tf.zeros(shape, self.dtype), name=name)

    def _optimizer(self) -> Any:
        arguments: dict[str, Any] = {"learning_rate": 0.1}
        if self.micro_steps > 1:
            arguments["gradient_accumulation_steps"] = self.micro_steps
        if self.model != "eight":
            arguments["weight_decay"] = 0.01
        if self.optimizer == "keras_sgd":
            return keras.optimizers.SGD(**arguments, momentum=0.9)
        if self.optimizer == "keras_lamb":
            return keras.optimizers.Lamb(**arguments)
        cls = _OURS[self.optimizer].cls
        if self.model != "eight":
            accepted = inspect.signature(cls).parameters
            exclusions = ("exclude_from_weight_decay", "exclude_from_layer_adaptation")
            arguments |= {name: ["vector"] for name in exclusions if name in accepted}
        if self.framework == "tf_keras":
            cls = getattr(tf_lbopt.tf_keras, cls.__name__)
        return cls(**arguments)

    def _arguments(self) -> list[tf.Tensor]:
        shapes = self.shapes
        if self.gradient == "dense":
            return [tf.zeros(shape, self.dtype) for shape in shapes]
        rows = tf.zeros([_LOOKED_UP, *shapes[0][1:]], self.dtype)
        rest = [tf.zeros(shape, self.dtype) for shape in shapes[1:]]
        return [tf.zeros([_LOOKED_UP], tf.int32), rows, *rest]


def _updates() -> Iterator[Update]:
    for name in ("keras_sgd", "keras_lamb"):
        yield from (Update(name, chips=chips) for chips in (1, 4))
    for name, info in _OURS.items():
        if not info.needs_sub_batches:
            yield Update(name, chips=1)
    product = itertools.product(
        ("keras", "tf_keras"), ("float32", "bfloat16"), ("dense", "embedding"), (1, 2), _OURS
    )
    for framework, dtype, gradient, micro_steps, name in product:
        yield Update(
            name,
            micro_steps=micro_steps,
            gradient=gradient,
            dtype=dtype,
            framework=framework,
        )
    for model in ("resnet50", "bert_base"):
        for name in ("keras_sgd", "keras_lamb", *_BASES, *(f"vr_{base}" for base in _BASES)):
            yield Update(name, model)


def all_cases() -> dict[str, Update | TrainingStep]:
    """All, by name, in the order in which they are compiled."""
    return {case.name: case for case in (*_updates(), *training_steps())}
