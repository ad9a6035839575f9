"""Runs one optimizer over sub-batches of gradients, on any split into replicas and micro-steps."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of

import tf_lbopt
from tf_lbopt.optimizers.trained import path_of, tensorflow_variable

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
# Two layers take a third less time to trace than three, which are where a third one matters.
SHAPES = [(6, 5), (5,)]
THREE_SHAPES = [*SHAPES, (3, 3, 2, 4)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table tests: an optimizer with arguments under which all of it is at work."""

    name: str
    cls: type
    arguments: dict[str, Any]

    def __call__(self, **kwargs: Any) -> keras.optimizers.Optimizer:
        return self.cls(**{**self.arguments, **kwargs})

    def __repr__(self) -> str:
        return self.name


NAMES = [info.name for info in tf_lbopt.list_optimizers()]
LARS = {"learning_rate": 0.5, "trust_coefficient": 0.1}
ARGUMENTS: dict[str, dict[str, Any]] = {name: {"learning_rate": 0.05} for name in NAMES}
ARGUMENTS |= {name: {"learning_rate": 0.1} for name in ("sngm", "vr_sgd", "extrap_sgd")}
ARGUMENTS |= {"lars": LARS, "vr_lars": LARS, "clars": LARS}
ARGUMENTS["vr_momentum"] |= {"nesterov": True}
ARGUMENTS["sgd"] |= {"momentum": 0.9}
ARGUMENTS = {name: {**arguments, "weight_decay": 0.01} for name, arguments in ARGUMENTS.items()}
# What `make test` runs of a product over all optimizers: one without statistics of sub-batches, one
# with their variance, one with the mean of their norms, one with gradients from beside the weights.
KINDS = ("lamb", "vr_lamb", "clars", "extrap_sgd")
CASES = [Case(info.name, info.cls, ARGUMENTS[info.name]) for info in tf_lbopt.list_optimizers()]


