"""Running code on every replica from outside, and summing over replicas."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeAlias, TypeVar

import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.norms import Gradient

_Value = TypeVar("_Value")

PerReplica: TypeAlias = Gradient | tf.distribute.DistributedValues
"""A value of each local replica, or a sum on each; where there is one replica, just its value."""


def on_each_replica(
    strategy: tf.distribute.Strategy,
    anchor: tf.Variable,
    fn: Callable[..., Sequence[tf.Tensor]],
    *args: object,
) -> list[tuple[tf.Tensor, ...]]:
    """Calls ``fn`` once for every local replica, from a cross-replica context.

    In ``fn`` a distributed variable reads and writes that replica's own copy, whatever its
    aggregation, and a per-replica value in ``args`` is that replica's tensor. No collective may be
    started there, but ``tf.cond`` may.

    Args:
        strategy: The strategy whose cross-replica context this is.
        anchor: Any variable of the strategy: it names the devices.
        fn: Takes ``args``, returns a list of tensors (at least one, so that eager and graph mode
            have something to group).
        *args: Structures of tensors, per-replica and mirrored values.

    Returns:
        For each tensor that ``fn`` returns, the tuple of the local replicas' values.
    """
    return each_replica(strategy, anchor)(lambda _, *local_args: fn(*local_args), args=args)


def each_replica(
    strategy: tf.distribute.Strategy, anchor: tf.Variable
) -> Callable[..., list[tuple[tf.Tensor, ...]]]:
    """`on_each_replica` as a function of ``fn`` and ``args``; ``fn`` is given ``anchor`` first."""
    if _compat.in_tpu_replica():
        # This is the only replica that is traced, and its variables read and write its own copies;
        # TPU's `update` would return one tuple around the whole list.
        return lambda fn, args: [(value,) for value in fn(anchor, *args)]
    return functools.partial(strategy.extended.update, anchor, group=False)


def replica_context_of(strategy: tf.distribute.Strategy) -> tf.distribute.ReplicaContext:
    """Returns the context of the replica that calls.

    Raises:
        ValueError: Called outside of replicas, or in those of another strategy.
    """
    context = tf.distribute.get_replica_context()
    received = "the cross-replica context (directly under `strategy.scope()`)"
    if context is not None:
        if context.strategy is strategy or strategy.num_replicas_in_sync == 1:
            return context
        received = f"one under {type(context.strategy).__name__}, outside of `strategy.run`"
    raise ValueError(
        "Gradients must be applied in a replica context, where each replica has its own. "
        "Expected: a call inside the function given to `strategy.run` of the "
        f"{type(strategy).__name__} that the optimizer was created under. Received: a call in "
        f"{received}"
    )


def sum_over_replicas(
    strategy: tf.distribute.Strategy,
    values: Sequence[PerReplica],
    destinations: Sequence[tf.Variable],
) -> list[PerReplica]:
    """One packed SUM all-reduce for each dtype, from a cross-replica context.

    Args:
        strategy: The strategy whose cross-replica context this is.
        values: Per-replica dense tensors and ``IndexedSlices``.
        destinations: For each value a variable, on whose devices the sum is wanted.

    Returns:
        The mirrored sums. Those of ``IndexedSlices`` may have repeated indices.
    """
    if strategy.num_replicas_in_sync == 1:
        return list(values)
    results: dict[int, PerReplica] = {}
    groups: dict[tf.DType, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(_dtype_of(value), []).append(index)
    # Packing concatenates, and tensors of different dtypes can not be concatenated.
    for group in groups.values():
        reduced = strategy.extended.batch_reduce_to(
            tf.distribute.ReduceOp.SUM, [(values[i], destinations[i]) for i in group]
        )
        results.update(zip(group, reduced, strict=True))
    return [results[index] for index in range(len(values))]


def bundle(per_replica_lists: Sequence[tuple[Gradient, ...]]) -> list[PerReplica]:
    """Per-replica values out of the tuples that `on_each_replica` returns."""
    return [
        values[0] if len(values) == 1 else _compat.per_replica(values)
        for values in per_replica_lists
    ]


def _dtype_of(value: PerReplica) -> tf.DType:
    local = getattr(value, "values", None)
    if isinstance(local, tuple):  # a per-replica value; IndexedSlices.values is a tensor
        return local[0].dtype
    return value.dtype


def once_for_all_replicas(fn: Callable[[], None]) -> None:
    """Calls ``fn`` eagerly, once, wherever this is called from; in a replica context, by all.

    Replicas are threads that trace the same code: what creates variables must run in one of them.
    """

    def call(_: tf.distribute.Strategy | None = None) -> None:
        strategy = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
        with _compat.outside_of_functions(), strategy.scope() if strategy else nullcontext():
            fn()

    context = tf.distribute.get_replica_context()
    if context is None:
        call()
    else:
        context.merge_call(call)


class OfReplica(Generic[_Value]):
    """What a replica leaves for itself, within a block, while it is traced (or runs).

    Kept by its number. Replicas are threads, but not always the same ones: Keras's
    LossScaleOptimizer goes on in new ones.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, int], _Value] = {}

    def get(self, owner: object) -> _Value | None:
        """What was left for this owner in the innermost block that this is called in, if any."""
        return self._values.get((id(owner), _replica_number()))

    @contextlib.contextmanager
    def left(self, owner: object, value: _Value) -> Iterator[None]:
        """Within this block, on the replica that calls this, `get` returns this value."""
        key = id(owner), _replica_number()
        outer = self._values.get(key)
        self._values[key] = value
        try:
            yield
        finally:
            del self._values[key]
            if outer is not None:
                self._values[key] = outer


def _replica_number() -> int:
    context = tf.distribute.get_replica_context()
    number = 0 if context is None else context.replica_id_in_sync_group
    static = tf.get_static_value(number)
    return 0 if static is None else int(static)


def inside_scope(strategy: tf.distribute.Strategy) -> AbstractContextManager[object]:
    """The strategy's scope, entered if no strategy is in force yet."""
    return nullcontext() if tf.distribute.has_strategy() else strategy.scope()
