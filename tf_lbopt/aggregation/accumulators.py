"""What one replica keeps of one variable's gradients over the micro-steps of an update.

Two kinds with one interface: `DenseAccumulator` has the shape of the variable, `SparseAccumulator`
only the rows that were touched. Both sum the gradients and, where asked, their norms and their
squared deviations from the mean, the latter by the update of Youngs and Cramer (Welford's in terms
of the sum), which stays right where the deviations are small against the mean:

    M_n = M_{n−1} + (n−1)/n (R x_n − R S_{n−1}/(n−1))²,    S_n = S_{n−1} + x_n

where R x is the gradient: what arrives is divided by the number R of replicas.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import TypeAlias

import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.aggregation.replica_state import empty
from tf_lbopt.aggregation.sparse import merge_repeated_indices, rows_at
from tf_lbopt.rules.norms import Gradient
from tf_lbopt.rules.rule import MEAN_NORM, VARIANCE
from tf_lbopt.rules.writer import Writer

Shape: TypeAlias = tf.TensorShape | Sequence[int | None]

# Elements from which on a tensor is not looked at where a smaller one tells as much.
_LARGE = 1 << 12


@dataclasses.dataclass(frozen=True)
class ReplicaStatistics:
    """One replica's gradients over the micro-steps of an update.

    Attributes:
        totals: S_d, their sum, for each variable; ``IndexedSlices`` without repeated indices, or
            dense.
        deviations: M_d, their squared deviations from their mean, for each variable; ``None`` for a
            single micro-step, or where they are not followed.
        live: n_d, how many of them were sub-batches at all, a float scalar.
    """

    totals: list[Gradient]
    deviations: list[tf.Tensor] | None
    live: tf.Tensor


class DenseAccumulator:
    """Sum, and squared deviations if asked for, of dense gradients.

    Args:
        shape: The variable's shape.
        dtype: The dtype of the arithmetic.
        statistics: What to keep beside the sum, of `VARIANCE` and `MEAN_NORM`.
        replicas: R; the gradients that arrive are divided by it.
    """

    kind = "dense"

    def __init__(
        self,
        shape: Shape,
        dtype: tf.DType,
        statistics: Collection[str],
        replicas: int,
    ):
        self._replicas = replicas
        self.sum = new_variable(shape, dtype)
        self.deviations = new_variable(shape, dtype) if VARIANCE in statistics else None
        self.norm_sum = new_variable([], dtype) if MEAN_NORM in statistics else None

    def variables(self) -> list[tf.Variable]:
        """The state, in the order in which it is saved."""
        return [v for v in (self.sum, self.deviations, self.norm_sum) if v is not None]

    def deviate(self, gradient: Gradient, weights: tuple[tf.Tensor, tf.Tensor]) -> None:
        """Follows the deviations of one more micro-step, before it is added, in place.

        The weights are `deviation_weights` of those that came before.
        """
        if self.deviations is None:
            return
        of_sum, of_squares = weights
        mean = self.sum * of_sum
        full = tf.convert_to_tensor(gradient)
        if self._replicas > 1:
            full *= self._replicas
        squares = tf.math.squared_difference(full, mean)
        Writer().subtract(self.deviations, squares, of_squares)

    def begin(self, gradient: Gradient, live: tf.Tensor, norm: tf.Tensor | None) -> None:
        """Overwrites what there is by the first micro-step, in place. Arguments as `add`."""
        del live
        self._take_norm(norm, begins=True)
        if self.deviations is not None:
            self.deviations.assign(tf.zeros_like(self.deviations))
        # Rows may come again in a sparse one, which sums them.
        self.sum.assign(tf.convert_to_tensor(gradient))

    def add(self, gradient: Gradient, live: tf.Tensor, norm: tf.Tensor | None) -> None:
        """Adds one more micro-step, in place.

        Args:
            gradient: Of this micro-step.
            live: Whether it is a sub-batch at all: some gradient of some variable is not 0.
            norm: Of the gradient, or what stands for it; ``None`` if norms are not kept.
        """
        del live
        self._take_norm(norm, begins=False)
        if isinstance(gradient, tf.IndexedSlices):
            self.sum.scatter_add(gradient)
        else:
            self.sum.assign_add(gradient)

    def read(self, count: tf.Tensor) -> tuple[Gradient, tf.Tensor | None]:
        """Sum, and squared deviations, over ``count`` live micro-steps."""
        del count
        deviations = None if self.deviations is None else self.deviations.read_value()
        return self.sum.read_value(), deviations

    def clear(self) -> None:
        """Empties this replica's copies."""
        for variable in self.variables():
            variable.assign(empty(variable.shape, variable.dtype))

    def _take_norm(self, norm: tf.Tensor | None, begins: bool) -> None:
        if self.norm_sum is not None:
            assert norm is not None, "who keeps norms must be given them"
            write = self.norm_sum.assign if begins else self.norm_sum.assign_add
            write(tf.cast(norm, self.norm_sum.dtype))


