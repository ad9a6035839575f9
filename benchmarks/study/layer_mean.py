"""VRGD's layer mean over all elements, in the place of the resolved ones, for the DLRM recipe.

Entry point of ``python -m benchmarks.study.layer_mean``, which takes the flags of
``python -m official_recipes.dlrm.train``. The package has no such option; the paper leaves open
what is in the mean where an element has no variance.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from unittest import mock

import tensorflow as tf

from official_recipes.common.tfm_training import run_program
from tf_lbopt.rules import gsnr


def ratios_by_the_mean_of_all(statistics: gsnr.SubBatchStatistics, gamma: float) -> list[tf.Tensor]:
    """`tf_lbopt.rules.gsnr.clipped_gsnr`, but that the sum of ``ḡ²/σ²`` is divided by J.

    J counts all elements of a layer: those of rows of a table that nobody looked up too, and those
    without a gradient, whose ratio is 0. Elements on which all sub-batches agree add nothing to the
    sum, as there.

    Args:
        statistics: Of all variables.
        gamma: γ in (0, 1].

    Returns:
        For each variable r, of the shape of its ``deviations``.
    """
    limit, lowest = statistics.resolved_below, statistics.lowest(gamma)
    found = []
    for gradient, ratio in zip(statistics.means, statistics.ratios(), strict=True):
        sparse = isinstance(gradient, tf.IndexedSlices)
        shape = gradient.dense_shape if sparse else tf.shape(gradient)
        number = tf.cast(tf.reduce_prod(tf.cast(shape, tf.int64)), ratio.dtype)
        most, low = (tf.cast(each, ratio.dtype) for each in (limit, lowest))
        resolved = tf.where(ratio < most, ratio, 0.0)  # NaN is not
        mean = tf.reduce_sum(resolved) / number
        # Of a layer without a resolved element, whose live ones have r = 1.
        normalized = ratio / tf.where(mean > 0, mean, most)
        # As a comparison, so that NaN (dead elements) ends at γ.
        found.append(tf.where(normalized > low, tf.minimum(normalized, 1.0), low))
    return found


def main(argv: Sequence[str]) -> int:
    """Trains DLRM; returns the exit code."""
    from official_recipes.dlrm import train
    from tf_lbopt.rules import vrgd

    with mock.patch.object(vrgd, "clipped_gsnr", ratios_by_the_mean_of_all):
        return train.main(argv)


if __name__ == "__main__":
    run_program(main, sys.argv)
