"""VRGD's weighting r along a training run, whatever optimizer makes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt.rules.gsnr import SubBatchStatistics, clipped_gsnr


def measure_ratio(task: Any, batch_size: int, sub_batches: int, gamma: float = 0.1) -> Any:
    """Makes a task's evaluations of the training images tell how small r is.

    r is that of one batch of training images at the weights of the evaluation, the same batch
    every time: its mean over all elements of all trainable variables, ``mean_ratio``.

    Args:
        task: An `official_recipes.cifar.task.ImageTask` that evaluates on training images; it is
            changed.
        batch_size: Of the batch.
        sub_batches: k.
        gamma: γ.

    Returns:
        The task.
    """
    evaluate = task.evaluate

    @functools.cache
    def ratio_of(model: keras.Model) -> Callable[[], tf.Tensor]:
        return _mean_ratio(task, model, batch_size, sub_batches, gamma)

    def with_ratio(model: keras.Model, split: str, *, final: bool) -> dict[str, float]:
        metrics = evaluate(model, split, final=final)
        if split == "train":
            metrics["mean_ratio"] = float(ratio_of(model)())
        return metrics

    task.evaluate = with_ratio
    return task


def _mean_ratio(
    task: Any, model: keras.Model, batch_size: int, sub_batches: int, gamma: float
) -> Callable[[], tf.Tensor]:
    """Returns what measures it at the weights of the moment."""
    loss = task.loss()
    size = batch_size // sub_batches

    @tf.function
    def gradients(part: tf.Tensor) -> list[tf.Tensor]:
        indices = part * size + tf.range(size, dtype=tf.int64)
        images, labels = task.batch(indices, tf.stack([0, part]))
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        return tape.gradient(value, model.trainable_variables)

    def measure() -> tf.Tensor:
        of_parts = [gradients(tf.constant(part, tf.int64)) for part in range(sub_batches)]
        of_variables = [tf.stack(parts) for parts in zip(*of_parts, strict=True)]
        means = [tf.reduce_mean(parts, 0) for parts in of_variables]
        deviations = [
            tf.reduce_sum(tf.square(parts - mean), 0)
            for parts, mean in zip(of_variables, means, strict=True)
        ]
        live = tf.constant(float(sub_batches))
        statistics = SubBatchStatistics(means, deviations, live, tf.constant(1.0))
        ratios = clipped_gsnr(statistics, gamma)
        return tf.reduce_mean(tf.concat([tf.reshape(ratio, [-1]) for ratio in ratios], 0))

    return measure
