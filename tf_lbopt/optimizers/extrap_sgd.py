"""Extrapolated SGD for Keras 3."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt import _validation, rules
from tf_lbopt.optimizers.algorithm import LayerwiseAlgorithm
from tf_lbopt.optimizers.base import with_common_arguments
from tf_lbopt.optimizers.exclusion import path_of, tensorflow_variable
from tf_lbopt.optimizers.extrapolated import ExtrapolatedOptimizer
from tf_lbopt.optimizers.extrapolation import Extrapolation
from tf_lbopt.rules.extrapolation import (
    apply_extrapolation,
    filter_axes,
    filter_scaled,
    raw_noise,
)
from tf_lbopt.rules.norms import compute_dtype

PAST_NOISES = ("past_gradient", "stochastic_noise")
RANDOM_NOISES = ("gaussian", "uniform")


class ExtrapSGDAlgorithm(Extrapolation, LayerwiseAlgorithm):
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
        learning_rate: η. A float, a `keras.optimizers.schedules.LearningRateSchedule` or a callable
            without arguments.
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
        exclude_from_weight_decay: Variables, or regexes over the variable path (``"/bias$"``), that
            do not decay.
        exclude_from_layer_adaptation: Those that have no trust ratio. Defaults to `None`: the same
            as those excluded from weight decay; `[]` excludes none. See `LARS` for what
            then becomes of their rate.
        default_trust_ratio: ρ of a variable that has none, > 0, as in `LARS`; only with
            `trust_coefficient`. Defaults to 1.0.
        {common_arguments}

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; gradients that
            were not taken in a block of `extrapolated`.

    {example}

    References:
        Lin, Kong, Stich, Jaggi 2020, "Extrapolation for Large-batch Training in Deep Learning"
        (arXiv:2006.05720), Algorithm 1 and section 3.2.
    """

    slots = rules.SGD.slots

    def __init__(
        self,
        learning_rate: Any,
        momentum: float = 0.9,
        nesterov: bool = True,
        extrapolation_rate: Any = None,
        noise: str = "past_gradient",
        shared_noise: bool = False,
        noise_seed: int | None = None,
        trust_coefficient: float | None = None,
        sub_batches: int = 1,
        weight_decay: float | None = None,
        exclude_from_weight_decay: Sequence[Any] | None = None,
        exclude_from_layer_adaptation: Sequence[Any] | None = None,
        default_trust_ratio: float = 1.0,
        **kwargs: Any,
    ):
        noise = _validation.choice("noise", noise, (*PAST_NOISES, *RANDOM_NOISES))
        super().__init__(
            learning_rate,
            extrapolation_rate=extrapolation_rate,
            sub_batches=sub_batches,
            keeps_past=noise in PAST_NOISES,
            weight_decay=weight_decay,
            exclude_from_weight_decay=exclude_from_weight_decay,
            exclude_from_layer_adaptation=exclude_from_layer_adaptation,
            default_trust_ratio=default_trust_ratio,
            **kwargs,
        )
        self.momentum = _validation.real("momentum", momentum, low=0.0, high=1.0, high_open=True)
        self.nesterov = _validation.boolean("nesterov", nesterov)
        self.noise = noise
        self.shared_noise = _validation.boolean("shared_noise", shared_noise)
        self.noise_seed = _validation.integer("noise_seed", noise_seed, low=0, optional=True)
        if noise in PAST_NOISES and (shared_noise or noise_seed is not None):
            raise ValueError(
                "`shared_noise` and `noise_seed` are for noise='gaussian' and noise='uniform'. "
                f"Received: noise={noise!r}, shared_noise={shared_noise!r}, "
                f"noise_seed={noise_seed!r}"
            )
        self.trust_coefficient = _validation.real(
            "trust_coefficient", trust_coefficient, low=0.0, low_open=True, optional=True
        )
        if self.trust_coefficient is None and self.default_trust_ratio != 1.0:
            raise ValueError(
                "`default_trust_ratio` is for an optimizer with a `trust_coefficient`. Received: "
                f"default_trust_ratio={default_trust_ratio!r}, trust_coefficient=None"
            )
        self._seed: Any = None
        if noise in RANDOM_NOISES:
            drawn = noise_seed
            if drawn is None:
                drawn = int(np.random.SeedSequence().generate_state(1)[0] >> 1)
            self._seed = self._add_counter("noise_seed")
            self._seed.assign(drawn)

    def rule(self) -> rules.Rule:
        """The algorithm, from the gradients on, with the current hyper-parameters."""
        if self.trust_coefficient is None:
            return rules.SGD(self.momentum, nesterov=False, weight_decay=self.weight_decay)
        return rules.LARS(
            self.momentum,
            self.trust_coefficient,
            nesterov=False,
            weight_decay=self.weight_decay,
            default_trust_ratio=self.default_trust_ratio,
        )

    def move(self, index: int, past: tf.Variable | None, rate: tf.Tensor, point: tf.Tensor) -> None:
        """Moves one variable to ``x − γ̂ ζ + β v``, in place, on a replica."""
        variable = tensorflow_variable(self._trainable_variables[index])
        (velocity,) = self._slots_of([index]).get("momentum", [None]) if self.nesterov else [None]
        noise = self._random_noise(index, point) if past is None else tf.convert_to_tensor(past)
        apply_extrapolation(variable, velocity, noise, rate, self.momentum)

    def _random_noise(self, index: int, point: tf.Tensor) -> tf.Tensor:
        variable = self._trainable_variables[index]
        dtype = compute_dtype(variable.dtype)
        seed = tf.stack([tf.convert_to_tensor(self._seed), index])
        fold_in = tf.random.experimental.stateless_fold_in
        seed = fold_in(seed, tf.cast(tf.convert_to_tensor(self._iterations), tf.int32))
        if not self.shared_noise:
            seed = fold_in(seed, point)
        raw = raw_noise(self.noise, variable.shape, dtype, seed)
        axes = filter_axes(len(variable.shape), self._kind_of(variable))
        return filter_scaled(raw, tf.cast(tensorflow_variable(variable), dtype), axes)

    def _kind_of(self, variable: Any) -> str:
        # `fit` knows the layers; in a custom loop there are only the names that Keras gives.
        kind = self._layers.kinds.get(self._var_key(variable))
        if kind is not None:
            return kind
        path = path_of(variable)
        if path.endswith("embeddings"):
            return "embedding"
        return "depthwise" if "depthwise" in path else "kernel"

    def past_of(self, own: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        """The sub-batch's gradient, or what it differs from the mean."""
        return own - mean if self.noise == "stochastic_noise" else own

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "noise": self.noise,
            "shared_noise": self.shared_noise,
            "noise_seed": self.noise_seed,
            "trust_coefficient": self.trust_coefficient,
        }


@keras.saving.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class ExtrapSGD(ExtrapSGDAlgorithm, ExtrapolatedOptimizer):
    """Extrapolated SGD for Keras 3.

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
    """
