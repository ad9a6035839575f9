"""SGD, Adam and AdamW: Keras's algorithms with what the other optimizers here have."""

from typing import ClassVar

from tf_lbopt import rules
from tf_lbopt.optimizers.base import LargeBatchOptimizer, optimizer


@optimizer("sgd")
class SGD(LargeBatchOptimizer):
    """Gradient descent, with momentum and coupled weight decay if wanted.

        g ← ḡ + λ w
        w ← w − η g              without momentum, else
        u ← β u − η g
        w ← w + u                with nesterov: w ← w + β u − η g

    Without weight decay it equals `keras.optimizers.SGD`, whose `weight_decay` is another thing:
    decoupled, so that it does not pass through the momentum, and the same number decays weights
    ten times less at momentum 0.9. Papers on large batches mean the coupled one.

    Args:
        learning_rate: η. {rate} Defaults to 0.01.
        momentum: β in [0, 1). Defaults to 0.0, which keeps no slot.
        nesterov: Whether to use Nesterov momentum. Defaults to `False`.
        weight_decay: λ ≥ 0, coupled. Defaults to `None`.
        {exclude_from_weight_decay}
        {common_arguments}

    Raises:
        {raises}.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = SGD(learning_rate=0.1, momentum=0.9)
        >>> for _ in range(2):
        ...     optimizer.apply([keras.ops.convert_to_tensor([10.0, 0.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [0.1, 4.0]

    References:
        Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum in
        deep learning" (ICML), eq. 1 to 4.
    """

    rule_class = rules.SGD
    arguments: ClassVar = {
        "learning_rate": 0.01,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": None,
    }


@optimizer("adam")
class Adam(LargeBatchOptimizer):
    """Adam, with decoupled weight decay if wanted.

        w ← w − η λ w
        m ← β₁ m + (1 − β₁) ḡ,   v ← β₂ v + (1 − β₂) ḡ²
        w ← w − η √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)

    It equals `keras.optimizers.Adam` without `amsgrad`.

    Args:
        learning_rate: η. {rate} Defaults to 0.001.
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        epsilon: ε ≥ 0, where Keras has it: before the bias correction. Defaults to 1e-7.
        weight_decay: λ ≥ 0, decoupled. Defaults to `None`.
        {exclude_from_weight_decay}
        {common_arguments}

    Raises:
        {raises}.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = Adam(learning_rate=0.1)
        >>> optimizer.apply([keras.ops.convert_to_tensor([10.0, -0.5])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.9, 4.1]

    References:
        Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization" (arXiv:1412.6980), Algorithm 1
        in the order of the end of section 2; Loshchilov, Hutter 2019, "Decoupled Weight Decay
        Regularization" (arXiv:1711.05101), Algorithm 2.
    """

    rule_class = rules.Adam
    arguments: ClassVar = {
        "learning_rate": 0.001,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "epsilon": 1e-7,
        "weight_decay": None,
    }


@optimizer("adamw")
class AdamW(Adam):
    """`Adam` with decoupled weight decay by default.

    It equals `keras.optimizers.AdamW` without `amsgrad`, and has its arguments in the same order.

    Args:
        learning_rate: η. {rate} Defaults to 0.001.
        weight_decay: λ ≥ 0, decoupled: w ← w − η λ w. Defaults to 0.004.
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        epsilon: ε ≥ 0, as in `Adam`. Defaults to 1e-7.
        {exclude_from_weight_decay}
        {common_arguments}

    Raises:
        {raises}.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = AdamW(learning_rate=0.1, weight_decay=0.5)
        >>> optimizer.apply([keras.ops.convert_to_tensor([10.0, -0.5])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.75, 3.9]

    References:
        Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101),
        Algorithm 2.
    """

    arguments: ClassVar = {
        "learning_rate": 0.001,
        "weight_decay": 0.004,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "epsilon": 1e-7,
    }
