"""The state that each replica has of its own in the local phase of post-local SGD."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt.aggregation.replica_state import ReplicaState, header_of
from tf_lbopt.optimizers.exclusion import tensorflow_variable

_logger = logging.getLogger(__name__)


class LocalState(ReplicaState):
    """What is each replica's own in the local phase: weights, momentum, steps left out.

    On one replica none of it exists. Restored state is put in place by `settle`, before the next
    step: a checkpoint restores the momentum, an ordinary variable, to one value for all replicas,
    and does so after this.

    Args:
        strategy: The strategy under which the variables live.
        counter: Of the local updates since the last average, one of the optimizer's variables.
        in_use: Whether local steps have been taken.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, counter: keras.Variable, in_use: Callable[[], bool]
    ):
        super().__init__(strategy)
        self._counter = tensorflow_variable(counter)
        self._in_use = in_use
        self._alone = strategy.num_replicas_in_sync == 1
        self._created = False
        self.weights: list[tf.Variable] = []
        self.averages: list[tf.Variable] = []
        self.momenta: list[tf.Variable] = []
        self.skipped: tf.Variable
        self._away: tf.Variable
        self.momenta_differ = False

    def create(self, targets: Sequence[tf.Variable], momenta: Sequence[tf.Variable]) -> None:
        """Makes the variables."""
        self.momenta = list(momenta)
        self._created = True
        if self._alone:
            return
        for variables in (self.weights, self.averages):
            for target in targets:
                with self._strategy.extended.colocate_vars_with(target):
                    variables.append(_variable(tf.zeros(target.shape, target.dtype)))
        self.skipped = _variable(tf.zeros([], tf.int64))
        # Whether the model's variables hold something else than the average now.
        self._away = _variable(tf.constant(False))

    # -- within a step, on each replica ------------------------------------------------------------

    def depart(self, targets: Sequence[tf.Variable]) -> None:
        """Puts this replica's weights into the model's variables."""

        def written() -> tf.Tensor:
            differing = [
                tf.reduce_any(tf.not_equal(target.read_value(), average.read_value()))
                for target, average in zip(targets, self.averages, strict=True)
            ]
            return tf.reduce_any(tf.stack(differing))

        def take_over() -> tf.Tensor:
            # The averages last: an error before leaves a difference that is seen the next time.
            with tf.control_dependencies(_assign_all(self.weights, targets)):
                ready = _assign_all(self.averages, targets)
            with tf.control_dependencies(ready):
                self._counter.assign(tf.zeros_like(self._counter))
            return tf.constant(True)

        new = tf.cond(tf.equal(self._counter, 0), lambda: tf.constant(True), written)
        with tf.control_dependencies([tf.cond(new, take_over, lambda: tf.constant(False))]):
            away = _done(self._away.assign(True, read_value=False))
        with tf.control_dependencies(away):
            _assign_all(targets, self.weights)

    def put_back(self, targets: Sequence[tf.Variable]) -> list[Any]:
        """Puts the average back; what comes after it must wait for what is returned."""
        with tf.control_dependencies(_assign_all(targets, self.averages)):
            return _done(self._away.assign(False, read_value=False))

    def count(self) -> None:
        """Counts a local update."""
        self._counter.assign_add(1)

    def give_up(self) -> tf.Tensor:
        """Goes back to the last average, without momentum."""
        _assign_all(self.weights, self.averages)
        for momentum in self.momenta:
            momentum.assign(tf.zeros_like(momentum))
        self.skipped.assign_add(1)
        return tf.constant(False)

    def begin_period(self) -> None:
        """Begins a new period, from the model's variables."""
        self._counter.assign(tf.zeros_like(self._counter))
        self.skipped.assign(tf.zeros_like(self.skipped))
        self._away.assign(False)

    # -- between steps -----------------------------------------------------------------------------

    def updates(self) -> int:
        """How many local updates were made since the last average."""
        return 0 if self._alone else count_of(self._strategy, self._counter)

    def is_away(self) -> bool:
        """Whether a step has not ended, on any replica."""
        if self._alone or not self._created:
            return False
        return any(bool(copy.numpy()) for copy in self._local_copies(self._away))

    def recover(self, targets: Sequence[tf.Variable], iterations: tf.Variable) -> None:
        """Puts the average back on all replicas, after an error."""
        if self._alone:
            return
        if self.is_away():
            for target, average in zip(targets, self.averages, strict=True):
                copies = zip(self._local_copies(target), self._local_copies(average), strict=True)
                for copy, value in copies:
                    copy.assign(value.read_value())
            self._assign(self._away, False)
        for counter in (iterations, self._counter):  # some replicas may have ended their step
            made = {int(copy.numpy()) for copy in self._local_copies(counter)}
            if len(made) > 1:
                self._assign(counter, min(made))

    def restart(self) -> None:
        """Makes all replicas go on from the model's variables."""
        if not self._alone:
            self._assign(self._counter, 0)
            self._assign(self._away, False)

    def unite_momenta(self) -> None:
        """Gives all replicas the mean of their momenta."""
        self.momenta_differ = False
        for momentum in self.momenta:
            copies = [copy.numpy().astype(float) for copy in self._local_copies(momentum)]
            if any(not np.array_equal(copy, copies[0]) for copy in copies[1:]):
                self._assign(momentum, np.mean(copies, axis=0))

    def settle(self) -> None:
        """Puts restored state in place, once there are variables for it."""
        if self._pending is None or not self._created:
            return
        stored, self._pending = self._pending, None
        if not self._alone:
            self._assign(self.skipped, 0)
        if not stored:
            return
        header = header_of(stored)
        if self.accept(header):
            for name, copies in self._copies_of(header["updates"]).items():
                for replica, copy in enumerate(copies):
                    copy.assign(tf.cast(stored[f"{name}.{replica}"], copy.dtype))
            self.momenta_differ = True
            return
        if header["complete"] and header["momenta"] == self._shapes():
            for index, momentum in enumerate(self.momenta):
                own = [stored[f"momentum.{index}.{r}"] for r in range(header["replicas"])]
                self._assign(momentum, np.mean(own, axis=0))
        self._assign(self._counter, 0)
        self.lost(header)

    # -- saving ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is to store; nothing before the first local step."""
        if self._pending is not None:
            return self._pending
        if self._alone or not self._created or not self._in_use():
            return {}
        return self._arrays(self.header(), self._copies_of(self.updates()))

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps `arrays` for `settle`."""
        self._pending = dict(arrays)

    def state(self) -> dict[str, tf.Variable]:
        """The variables that are saved in mid-period."""
        return {
            **{f"weights.{index}": variable for index, variable in enumerate(self.weights)},
            **{f"average.{index}": variable for index, variable in enumerate(self.averages)},
            **{f"momentum.{index}": variable for index, variable in enumerate(self.momenta)},
            "skipped": self.skipped,
        }

    def header(self) -> dict[str, Any]:
        """Where in the period it is, and the shapes."""
        return {"updates": self.updates(), "momenta": self._shapes()}

    def accept(self, header: Mapping[str, Any]) -> bool:
        """Whether it was saved on as many replicas, and all of it."""
        return (
            header["replicas"] == self._strategy.num_replicas_in_sync
            and header["complete"]
            and header["momenta"] == self._shapes()
        )

    def lost(self, header: Mapping[str, Any]) -> None:
        """Warns of what is lost on another number of replicas."""
        _logger.warning(
            "The checkpoint was written in the local phase of post-local SGD on %d replicas, %d "
            "updates after the last average; here there are %d replicas. Training goes on from "
            "the last average: those updates are lost, and every replica begins with the mean of "
            "the replicas' momenta.",
            header["replicas"], header["updates"], self._strategy.num_replicas_in_sync,
        )  # fmt: skip

    def _copies_of(self, updates: int) -> dict[str, tuple[tf.Variable, ...]]:
        """What there is to save so many updates after an average: right after it, no weights."""
        return {
            name: copies
            for name, copies in self._copies().items()
            if updates or not name.startswith(("weights", "average"))
        }

    def _shapes(self) -> list[list[int]]:
        return [momentum.shape.as_list() for momentum in self.momenta]

    def _local_copies(self, variable: tf.Variable) -> tuple[tf.Variable, ...]:
        return self._strategy.experimental_local_results(variable)

    def _assign(self, variable: tf.Variable, value: Any) -> None:
        for copy in self._local_copies(variable):
            copy.assign(tf.cast(value, copy.dtype))


def count_of(strategy: tf.distribute.Strategy, counter: tf.Variable) -> int:
    """The value of a counter that is the same on all replicas."""
    # The copy itself: reading what distributes it takes several times as long.
    return int(strategy.experimental_local_results(counter)[0].numpy())


def _variable(value: tf.Tensor) -> tf.Variable:
    return tf.Variable(value, trainable=False, name="post_local_sgd")


def _assign_all(targets: Sequence[tf.Variable], sources: Sequence[tf.Variable]) -> list[Any]:
    return _done(
        *(
            target.assign(source.read_value(), read_value=False)
            for target, source in zip(targets, sources, strict=True)
        )
    )


def _done(*operations: Any) -> list[Any]:
    """Operations to wait for; eagerly there are none."""
    return [operation for operation in operations if operation is not None]
