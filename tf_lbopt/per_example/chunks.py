"""Going through a batch in parts, so that only so many examples' gradients exist at a time."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import tensorflow as tf

from tf_lbopt.per_example.contributions import Contribution, batch_size
from tf_lbopt.rules.norms import compute_dtype

BUDGET = 1 << 22
"""How many numbers may be held for the examples of one part: 16 MiB of float32."""

_Part: TypeAlias = Callable[[Sequence[tf.Tensor]], tuple[tf.Tensor, tf.Tensor | None]]


def squares_and_sum(
    contribution: Contribution,
    variable_shape: tf.TensorShape,
    examples: int | None = None,
    with_sum: bool = True,
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Squared norms of per-example gradients, and the sum of the gradients where it is at hand.

    Args:
        contribution: All that the batch contributes to one variable.
        variable_shape: The variable's.
        examples: Norms of only so many examples, from the first; `None` means of all. The sum is
            then not at hand.
        with_sum: Whether the sum is wanted.

    Returns:
        The squared norms, [examples], and the sum, [*variable_shape], or `None`.
    """
    tensors = contribution.tensors
    if examples is not None:
        tensors = tuple(tensor[:examples] for tensor in tensors)
    with_sum = with_sum and examples is None and contribution.materializes

    def part(slices: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor | None]:
        if not with_sum:
            return contribution.squared_norms(*slices), None
        return contribution.squared_norms_and_sum(*slices)

    most = max(1, BUDGET // max(1, contribution.workspace(with_sum)))
    size = batch_size(tensors[0])
    if isinstance(size, int):
        if size <= most:
            return part(tensors)
        parts = -(-size // most)
        most = -(-size // parts)  # as even as can be
    dtype = max((compute_dtype(t.dtype) for t in tensors if t.dtype.is_floating), key=_width)
    return _in_parts(part, tensors, size, most, variable_shape if with_sum else None, dtype)


def _in_parts(
    part: _Part,
    tensors: Sequence[tf.Tensor],
    size: int | tf.Tensor,
    most: int,
    shape: tf.TensorShape | None,
    dtype: tf.DType,
) -> tuple[tf.Tensor, tf.Tensor | None]:
    whole = size // most
    squares = tf.TensorArray(dtype, size=whole, element_shape=[most])
    total = tf.zeros([] if shape is None else shape, dtype)

    def body(i: tf.Tensor, squares: tf.TensorArray, total: tf.Tensor) -> tuple:
        slices = []
        for tensor in tensors:
            piece = tensor[i * most : (i + 1) * most]
            slices.append(tf.ensure_shape(piece, [most, *tensor.shape[1:]]))
        own, summed = part(slices)
        return i + 1, squares.write(i, own), total if summed is None else total + summed

    _, squares, total = tf.while_loop(
        lambda i, *_: i < whole, body, (tf.constant(0), squares, total), parallel_iterations=1
    )
    pieces = [tf.reshape(squares.stack(), [-1])]
    if not isinstance(size, int) or size % most:
        own, summed = part([tensor[whole * most :] for tensor in tensors])
        pieces.append(own)
        total = total if summed is None else total + summed
    return tf.concat(pieces, axis=0), None if shape is None else total


def _width(dtype: tf.DType) -> int:
    return dtype.size
