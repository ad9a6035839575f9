"""What one use of a variable adds to the gradient of each example, without writing all of it down.

The batch is the first axis of everything here. Arithmetic is done in float32 or wider.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_lbopt.rules.norms import compute_dtype


class Contribution(abc.ABC):
    """The gradients that one use of a variable contributes, one per example.

    Attributes:
        tensors: What they are computed from, the batch first. The methods take slices of these.
        materializes: Whether the norms are had by writing the gradients down, so that their sum
            over the batch costs little more.
    """

    tensors: tuple[tf.Tensor, ...]
    materializes: bool = True

    @abc.abstractmethod
    def gradients(self, *tensors: tf.Tensor) -> tf.Tensor:
        """The gradients of some examples, [examples, *shape of the variable]."""

    def squared_norms(self, *tensors: tf.Tensor) -> tf.Tensor:
        """Their squared norms, [examples], in the cheapest way."""
        return sums_of_squares(self.gradients(*tensors))

    def squared_norms_and_sum(self, *tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Both the squared norms and the sum of the gradients of these examples."""
        gradients = self.gradients(*tensors)
        return sums_of_squares(gradients), tf.reduce_sum(gradients, axis=0)

    @abc.abstractmethod
    def workspace(self, materialized: bool) -> int:
        """How many numbers are held per example while the gradients or the norms are computed."""

    def merged(self, others: Sequence["Contribution"]) -> "Contribution | None":
        """The sum of several uses of one variable as one contribution, where that is cheaper."""
        del others
        return None


class PerExample(Contribution):
    """Gradients that are written down already.

    Args:
        gradients: [batch, *shape of the variable].
    """

    def __init__(self, gradients: tf.Tensor):
        self.tensors = (_wide(gradients),)

    def gradients(self, *tensors: tf.Tensor) -> tf.Tensor:
        """The slice itself."""
        return tensors[0]

    def workspace(self, materialized: bool) -> int:
        """None but for the squares."""
        return known_size(self.tensors[0].shape[1:])


