"""The package's pipeline around any Keras optimizer, without statistics."""

from typing import ClassVar

import keras  # noqa: F401  # for the example

from tf_lbopt.optimizers.around import PipelineAroundOptimizer
from tf_lbopt.optimizers.base import registered
from tf_lbopt.optimizers.declared import REQUIRED


@registered
class Accumulated(PipelineAroundOptimizer):
    """Gradient accumulation around any Keras optimizer, under every strategy.

    The inner optimizer makes one update from the mean gradient of all replicas and micro-steps, as
    if it had seen the whole batch on one device; between updates nothing of it changes, and nothing
    is exchanged between replicas. Stock optimizers (AdamW, Lion, Muon, Adafactor and so on) get by
    it what the optimizers of this package have themselves:

    - accumulation inside `fit` under `MirroredStrategy`, where Keras's own fails;
    - clipping after the reduction over replicas and micro-steps;
    - a NaN or Inf on any replica, in any micro-step, discards the whole update on all of them, and
      `skipped_updates` counts it;
    - sparse gradients stay sparse while they are summed, and repeated indices are merged;
    - state that resumes exactly, in mid-accumulation too.

    Learning rate, schedule and weight decay (with its exclusions) are the inner optimizer's, and
    count its updates. Accumulation, clipping, the average of the weights and the loss scale are
    given here, and refused on the inner optimizer.

    Around an optimizer that is not of this package an update is discarded for what is known of it:
    gradients that are not finite or whose squares overflow, and a learning rate that is none. A
    step of its that overflows is made, and leaves Inf or NaN in the weights.

    Args:
        inner_optimizer: A Keras optimizer, stock or of this package, not yet built.
        {common_arguments}

    Raises:
        {raises}; the inner optimizer scales the loss, is made of several, looks at sub-batches, is
            around another, was created outside of the strategy's scope, or has one of the settings
            that belong here.

    Example:
        >>> w = keras.Variable([1.0])
        >>> optimizer = Accumulated(keras.optimizers.SGD(0.5), 2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([1.0])], [w])
        >>> float(w.numpy()[0])
        1.0
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0])], [w])
        >>> float(w.numpy()[0])     # 1 − 0.5 · 2
        0.0
    """

    arguments: ClassVar = {"inner_optimizer": REQUIRED, "gradient_accumulation_steps": None}
