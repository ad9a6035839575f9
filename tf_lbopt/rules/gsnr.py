"""The gradient signal-to-noise ratio of VRGD."""

import dataclasses
import functools
from collections.abc import Sequence

import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.norms import Gradient, widest

# An element is resolved where σ² > 1e-7 · mean(g²) = 1e-7 (σ² + ḡ²), that is, where ḡ²/σ² is below.
_RESOLVED_BELOW = 1e7 - 1.0
# From this size on, the usual case is worth a branch of its own; smaller layers are sooner copied
# beside each other than looked at one by one.
_LARGE = 1 << 16


@dataclasses.dataclass(frozen=True)
class SubBatchStatistics:
    """What the gradients of an update were over its sub-batches.

    Attributes:
        means: The mean gradients, unclipped; dense, or ``tf.IndexedSlices`` without repeated
            indices.
        deviations: k σ² = Σ_d (g_d − ḡ)², of the shapes of ``means`` (of their values).
        live: k, how many sub-batches had a gradient at all, a float scalar.
        factor: What a mean gradient must be multiplied by to be the mean of those k in the units of
            the deviations, a float scalar.
    """

    means: Sequence[Gradient]
    deviations: Sequence[tf.Tensor]
    live: tf.Tensor
    factor: tf.Tensor

    def ratios(self) -> list[tf.Tensor]:
        """GSNR over `scale`: NaN for dead elements, infinite where all sub-batches agree."""
        return [
            tf.square(mean) / deviations
            for mean, deviations in zip(self.values(), self.deviations, strict=True)
        ]

    def values(self) -> list[tf.Tensor]:
        """The mean gradients; of sparse ones their rows."""
        return [mean.values if isinstance(mean, tf.IndexedSlices) else mean for mean in self.means]

    @functools.cached_property
    def scale(self) -> tf.Tensor:
        """What a ratio must be multiplied by to be ``ḡ²/σ²``."""
        return self.live * tf.square(self.factor)

    @functools.cached_property
    def resolved_below(self) -> tf.Tensor:
        """The ratio below which an element is resolved."""
        return _RESOLVED_BELOW / self.scale

    def lowest(self, gamma: float) -> tf.Tensor:
        """γ; or 1 if a single sub-batch was live, of which no variance can be estimated."""
        return tf.where(tf.equal(self.live, 1.0), 1.0, gamma)


def clipped_gsnr(statistics: SubBatchStatistics, gamma: float) -> list[tf.Tensor]:
    """VRGD's r: GSNR, normalized to layer mean 1 and clipped to [γ, 1].

    ``r = ḡ²/σ²``, divided by its mean over the layer's resolved elements, clipped. Where the paper
    leaves 0/0 or x/0: live elements on which all sub-batches agree have r = 1, dead ones r = γ.
    With a single live sub-batch r = 1 everywhere.

    Args:
        statistics: Of all variables.
        gamma: γ in (0, 1].

    Returns:
        For each variable r, of the shape of its ``deviations``.

    References:
        Jiang et al., VRGD, eq. 8 and 9 and Algorithm 1.

    Example:
        >>> g = tf.constant([[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, -1.0, 0.0]])
        >>> mean, variance = tf.nn.moments(g, axes=[0])
        >>> one = tf.constant(1.0)
        >>> (r,) = clipped_gsnr(SubBatchStatistics([mean], [2 * variance], 2 * one, one), gamma=0.1)
        >>> [round(float(x), 3) for x in r]
        [1.0, 1.0, 0.1, 0.1]
    """
    limit, lowest = statistics.resolved_below, statistics.lowest(gamma)
    if _compat.in_xla_context():
        return _clipped(statistics.ratios(), limit, lowest)
    groups: dict[tuple[tf.DType, int | None], list[int]] = {}
    for index, deviations in enumerate(statistics.deviations):
        size = deviations.shape.num_elements()
        small = size is not None and size < _LARGE
        groups.setdefault((deviations.dtype, size if small else None), []).append(index)
    means = statistics.values()
    clipped: dict[int, tf.Tensor] = {}
    for (_, size), indices in groups.items():
        part = SubBatchStatistics(
            [means[index] for index in indices],
            [statistics.deviations[index] for index in indices],
            statistics.live,
            statistics.factor,
        )
        if size is None:
            ratios = part.ratios()
            together = [ratios] if _host_waits() else [[ratio] for ratio in ratios]
            of_part = [r for of in together for r in _clipped_in_branches(of, limit, lowest)]
        else:
            of_part = _clipped_of_one_size(part, size, limit, lowest)
        clipped |= dict(zip(indices, of_part, strict=True))
    return [clipped[index] for index in range(len(means))]


def _clipped(ratios: list[tf.Tensor], limit: tf.Tensor, lowest: tf.Tensor) -> list[tf.Tensor]:
    dtype = widest([ratio.dtype for ratio in ratios])
    sums = [_resolved(ratio, limit) for ratio in ratios]
    totals, numbers = (tf.stack([tf.cast(s, dtype) for s in of]) for of in zip(*sums, strict=True))
    means = _positive(tf.math.divide_no_nan(totals, numbers), limit)
    bounds = zip(
        tf.unstack(tf.cast(lowest, dtype) * means, num=len(ratios)),
        tf.unstack(means, num=len(ratios)),
        strict=True,
    )
    return [
        _clip(ratio, tf.cast(low, ratio.dtype), tf.cast(mean, ratio.dtype))
        for ratio, (low, mean) in zip(ratios, bounds, strict=True)
    ]


