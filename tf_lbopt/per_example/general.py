"""Norms one example at a time, for what no rule covers."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.per_example.contributions import Contribution, sums_of_squares
from tf_lbopt.per_example.recording import Use, output_tensors, replaying
from tf_lbopt.rules.norms import compute_dtype
from tf_lbopt.statistics.sparse import merge_repeated_indices


class NotReplayableError(Exception):
    """A layer's call can not be repeated for one example."""


class Replay:
    """A layer call that is repeated for one example after another, with its own gradient.

    The recorded inputs and output gradients take the place of the rest of the model, so an example
    costs one small forward and backward pass through this layer alone.

    Args:
        use: The call.
        gradients: Of its outputs, `None` where they do not reach the loss.
        batch: The batch size, an integer or, where it is known only at run time, `None`.

    Raises:
        NotReplayableError: Its outputs do not have one row per example.
    """

    def __init__(self, use: Use, gradients: Sequence[tf.Tensor | None], batch: int | None):
        self.use = use
        self.failed = False
        self._gradients = gradients
        self._batch = batch
        if use.rows is False:
            raise NotReplayableError
        for tensor, gradient in zip(use.outputs, gradients, strict=True):
            if gradient is not None and not has_rows(tensor, batch):
                raise NotReplayableError

    def __call__(self, example: tf.Tensor, variables: Sequence[keras.Variable]) -> list[Any]:
        """The gradients of one example's loss, for the indices of ``use.reads`` in order.

        Args:
            example: Its number, a scalar.
            variables: All variables of interest.

        Raises:
            NotReplayableError: The call changes state, for example that of a random generator, or
                does not work for a single example; sets ``failed``.
        """
        try:
            return self._gradients_of(example, variables)
        except Exception as error:  # whatever a layer raises when its batch is another one
            self.failed = True
            raise NotReplayableError(str(error)) from error

    def _gradients_of(self, example: tf.Tensor, variables: Sequence[keras.Variable]) -> list[Any]:
        use = self.use
        copies = {i: tf.stop_gradient(tf.identity(read)) for i, read in use.reads.items()}
        args, kwargs = keras.tree.map_structure(
            lambda x: self._row(x, example), (use.args, dict(use.kwargs))
        )
        with tf.GradientTape() as tape:
            for copy in copies.values():
                tape.watch(copy)
            reads = {id(variables[i]): copy for i, copy in copies.items()}
            with _NoUpdates(initialize_variables=False), replaying(use, reads):
                outputs = output_tensors(use.layer(*args, **kwargs))
        if len(outputs) != len(self._gradients):
            raise NotReplayableError
        pairs = [
            (output, self._slice(gradient, example))
            for output, gradient in zip(outputs, self._gradients, strict=True)
            if gradient is not None
        ]
        return tape.gradient(
            [output for output, _ in pairs],
            list(copies.values()),
            output_gradients=[gradient for _, gradient in pairs],
        )

    def _row(self, value: Any, example: tf.Tensor) -> Any:
        if not has_rows(value, self._batch):
            return value
        row = self._slice(value, example)
        mask = _compat.keras_mask(value)
        if mask is not None:
            _compat.attach_mask(row, self._slice(mask, example))
        return row

    @staticmethod
    def _slice(value: tf.Tensor, example: tf.Tensor) -> tf.Tensor:
        return value[example][None]


def has_rows(tensor: Any, batch: int | None) -> bool:
    """Whether the first axis of a tensor is the batch, as far as static shapes tell."""
    if not isinstance(tensor, tf.Tensor) or not tensor.shape.rank:
        return False
    rows = tensor.shape[0]
    return rows is None or rows == batch


class _NoUpdates(keras.StatelessScope):
    """A scope in which no variable can be assigned; losses that layers add are dropped."""

    def add_update(self, update: Any) -> None:
        raise NotReplayableError


