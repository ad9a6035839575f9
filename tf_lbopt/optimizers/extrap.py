"""Extrapolated SGD and Adam."""

from typing import ClassVar

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat, rules
from tf_lbopt.optimizers.base import optimizer
from tf_lbopt.optimizers.declared import REQUIRED, made_of
from tf_lbopt.optimizers.extrapolated import ExtrapolatedOptimizer
from tf_lbopt.optimizers.extrapolation import Extrapolation
from tf_lbopt.optimizers.hyperparameters import Arguments
from tf_lbopt.optimizers.trained import Variable, path_of, tensorflow_variable
from tf_lbopt.rules.extrapolation import filter_axes, filter_scaled, raw_noise
from tf_lbopt.rules.moments import RunningMean, preconditioned
from tf_lbopt.rules.norms import compute_dtype

_PAST_NOISES = ("past_gradient", "stochastic_noise")


class SGDExtrapolation(Extrapolation):
    """Mix-in: moves weights by momentum, and by past gradients or random noise."""

    momentum: float
    nesterov: bool
    noise: str
    shared_noise: bool
    noise_seed: int | None

    def _set_up(self, values: Arguments) -> None:
        noise, shared, seed = values["noise"], values["shared_noise"], values["noise_seed"]
        random = noise not in _PAST_NOISES
        if not random and (shared or seed is not None):
            raise ValueError(
                "`shared_noise` and `noise_seed` are for noise='gaussian' and noise='uniform'. "
                f"Received: noise={noise!r}, shared_noise={shared!r}, noise_seed={seed!r}"
            )
        if values["trust_coefficient"] is None and values["default_trust_ratio"] != 1.0:
            raise ValueError(
                "`default_trust_ratio` is for an optimizer with a `trust_coefficient`. Received: "
                f"default_trust_ratio={values['default_trust_ratio']!r}, trust_coefficient=None"
            )
        super()._set_up(values)
        self._seed: Variable | None = None
        if random:
            if seed is None:
                seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1)
            self._seed = self._add_counter("noise_seed")
            self._seed.assign(seed)

    def keeps_past(self) -> bool:
        """Whether past gradients are needed."""
        return self.noise in _PAST_NOISES

    @classmethod
    def rule_of(cls, values: Arguments) -> rules.Rule:
        """The algorithm from the gradients on, which has the look-ahead in them already."""
        rule_class = rules.SGD if values["trust_coefficient"] is None else rules.LARS
        return made_of(rule_class, {**values, "nesterov": False})

    def noise_of(self, index: int, past: tf.Variable | None, point: tf.Tensor) -> tf.Tensor:
        """ζ of one variable, on a replica."""
        return self._random_noise(index, point) if past is None else tf.convert_to_tensor(past)

    def look_ahead(self, index: int) -> tuple[tf.Variable | None, float]:
        """What β v is of one variable, as v and β; ``None`` without `nesterov`."""
        slots = self.trained.slots.get("momentum") if self.nesterov else None
        return None if slots is None else slots[index], self.momentum

    def _random_noise(self, index: int, point: tf.Tensor) -> tf.Tensor:
        variable = self.trained.variables[index]
        dtype = compute_dtype(variable.dtype)
        seed = tf.stack([tf.convert_to_tensor(self._seed), index])
        fold_in = tf.random.experimental.stateless_fold_in
        seed = fold_in(seed, tf.cast(tf.convert_to_tensor(self.trained.iterations), tf.int32))
        if not self.shared_noise:
            seed = fold_in(seed, point)
        raw = raw_noise(self.noise, variable.shape, dtype, seed)
        axes = filter_axes(len(variable.shape), self._kind_of(variable))
        return filter_scaled(raw, tf.cast(tensorflow_variable(variable), dtype), axes)

    def _kind_of(self, variable: Variable) -> str:
        # `fit` knows the layers; in a custom loop there are only the names that Keras gives.
        for kinds in self._filters.values():
            if _compat.key_of(variable) in kinds:
                return kinds[_compat.key_of(variable)]
        path = path_of(variable)
        if path.endswith("embeddings"):
            return "embedding"
        if "d_transpose" in path:
            return "transposed"
        return "depthwise" if "depthwise" in path else "kernel"

    def past_of(self, own: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        """The sub-batch's gradient, or what it differs from the mean."""
        return own - mean if self.noise == "stochastic_noise" else own


@optimizer("extrap_sgd")
class ExtrapSGD(SGDExtrapolation, ExtrapolatedOptimizer):
    """Extrapolated SGD: every replica takes its gradient at a point of its own beside the weights.

        x_half = x − γ̂ ζ + β v                  on each of k sub-batches, each its own ζ
        v ← β v − η ρ (ḡ + λ x)                 ḡ the mean of the gradients at these points
        x ← x + v

    ζ is chosen by `noise`: `"past_gradient"` (EXTRAP-SGD), the gradient that the same replica
    computed one update earlier; `"stochastic_noise"`, that gradient minus the mean over all
    replicas; `"gaussian"` or `"uniform"` noise, scaled so that each of its filters has the norm of
    the weights' filter, drawn for each replica or, with `shared_noise=True`, once for all
    (SmoothOut).
    A filter is a slice along the last axis of a Dense or Conv kernel, one channel of a depthwise
    kernel, one row of an embedding, or a whole vector. The first update has no past gradient and
    is not extrapolated by one.

    Model variables hold x whenever Python has control: validation, `evaluate`, `predict`, saving
    and checkpoints see x, also after an error or interrupt in mid-step. `fit` needs nothing but
    `compile(optimizer=ExtrapSGD(...))`; a custom training loop wraps its step in `extrapolated`.

    With γ̂ = 0 this is Nesterov's SGD; where Keras's `SGD(nesterov=True)` stores x + β v, this
    stores x. Decided where the paper is silent: with accumulation a replica keeps one past
    gradient, the mean over its micro-steps, unclipped and without decay; γ̂ is not multiplied by ρ.

    Args:
        learning_rate: η. {rate}
        momentum: β in [0, 1). Defaults to 0.9.
        nesterov: Whether to add β v to the point of the gradient. Defaults to `True`.
        extrapolation_rate: γ̂ ≥ 0, a schedule or a callable. Defaults to `None`: η / k, the local
            rate, with k the number of replicas times `sub_batches`.
        noise: `"past_gradient"`, `"stochastic_noise"`, `"gaussian"` or `"uniform"`. Defaults to
            `"past_gradient"`.
        shared_noise: Whether random noise is the same on all sub-batches. Defaults to `False`.
        noise_seed: Seed of random noise, an integer, or `None` for one drawn when the optimizer is
            made (it is saved with the state). Defaults to `None`.
        trust_coefficient: τ > 0 for the trust ratio ρ = τ ‖x‖ / ‖ḡ + λ x‖ of LARS; `None` for
            ρ = 1. Defaults to `None`.
        sub_batches: In how many parts each replica takes its batch within a step, in turn, each
            with its own point: as `sub_batches` times as many replicas, but for the statistics of
            batch normalization. Every replica's batch must divide by it. Defaults to 1.
        weight_decay: λ ≥ 0, coupled, taken at x. Defaults to `None`.
        {exclusions} See `LARS` for what then becomes of their rate.
        default_trust_ratio: ρ of a variable that has none, > 0, as in `LARS`; only with
            `trust_coefficient`. Defaults to 1.0.
        {common_arguments}

    Raises:
        {raises}; gradients that were not taken in a block of `extrapolated`.

    Example:
        >>> w = keras.Variable([1.0])
        >>> optimizer = ExtrapSGD(learning_rate=0.1, momentum=0.5, extrapolation_rate=0.2)
        >>> for _ in range(2):
        ...     with optimizer.extrapolated([w]):
        ...         point = float(w.numpy()[0])
        ...         optimizer.apply([keras.ops.convert_to_tensor(w)], [w])  # gradient of w²/2
        ...     print(round(point, 4), round(float(w.numpy()[0]), 4))
        1.0 0.9
        0.65 0.785

    References:
        Lin, Kong, Stich, Jaggi 2020, "Extrapolation for Large-batch Training in Deep Learning"
        (arXiv:2006.05720), Algorithm 1 and section 3.2.
    """

    rule_class = rules.LARS
    arguments: ClassVar = {
        "learning_rate": REQUIRED,
        "momentum": 0.9,
        "nesterov": True,
        "extrapolation_rate": None,
        "noise": "past_gradient",
        "shared_noise": False,
        "noise_seed": None,
        "trust_coefficient": None,
        "sub_batches": 1,
        "weight_decay": None,
        "exclude_from_weight_decay": None,
        "exclude_from_layer_adaptation": None,
        "default_trust_ratio": 1.0,
    }


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
