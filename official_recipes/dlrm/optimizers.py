"""A learning-rate schedule with a plateau, and one optimizer for embeddings beside another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow_recommenders.experimental import optimizers

from tf_lbopt.tf_keras.base import LargeBatchOptimizer


class PlateauPolynomial(tf_keras.optimizers.schedules.LearningRateSchedule):
    """A constant rate, then polynomial decay.

    Args:
        initial_learning_rate: The rate before the decay.
        decay_start: The last step at that rate.
        decay_steps: How many steps the decay takes.
        end_learning_rate: The rate after it.
        power: 1 for a linear decay.
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_start: int,
        decay_steps: int,
        end_learning_rate: float = 0.0,
        power: float = 2.0,
    ):
        super().__init__()
        if decay_steps < 1 or decay_start < 0:
            raise ValueError(
                "plateau_polynomial needs decay_steps >= 1 and decay_start >= 0. Received: "
                f"decay_steps={decay_steps}, decay_start={decay_start}"
            )
        self._config = {
            "initial_learning_rate": initial_learning_rate,
            "decay_start": decay_start,
            "decay_steps": decay_steps,
            "end_learning_rate": end_learning_rate,
            "power": power,
        }
        self._start = decay_start
        self._decay = tf_keras.optimizers.schedules.PolynomialDecay(
            initial_learning_rate, decay_steps, end_learning_rate, power
        )

    def __call__(self, step: Any) -> tf.Tensor:
        """The learning rate of the update with this number, counted from 0."""
        return self._decay(tf.maximum(tf.cast(step, tf.float32) - self._start, 0.0))

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal schedule."""
        return dict(self._config)


class EmbeddingsApart(optimizers.CompositeOptimizer):
    """One optimizer for the embeddings, another one for the rest, under one roof.

    Args:
        embedding_optimizer: Of the embeddings.
        dense_optimizer: Of all other variables.
        embeddings: Returns the embeddings.
        rest: Returns the others.
        sub_batches: How many calls, with the gradients of the parts of a replica's batch, make one
            update. Optimizers that accumulate by themselves get every part, others the mean.
    """

    def __init__(
        self,
        embedding_optimizer: Any,
        dense_optimizer: Any,
        embeddings: Callable[[], Sequence[tf.Variable]],
        rest: Callable[[], Sequence[tf.Variable]],
        sub_batches: int = 1,
    ):
        pairs = [(embedding_optimizer, embeddings), (dense_optimizer, rest)]
        super().__init__(pairs, name="EmbeddingsApart")
        self._pairs = pairs
        # So `SubBatchTask` passes each part on.
        self.gradient_accumulation_steps = sub_batches if sub_batches > 1 else None
        self._sub_batches = sub_batches
        self._parts: dict[tuple[Any, ...], list[list[Any]]] = {}

    @property
    def learning_rate(self) -> Any:
        """That of the optimizer of the rest."""
        return self._pairs[1][0].learning_rate

    def build(self) -> None:
        """Makes the variables of those optimizers that can make them before their first update."""
        for optimizer, variables in self._pairs:
            if isinstance(optimizer, LargeBatchOptimizer):
                optimizer.build(list(variables()))

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]], name: str | None = None, **kwargs: Any
    ) -> None:
        """Hands each optimizer the gradients of its variables."""
        del name, kwargs
        gradients = {variable.ref(): gradient for gradient, variable in grads_and_vars}
        for index, (optimizer, variables) in enumerate(self._pairs):
            own = list(variables())
            parts = [gradients.pop(variable.ref()) for variable in own]
            if self.gradient_accumulation_steps and not _accumulates(optimizer):
                mean = self._mean(index, parts)
                if mean is None:
                    continue
                parts = mean
            optimizer.apply_gradients(list(zip(parts, own, strict=True)))
        if gradients:
            raise ValueError(f"variables of no optimizer: {[ref.deref() for ref in gradients]}")

    def _mean(self, index: int, gradients: list[Any]) -> list[Any] | None:
        """The mean over the parts when the last one comes; parts are traced one after another."""
        context = tf.distribute.get_replica_context()
        replica = tf.get_static_value(tf.convert_to_tensor(context.replica_id_in_sync_group))
        key = (tf.compat.v1.get_default_graph(), None if replica is None else int(replica), index)
        parts = self._parts.setdefault(key, [])
        parts.append(gradients)
        if len(parts) < self._sub_batches:
            return None
        del self._parts[key]
        return [_mean(column) for column in zip(*parts, strict=True)]


def _accumulates(optimizer: Any) -> bool:
    return getattr(optimizer, "gradient_accumulation_steps", None) is not None


def _mean(parts: Sequence[Any]) -> Any:
    there = [part for part in parts if part is not None]
    if not there:
        return None
    if all(isinstance(part, tf.IndexedSlices) for part in there):
        return tf.IndexedSlices(
            tf.concat([part.values for part in there], 0) / len(parts),
            tf.concat([part.indices for part in there], 0),
            there[0].dense_shape,
        )
    return tf.add_n([tf.convert_to_tensor(part) for part in there]) / len(parts)