def initial_weights(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def sub_batch_gradients(
    updates: int, sub_batches: int = 8, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[list[list[np.ndarray]]]:
    """``[update][sub-batch][layer]``, every sub-batch different, layers of different sizes."""
    rng = np.random.default_rng(seed)
    scales = [10.0**-i for i in range(len(shapes))]
    means = [scale * rng.normal(size=shape) for scale, shape in zip(scales, shapes, strict=True)]
    return [
        [
            [
                (mean + scale * rng.normal(size=mean.shape)).astype("float32")
                for mean, scale in zip(means, scales, strict=True)
            ]
            for _ in range(sub_batches)
        ]
        for _ in range(updates)
    ]


def clipped(
    layers: Sequence[np.ndarray],
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
) -> Sequence[np.ndarray]:
    """Mean gradients as an optimizer with one of these arguments gets them."""
    if clipvalue:
        return [np.clip(g, -clipvalue, clipvalue) for g in layers]
    if clipnorm:
        return [g * min(1.0, clipnorm / np.linalg.norm(g)) for g in layers]
    if global_clipnorm:
        norm = np.sqrt(sum(np.sum(g**2) for g in layers))
        return [g * min(1.0, global_clipnorm / norm) for g in layers]
    return layers


def graph_nodes(function: Any, add_shapes: bool = False) -> list[Any]:
    """All nodes of a concrete function's graph (or a graph) and of the functions that it calls."""
    graph = getattr(function, "graph", function)
    definition = graph.as_graph_def(add_shapes=add_shapes)
    return [*definition.node, *(n for f in definition.library.function for n in f.node_def)]


def taking_gradients(optimizer: Any, variables: Any) -> contextlib.AbstractContextManager[None]:
    """What gradients must be taken, and applied, in."""
    if hasattr(optimizer, "extrapolated"):
        return optimizer.extrapolated(variables)
    return contextlib.nullcontext()


def needs_sub_batches(make: Any) -> bool:
    """Whether an optimizer (class, case) can not do with a single sub-batch."""
    return "variance" in getattr(getattr(make, "cls", make), "statistics", ())


class Run:
    """Variables and an optimizer under a strategy, updated by a traced custom loop."""

    def __init__(
        self,
        make: Callable[..., keras.optimizers.Optimizer],
        replicas: int = 1,
        micro_steps: int = 1,
        weights: Sequence[np.ndarray] | None = None,
        dtype: str | Sequence[str] | None = None,
        wrap: Callable[[Any], Any] = lambda optimizer: optimizer,
        build: bool = True,
        function: Callable[..., Any] = tf.function,
        **kwargs: Any,
    ):
        if replicas * micro_steps == 1 and needs_sub_batches(make):
            pytest.skip("needs at least two sub-batches")
        self.replicas, self.micro_steps = replicas, micro_steps
        self.strategy = self._strategy_of(replicas)
        if micro_steps > 1:
            kwargs["gradient_accumulation_steps"] = micro_steps
        weights = initial_weights() if weights is None else weights
        dtypes = [dtype] * len(weights) if dtype is None or isinstance(dtype, str) else dtype
        with self.strategy.scope():
            self.variables = [
                self._variable(w, of_layer, f"layer_{i}")
                for i, (w, of_layer) in enumerate(zip(weights, dtypes, strict=True))
            ]
            self.inner = make(**kwargs)
            self.optimizer = wrap(self.inner)
            if build:
                self.optimizer.build(self.variables)
        self.traces = 0
        self._step = function(self._step_python)
        self._first = self._values() if build else []

    def _variable(self, value: np.ndarray, dtype: str | None, name: str) -> Any:
        return keras.Variable(value, dtype=dtype, name=name)

    def _apply(self, gradients: list[Any]) -> None:
        self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))

    def _strategy_of(self, replicas: int) -> tf.distribute.Strategy:
        return strategy_of(replicas)

    def _step_python(self, gradients: Any) -> None:
        self.strategy.run(self._replica_step, args=(gradients,))

    def _replica_step(self, local: Any) -> None:
        self.traces += 1
        local = [_divided(g, self.replicas) for g in local]
        with taking_gradients(self.inner, self.variables):
            self._apply(local)

    def micro_step(self, per_replica: Sequence[Sequence[Any]]) -> None:
        """One call, with ``[replica][layer]`` gradients."""
        self._step(self._distributed(per_replica))

    def _distributed(self, per_replica: Sequence[Sequence[Any]]) -> Sequence[Any]:
        if self.replicas == 1:
            return per_replica[0]
        return [
            self.strategy.experimental_distribute_values_from_function(
                lambda context, layer=layer: per_replica[context.replica_id_in_sync_group][layer]
            )
            for layer in range(len(per_replica[0]))
        ]

    def traced(self, per_replica: Sequence[Sequence[Any]]) -> Any:
        """The concrete function of a micro-step."""
        tensors = [[_as_tensor(g) for g in layers] for layers in per_replica]
        return self._step.get_concrete_function(self._distributed(tensors))

    def update(self, sub_batches: Sequence[Sequence[Any]]) -> "Run":
        """One update, from ``replicas × micro_steps`` sub-batches."""
        tensors = [[_as_tensor(g) for g in layers] for layers in sub_batches]
        for m in range(self.micro_steps):
            self.micro_step(tensors[m * self.replicas : (m + 1) * self.replicas])
        return self

    def updates(self, gradients: Sequence[Any]) -> "Run":
        for sub_batches in gradients:
            self.update(sub_batches)
        return self

    def restart(self) -> "Run":
        """Sets everything back to how it was made, in place of another run and its trace."""
        for variable, value in zip(self._everything(), self._first, strict=True):
            variable.assign(value)
        return self

    def _everything(self) -> list[Any]:
        return [*self.variables, *self.inner.variables, *self.optimizer.variables]

    def _values(self) -> list[np.ndarray]:
        return [v.numpy() for v in self._everything()]

    def weights(self) -> list[np.ndarray]:
        return [v.numpy() for v in self.variables]

    def state(self) -> dict[str, np.ndarray]:
        """Everything that a skipped update must not change."""
        variables = [*self.variables, *self.inner.variables]
        return {
            f"{i}:{path_of(v)}": v.numpy()
            for i, v in enumerate(variables)
            if "skipped_updates" not in path_of(v)
        }

    def copies(self) -> list[list[np.ndarray]]:
        """``[variable][replica]`` of the weights and the optimizer's variables."""
        everything = [*self.variables, *self.optimizer.variables]
        return [
            [c.numpy() for c in self.strategy.experimental_local_results(tensorflow_variable(v))]
            for v in everything
        ]


def assert_replicas_identical(run: Run) -> None:
    for copies in run.copies():
        for copy in copies[1:]:
            np.testing.assert_array_equal(copies[0], copy)


def assert_states_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(one.values())
    for (key, a), (_, b) in zip(one.items(), other.items(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=key)


def _as_tensor(gradient: Any) -> Any:
    return gradient if isinstance(gradient, tf.IndexedSlices) else tf.convert_to_tensor(gradient)


def _divided(gradient: Any, replicas: int) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            gradient.values / replicas, gradient.indices, dense_shape=gradient.dense_shape
        )
    return gradient / replicas
