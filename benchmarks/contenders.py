"""The optimizers that are compared, and what can be counted of them without a clock."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

import tf_lbopt
from benchmarks.shapes import Shape, count, tiny

LEARNING_RATE = 1e-9
"""So small that all optimizers can work on one set of weights without moving it."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One optimizer of the comparison.

    Attributes:
        name: As in the flag and the table.
        create: Makes it; takes ``gradient_accumulation_steps`` unless it is ``legacy``.
        legacy: Whether it is one of tf_keras.
        micro_steps: Calls per update; above 1 for those that need several sub-batches.
    """

    name: str
    create: Callable[..., Any]
    legacy: bool = False
    micro_steps: int = 1

    def optimizer(self, variables: Sequence[Any]) -> Any:
        """The optimizer that is timed, built for the variables."""
        if self.legacy:
            return self.create()  # creates its slots in the first update
        accumulation = {"gradient_accumulation_steps": self.micro_steps}
        optimizer = self.create(**accumulation if self.micro_steps > 1 else {})
        optimizer.build(variables)
        return optimizer

    def apply(
        self, optimizer: Any, gradient_sets: Sequence[Sequence[tf.Tensor]], variables: Sequence[Any]
    ) -> None:
        """One update, in a replica context: another gradient in each micro-step and replica."""
        context = tf.distribute.get_replica_context()
        replica = int(tf.get_static_value(context.replica_id_in_sync_group) or 0)
        for micro_step in range(self.micro_steps):
            own = gradient_sets[(replica + micro_step) % len(gradient_sets)]
            # tf.distribute takes one tensor on all replicas for one value, not for one per replica.
            gradients = [tf.identity(gradient) for gradient in own]
            if self.legacy:
                optimizer.apply_gradients(
                    [(g, v.value) for g, v in zip(gradients, variables, strict=True)]
                )
            else:
                _apply(optimizer, gradients, variables)


def contenders(weight_decay: float, replicas: int) -> tuple[list[Contender], list[tuple[str, str]]]:
    """All optimizers, and ``(name, reason)`` of those that can not run here."""
    ours = [
        Contender(
            info.name,
            _creator(info.cls, weight_decay=weight_decay or None),
            # One replica without accumulation is a single sub-batch, of which there is no
            # variance: such rules get two micro-steps.
            micro_steps=2 if info.needs_sub_batches and replicas == 1 else 1,
        )
        for info in tf_lbopt.list_optimizers()
    ]
    # What those stand on, with as many micro-steps, for a fair comparison.
    bases = [
        dataclasses.replace(contender, name=f"{contender.name}_2_micro_steps", micro_steps=2)
        for contender in ours
        if contender.name in ("lars", "lamb") and replicas == 1
    ]
    from_keras, missing = _keras(weight_decay)
    from_models, skipped = _tf_models(weight_decay)
    return [*ours, *bases, *from_keras, *from_models], [*missing, *skipped]


def update_function(
    contender: Contender,
    optimizer: Any,
    variables: Sequence[Any],
    gradient_sets: Sequence[Sequence[tf.Tensor]],
    strategy: tf.distribute.Strategy,
) -> Any:
    """One whole update on all replicas as one concrete function."""

    def on_replica() -> None:
        contender.apply(optimizer, gradient_sets, variables)

    @tf.function(autograph=False)
    def update() -> None:
        strategy.run(on_replica)

    return update.get_concrete_function()


def weighting_function(gradient_sets: Sequence[Sequence[tf.Tensor]]) -> Any:
    """The step of VRGD from sub-batch statistics to r ḡ, for all layers, as a concrete function."""
    from tf_lbopt.rules.gsnr import SubBatchStatistics, clipped_gsnr

    # As of eight sub-batches; of two, the ratio of mean and variance has no mean itself.
    means = gradient_sets[0]
    deviations = [
        1e-6 * tf.random.stateless_gamma(mean.shape, [0, index], alpha=3.5)
        for index, mean in enumerate(means)
    ]

    @tf.function(autograph=False)
    def weight() -> list[tf.Tensor]:
        statistics = SubBatchStatistics(means, deviations, tf.constant(8.0), tf.constant(1.0))
        return [mean * r for mean, r in zip(means, clipped_gsnr(statistics, 0.1), strict=True)]

    return weight.get_concrete_function()


def slots_per_parameter(optimizer: Any, shapes: Sequence[Shape]) -> float:
    """How many floats the optimizer keeps per parameter, by the shapes of its variables."""
    variables = optimizer.variables
    return _state_like(variables() if callable(variables) else variables, shapes)


def accumulators_per_parameter(contender: Contender, variables: Sequence[Any]) -> float | None:
    """What gradient accumulation adds per parameter; ``None`` where there is none.

    Args:
        contender: The optimizer.
        variables: Variables to build it for, of the shapes `tiny`.
    """
    if contender.legacy:
        return None
    accumulating = contender.create(gradient_accumulation_steps=2)
    accumulating.build(variables)
    # Ours are no part of `variables` (they differ between replicas and are saved another way) and
    # appear with the first gradients.
    own = getattr(accumulating, "_accumulation", None)
    if own is not None:
        tf.distribute.get_strategy().run(
            lambda: _apply(accumulating, [tf.ones(v.shape) for v in variables], variables)
        )
        return _state_like(list(own.state().values()), tiny())
    without = contender.create()
    without.build(variables)
    return _state_like(accumulating.variables, tiny()) - _state_like(without.variables, tiny())


def collective_reductions(update: Any, replicas: int) -> float:
    """Collective reductions per replica and update, counted in the graph and its functions."""
    reductions = [n for n in graph_nodes(update) if n.op.startswith("CollectiveReduce")]
    return len(reductions) / replicas


def graph_nodes(function: Any) -> list[Any]:
    """All nodes of a concrete function's graph and of the functions that it calls."""
    graph = function.graph.as_graph_def()
    return [*graph.node, *(n for f in graph.library.function for n in f.node_def)]