def squares_by_replay(
    replays: Sequence[Replay],
    contributions: dict[int, Contribution],
    variables: Sequence[keras.Variable],
    indices: Sequence[int],
    examples: int | tf.Tensor,
) -> tuple[dict[int, tf.Tensor], dict[int, tf.Tensor]]:
    """Squared norms of variables that some calls without a rule read.

    Args:
        replays: Those calls.
        contributions: What other calls, those with a rule, contribute to the same variables.
        variables: All variables of interest.
        indices: Of the variables whose norms are wanted.
        examples: How many examples, from the first.

    Returns:
        For each of them, by index: the squared norms, [examples], and the sum of the gradients.

    Raises:
        NotReplayableError: Some of the calls can not be repeated; they have ``failed`` set.
    """

    def gradients_of(example: tf.Tensor) -> list[tf.Tensor]:
        totals: dict[int, Any] = {}

        def add(index: int, gradient: Any) -> None:
            if gradient is not None:
                gradient = _dense(gradient)
                totals[index] = totals[index] + gradient if index in totals else gradient

        for replay in replays:
            for i, gradient in zip(replay.use.reads, replay(example, variables), strict=True):
                add(i, gradient)
        for i, contribution in contributions.items():
            slices = [tensor[example : example + 1] for tensor in contribution.tensors]
            add(i, contribution.gradients(*slices)[0])
        return [
            totals.get(i, tf.zeros(variables[i].shape, compute_dtype(variables[i].dtype)))
            for i in indices
        ]

    squares, sums = _one_after_another(
        gradients_of,
        [(variables[i].shape, compute_dtype(variables[i].dtype)) for i in indices],
        examples,
    )
    return dict(zip(indices, squares, strict=True)), dict(zip(indices, sums, strict=True))


def squares_by_backward_passes(
    backward: Callable[[tf.Tensor], Sequence[Any]],
    dtypes: Sequence[tf.DType],
    examples: int | tf.Tensor,
) -> list[tf.Tensor]:
    """Squared norms of some variables, from a backward pass through the batch for each example.

    Args:
        backward: From the number of an example to the gradients of its loss; dense, sparse or
            `None`.
        dtypes: In which the squares of these are wanted.
        examples: How many examples, from the first.

    Returns:
        For each gradient the squared norms, [examples].
    """

    def squares_of(example: tf.Tensor) -> list[tf.Tensor]:
        squares = []
        for gradient, dtype in zip(backward(example), dtypes, strict=True):
            if gradient is None:
                squares.append(tf.zeros([], dtype))
                continue
            if isinstance(gradient, tf.IndexedSlices):
                gradient = merge_repeated_indices(gradient).values
            squares.append(tf.reduce_sum(tf.square(tf.cast(gradient, dtype))))
        return squares

    arrays = [_array(examples, dtype) for dtype in dtypes]

    def body(example: tf.Tensor, *written: tf.TensorArray) -> Any:
        squares = squares_of(example)
        return example + 1, *(
            array.write(example, square) for array, square in zip(written, squares, strict=True)
        )

    _, *arrays = tf.while_loop(
        lambda example, *_: example < examples,
        body,
        (tf.constant(0), *arrays),
        parallel_iterations=1,
    )
    return [array.stack() for array in arrays]


def _one_after_another(
    gradients_of: Callable[[tf.Tensor], Sequence[tf.Tensor]],
    shapes: Sequence[tuple[tf.TensorShape, tf.DType]],
    examples: int | tf.Tensor,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    count = len(shapes)
    arrays = [_array(examples, dtype) for _, dtype in shapes]
    sums = [tf.zeros(shape, dtype) for shape, dtype in shapes]

    def body(example: tf.Tensor, *state: Any) -> Any:
        arrays, sums = state[:count], state[count:]
        gradients = gradients_of(example)
        return (
            example + 1,
            *(
                array.write(example, sums_of_squares(gradient[None])[0])
                for array, gradient in zip(arrays, gradients, strict=True)
            ),
            *(total + gradient for total, gradient in zip(sums, gradients, strict=True)),
        )

    _, *state = tf.while_loop(
        lambda example, *_: example < examples,
        body,
        (tf.constant(0), *arrays, *sums),
        parallel_iterations=1,
    )
    return [array.stack() for array in state[:count]], state[count:]


def _array(size: int | tf.Tensor, dtype: tf.DType) -> tf.TensorArray:
    return tf.TensorArray(dtype, size=size, element_shape=[])


def _dense(gradient: Any) -> tf.Tensor:
    gradient = tf.convert_to_tensor(gradient)
    return tf.cast(gradient, compute_dtype(gradient.dtype))
