"""Adam's moments and direction, as a pure function and in place."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.bounds import decayed_bounds, squares_fit, steps_fit
from tf_lbopt.rules.momentum import apply_delta
from tf_lbopt.rules.norms import compute_dtype
from tf_lbopt.rules.rule import Layer, Rule, Step, Update, dense
from tf_lbopt.rules.running_mean import running_means
from tf_lbopt.rules.sharing import elementwise, scalars

_FUSED_DTYPES = (tf.float32, tf.float64)
# Below this size a scratch variable costs more than the passes that it saves.
_WORTH_FUSING = 1 << 14
# At a rate of 0 it is not too long either: its square is finite.
_GREATEST_DIRECTION = 2.0**60


def adam(m, v, gradient, first, second, epsilon):
    """Adam's moments after a gradient, and the bias-corrected direction.

    ``m ← β₁ m + (1−β₁) g``, ``v ← β₂ v + (1−β₂) g²``, direction ``m̂ / (√v̂ + ε)`` with
    ``m̂ = m / (1−β₁ᵗ)`` and ``v̂ = v / (1−β₂ᵗ)``.

    Args:
        m: First moment.
        v: Second moment.
        gradient: g, of the same shape.
        first: The running mean of β₁, a `RunningMean`.
        second: That of β₂.
        epsilon: ε, outside the square root and after bias correction.

    Returns:
        ``(m, v, direction)``; a direction of 0 where v and ε are 0.

    References:
        Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", Algorithm 1.
    """
    m = first.updated(m, gradient)
    v = second.updated(v, gradient * gradient)
    root = tf.sqrt(second.corrected(v))
    return m, v, tf.math.divide_no_nan(first.corrected(m), root + epsilon)


def preconditioned(gradient, v, second, epsilon):
    """``g √(1−β₂ᵗ) / (√v + ε)``: a gradient in Adam's units, by the second moment as it stands.

    Args:
        gradient: g.
        v: Second moment, of the same shape.
        second: The running mean of β₂, t being how many gradients v has seen.
        epsilon: ε, before the bias correction, as in Keras.

    Returns:
        A tensor of the same shape; 0 where g is 0 (with ε = 0 too).
    """
    return tf.math.divide_no_nan(gradient * tf.sqrt(second.correction), tf.sqrt(v) + epsilon)


def direction_limit(beta_1: float, beta_2: float) -> float | None:
    """What Adam's direction has to be clipped to, or ``None``.

    Where β₁² ≥ β₂, the first moment outlives the second: a direction grows without bound, or up to
    one of ε alone, which may be very small.
    """
    return _GREATEST_DIRECTION if beta_1**2 >= beta_2 else None


def direction_bound(beta_1: float, beta_2: float, epsilon: float, dtype: tf.DType) -> float:
    """What no element of Adam's direction exceeds, whatever gradients came before.

    By the Cauchy-Schwarz inequality ``m ≤ √v (1−β₁)/√(1−β₂) / √(1−β₁²/β₂)``, and a bias correction
    is no more than that of t = 1, or none. Of a gradient whose square vanishes there is m without
    v, over ε. See `direction_limit` for what is clipped.

    Args:
        beta_1: β₁.
        beta_2: β₂.
        epsilon: ε.
        dtype: Of the moments; squares of gradients are finite in it.

    Example:
        >>> round(direction_bound(0.9, 0.999, 1e-6, tf.float32), 1)
        7.3
        >>> direction_bound(0.95, 0.9, 1e-6, tf.float32) == 2.0**60
        True
    """
    limit = direction_limit(beta_1, beta_2)
    if limit is not None:
        return limit
    bound = max(1.0, (1 - beta_1) / (1 - beta_2) ** 0.5) / (1 - beta_1**2 / beta_2) ** 0.5
    vanishing = (float(np.finfo(dtype.as_numpy_dtype).tiny) / (1 - beta_2)) ** 0.5
    return max(bound, vanishing / epsilon) if epsilon else bound


def adam_steps_fit(
    layers: Sequence[Layer],
    step: Step,
    hyperparameters: tuple[float, float, float],
    weight_decay: float | None,
    adapted_norms: Sequence[tf.Tensor] | None = None,
    ratio: float = 1.0,
) -> tf.Tensor:
    """Whether second moments stay finite, and steps along Adam's direction and that of decay.

    Args:
        layers: The layers.
        step: Gives η.
        hyperparameters: β₁, β₂ and ε.
        weight_decay: λ of the decay λ w that is added to the direction, or ``None``.
        adapted_norms: ‖w‖ of the adapted layers, whose steps are η ‖w‖ long; ``None`` if all steps
            are η times the direction.
        ratio: What η is multiplied by at most in layers without.

    Returns:
        A boolean scalar.
    """
    rates = scalars(layers, ratio * step.learning_rate)
    bounds = {d: tf.constant(direction_bound(*hyperparameters, d), d) for d in rates}
    lengths = decayed_bounds(
        layers, [bounds[layer.dtype] for layer in layers], step, weight_decay, adapted_norms, ratio
    )
    if adapted_norms is not None:
        zero, norms = scalars(layers, 0.0), iter(adapted_norms)
        steps = [next(norms) if layer.adapted else zero[layer.dtype] for layer in layers]
        lengths = elementwise(tf.add, lengths, steps)
    return squares_fit([layer.norm_bound for layer in layers]) & steps_fit(
        [rates[layer.dtype] for layer in layers], lengths
    )


def may_fuse(epsilon: float) -> bool:
    """Whether ε can not vanish in TensorFlow's kernel, which has NaN where v and ε are 0."""
    return epsilon >= 1e-30


