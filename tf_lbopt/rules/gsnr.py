"""The gradient signal-to-noise ratio of VRGD."""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from tf_lbopt.rules.norms import Gradient
from tf_lbopt.rules.sharing import elementwise, scalars

# An element is resolved where σ² > 1e-7 · mean(g²) = 1e-7 (σ² + ḡ²), that is, where ḡ²/σ² is below.
_RESOLVED_BELOW = 1e7 - 1.0
# From this size on, the usual case is worth a branch of its own; tracing one costs more than the
# passes over a smaller layer that it saves.
_LARGE = 1 << 16


class SubBatches:
    """The sub-batches of one update: what the moments of all layers share.

    Args:
        live: k, how many of them had a gradient at all, a float scalar.
        factor: What the mean gradient must be multiplied by to be the mean of those k in the units
            of the deviations, a float scalar.

    Attributes:
        alone: Whether a single one was live, of which no variance can be estimated.
        scale: GSNR over `SubBatchMoments.ratio`.
        resolved_below: The ratio below which an element is resolved.
    """

    def __init__(self, live: tf.Tensor, factor: tf.Tensor):
        self.live = live
        self.factor = factor
        self.alone = tf.equal(live, 1.0)
        self.scale = live * tf.square(factor)
        self.resolved_below = _RESOLVED_BELOW / self.scale


@dataclasses.dataclass(frozen=True)
class SubBatchMoments:
    """What one layer's gradients were over the sub-batches.

    Attributes:
        mean: The mean gradient, unclipped; dense, or ``tf.IndexedSlices`` without repeated indices.
        deviations: k σ² = Σ_d (g_d − ḡ)², of the shape of ``mean`` (of its values).
        sub_batches: Those.
    """

    mean: Gradient
    deviations: tf.Tensor
    sub_batches: SubBatches

    def ratio(self) -> tf.Tensor:
        """GSNR but for a common factor: NaN where dead, infinite where all sub-batches agree."""
        mean = self.mean.values if isinstance(self.mean, tf.IndexedSlices) else self.mean
        return tf.square(mean) / self.deviations


def clipped_gsnr(moments: Sequence[SubBatchMoments], gamma: float) -> list[tf.Tensor]:
    """VRGD's r: GSNR, normalized to layer mean 1 and clipped to [γ, 1].

    ``r = ḡ²/σ²``, divided by its mean over the layer's resolved elements, clipped. Where the paper
    leaves 0/0 or x/0: live elements on which all sub-batches agree have r = 1, dead ones r = γ.
    With a single live sub-batch r = 1 everywhere.

    Args:
        moments: Of several layers over the same sub-batches.
        gamma: γ in (0, 1].

    Returns:
        For each layer r, of the shape of its ``deviations``.

    References:
        Jiang et al., VRGD, eq. 8 and 9 and Algorithm 1.

    Example:
        >>> g = tf.constant([[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, -1.0, 0.0]])
        >>> mean, variance = tf.nn.moments(g, axes=[0])
        >>> sub_batches = SubBatches(live=tf.constant(2.0), factor=tf.constant(1.0))
        >>> (r,) = clipped_gsnr([SubBatchMoments(mean, 2 * variance, sub_batches)], gamma=0.1)
        >>> [round(float(x), 3) for x in r]
        [1.0, 1.0, 0.1, 0.1]
    """
    ratios = [of_layer.ratio() for of_layer in moments]
    if not ratios:
        return []
    sub_batches = moments[0].sub_batches
    limits = scalars(ratios, sub_batches.resolved_below)
    lowest = {
        dtype: tf.where(sub_batches.alone, tf.ones([], dtype), gamma)
        for dtype, gamma in scalars(ratios, gamma).items()
    }
    small = [index for index, ratio in enumerate(ratios) if _is_small(ratio)]
    sums = [_resolved(ratios[index], limits[ratios[index].dtype]) for index in small]
    means = elementwise(
        lambda total, number: _mean(total, number, limits[total.dtype]),
        [total for total, _ in sums],
        [number for _, number in sums],
    )
    lows = elementwise(lambda mean: lowest[mean.dtype] * mean, means)
    clipped = {
        index: _clip(ratios[index], low, mean)
        for index, low, mean in zip(small, lows, means, strict=True)
    }
    return [
        clipped[index]
        if index in clipped
        else _clipped_large(ratio, limits[ratio.dtype], lowest[ratio.dtype])
        for index, ratio in enumerate(ratios)
    ]


