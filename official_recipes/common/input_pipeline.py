"""What the recipes' tf.data pipelines have in common."""

from __future__ import annotations

import tensorflow as tf


def without_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the dataset without tf.data's tuning of buffers and parallel calls at run time.

    The thread that tunes sleeps for longer and longer, and an iterator that is destroyed may have
    to wait until it wakes (seen with TensorFlow 2.20: runs of 13 s that ended after 21 s).
    Batches that are gathered from memory leave nothing to tune.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
