"""LARS for Keras 3."""

from collections.abc import Sequence
from typing import Any

import keras

from tf_lbopt import _validation, rules
from tf_lbopt.optimizers.algorithm import LayerwiseAlgorithm
from tf_lbopt.optimizers.base import LargeBatchOptimizer, with_common_arguments

DENOMINATORS = ("norm_of_sum", "sum_of_norms")


class LARSAlgorithm(LayerwiseAlgorithm):
    """Layer-wise adaptive rate scaling.

    Momentum SGD whose rate is scaled, for every layer (trainable variable), by how large its
    weights are against its gradient:

        g ← ḡ + λ w
        ρ = τ ‖w‖ / ‖g‖          `default_trust_ratio` where a norm is 0 or the layer is excluded
        u ← β u + η ρ g
        w ← w − u                with nesterov: w ← w − (β u + η ρ g)

    This ρ is that of tf-models-official's `lars.LARS`, which this optimizer equals (except that an
    empty exclusion list excludes nothing here), and of optax: their rates can be used as they are,
    and without momentum a layer's step has the length η τ ‖w‖ exactly. The paper's eq. 6 is

        ρ = τ ‖w‖ / (‖ḡ‖ + λ ‖w‖)

    which `trust_ratio_denominator="sum_of_norms"` gives. Without weight decay both are the same.

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments.
        momentum: β in [0, 1). Defaults to 0.9.
        trust_coefficient: τ > 0. Defaults to 0.001.
        nesterov: Whether to use Nesterov momentum. Defaults to `False`.
        weight_decay: λ ≥ 0, coupled: part of g and of its norm. Defaults to `None`.
        exclude_from_weight_decay: Variables, or regexes over the variable path (``"/bias$"``;
            ``"bias"`` also fits all in a layer named so), that do not decay: usually biases and
            normalization scales. Defaults to `None`: all decay.
        exclude_from_layer_adaptation: Those that have no trust ratio. Defaults to `None`: the same
            as those excluded from weight decay; `[]` excludes none. They train at the raw rate η:
            at one that suits τ = 0.001 (16, say) they destroy training. Give `[]`, or a larger
            τ with a rate as much smaller (0.1 with 0.16 is seen in docs/evidence.md), or set
            `default_trust_ratio` to τ.
        trust_ratio_denominator: `"norm_of_sum"`, ‖ḡ + λ w‖, or `"sum_of_norms"`, ‖ḡ‖ + λ ‖w‖ (the
            paper's eq. 6). Defaults to `"norm_of_sum"`.
        default_trust_ratio: ρ of a variable that has none, > 0: one that is excluded, or where
            either norm is 0. Defaults to 1.0; with τ in its place these too train at η τ.
        {common_arguments}

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    {example}

    References:
        You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks"
        (arXiv:1708.03888), eq. 6 with `trust_ratio_denominator="sum_of_norms"`. The default is that
        of tf-models-official and optax.
    """

    slots = rules.LARS.slots

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
        self.momentum = _validation.real("momentum", momentum, low=0.0, high=1.0, high_open=True)
        self.trust_coefficient = _validation.real(
            "trust_coefficient", trust_coefficient, low=0.0, low_open=True
        )
        self.nesterov = _validation.boolean("nesterov", nesterov)
        self.trust_ratio_denominator = _validation.choice(
            "trust_ratio_denominator", trust_ratio_denominator, DENOMINATORS
        )

    def rule(self) -> rules.Rule:
        """The algorithm with the current hyper-parameters."""
        return rules.LARS(
            momentum=self.momentum,
            trust_coefficient=self.trust_coefficient,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            trust_ratio_denominator=self.trust_ratio_denominator,
            default_trust_ratio=self.default_trust_ratio,
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "trust_coefficient": self.trust_coefficient,
            "nesterov": self.nesterov,
            "trust_ratio_denominator": self.trust_ratio_denominator,
        }


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class LARS(LARSAlgorithm, LargeBatchOptimizer):
    """LARS for Keras 3.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = LARS(learning_rate=1.0, trust_coefficient=0.1)
        >>> optimizer.apply([keras.ops.convert_to_tensor([0.6, 0.8])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.7, 3.6]
    """
