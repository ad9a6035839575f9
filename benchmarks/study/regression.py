"""Linear regression of the VRGD paper's section 7.2, with the package's own GSNR.

The true weights are 1 to 10, the first estimate is zero, the labels are y = W x (and noise, if
asked for). Every update sees new inputs; its batch is cut into k sub-batches.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_lbopt.rules.gsnr import SubBatchStatistics, clipped_gsnr

TRUE_WEIGHTS = tuple(float(i) for i in range(1, 11))
INPUTS = ("normal", "uniform")
_TEST_EXAMPLES = 10_000
_KEPT = 25
"""The most values that are kept of a curve, but for the first."""


class Curves(NamedTuple):
    """What a run was, update by update.

    Attributes:
        test_loss: [steps + 1] mean squared error without label noise.
        weights: [steps + 1, 10].
        ratios: [steps, 10] r, which multiplies the mean gradient; 1 with plain SGD.
    """

    test_loss: np.ndarray
    weights: np.ndarray
    ratios: np.ndarray


_DRAW = {"normal": tf.random.stateless_normal, "uniform": tf.random.stateless_uniform}


@functools.cache
def _updates(
    inputs: str, sub_batches: int, batch_size: int, steps: int, reduced: bool
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """All updates of a run in one graph, a function of seed, rate, label noise and γ."""
    shape = [sub_batches, batch_size // sub_batches, len(TRUE_WEIGHTS)]
    true = tf.constant(TRUE_WEIGHTS)
    draw = _DRAW[inputs]

    @tf.function
    def run(
        seed: tf.Tensor, rate: tf.Tensor, noise: tf.Tensor, gamma: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        weights = tf.TensorArray(tf.float32, steps + 1, element_shape=true.shape)
        ratios = tf.TensorArray(tf.float32, steps, element_shape=true.shape)
        w = tf.zeros_like(true)
        weights = weights.write(0, w)
        for step in tf.range(steps):
            x = draw(shape, tf.stack([seed, step]))
            error = tf.linalg.matvec(x, w - true)
            error -= noise * tf.random.stateless_normal(shape[:2], tf.stack([seed, steps + step]))
            # Of the mean squared error: [k, 10].
            gradients = 2.0 / shape[1] * tf.linalg.matvec(x, error, transpose_a=True)
            mean = tf.reduce_mean(gradients, 0)
            r = tf.ones_like(mean)
            if reduced:
                deviations = tf.reduce_sum(tf.square(gradients - mean), 0)
                live = tf.constant(float(sub_batches))
                statistics = SubBatchStatistics([mean], [deviations], live, tf.constant(1.0))
                (r,) = clipped_gsnr(statistics, gamma)
            w -= rate * r * mean
            weights = weights.write(step + 1, w)
            ratios = ratios.write(step, r)
        return weights.stack(), ratios.stack()

    return run


def optimize(settings: Mapping[str, Any]) -> Curves:
    """Takes the steps of SGD or VR-SGD.

    Args:
        settings: ``inputs`` (of `INPUTS`), ``noise`` (standard deviation of the labels' noise),
            ``optimizer`` (``sgd`` or ``vr_sgd``), ``learning_rate``, ``batch_size``,
            ``sub_batches`` (k), ``gamma``, ``steps`` and ``seed``.
    """
    steps, seed = int(settings["steps"]), int(settings["seed"])
    draw = _DRAW[settings["inputs"]]
    run = _updates(
        settings["inputs"],
        int(settings["sub_batches"]),
        int(settings["batch_size"]),
        steps,
        settings["optimizer"] == "vr_sgd",
    )
    numbers = [tf.constant(float(settings[n])) for n in ("learning_rate", "noise", "gamma")]
    weights, ratios = (
        tensor.numpy().astype(np.float64) for tensor in run(tf.constant(seed), *numbers)
    )
    test = draw([_TEST_EXAMPLES, len(TRUE_WEIGHTS)], [seed + 10_000, 0]).numpy().astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        loss = np.mean(np.square((weights - np.array(TRUE_WEIGHTS)) @ test.T), axis=1)
    return Curves(loss, weights, ratios)


class RegressionRunner:
    """Makes the runs of a study of this task; it has no data to read."""

    def load(self, progress: Callable[[int, int], None]) -> str:
        """Nothing is read; returns the task's name."""
        progress(1, 1)
        return "linear regression"

    def train(self, flags: Mapping[str, Any], on_update: Callable[[int, int], None]) -> dict:
        """Trains once.

        Args:
            flags: Of `optimize`, and ``validation_size``: whether other inputs than those of the
                final runs are drawn, and ``curve``: whether a final run's row tells loss, weights
                and ratios on the way.
            on_update: Called once, at the end.

        Returns:
            The result's fields. The metric is log10 of the test loss.
        """
        started = time.perf_counter()
        tuning = bool(flags["validation_size"])
        curves = optimize({**flags, "seed": int(flags["seed"]) + (1000 if tuning else 0)})
        steps = int(flags["steps"])
        on_update(steps, steps)
        loss = curves.test_loss
        diverged = not np.isfinite(loss).all() or bool(loss[-1] > loss[0])
        score = None if diverged else round(math.log10(max(loss[-1], 1e-30)), 5)
        result = {
            "task": "regression",
            "diverged": diverged,
            "final": {"validation_log10_loss" if tuning else "test_log10_loss": score},
            "seconds": round(time.perf_counter() - started, 2),
            "versions": {"tensorflow": tf.__version__},
        }
        if flags.get("curve") and not tuning and not diverged:
            kept = list(range(0, steps + 1, max(1, steps // _KEPT)))
            result["curve"] = {
                "steps": kept,
                "test_loss": [float(f"{loss[i]:.4g}") for i in kept],
            }
            if flags["seed"] == 1:
                result["curve"]["weights"] = _rounded(curves.weights, kept)
                result["curve"]["ratios"] = _rounded(curves.ratios, [i for i in kept if i < steps])
        return result


def _rounded(rows: np.ndarray, kept: list[int]) -> list[list[float]]:
    return [[round(float(value), 3) for value in rows[index]] for index in kept]
