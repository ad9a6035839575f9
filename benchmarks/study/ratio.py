"""VRGD's weighting r along a training run, whatever optimizer makes it."""

from __future__ import annotations

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

    def with_ratio(model: keras.Model, split: str, *, final: bool) -> dict[str, float]:
        metrics = evaluate(model, split, final=final)
        if split == "train":
            metrics |= _ratios(task, model, batch_size, sub_batches, gamma)
        return metrics

    task.evaluate = with_ratio
    return task


def _ratios(
    task: Any, model: keras.Model, batch_size: int, sub_batches: int, gamma: float
) -> dict[str, float]:
    loss = task.loss()
    size = batch_size // sub_batches
    gradients: list[list[tf.Tensor]] = []
    for part in range(sub_batches):
        indices = tf.range(part * size, (part + 1) * size, dtype=tf.int64)
        images, labels = task.batch(indices, tf.constant([0, part], tf.int64))
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        gradients.append(tape.gradient(value, model.trainable_variables))
    of_variables = [tf.stack(parts) for parts in zip(*gradients, strict=True)]
    means = [tf.reduce_mean(parts, 0) for parts in of_variables]
    deviations = [
        tf.reduce_sum(tf.square(parts - mean), 0)
        for parts, mean in zip(of_variables, means, strict=True)
    ]
    live = tf.constant(float(sub_batches))
    ratios = clipped_gsnr(SubBatchStatistics(means, deviations, live, tf.constant(1.0)), gamma)
    r = tf.concat([tf.reshape(ratio, [-1]) for ratio in ratios], 0)
    return {"mean_ratio": float(tf.reduce_mean(r))}
