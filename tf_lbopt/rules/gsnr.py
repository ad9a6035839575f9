"""The gradient signal-to-noise ratio of VRGD."""

import dataclasses

import tensorflow as tf

from tf_lbopt.rules.norms import Gradient

# An element is resolved where σ² > 1e-7 · mean(g²) = 1e-7 (σ² + ḡ²), that is, where ḡ²/σ² is below.
_RESOLVED_BELOW = 1e7 - 1.0
# From this size on, the usual case is worth a branch of its own.
_LARGE = 1 << 16


@dataclasses.dataclass(frozen=True)
class SubBatchMoments:
    """What one layer's gradients were over the sub-batches, up to a common factor.

    Attributes:
        total: Σ_d g_d over the live sub-batches; dense, or ``tf.IndexedSlices`` without repeated
            indices.
        variance: (1/k) Σ_d (g_d − ḡ)², biased; of the shape of ``total`` (of its values).
        count: k, how many sub-batches were live, a float scalar.
    """

    total: Gradient
    variance: tf.Tensor
    count: tf.Tensor

    def values(self) -> tf.Tensor:
        """`total` as one tensor of the shape of `variance`."""
        return self.total.values if isinstance(self.total, tf.IndexedSlices) else self.total


def gsnr_and_mean(moments: SubBatchMoments) -> tuple[tf.Tensor, tf.Tensor]:
    """``k² ḡ²/σ²`` element by element, and its layer mean over the resolved elements.

    The common factor k² cancels in their quotient, the normalized GSNR. Live elements on which all
    sub-batches agree are at ``inf`` (or above every resolved one), dead ones at 0.
    """
    total, variance, count = moments.values(), moments.variance, moments.count
    ratio = tf.math.xdivy(tf.square(total), variance)
    limit = _RESOLVED_BELOW * tf.square(tf.cast(count, ratio.dtype))
    resolved = (variance > 0) & (ratio < limit)
    ratio_sum = tf.reduce_sum(tf.where(resolved, ratio, tf.zeros_like(ratio)))
    number = tf.math.count_nonzero(resolved, dtype=ratio.dtype)
    return ratio, _positive_or_one(tf.math.divide_no_nan(ratio_sum, number))


def clipped_gsnr(moments: SubBatchMoments, gamma: float) -> tf.Tensor:
    """VRGD's r: GSNR, normalized to layer mean 1 and clipped to [γ, 1].

    ``r = ḡ²/σ²``, divided by its mean over the layer's resolved elements, clipped. Where the paper
    leaves 0/0 or x/0: live elements on which all sub-batches agree have r = 1, dead ones r = γ.
    With fewer than two live sub-batches r = 1 everywhere.

    Args:
        moments: Of one layer.
        gamma: γ in (0, 1].

    Returns:
        r, of the shape of ``moments.variance``.

    References:
        Jiang et al., VRGD, eq. 8 and 9 and Algorithm 1.

    Example:
        >>> g = tf.constant([[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, -1.0, 0.0]])
        >>> mean, variance = tf.nn.moments(g, axes=[0])
        >>> r = clipped_gsnr(SubBatchMoments(2 * mean, variance, tf.constant(2.0)), gamma=0.1)
        >>> [round(float(x), 3) for x in r]
        [1.0, 1.0, 0.1, 0.1]
    """
    values, variance = moments.values(), moments.variance

    def with_special_elements() -> tf.Tensor:
        ratio, mean = gsnr_and_mean(moments)
        # Written as a comparison, NaN (squares beyond float32) ends at γ.
        scaled = tf.minimum(ratio / mean, tf.ones_like(mean))
        return tf.where(ratio > gamma * mean, scaled, gamma * tf.ones_like(mean))

    size = values.shape.num_elements()
    if size is None or size < _LARGE:
        r = with_special_elements()
    else:
        # Where every element is live and resolved (a dead one would be NaN here, an unresolved one
        # infinite or large), half of the passes over memory are enough.
        ratio = tf.square(values) / variance
        ratio_sum = tf.reduce_sum(ratio)
        limit = _RESOLVED_BELOW * tf.square(tf.cast(moments.count, ratio.dtype))

        def all_resolved() -> tf.Tensor:
            mean = _positive_or_one(ratio_sum / tf.cast(size, ratio.dtype))
            return tf.clip_by_value(ratio, gamma * mean, mean) * tf.math.reciprocal(mean)

        r = tf.cond(ratio_sum < limit, all_resolved, with_special_elements)
    return tf.cond(estimable(moments.count), lambda: r, lambda: tf.ones_like(r))


def estimable(count: tf.Tensor) -> tf.Tensor:
    """Whether a variance can be estimated from so many live sub-batches: at least two."""
    return count > 1.5


def _positive_or_one(mean: tf.Tensor) -> tf.Tensor:
    # The mean is 0 where no element is resolved, or ḡ = 0 on all that are.
    return tf.where(mean > 0, mean, tf.ones_like(mean))


SUMMARY = ("mean", "q05", "q25", "q50", "q75", "q95", "at_gamma", "at_one")
"""What `summarize` tells of a layer, in this order."""

_SUMMARY_SAMPLE = 1 << 16


def summarize(moments: SubBatchMoments, gamma: float) -> tf.Tensor:
    """A few numbers on one layer's GSNR, to be looked at.

    Args:
        moments: Of one layer.
        gamma: γ.

    Returns:
        [8] float32, named by `SUMMARY`: the layer mean of ``ḡ²/σ²`` over the resolved elements;
        quantiles of the normalized GSNR before the clip (of an evenly spaced sample of 65,536
        elements of a larger layer); the shares of elements that the clip leaves at γ and at 1. NaN
        where no variance can be estimated.
    """
    ratio, mean = gsnr_and_mean(moments)
    count = tf.cast(moments.count, ratio.dtype)
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
            [tf.cast(mean / tf.square(count), tf.float32)],
            tf.cast(tf.gather(ordered, positions), tf.float32),
            shares,
        ],
        0,
    )
    return tf.where(estimable(moments.count) & (size > 0), numbers, tf.fill([8], float("nan")))
