"""Steps that take gradients at other weights than Python sees: extrapolated and local ones.

Each replica moves its own copies of the model's variables within a training step, in a block, and
the variables hold their origin again whenever Python has control. The origin is kept, not computed
back, so that replicas stay equal to the last bit.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import tensorflow as tf

from tf_lbopt.aggregation.replicas import OfReplica, on_each_replica, replica_context_of
from tf_lbopt.optimizers.trained import Trained
from tf_lbopt.rules.norms import Gradient

_Result = TypeVar("_Result")

# Of `fit`: a training step of a batch, or a training function of an iterator over batches.
TrainingStep: TypeAlias = Callable[[Any], object]


class Origin:
    """What variables hold between steps, kept while they may hold something else within one.

    In no checkpoint: a plain object, whose variables are not tracked.

    Args:
        strategy: Under which the variables live, and in whose scope this is made.
        variables: They.
    """

    def __init__(self, strategy: tf.distribute.Strategy, variables: Sequence[tf.Variable]):
        self._strategy = strategy
        self._variables = list(variables)
        self.copies = [variable_like(strategy, variable) for variable in variables]
        # Which variables may hold something else now.
        self._moved = tf.Variable([False] * len(self.copies), trainable=False, name="moved")

    # -- on each replica; without indices, of all variables ----------------------------------------

    @contextlib.contextmanager
    def left(self, indices: Sequence[int] | None = None) -> Iterator[None]:
        """Within this block these variables may be written."""
        marks = [indices is None or index in indices for index in range(len(self.copies))]
        with tf.control_dependencies(done(self._moved.assign(marks, read_value=False))):
            yield

    def save(self, indices: Sequence[int] | None = None) -> list[tf.Operation]:
        """Takes what these variables hold for their origin.

        Returns:
            What must be done before `left`: an error in mid-step is recovered from by whole copies.
        """
        return assign_all(self.copies, self._variables, indices)

    def restore(self, indices: Sequence[int] | None = None) -> list[tf.Operation]:
        """Puts these variables back; returns what must be done before anything that follows."""
        restored = assign_all(self._variables, self.copies, indices)
        with tf.control_dependencies(restored):
            return done(self._moved.assign([False] * len(self.copies), read_value=False))

    # -- between steps -----------------------------------------------------------------------------

    def moved(self) -> np.ndarray:
        """[n] booleans: which variables were not put back, on any replica."""
        return np.any([copy.numpy() for copy in self._local(self._moved)], axis=0)

    def recover(self) -> None:
        """Puts back what a step that ended in an error has left moved."""
        moved = self.moved()
        for index in map(int, np.flatnonzero(moved)):
            pairs = zip(
                self._local(self._variables[index]), self._local(self.copies[index]), strict=True
            )
            for variable, origin in pairs:
                variable.assign(origin.read_value())
        for copy in self._local(self._moved):
            copy.assign(np.zeros_like(moved))

    def _local(self, variable: tf.Variable) -> tuple[tf.Variable, ...]:
        return self._strategy.experimental_local_results(variable)


def variable_like(
    strategy: tf.distribute.Strategy, variable: tf.Variable, dtype: tf.DType | None = None
) -> tf.Variable:
    """A variable of zeros of each replica's own, where another is."""
    with strategy.extended.colocate_vars_with(variable):
        zeros = tf.zeros(variable.shape, dtype or variable.dtype)
        return tf.Variable(zeros, trainable=False, name="of_replica")


def assign_all(
    targets: Sequence[tf.Variable],
    sources: Sequence[tf.Variable],
    indices: Sequence[int] | None = None,
) -> list[tf.Operation]:
    """Assigns variables, or those at some places, to others; returns operations to wait for."""
    places = range(len(targets)) if indices is None else indices
    return done(*(targets[i].assign(sources[i].read_value(), read_value=False) for i in places))


def done(*operations: tf.Operation | None) -> list[tf.Operation]:
    """Operations to wait for; eagerly there are none."""
    return [operation for operation in operations if operation is not None]


def _current_graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


@dataclasses.dataclass
class Block:
    """An open block of a training step.

    Attributes:
        indices: The numbers of the variables that are moved in it.
        local: Whether the step is a local one of post-local SGD.
        applied: Whether the update was made.
        graph: In which the block was opened, ``None`` eagerly.
    """

    indices: Sequence[int] = ()
    local: bool = False
    applied: bool = False
    graph: tf.Graph | None = dataclasses.field(default_factory=_current_graph)


# Those that are open.
_blocks: OfReplica[Block] = OfReplica()


class StepsInBlocks:
    """Mixin of an optimizer whose gradients are taken, and applied once, in a block."""

    _strategy: tf.distribute.Strategy
    trained: Trained

    def recover(self) -> None:
        """Puts the weights back after a step that ended in an error. `fit` does this by itself."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _in_block(
        self, name: str, indices: Sequence[int] = (), local: bool = False
    ) -> Iterator[Block]:
        if _blocks.get(self) is not None:
            raise ValueError(f"`{name}` blocks can not be nested. Received: a block in a block")
        block = Block(indices, local)
        with _blocks.left(self, block):
            try:
                yield block
            except BaseException:
                if tf.executing_eagerly():
                    self.recover()
                raise

    def _block_of_update(self, name: str, refusal: str) -> Block:
        """The block around an update.

        Raises:
            ValueError: There is none or it had its update; or this one is not in the block itself.
        """
        block = _blocks.get(self)
        if block is None or block.applied:
            raise ValueError(refusal)
        if block.graph is not _current_graph():
            # Putting back is part of the update: a branch not taken would leave weights moved.
            raise ValueError(
                f"{type(self).__name__} must be applied in the `with optimizer.{name}(...):` "
                "block itself. Put the block inside the `tf.function` (the condition, the loop). "
                "Received: gradients from a `tf.function`, condition or loop inside the block"
            )
        return block

    def _merge(self, cross_replicas: Callable[..., _Result], *args: Gradient) -> _Result:
        """Calls a function once for all replicas, which all call this, with their own tensors."""
        return replica_context_of(self._strategy).merge_call(cross_replicas, args=args)

    def _on_each_replica(self, fn: Callable[..., object], *args: tf.Tensor) -> None:
        """Calls a function on each replica, which all call this, with its own tensors."""

        def call(*own: tf.Tensor) -> list[tf.Tensor]:
            fn(*own)
            return [tf.constant(True)]

        anchor = self.trained.iterations
        self._merge(lambda strategy, *all_: on_each_replica(strategy, anchor, call, *all_), *args)

    def _recovering(self, function: TrainingStep) -> TrainingStep:
        """A training function after whose errors the weights are put back."""

        def recovering(iterator: object) -> object:
            try:
                return function(iterator)
            except BaseException:
                self.recover()
                raise

        return recovering
