"""LAMB for Keras 3."""

from collections.abc import Sequence
from typing import Any

import keras

from tf_lbopt import _validation, rules
from tf_lbopt.optimizers.algorithm import LayerwiseAlgorithm
from tf_lbopt.optimizers.base import LargeBatchOptimizer, with_common_arguments


class LAMBAlgorithm(LayerwiseAlgorithm):
    """Layer-wise adaptive moments for batch training.

    Adam whose step is scaled, for every layer (trainable variable), to the size of its weights:

        m ← β₁ m + (1 − β₁) ḡ,   v ← β₂ v + (1 − β₂) ḡ²
        r = m̂ / (√v̂ + ε) + λ w   with bias-corrected m̂ and v̂
        ρ = ‖w‖ / ‖r‖            `default_trust_ratio` where a norm is 0 or the layer is excluded
        w ← w − η ρ r

    Without weight decay and at equal `epsilon` it equals `keras.optimizers.Lamb`, whose
    `weight_decay` is another thing: decoupled, outside the trust ratio. With it, it equals
    tf-models-official's `lamb.LAMB`, except that an empty exclusion list excludes nothing here.

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments. Defaults to 0.001.
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        epsilon: ε ≥ 0, outside the square root. Defaults to 1e-6.
        weight_decay: λ ≥ 0, part of r and so inside the trust ratio. Defaults to `None`.
        exclude_from_weight_decay: Variables, or regexes over the variable path (``"/bias$"``;
            ``"bias"`` also fits all in a layer named so), that do not decay: usually biases and
            normalization scales. Defaults to `None`: all decay.
        exclude_from_layer_adaptation: Those that have no trust ratio. Defaults to `None`: the same
            as those excluded from weight decay; `[]` excludes none.
        default_trust_ratio: ρ of a variable that has none, > 0: one that is excluded, or where
            either norm is 0. Defaults to 1.0.
        {common_arguments}

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    {example}

    References:
        You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
        (arXiv:1904.00962), Algorithm 2.
    """

    slots = rules.LAMB.slots

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
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            exclude_from_weight_decay=exclude_from_weight_decay,
            exclude_from_layer_adaptation=exclude_from_layer_adaptation,
            default_trust_ratio=default_trust_ratio,
            **kwargs,
        )
        self.beta_1 = _validation.real("beta_1", beta_1, low=0.0, high=1.0, high_open=True)
        self.beta_2 = _validation.real("beta_2", beta_2, low=0.0, high=1.0, high_open=True)
        self.epsilon = _validation.real("epsilon", epsilon, low=0.0)

    def rule(self) -> rules.Rule:
        """The algorithm with the current hyper-parameters."""
        return rules.LAMB(
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            weight_decay=self.weight_decay,
            default_trust_ratio=self.default_trust_ratio,
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
class LAMB(LAMBAlgorithm, LargeBatchOptimizer):
    """LAMB for Keras 3.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = LAMB(learning_rate=0.1)
        >>> optimizer.apply([keras.ops.convert_to_tensor([0.5, 0.5])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.6464, 3.6464]
    """
