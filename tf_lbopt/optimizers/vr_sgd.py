"""VR-SGD and VR-Momentum for Keras 3."""

from typing import Any

import keras

from tf_lbopt import _validation, rules
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.optimizers.base import LargeBatchOptimizer, with_common_arguments
from tf_lbopt.optimizers.gsnr_weighting import GSNRWeighting, with_gsnr_arguments


class _SGD(Algorithm):
    """Gradient descent as Keras's, with coupled weight decay: the base of the two below."""

    slots = rules.SGD.slots

    def __init__(
        self, learning_rate: Any, momentum: float = 0.0, nesterov: bool = False, **kwargs: Any
    ):
        super().__init__(learning_rate, **kwargs)
        self.momentum = _validation.real("momentum", momentum, low=0.0, high=1.0, high_open=True)
        self.nesterov = _validation.boolean("nesterov", nesterov)

    def rule(self) -> rules.Rule:
        return rules.SGD(self.momentum, self.nesterov, self.weight_decay)


@with_gsnr_arguments
class VRSGDAlgorithm(GSNRWeighting, _SGD):
    """VR-SGD: gradient descent, every element weighted by its signal-to-noise ratio.

    Over the k sub-batches of an update, one per replica and accumulation micro-step:

        r = ḡ² / σ²              per element: ḡ the mean gradient, σ² its variance
        r ← r / mean(r)          per layer (trainable variable)
        r ← clip(r, γ, 1)
        w ← w − η (r ḡ + λ w)

    k must be at least 2, and 8 or more to mean something; the paper tests 32 to 256. With few
    sub-batches r has no mean to speak of, so that a few elements take it all. Of gradients that are
    Gaussian noise, the clip leaves at γ = 0.1, in layers of 500 to 50,000 elements,

        k                 2              3              4        8        32
        elements at γ     90 to 99 %     50 to 70 %     37 %     28 %     25 %

    and what is left is gradient descent with a smaller step. Below 8 the first update warns of it.

    Elements on which all sub-batches agree have r = 1, elements without any gradient r = γ, and
    the layer mean leaves both out: decisions of this package where the paper's r is 0/0 or x/0. So
    is the coupled weight decay. With clipping, the statistics are those of the unclipped gradients.
    A sparse gradient costs only the rows that were looked up.

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments.
        {gsnr_arguments}
        weight_decay: λ ≥ 0, coupled. Defaults to `None`.
        exclude_from_weight_decay: Variables, or regexes over the variable path (``"/bias$"``), that
            do not decay.
        {common_arguments}

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; one replica
            without accumulation.

    {example}

    References:
        Jiang et al. 2023, "Accelerating Large Batch Training via Gradient Signal to Noise Ratio
        (GSNR)" (arXiv:2309.13681), Algorithm 1, eq. 7 to 10.
    """

    slots = ()

    def __init__(
        self,
        learning_rate: Any,
        gamma: float = 0.1,
        weight_decay: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(learning_rate, gamma=gamma, weight_decay=weight_decay, **kwargs)


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRSGD(VRSGDAlgorithm, LargeBatchOptimizer):
    """VRSGD for Keras 3.

    Example:
        >>> w = keras.Variable([0.0, 0.0])
        >>> optimizer = VRSGD(learning_rate=1.0, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]     # r = 4 and 1/4, normalized 1.88 and 0.12
        [-2.0, -0.1176]
    """


@with_gsnr_arguments
class VRMomentumAlgorithm(GSNRWeighting, _SGD):
    """VR-Momentum: momentum SGD on the gradient weighted by its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        u ← β u − η (r ḡ + λ w)
        w ← w + u                              with nesterov: w ← w + β u − η (r ḡ + λ w)

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments.
        momentum: β in [0, 1). Defaults to 0.9.
        nesterov: Whether to use Nesterov momentum. Defaults to `False`.
        {gsnr_arguments}
        weight_decay: λ ≥ 0, coupled. Defaults to `None`.
        exclude_from_weight_decay: Variables, or regexes over the variable path (``"/bias$"``), that
            do not decay.
        {common_arguments}

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; one replica
            without accumulation.

    {example}

    References:
        Jiang et al. 2023, "Accelerating Large Batch Training via Gradient Signal to Noise Ratio
        (GSNR)" (arXiv:2309.13681), section 4.2.
    """

    def __init__(
        self,
        learning_rate: Any,
        momentum: float = 0.9,
        nesterov: bool = False,
        gamma: float = 0.1,
        weight_decay: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            gamma=gamma,
            weight_decay=weight_decay,
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        return {**super().get_config(), "momentum": self.momentum, "nesterov": self.nesterov}


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRMomentum(VRMomentumAlgorithm, LargeBatchOptimizer):
    """VRMomentum for Keras 3.

    Example:
        >>> w = keras.Variable([0.0, 0.0])
        >>> optimizer = VRMomentum(learning_rate=1.0, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [-2.0, -0.1176]
    """
