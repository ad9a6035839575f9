"""LARS, LAMB and LANS."""

from typing import ClassVar

from tf_lbopt import rules
from tf_lbopt.optimizers.base import LargeBatchOptimizer, optimizer
from tf_lbopt.optimizers.declared import REQUIRED


@optimizer("lars")
class LARS(LargeBatchOptimizer):
    """Layer-wise adaptive rate scaling.

    Momentum SGD with a rate for each layer (trainable variable), in proportion to the norm of its
    weights over the norm of its gradient:

        g ← ḡ + λ w
        ρ = τ ‖w‖ / ‖g‖          `default_trust_ratio` where a norm is 0 or the layer is excluded
        u ← β u + η ρ g
        w ← w − u                with nesterov: w ← w − (β u + η ρ g)

    Without momentum a layer's step has the length η τ ‖w‖.

    tf-models-official's `lars.LARS` and `optax.lars` have the same ρ, and their rates can be used
    as they are. (An empty `exclude_from_layer_adaptation` means "as for weight decay" in tf-models;
    here it excludes nothing.) The paper's eq. 6 is

        ρ = τ ‖w‖ / (‖ḡ‖ + λ ‖w‖)

    which is `trust_ratio_denominator="sum_of_norms"`. Without weight decay both are the same.

    Args:
        learning_rate: η. {rate}
        momentum: β in [0, 1). Defaults to 0.9.
        trust_coefficient: τ > 0. Defaults to 0.001.
        nesterov: Whether to use Nesterov momentum. Defaults to `False`.
        weight_decay: λ ≥ 0, coupled: added to the gradient, part of its norm. Defaults to `None`.
        {exclusions} Excluded variables train at the raw rate η. A rate that suits τ = 0.001, such
            as 16, destroys training then. Give `[]`, or set `default_trust_ratio` to τ, or take a
            larger τ and a smaller rate (docs/evidence.md has 0.1 and 0.16).
        trust_ratio_denominator: `"norm_of_sum"`, ‖ḡ + λ w‖, or `"sum_of_norms"`, ‖ḡ‖ + λ ‖w‖ (the
            paper's eq. 6). Defaults to `"norm_of_sum"`.
        {default_trust_ratio} Set to τ, it gives such a variable the rate η τ.
        {common_arguments}

    Raises:
        {raises}.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = LARS(learning_rate=1.0, trust_coefficient=0.1)
        >>> optimizer.apply([keras.ops.convert_to_tensor([0.6, 0.8])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.7, 3.6]

    References:
        You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks"
        (arXiv:1708.03888), eq. 6 with `trust_ratio_denominator="sum_of_norms"`. The default is from
        tf-models-official and optax.
    """

    rule_class = rules.LARS
    arguments: ClassVar = {
        "learning_rate": REQUIRED,
        "momentum": 0.9,
        "trust_coefficient": 0.001,
        "nesterov": False,
        "weight_decay": None,
        "exclude_from_weight_decay": None,
        "exclude_from_layer_adaptation": None,
        "trust_ratio_denominator": "norm_of_sum",
        "default_trust_ratio": 1.0,
    }


@optimizer("lamb")
class LAMB(LargeBatchOptimizer):
    """Layer-wise adaptive moments for batch training.

    Adam with a trust ratio: the step of each layer (trainable variable) has the length η ‖w‖.

        m ← β₁ m + (1 − β₁) ḡ,   v ← β₂ v + (1 − β₂) ḡ²
        r = m̂ / (√v̂ + ε) + λ w   with bias-corrected m̂ and v̂
        ρ = ‖w‖ / ‖r‖            `default_trust_ratio` where a norm is 0 or the layer is excluded
        w ← w − η ρ r

    Without weight decay and at equal `epsilon` it equals `keras.optimizers.Lamb`. Keras's
    `weight_decay` is decoupled and outside the trust ratio; this one is inside. With and without
    weight decay it equals tf-models-official's `lamb.LAMB`, except that an empty exclusion list
    excludes nothing here.

    Args:
        learning_rate: η. {rate} Defaults to 0.001.
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        epsilon: ε ≥ 0, outside the square root. Defaults to 1e-6.
        weight_decay: λ ≥ 0, inside the trust ratio. Defaults to `None`.
        {exclusions}
        {default_trust_ratio}
        {common_arguments}

    Raises:
        {raises}.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = LAMB(learning_rate=0.1)
        >>> optimizer.apply([keras.ops.convert_to_tensor([0.5, 0.5])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.6464, 3.6464]

    References:
        You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
        (arXiv:1904.00962), Algorithm 2.
    """

    rule_class = rules.LAMB
    arguments: ClassVar = {
        "learning_rate": 0.001,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "epsilon": 1e-6,
        "weight_decay": None,
        "exclude_from_weight_decay": None,
        "exclude_from_layer_adaptation": None,
        "default_trust_ratio": 1.0,
    }


@optimizer("lans")
class LANS(LargeBatchOptimizer):
    """LAMB on normalized gradients, with Nesterov's momentum.

    The gradient of every layer (trainable variable) is divided by its norm before the moments, and
    the step is made of two parts that are scaled to the size of the weights one by one, along the
    momentum and along the gradient itself:

        ĝ = ḡ / ‖ḡ‖              0 where ‖ḡ‖ = 0
        m ← β₁ m + (1 − β₁) ĝ,   v ← β₂ v + (1 − β₂) ĝ²
        r = m̂ / (√v̂ + ε) + λ w   with bias-corrected m̂ and v̂
        c = ĝ / (√v̂ + ε) + λ w
        w ← w − η (β₁ ρ_r r + (1 − β₁) ρ_c c)

    with ρ_r = ‖w‖ / ‖r‖ and ρ_c = ‖w‖ / ‖c‖, each `default_trust_ratio` where one of its norms is 0
    or the layer is excluded; the gradient of an excluded layer is normalized too.

    `clipnorm` and `global_clipnorm` have no effect: what they multiply a gradient by is divided out
    again.

    Args:
        learning_rate: η. {rate} Defaults to 0.001.
        beta_1: β₁ in [0, 1), of the momentum and of its part of the step. Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        epsilon: ε ≥ 0, outside the square root. Defaults to 1e-6.
        weight_decay: λ ≥ 0, inside the trust ratios. Defaults to `None`.
        {exclusions}
        {default_trust_ratio}
        {common_arguments}

    Raises:
        {raises}.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = LANS(learning_rate=0.1)
        >>> optimizer.apply([keras.ops.convert_to_tensor([0.5, 0.5])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.6464, 3.6464]

    References:
        Zheng, Lin, Zha, Li 2020, "Accelerated Large Batch Optimization of BERT Pretraining in 54
        minutes" (arXiv:2006.13484), which was not at hand: equation numbers were not looked up.
    """

    rule_class = rules.LANS
    arguments: ClassVar = LAMB.arguments
