"""The one road that every gradient travels, from a replica to its weights.

    1 local       in the dtype that the arithmetic is done in, float32 or wider
    2 accumulate  on all but the last micro-step: add to this replica's accumulators and stop
    3 reduce      one packed SUM all-reduce; for the variance a second one, of the squared
                  deviations from the mean that the first one gave
    4 guard       not finite anywhere: change nothing, count
    5 shape       mean, clip
    6 apply       hand over to the optimizer, on each replica

Steps 2 and 3 run in the cross-replica context, the only one where a condition and a collective may
meet; what follows needs no collective and runs on each replica's own copies.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_lbopt.distribution.accumulation import Accumulation
from tf_lbopt.distribution.replicas import bundle, on_each_replica, sum_over_replicas
from tf_lbopt.rules import clip as clipping
from tf_lbopt.rules.gsnr import SubBatchMoments
from tf_lbopt.rules.norms import Gradient, all_finite, compute_dtype, norms
from tf_lbopt.statistics.accumulators import OwnMoments, any_nonzero, share_of_deviations
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
        moments: Of the unclipped gradients over the sub-batches, or ``None`` where not declared.
        prepared: What `Destination.prepare` returned.
    """

    indices: Sequence[int]
    gradients: list[Gradient]
    norms: list[tf.Tensor]
    moments: list[SubBatchMoments | None]
    prepared: Any


@dataclasses.dataclass(frozen=True)
class Destination:
    """What an optimizer provides for the gradients to travel to.

    Attributes:
        apply: On each replica: writes the update.
        discard: On each replica: counts a skipped update.
        prepare: In the cross-replica context, once per update: what all replicas must agree on
            (the learning rate).
        statistics: What must be known of the sub-batches beyond their mean gradient.
        loss_scale: The factor to take out of the gradients again, read on each replica, or
            ``None``.
        after: On each replica, after every update or skip: told whether it was finite.
    """

    apply: Callable[[Arrival], None]
    discard: Callable[[], None]
    prepare: Callable[[], Any]
    statistics: tuple[str, ...] = ()
    loss_scale: Callable[[], tf.Tensor] | None = None
    after: Callable[[tf.Tensor], None] | None = None


