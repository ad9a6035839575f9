"""CLARS, and the norms of single examples' gradients that it may be given."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt import _compat, _validation, rules
from tf_lbopt.aggregation.replicas import OfReplica
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.optimizers.base import LargeBatchOptimizer, optimizer
from tf_lbopt.optimizers.declared import REQUIRED
from tf_lbopt.optimizers.trained import Variable, path_of
from tf_lbopt.rules.norms import widest

# Norms on their way to an optimizer, by variable.
_given: OfReplica[dict[str, tf.Tensor]] = OfReplica()


class ExampleNorms(Algorithm):
    """Mix-in of an optimizer whose mean norm can be that over single examples' gradients."""

    norm_estimator: str

    @contextlib.contextmanager
    def example_norms(
        self, norms: Sequence[tf.Tensor], variables: Sequence[Variable]
    ) -> Iterator[None]:
        """Gives the next `apply` in this block the norms that `"per_example"` needs.

        For custom training loops; called by every replica with the norms of its own examples.

        Args:
            norms: For each variable a [batch] vector of the norms ‖∇f_i(w)‖ of its examples'
                gradients (or the mean of such a vector): of the loss itself, not scaled, not
                divided by the batch or the number of replicas. As
                `tf_lbopt.per_example_gradient_norms` returns them.
            variables: The variables, in the same order.

        Raises:
            ValueError: `norm_estimator` is not `"per_example"`, or the lists differ in length.

        Example:
            >>> w = keras.Variable([3.0, 4.0])
            >>> optimizer = CLARS(1.0, trust_coefficient=0.1, norm_estimator="per_example")
            >>> with optimizer.example_norms([tf.constant([5.0, 5.0])], [w]):
            ...     optimizer.apply([keras.ops.convert_to_tensor([0.0, 4.0])], [w])
            >>> [round(float(x), 4) for x in w.numpy()]
            [3.0, 3.24]
        """
        if self.norm_estimator != "per_example":
            raise ValueError(
                "`example_norms` is for CLARS(norm_estimator='per_example'). "
                f"Received: norm_estimator={self.norm_estimator!r}"
            )
        if len(norms) != len(variables):
            raise ValueError(
                "`norms` must have one entry per variable. "
                f"Received: {len(norms)} norms for {len(variables)} variables"
            )
        by_variable = {
            _compat.key_of(variable): _mean(tf.convert_to_tensor(norm))
            for norm, variable in zip(norms, variables, strict=True)
        }
        with _given.left(self, by_variable):
            yield

    def _gradient_norms(
        self, variables: Sequence[Variable], loss_scale: Callable[[], tf.Tensor] | None
    ) -> tf.Tensor | None:
        if self.norm_estimator != "per_example":
            return None
        given = _given.get(self)
        if given is None:
            raise ValueError(
                "CLARS(norm_estimator='per_example') needs the norms of the gradients of single "
                "examples, which a plain training step does not compute. Make the model a "
                "`tf_lbopt.PerExampleNormsModel`, pass them to `optimizer.example_norms(...)` in "
                "a custom loop, or use norm_estimator='sub_batch'. Received: gradients alone"
            )
        missing = [v for v in variables if _compat.key_of(v) not in given]
        if missing:
            raise ValueError(
                "CLARS(norm_estimator='per_example') needs norms for every variable that has a "
                f"gradient. Received: none for {_validation.listed(map(path_of, missing))}"
            )
        # A replica's gradients arrive divided by the number of replicas, multiplied by the scale.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        scale = 1.0 if loss_scale is None else loss_scale()
        own = [given[_compat.key_of(variable)] for variable in variables]
        dtype = widest([norm.dtype for norm in own])
        return tf.stack([tf.cast(n, dtype) for n in own]) * tf.cast(scale / replicas, dtype)


def _mean(norms: tf.Tensor) -> tf.Tensor:
    """The mean, 0 for a replica without examples."""
    return tf.math.divide_no_nan(tf.reduce_sum(norms), tf.cast(tf.size(norms), norms.dtype))