def _clipped_of_one_size(
    statistics: SubBatchStatistics, size: int, limit: tf.Tensor, lowest: tf.Tensor
) -> list[tf.Tensor]:
    """Those of small layers, as rows of a matrix."""
    means, deviations = (
        tf.stack([tf.reshape(layer, [size]) for layer in of])
        for of in (statistics.means, statistics.deviations)
    )
    rows = tf.square(means) / deviations
    totals, numbers = _resolved(rows, limit, axis=1)
    means = _positive(tf.math.divide_no_nan(totals, numbers), limit)
    clipped = _clip(rows, tf.cast(lowest, rows.dtype) * means, means)
    shapes = [layer.shape for layer in statistics.deviations]
    return [
        tf.reshape(row, shape)
        for row, shape in zip(tf.unstack(clipped, num=len(shapes)), shapes, strict=True)
    ]


def _host_waits() -> bool:
    """Whether the host waits for a device at each condition: then all layers have one together.

    On a CPU one for each is faster, as few ratios are in memory at a time.
    """
    return bool(tf.config.list_physical_devices("GPU"))


def _clipped_in_branches(
    ratios: list[tf.Tensor], limit: tf.Tensor, lowest: tf.Tensor
) -> list[tf.Tensor]:
    """Those of large layers of one dtype.

    Where every element is live and resolved (a dead one would make a sum NaN, an unresolved one
    infinite or large), half of the passes over memory are enough.
    """
    sums = tf.stack([tf.reduce_sum(ratio) for ratio in ratios])

    def all_resolved() -> list[tf.Tensor]:
        sizes = tf.stack([tf.cast(tf.size(ratio), sums.dtype) for ratio in ratios])
        means = _positive(sums / sizes, limit)
        lows = tf.unstack(tf.cast(lowest, sums.dtype) * means, num=len(ratios))
        bounds = zip(ratios, lows, tf.unstack(means, num=len(ratios)), strict=True)
        return [tf.clip_by_value(ratio, low, mean) / mean for ratio, low, mean in bounds]

    usual = tf.reduce_all(sums < tf.cast(limit, sums.dtype))
    return tf.cond(usual, all_resolved, lambda: _clipped(ratios, limit, lowest))


def _clip(ratio: tf.Tensor, low: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
    # Written as a comparison, NaN (dead elements) ends at γ.
    return tf.where(ratio > low, tf.minimum(ratio, mean), low) / mean


def _resolved(
    ratio: tf.Tensor, limit: tf.Tensor, axis: int | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sum and number of the resolved elements, with ``axis`` in columns."""
    resolved = tf.cast(ratio < tf.cast(limit, ratio.dtype), ratio.dtype)  # NaN is not
    return tuple(
        tf.reduce_sum(of_each, axis, keepdims=axis is not None)
        for of_each in (tf.math.multiply_no_nan(ratio, resolved), resolved)
    )


def _positive(mean: tf.Tensor, limit: tf.Tensor) -> tf.Tensor:
    # The mean is 0 where no element is resolved, or ḡ = 0 on all that are. The others are beyond
    # the limit: in its place they have r = 1, and those with ḡ = 0 have γ.
    return tf.where(mean > 0, mean, tf.cast(tf.minimum(limit, limit.dtype.max), mean.dtype))


SUMMARY = ("mean", "q05", "q25", "q50", "q75", "q95", "at_gamma", "at_one")
"""What `summarize` tells of a layer, in this order."""

_SUMMARY_SAMPLE = 1 << 16


def summarize(statistics: SubBatchStatistics, gamma: float) -> tf.Tensor:
    """A few numbers on each variable's GSNR, to be looked at.

    Args:
        statistics: Of n variables.
        gamma: γ.

    Returns:
        [n, 8] float32, columns named by `SUMMARY`: the layer mean of ``ḡ²/σ²`` over the resolved
        elements (NaN if there are none); quantiles of the normalized GSNR before the clip (of an
        evenly spaced sample of 65,536 elements of a larger variable); the shares of elements that
        the clip leaves at γ and at 1. NaN where no variance can be estimated.
    """
    return tf.stack([_summary(ratio, statistics, gamma) for ratio in statistics.ratios()])


def _summary(ratio: tf.Tensor, statistics: SubBatchStatistics, gamma: float) -> tf.Tensor:
    total, number = _resolved(ratio, statistics.resolved_below)
    mean = _positive(tf.math.divide_no_nan(total, number), statistics.resolved_below)
    normalized = tf.reshape(
        tf.where(tf.math.is_nan(ratio), tf.zeros_like(ratio), ratio / mean), [-1]
    )
    size = tf.shape(normalized)[0]
    stride = tf.maximum(1, -(-size // _SUMMARY_SAMPLE))
    ordered = tf.sort(normalized[::stride])
    last = tf.cast(tf.shape(ordered)[0] - 1, tf.float32)
    positions = tf.cast(tf.round(tf.constant([0.05, 0.25, 0.5, 0.75, 0.95]) * last), tf.int32)
    numbers = [
        tf.reshape(total / number, [1]) * tf.cast(statistics.scale, ratio.dtype),
        tf.gather(ordered, positions),
        [tf.reduce_mean(tf.cast(c, ratio.dtype)) for c in (normalized <= gamma, normalized >= 1)],
    ]
    summary = tf.concat([tf.cast(n, tf.float32) for n in numbers], 0)
    return tf.where((statistics.live > 1) & (size > 0), summary, tf.fill([8], float("nan")))
