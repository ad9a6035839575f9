"""SNGM for Keras 3."""

from typing import Any

import keras

from tf_lbopt import _validation, rules
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.optimizers.base import LargeBatchOptimizer, with_common_arguments


class SNGMAlgorithm(Algorithm):
    """Stochastic normalized gradient descent with momentum.

    The gradient is divided by its global norm before it enters the momentum, so that the size of
    a step depends on the learning rate alone:

        g ← ḡ + λ w
        u ← β u + g / ‖g‖        ‖g‖ over all variables together
        w ← w − η u

    A zero gradient contributes 0, and there is no additive epsilon. ‖u‖ never exceeds 1/(1 − β)
    (Lemma 2 of the paper). No warm-up is needed; the paper decays the rate polynomially, with
    power 1.1 (CIFAR-10) or 2 (ImageNet). Coupling the weight decay, as in the momentum SGD it is
    compared with, is a decision of this package: the paper does not say.

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments. It is the length of a step (with `momentum` 0), not a factor of the
            gradient: 1.6 in the paper's CIFAR-10 runs.
        momentum: β in [0, 1). Defaults to 0.9; 0 is SNGD, which keeps no slot.
        weight_decay: λ ≥ 0, coupled. Defaults to `None`.
        exclude_from_weight_decay: Variables, or regexes over the variable path (``"/bias$"``), that
            do not decay.
        {common_arguments}

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    {example}

    References:
        Zhao, Shi, Xie, Li, "Stochastic Normalized Gradient Descent with Momentum for Large-Batch
        Training" (arXiv:2007.13985), Algorithm 1, eq. 7 and 8.
    """

    slots = rules.SNGM.slots

    def __init__(
        self,
        learning_rate: Any,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(learning_rate, weight_decay=weight_decay, **kwargs)
        self.momentum = _validation.real("momentum", momentum, low=0.0, high=1.0, high_open=True)

    def rule(self) -> rules.Rule:
        """The algorithm with the current hyper-parameters."""
        return rules.SNGM(momentum=self.momentum, weight_decay=self.weight_decay)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        return {**super().get_config(), "momentum": self.momentum}


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class SNGM(SNGMAlgorithm, LargeBatchOptimizer):
    """SNGM for Keras 3.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = SNGM(learning_rate=0.5, momentum=0.9)
        >>> optimizer.apply([keras.ops.convert_to_tensor([30.0, 40.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.7, 3.6]
    """
