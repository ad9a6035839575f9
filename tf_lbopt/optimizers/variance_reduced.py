"""VRGD in front of any Keras optimizer."""

from typing import ClassVar

import keras  # noqa: F401  # for the example

from tf_lbopt.optimizers.around import PipelineAroundOptimizer
from tf_lbopt.optimizers.base import registered
from tf_lbopt.optimizers.declared import REQUIRED
from tf_lbopt.optimizers.gsnr_weighting import GSNRWeighting
from tf_lbopt.rules.vrgd import GSNR_SLOT


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

    arguments: ClassVar = {
        "inner_optimizer": REQUIRED,
        "gamma": 0.1,
        "beta_3": None,
    }

    def own_slots(self) -> tuple[str, ...]:
        """That of r's running mean, if there is one; the others are the inner optimizer's."""
        return () if self.beta_3 is None else (GSNR_SLOT,)