@optimizer("clars")
class CLARS(ExampleNorms, LargeBatchOptimizer):
    """Complete layer-wise adaptive rate scaling, which its paper trains without warm-up.

    Nesterov's momentum with a rate for every layer (trainable variable), like `LARS`, but against
    the mean norm of the gradients of examples or sub-batches instead of the norm of their mean:

        ρ = τ ‖w‖ / N
        γ = η min(ρ, max_trust_ratio)
        s ← β s − γ g,   w ← w + β s − γ g     g = ḡ + λ w

    Early in training the gradients of a large batch cancel, least in the layers whose gradient
    varies most: where ‖ḡ‖ is small against N, LARS takes steps that CLARS does not.

    N is estimated in one of two ways. `"sub_batch"` is the mean of the norms of the sub-batches'
    mean gradients, one for every replica and accumulation micro-step, and needs nothing but
    `compile`; with one sub-batch N = ‖ḡ‖. `"per_example"` is the paper's (1/B) Σ ‖∇f_i(w)‖ over
    the examples of the batch, and comes from `tf_lbopt.PerExampleNormsModel` (or a custom loop
    with `tf_lbopt.per_example_gradient_norms` and `example_norms`). The smaller a sub-batch, the
    nearer is the first to the second. Either is of the gradient of the loss: unclipped, without
    weight decay.

    Decided where the paper is silent: a layer that has no ratio (‖w‖ = 0 or N = 0) has
    ρ = `default_trust_ratio`, to which `max_trust_ratio` applies; an excluded one has
    γ = η `default_trust_ratio`.

    The authors' own code (github.com/slowbull/largebatch) differs from their paper, and from this:
    its momentum is heavy ball, u ← β u + g, w ← w − γ u, with the rate outside of the buffer, so
    that a change of γ acts on past gradients too; it adapts neither biases nor normalization
    scales; its norms are those of mini-batches of 8, taken apart from the gradient; and it bounds
    ρ by 0.1. `nesterov=False` is heavy ball with the rate inside, w ← w + s, as in `LARS`: with
    one sub-batch, without decay and at equal τ it equals `LARS`, and the authors' form where γ is
    constant.

    Args:
        learning_rate: η, the paper's γ_scale. {rate}
        momentum: β in [0, 1). Defaults to 0.9.
        trust_coefficient: τ > 0, the paper's η. Defaults to 0.01.
        norm_estimator: `"sub_batch"` or `"per_example"`. Defaults to `"sub_batch"`.
        max_trust_ratio: Upper bound of ρ, > 0, or `None`; the authors' code has 0.1. Defaults to
            `None`.
        nesterov: Whether to use Nesterov momentum, as the paper's eq. 4 does. Defaults to `True`.
        weight_decay: λ ≥ 0, coupled; no part of N. Defaults to `None`.
        {exclusions} They train at the raw rate η: what `LARS` says of it holds here too, less at
            the larger τ.
        {default_trust_ratio} With τ in its place these too train at η τ.
        {common_arguments}

    Raises:
        {raises}; `norm_estimator="per_example"` and nobody computes these norms.

    Example:
        >>> w = keras.Variable([3.0, 4.0])
        >>> optimizer = CLARS(1.0, trust_coefficient=0.1, gradient_accumulation_steps=2)
        >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, 4.0])], [w])
        >>> optimizer.apply([keras.ops.convert_to_tensor([-3.0, 4.0])], [w])
        >>> [round(float(x), 4) for x in w.numpy()]       # ρ = 0.1 · 5 / 5, ḡ = [0, 4]
        [3.0, 3.24]

    References:
        Huo, Gu, Huang 2021, "Large Batch Optimization for Deep Learning Using New Complete
        Layer-Wise Adaptive Rate Scaling" (AAAI), Algorithm 1, eq. 4 and 5.
    """

    rule_class = rules.CLARS
    arguments: ClassVar = {
        "learning_rate": REQUIRED,
        "momentum": 0.9,
        "trust_coefficient": 0.01,
        "norm_estimator": "sub_batch",
        "max_trust_ratio": None,
        "nesterov": True,
        "weight_decay": None,
        "exclude_from_weight_decay": None,
        "exclude_from_layer_adaptation": None,
        "default_trust_ratio": 1.0,
    }
    former_names: ClassVar = {"eta": "trust_coefficient"}
