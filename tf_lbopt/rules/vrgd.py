"""VRGD: a transformation in front of any rule."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.gsnr import SubBatchStatistics, clipped_gsnr
from tf_lbopt.rules.moments import RunningMean
from tf_lbopt.rules.rule import VARIANCE, Parameters, Rule, Step, Update, dense
from tf_lbopt.rules.writer import Writer

GSNR_SLOT = "gsnr"


@dataclasses.dataclass(frozen=True)
class VRGD(Rule):
    """Multiplies the mean gradient by r (or its running mean p̂) before the base rule sees it.

    ``p ← β₃ p + (1−β₃) r``, ``p̂ = p / (1−β₃ᵗ)`` where ``beta_3`` is given. ``observe`` is shown the
    parameters as they arrive.
    """

    statistics: ClassVar[tuple[str, ...]] = (VARIANCE,)

    base: Rule
    gamma: float
    beta_3: float | None = None
    observe: Callable[[Parameters, Step], None] | None = None

    @property
    def separable(self) -> bool:
        """As the base."""
        return self.base.separable

    @property
    def takes_weight_norms(self) -> bool:
        """As the base."""
        return self.base.takes_weight_norms

    def slot_names(self) -> tuple[str, ...]:
        """The base's slots, and r's running mean if there is one."""
        return self.base.slot_names() + (() if self.beta_3 is None else (GSNR_SLOT,))

    def update(self, parameters: Parameters, step: Step) -> Update:
        """One update; see the class."""
        statistics = parameters.statistics
        assert statistics is not None, "`statistics` declares it"
        weighted, means = parameters, []
        if self.gamma != 1.0 or self.beta_3 is not None:  # else itself, to the last bit of the norm
            ratios = clipped_gsnr(statistics, self.gamma)
            if self.beta_3 is None:
                gradients = [scale(g, r) for g, r in zip(parameters.gradients, ratios, strict=True)]
            else:
                of = {
                    dtype: RunningMean(tf.constant(self.beta_3, dtype), t)
                    for dtype, t in step.numbers(parameters).items()
                }
                means = self._running_means(parameters, statistics, ratios, of)
                gradients = [
                    dense(g) * of[g.dtype].corrected(p)
                    for g, p in zip(parameters.gradients, means, strict=True)
                ]
            weighted = dataclasses.replace(
                parameters, gradients=gradients, gradient_norms=None, with_decay=None
            )
        base = self.base.update(weighted, step)

        def write(writer: Writer) -> None:
            if self.observe is not None:
                self.observe(parameters, step)
            for slot, p in zip(parameters.slots.get(GSNR_SLOT, ()), means, strict=bool(means)):
                writer.assign(slot, p)
            base.write(writer)

        return Update(base.sound, write)

    def _running_means(
        self,
        parameters: Parameters,
        statistics: SubBatchStatistics,
        ratios: list[tf.Tensor],
        of: dict[tf.DType, RunningMean],
    ) -> list[tf.Tensor]:
        means = []
        for variable, gradient, slot, r in zip(
            parameters.variables,
            parameters.gradients,
            parameters.slots[GSNR_SLOT],
            ratios,
            strict=True,
        ):
            if isinstance(gradient, tf.IndexedSlices):
                # Rows that nobody looked up are dead: r = γ (1 where no variance can be estimated).
                lowest = tf.cast(statistics.lowest(self.gamma), r.dtype)
                rows = tf.fill(tf.shape(variable), lowest)
                r = tf.tensor_scatter_nd_update(rows, gradient.indices[:, None], r)
            means.append(of[r.dtype].updated(tf.cast(slot, r.dtype), r))
        return means
