"""The one road that every gradient travels, from a replica to its weights.

    1 local       in the dtype that the arithmetic is done in, float32 or wider
    2 accumulate  on all but the last micro-step: add to this replica's accumulators and stop
    3 reduce      one packed SUM all-reduce, norms of the sub-batches' gradients included; for the
                  variance a second one, of the squared deviations from the mean that the first gave
    4 shape       mean, clip
    5 judge       the optimizer computes its update, up to what is decided from norms
    6 guard       not finite anywhere, or too large a step: change nothing, count
    7 apply       the optimizer writes, on each replica

Steps 2 and 3 run in the cross-replica context, the only one where a condition and a collective may
meet; what follows needs no collective and runs on each replica's own copies.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.distribution.accumulation import Accumulation, Turn
from tf_lbopt.distribution.replicas import (
    bundle,
    on_each_replica,
    replica_context_of,
    sum_over_replicas,
)
from tf_lbopt.rules import clip as clipping
from tf_lbopt.rules.bounds import squares_fit, write_if_sound
from tf_lbopt.rules.gsnr import SubBatches, SubBatchMoments
from tf_lbopt.rules.norms import Gradient, all_finite, compute_dtype, norms
from tf_lbopt.rules.rule import MEAN_NORM, OWN_GRADIENT, VARIANCE, Update, dense
from tf_lbopt.rules.sharing import scalars
from tf_lbopt.statistics.accumulators import OwnMoments, any_nonzero, shares_of_deviations
from tf_lbopt.statistics.sparse import divide, merge_repeated_indices


@dataclasses.dataclass(frozen=True)
class Clip:
    """Limits of the mean gradient; at most one is set. See `tf_lbopt.rules.clip.clip`."""

    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None


@dataclasses.dataclass(frozen=True)
class Arrival:
    """What arrives at the end of the road, on one replica.

    Attributes:
        indices: Of the variables, as the optimizer counts them.
        gradients: Their mean gradients, clipped; sparse ones without repeated indices.
        norms: The norms of those.
        means: The mean gradients before clipping.
        moments: Of the unclipped gradients over the sub-batches, or ``None`` where not declared.
        mean_norms: Of the unclipped gradients over the sub-batches, or ``None``, likewise.
        own: This replica's own unclipped gradients, a list for each of the sub-batches that it
            takes in turn; empty where not declared.
        prepared: What `Destination.prepare` returned.
    """

    indices: Sequence[int]
    gradients: list[Gradient]
    norms: list[tf.Tensor]
    means: list[Gradient]
    moments: list[SubBatchMoments | None]
    mean_norms: list[tf.Tensor | None]
    own: list[list[Gradient]]
    prepared: Any


@dataclasses.dataclass(frozen=True)
class Destination:
    """What an optimizer provides for the gradients to travel to.

    Attributes:
        update: On each replica: computes the update.
        count: On each replica, once per update: told whether all of it was written.
        prepare: In the cross-replica context, once per update: what all replicas must agree on
            (the learning rate).
        statistics: What must be known of the sub-batches beyond their mean gradient.
        loss_scale: The factor to take out of the gradients again, read on each replica, or
            ``None``.
        after: On each replica, after every update or skip: told whether the gradients were finite.
    """

    update: Callable[[Arrival], Update]
    count: Callable[[tf.Tensor], None]
    prepare: Callable[[], Any]
    statistics: tuple[str, ...] = ()
    loss_scale: Callable[[], tf.Tensor] | None = None
    after: Callable[[tf.Tensor], None] | None = None


@dataclasses.dataclass(frozen=True)
class Journey:
    """One call's gradients on the road.

    Attributes:
        strategy: Under which the variables live.
        indices: For each gradient the number of its variable, as the optimizer counts them.
        variables: For each gradient its variable.
        destination: What to do at the end of the road.
        anchor: A variable that exists on every replica: the optimizer's count of updates.
        clip: Limits of the mean gradient.
        turn: Which micro-step this is; where all of an update are known, the update is traced with
            the last one only.
        paths: Of all of the optimizer's variables; ``None`` for those that are not trained.
        accumulation: The replicas' accumulators, or ``None`` without accumulation.
        summed: Whether the gradients are sums over the replicas already, the same on each; then
            there must be no statistics.
    """

    strategy: tf.distribute.Strategy
    indices: Sequence[int]
    variables: Sequence[tf.Variable]
    destination: Destination
    anchor: tf.Variable
    clip: Clip
    turn: Turn
    paths: Sequence[str | None]
    accumulation: Accumulation | None = None
    summed: bool = False

    def travel(
        self, gradients: Sequence[Gradient], gradient_norms: Sequence[tf.Tensor] | None = None
    ) -> tf.Tensor:
        """Takes one replica's gradients there. Called in a replica context, by all replicas.

        Args:
            gradients: This replica's gradients of (its share of the) loss: summed over replicas
                they give the gradient of the mean loss, as under Keras and ``tf.distribute``.
            gradient_norms: What stands for the norms of these gradients in the mean norm, in their
                units (for norms by example: the sum of the norms of what the examples contribute
                to the gradient); ``None`` for the norms themselves.

        Returns:
            Whether the gradients were finite; true before an update is due.

        Raises:
            ValueError: Not called in a replica context of the strategy.
        """
        context = replica_context_of(self.strategy)
        local = [
            _own(gradient, variable)
            for gradient, variable in zip(gradients, self.variables, strict=True)
        ]
        if gradient_norms is not None:
            gradient_norms = [tf.identity(norm) for norm in gradient_norms]
        return context.merge_call(self._cross_replicas, args=(local, gradient_norms))

    def _cross_replicas(
        self,
        strategy: tf.distribute.Strategy,
        gradients: list[Any],
        gradient_norms: list[Any] | None,
    ) -> tf.Tensor:
        accumulation, turn = self.accumulation, self.turn
        if accumulation is None:
            return self._reduce_and_update(strategy, gradients, gradient_norms)

        def add(
            local: list[Gradient], local_norms: list[tf.Tensor] | None, count: int | tf.Tensor
        ) -> list[tf.Tensor]:
            if factor is not None and local:
                local = [clipping.scale(local[0], tf.cast(factor, local[0].dtype)), *local[1:]]
            part = turn.number % accumulation.parts
            # Not what it returns, the output of a condition: for one that other devices wait for,
            # TensorFlow 2.20 may make two nodes of one name ("is not unique").
            with tf.control_dependencies(
                [accumulation.add(self.indices, local, local_norms, count, part)]
            ):
                return [tf.constant(True)]

        def last() -> tf.Tensor:
            return self._reduce_and_update(strategy, None, None)

        def advance() -> tf.Tensor:
            on_each_replica(
                strategy, self.anchor, lambda at: [accumulation.advance(at, self.anchor)], count
            )
            return tf.constant(True)

        accumulation.prepare(self.indices, self.variables, gradients, len(self.paths))
        count = accumulation.position(turn, self.anchor)
        factor = accumulation.note(self.indices, self.paths, count)
        (added,) = on_each_replica(strategy, self.anchor, add, gradients, gradient_norms, count)
        # After an error on one replica all must agree that this micro-step was not made.
        with tf.control_dependencies(list(added)):
            if isinstance(count, int):
                return last() if count == accumulation.steps - 1 else advance()
            if turn.number < turn.of - 1:
                return advance()
            return tf.cond(tf.equal(count, accumulation.steps - 1), last, advance)

    # -- reduce ------------------------------------------------------------------------------------

    def _reduce_and_update(
        self,
        strategy: tf.distribute.Strategy,
        gradients: list[Any] | None,
        gradient_norms: list[Any] | None,
    ) -> tf.Tensor:
        reduced = self._reduce(strategy, gradients, gradient_norms)
        prepared = self.destination.prepare()
        ((finite, *_),) = on_each_replica(
            strategy,
            self.anchor,
            lambda *local: self._guarded_update(prepared, *local),
            *reduced,
        )
        return finite  # the first replica's, with whom all others agree

    def _sums(
        self,
        strategy: tf.distribute.Strategy,
        values: list[Any],
        destinations: Sequence[tf.Variable],
    ) -> list[Any]:
        if self.summed:
            return list(values)
        return sum_over_replicas(strategy, values, destinations)

    def _reduce(
        self,
        strategy: tf.distribute.Strategy,
        gradients: list[Any] | None,
        gradient_norms: list[Any] | None,
    ) -> tuple[list[Any], Any, Any, list[Any] | None, list[list[Any]]]:
        """Sums over the replicas of the gradients and of what statistics need.

        Returns:
            The gradients' sums, the number of live sub-batches, the stacked sums of the norms, the
            squared deviations (``None`` for what nobody needs), and the replicas' own sums.
        """
        size = len(self.indices)
        statistics = self.destination.statistics
        counted = VARIANCE in statistics or MEAN_NORM in statistics
        if not counted and gradients is not None:
            own = [gradients] if OWN_GRADIENT in statistics else []
            totals = self._sums(strategy, gradients, self.variables)
            return totals, None, None, None, own
        # With a single sub-batch the mean norm is the norm, which the guard needs anyway.
        single = strategy.num_replicas_in_sync == 1 and self.accumulation is None
        with_norms = MEAN_NORM in statistics and not (single and gradient_norms is None)

        def read(local: list[Gradient] | None, local_norms: list[tf.Tensor] | None) -> list[Any]:
            moments = self._own_moments(local)
            numbers = [moments.live] if counted else []
            if with_norms:
                numbers.append(self._own_norms(moments.totals, local_norms))
            return [*moments.totals, *numbers, *(moments.deviations or ())]

        own = bundle(on_each_replica(strategy, self.anchor, read, gradients, gradient_norms))
        end = size + counted + with_norms
        own_sums, own_numbers, own_deviations = own[:size], own[size:end], own[end:]
        reduced = self._sums(strategy, own[:end], [*self.variables, *[self.anchor] * (end - size)])
        totals = reduced[:size]
        live = reduced[size] if counted else None
        norm_totals = reduced[size + 1] if with_norms else None
        deviations = None
        if VARIANCE in statistics:
            deviations = self._reduce_deviations(
                strategy, own_sums, own_numbers[0], own_deviations, totals, live
            )
        own_parts = self._own_parts(strategy, own_sums) if OWN_GRADIENT in statistics else []
        return totals, live, norm_totals, deviations, own_parts

    def _own_parts(self, strategy: tf.distribute.Strategy, own_sums: list[Any]) -> list[list[Any]]:
        accumulation = self.accumulation
        if accumulation is None or accumulation.parts == 1:
            return [own_sums]
        return [
            bundle(
                on_each_replica(
                    strategy,
                    self.anchor,
                    lambda part=part: accumulation.read_part(self.indices, part),
                )
            )
            for part in range(accumulation.parts)
        ]

    def _own_moments(self, local: list[Gradient] | None) -> OwnMoments:
        """This replica's: of the gradients themselves, or of those accumulated."""
        if self.accumulation is not None:
            return self.accumulation.read(self.indices)
        local = [merge_repeated_indices(gradient) for gradient in local or ()]
        return OwnMoments(local, None, tf.cast(any_nonzero(local), tf.float32))

    def _own_norms(self, sums: list[Gradient], given: list[tf.Tensor] | None) -> tf.Tensor:
        """This replica's sums over micro-steps of the norms, one number for each variable."""
        if self.accumulation is not None:
            own = self.accumulation.read_norms(self.indices)
        else:
            own = norms(sums) if given is None else given
        widest = max((compute_dtype(norm.dtype) for norm in own), key=lambda dtype: dtype.size)
        return tf.stack([tf.cast(norm, widest) for norm in own])

    def _reduce_deviations(
        self,
        strategy: tf.distribute.Strategy,
        own_sums: list[Any],
        own_live: Any,
        own_deviations: list[Any],
        totals: list[Any],
        live: Any,
    ) -> list[Any]:
        def shares(*local: Any) -> list[tf.Tensor]:
            own_sums, own_live, own_deviations, totals, live = local
            return shares_of_deviations(
                OwnMoments(own_sums, own_deviations or None, own_live),
                [merge_repeated_indices(total) for total in totals],
                live,
                strategy.num_replicas_in_sync,
            )

        parts = bundle(
            on_each_replica(
                strategy, self.anchor, shares, own_sums, own_live, own_deviations, totals, live
            )
        )
        return sum_over_replicas(strategy, parts, self.variables)

    # -- on each replica ---------------------------------------------------------------------------

    def _guarded_update(
        self,
        prepared: Any,
        sums: list[Gradient],
        live: tf.Tensor | None,
        norm_totals: tf.Tensor | None,
        deviations: list[tf.Tensor] | None,
        own: list[list[Gradient]],
    ) -> list[tf.Tensor]:
        destination, accumulation = self.destination, self.accumulation
        sums = [merge_repeated_indices(total) for total in sums]
        sum_norms = norms(sums)
        finite = all_finite(sum_norms)
        if norm_totals is not None:  # others may have computed these
            finite &= tf.reduce_all(tf.math.is_finite(norm_totals))

        means, layer_norms = self._mean(sums, sum_norms)
        clipped, clipped_norms = clipping.clip(means, layer_norms, **dataclasses.asdict(self.clip))
        sound = finite
        moments: list[SubBatchMoments | None] = [None] * len(sums)
        if deviations is not None and live is not None:
            sub_batches = SubBatches(live, self._mean_factor(live))
            moments = [
                SubBatchMoments(mean, deviation, sub_batches)
                for mean, deviation in zip(means, deviations, strict=True)
            ]
            units = scalars(layer_norms, tf.maximum(sub_batches.factor, 1.0))
            sound &= squares_fit([norm * units[norm.dtype] for norm in layer_norms])
        update = destination.update(
            Arrival(
                self.indices,
                clipped,
                norms(clipped) if clipped_norms is None else clipped_norms,
                means,
                moments,
                self._mean_norms(layer_norms, norm_totals, live),
                [self._own_means(part) for part in own],
                prepared,
            )
        )
        destination.count(write_if_sound(sound, update))
        if accumulation is not None:
            accumulation.finish()
        if destination.after is not None:
            destination.after(finite)
        return [finite]

    def _mean(
        self, sums: list[Gradient], sum_norms: list[tf.Tensor]
    ) -> tuple[list[Gradient], list[tf.Tensor]]:
        """The mean gradient of the loss itself: without the loss scale, over all micro-steps."""
        divisor = self._divisor()
        if divisor is None:
            return sums, sum_norms
        return (
            [divide(total, divisor) for total in sums],
            [n / tf.cast(divisor, n.dtype) for n in sum_norms],
        )

    def _mean_norms(
        self,
        layer_norms: list[tf.Tensor],
        norm_totals: tf.Tensor | None,
        live: tf.Tensor | None,
    ) -> list[tf.Tensor | None]:
        """The mean over the live sub-batches of the norms of the loss's own gradients."""
        if MEAN_NORM not in self.destination.statistics:
            return [None] * len(layer_norms)
        if norm_totals is None or live is None:
            return list(layer_norms)
        factor = self._replicas() * tf.math.reciprocal_no_nan(live)
        if self.destination.loss_scale is not None:
            factor /= self.destination.loss_scale()
        means = tf.unstack(norm_totals * tf.cast(factor, norm_totals.dtype), num=len(layer_norms))
        return [tf.cast(m, n.dtype) for m, n in zip(means, layer_norms, strict=True)]

    def _own_means(self, sums: list[Gradient]) -> list[Gradient]:
        """The mean over the micro-steps of one part's gradients: of its own loss."""
        divisor = self._divisor()
        parts = 1 if self.accumulation is None else self.accumulation.parts
        factor = float(self._replicas() * parts)
        if divisor is None and factor == 1.0:
            return sums
        scale = factor if divisor is None else factor / divisor
        return [clipping.scale(merge_repeated_indices(g), tf.cast(scale, g.dtype)) for g in sums]

    def _replicas(self) -> int:
        return tf.distribute.get_strategy().num_replicas_in_sync

    def _divisor(self) -> tf.Tensor | None:
        loss_scale, accumulation = self.destination.loss_scale, self.accumulation
        if accumulation is None:
            return None if loss_scale is None else loss_scale()
        steps = tf.cast(accumulation.steps, tf.float32)
        return steps if loss_scale is None else steps * loss_scale()

    def _mean_factor(self, live: tf.Tensor) -> tf.Tensor:
        """From the mean gradient to that of the live sub-batches, in the units of the deviations.

        Those still contain the loss scale; and the mean that makes the update counts a sub-batch
        without gradients as zero, the mean from which they deviate leaves it out.
        """
        divisor = self._divisor()
        factor = self._replicas() * tf.math.reciprocal_no_nan(live)
        return factor if divisor is None else factor * divisor


def _own(gradient: Gradient, variable: tf.Variable) -> Gradient:
    """The gradient in the dtype of the arithmetic, as an object of this replica's own.

    `merge_call` takes an object that all replicas share (a captured constant) for a value without
    replicas, which is never summed; hence the identity. The shape of a sparse one is optional and
    may be anything like a shape; here it is the variable's. Under XLA, where to look for repeated
    indices takes longer than the whole table, it becomes dense.
    """
    dtype = compute_dtype(variable.dtype)
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.identity(tf.cast(gradient, dtype))
    slices = tf.IndexedSlices(
        tf.identity(tf.cast(gradient.values, dtype)),
        tf.identity(gradient.indices),
        dense_shape=tf.constant(variable.shape.as_list(), tf.int64),
    )
    return dense(slices) if _compat.in_xla_context() else slices
