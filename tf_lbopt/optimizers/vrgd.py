"""The VRGD optimizers: SGD, momentum, Adam, LARS, LAMB, LANS or any on a weighted gradient."""

from typing import ClassVar

from tf_lbopt import rules
from tf_lbopt.optimizers.around import PipelineAroundOptimizer
from tf_lbopt.optimizers.base import LargeBatchOptimizer, optimizer, registered
from tf_lbopt.optimizers.declared import REQUIRED
from tf_lbopt.optimizers.gsnr_weighting import GSNRWeighting
from tf_lbopt.optimizers.layerwise import LAMB, LANS, LARS
from tf_lbopt.rules.vrgd import GSNR_SLOT


@optimizer("vr_sgd")
class VRSGD(GSNRWeighting, LargeBatchOptimizer):
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
        learning_rate: η. {rate}
        {gamma}
        weight_decay: λ ≥ 0, coupled. Defaults to `None`.
        {exclude_from_weight_decay}
        {common_arguments}

    Raises:
        {raises}; one replica without accumulation.

    Example:
        >>> w = keras.Variable([0.0, 0.0])
        >>> optimizer = VRSGD(learning_rate=1.0, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]     # r = 4 and 1/4, normalized 1.88 and 0.12
        [-2.0, -0.1176]

    References:
        {vrgd}, Algorithm 1, eq. 7 to 10.
    """

    rule_class = rules.SGD
    arguments: ClassVar = {"learning_rate": REQUIRED, "gamma": 0.1, "weight_decay": None}


@optimizer("vr_momentum")
class VRMomentum(GSNRWeighting, LargeBatchOptimizer):
    """VR-Momentum: momentum SGD on the gradient weighted by its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        u ← β u − η (r ḡ + λ w)
        w ← w + u                              with nesterov: w ← w + β u − η (r ḡ + λ w)

    Args:
        learning_rate: η. {rate}
        momentum: β in [0, 1). Defaults to 0.9.
        nesterov: Whether to use Nesterov momentum. Defaults to `False`.
        {gamma}
        weight_decay: λ ≥ 0, coupled. Defaults to `None`.
        {exclude_from_weight_decay}
        {common_arguments}

    Raises:
        {raises}; one replica without accumulation.

    Example:
        >>> w = keras.Variable([0.0, 0.0])
        >>> optimizer = VRMomentum(learning_rate=1.0, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [-2.0, -0.1176]

    References:
        {vrgd}, section 4.2.
    """

    rule_class = rules.SGD
    arguments: ClassVar = {
        "learning_rate": REQUIRED,
        "momentum": 0.9,
        "nesterov": False,
        "gamma": 0.1,
        "weight_decay": None,
    }


@optimizer("vr_adam")
class VRAdam(GSNRWeighting, LargeBatchOptimizer):
    """VR-Adam: Adam on the gradient weighted by the running mean of its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        p ← β₃ p + (1 − β₃) r,   p̂ = p / (1 − β₃ᵗ)
        Adam on p̂ ḡ, as `keras.optimizers.Adam`

    The weighting comes before the moments (section 4.2 of the paper says why). The authors' own
    listing, in an appendix, was not at hand. Inferred from section 4.2: p̂ multiplies ḡ, and p is
    the running mean of the clipped r, not of the ratio before the clip. The weight decay is
    decoupled, as in `keras.optimizers.AdamW`.

    Args:
        learning_rate: η. {rate} Defaults to 0.001.
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        beta_3: β₃ in [0, 1), the decay of p. Defaults to 0.9.
        epsilon: ε ≥ 0, where Keras has it. Defaults to 1e-7.
        {gamma}
        weight_decay: λ ≥ 0, decoupled. Defaults to `None`.
        {exclude_from_weight_decay}
        {common_arguments}

    Raises:
        {raises}; one replica without accumulation.

    Example:
        >>> w = keras.Variable([0.0, 0.0])
        >>> optimizer = VRAdam(learning_rate=0.1, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [-0.1, -0.1]

    References:
        {vrgd}, section 4.2.
    """

    rule_class = rules.Adam
    arguments: ClassVar = {
        "learning_rate": 0.001,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "beta_3": 0.9,
        "epsilon": 1e-7,
        "gamma": 0.1,
        "weight_decay": None,
    }


@optimizer("vr_lars")
class VRLARS(GSNRWeighting, LARS):
    """VR-LARS: `LARS` on the gradient weighted by its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        LARS on r ḡ, in the place of ḡ

    The authors' own listing, in an appendix, was not at hand. Inferred from section 4.2 of the
    paper: the trust ratio is that of r ḡ, so that where r shrinks a whole layer's gradient the
    ratio undoes it; with ‖ḡ‖ in its place the step would be shorter.

    Args:
        {base_arguments}
        {gamma}
        {common_arguments}

    Raises:
        {raises}; one replica without accumulation.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = VRLARS(1.0, trust_coefficient=0.1, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.5009, 3.9706]

    References:
        {vrgd}, section 4.2.
    """

    arguments: ClassVar = {**LARS.arguments, "gamma": 0.1}


@optimizer("vr_lamb")
class VRLAMB(GSNRWeighting, LAMB):
    """VR-LAMB: `LAMB` on the gradient weighted by the running mean of its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        p ← β₃ p + (1 − β₃) r,   p̂ = p / (1 − β₃ᵗ)
        LAMB on p̂ ḡ

    The authors' listing is in an appendix that was not at hand. Two things are inferred from
    section 4.2 of the paper: p̂ multiplies ḡ before the moments, and p is the running mean of r
    after the clip.

    Args:
        {base_arguments}
        beta_3: β₃ in [0, 1), the decay of p. Defaults to 0.9.
        {gamma}
        {common_arguments}

    Raises:
        {raises}; one replica without accumulation.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = VRLAMB(learning_rate=0.1, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.6464, 3.6464]

    References:
        {vrgd}, section 4.2.
    """

    arguments: ClassVar = {**LAMB.arguments, "beta_3": 0.9, "gamma": 0.1}


@optimizer("vr_lans")
class VRLANS(GSNRWeighting, LANS):
    """VR-LANS: `LANS` on the gradient weighted by the running mean of its signal-to-noise ratio.

        r = clip(GSNR / layer mean, γ, 1)      as in `VRSGD`
        p ← β₃ p + (1 − β₃) r,   p̂ = p / (1 − β₃ᵗ)
        LANS on p̂ ḡ

    The paper of VRGD does not have it; it is made as VR-LAMB is. What is normalized is the weighted
    gradient, ĝ = p̂ ḡ / ‖p̂ ḡ‖: the weighting changes its direction and not its length. `clipnorm`
    and `global_clipnorm` have no effect, as in `LANS`.

    Args:
        {base_arguments}
        beta_3: β₃ in [0, 1), the decay of p. Defaults to 0.9.
        {gamma}
        {common_arguments}

    Raises:
        {raises}; one replica without accumulation.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = VRLANS(learning_rate=0.1, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.6464, 3.6464]

    References:
        {vrgd}, section 4.2, of which it is no part; and that of `LANS`.
    """

    arguments: ClassVar = {**LANS.arguments, "beta_3": 0.9, "gamma": 0.1}


@registered
class VarianceReduced(GSNRWeighting, PipelineAroundOptimizer):
    """VRGD in front of any optimizer: every element weighted by its signal-to-noise ratio.

    The inner optimizer sees r ḡ (or p̂ ḡ with `beta_3`) instead of the mean gradient ḡ, with r as in
    `VRSGD`. Around SGD, Adam, `LARS` and `LAMB` it equals the classes of their names (weight decay
    is the inner optimizer's own: in Keras's classes it is decoupled).

    Learning rate, schedule and weight decay are the inner optimizer's; accumulation, clipping, the
    average of the weights and the loss scale are given here.

    Around an optimizer that is not of this package an update is discarded for what is known of it:
    gradients that are not finite or whose squares overflow, and a learning rate that is none. A
    step of its that overflows is made, and leaves Inf or NaN in the weights.

    Args:
        inner_optimizer: A Keras optimizer, stock or of this package, not yet built.
        {gamma}
        beta_3: Decay of r's running mean p in [0, 1) (0.9 in VRAdam and VRLAMB), or `None` for r
            itself. Defaults to `None`.
        {common_arguments}

    Raises:
        {raises}; the inner optimizer scales the loss, is made of several, reduces variance itself,
            was created outside of the strategy's scope, or has one of the settings that belong
            here; with the first gradients, one replica without accumulation.

    Example:
        >>> w = keras.Variable([0.0, 0.0])
        >>> optimizer = VarianceReduced(keras.optimizers.SGD(1.0), gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, 3.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -1.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]
        [-2.0, -0.1176]

    References:
        {vrgd}, section 4.2.
    """

    arguments: ClassVar = {"inner_optimizer": REQUIRED, "gamma": 0.1, "beta_3": None}

    def own_slots(self) -> tuple[str, ...]:
        """That of r's running mean, if there is one; the others are the inner optimizer's."""
        return () if self.beta_3 is None else (GSNR_SLOT,)
