"""Taking a replica's batch in parts."""

from typing import TypeVar

import tensorflow as tf

_Structure = TypeVar("_Structure")


def split(data: _Structure, number: int, argument: str) -> list[_Structure]:
    """Equal parts of a replica's batch, in order.

    Args:
        data: A structure of tensors, ragged ones among them; ``None`` and scalars are in each part.
        number: How many parts.
        argument: What was given ``number``, for errors.

    Returns:
        The parts, of one structure with ``data``.

    Raises:
        ValueError: The number of examples is no multiple of ``number``; where it is known when
            the step runs only, it is ``tf.errors.InvalidArgumentError`` then.
    """
    if number == 1:
        return [data]

    def cut(tensor: tf.Tensor | tf.RaggedTensor | None) -> list[tf.Tensor | tf.RaggedTensor | None]:
        if tensor is None or tensor.shape.rank == 0:
            return [tensor] * number
        size = tensor.shape[0]
        if size is None:
            size = tensor.nrows() if isinstance(tensor, tf.RaggedTensor) else tf.shape(tensor)[0]
            rest = size % number
            check = tf.debugging.assert_equal(rest, tf.zeros_like(rest), message("other examples"))
            with tf.control_dependencies([] if check is None else [check]):
                size = tf.identity(size)
            if isinstance(tensor, tf.Tensor):
                # XLA, which makes no assertions, can not compile this if there is a rest.
                whole = tf.concat([[size - rest], tf.shape(tensor)[1:]], 0)
                tensor = tf.reshape(tensor, whole, name="batch_must_be_a_multiple_of_parts")
        elif size % number:
            raise ValueError(message(f"{size} examples"))
        length = size // number
        return [tensor[i * length : (i + 1) * length] for i in range(number)]

    def message(received: str) -> str:
        return (
            f"{argument}={number} needs batches of a multiple of {number} examples on every "
            f"replica: choose the batch size so, and drop the remainder. Received: {received}"
        )

    pieces = [cut(tensor) for tensor in tf.nest.flatten(data)]
    return [tf.nest.pack_sequence_as(data, [piece[i] for piece in pieces]) for i in range(number)]