def _is_small(ratio: tf.Tensor) -> bool:
    size = ratio.shape.num_elements()
    return size is None or size < _LARGE


def _clipped_large(ratio: tf.Tensor, limit: tf.Tensor, lowest: tf.Tensor) -> tf.Tensor:
    # Where every element is live and resolved (a dead one would make the sum NaN, an unresolved
    # one infinite or large), half of the passes over memory are enough.
    ratio_sum = tf.reduce_sum(ratio)

    def all_resolved() -> tf.Tensor:
        mean = _positive(ratio_sum / tf.cast(tf.size(ratio), ratio.dtype), limit)
        return tf.clip_by_value(ratio, lowest * mean, mean) / mean

    def with_special_elements() -> tf.Tensor:
        mean = _mean(*_resolved(ratio, limit), limit)
        return _clip(ratio, lowest * mean, mean)

    return tf.cond(ratio_sum < limit, all_resolved, with_special_elements)


def _clip(ratio: tf.Tensor, low: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
    # Written as a comparison, NaN (dead elements) ends at γ.
    return tf.where(ratio > low, tf.minimum(ratio, mean), low) / mean


def _resolved(ratio: tf.Tensor, limit: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Sum and number of the resolved elements."""
    resolved = tf.cast(ratio < limit, ratio.dtype)  # NaN is not
    return tf.reduce_sum(tf.math.multiply_no_nan(ratio, resolved)), tf.reduce_sum(resolved)


def _mean(total: tf.Tensor, number: tf.Tensor, limit: tf.Tensor) -> tf.Tensor:
    return _positive(tf.math.divide_no_nan(total, number), limit)


def _positive(mean: tf.Tensor, limit: tf.Tensor) -> tf.Tensor:
    # The mean is 0 where no element is resolved, or ḡ = 0 on all that are. The others are beyond
    # the limit: in its place they have r = 1, and those with ḡ = 0 have γ.
    return tf.where(mean > 0, mean, tf.minimum(limit, limit.dtype.max))


SUMMARY = ("mean", "q05", "q25", "q50", "q75", "q95", "at_gamma", "at_one")
"""What `summarize` tells of a layer, in this order."""

_SUMMARY_SAMPLE = 1 << 16


def summarize(moments: SubBatchMoments, gamma: float) -> tf.Tensor:
    """A few numbers on one layer's GSNR, to be looked at.

    Args:
        moments: Of one layer.
        gamma: γ.

    Returns:
        [8] float32, named by `SUMMARY`: the layer mean of ``ḡ²/σ²`` over the resolved elements (NaN
        if there are none); quantiles of the normalized GSNR before the clip (of an evenly spaced
        sample of 65,536 elements of a larger layer); the shares of elements that the clip leaves at
        γ and at 1. NaN where no variance can be estimated.
    """
    ratio, scale = moments.ratio(), moments.sub_batches.scale
    limit = tf.cast(moments.sub_batches.resolved_below, ratio.dtype)
    total, number = _resolved(ratio, limit)
    mean = _mean(total, number, limit)
    normalized = tf.reshape(
        tf.where(tf.math.is_nan(ratio), tf.zeros_like(ratio), ratio / mean), [-1]
    )
    size = tf.shape(normalized)[0]
    stride = tf.maximum(1, -(-size // _SUMMARY_SAMPLE))
    ordered = tf.sort(normalized[::stride])
    last = tf.cast(tf.shape(ordered)[0] - 1, tf.float32)
    positions = tf.cast(tf.round(tf.constant([0.05, 0.25, 0.5, 0.75, 0.95]) * last), tf.int32)
    shares = [
        tf.reduce_mean(tf.cast(clipped, tf.float32))
        for clipped in (normalized <= gamma, normalized >= 1)
    ]
    numbers = tf.concat(
        [
            [tf.cast(total / number, tf.float32) * tf.cast(scale, tf.float32)],
            tf.cast(tf.gather(ordered, positions), tf.float32),
            shares,
        ],
        0,
    )
    return tf.where(
        (moments.sub_batches.live > 1) & (size > 0), numbers, tf.fill([8], float("nan"))
    )