def travel(
    gradients: Sequence[Gradient],
    indices: Sequence[int],
    variables: Sequence[tf.Variable],
    destination: Destination,
    *,
    anchor: tf.Variable,
    clip: Clip,
    accumulation: Accumulation | None = None,
) -> None:
    """Takes one replica's gradients along the road. Called in a replica context, by all replicas.

    Args:
        gradients: This replica's gradients of (its share of the) loss: summed over replicas they
            give the gradient of the mean loss, as under Keras and ``tf.distribute``.
        indices: For each gradient the number of its variable, as the optimizer counts them.
        variables: For each gradient its variable.
        destination: What to do at the end of the road.
        anchor: A variable that exists on every replica.
        clip: Limits of the mean gradient.
        accumulation: The replicas' accumulators, or ``None`` without accumulation.

    Raises:
        ValueError: Not called in a replica context.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise ValueError(
            "Gradients must be applied in a replica context, where each replica has its own. "
            "Expected: a call inside the function given to `strategy.run`. Received: a call in the "
            "cross-replica context (directly under `strategy.scope()`)."
        )
    local = [
        _own(gradient, variable) for gradient, variable in zip(gradients, variables, strict=True)
    ]
    journey = _Journey(tuple(indices), tuple(variables), destination, anchor, clip, accumulation)
    context.merge_call(journey.cross_replicas, args=(local,))


@dataclasses.dataclass(frozen=True)
class _Journey:
    """One call of `travel`, from the cross-replica context on."""

    indices: tuple[int, ...]
    variables: tuple[tf.Variable, ...]
    destination: Destination
    anchor: tf.Variable
    clip: Clip
    accumulation: Accumulation | None

    def cross_replicas(self, strategy: tf.distribute.Strategy, gradients: list[Any]) -> None:
        accumulation = self.accumulation
        if accumulation is None:
            self._reduce_and_update(strategy, gradients)
            return

        def add(local: list[Gradient]) -> list[tf.Tensor]:
            accumulation.add(self.indices, local)
            return [tf.constant(True)]

        def last() -> tf.Tensor:
            self._reduce_and_update(strategy, None)
            return tf.constant(True)

        def advance() -> tf.Tensor:
            accumulation.micro_step.assign_add(1)
            return tf.constant(True)

        accumulation.prepare(self.indices, self.variables, gradients)
        on_each_replica(strategy, self.anchor, add, gradients)
        is_last = tf.equal(accumulation.micro_step, accumulation.steps - 1)
        tf.cond(is_last, last, advance)

    # -- reduce ------------------------------------------------------------------------------------

    def _reduce_and_update(
        self, strategy: tf.distribute.Strategy, gradients: list[Any] | None
    ) -> None:
        arguments: tuple[Any, ...]
        if "variance" in self.destination.statistics:
            arguments = self._reduce_with_variance(strategy, gradients)
        else:
            if gradients is None:
                gradients = bundle(on_each_replica(strategy, self.anchor, self._own_sums))
            arguments = (sum_over_replicas(strategy, gradients, self.variables),)
        prepared = self.destination.prepare()
        on_each_replica(
            strategy,
            self.anchor,
            lambda *local: self._guarded_update(prepared, *local),
            *arguments,
        )

    def _own_sums(self) -> list[Gradient]:
        return self._own_moments(None)[0]

    def _own_moments(
        self, local: list[Gradient] | None
    ) -> tuple[list[Gradient], list[tf.Tensor | None], tf.Tensor]:
        """This replica's sums, squared deviations and number of live micro-steps.

        Without accumulation these are the gradients themselves; with it, those accumulated.
        """
        if self.accumulation is not None:
            return self.accumulation.read(self.indices)
        local = [merge_repeated_indices(gradient) for gradient in local or ()]
        return local, [None] * len(local), tf.cast(any_nonzero(local), tf.float32)

    def _reduce_with_variance(
        self, strategy: tf.distribute.Strategy, gradients: list[Any] | None
    ) -> tuple[list[Any], list[Any], Any]:
        size = len(self.indices)

        def read(local: list[Gradient] | None) -> list[Any]:
            sums, deviations, live = self._own_moments(local)
            return [*sums, live, *(d for d in deviations if d is not None)]

        own = bundle(on_each_replica(strategy, self.anchor, read, gradients))
        sums, own_live, own_deviations = own[:size], own[size], own[size + 1 :]
        reduced = sum_over_replicas(strategy, [*sums, own_live], [*self.variables, self.anchor])
        totals, live = reduced[:size], reduced[size]

        def shares(*local: Any) -> list[tf.Tensor]:
            own_sums, own_live, own_deviations, totals, live = local
            return [
                share_of_deviations(
                    OwnMoments(own_sum, own_deviation, own_live),
                    merge_repeated_indices(total),
                    live,
                    strategy.num_replicas_in_sync,
                )
                for own_sum, own_deviation, total in zip(
                    own_sums, own_deviations or [None] * size, totals, strict=True
                )
            ]

        parts = bundle(
            on_each_replica(
                strategy, self.anchor, shares, sums, own_live, own_deviations, totals, live
            )
        )
        return totals, sum_over_replicas(strategy, parts, self.variables), live

    # -- on each replica ---------------------------------------------------------------------------

    def _guarded_update(
        self,
        prepared: Any,
        sums: list[Gradient],
        deviations: list[tf.Tensor] | None = None,
        live: tf.Tensor | None = None,
    ) -> list[tf.Tensor]:
        destination, accumulation = self.destination, self.accumulation
        sums = [merge_repeated_indices(total) for total in sums]
        sum_norms = norms(sums)
        finite = all_finite(sum_norms)

        def apply() -> tf.Tensor:
            means, mean_norms = self._mean(sums, sum_norms)
            clipped, clipped_norms = clipping.clip(
                means, mean_norms, **dataclasses.asdict(self.clip)
            )
            moments: list[SubBatchMoments | None] = [None] * len(sums)
            if deviations is not None and live is not None:
                moments = [
                    SubBatchMoments(mean, deviation, live, self._mean_factor(live))
                    for mean, deviation in zip(means, deviations, strict=True)
                ]
            destination.apply(
                Arrival(
                    self.indices,
                    clipped,
                    norms(clipped) if clipped_norms is None else clipped_norms,
                    moments,
                    prepared,
                )
            )
            return finite

        def discard() -> tf.Tensor:
            destination.discard()
            return finite

        tf.cond(finite, apply, discard)
        if accumulation is not None:
            accumulation.clear()
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
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        divisor = self._divisor()
        factor = replicas * tf.math.reciprocal_no_nan(live)
        return factor if divisor is None else factor * divisor


def _own(gradient: Gradient, variable: tf.Variable) -> Gradient:
    """The gradient in the dtype of the arithmetic, as an object of this replica's own.

    `merge_call` takes an object that all replicas share (a captured constant) for a value without
    replicas, which is never summed; hence the identity. The shape of a sparse one is optional and
    may be anything like a shape; here it is the variable's.
    """
    dtype = compute_dtype(variable.dtype)
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.identity(tf.cast(gradient, dtype))
    return tf.IndexedSlices(
        tf.identity(tf.cast(gradient.values, dtype)),
        tf.identity(gradient.indices),
        dense_shape=tf.constant(variable.shape.as_list(), tf.int64),
    )
