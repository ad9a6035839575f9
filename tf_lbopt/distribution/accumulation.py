"""Gradient accumulation: state that differs from replica to replica."""

import io
import json
import logging
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_lbopt.rules.norms import Gradient, compute_dtype

_logger = logging.getLogger(__name__)


class Accumulation(tf.train.experimental.PythonState):
    """The sums of each replica's gradients over the micro-steps of one update.

    An accumulator is a mirrored variable whose copies differ. What checkpoints store of a mirrored
    variable is its first copy, so this object stores all copies itself, as one string, and only in
    mid-accumulation: between updates there is nothing to store.

    Args:
        strategy: The strategy under which the variables live.
        steps: Micro-steps per update.
    """

    def __init__(self, strategy: tf.distribute.Strategy, steps: int):
        super().__init__()
        self._strategy = strategy
        self.steps = steps
        self.accumulators: list[tf.Variable] = []
        self._micro_step: tf.Variable | None = None
        self._pending: bytes | None = None

    def build(self, variables: Sequence[tf.Variable]) -> None:
        """Creates one accumulator per variable, in float32 or wider."""
        with self._strategy.scope():
            self._micro_step = tf.Variable(
                0,
                trainable=False,
                dtype=tf.int64,
                name="micro_step",
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
            for variable in variables:
                with self._strategy.extended.colocate_vars_with(variable):
                    self.accumulators.append(
                        tf.Variable(
                            tf.zeros(variable.shape, compute_dtype(variable.dtype)),
                            trainable=False,
                            name="gradient_accumulator",
                        )
                    )
        if self._pending is not None:
            self.deserialize(self._pending)

    @property
    def micro_step(self) -> tf.Variable:
        """How many micro-steps of the current update are in the accumulators."""
        if self._micro_step is None:
            raise ValueError("The accumulators do not exist before the optimizer is built.")
        return self._micro_step

    def add(self, indices: Sequence[int], gradients: Sequence[Gradient]) -> None:
        """Adds one micro-step's gradients to this replica's accumulators, in place."""
        for index, gradient in zip(indices, gradients, strict=True):
            accumulator = self.accumulators[index]
            if isinstance(gradient, tf.IndexedSlices):
                accumulator.scatter_add(gradient)
            else:
                accumulator.assign_add(gradient)

    def clear(self) -> None:
        """Empties this replica's accumulators."""
        for accumulator in self.accumulators:
            accumulator.assign(tf.zeros(accumulator.shape, accumulator.dtype))
        self.micro_step.assign(0)

    def serialize(self) -> bytes:
        """What a checkpoint stores: the replicas' sums, or nothing between updates."""
        if self._micro_step is None:
            return self._pending or b""
        micro_step = int(self.micro_step.numpy())
        if not micro_step:
            return b""
        copies = [self._strategy.experimental_local_results(a) for a in self.accumulators]
        local = len(copies[0])
        replicas = self._strategy.num_replicas_in_sync
        header = {"micro_step": micro_step, "steps": self.steps, "replicas": replicas}
        if local != replicas:
            # Other workers' sums can not be reached from here; loading will start empty.
            header["micro_step"] = 0
        buffer = io.BytesIO()
        np.savez(
            buffer,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            **{
                f"{index}/{replica}": copies[index][replica].numpy()
                for index in range(len(copies))
                for replica in range(local)
                if header["micro_step"]
            },
        )
        return buffer.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Restores what `serialize` stored; before `build` it is kept until then.

        Under another number of replicas or micro-steps the stored sums have no place to go: the
        accumulators start empty, with a warning.
        """
        if self._micro_step is None:
            self._pending = string_value
            return
        self._pending = None
        self._assign_empty()
        if not string_value:
            return
        with np.load(io.BytesIO(string_value)) as stored:
            header = json.loads(stored["header"].tobytes().decode())
            replicas = self._strategy.num_replicas_in_sync
            copies = [self._strategy.experimental_local_results(a) for a in self.accumulators]
            fits = (
                header["replicas"] == replicas == len(copies[0])
                and header["steps"] == self.steps
                and header["micro_step"]
                and all(
                    f"{index}/0" in stored and stored[f"{index}/0"].shape == tuple(copy[0].shape)
                    for index, copy in enumerate(copies)
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
            for index, copy in enumerate(copies):
                for replica, variable in enumerate(copy):
                    variable.assign(stored[f"{index}/{replica}"])
            self.micro_step.assign(header["micro_step"])

    def _assign_empty(self) -> None:
        for accumulator in self.accumulators:
            for copy in self._strategy.experimental_local_results(accumulator):
                copy.assign(tf.zeros(copy.shape, copy.dtype))
        self.micro_step.assign(0)
