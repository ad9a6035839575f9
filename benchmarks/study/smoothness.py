"""Smoothness and noise of a network's loss: estimators, and how a run of a study takes them.

The estimators are functions of gradients alone. f is the loss of the same training images every
time, shifted and mirrored as in training where the run does so, without weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from official_recipes.common.files import plain
from tf_lbopt.rules.noise_scale import unbiased_estimates

Vector = np.ndarray
IMAGES = 1024
"""Of f."""
_PARTS = 32
"""Into so many f is cut for σ."""
_ITERATIONS = 20
_STEPS, _LENGTH = 8, 0.3


def largest_eigenvalue(
    product: Callable[[Vector], Vector], size: int, iterations: int = _ITERATIONS
) -> float:
    """The largest absolute eigenvalue of a symmetric matrix, by power iteration.

    Args:
        product: Multiplies the matrix with a vector.
        size: Of the vector.
        iterations: How many products are taken. The result rises with them to its limit.

    Example:
        >>> matrix = np.diag([1.0, -4.0, 2.0])
        >>> round(largest_eigenvalue(lambda v: matrix @ v, 3), 3)
        4.0
    """
    vector = np.random.default_rng(0).standard_normal(size)
    for _ in range(iterations):
        vector = product(vector / np.linalg.norm(vector))
        if not np.any(vector):
            return 0.0
    return float(np.linalg.norm(vector))


def noise(gradients: Sequence[Vector], examples: int) -> float:
    """σ: the standard deviation of one example's gradient, its root mean squared distance.

    Args:
        gradients: The mean gradients of at least two sub-batches.
        examples: Of each sub-batch.

    References:
        Zhao et al., SNGM (arXiv:2007.13985), Assumption 1; by the estimate of
        `tf_lbopt.rules.noise_scale.unbiased_estimates`.

    Example:
        >>> round(noise([np.array([1.0, 0.0]), np.array([-1.0, 0.0])], examples=2), 3)
        2.0
    """
    of_sub_batches = np.asarray(gradients, np.float64)
    squares = np.mean(np.sum(np.square(of_sub_batches), axis=1))
    of_mean = np.sum(np.square(np.mean(of_sub_batches, axis=0)))
    variance, _ = unbiased_estimates(squares, of_mean, float(len(of_sub_batches)))
    return math.sqrt(examples * max(float(variance), 0.0))


def smoothness_along(gradient: Callable[[Vector], Vector], point: Vector, update: Vector) -> float:
    """The largest ``‖∇f(x) − ∇f(y)‖ / ‖x − y‖`` over 8 points y along an update.

    Args:
        gradient: ∇f.
        point: x, the weights before the update.
        update: The points are 0.3, 0.6, ..., 2.4 times it away.

    Returns:
        The value; NaN for an update of length 0.

    References:
        Lin et al. 2020, "Extrapolation for Large-batch Training in Deep Learning", Figure 2b and
        Assumption 3.

    Example:
        >>> x, u = np.array([1.0, 1.0]), np.array([0.0, 0.5])
        >>> round(smoothness_along(lambda x: np.array([1.0, 3.0]) * x, x, u), 3)
        3.0
    """
    length = np.linalg.norm(update)
    if length == 0:
        return math.nan
    at_point = gradient(point)
    distances = [_LENGTH * step for step in range(1, _STEPS + 1)]
    return max(
        float(np.linalg.norm(gradient(point + part * update) - at_point) / (part * length))
        for part in distances
    )


def msgd_limits(gradient_budget: float, smoothness: float, momentum: float) -> tuple[float, float]:
    """Momentum SGD's limits of the batch: that of its rate, and that of its complexity.

    ``η ≤ (1 − β)² / ((1 + β) L)`` with ``η = B / √C`` makes ``B ≤ √C (1 − β)² / ((1 + β) L)``; the
    second term of eq. 5 makes ``B ≤ C^(1/4)``.

    Args:
        gradient_budget: C.
        smoothness: L.
        momentum: β.

    References:
        Zhao et al., SNGM (arXiv:2007.13985), eq. 4 to 6.

    Example:
        >>> msgd_limits(1e8, 0.5, momentum=0.5)
        (3333.3333333333335, 100.0)
    """
    return math.sqrt(gradient_budget) * largest_msgd_rate(smoothness, momentum), (
        gradient_budget**0.25
    )


def largest_msgd_rate(smoothness: float, momentum: float) -> float:
    """``(1 − β)² / ((1 + β) L)``, up to which eq. 4 of the SNGM paper holds.

    Args:
        smoothness: L.
        momentum: β.
    """
    return (1 - momentum) ** 2 / ((1 + momentum) * smoothness)


class Objective:
    """f as a function of a model's weights, all of them as one vector.

    Args:
        task: An `official_recipes.cifar.task.ImageTask`.
        model: Whose weights are read; they are as before after every call.
        images: How many, of f.
    """

    def __init__(self, task: Any, model: keras.Model, images: int = IMAGES) -> None:
        self._variables = list(model.trainable_variables)
        self._shapes = [tuple(variable.shape) for variable in self._variables]
        indices = tf.range(images, dtype=tf.int64)
        self._examples = task.batch(indices, tf.constant([0, 0], tf.int64))
        loss = task.loss()

        def value(inputs: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            return loss(labels, model(inputs, training=True))

        @tf.function(reduce_retracing=True)
        def gradient(inputs: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
            with tf.GradientTape() as tape:
                at = value(inputs, labels)
            return at, tape.gradient(at, self._variables)

        @tf.function
        def product(inputs: tf.Tensor, labels: tf.Tensor, vector: list[tf.Tensor]) -> Any:
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    at = value(inputs, labels)
                gradients = inner.gradient(at, self._variables)
                along = tf.add_n(
                    [tf.reduce_sum(g * v) for g, v in zip(gradients, vector, strict=True)]
                )
            return outer.gradient(along, self._variables)

        self._gradient, self._product = gradient, product

    @property
    def weights(self) -> Vector:
        """Those of now."""
        return _flat([variable.numpy() for variable in self._variables])

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(math.prod(shape) for shape in self._shapes)

    def value_and_gradient(self) -> tuple[float, Vector]:
        """The value f and its gradient at the weights of now."""
        value, gradients = self._gradient(*self._examples)
        return float(value), _flat([tf.convert_to_tensor(g).numpy() for g in gradients])

    def gradient_at(self, weights: Vector) -> Vector:
        """∇f at other weights."""
        before = [variable.numpy() for variable in self._variables]
        try:
            self._assign(self._split(weights))
            return self.value_and_gradient()[1]
        finally:
            self._assign(before)

    def hessian_product(self, vector: Vector) -> Vector:
        """∇²f times a vector, at the weights of now."""
        parts = [tf.constant(part, tf.float32) for part in self._split(vector)]
        return _flat([part.numpy() for part in self._product(*self._examples, parts)])

    def gradients_of_parts(self, parts: int = _PARTS) -> list[Vector]:
        """∇f of sub-batches of one size."""
        size = len(self._examples[0]) // parts
        found = []
        for first in range(0, parts * size, size):
            some = [each[first : first + size] for each in self._examples]
            found.append(_flat([g.numpy() for g in self._gradient(*some)[1]]))
        return found

    def _assign(self, values: Sequence[np.ndarray]) -> None:
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(value)

    def _split(self, vector: Vector) -> list[np.ndarray]:
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])[:-1]
        return [
            part.reshape(shape)
            for part, shape in zip(np.split(vector, ends), self._shapes, strict=True)
        ]


def _flat(parts: Sequence[np.ndarray]) -> Vector:
    return np.concatenate([np.ravel(part).astype(np.float64) for part in parts])


class Watch:
    """Measures in a run of the image recipe, between its updates.

    Args:
        settings: ``smoothness_every``: updates from one `smoothness_along` to the next;
            ``constants_at``: the parts of the run at which L, σ and f are estimated, as
            ``"0,0.5,1"``. Either or none.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._every = int(settings.get("smoothness_every", 0))
        parts = str(settings.get("constants_at", ""))
        self._parts = [float(part) for part in parts.split(",") if part]
        self._objective: Objective | None = None
        self._before: Vector | None = None
        self._smoothness: dict[str, list[float]] = {"updates": [], "values": []}
        self._constants: list[dict[str, float]] = []

    def on(self, task: Any) -> Any:
        """Makes a task show its model; returns the task."""
        build_model = task.build_model

        def build() -> keras.Model:
            model = build_model()
            if self._every or self._parts:
                self._objective = Objective(task, model)
                self._take_constants(0, 1)
                self._keep_weights(0)
            return model

        task.build_model = build
        return task

    def after_update(self, done: int, total: int) -> None:
        """To be called after every update of the run."""
        if self._objective is None:
            return
        self._take_constants(done, total)
        if self._before is not None:
            before, now = self._before, self._objective.weights
            value = smoothness_along(self._objective.gradient_at, before, now - before)
            self._smoothness["updates"].append(done)
            self._smoothness["values"].append(_rounded(value))
        self._keep_weights(done)

    def _keep_weights(self, done: int) -> None:
        """Those before the next update, if that is one to measure."""
        assert self._objective is not None
        measured = self._every and (done + 1) % self._every == 0
        self._before = self._objective.weights if measured else None

    def _take_constants(self, done: int, total: int) -> None:
        if done not in [round(part * total) for part in self._parts]:
            return
        assert self._objective is not None
        objective = self._objective
        value, gradient = objective.value_and_gradient()
        self._constants.append(
            {
                "part": done / total,
                "smoothness": _rounded(
                    largest_eigenvalue(objective.hessian_product, objective.size)
                ),
                "noise": _rounded(noise(objective.gradients_of_parts(), IMAGES // _PARTS)),
                "gradient_norm": _rounded(float(np.linalg.norm(gradient))),
                "loss": _rounded(value),
            }
        )

    def fields(self) -> dict[str, Any]:
        """What was measured, for the row of the table."""
        found: dict[str, Any] = {}
        if self._smoothness["updates"]:
            found["smoothness"] = self._smoothness
        if self._constants:
            found["constants"] = self._constants
        return plain(found)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
