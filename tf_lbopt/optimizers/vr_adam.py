"""VR-Adam for Keras 3."""

from typing import Any

import keras

from tf_lbopt import _validation, rules
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.optimizers.base import LargeBatchOptimizer, with_common_arguments
from tf_lbopt.optimizers.gsnr_weighting import GSNRWeighting, with_gsnr_arguments
from tf_lbopt.rules.vrgd import GSNR_SLOT


class _Adam(Algorithm):
    """Adam as Keras's, with the decay of its AdamW: the base of the one below."""

    slots = rules.Adam.slots

    def __init__(
        self, learning_rate: Any, beta_1: float, beta_2: float, epsilon: float, **kwargs: Any
    ):
        super().__init__(learning_rate, **kwargs)
        self.beta_1 = _validation.real("beta_1", beta_1, low=0.0, high=1.0, high_open=True)
        self.beta_2 = _validation.real("beta_2", beta_2, low=0.0, high=1.0, high_open=True)
        self.epsilon = _validation.real("epsilon", epsilon, low=0.0)

    def rule(self) -> rules.Rule:
        return rules.Adam(self.beta_1, self.beta_2, self.epsilon, self.weight_decay)


@with_gsnr_arguments
class VRAdamAlgorithm(GSNRWeighting, _Adam):
    """VR-Adam: Adam on the gradient weighted by the running mean of its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        p ← β₃ p + (1 − β₃) r,   p̂ = p / (1 − β₃ᵗ)
        Adam on p̂ ḡ, as `keras.optimizers.Adam`

    The weighting comes before the moments (section 4.2 of the paper says why). The authors' own
    listing, in an appendix, was not at hand. Inferred from section 4.2: p̂ multiplies ḡ, and p is
    the running mean of the clipped r, not of the ratio before the clip. The weight decay is
    decoupled, as in `keras.optimizers.AdamW`.

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments. Defaults to 0.001.
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        beta_3: β₃ in [0, 1), the decay of p. Defaults to 0.9.
        epsilon: ε ≥ 0, where Keras has it. Defaults to 1e-7.
        {gsnr_arguments}
        weight_decay: λ ≥ 0, decoupled. Defaults to `None`.
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

    slots = (*rules.Adam.slots, GSNR_SLOT)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        beta_3: float = 0.9,
        epsilon: float = 1e-7,
        gamma: float = 0.1,
        weight_decay: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            beta_3=_validation.real("beta_3", beta_3, low=0.0, high=1.0, high_open=True),
            epsilon=epsilon,
            gamma=gamma,
            weight_decay=weight_decay,
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRAdam(VRAdamAlgorithm, LargeBatchOptimizer):
    """VRAdam for Keras 3.

    Example:
        >>> w = keras.Variable([0.0, 0.0])
        >>> optimizer = VRAdam(learning_rate=0.1, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [-0.1, -0.1]
    """