def apply_adam_moments(
    m, v, gradient, first, second, epsilon, offset=None, limit=None, fused=True
) -> tf.Tensor:
    """`adam` on the moment variables, in place.

    Args:
        m: First moment, a variable.
        v: Second moment, a variable.
        gradient: g, dense, of the compute dtype.
        first: The running mean of β₁, of the compute dtype.
        second: That of β₂.
        epsilon: ε.
        offset: What to add to the direction (decay), a tensor, or ``None``.
        limit: What no element of the direction is to exceed, or ``None``; see `direction_limit`.
        fused: Whether TensorFlow's kernel may be used; see `may_fuse`. It is not with a ``limit``.

    Returns:
        ``direction + offset``, a tensor of the compute dtype.
    """
    dtype = compute_dtype(m.dtype)
    worthwhile = fused and limit is None and m.shape.num_elements() >= _WORTH_FUSING
    if not worthwhile or m.dtype not in _FUSED_DTYPES or _compat.in_xla_context():
        new_m, new_v, direction = adam(
            tf.cast(m, dtype), tf.cast(v, dtype), gradient, first, second, epsilon
        )
        m.assign(tf.cast(new_m, m.dtype))
        v.assign(tf.cast(new_v, v.dtype))
        if limit is not None:
            limit = tf.constant(limit, dtype)
            direction = tf.clip_by_value(direction, -limit, limit)
        return direction if offset is None else direction + offset

    # The fused kernel subtracts `lr` times the direction from whatever variable it is given: with a
    # rate of -1, a scratch one that starts at the offset ends as direction + offset, in one pass.
    scratch = _compat.anonymous_variable(m.shape, dtype)
    tf.raw_ops.AssignVariableOp(
        resource=scratch, value=tf.zeros(m.shape, dtype) if offset is None else offset
    )
    tf.raw_ops.ResourceApplyAdam(
        var=scratch,
        m=m.handle,
        v=v.handle,
        beta1_power=first.power,
        beta2_power=second.power,
        lr=tf.constant(-1.0, dtype),
        beta1=first.beta,
        beta2=second.beta,
        # The kernel's ε is added before the correction of v: √v + ε√(1−β₂ᵗ) = √(1−β₂ᵗ)(√v̂ + ε).
        epsilon=epsilon * tf.sqrt(second.correction),
        grad=gradient,
    )
    return tf.raw_ops.ReadVariableOp(resource=scratch, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Adam(Rule):
    """Adam as `keras.optimizers.Adam` has it, with the decoupled weight decay of its AdamW.

    ``w ← w − η λ w``, then ``w ← w − η √(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε)``: ε is added before the
    bias correction, which is where Keras and LAMB differ.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum", "velocity")

    beta_1: float
    beta_2: float
    epsilon: float
    weight_decay: float | None = None

    def update(self, layers: Sequence[Layer], step: Step) -> Update:
        """One update; see the class."""
        first = running_means(layers, step, self.beta_1)
        second = running_means(layers, step, self.beta_2)
        epsilon = {d: self.epsilon / tf.sqrt(mean.correction) for d, mean in second.items()}
        delta = scalars(layers, -step.learning_rate)
        decay = {d: rate * (self.weight_decay or 0.0) for d, rate in delta.items()}

        def write() -> list[tf.Tensor]:
            written = []
            for layer in layers:
                dtype = layer.dtype
                if self.weight_decay and layer.decayed:
                    written += apply_delta(layer.variable, layer.weights(), decay[dtype])
                direction = apply_adam_moments(
                    layer.slots["momentum"],
                    layer.slots["velocity"],
                    dense(layer.gradient),
                    first[dtype],
                    second[dtype],
                    epsilon[dtype],
                    limit=direction_limit(self.beta_1, self.beta_2),
                    fused=may_fuse(self.epsilon),
                )
                written += apply_delta(layer.variable, direction, delta[dtype])
            return written

        hyperparameters = self.beta_1, self.beta_2, self.epsilon
        return Update(adam_steps_fit(layers, step, hyperparameters, self.weight_decay), write)
