"""Going through a batch in parts, so that only so many examples' gradients exist at a time."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from tf_lbopt.per_example.contributions import Contribution, batch_size

BUDGET = 1 << 22
"""How many numbers may be held for the examples of one part: 16 MiB of float32."""


def squares_and_sum(
    contribution: Contribution, shape: tf.TensorShape, examples: int | None = None
) -> list[tf.Tensor]:
    """Squared norms of per-example gradients, and the sum of the gradients where it is at hand.

    Args:
        contribution: All that the batch contributes to one variable.
        shape: Of the variable.
        examples: Norms of only so many examples, from the first; `None` means of all. The sum is
            then not at hand.

    Returns:
        The squared norms, [examples], and, if it is at hand, the sum, [*shape].
    """
    tensors = contribution.tensors
    if examples is not None:
        tensors = tf.nest.map_structure(lambda tensor: tensor[:examples], tensors)
    with_sum = examples is None and contribution.materializes

    def part(rows: Callable[[tf.Tensor], tf.Tensor]) -> Sequence[tf.Tensor]:
        slices = tf.nest.map_structure(rows, tensors)
        if with_sum:
            return contribution.squared_norms_and_sum(*slices)
        return [contribution.squared_norms(*slices)]

    most = max(1, BUDGET // max(1, contribution.numbers(with_sum)))
    flat = tf.nest.flatten(tensors)
    size = batch_size(flat[0])
    if isinstance(size, int):
        if size <= most:
            return list(part(lambda tensor: tensor))
        most = -(-size // -(-size // most))  # as even as can be
    whole = size // most

    def body(i: tf.Tensor, squares: tf.TensorArray, *total: tf.Tensor) -> Sequence[tf.Tensor]:
        def rows(tensor: tf.Tensor) -> tf.Tensor:
            # XLA knows the size of this, not that of tensor[i * most : (i + 1) * most].
            others = tensor.shape.rank - 1
            own = tf.slice(tensor, [i * most, *[0] * others], [most, *[-1] * others])
            return tf.ensure_shape(own, [most, *tensor.shape[1:]])

        own, *summed = part(rows)
        return i + 1, squares.write(i, own), *map(tf.add, total, summed)

    dtype = tf.float64 if any(tensor.dtype == tf.float64 for tensor in flat) else tf.float32
    squares = tf.TensorArray(dtype, size=whole, element_shape=[most])
    total = [tf.zeros(shape, dtype)] if with_sum else []
    _, squares, *total = tf.while_loop(
        lambda i, *_: i < whole, body, (tf.constant(0), squares, *total), parallel_iterations=1
    )
    pieces = [tf.reshape(squares.stack(), [-1])]
    if not isinstance(size, int) or size % most:
        own, *summed = part(lambda tensor: tensor[whole * most :])
        pieces.append(own)
        total = [*map(tf.add, total, summed)]
    return [tf.concat(pieces, axis=0), *total]
