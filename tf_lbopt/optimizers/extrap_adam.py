"""Extrapolated Adam for Keras 3."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt import _validation, rules
from tf_lbopt.optimizers.base import with_common_arguments
from tf_lbopt.optimizers.exclusion import tensorflow_variable
from tf_lbopt.optimizers.extrapolated import ExtrapolatedOptimizer
from tf_lbopt.optimizers.extrapolation import Extrapolation
from tf_lbopt.rules.extrapolation import apply_extrapolation
from tf_lbopt.rules.moments import RunningMean, preconditioned
from tf_lbopt.rules.norms import compute_dtype


class ExtrapAdamAlgorithm(Extrapolation):
    """EXTRAP-ADAM: Adam on gradients that every replica takes at a point of its own.

        x_half = x − γ̂ ζ √(1 − β₂ᵗ) / (√v + ε)      on each of k sub-batches, each its own ζ
        Adam on the mean of the gradients at these points

    ζ is the gradient that the same replica computed one update earlier, at its own point then; it
    is put through Adam's preconditioner as it stands, v and t being those after that update. The
    first update has no past gradient and is not extrapolated.

    The authors' own listing, in an appendix, was not at hand. Inferred from section 5.2 of the
    paper: the past gradient alone (not the first moment) is preconditioned, by the second moment
    before the coming update; and there is no look-ahead by the momentum, as `ExtrapSGD` has. For
    the rest see `ExtrapSGD`.

    Args:
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments.
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        epsilon: ε ≥ 0, as in `keras.optimizers.Adam`. Defaults to 1e-7.
        extrapolation_rate: γ̂ ≥ 0, a schedule or a callable. Defaults to `None`: η / k.
        sub_batches: As in `ExtrapSGD`. Defaults to 1.
        weight_decay: λ ≥ 0, decoupled as in `keras.optimizers.AdamW`. Defaults to `None`.
        exclude_from_weight_decay: Variables, or regexes over the variable path (``"/bias$"``), that
            do not decay.
        {common_arguments}

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; gradients that
            were not taken in a block of `extrapolated`.

    {example}

    References:
        Lin, Kong, Stich, Jaggi 2020, "Extrapolation for Large-batch Training in Deep Learning"
        (arXiv:2006.05720), section 5.2.
    """

    slots = rules.Adam.slots

    def __init__(
        self,
        learning_rate: Any,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        extrapolation_rate: Any = None,
        sub_batches: int = 1,
        weight_decay: float | None = None,
        exclude_from_weight_decay: Sequence[Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            extrapolation_rate=extrapolation_rate,
            sub_batches=sub_batches,
            weight_decay=weight_decay,
            exclude_from_weight_decay=exclude_from_weight_decay,
            **kwargs,
        )
        self.beta_1 = _validation.real("beta_1", beta_1, low=0.0, high=1.0, high_open=True)
        self.beta_2 = _validation.real("beta_2", beta_2, low=0.0, high=1.0, high_open=True)
        self.epsilon = _validation.real("epsilon", epsilon, low=0.0)

    def rule(self) -> rules.Rule:
        """The algorithm, from the gradients on, with the current hyper-parameters."""
        return rules.Adam(self.beta_1, self.beta_2, self.epsilon, self.weight_decay)

    def move(self, index: int, past: tf.Variable | None, rate: tf.Tensor, point: tf.Tensor) -> None:
        """Moves one variable, in place, on a replica; see the class."""
        del point
        variable = tensorflow_variable(self._trainable_variables[index])
        dtype = compute_dtype(variable.dtype)
        noise = preconditioned(
            tf.convert_to_tensor(past),
            tf.cast(self._slots_of([index])["velocity"][0], dtype),
            RunningMean(
                tf.constant(self.beta_2, dtype),
                tf.cast(tf.convert_to_tensor(self._iterations), dtype),
            ),
            self.epsilon,
        )
        apply_extrapolation(variable, None, noise, rate, 0.0)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class ExtrapAdam(ExtrapAdamAlgorithm, ExtrapolatedOptimizer):
    """EXTRAP-ADAM for Keras 3.

    Example:
        >>> w = keras.Variable([1.0])
        >>> optimizer = ExtrapAdam(learning_rate=0.1, extrapolation_rate=0.2)
        >>> for _ in range(2):
        ...     with optimizer.extrapolated([w]):
        ...         point = float(w.numpy()[0])
        ...         optimizer.apply([keras.ops.convert_to_tensor(w)], [w])  # gradient of w²/2
        ...     print(round(point, 4), round(float(w.numpy()[0]), 4))
        1.0 0.9
        0.7 0.8024
    """
