"""What one replica keeps of one variable's gradients over the micro-steps of an update.

Two kinds with one interface: `DenseAccumulator` has the shape of the variable, `SparseAccumulator`
only the rows that were touched. Both sum the gradients and, where asked, follow their variance by
the update of Youngs and Cramer (Welford's in terms of the sum), which stays right where the
deviations are small against the mean:

    V_n = (n−1)/n V_{n−1} + (n−1)/n² (x_n − S_{n−1}/(n−1))²,    S_n = S_{n−1} + x_n
"""

from collections.abc import Callable

import tensorflow as tf

from tf_lbopt.rules.norms import Gradient
from tf_lbopt.statistics.sparse import merge_repeated_indices, rows_at

MakeVariable = Callable[..., tf.Variable]


class DenseAccumulator:
    """Sum, and variance if asked for, of dense gradients.

    Args:
        shape: The variable's shape.
        dtype: The dtype of the arithmetic.
        with_variance: Whether to keep the variance.
        make_variable: Creates a non-trainable variable: ``make_variable(value, shape)``.
    """

    kind = "dense"

    def __init__(
        self,
        shape: tf.TensorShape,
        dtype: tf.DType,
        with_variance: bool,
        make_variable: MakeVariable,
    ):
        zeros = tf.zeros(shape, dtype)
        self.sum = make_variable(zeros, shape)
        self.variance = make_variable(zeros, shape) if with_variance else None

    def variables(self) -> list[tf.Variable]:
        """The state, in the order in which it is saved."""
        return [self.sum] if self.variance is None else [self.sum, self.variance]

    def add(self, gradient: Gradient, live: tf.Tensor, count: tf.Tensor) -> None:
        """Adds one micro-step, in place.

        Args:
            gradient: Of this micro-step.
            live: Whether it is a sub-batch at all: some gradient of some variable is not 0.
            count: How many live micro-steps came before, a float scalar.
        """
        if self.variance is not None:
            self._follow_variance(self.variance, gradient, live, count)
        if isinstance(gradient, tf.IndexedSlices):
            self.sum.scatter_add(gradient)
        else:
            self.sum.assign_add(gradient)

    def _follow_variance(
        self, variance: tf.Variable, gradient: Gradient, live: tf.Tensor, count: tf.Tensor
    ) -> None:
        kept, weight = _weights(live, count)
        mean = self.sum * tf.cast(tf.math.reciprocal_no_nan(count), self.sum.dtype)
        deviation = tf.math.squared_difference(tf.convert_to_tensor(gradient), mean)
        variance.assign(
            variance * tf.cast(kept, mean.dtype) + deviation * tf.cast(weight, mean.dtype)
        )

    def read(self, count: tf.Tensor) -> tuple[Gradient, tf.Tensor | None]:
        """Sum and variance over ``count`` live micro-steps."""
        del count
        variance = None if self.variance is None else self.variance.read_value()
        return self.sum.read_value(), variance

    def clear(self) -> None:
        """Empties this replica's copies."""
        for variable in self.variables():
            variable.assign(tf.zeros(variable.shape, variable.dtype))


