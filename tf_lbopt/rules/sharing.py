"""What all layers of an update share, once for all of them.

A rule is traced for each layer on each replica. A number that is computed, or a constant that is
made, for each of them again takes no time to speak of when it runs, but most of that of tracing.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import tensorflow as tf

from tf_lbopt.rules.norms import scalar


class HasDtype(Protocol):
    """A tensor, a layer."""

    @property
    def dtype(self) -> tf.DType:
        """Of the arithmetic on it."""


def scalars(items: Iterable[HasDtype], value: tf.Tensor | float) -> dict[tf.DType, tf.Tensor]:
    """A number as a tensor of each dtype among the items, layers or tensors."""
    return {dtype: scalar(value, dtype) for dtype in dict.fromkeys(item.dtype for item in items)}


def elementwise(
    function: Callable[..., tf.Tensor], *numbers: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """``[function(a, b, ...) for a, b, ... in zip(*numbers)]``, on one vector for each dtype.

    Args:
        function: Of tensors of one shape, element by element.
        *numbers: Scalars, those of one layer of the same dtype.

    Example:
        >>> sums = elementwise(tf.add, [tf.constant(1.0), tf.constant(2.0)], [tf.constant(5.0)] * 2)
        >>> [float(total) for total in sums]
        [6.0, 7.0]
    """
    of_one = list(zip(*numbers, strict=True))
    results: dict[int, tf.Tensor] = {}
    groups: dict[tf.DType, list[int]] = {}
    for index, (first, *_) in enumerate(of_one):
        groups.setdefault(first.dtype, []).append(index)
    for group in groups.values():
        stacked = [tf.stack(values) for values in zip(*(of_one[i] for i in group), strict=True)]
        results.update(zip(group, tf.unstack(function(*stacked), num=len(group)), strict=True))
    return [results[index] for index in range(len(of_one))]
