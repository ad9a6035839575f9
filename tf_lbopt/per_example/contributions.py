"""What one use of a variable adds to the gradient of each example, without writing all of it down.

The batch is the first axis of everything here. Arithmetic is done in float32 or wider.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import keras
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.norms import compute_dtype

BUDGET = 1 << 22
"""How many numbers may be held for the examples of one part: 16 MiB of float32."""


class Contribution:
    """The gradients that one use of a variable contributes, one per example.

    Args:
        tensors: What they are computed from, or structures of such tensors, the batch first.
        function: Takes slices of them; returns [examples, *shape of the variable].
        numbers: How many numbers it makes per example.

    Attributes:
        tensors: As given. The methods take slices of these.
        written: How many numbers are made per example of gradients that are written down.
        numbers: How many are made per example of the norms alone.
        materializes: Whether the norms are had by writing the gradients down, so that their sum
            over the batch costs little more.
    """

    materializes = True

    def __init__(
        self, tensors: Iterable[tf.Tensor], function: Callable[..., tf.Tensor], numbers: int
    ):
        self.tensors = tuple(tensors)
        self._function = function
        self.written = self.numbers = numbers

    def gradients(self, *tensors: tf.Tensor) -> tf.Tensor:
        """The gradients of some examples, [examples, *shape of the variable]."""
        return wide(self._function(*tensors))

    def squared_norms(self, *tensors: tf.Tensor, with_sum: bool = False) -> list[tf.Tensor]:
        """Their squared norms, [examples], in the cheapest way; and the sum of the gradients."""
        gradients = self.gradients(*tensors)
        squares = [sums_of_squares(gradients)]
        return [*squares, tf.reduce_sum(gradients, axis=0)] if with_sum else squares

    def plus(self, others: Sequence["Contribution"]) -> "Contribution":
        """What several uses of one variable contribute: norms of sums are no sums of norms."""
        parts = (self, *others)
        return Contribution(
            [part.tensors for part in parts],
            lambda *slices: tf.add_n(
                [part.gradients(*own) for part, own in zip(parts, slices, strict=True)]
            ),
            sum(part.written for part in parts),
        )


class OuterProducts(Contribution):
    """Gradients that are sums over positions of outer products, as of all layers that multiply.

    With factors ``l`` [batch, groups, positions, rows] and ``r`` [batch, groups, positions,
    columns] the gradient of example i is ``l[i, g]ᵀ r[i, g]``, one matrix per group. Its squared
    norm is ``Σ_g Σ_{s,t} (l_s · l_t) (r_s · r_t)``, which takes positions² (rows + columns)
    operations where the matrix takes positions · rows · columns: the cheaper one is taken.

    Args:
        tensors: What the factors are made of, batch first.
        factors: Takes slices of them, returns both factors.
        arrange: Makes [examples, *shape of the variable] of [examples, groups, rows, columns].
        groups: As above; these are static sizes.
        positions: As above, `None` if it is known only at run time.
        rows: As above.
        columns: As above.
        made: How many numbers per example ``factors`` creates. Defaults to 0.
    """

    def __init__(
        self,
        tensors: Iterable[tf.Tensor],
        factors: Callable[..., Sequence[tf.Tensor]],
        arrange: Callable[[tf.Tensor], tf.Tensor],
        *,
        groups: int,
        positions: int | None,
        rows: int,
        columns: int,
        made: int = 0,
    ):
        super().__init__(tensors, lambda *own: self._arranged(self._products(*own)), made)
        self._factors, self._arrange, self._made = factors, arrange, made
        self._positions = positions
        self._sizes = {"groups": groups, "rows": rows, "columns": columns}
        self._transposed = columns < rows
        # The matrix also gives the sum over the batch, which the Gram form leaves to a pass of its
        # own, as costly as the matrices.
        self.materializes = positions is None or (
            2 * positions * (rows + columns) > rows * columns and positions > 1
        )
        self.written = made + groups * rows * columns
        grams = made + 2 * groups * (positions or 1) ** 2
        self.numbers = self.written if self.materializes else grams

    def squared_norms(self, *tensors: tf.Tensor, with_sum: bool = False) -> list[tf.Tensor]:
        """In Gram form where that is cheaper."""
        if self.materializes:
            products = self._products(*tensors)
            squares = [sums_of_squares(products)]
            if with_sum:
                total = tf.reduce_sum(products, axis=0, keepdims=True)
                squares.append(self._arranged(total)[0])
            return squares
        left, right = map(wide, self._factors(*tensors))
        if self._positions == 1:
            left, right = (tf.reduce_sum(tf.square(f), axis=[2, 3]) for f in (left, right))
            return [tf.reduce_sum(left * right, axis=1)]
        grams = (tf.matmul(factor, factor, transpose_b=True) for factor in (left, right))
        # Rounding can leave a tiny negative number where the gradient vanishes.
        return [tf.maximum(tf.reduce_sum(tf.multiply(*grams), axis=[1, 2, 3]), 0.0)]

    def plus(self, others: Sequence[Contribution]) -> Contribution:
        """One after the other along the positions, if all are of the same form."""
        parts = [self, *(other for other in others if isinstance(other, OuterProducts))]
        if len(parts) <= len(others) or any(part._sizes != self._sizes for part in parts):
            return super().plus(others)

        def factors(*slices: Sequence[tf.Tensor]) -> list[tf.Tensor]:
            both = [map(wide, part._factors(*own)) for part, own in zip(parts, slices, strict=True)]
            return [tf.concat(side, axis=2) for side in zip(*both, strict=True)]

        known = [part._positions for part in parts if part._positions is not None]
        positions = sum(known) if len(known) == len(parts) else None
        groups, rows, columns = self._sizes.values()
        made = sum(part._made for part in parts) + (positions or 0) * groups * (rows + columns)
        return OuterProducts(
            [part.tensors for part in parts],
            factors,
            self._arrange,
            positions=positions,
            made=made,
            **self._sizes,
        )

    def _products(self, *tensors: tf.Tensor) -> tf.Tensor:
        """The matrices, transposed where that is faster: the smaller factor is transposed."""
        left, right = map(wide, self._factors(*tensors))
        if self._sizes["groups"] == 1:
            left, right = left[:, 0], right[:, 0]
        if self._transposed:
            left, right = right, left
        return tf.matmul(left, right, transpose_a=True)

    def _arranged(self, products: tf.Tensor) -> tf.Tensor:
        if self._transposed:
            products = tf.linalg.matrix_transpose(products)
        return self._arrange(products[:, None] if self._sizes["groups"] == 1 else products)


class Rows(Contribution):
    """Gradients of a table some rows of which were looked up.

    The squared norm is that of the output gradients, summed where an example looked up a row more
    than once; nothing of the size of the table is made for it.

    Args:
        indices: Integers, [batch, ...].
        gradients: Of what was looked up, [batch, ..., columns].
        shape: Of the table, (rows, columns).
    """

    materializes = False

    def __init__(self, indices: tf.Tensor, gradients: tf.Tensor, shape: tuple[int, int]):
        batch, *axes = keras.ops.shape(indices)
        positions = math.prod(axes)
        tensors = (
            tf.reshape(indices, [batch, positions]),
            tf.reshape(gradients, [batch, positions, shape[1]]),
        )
        super().__init__(tensors, self._tables, known_size(tensors[1].shape[1:]))
        self._shape = shape
        self.written = math.prod(shape)

    def _tables(self, indices: tf.Tensor, gradients: tf.Tensor) -> tf.Tensor:
        tables = _summed_by(indices, wide(gradients), self._shape[0])
        return tf.reshape(tables, [-1, *self._shape])

    def squared_norms(self, *tensors: tf.Tensor, with_sum: bool = False) -> list[tf.Tensor]:
        """From the rows that were looked up."""
        del with_sum
        indices, gradients = tensors[0], wide(tensors[1])
        if indices.shape[1] != 1:
            # Equal indices have the same position among the sorted ones.
            numbers = tf.searchsorted(tf.sort(indices, axis=1), indices)
            merged = _summed_by(numbers, gradients, tf.shape(indices)[1])
            gradients = tf.reshape(merged, tf.shape(gradients))
        return [sums_of_squares(gradients)]

    def plus(self, others: Sequence[Contribution]) -> Contribution:
        """All look-ups as one."""
        if not all(isinstance(other, Rows) for other in others):
            return super().plus(others)
        parts = (self, *others)
        indices = tf.concat([tf.cast(part.tensors[0], tf.int64) for part in parts], axis=1)
        gradients = tf.concat([wide(part.tensors[1]) for part in parts], axis=1)
        return Rows(indices, gradients, self._shape)


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

    def part(rows: Callable[[tf.Tensor], tf.Tensor]) -> list[tf.Tensor]:
        slices = tf.nest.map_structure(rows, tensors)
        return contribution.squared_norms(*slices, with_sum=with_sum)

    most = max(1, BUDGET // max(1, contribution.numbers))
    flat = tf.nest.flatten(tensors)
    size = keras.ops.shape(flat[0])[0]
    if isinstance(size, int):
        if size <= most:
            return part(lambda tensor: tensor)
        most = -(-size // -(-size // most))  # as even as can be
    elif _compat.in_xla_context():
        # The loop is compiled also where it never runs, and can slice no more than there is.
        most = tf.minimum(most, size)
    known = most if isinstance(most, int) else None
    whole = size // (most if known else tf.maximum(most, 1))

    def body(i: tf.Tensor, squares: tf.TensorArray, *total: tf.Tensor) -> Sequence[tf.Tensor]:
        def rows(tensor: tf.Tensor) -> tf.Tensor:
            # XLA knows the size of this, not that of tensor[i * most : (i + 1) * most].
            others = tensor.shape.rank - 1
            own = tf.slice(tensor, [i * most, *[0] * others], [most, *[-1] * others])
            return tf.ensure_shape(own, [known, *tensor.shape[1:]])

        own, *summed = part(rows)
        return i + 1, squares.write(i, own), *map(tf.add, total, summed)

    dtype = tf.float64 if any(tensor.dtype == tf.float64 for tensor in flat) else tf.float32
    squares = tf.TensorArray(dtype, size=whole, element_shape=[known])
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


def _summed_by(numbers: tf.Tensor, rows: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """[examples · count, columns]: of each example the sums of the rows of the same number."""
    examples = keras.ops.shape(numbers)[0]
    offsets = tf.cast(count, numbers.dtype) * tf.range(examples, dtype=numbers.dtype)
    return tf.math.unsorted_segment_sum(
        tf.reshape(rows, [-1, rows.shape[-1]]),
        tf.reshape(numbers + offsets[:, None], [-1]),
        examples * count,
    )


def sums_of_squares(values: tf.Tensor) -> tf.Tensor:
    """Per example, of [examples, ...]."""
    return tf.reduce_sum(tf.square(values), axis=list(range(1, values.shape.rank)))


def known_size(shape: tf.TensorShape) -> int:
    """The number of elements, where sizes known only at run time count as 1."""
    return math.prod(size or 1 for size in shape.as_list())


def wide(tensor: tf.Tensor) -> tf.Tensor:
    """In float32 or wider."""
    return tf.cast(tensor, compute_dtype(tensor.dtype))
