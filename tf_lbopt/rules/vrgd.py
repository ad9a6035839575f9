"""VRGD: a transformation in front of any rule."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.gsnr import SubBatchMoments, clipped_gsnr
from tf_lbopt.rules.norms import scalar
from tf_lbopt.rules.rule import VARIANCE, Layer, Rule, Step, dense
from tf_lbopt.rules.running_mean import RunningMean, running_means

GSNR_SLOT = "gsnr"


@dataclasses.dataclass(frozen=True)
class VarianceReduced(Rule):
    """Multiplies the mean gradient by r (or its running mean p̂) before the base rule sees it.

    ``p ← β₃ p + (1−β₃) r``, ``p̂ = p / (1−β₃ᵗ)`` where ``beta_3`` is given. ``observe`` is shown the
    layers as they arrive.
    """

    statistics: ClassVar[tuple[str, ...]] = (VARIANCE,)

    base: Rule
    gamma: float
    beta_3: float | None = None
    observe: Callable[[Sequence[Layer], Step], None] | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> None:
        """One update; see the class."""
        if self.observe is not None:
            self.observe(layers, step)
        if self.gamma == 1.0 and self.beta_3 is None:
            self.base.update(layers, step)  # the base itself, to the last bit of the norm
            return
        ratios = clipped_gsnr([_moments(layer) for layer in layers], self.gamma)
        if self.beta_3 is None:
            gradients = [scale(layer.gradient, r) for layer, r in zip(layers, ratios, strict=True)]
        else:
            means = running_means(layers, step, self.beta_3)
            gradients = [
                dense(layer.gradient) * self._running_mean(layer, r, means[layer.dtype])
                for layer, r in zip(layers, ratios, strict=True)
            ]
        reduced = [
            dataclasses.replace(layer, gradient=gradient, gradient_norm=None)
            for layer, gradient in zip(layers, gradients, strict=True)
        ]
        self.base.update(reduced, step)

    def _running_mean(self, layer: Layer, r: tf.Tensor, mean: RunningMean) -> tf.Tensor:
        if isinstance(layer.gradient, tf.IndexedSlices):
            # Rows that nobody looked up are dead: r = γ (1 where no variance can be estimated).
            alone = _moments(layer).sub_batches.alone
            elsewhere = tf.where(alone, tf.ones([], layer.dtype), scalar(self.gamma, layer.dtype))
            rows = tf.fill(tf.shape(layer.variable), elsewhere)
            r = tf.tensor_scatter_nd_update(rows, layer.gradient.indices[:, None], r)
        slot = layer.slots[GSNR_SLOT]
        p = mean.updated(tf.cast(slot, layer.dtype), r)
        slot.assign(tf.cast(p, slot.dtype))
        return mean.corrected(p)


def _moments(layer: Layer) -> SubBatchMoments:
    assert layer.moments is not None, "the road provides what `statistics` declares"
    return layer.moments