class Computed(Contribution):
    """Gradients that a function of the examples' tensors writes down.

    Args:
        tensors: Batch first.
        function: Takes slices of them, returns [examples, *shape of the variable].
        floats: How many numbers it holds per example.
    """

    def __init__(
        self, tensors: Sequence[tf.Tensor], function: Callable[..., tf.Tensor], floats: int
    ):
        self.tensors = tuple(tensors)
        self._function = function
        self._floats = floats

    def gradients(self, *tensors: tf.Tensor) -> tf.Tensor:
        """What the function returns."""
        return _wide(self._function(*tensors))

    def workspace(self, materialized: bool) -> int:
        """As given."""
        return self._floats


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
        tensors: Sequence[tf.Tensor],
        factors: Callable[..., tuple[tf.Tensor, tf.Tensor]],
        arrange: Callable[[tf.Tensor], tf.Tensor],
        *,
        groups: int,
        positions: int | None,
        rows: int,
        columns: int,
        made: int = 0,
    ):
        self.tensors = tuple(tensors)
        self._factors = factors
        self._arrange = arrange
        self._groups, self._positions = groups, positions
        self._rows, self._columns = rows, columns
        self._made = made
        self._turned = columns < rows
        # The matrix also gives the sum over the batch, which the Gram form leaves to a pass of its
        # own, as costly as the matrices.
        self.materializes = positions is None or (
            2 * positions * (rows + columns) > rows * columns and positions > 1
        )

    def gradients(self, *tensors: tf.Tensor) -> tf.Tensor:
        """All matrices."""
        return self._arranged(self._products(*tensors))

    def squared_norms_and_sum(self, *tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """From all matrices."""
        products = self._products(*tensors)
        total = self._arranged(tf.reduce_sum(products, axis=0, keepdims=True))
        return sums_of_squares(products), total[0]

    def squared_norms(self, *tensors: tf.Tensor) -> tf.Tensor:
        """In Gram form where that is cheaper."""
        if self.materializes:
            return sums_of_squares(self._products(*tensors))
        left, right = (_wide(factor) for factor in self._factors(*tensors))
        if self._positions == 1:
            left, right = (tf.reduce_sum(tf.square(f), axis=[2, 3]) for f in (left, right))
            return tf.reduce_sum(left * right, axis=1)
        grams = (tf.matmul(factor, factor, transpose_b=True) for factor in (left, right))
        # Rounding can leave a tiny negative number where the gradient vanishes.
        return tf.maximum(tf.reduce_sum(tf.multiply(*grams), axis=[1, 2, 3]), 0.0)

    def _products(self, *tensors: tf.Tensor) -> tf.Tensor:
        """The matrices, transposed where that is faster: the smaller factor is turned around."""
        left, right = (_wide(factor) for factor in self._factors(*tensors))
        if self._groups == 1:
            left, right = left[:, 0], right[:, 0]
        if self._turned:
            left, right = right, left
        return tf.matmul(left, right, transpose_a=True)

    def _arranged(self, products: tf.Tensor) -> tf.Tensor:
        if self._turned:
            products = tf.linalg.matrix_transpose(products)
        return self._arrange(products[:, None] if self._groups == 1 else products)

    def workspace(self, materialized: bool) -> int:
        """The matrices or the Gram matrices, and the factors if they are made here."""
        if materialized or self.materializes:
            return self._made + self._groups * self._rows * self._columns
        return self._made + 2 * self._groups * (self._positions or 1) ** 2

    def merged(self, others: Sequence[Contribution]) -> Contribution | None:
        """One after the other along the positions, if all are of the same form."""
        parts = [self, *(part for part in others if isinstance(part, OuterProducts))]
        sizes = {(part._groups, part._rows, part._columns) for part in parts}
        if len(parts) <= len(others) or len(sizes) > 1:
            return None
        counts = [len(part.tensors) for part in parts]

        def factors(*tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            lefts, rights = [], []
            for part, slices in zip(parts, _split(tensors, counts), strict=True):
                left, right = part._factors(*slices)
                lefts.append(_wide(left))
                rights.append(_wide(right))
            return tf.concat(lefts, axis=2), tf.concat(rights, axis=2)

        positions = [part._positions for part in parts if part._positions is not None]
        total = sum(positions) if len(positions) == len(parts) else None
        made = (sum(part._made for part in parts)) + (total or 0) * self._groups * (
            self._rows + self._columns
        )
        return OuterProducts(
            [tensor for part in parts for tensor in part.tensors],
            factors,
            self._arrange,
            groups=self._groups,
            positions=total,
            rows=self._rows,
            columns=self._columns,
            made=made,
        )


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
        self._shape = shape
        batch = batch_size(indices)
        positions = indices.shape[1:].num_elements()
        if positions is None:
            positions = tf.reduce_prod(tf.shape(indices)[1:])
        self.tensors = (
            tf.reshape(indices, [batch, positions]),
            tf.reshape(gradients, [batch, positions, shape[1]]),
        )

    def gradients(self, *tensors: tf.Tensor) -> tf.Tensor:
        """Whole tables."""
        indices, gradients = tensors
        examples = batch_size(indices)
        rows, columns = self._shape
        segments = indices + rows * tf.range(examples, dtype=indices.dtype)[:, None]
        tables = tf.math.unsorted_segment_sum(
            tf.reshape(_wide(gradients), [-1, columns]),
            tf.reshape(segments, [-1]),
            rows * examples,
        )
        return tf.reshape(tables, [examples, rows, columns])

    def squared_norms(self, *tensors: tf.Tensor) -> tf.Tensor:
        """From the rows that were looked up."""
        indices, gradients = tensors
        gradients = _wide(gradients)
        if indices.shape[1] == 1:
            return sums_of_squares(gradients)
        # Equal indices stand side by side once sorted: number them, each example on its own.
        order = tf.argsort(indices, axis=1)
        ordered = tf.gather(indices, order, batch_dims=1)
        steps = tf.cast(ordered[:, 1:] != ordered[:, :-1], tf.int32)
        numbers = tf.pad(tf.cumsum(steps, axis=1), [[0, 0], [1, 0]])
        numbers = tf.gather(numbers, tf.argsort(order, axis=1), batch_dims=1)
        examples, positions = batch_size(indices), tf.shape(indices)[1]
        segments = numbers + positions * tf.range(examples)[:, None]
        merged = tf.math.unsorted_segment_sum(
            tf.reshape(gradients, [-1, self._shape[1]]),
            tf.reshape(segments, [-1]),
            examples * positions,
        )
        return sums_of_squares(tf.reshape(merged, [examples, positions * self._shape[1]]))

    def workspace(self, materialized: bool) -> int:
        """The table, or as many rows as were looked up."""
        if materialized:
            return math.prod(self._shape)
        return known_size(self.tensors[1].shape[1:])

    def merged(self, others: Sequence[Contribution]) -> Contribution | None:
        """All look-ups as one."""
        parts = [self, *(part for part in others if isinstance(part, Rows))]
        if len(parts) <= len(others):
            return None
        indices = tf.concat([tf.cast(part.tensors[0], tf.int64) for part in parts], axis=1)
        gradients = tf.concat([_wide(part.tensors[1]) for part in parts], axis=1)
        return Rows(indices, gradients, self._shape)


class Sum(Contribution):
    """The sum of several uses of one variable, by writing the gradients down.

    Args:
        parts: At least two.
    """

    def __init__(self, parts: Sequence[Contribution]):
        self._parts = tuple(parts)
        self._counts = [len(part.tensors) for part in parts]
        self.tensors = tuple(tensor for part in parts for tensor in part.tensors)

    def gradients(self, *tensors: tf.Tensor) -> tf.Tensor:
        """The sum of the parts' gradients."""
        slices = _split(tensors, self._counts)
        return tf.add_n(
            [part.gradients(*own) for part, own in zip(self._parts, slices, strict=True)]
        )

    def workspace(self, materialized: bool) -> int:
        """That of all parts."""
        return sum(part.workspace(True) for part in self._parts)


def combined(parts: Sequence[Contribution]) -> Contribution:
    """One contribution from all uses of a variable: norms of sums are no sums of norms."""
    if len(parts) == 1:
        return parts[0]
    return parts[0].merged(parts[1:]) or Sum(parts)


def sums_of_squares(values: tf.Tensor) -> tf.Tensor:
    """Per example, of [examples, ...]."""
    axes = list(range(1, values.shape.rank))
    return tf.reduce_sum(tf.square(values), axis=axes) if axes else tf.square(values)


def batch_size(tensor: tf.Tensor) -> int | tf.Tensor:
    """The size of the first axis, static where it is known."""
    size = tensor.shape[0]
    return tf.shape(tensor)[0] if size is None else size


def known_size(shape: Any) -> int:
    """The number of elements, where sizes known only at run time count as 1."""
    return math.prod(size or 1 for size in tf.TensorShape(shape).as_list())


def _wide(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, compute_dtype(tensor.dtype))


def _split(tensors: Sequence[tf.Tensor], counts: Sequence[int]) -> list[Sequence[tf.Tensor]]:
    pieces, start = [], 0
    for count in counts:
        pieces.append(tensors[start : start + count])
        start += count
    return pieces
