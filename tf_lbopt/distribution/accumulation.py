"""Gradient accumulation: state that differs from replica to replica."""

import io
import json
import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.norms import Gradient, compute_dtype, norms
from tf_lbopt.rules.rule import MEAN_NORM
from tf_lbopt.statistics.accumulators import DenseAccumulator, SparseAccumulator, any_nonzero
from tf_lbopt.statistics.sparse import merge_repeated_indices

_logger = logging.getLogger(__name__)


class Accumulation(tf.train.experimental.PythonState):
    """What each replica keeps of its gradients over the micro-steps of one update.

    An accumulator is made of mirrored variables whose copies differ. What checkpoints store of a
    mirrored variable is its first copy, so this object stores all copies itself, as one string, and
    only in mid-accumulation: between updates there is nothing to store.

    Args:
        strategy: The strategy under which the variables live.
        steps: Micro-steps per update.
        statistics: What is followed beside the sum of the gradients.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, steps: int, statistics: Collection[str] = ()
    ):
        super().__init__()
        self._strategy = strategy
        self.steps = steps
        self.statistics = frozenset(statistics)
        self.live: tf.Variable  # how many micro-steps were live; made with the first accumulators
        self.accumulators: dict[int, DenseAccumulator | SparseAccumulator] = {}
        self._micro_step: tf.Variable | None = None
        self._pending: bytes | None = None

    def prepare(
        self, indices: Sequence[int], variables: Sequence[tf.Variable], gradients: Sequence[Any]
    ) -> None:
        """Creates what the gradients of a call need: in a cross-replica context, eagerly.

        Gradients decide the kind of accumulator: what arrives as ``IndexedSlices`` is kept by rows
        (by the whole table under XLA, which wants static shapes).
        """
        missing = [
            (index, variable, gradient)
            for index, variable, gradient in zip(indices, variables, gradients, strict=True)
            if index not in self.accumulators
        ]
        if not missing:
            return
        by_rows = not _compat.in_xla_context()
        with tf.init_scope(), self._strategy.scope():
            if self._micro_step is None:
                self._micro_step = self._variable(0, tf.TensorShape([]), tf.int64)
                self.live = self._variable(0.0, tf.TensorShape([]), tf.float32)
            for index, variable, gradient in missing:
                sparse = by_rows and isinstance(_first(gradient), tf.IndexedSlices)
                kind = SparseAccumulator if sparse else DenseAccumulator
                with self._strategy.extended.colocate_vars_with(variable):
                    self.accumulators[index] = kind(
                        variable.shape,
                        compute_dtype(variable.dtype),
                        self.statistics,
                        self._variable,
                        self._strategy.num_replicas_in_sync,
                    )
            if self._pending is not None:
                self.deserialize(self._pending)

    def _variable(
        self, value: Any, shape: tf.TensorShape, dtype: tf.DType | None = None
    ) -> tf.Variable:
        return tf.Variable(
            value, shape=shape, dtype=dtype, trainable=False, name="gradient_accumulator"
        )

    @property
    def micro_step(self) -> tf.Variable:
        """How many micro-steps of the current update are in the accumulators."""
        if self._micro_step is None:
            raise ValueError("The accumulators do not exist before the first gradients arrive.")
        return self._micro_step

    def add(
        self,
        indices: Sequence[int],
        gradients: Sequence[Gradient],
        gradient_norms: Sequence[tf.Tensor] | None,
    ) -> None:
        """Adds one micro-step's gradients to this replica's accumulators, in place.

        Args:
            indices: Of the variables.
            gradients: One each.
            gradient_norms: What stands for their norms; ``None`` for these themselves.
        """
        count = tf.convert_to_tensor(self.live)
        live = any_nonzero(list(gradients)) if self.statistics else tf.constant(True)
        if gradient_norms is None and MEAN_NORM in self.statistics:
            gradients = [merge_repeated_indices(gradient) for gradient in gradients]
            gradient_norms = norms(gradients)
        for index, gradient, norm in zip(
            indices, gradients, gradient_norms or [None] * len(indices), strict=True
        ):
            self.accumulators[index].add(gradient, live, count, norm)
        self.live.assign(count + tf.cast(live, count.dtype))

    def read(
        self, indices: Sequence[int]
    ) -> tuple[list[Gradient], list[tf.Tensor | None], tf.Tensor]:
        """This replica's sums, squared deviations (or ``None``) and number of live micro-steps."""
        # `read_value` and not a conversion: its result bears the replica's device, without which
        # the reduction does not pack it with the others.
        count = self.live.read_value()
        pairs = [self.accumulators[index].read(count) for index in indices]
        return [total for total, _ in pairs], [deviations for _, deviations in pairs], count

    def read_norms(self, indices: Sequence[int]) -> list[tf.Tensor]:
        """This replica's sums of the gradients' norms."""
        sums = [self.accumulators[index].norm_sum for index in indices]
        return [norm_sum.read_value() for norm_sum in sums if norm_sum is not None]

    def clear(self) -> None:
        """Empties this replica's accumulators."""
        for accumulator in self.accumulators.values():
            accumulator.clear()
        self.micro_step.assign(0)
        self.live.assign(0.0)

    def variables(self) -> list[tf.Variable]:
        """What is kept for the trainable variables."""
        return [v for accumulator in self.accumulators.values() for v in accumulator.variables()]

    # -- saving ------------------------------------------------------------------------------------

    def _state(self) -> dict[str, tf.Variable]:
        return {
            "live": self.live,
            **{
                f"{index}/{accumulator.kind}/{number}": variable
                for index, accumulator in self.accumulators.items()
                for number, variable in enumerate(accumulator.variables())
            },
        }

    def serialize(self) -> bytes:
        """What a checkpoint stores: the replicas' accumulators, or nothing between updates."""
        if self._micro_step is None:
            return self._pending or b""
        micro_step = int(self.micro_step.numpy())
        if not micro_step:
            return b""
        replicas = self._strategy.num_replicas_in_sync
        copies = {
            name: self._strategy.experimental_local_results(variable)
            for name, variable in self._state().items()
        }
        # Other workers' accumulators can not be reached from here; loading will start empty.
        complete = len(copies["live"]) == replicas
        header = {
            "micro_step": micro_step if complete else 0,
            "steps": self.steps,
            "replicas": replicas,
        }
        buffer = io.BytesIO()
        arrays = {
            f"{name}/{replica}": copy.numpy()
            for name, local in copies.items()
            for replica, copy in enumerate(local)
            if complete
        }
        np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
        return buffer.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Restores what `serialize` stored; before the accumulators exist it is kept until then.

        Under another number of replicas or micro-steps what was stored has no place to go: the
        accumulators start empty, with a warning.
        """
        if self._micro_step is None:
            self._pending = string_value
            return
        self._pending = None
        copies = {
            name: self._strategy.experimental_local_results(variable)
            for name, variable in self._state().items()
        }
        for local in copies.values():
            for copy in local:
                empty = [0 if size is None else size for size in copy.shape]
                copy.assign(tf.zeros(empty, copy.dtype))
        self.micro_step.assign(0)
        if not string_value:
            return
        with np.load(io.BytesIO(string_value)) as stored:
            header = json.loads(stored["header"].tobytes().decode())
            replicas = self._strategy.num_replicas_in_sync
            names = {f"{name}/{r}" for name, local in copies.items() for r in range(len(local))}
            fits = (
                header["replicas"] == replicas
                and header["steps"] == self.steps
                and names == set(stored.files) - {"header"}
                and all(
                    copy.shape.is_compatible_with(stored[f"{name}/0"].shape)
                    for name, (copy, *_) in copies.items()
                )
            )
            if not fits:
                _logger.warning(
                    "The checkpoint was written in mid-accumulation on %d replicas with "
                    "gradient_accumulation_steps=%d; here there are %d replicas and "
                    "gradient_accumulation_steps=%d. The accumulators start empty: the "
                    "micro-steps since the last update are lost, nothing else.",
                    header["replicas"], header["steps"], replicas, self.steps,
                )  # fmt: skip
                return
            for name, local in copies.items():
                for replica, variable in enumerate(local):
                    variable.assign(stored[f"{name}/{replica}"])
            self.micro_step.assign(header["micro_step"])


def _first(value: Any) -> Any:
    """The gradient itself, or the first replica's of a per-replica value."""
    if isinstance(value, tf.distribute.DistributedValues):
        return value.values[0]
    return value