class SparseAccumulator(DenseAccumulator):
    """The same for ``IndexedSlices``, over the rows that were touched since the last update.

    A row that was touched in c of n micro-steps was 0 in the others: its deviations among the c are
    kept, and the zeros are joined when it is read.
    """

    kind = "sparse"

    def __init__(
        self,
        shape: Shape,
        dtype: tf.DType,
        statistics: Collection[str],
        replicas: int,
    ):
        super().__init__([None, *shape[1:]], dtype, statistics, replicas)
        self._dense_shape = list(shape)
        self.indices = new_variable([None], tf.int64)
        self.touched = new_variable([None], dtype)

    def variables(self) -> list[tf.Variable]:
        """The state, in the order in which it is saved."""
        total, *others = super().variables()
        return [self.indices, total, self.touched, *others]

    def deviate(self, gradient: Gradient, weights: tuple[tf.Tensor, tf.Tensor]) -> None:
        """Does nothing: `add` does so, as each row counts its micro-steps for itself."""

    def begin(self, gradient: Gradient, live: tf.Tensor, norm: tf.Tensor | None) -> None:
        """Overwrites what there is by the first micro-step. Arguments as `DenseAccumulator.add`."""
        self._take_norm(norm, begins=True)
        gradient = merge_repeated_indices(_as_slices(gradient))
        if self.deviations is not None:
            self.deviations.assign(tf.zeros_like(gradient.values))
        self.touched.assign(tf.fill(tf.shape(gradient.indices), tf.cast(live, self.touched.dtype)))
        self.sum.assign(gradient.values)
        self.indices.assign(tf.cast(gradient.indices, tf.int64))

    def add(self, gradient: Gradient, live: tf.Tensor, norm: tf.Tensor | None) -> None:
        """Adds one more micro-step, in place. Arguments as `DenseAccumulator.add`."""
        self._take_norm(norm, begins=False)
        gradient = merge_repeated_indices(_as_slices(gradient))
        known = self.indices.read_value()
        indices, positions = tf.unique(tf.concat([known, tf.cast(gradient.indices, tf.int64)], 0))
        positions = positions[tf.shape(known)[0] :]
        new_rows = tf.shape(indices)[0] - tf.shape(known)[0]
        total = _extended(self.sum, new_rows)
        touched = _extended(self.touched, new_rows)
        update_at = positions[:, None]
        if self.deviations is not None:
            deviations = _extended(self.deviations, new_rows)
            counts = _column(tf.gather(touched, positions), gradient.values)
            mean = tf.gather(total, positions) * tf.math.reciprocal_no_nan(counts)
            squares = tf.math.squared_difference(
                gradient.values * self._replicas, mean * self._replicas
            )
            self.deviations.assign(
                tf.tensor_scatter_nd_add(
                    deviations,
                    update_at,
                    squares * (counts / (counts + 1.0)) * tf.cast(live, squares.dtype),
                )
            )
        ones = tf.fill(tf.shape(positions), tf.cast(live, touched.dtype))
        self.touched.assign(tf.tensor_scatter_nd_add(touched, update_at, ones))
        self.sum.assign(tf.tensor_scatter_nd_add(total, update_at, gradient.values))
        self.indices.assign(indices)

    def read(self, count: tf.Tensor) -> tuple[Gradient, tf.Tensor | None]:
        """Sum, and squared deviations, over ``count`` live micro-steps."""
        total = self.sum.read_value()
        slices = tf.IndexedSlices(
            total,
            self.indices.read_value(),
            dense_shape=tf.constant(self._dense_shape, tf.int64),
        )
        if self.deviations is None:
            return slices, None
        touched = _column(self.touched.read_value(), total)
        # Joining c values of mean S/c with n − c zeros: M + c (n − c)/n (S/c)².
        count = tf.maximum(tf.cast(count, total.dtype), 1)
        mean = total * self._replicas / tf.maximum(touched, 1)
        joined = touched * (1 - touched / count) * tf.square(mean)
        return slices, self.deviations.read_value() + joined


def new_variable(shape: Shape, dtype: tf.DType, value: int = 0) -> tf.Variable:
    """A variable of each replica's own; nothing along dimensions of no fixed size."""
    return tf.Variable(
        empty(shape, dtype) + value,
        shape=tf.TensorShape(shape),
        trainable=False,
        name="gradient_accumulator",
    )


