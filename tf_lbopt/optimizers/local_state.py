"""The state that each replica has of its own in the local phase of post-local SGD."""

import logging
import warnings
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt.aggregation.replica_state import Header, ReplicaState, header_of
from tf_lbopt.optimizers.origin import Origin, assign_all, variable_like
from tf_lbopt.optimizers.trained import tensorflow_variable

_logger = logging.getLogger(__name__)


class LocalState(ReplicaState):
    """What is each replica's own in the local phase: weights, the rule's slots, steps left out.

    Restored state is put in place by `settle`, before the next step: a checkpoint restores slots,
    ordinary variables, to one value for all replicas, and does so after this.

    Args:
        strategy: The strategy under which the variables live.
        iterations: The optimizer's counter of updates.
        skipped_updates: That of those left out.
        since_average: That of the local steps since the last average.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        iterations: keras.Variable,
        skipped_updates: keras.Variable,
        since_average: keras.Variable,
    ):
        super().__init__(strategy)
        self.iterations = tensorflow_variable(iterations)
        self.skipped_updates = tensorflow_variable(skipped_updates)
        self.since_average = tensorflow_variable(since_average)
        self._warned = False
        self._created = False
        self.origin: Origin
        self.targets: list[tf.Variable] = []
        self.weights: list[tf.Variable] = []
        self.slots: list[tf.Variable] = []
        self.skipped: tf.Variable
        self.apart = False
        """Whether replicas have taken local steps, and their slots may differ."""

    def create(self, targets: Sequence[tf.Variable], slots: Sequence[tf.Variable]) -> None:
        """Makes the variables; without targets on a single replica, which takes no local steps."""
        self.targets, self.slots = list(targets), list(slots)
        self.weights = [variable_like(self._strategy, target) for target in targets]
        self.skipped = tf.Variable(tf.zeros([], tf.int64), trainable=False, name="left_out")
        self.origin = Origin(self._strategy, targets)
        self._created = True

    # -- within a step, on each replica ------------------------------------------------------------

    def enter(self) -> None:
        """Puts this replica's weights into the model's variables."""
        with tf.control_dependencies([self.adopt()]), self.origin.left():
            assign_all(self.targets, self.weights)

    def adopt(self) -> tf.Tensor:
        """Goes on from what the model's variables hold where that is not the last average."""

        def take_over() -> tf.Tensor:
            # The averages last: an error before leaves a difference that is seen the next time.
            with tf.control_dependencies(assign_all(self.weights, self.targets)):
                saved = self.origin.save()
            with tf.control_dependencies(saved):
                self.since_average.assign(tf.zeros_like(self.since_average))
            return tf.constant(True)

        differing = [
            tf.reduce_any(tf.not_equal(target.read_value(), average.read_value()))
            for target, average in zip(self.targets, self.origin.copies, strict=True)
        ]
        new = tf.reduce_any(tf.stack([tf.equal(self.since_average, 0), *differing]))
        return tf.cond(new, take_over, lambda: tf.constant(False))

    def leave(self, iterations: tf.Tensor, skipped_updates: tf.Tensor) -> None:
        """Keeps what the model's variables hold as this replica's, and puts the average back.

        The counters are given as they were before this step.
        """
        with tf.control_dependencies(assign_all(self.weights, self.targets)):
            restored = self.origin.restore()
        with tf.control_dependencies(restored):  # the counters are the same on all replicas again
            self.skipped.assign_add(self.skipped_updates - skipped_updates)
            self.skipped_updates.assign(skipped_updates)
            self.iterations.assign(iterations + 1)
            self.since_average.assign_add(1)

    def give_up(self) -> tf.Tensor:
        """Goes back to the last average, without slots."""
        assign_all(self.weights, self.origin.copies)
        for slot in self.slots:
            slot.assign(tf.zeros_like(slot))
        self.skipped.assign_add(1)
        return tf.constant(False)

    # -- between steps -----------------------------------------------------------------------------

    def count_of(self, counter: tf.Variable) -> int:
        """The value of a counter that is the same on all replicas."""
        # The copy itself: reading what distributes it takes several times as long.
        return int(self._local_copies(counter)[0].numpy())

    def steps(self) -> int:
        """How many local steps were made since the last average."""
        return self.count_of(self.since_average)

    def warn_if_behind(self, use: str) -> None:
        """Warns once where the model's variables are used that lack local steps."""
        steps = 0 if self._warned else self.steps()
        if steps:
            self._warned = True
            warnings.warn(
                f"The weights that are {use} are the last average of the replicas': the local "
                f"steps of PostLocalSGD since then are not in them ({steps} on each replica). Call "
                "`optimizer.end_period()` before, or give `fit` tf_lbopt.callbacks.EndPeriod(), "
                "first in its list.",
                stacklevel=3,
            )

    def recover(self) -> None:
        """Puts the average back on all replicas, after an error."""
        self.origin.recover()
        # Some replicas may have ended their step.
        for counter in (self.iterations, self.skipped_updates, self.since_average):
            made = {int(copy.numpy()) for copy in self._local_copies(counter)}
            if len(made) > 1:
                self._assign(counter, min(made))

    def unite(self) -> None:
        """Gives all replicas the mean of their slots."""
        self.apart = False
        for slot in self.slots:
            self._assign(slot, _mean([copy.numpy() for copy in self._local_copies(slot)]))

    def settle(self) -> None:
        """Puts restored state in place, once there are variables for it."""
        if self._pending is None or not self._created:
            return
        stored, self.apart = self._pending, False
        super().load(stored)
        if stored and not self.apart:
            replicas = range(header_of(stored)["replicas"])
            for index, slot in enumerate(self.slots):
                copies = [stored.get(f"momentum.{index}.{r}", np.zeros([0])) for r in replicas]
                if copies[0].shape == slot.shape:
                    self._assign(slot, _mean(copies))
            self._assign(self.since_average, 0)

    # -- saving ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is to store; nothing before the first local step."""
        if self._pending is not None:
            return self._pending
        if not (self.apart or self.steps()):
            return {}
        self.warn_if_behind("saved")
        return super().arrays()

    def part(self) -> dict[str, np.ndarray]:
        """Nothing: on several workers training goes on from the last average."""
        return {}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps `arrays` for `settle`."""
        self._pending = dict(arrays)

    def state(self) -> dict[str, tf.Variable] | None:
        """The variables that are saved; right after an average no weights."""
        if not self._created:
            return None
        groups = {"momentum": self.slots}
        if self.steps():
            groups |= {"weights": self.weights, "average": self.origin.copies}
        state = {f"{name}.{i}": v for name, group in groups.items() for i, v in enumerate(group)}
        return {**state, "skipped": self.skipped}

    def header(self) -> Header:
        """Where in the period it is."""
        return {"updates": self.steps()}

    def accept(self, header: Header) -> bool:
        """Whether it has a place here, if it is that of as many replicas."""
        return bool(header["complete"])

    def reset(self) -> None:
        """Forgets which steps were left out; all else is what the optimizer's variables say."""
        self._assign(self.skipped, 0)

    def restored(self, header: Header) -> None:
        """The replicas' slots are their own again."""
        self.apart = True

    def lost(self, header: Header) -> None:
        """Warns of what is lost on another number of replicas."""
        _logger.warning(
            "The checkpoint was written in the local phase of post-local SGD on %d replicas, %d "
            "updates after the last average; here there are %d replicas. Training goes on from "
            "the last average: those updates are lost, and every replica begins with the mean of "
            "the replicas' momenta.",
            header["replicas"], header["updates"], self._strategy.num_replicas_in_sync,
        )  # fmt: skip

    def _local_copies(self, variable: tf.Variable) -> tuple[tf.Variable, ...]:
        return self._strategy.experimental_local_results(variable)

    def _assign(self, variable: tf.Variable, value: float | np.ndarray) -> None:
        for copy in self._local_copies(variable):
            copy.assign(tf.cast(value, copy.dtype))


def _mean(copies: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean([copy.astype(float) for copy in copies], axis=0)
