"""One update, from the replicas' gradients to their new weights.

    1 prepare      on each replica: the gradients in the dtype of the arithmetic, float32 or wider
    2 accumulate   on all but the last micro-step: add to this replica's accumulators and stop
    3 reduce       one packed all-reduce of the sums (and of counts and norms); for the variance a
                   second one, of the squared deviations from the mean that the first gave
    4 update       on each replica, without communication: see `Algorithm` in
                   `tf_lbopt.optimizers.algorithm`

2 and 3 run in the cross-replica context, the only one where a condition and a collective may meet.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.aggregation.accumulation import Accumulation, MicroStep
from tf_lbopt.aggregation.accumulators import (
    ReplicaStatistics,
    any_nonzero,
    shares_of_deviations,
)
from tf_lbopt.aggregation.replicas import (
    PerReplica,
    bundle,
    each_replica,
    on_each_replica,
    sum_over_replicas,
)
from tf_lbopt.aggregation.sparse import merge_repeated_indices
from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.norms import Gradient, norms
from tf_lbopt.rules.rule import MEAN_NORM, OWN_GRADIENT, VARIANCE, dense


class Sums(NamedTuple):
    """What the reduction gives to each replica.

    Attributes:
        totals: The sums of the gradients over replicas and micro-steps; sparse ones may have
            repeated indices.
        live: How many sub-batches had a gradient at all; ``None`` where nobody asks.
        norms: [n], the sums of the norms of the sub-batches' gradients, or ``None``, likewise.
        deviations: The squared deviations of the sub-batches' gradients, or ``None``, likewise.
        own: This replica's own sums, a list for each of the sub-batches that it takes one after the
            other; empty where nobody asks.
        squares: The sums of what each replica has given of squared norms, or ``None``, likewise.
    """

    totals: list[PerReplica]
    live: PerReplica | None = None
    norms: PerReplica | None = None
    deviations: list[PerReplica] | None = None
    own: Sequence[list[PerReplica]] = ()
    squares: PerReplica | None = None

    def at(self, places: Sequence[int]) -> "Sums":
        """The part of some of the gradients, on one replica."""

        def chosen(of_all: list[Gradient]) -> list[Gradient]:
            return [of_all[place] for place in places]

        return Sums(
            chosen(self.totals),
            self.live,
            None if self.norms is None else tf.gather(self.norms, places),
            None if self.deviations is None else chosen(self.deviations),
            [chosen(part) for part in self.own],
        )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How the gradients of one call become an update.

    Attributes:
        strategy: Under which the variables live.
        indices: For each gradient the number of its variable, as the optimizer counts them.
        variables: For each gradient its variable.
        paths: Of all of the optimizer's variables; ``None`` for those that are not trained.
        anchor: A variable that exists on every replica: the optimizer's count of updates.
        statistics: What must be known of the sub-batches beyond their mean gradient.
        micro_step: Which one this is; where all of an update are known, the update is traced with
            the last one only.
        accumulation: The replicas' accumulators, or ``None`` without accumulation.
        summed: Whether the gradients are sums over the replicas already, the same on each; then
            there must be no statistics.
        prepare: In the cross-replica context, once per update: what all replicas must agree on (the
            learning rate).
        reduction: `sum_over_replicas`, or what takes its place for the gradients; of the latter
            there must be no statistics.
        update: On each replica, given ``anchor``, what ``prepare`` returned and `Sums`: makes the
            update; returns whether the gradients were finite.
    """

    strategy: tf.distribute.Strategy
    indices: Sequence[int]
    variables: Sequence[tf.Variable]
    paths: Sequence[str | None]
    anchor: tf.Variable
    statistics: Sequence[str]
    micro_step: MicroStep
    accumulation: Accumulation | None
    summed: bool
    prepare: Callable[[], tf.Tensor]
    reduction: Callable[
        [tf.distribute.Strategy, Sequence[PerReplica], Sequence[tf.Variable]], list[PerReplica]
    ]
    update: Callable[[tf.Variable, tf.Tensor, Sums], list[tf.Tensor]]

    def run(
        self,
        strategy: tf.distribute.Strategy,
        gradients: list[PerReplica],
        gradient_norms: PerReplica | None,
        squares: PerReplica | None,
    ) -> tf.Tensor:
        """Makes an update of the replicas' gradients; a function for `merge_call`.

        Args:
            strategy: As above.
            gradients: What `prepared` returned on each replica.
            gradient_norms: [n], what stands for the norms of these gradients in the mean norm, in
                their units (for norms by example: the sum of the norms of what the examples
                contribute to the gradient); ``None`` for the norms themselves.
            squares: A vector to be summed over replicas and micro-steps, or ``None``.

        Returns:
            Whether the gradients were finite; true before an update is due.
        """
        if self.accumulation is not None:
            return self._accumulated(self.accumulation, gradients, gradient_norms, squares)
        sums = self._reduced(gradients, gradient_norms, squares)
        updates = each_replica(strategy, self.anchor)(self.update, args=(self.prepare(), sums))
        return updates[0][0]  # the first replica's, with whom all others agree

    def _accumulated(
        self,
        accumulation: Accumulation,
        gradients: list[PerReplica],
        gradient_norms: PerReplica | None,
        squares: PerReplica | None,
    ) -> tf.Tensor:
        strategy, micro_step = self.strategy, self.micro_step
        accumulation.prepare(self.indices, self.variables, gradients, len(self.paths), squares)
        count = accumulation.position(micro_step, self.anchor)
        steps = accumulation.steps_of_update(count)
        factor = accumulation.note(self.indices, self.paths, count)

        def computed(local: list[Gradient]) -> list[tf.Tensor]:
            with tf.control_dependencies(tf.nest.flatten(local, expand_composites=True)):
                return [tf.constant(True)]

        # Nothing is written before all gradients are there: not where there are none, because a
        # data set of unknown size has ended, nor where one replica's end in an error.
        (there,) = on_each_replica(strategy, self.anchor, computed, gradients)
        if not isinstance(count, int):  # conditions on it wait; what is in them would not
            with tf.control_dependencies(list(there)):
                count = tf.identity(count)

        def add(
            begins: bool | None,
            local: list[Gradient],
            local_norms: tf.Tensor | None,
            local_squares: tf.Tensor | None,
            count: int | tf.Tensor,
        ) -> list[tf.Tensor]:
            if factor is not None and local:
                local = [scale(local[0], tf.cast(factor, local[0].dtype)), *local[1:]]
            part = micro_step.number % accumulation.parts
            # Not what it returns, the output of a condition: for one that other devices wait for,
            # TensorFlow 2.20 may make two nodes of one name ("is not unique").
            with tf.control_dependencies(list(there)):
                added = accumulation.add(
                    self.indices, local, local_norms, local_squares, count, begins, part
                )
            with tf.control_dependencies([added]):
                return [tf.constant(True)]

        def last() -> tf.Tensor:
            sums = self._reduced(None, None, squares)
            updates = each_replica(strategy, self.anchor)(self.update, args=(self.prepare(), sums))
            return updates[0][0]

        def advance() -> tf.Tensor:
            on_each_replica(
                strategy, self.anchor, lambda at: [accumulation.advance(at, self.anchor)], count
            )
            return tf.constant(True)

        def made(begins: bool | None, end: Callable[[], tf.Tensor]) -> tf.Tensor:
            (added,) = on_each_replica(
                strategy,
                self.anchor,
                functools.partial(add, begins),
                gradients,
                gradient_norms,
                squares,
                count,
            )
            # After an error on one replica all must agree that this micro-step was not made.
            with tf.control_dependencies(list(added)):
                return end()

        if isinstance(count, int):
            return made(None, last if count == steps - 1 else advance)

        def end() -> tf.Tensor:
            if micro_step.number < micro_step.of - 1:
                return advance()
            return tf.cond(tf.equal(count, steps - 1), last, advance)

        if not isinstance(steps, int) or _compat.in_xla_context():
            # The first may be the last; or there is nothing that waits for a condition.
            return made(None, end)
        # One condition for both where there are two micro-steps.
        return tf.cond(
            count < accumulation.parts,
            lambda: made(True, advance),
            lambda: made(False, last if steps == accumulation.parts + 1 else end),
        )

    # -- reduce ------------------------------------------------------------------------------------

    def _reduced(
        self,
        gradients: list[PerReplica] | None,
        gradient_norms: PerReplica | None,
        squares: PerReplica | None,
    ) -> Sums:
        """Sums over the replicas of the gradients, or of those accumulated, and of statistics."""
        with_squares = squares is not None
        # With a single sub-batch the mean norm is the norm, which the update computes anyway.
        single = self.strategy.num_replicas_in_sync == 1 and self.accumulation is None
        with_norms = MEAN_NORM in self.statistics and not (single and gradient_norms is None)
        counted = VARIANCE in self.statistics or with_norms
        if not counted and gradients is not None:
            if self.summed:
                return Sums(list(gradients))
            values, destinations = gradients, self.variables
            if with_squares:
                values, destinations = [*gradients, squares], [*self.variables, self.anchor]
            totals = self.reduction(self.strategy, values, destinations)
            return Sums(
                totals[: len(gradients)],
                own=[gradients] if OWN_GRADIENT in self.statistics else [],
                squares=totals[-1] if with_squares else None,
            )

        def read(
            local: list[Gradient] | None,
            local_norms: tf.Tensor | None,
            local_squares: tf.Tensor | None,
        ) -> list[Gradient]:
            own = self._own_statistics(local)
            numbers = [own.live] if counted else []
            if with_norms:
                numbers.append(self._own_norms(own.totals, local_norms))
            if with_squares:
                kept = self.accumulation
                numbers.append(local_squares if kept is None else kept.read_squares())
            return [*own.totals, *numbers, *(own.deviations or ())]

        own = bundle(
            on_each_replica(self.strategy, self.anchor, read, gradients, gradient_norms, squares)
        )
        size = len(self.indices)
        end = size + counted + with_norms + with_squares
        totals = own[:end]
        if not self.summed:
            destinations = [*self.variables, *[self.anchor] * (end - size)]
            totals = self.reduction(self.strategy, totals, destinations)
        numbers = totals[size:]
        live = numbers[0] if counted else None
        deviations = None
        if VARIANCE in self.statistics:
            deviations = self._deviations(own[:size], own[size], own[end:], totals[:size], live)
        return Sums(
            totals[:size],
            live,
            numbers[1] if with_norms else None,
            deviations,
            self._own_parts(own[:size]) if OWN_GRADIENT in self.statistics else (),
            numbers[-1] if with_squares else None,
        )

    def _own_statistics(self, local: list[Gradient] | None) -> ReplicaStatistics:
        """This replica's: of the gradients themselves, or of those accumulated."""
        if self.accumulation is not None:
            return self.accumulation.read(self.indices)
        local = [merge_repeated_indices(gradient) for gradient in local or ()]
        return ReplicaStatistics(local, None, tf.cast(any_nonzero(local), tf.float32))

    def _own_norms(self, sums: list[Gradient], given: tf.Tensor | None) -> tf.Tensor:
        """[n], this replica's sums over micro-steps of the norms."""
        if self.accumulation is not None:
            return self.accumulation.read_norms(self.indices)
        return norms(sums) if given is None else given

    def _own_parts(self, own_sums: list[PerReplica]) -> list[list[PerReplica]]:
        accumulation = self.accumulation
        if accumulation is None or accumulation.parts == 1:
            return [own_sums]
        return [
            bundle(
                on_each_replica(
                    self.strategy,
                    self.anchor,
                    lambda part=part: accumulation.read_part(self.indices, part),
                )
            )
            for part in range(accumulation.parts)
        ]

    def _deviations(
        self,
        own_sums: list[PerReplica],
        own_live: PerReplica,
        own_deviations: list[PerReplica],
        totals: list[PerReplica],
        live: PerReplica,
    ) -> list[PerReplica]:
        def shares(
            own_sums: list[Gradient],
            own_live: tf.Tensor,
            own_deviations: list[tf.Tensor],
            totals: list[Gradient],
            live: tf.Tensor,
        ) -> list[tf.Tensor]:
            return shares_of_deviations(
                ReplicaStatistics(own_sums, own_deviations or None, own_live),
                [merge_repeated_indices(total) for total in totals],
                live,
                self.strategy.num_replicas_in_sync,
            )

        parts = on_each_replica(
            self.strategy, self.anchor, shares, own_sums, own_live, own_deviations, totals, live
        )
        return sum_over_replicas(self.strategy, bundle(parts), self.variables)


def prepared(
    gradients: Sequence[Gradient], variables: Sequence[tf.Variable], dtypes: Sequence[tf.DType]
) -> list[Gradient]:
    """The gradients in the dtypes of the arithmetic, as objects of this replica's own.

    `merge_call` takes an object that all replicas share (a captured constant) for a value without
    replicas, which is never summed; hence the identity. The shape of a sparse one is optional and
    may be anything like a shape; here it is the variable's. Under XLA, where to look for repeated
    indices takes longer than the whole table, it becomes dense.
    """
    own = []
    for gradient, variable, dtype in zip(gradients, variables, dtypes, strict=True):
        if isinstance(gradient, tf.IndexedSlices):
            slices = tf.IndexedSlices(
                tf.identity(tf.cast(gradient.values, dtype)),
                tf.identity(gradient.indices),
                dense_shape=tf.constant(variable.shape.as_list(), tf.int64),
            )
            own.append(dense(slices) if _compat.in_xla_context() else slices)
        else:
            own.append(tf.identity(tf.cast(gradient, dtype)))
    return own
