"""Gradient accumulation: state that differs from replica to replica."""

import dataclasses
import logging
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.aggregation.accumulators import (
    DenseAccumulator,
    ReplicaStatistics,
    SparseAccumulator,
    any_nonzero,
    deviation_weights,
    new_variable,
)
from tf_lbopt.aggregation.replica_state import Header, ReplicaState
from tf_lbopt.aggregation.replicas import PerReplica, inside_scope
from tf_lbopt.aggregation.sparse import added, merge_repeated_indices
from tf_lbopt.rules.norms import Gradient, compute_dtype, norms, widest
from tf_lbopt.rules.rule import MEAN_NORM, MEAN_SQUARED_NORM, VARIANCE

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MicroStep:
    """Which of several micro-steps a call is, as far as tracing knows.

    Attributes:
        number: From 0 to ``of`` - 1.
        of: How many the training step that is traced takes, one after the other; the number of
            micro-steps of an update is a multiple of it.
    """

    number: int = 0
    of: int = 1

    def within(self, outer: "MicroStep") -> "MicroStep":
        """This one as a part of another."""
        return MicroStep(outer.number * self.of + self.number, outer.of * self.of)


class Accumulation(ReplicaState):
    """What each replica keeps of its gradients over the micro-steps of one update.

    `micro_step` counts the micro-steps made of the current update. It is one of the optimizer's
    variables, so whoever sets the optimizer's state sets it too, but not the accumulators. These
    have a note of their own, `filled`: the number of updates and of micro-steps after which they
    were written. Where it differs from the optimizer's numbers, the state was set in between. Then
    the next micro-step is the first of an update, and overwrites the accumulators.

    The accumulators are saved only in mid-accumulation. Between updates nothing in them is needed.

    How many micro-steps an update has is a constant of traced steps, or after `let_grow` a number
    that may be assigned at any time. The first micro-step of an update takes it over into `due`,
    which holds until the last.

    Args:
        strategy: The strategy under which the variables live.
        steps: Micro-steps per update, as long as no other number is assigned.
        statistics: What is followed beside the sum of the gradients.
        parts: Sub-batches that each replica takes one after the other, with sums of their own;
            ``steps`` counts them all.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        steps: int,
        statistics: Collection[str] = (),
        parts: int = 1,
    ):
        super().__init__(strategy)
        self.steps = steps
        self.statistics = frozenset(statistics)
        self.parts = parts
        # One of the optimizer's variables: how many micro-steps of the current update were made.
        self.micro_step: tf.Variable
        self.assigned = 0  # for the updates that begin from now on; 0 for `steps`
        self.grows = steps == 1  # whether traced steps read it: of a constant XLA makes more
        self.in_force: tf.Variable | None = None  # from where they do
        self.counted = False  # whether steps were traced in which an update has `steps`
        # Made with the first accumulators:
        self.filled: tf.Variable  # after how many updates, and micro-steps, they were as they are
        self.live: tf.Variable  # how many micro-steps were live
        self.seen: tf.Variable  # which of the optimizer's variables had a gradient in one of them
        self.finished: tf.Variable  # updates since `take_finished`; no loading of state changes it
        self.due: tf.Variable  # how many micro-steps the current update has
        self.squares: tf.Variable | None = None  # sum of squared norms that come with gradients
        self.accumulators: dict[tuple[int, int], DenseAccumulator] = {}

    def prepare(
        self,
        indices: Sequence[int],
        variables: Sequence[tf.Variable],
        gradients: Sequence[PerReplica],
        size: int,
        squares: PerReplica | None = None,
    ) -> None:
        """Creates what the gradients of a call need: in a cross-replica context, eagerly.

        ``size`` is the number of the optimizer's variables; ``squares`` as in `add`.

        Gradients decide the kind of accumulator: what arrives as ``IndexedSlices`` is kept by rows
        (under XLA, which wants static shapes, all are dense).
        """
        kept_by_rows = (
            isinstance(self.accumulators.get((0, index)), SparseAccumulator) for index in indices
        )
        if _compat.in_xla_context() and any(kept_by_rows):
            raise ValueError(
                "An optimizer that accumulates sparse gradients must be used with "
                "`jit_compile=True` from the first step on, or never. Received: a compiled step "
                "after others; make a new optimizer for it"
            )
        missing = [
            (index, variable, gradient)
            for index, variable, gradient in zip(indices, variables, gradients, strict=True)
            if (0, index) not in self.accumulators
        ]
        without_squares = squares is not None and self.squares is None
        if not missing and not without_squares:
            return
        with _compat.outside_of_functions(), self._strategy.scope():
            if not self.accumulators:
                self.filled = new_variable([2], tf.int64)
                self.live = new_variable([], tf.float32)
                self.seen = new_variable([size], tf.float32)
                self.finished = new_variable([], tf.int64)
                self.due = new_variable([], tf.int64, self.steps)
            if without_squares:
                vector = _first(squares)
                self.squares = new_variable(vector.shape, vector.dtype)
            for index, variable, gradient in missing:
                sparse = isinstance(_first(gradient), tf.IndexedSlices)
                kind = SparseAccumulator if sparse else DenseAccumulator
                with self._strategy.extended.colocate_vars_with(variable):
                    for part in range(self.parts):
                        self.accumulators[part, index] = kind(
                            variable.shape,
                            compute_dtype(variable.dtype),
                            self.statistics,
                            self._strategy.num_replicas_in_sync,
                        )
            if missing:
                self.load_pending()

    @property
    def fixed(self) -> bool:
        """Whether every update that is traced from now on has `steps` micro-steps."""
        return self.in_force is None or self.counted

    def let_grow(self) -> None:
        """Lets the number of micro-steps change, in steps that are traced from now on.

        To be called after the optimizer was built.
        """
        self.counted = False
        if self.in_force is not None:
            return
        with _compat.outside_of_functions(), self._strategy.scope():
            # Not of int32, which TensorFlow keeps on the host: XLA could not read it on a GPU.
            self.in_force = new_variable([], tf.int64, self.assigned or self.steps)

    def assign_steps(self, steps: int) -> None:
        """Sets how many micro-steps an update has that begins from now on; 0 for `steps`."""
        self.assigned = steps
        if self.in_force is not None:
            with inside_scope(self._strategy):
                self.in_force.assign(steps or self.steps)

    def position(self, micro_step: MicroStep, updates: tf.Variable) -> int | tf.Tensor:
        """How many micro-steps of the current update are in the accumulators.

        To be called in the cross-replica context, with the micro-step that is being traced and the
        variable that counts the optimizer's updates.
        """
        if self.fixed and micro_step.of == self.steps:
            return micro_step.number
        # In int32: XLA emulates the division of longer ones on TPU.
        count = tf.cast(self.micro_step, tf.int32)
        if micro_step.number > 0:  # the first of these looked at what follows
            return count
        here = tf.stack([tf.convert_to_tensor(updates), tf.convert_to_tensor(self.micro_step)])
        belongs = tf.reduce_all(tf.equal(here, self.filled))
        if micro_step.of > 1:  # an error may have left the first of earlier ones
            belongs &= count % micro_step.of == 0
        return tf.where(belongs, count, 0)

    def steps_of_update(self, count: int | tf.Tensor) -> int | tf.Tensor:
        """How many micro-steps the update at this `position` has, in the cross-replica context."""
        if self.in_force is None or self.counted:
            self.counted |= not tf.executing_eagerly()
            return self.steps
        due = tf.where(tf.equal(count, 0), self.in_force.read_value(), self.due.read_value())
        self.due.assign(due)
        return tf.cast(due, tf.int32)

    def divisor(self) -> tf.Tensor:
        """The same on a replica, when all micro-steps are there: a float32 scalar."""
        if self.fixed:
            return tf.constant(self.steps, tf.float32)
        return tf.cast(self.due.read_value(), tf.float32)

    def note(
        self, indices: Sequence[int], paths: Sequence[str | None], count: int | tf.Tensor
    ) -> tf.Tensor | None:
        """Notes which variables have a gradient in a micro-step, in the cross-replica context.

        An update is of those that have one in the last, and deviations are followed in those that
        have one: a variable that is left out after it had one would get a wrong update, or none.

        Args:
            indices: Of the variables that have one.
            paths: Of all of the optimizer's variables; ``None`` for those that are not trained.
            count: The `position`.

        Returns:
            What to multiply a gradient by: infinity, by which the update is discarded, if XLA
            compiles the step, which makes no assertions, and one of those without has had one;
            else 1. ``None`` where it is 1 in any case.

        Raises:
            tf.errors.InvalidArgumentError: When it runs: one of those without has had one.
        """
        factor = None
        seen = tf.where(tf.equal(count, 0), 0.0, self.seen.read_value())
        trained = {index: path for index, path in enumerate(paths) if path is not None}
        absent = {index: trained[index] for index in sorted(trained.keys() - set(indices))}
        if absent:
            missing = seen * _ones_at(absent, len(paths))
            factor = _compat.assert_or_discard(
                tf.reduce_all(missing == 0.0),
                [
                    "All micro-steps of an update must have gradients for the same variables: give "
                    "zeros, not None, where there is none. Expected: gradients for all that had "
                    "one earlier in this update. Received: none for "
                    f"{_validation.listed(absent.values())}"
                ],
            )
        self.seen.assign(tf.maximum(seen, _ones_at(indices, len(paths))))
        return factor

    def add(
        self,
        indices: Sequence[int],
        gradients: Sequence[Gradient],
        gradient_norms: tf.Tensor | None,
        squares: tf.Tensor | None,
        count: int | tf.Tensor,
        begins: bool | None = None,
        part: int = 0,
    ) -> tf.Tensor:
        """Adds one micro-step's gradients to this replica's accumulators, in place.

        Args:
            indices: Of the variables.
            gradients: One each.
            gradient_norms: [n], what stands for their norms; ``None`` for these themselves.
            squares: A vector to be summed with them, or ``None``.
            count: The `position`; the first micro-step (of each part) overwrites.
            begins: Whether it is the first, where the caller has a condition for that; else
                ``None``.
            part: Which of the replica's sub-batches this is.

        Returns:
            What is there when all is added.
        """
        counted = self.statistics & {VARIANCE, MEAN_NORM}
        live = any_nonzero(list(gradients)) if counted else tf.constant(True)
        if gradient_norms is None and MEAN_NORM in self.statistics:
            gradients = [merge_repeated_indices(gradient) for gradient in gradients]
            gradient_norms = norms(gradients)
        own_norms: Sequence[tf.Tensor | None] = [None] * len(indices)
        if gradient_norms is not None:
            own_norms = tf.unstack(gradient_norms, num=len(indices))
        accumulators = [self.accumulators[part, index] for index in indices]
        before = tf.where(tf.equal(count, 0), 0.0, self.live.read_value())

        def begin() -> tf.Tensor:
            for (of_part, index), accumulator in self.accumulators.items():
                if of_part == part and index not in indices:
                    accumulator.clear()
            for accumulator, gradient, norm in zip(accumulators, gradients, own_norms, strict=True):
                accumulator.begin(gradient, live, norm)
            return tf.constant(True)

        def go_on() -> tf.Tensor:
            if VARIANCE in self.statistics:
                # The first live one deviates from nothing, and what is not live does not count.
                deviates = tf.where(live, before, 0.0)
                replicas = self._strategy.num_replicas_in_sync
                weights = {
                    dtype: deviation_weights(tf.cast(deviates, dtype), replicas)
                    for dtype in {gradient.dtype for gradient in gradients}
                }
                for accumulator, gradient in zip(accumulators, gradients, strict=True):
                    accumulator.deviate(gradient, weights[gradient.dtype])
            for accumulator, gradient, norm in zip(accumulators, gradients, own_norms, strict=True):
                accumulator.add(gradient, live, norm)
            return tf.constant(True)

        # Until it is whole, what is there belongs to no micro-step.
        emptied = self.filled.assign(tf.zeros_like(self.filled), read_value=False)
        with tf.control_dependencies([] if emptied is None else [emptied]):
            self.live.assign(before + tf.cast(live, before.dtype))
            if squares is not None and self.squares is not None:
                first = tf.equal(count, 0)
                kept = tf.where(first, tf.zeros_like(squares), self.squares.read_value())
                self.squares.assign(kept + squares)
            if begins is not None:
                write = begin if begins else go_on
                # As a function it returns when all is written, as a condition does.
                return write() if tf.executing_eagerly() else tf.function(write, autograph=False)()
            if isinstance(count, int):
                return begin() if count < self.parts else go_on()
            return tf.cond(count < self.parts, begin, go_on)

    def advance(self, count: int | tf.Tensor, updates: tf.Variable) -> tf.Tensor:
        """Notes, on this replica, that a micro-step was added at this `position`; not the last.

        Returns the new one.
        """
        made = tf.cast(count + 1, tf.int64)
        self.micro_step.assign(made)
        self.filled.assign(tf.stack([tf.convert_to_tensor(updates), made]))
        return made

    def finish(self) -> None:
        """Notes, on this replica, that an update was made or discarded: the next one begins."""
        self.micro_step.assign(tf.zeros_like(self.micro_step))
        self.finished.assign(self.finished.read_value() + 1)

    def take_finished(self) -> int:
        """How many updates were made or discarded since the last call, or the first gradients."""
        finished = int(self.finished.numpy())
        self.finished.assign(0)
        return finished

    def read(self, indices: Sequence[int]) -> ReplicaStatistics:
        """This replica's sums and deviations."""
        # `read_value` and not a conversion: its result bears the replica's device, without which
        # the reduction does not pack it with the others.
        count = self.live.read_value()
        if self.parts > 1:
            parts = [self.read_part(indices, part) for part in range(self.parts)]
            return ReplicaStatistics(
                [added(of_all) for of_all in zip(*parts, strict=True)], None, count
            )
        pairs = [self.accumulators[0, index].read(count) for index in indices]
        followed = VARIANCE in self.statistics
        return ReplicaStatistics(
            [total for total, _ in pairs],
            [deviations for _, deviations in pairs] if followed else None,
            count,
        )

    def read_part(self, indices: Sequence[int], part: int) -> list[Gradient]:
        """This replica's sums over one of its sub-batches."""
        count = self.live.read_value()
        return [self.accumulators[part, index].read(count)[0] for index in indices]

    def read_norms(self, indices: Sequence[int]) -> tf.Tensor:
        """[n], this replica's sums of the gradients' norms."""
        sums: list[tf.Variable] = [self.accumulators[0, index].norm_sum for index in indices]
        dtype = widest([norm_sum.dtype for norm_sum in sums])
        return tf.stack([tf.cast(norm_sum.read_value(), dtype) for norm_sum in sums])

    def read_squares(self) -> tf.Tensor:
        """This replica's sum of what came with the gradients of squared norms."""
        assert self.squares is not None, "who asks for them must have given them"
        return self.squares.read_value()

    # -- saving ------------------------------------------------------------------------------------

    def state(self) -> dict[str, tf.Variable] | None:
        """All accumulators by name, or ``None`` before the first gradients."""
        if not self.accumulators:
            return None
        # What was asked for from outside is nothing that a file must have.
        declared = MEAN_SQUARED_NORM in self.statistics and self.squares is not None
        return {
            "live": self.live,
            **({"squares": self.squares} if declared else {}),
            **{
                f"{part}.{index}.{accumulator.kind}.{number}": variable
                for (part, index), accumulator in self.accumulators.items()
                for number, variable in enumerate(accumulator.variables())
            },
        }

    def header(self) -> Header | None:
        """Where in the accumulation it is; ``None`` between updates."""
        filled = self.filled.numpy().tolist()
        if filled[1] == 0 or filled[1] != int(self.micro_step.numpy()):
            return None
        return {"filled": filled, "steps": self.steps if self.fixed else int(self.due.numpy())}

    def accept(self, header: Header) -> bool:
        """Whether an update of so many micro-steps can be gone on with."""
        return not self.fixed or header["steps"] == self.steps

    def reset(self) -> None:
        """Makes the next micro-step begin."""
        self.filled.assign(tf.zeros_like(self.filled))

    def restored(self, header: Header) -> None:
        """Notes where the saved one was filled."""
        self.filled.assign(header["filled"])
        if self.squares is not None and MEAN_SQUARED_NORM not in self.statistics:
            self.squares.assign(tf.zeros_like(self.squares))  # of other gradients
        self.due.assign(header["steps"])
        self.seen.assign(tf.zeros_like(self.seen))

    def lost(self, header: Header) -> None:
        """Warns that micro-steps are lost."""
        _logger.warning(
            "The checkpoint was written in mid-accumulation on %d replicas with "
            "gradient_accumulation_steps=%d; here there are %d replicas and "
            "gradient_accumulation_steps=%d (if these are the same: other variables, or sparse "
            "gradients with jit_compile=True on one side only). The accumulators start empty: the "
            "micro-steps since the last update are lost, nothing else.",
            header["replicas"], header["steps"], self._strategy.num_replicas_in_sync, self.steps,
        )  # fmt: skip


def _ones_at(indices: Iterable[int], size: int) -> tf.Tensor:
    ones = np.zeros(size, np.float32)
    ones[list(indices)] = 1.0
    return tf.constant(ones)


def _first(value: PerReplica) -> Gradient:
    """The gradient itself, or the first replica's of a per-replica value."""
    if isinstance(value, tf.distribute.DistributedValues):
        return value.values[0]
    return value
