"""The one road that every gradient travels, from a replica to its weights.

    1 local       in the dtype that the arithmetic is done in, float32 or wider
    2 accumulate  on all but the last micro-step: add to this replica's sums and stop
    3 reduce      one packed SUM all-reduce
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
from tf_lbopt.rules.norms import Gradient, all_finite, compute_dtype, norms
from tf_lbopt.statistics.sparse import divide, merge_repeated_indices


@dataclasses.dataclass(frozen=True)
class Clip:
    """Limits of the mean gradient; at most one is set. See `tf_lbopt.rules.clip.clip`."""

    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None


@dataclasses.dataclass(frozen=True)
class Destination:
    """What an optimizer provides for the gradients to travel to.

    Attributes:
        apply: On each replica: writes the update, given the indices of the variables, their mean
            gradients and the norms of those, and what `prepare` returned.
        discard: On each replica: counts a skipped update.
        prepare: In the cross-replica context, once per update: what all replicas must agree on
            (the learning rate).
        loss_scale: The factor to take out of the gradients again, read on each replica, or
            ``None``.
        after: On each replica, after every update or skip: told whether it was finite.
    """

    apply: Callable[[Sequence[int], list[Gradient], list[tf.Tensor], Any], None]
    discard: Callable[[], None]
    prepare: Callable[[], Any]
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
        accumulation: The replicas' sums, or ``None`` without accumulation.

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
    indices, variables = tuple(indices), tuple(variables)
    local = [
        _to_dtype(gradient, compute_dtype(variable.dtype))
        for gradient, variable in zip(gradients, variables, strict=True)
    ]

    def guarded_update(sums: list[Gradient], prepared: Any) -> list[tf.Tensor]:
        sums = [merge_repeated_indices(total) for total in sums]
        sum_norms = norms(sums)
        finite = all_finite(sum_norms)

        def apply() -> tf.Tensor:
            means, mean_norms = _mean(sums, sum_norms, destination, accumulation)
            clipped, clipped_norms = clipping.clip(means, mean_norms, **dataclasses.asdict(clip))
            destination.apply(
                indices,
                clipped,
                norms(clipped) if clipped_norms is None else clipped_norms,
                prepared,
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

    def reduce_and_update(strategy: tf.distribute.Strategy, values: list[Any]) -> None:
        sums = sum_over_replicas(strategy, values, variables)
        on_each_replica(strategy, anchor, guarded_update, sums, destination.prepare())

    def cross_replica(strategy: tf.distribute.Strategy, values: list[Any]) -> None:
        if accumulation is None:
            reduce_and_update(strategy, values)
            return

        def add(local_values: list[Gradient]) -> list[tf.Tensor]:
            accumulation.add(indices, local_values)
            return [tf.constant(True)]

        def read() -> list[tf.Tensor]:
            return [accumulation.accumulators[i].read_value() for i in indices]

        def last() -> tf.Tensor:
            reduce_and_update(strategy, bundle(on_each_replica(strategy, anchor, read)))
            return tf.constant(True)

        def advance() -> tf.Tensor:
            accumulation.micro_step.assign_add(1)
            return tf.constant(True)

        on_each_replica(strategy, anchor, add, values)
        is_last = tf.equal(accumulation.micro_step, accumulation.steps - 1)
        tf.cond(is_last, last, advance)

    context.merge_call(cross_replica, args=(local,))


def _to_dtype(gradient: Gradient, dtype: tf.DType) -> Gradient:
    # The identity makes each replica's tensor an object of its own: `merge_call` takes one that all
    # of them share (a captured constant) for a value without replicas, which is never summed.
    return tf.identity(tf.cast(gradient, dtype))


def _mean(
    sums: list[Gradient],
    sum_norms: list[tf.Tensor],
    destination: Destination,
    accumulation: Accumulation | None,
) -> tuple[list[Gradient], list[tf.Tensor]]:
    """The mean gradient of the loss itself: without the loss scale, over all micro-steps."""
    divisor = tf.ones([]) if destination.loss_scale is None else destination.loss_scale()
    if accumulation is not None:
        divisor *= tf.cast(accumulation.steps, divisor.dtype)
    elif destination.loss_scale is None:
        return sums, sum_norms
    return (
        [divide(total, divisor) for total in sums],
        [n / tf.cast(divisor, n.dtype) for n in sum_norms],
    )
