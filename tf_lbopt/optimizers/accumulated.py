"""The package's pipeline around any Keras optimizer, without statistics; also with Adasum."""

from collections.abc import Callable
from typing import Any, ClassVar

import tensorflow as tf

from tf_lbopt.aggregation.adasum import adasum_over_replicas
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


@registered
class Adasum(PipelineAroundOptimizer):
    """Adasum: gradients of the replicas are added where they differ, averaged where they agree.

    In the place of the mean gradient the inner optimizer sees, for every layer (trainable
    variable), of two replicas' gradients a and b

        (1 − a·b / 2‖a‖²) a + (1 − a·b / 2‖b‖²) b      0/0 = 0

    which is their sum if they are orthogonal and their mean if they are equal. Of more replicas, a
    power of two, neighbors are combined first, then what came of them, and so on (the order
    matters: it is not associative). Each replica's gradient is that of its own mean loss. With
    accumulation it is the mean over the replica's micro-steps.

    Only under `tf.distribute.MirroredStrategy`: gradients are copied between its devices, each of
    them log₂ k times in a row and back once, in the place of one all-reduce. Adasum is of the
    gradients, before the inner optimizer: Horovod's, for optimizers with a state, is of their
    updates. Clipping, the guard against NaN and Inf and all else are as in `Accumulated`.

    Args:
        inner_optimizer: A Keras optimizer, stock or of this package, not yet built.
        {common_arguments}

    Raises:
        {raises}; what `Accumulated` refuses; with the first gradients, another strategy or a number
            of replicas that is no power of two.

    Example:
        >>> strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        >>> with strategy.scope():
        ...     w = keras.Variable([1.0])
        ...     optimizer = Adasum(keras.optimizers.SGD(0.5))
        ...     optimizer.build([w])
        >>> def step():
        ...     optimizer.apply([keras.ops.convert_to_tensor([2.0])], [w])
        >>> strategy.run(step)
        >>> float(w.numpy()[0])     # of a single replica nothing is combined
        0.0

    References:
        Maleki et al. 2021, "Scaling Distributed Training with Adaptive Summation"
        (arXiv:2006.02924), which was not at hand: the formula is that of its implementations.
    """

    arguments: ClassVar = Accumulated.arguments
    reduction = staticmethod(adasum_over_replicas)

    def watch_squared_norms(self, rows: int, of_examples: bool = False) -> None:
        """Refused: what the replicas give is not summed, and no mean of it is known."""
        raise ValueError(
            "GradientNoiseScale needs an optimizer that takes the mean over the replicas. "
            f"Received: {type(self).__name__}"
        )

    def _prepared_update(self, *args: Any, **kwargs: Any) -> Callable[[], tf.Tensor]:
        # Not in `build`: a model that was trained on several replicas is loaded on one, too.
        replicas = self._strategy.num_replicas_in_sync
        mirrored = isinstance(self._strategy, tf.distribute.MirroredStrategy)
        if not mirrored or replicas & (replicas - 1):
            raise ValueError(
                f"{type(self).__name__} combines the gradients of a power of two of replicas, by "
                "copies between the devices of a tf.distribute.MirroredStrategy. "
                f"Received: {replicas} replicas under {type(self._strategy).__name__}"
            )
        return super()._prepared_update(*args, **kwargs)