def deviation_weights(count: tf.Tensor, replicas: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The factors of S_{n−1}, and of the square in what is subtracted from M_{n−1}, see the top.

    ``R/(n−1)`` and ``−(n−1)/n``, with n − 1 the count of live micro-steps that came before; 0 and 0
    where it is 0.
    """
    return tf.math.divide_no_nan(float(replicas), count), -count / (count + 1.0)


def shares_of_deviations(
    own: ReplicaStatistics, totals: list[Gradient], live: tf.Tensor, replicas: int
) -> list[tf.Tensor]:
    """What a replica contributes to the squared deviations of all sub-batches from their mean.

    ``M_d + n_d (R S_d/n_d − R S/k)²``; the sum over replicas d is ``Σ (g_d − ḡ)²``. A replica
    without live sub-batches contributes nothing. A replica's gradients arrive divided by the number
    R of replicas; here and in the accumulators squares are those of the gradients themselves, so
    that neither small nor many replicas make them vanish.

    Args:
        own: This replica's moments.
        totals: S, the sum over replicas, for each variable; of the kind of the replica's own sum,
            over the rows of all.
        live: k, how many sub-batches were live on all replicas.
        replicas: R.

    Returns:
        For each variable a tensor of the shape of its ``total`` (of its values).
    """
    if replicas == 1 and own.deviations is not None:
        return own.deviations
    # Both factors are 0 on a replica that has nothing: so are its shares.
    to_own_mean = tf.math.divide_no_nan(float(replicas), own.live)
    to_mean = tf.where(own.live > 0, replicas / live, 0.0)
    shares = []
    for index, total in enumerate(totals):
        values, all_values = own.totals[index], total
        deviations = None if own.deviations is None else own.deviations[index]
        if isinstance(total, tf.IndexedSlices):
            all_values = total.values
            own_rows = own.totals[index].indices
            values = rows_at(own_rows, own.totals[index].values, total.indices)
            if deviations is not None:
                deviations = rows_at(own_rows, deviations, total.indices)
        dtype = total.dtype
        squares = tf.math.squared_difference(
            values * tf.cast(to_own_mean, dtype), all_values * tf.cast(to_mean, dtype)
        )
        # Without deviations: one gradient, n_d = 1.
        if deviations is not None:
            squares = deviations + squares * tf.cast(own.live, dtype)
        shares.append(squares)
    return shares


def any_nonzero(gradients: list[Gradient]) -> tf.Tensor:
    """Whether some element of some gradient is not 0 (NaN is not). Looks at small ones first."""
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    values.sort(key=_size)
    small = [value for value in values if _size(value) < _LARGE] or values[:1]
    rest = values[len(small) :]
    found = _any_nonzero_together(small)
    if not rest:
        return found
    # One condition for all that is large: tracing one takes longer than looking at small tensors.
    return tf.cond(found, lambda: tf.constant(True), lambda: _any_nonzero(rest), name="rarely")


def _size(value: tf.Tensor) -> int:
    size = value.shape.num_elements()
    return 1 << 60 if size is None else size


def _any_nonzero(values: list[tf.Tensor]) -> tf.Tensor:
    return tf.reduce_any(tf.stack([tf.reduce_any(tf.cast(value, tf.bool)) for value in values]))


def _any_nonzero_together(values: list[tf.Tensor]) -> tf.Tensor:
    """The same of small ones, which are sooner copied than looked at one by one."""
    if _compat.in_xla_context():
        return _any_nonzero(values)
    by_dtype: dict[tf.DType, list[tf.Tensor]] = {}
    for value in values:
        by_dtype.setdefault(value.dtype, []).append(tf.reshape(value, [-1]))
    return _any_nonzero([tf.concat(alike, 0) for alike in by_dtype.values()])


def _as_slices(gradient: Gradient) -> tf.IndexedSlices:
    """The gradient itself, or the rows of a dense one that are not 0 (NaN is not).

    Not all of its rows: by a number of them that is known when the graph is made, TensorFlow 2.20
    takes `read_value` of what they are assigned to for a tensor of as many.
    """
    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows = tf.reshape(gradient, [tf.shape(gradient)[0], -1])
    indices = tf.where(tf.reduce_any(tf.cast(rows, tf.bool), 1))[:, 0]
    return tf.IndexedSlices(tf.gather(gradient, indices), indices)


def _column(per_row: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """One number per row, shaped to multiply the rows."""
    return tf.reshape(per_row, [-1, *[1] * (rows.shape.rank - 1)])


def _extended(variable: tf.Variable, rows: tf.Tensor) -> tf.Tensor:
    value = variable.read_value()
    zeros = tf.zeros(tf.concat([[rows], tf.shape(value)[1:]], 0), value.dtype)
    return tf.concat([value, zeros], 0)
