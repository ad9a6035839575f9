"""VR-LARS and VR-LAMB for Keras 3."""

from collections.abc import Sequence
from typing import Any

import keras

from tf_lbopt import _validation
from tf_lbopt.optimizers.base import with_common_arguments
from tf_lbopt.optimizers.gsnr_weighting import GSNRWeighting, with_gsnr_arguments
from tf_lbopt.optimizers.lamb import LAMB, LAMBAlgorithm
from tf_lbopt.optimizers.lars import LARS, LARSAlgorithm
from tf_lbopt.rules.vrgd import GSNR_SLOT


@with_gsnr_arguments
class VRLARSAlgorithm(GSNRWeighting, LARSAlgorithm):
    """VR-LARS: `LARS` on the gradient weighted by its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        LARS on r ḡ

    The authors' own listing, in an appendix, was not at hand. Inferred from section 4.2 of the
    paper: the trust ratio is that of r ḡ, so that where r shrinks a whole layer's gradient the
    ratio undoes it; with ‖ḡ‖ in its place the step would be shorter.

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments.
        momentum: β in [0, 1). Defaults to 0.9.
        trust_coefficient: τ > 0. Defaults to 0.001.
        nesterov: Whether to use Nesterov momentum. Defaults to `False`.
        weight_decay: λ ≥ 0, coupled: added to r ḡ, part of the norm. Defaults to `None`.
        exclude_from_weight_decay: As in `LARS`.
        exclude_from_layer_adaptation: As in `LARS`.
        trust_ratio_denominator: As in `LARS`, of r ḡ: ‖r ḡ + λ w‖ or ‖r ḡ‖ + λ ‖w‖. Defaults to
            `"norm_of_sum"`.
        default_trust_ratio: As in `LARS`. Defaults to 1.0.
        {gsnr_arguments}
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
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        weight_decay: float | None = None,
        exclude_from_weight_decay: Sequence[Any] | None = None,
        exclude_from_layer_adaptation: Sequence[Any] | None = None,
        trust_ratio_denominator: str = "norm_of_sum",
        default_trust_ratio: float = 1.0,
        gamma: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            momentum=momentum,
            trust_coefficient=trust_coefficient,
            nesterov=nesterov,
            weight_decay=weight_decay,
            exclude_from_weight_decay=exclude_from_weight_decay,
            exclude_from_layer_adaptation=exclude_from_layer_adaptation,
            trust_ratio_denominator=trust_ratio_denominator,
            default_trust_ratio=default_trust_ratio,
            gamma=gamma,
            **kwargs,
        )


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRLARS(VRLARSAlgorithm, LARS):
    """VRLARS for Keras 3.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = VRLARS(1.0, trust_coefficient=0.1, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.5009, 3.9706]
    """


@with_gsnr_arguments
class VRLAMBAlgorithm(GSNRWeighting, LAMBAlgorithm):
    """VR-LAMB: `LAMB` on the gradient weighted by the running mean of its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        p ← β₃ p + (1 − β₃) r,   p̂ = p / (1 − β₃ᵗ)
        LAMB on p̂ ḡ

    The authors' own listing, in an appendix, was not at hand. Inferred from section 4.2 of the
    paper: p̂ multiplies ḡ before the moments, and p is the running mean of the clipped r, not of the
    ratio before the clip.

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments. Defaults to 0.001.
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        epsilon: ε ≥ 0, outside the square root. Defaults to 1e-6.
        weight_decay: λ ≥ 0, inside the trust ratio. Defaults to `None`.
        exclude_from_weight_decay: As in `LAMB`.
        exclude_from_layer_adaptation: As in `LAMB`.
        default_trust_ratio: As in `LAMB`. Defaults to 1.0.
        beta_3: β₃ in [0, 1), the decay of p. Defaults to 0.9.
        {gsnr_arguments}
        {common_arguments}

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; one replica
            without accumulation.

    {example}

    References:
        Jiang et al. 2023, "Accelerating Large Batch Training via Gradient Signal to Noise Ratio
        (GSNR)" (arXiv:2309.13681), section 4.2.
    """

    slots = (*LAMBAlgorithm.slots, GSNR_SLOT)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float | None = None,
        exclude_from_weight_decay: Sequence[Any] | None = None,
        exclude_from_layer_adaptation: Sequence[Any] | None = None,
        default_trust_ratio: float = 1.0,
        beta_3: float = 0.9,
        gamma: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            exclude_from_weight_decay=exclude_from_weight_decay,
            exclude_from_layer_adaptation=exclude_from_layer_adaptation,
            default_trust_ratio=default_trust_ratio,
            beta_3=_validation.real("beta_3", beta_3, low=0.0, high=1.0, high_open=True),
            gamma=gamma,
            **kwargs,
        )


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRLAMB(VRLAMBAlgorithm, LAMB):
    """VRLAMB for Keras 3.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = VRLAMB(learning_rate=0.1, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.6464, 3.6464]
    """
