"""Extrapolated Adam."""

from typing import ClassVar

import keras  # noqa: F401  # for the example
import tensorflow as tf

from tf_lbopt import rules
from tf_lbopt.optimizers.base import optimizer
from tf_lbopt.optimizers.declared import REQUIRED
from tf_lbopt.optimizers.extrapolated import ExtrapolatedOptimizer
from tf_lbopt.optimizers.extrapolation import Extrapolation
from tf_lbopt.rules.moments import RunningMean, preconditioned
from tf_lbopt.rules.norms import compute_dtype


class AdamExtrapolation(Extrapolation):
    """Mix-in: moves weights by past gradients in Adam's units."""

    beta_2: float
    epsilon: float

    def noise_of(self, index: int, past: tf.Variable | None, point: tf.Tensor) -> tf.Tensor:
        """The past gradient of one variable, preconditioned; see `ExtrapAdam`."""
        del point
        dtype = compute_dtype(self.trained.targets[index].dtype)
        return preconditioned(
            tf.convert_to_tensor(past),
            tf.cast(self.trained.slots["velocity"][index], dtype),
            RunningMean(
                tf.constant(self.beta_2, dtype),
                tf.cast(tf.convert_to_tensor(self.trained.iterations), dtype),
            ),
            self.epsilon,
        )


@optimizer("extrap_adam")
class ExtrapAdam(AdamExtrapolation, ExtrapolatedOptimizer):
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
        learning_rate: η. {rate}
        beta_1: β₁ in [0, 1). Defaults to 0.9.
        beta_2: β₂ in [0, 1). Defaults to 0.999.
        epsilon: ε ≥ 0, as in `keras.optimizers.Adam`. Defaults to 1e-7.
        extrapolation_rate: γ̂ ≥ 0, a schedule or a callable. Defaults to `None`: η / k.
        sub_batches: As in `ExtrapSGD`. Defaults to 1.
        weight_decay: λ ≥ 0, decoupled as in `keras.optimizers.AdamW`. Defaults to `None`.
        {exclude_from_weight_decay}
        {common_arguments}

    Raises:
        {raises}; gradients that were not taken in a block of `extrapolated`.

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

    References:
        Lin, Kong, Stich, Jaggi 2020, "Extrapolation for Large-batch Training in Deep Learning"
        (arXiv:2006.05720), section 5.2.
    """

    rule_class = rules.Adam
    arguments: ClassVar = {
        "learning_rate": REQUIRED,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "epsilon": 1e-7,
        "extrapolation_rate": None,
        "sub_batches": 1,
        "weight_decay": None,
        "exclude_from_weight_decay": None,
    }
