"""SNGM."""

from typing import ClassVar

from tf_lbopt import rules
from tf_lbopt.optimizers.base import LargeBatchOptimizer, optimizer
from tf_lbopt.optimizers.declared import REQUIRED


@optimizer("sngm")
class SNGM(LargeBatchOptimizer):
    """Stochastic normalized gradient descent with momentum.

    The gradient is divided by its global norm before it enters the momentum, so that the size of
    a step depends on the learning rate alone:

        g ← ḡ + λ w
        u ← β u + g / ‖g‖        ‖g‖ over all variables together
        w ← w − η u

    A zero gradient contributes 0, and there is no additive epsilon. ‖u‖ never exceeds 1/(1 − β)
    (Lemma 2 of the paper). The paper has no warm-up and decays the rate polynomially, with power
    1.1 (CIFAR-10) or 2 (ImageNet). Coupling the weight decay, as in the momentum SGD it is
    compared with, is a decision of this package: the paper does not say.

    Args:
        learning_rate: η. {rate} It is the length of a
            step (with `momentum` 0), not a factor of the gradient: 1.6 in the paper's CIFAR-10
            runs.
        momentum: β in [0, 1). Defaults to 0.9; 0 is SNGD, which keeps no slot.
        weight_decay: λ ≥ 0, coupled. Defaults to `None`.
        {exclude_from_weight_decay}
        {common_arguments}

    Raises:
        {raises}.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = SNGM(learning_rate=0.5, momentum=0.9)
        >>> optimizer.apply([keras.ops.convert_to_tensor([30.0, 40.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.7, 3.6]

    References:
        Zhao, Shi, Xie, Li, "Stochastic Normalized Gradient Descent with Momentum for Large-Batch
        Training" (arXiv:2007.13985), Algorithm 1, eq. 7 and 8.
    """

    rule_class = rules.SNGM
    arguments: ClassVar = {"learning_rate": REQUIRED, "momentum": 0.9, "weight_decay": None}
