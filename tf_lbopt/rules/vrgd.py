"""VRGD: a transformation in front of any rule."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.gsnr import SubBatchMoments, clipped_gsnr
from tf_lbopt.rules.norms import scalar
from tf_lbopt.rules.rule import VARIANCE, Layer, Rule, Step, Update, dense
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

    def update(self, layers: Sequence[Layer], step: Step) -> Update:
        """One update; see the class."""
        if self.gamma == 1.0 and self.beta_3 is None:
            base = self.base.update(layers, step)  # itself, to the last bit of the norm
            return Update(base.sound, self._writing(base, layers, step, []))
        ratios = clipped_gsnr([_moments(layer) for layer in layers], self.gamma)
        means: list[tf.Tensor] = []
        if self.beta_3 is None:
            gradients = [scale(layer.gradient, r) for layer, r in zip(layers, ratios, strict=True)]
        else:
            of = running_means(layers, step, self.beta_3)
            means = [
                self._running_mean(layer, r, of[layer.dtype])
                for layer, r in zip(layers, ratios, strict=True)
            ]
            gradients = [
                dense(layer.gradient) * of[layer.dtype].corrected(p)
                for layer, p in zip(layers, means, strict=True)
            ]
        reduced = [
            dataclasses.replace(layer, gradient=gradient, gradient_norm=None)
            for layer, gradient in zip(layers, gradients, strict=True)
        ]
        base = self.base.update(reduced, step)
        return Update(base.sound, self._writing(base, layers, step, means))

    def _writing(
        self, base: Update, layers: Sequence[Layer], step: Step, means: list[tf.Tensor]
    ) -> Callable[[], list[tf.Tensor]]:
        def write() -> list[tf.Tensor]:
            if self.observe is not None:
                self.observe(layers, step)
            if means:
                for layer, p in zip(layers, means, strict=True):
                    layer.slots[GSNR_SLOT].assign(tf.cast(p, layer.slots[GSNR_SLOT].dtype))
            return base.write()

        return write

    def _running_mean(self, layer: Layer, r: tf.Tensor, mean: RunningMean) -> tf.Tensor:
        if isinstance(layer.gradient, tf.IndexedSlices):
            # Rows that nobody looked up are dead: r = γ (1 where no variance can be estimated).
            alone = _moments(layer).sub_batches.alone
            elsewhere = tf.where(alone, tf.ones([], layer.dtype), scalar(self.gamma, layer.dtype))
            rows = tf.fill(tf.shape(layer.variable), elsewhere)
            r = tf.tensor_scatter_nd_update(rows, layer.gradient.indices[:, None], r)
        return mean.updated(tf.cast(layer.slots[GSNR_SLOT], layer.dtype), r)


def _moments(layer: Layer) -> SubBatchMoments:
    assert layer.moments is not None, "the road provides what `statistics` declares"
    return layer.moments
