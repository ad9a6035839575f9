"""Adasum, a reduction over replicas in the place of the mean: part of the way to the sum.

Between two devices gradients go as copies, not as a collective: in each round half of the replicas
that still have one give it to a neighbor, which combines the two; the last one gives the result to
all.
"""

from collections.abc import Sequence

import tensorflow as tf

from tf_lbopt.aggregation.replicas import PerReplica, bundle
from tf_lbopt.aggregation.sparse import merge_repeated_indices, rows_at
from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.norms import Gradient, norms


def adasum(first: Sequence[Gradient], second: Sequence[Gradient]) -> list[Gradient]:
    """``(1 − a·b / 2‖a‖²) a + (1 − a·b / 2‖b‖²) b`` for each pair of gradients, with 0/0 = 0.

    The sum of orthogonal ones and the mean of equal ones. In terms of the directions â and b̂, whose
    products neither underflow nor overflow: ``a + b − ½ (â·b̂) (‖b‖ â + ‖a‖ b̂)``.

    Args:
        first: a, dense or ``tf.IndexedSlices`` without repeated indices, one for each variable.
        second: b, likewise, of the same kinds.

    Returns:
        One for each variable, sparse over the rows of both.
    """
    indices: list[tf.Tensor | None] = []
    pairs = []
    for a, b in zip(first, second, strict=True):
        rows = None
        if isinstance(a, tf.IndexedSlices):
            own, other = tf.cast(a.indices, tf.int64), tf.cast(b.indices, tf.int64)
            rows, _ = tf.unique(tf.concat([own, other], 0))
            pairs.append((rows_at(own, a.values, rows), rows_at(other, b.values, rows)))
        else:
            pairs.append((a, b))
        indices.append(rows)
    lengths = [tf.unstack(norms(of_all), num=len(pairs)) for of_all in zip(*pairs, strict=True)]
    combined: list[Gradient] = []
    for (a, b), of_a, of_b, rows, gradient in zip(pairs, *lengths, indices, first, strict=True):
        of_a, of_b = tf.cast(of_a, a.dtype), tf.cast(of_b, a.dtype)
        along_a, along_b = tf.math.divide_no_nan(a, of_a), tf.math.divide_no_nan(b, of_b)
        half_cosine = 0.5 * tf.reduce_sum(along_a * along_b)
        values = a + b - half_cosine * (of_b * along_a + of_a * along_b)
        combined.append(
            values if rows is None else tf.IndexedSlices(values, rows, gradient.dense_shape)
        )
    return combined


def adasum_over_replicas(
    strategy: tf.distribute.Strategy,
    values: Sequence[PerReplica],
    destinations: Sequence[tf.Variable],
) -> list[PerReplica]:
    """Adasum of the replicas' gradients, neighbors first, from a cross-replica context.

    The replicas' gradients arrive divided by the number of replicas; what is returned is not, as
    the sum of them, which is their mean, would not be.

    Args:
        strategy: A ``MirroredStrategy`` with a power of two of replicas.
        values: Per-replica dense tensors and ``IndexedSlices``, one for each variable.
        destinations: The variables.

    Returns:
        Per-replica values, the same on all replicas.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return list(values)
    devices = [copy.device for copy in strategy.experimental_local_results(destinations[0])]
    level = []
    for number, device in enumerate(devices):
        with tf.device(device):
            level.append([merge_repeated_indices(value.values[number]) for value in values])
    while len(level) > 1:
        distance = replicas // len(level)
        pairs = zip(level[::2], level[1::2], strict=True)
        level = []
        for number, (first, second) in enumerate(pairs):
            with tf.device(devices[2 * distance * number]):
                level.append(adasum(first, second))
    copies = []
    for device in devices:
        with tf.device(device):
            copies.append([scale(g, tf.cast(float(replicas), g.dtype)) for g in level[0]])
    return bundle(list(zip(*copies, strict=True)))
