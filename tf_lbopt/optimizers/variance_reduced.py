"""VRGD in front of any Keras optimizer."""

from typing import Any, ClassVar

import keras
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.optimizers.around import AroundOptimizer
from tf_lbopt.optimizers.base import LargeBatchOptimizer, registered
from tf_lbopt.optimizers.declared import REQUIRED
from tf_lbopt.optimizers.gsnr_weighting import GSNRWeighting
from tf_lbopt.optimizers.hyperparameters import Arguments
from tf_lbopt.optimizers.trained import Variable, tensorflow_variable
from tf_lbopt.rules.vrgd import GSNR_SLOT

# What belongs to the pipeline and not to the algorithm is given to the wrapper, once.
_OURS = (
    "gradient_accumulation_steps",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "loss_scale_factor",
)


@registered
class VarianceReduced(GSNRWeighting, AroundOptimizer):
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

    def __init__(self, *args: Any, **kwargs: Any):
        for argument in ("learning_rate", "weight_decay", "exclude_from_weight_decay"):
            if kwargs.pop(argument, None) is not None:
                raise ValueError(
                    f"`{argument}` must be set on the `inner_optimizer`. "
                    f"Received it on {type(self).__name__}"
                )
        super().__init__(*args, **kwargs)

    def _set_up(self, values: Arguments) -> None:
        _check_inner(values["inner_optimizer"])
        super()._set_up(values)

    @property
    def variables(self) -> list[keras.Variable]:
        """Its own variables and the inner optimizer's."""
        return [*super().variables, *self.inner_optimizer.variables]

    def _create_variables(self, variables: list[Variable]) -> None:
        self.inner_optimizer.build(variables)
        super()._create_variables(variables)
        if isinstance(self.inner_optimizer, LargeBatchOptimizer):
            self.trained.slots.update(self.inner_optimizer.trained.slots)

    def own_slots(self) -> tuple[str, ...]:
        """That of r's running mean, if there is one; the others are the inner optimizer's."""
        return () if self.beta_3 is None else (GSNR_SLOT,)

    def _finished(self, common: Any, made: tf.Tensor, *args: Any) -> list[tf.Tensor]:
        iterations = tensorflow_variable(_compat.counter(self.inner_optimizer))
        iterations.assign_add(tf.cast(made, iterations.dtype))
        return super()._finished(common, made, *args)

    def get_config(self) -> Arguments:
        """The arguments that make an equal optimizer, for Keras serialization."""
        config = super().get_config()
        del config["learning_rate"], config["weight_decay"]
        config["inner_optimizer"] = keras.saving.serialize_keras_object(self.inner_optimizer)
        return config


def _check_inner(inner: Any) -> None:
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(
            "`inner_optimizer` must be a keras.optimizers.Optimizer, of Keras 3 (for tf_keras see "
            "tf_lbopt.tf_keras). "
            f"Received: inner_optimizer={_validation.shown(inner)}"
        )
    received = f"Received: {type(inner).__name__}"
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "`inner_optimizer` must not scale the loss: put tf_lbopt.LossScaleOptimizer around "
            f"VarianceReduced instead. {received}"
        )
    if _compat.is_multi_optimizer(inner):
        raise ValueError(
            "`inner_optimizer` must be one optimizer, not several, which share out the variables "
            f"in a way of their own. {received}"
        )
    if getattr(inner, "statistics", ()):
        raise ValueError(
            "`inner_optimizer` must not look at sub-batches itself: it sees one gradient. "
            f"{received}"
        )
    if inner.built:
        raise ValueError(f"`inner_optimizer` must not be built yet. {received}, built")
    for name in _OURS:
        if getattr(inner, name, None):
            raise ValueError(
                f"`{name}` must be given to VarianceReduced and not to its `inner_optimizer`. "
                f"{received} with {name}={getattr(inner, name)!r}"
            )
