"""VRGD: a transformation in front of any rule."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.gsnr import alone, clipped_gsnr
from tf_lbopt.rules.norms import scalar
from tf_lbopt.rules.rule import VARIANCE, Layer, Rule, Step, dense

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
        self.base.update([self._reduced(layer, step) for layer in layers], step)

    def _reduced(self, layer: Layer, step: Step) -> Layer:
        assert layer.moments is not None, "the road provides what `statistics` declares"
        if self.gamma == 1.0 and self.beta_3 is None:
            return layer  # the base itself, to the last bit of the norm
        r = clipped_gsnr(layer.moments, self.gamma)
        if self.beta_3 is None:
            gradient = scale(layer.gradient, r)
        else:
            live = layer.moments.live
            gradient = dense(layer.gradient) * self._running_mean(layer, r, live, step)
        return dataclasses.replace(layer, gradient=gradient, gradient_norm=None)

    def _running_mean(self, layer: Layer, r: tf.Tensor, live: tf.Tensor, step: Step) -> tf.Tensor:
        dtype = layer.dtype
        if isinstance(layer.gradient, tf.IndexedSlices):
            # Rows that nobody looked up are dead: r = γ (1 where no variance can be estimated).
            elsewhere = tf.where(alone(live), tf.ones([], dtype), scalar(self.gamma, dtype))
            rows = tf.fill(tf.shape(layer.variable), elsewhere)
            r = tf.tensor_scatter_nd_update(rows, layer.gradient.indices[:, None], r)
        slot = layer.slots[GSNR_SLOT]
        beta_3 = scalar(self.beta_3, dtype)
        mean = beta_3 * tf.cast(slot, dtype) + (1 - beta_3) * r
        slot.assign(tf.cast(mean, slot.dtype))
        return mean / (1 - beta_3 ** tf.cast(step.index + 1, dtype))