class SparseAccumulator:
    """The same for ``IndexedSlices``, over the rows that were touched since the last update.

    A row that was touched in c of n micro-steps was 0 in the others: its variance over the c is
    kept, and the zeros are joined when it is read.

    Args:
        shape: The variable's shape.
        dtype: The dtype of the arithmetic.
        with_variance: Whether to keep the variance.
        make_variable: Creates a non-trainable variable: ``make_variable(value, shape)``.
    """

    kind = "sparse"

    def __init__(
        self,
        shape: tf.TensorShape,
        dtype: tf.DType,
        with_variance: bool,
        make_variable: MakeVariable,
    ):
        self._dense_shape = shape
        rows = tf.zeros([0, *shape[1:]], dtype)
        rows_shape = tf.TensorShape([None, *shape[1:]])
        self.indices = make_variable(tf.zeros([0], tf.int64), tf.TensorShape([None]))
        self.sum = make_variable(rows, rows_shape)
        self.touched = make_variable(tf.zeros([0], dtype), tf.TensorShape([None]))
        self.variance = make_variable(rows, rows_shape) if with_variance else None

    def variables(self) -> list[tf.Variable]:
        """The state, in the order in which it is saved."""
        plain = [self.indices, self.sum, self.touched]
        return plain if self.variance is None else [*plain, self.variance]

    def add(self, gradient: Gradient, live: tf.Tensor, count: tf.Tensor) -> None:
        """Adds one micro-step, in place. Arguments as `DenseAccumulator.add`."""
        del live, count  # rows count for themselves, and an all-zero micro-step has value 0
        gradient = merge_repeated_indices(_as_slices(gradient))
        known = self.indices.read_value()
        indices, positions = tf.unique(tf.concat([known, tf.cast(gradient.indices, tf.int64)], 0))
        positions = positions[tf.shape(known)[0] :]
        new_rows = tf.shape(indices)[0] - tf.shape(known)[0]
        total = _extended(self.sum, new_rows)
        touched = _extended(self.touched, new_rows)
        update_at = positions[:, None]
        if self.variance is not None:
            variance = _extended(self.variance, new_rows)
            counts = _column(tf.gather(touched, positions), gradient.values)
            kept, weight = _weights(tf.constant(True), counts)
            mean = tf.gather(total, positions) * tf.math.reciprocal_no_nan(counts)
            deviation = tf.math.squared_difference(gradient.values, mean)
            rows = tf.gather(variance, positions) * kept + deviation * weight
            self.variance.assign(tf.tensor_scatter_nd_update(variance, update_at, rows))
        ones = tf.ones(tf.shape(positions), touched.dtype)
        self.touched.assign(tf.tensor_scatter_nd_add(touched, update_at, ones))
        self.sum.assign(tf.tensor_scatter_nd_add(total, update_at, gradient.values))
        self.indices.assign(indices)

    def read(self, count: tf.Tensor) -> tuple[Gradient, tf.Tensor | None]:
        """Sum and variance over ``count`` live micro-steps."""
        total = self.sum.read_value()
        slices = tf.IndexedSlices(
            total,
            self.indices.read_value(),
            dense_shape=tf.constant(self._dense_shape.as_list(), tf.int64),
        )
        if self.variance is None:
            return slices, None
        touched = _column(self.touched.read_value(), total)
        # Joining c values of mean S/c with n − c zeros: V = c/n V_c + c (n − c)/n² (S/c)².
        share = touched / tf.maximum(tf.cast(count, total.dtype), 1)
        mean = total / tf.maximum(touched, 1)
        variance = share * self.variance + share * (1 - share) * tf.square(mean)
        return slices, variance

    def clear(self) -> None:
        """Empties this replica's copies."""
        for variable in self.variables():
            variable.assign(tf.zeros([0, *variable.shape[1:]], variable.dtype))


def deviation_from_mean(
    total: Gradient,
    variance: tf.Tensor | None,
    count: tf.Tensor,
    all_total: Gradient,
    all_count: tf.Tensor,
) -> tf.Tensor:
    """What one replica contributes to the variance over all sub-batches.

    ``n_d/k · (V_d + (S_d/n_d − S/k)²)``; the sum over replicas d is σ².

    Args:
        total: S_d, this replica's sum; ``IndexedSlices`` without repeated indices, or dense.
        variance: V_d, over this replica's own micro-steps; ``None`` for zero.
        count: n_d, how many of them were live.
        all_total: S, the sum over replicas; as ``total``, over the rows of all replicas.
        all_count: k, how many sub-batches were live on all replicas.

    Returns:
        A tensor of the shape of ``all_total`` (of its values).
    """
    if isinstance(all_total, tf.IndexedSlices):
        own_variance = variance
        values = rows_at(total.indices, total.values, all_total.indices)
        variance = (
            None
            if own_variance is None
            else rows_at(total.indices, own_variance, all_total.indices)
        )
        all_values = all_total.values
    else:
        values, all_values = total, all_total
    dtype = all_values.dtype
    mean = values * tf.cast(tf.math.reciprocal_no_nan(count), dtype)
    all_mean = all_values * tf.cast(tf.math.reciprocal_no_nan(all_count), dtype)
    squares = tf.math.squared_difference(mean, all_mean)
    if variance is not None:
        squares += variance
    return squares * tf.cast(tf.math.divide_no_nan(count, all_count), dtype)


def any_nonzero(gradients: list[Gradient]) -> tf.Tensor:
    """Whether some element of some gradient is not 0 (NaN is not). Looks at small ones first."""
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    values.sort(key=lambda value: value.shape.num_elements() or 1 << 60)
    found = tf.reduce_any(values[0] != 0)
    for value in values[1:]:
        found = tf.cond(found, lambda: tf.constant(True), lambda v=value: tf.reduce_any(v != 0))
    return found


def _weights(live: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Factors of V_{n−1} and of the squared deviation, when the n-th live value arrives."""
    n = count + 1.0
    kept = tf.where(live, count / n, tf.ones_like(count))
    weight = tf.where(live, count / (n * n), tf.zeros_like(count))
    return kept, weight


def _as_slices(gradient: Gradient) -> tf.IndexedSlices:
    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.IndexedSlices(gradient, tf.range(tf.shape(gradient, tf.int64)[0]))


def _column(per_row: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """One number per row, shaped to multiply the rows."""
    return tf.reshape(per_row, [-1, *[1] * (rows.shape.rank - 1)])


def _extended(variable: tf.Variable, rows: tf.Tensor) -> tf.Tensor:
    value = variable.read_value()
    zeros = tf.zeros(tf.concat([[rows], tf.shape(value)[1:]], 0), value.dtype)
    return tf.concat([value, zeros], 0)