def _apply(optimizer: Any, gradients: Sequence[tf.Tensor], variables: Sequence[Any]) -> None:
    # Moving the weights to where the gradients are taken is part of these optimizers' update.
    moved = hasattr(optimizer, "extrapolated")
    with optimizer.extrapolated(variables) if moved else contextlib.nullcontext():
        optimizer.apply(gradients, variables)


def _creator(cls: type, **settings: Any) -> Callable[..., Any]:
    settings["learning_rate"] = LEARNING_RATE
    if "momentum" in inspect.signature(cls).parameters:
        settings["momentum"] = 0.9
    return lambda **more: cls(**settings, **more)


def _state_like(variables: Sequence[Any], shapes: Sequence[Shape]) -> float:
    known = set(shapes)
    sizes = (math.prod(v.shape) for v in variables if tuple(v.shape) in known)
    return sum(sizes) / count(shapes)


def _keras(weight_decay: float) -> tuple[list[Contender], list[tuple[str, str]]]:
    # With a weight decay Adam is AdamW.
    names = ("SGD", "Adam", "Lamb", "Lion", "Muon")
    missing = [name for name in names if not hasattr(keras.optimizers, name)]
    return [
        Contender(
            f"keras_{name.lower()}",
            _creator(getattr(keras.optimizers, name), weight_decay=weight_decay or None),
        )
        for name in names
        if name not in missing
    ], [(f"keras_{name.lower()}", f"Keras {keras.__version__} has none") for name in missing]


def _tf_models(weight_decay: float) -> tuple[list[Contender], list[tuple[str, str]]]:
    try:
        from official.modeling.optimization import lamb, lars
    except ImportError as error:
        reason = f"tf-models-official can not be imported ({error})"
        return [], [(name, reason) for name in ("tf_models_lars", "tf_models_lamb")]
    return [
        Contender(name, _creator(cls, weight_decay_rate=weight_decay), legacy=True)
        for name, cls in (("tf_models_lars", lars.LARS), ("tf_models_lamb", lamb.LAMB))
    ], []
