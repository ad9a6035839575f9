"""The squared norms of sub-batches' gradients, and of their mean, in updates."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.aggregation.accumulation import Accumulation
from tf_lbopt.aggregation.replicas import OfReplica, inside_scope
from tf_lbopt.optimizers.trained import Trained, Variable
from tf_lbopt.rules.norms import Gradient, norms, widest


class SquaredNorms(NamedTuple):
    """What is known of the gradients of one update, unclipped and of the loss itself.

    Attributes:
        mean_of_squares: [n], the mean of the squared norms over the sub-batches, or over examples;
            0 for variables without a gradient.
        square_of_mean: [n], the squared norms of the mean gradients.
        sub_batches: k, a float scalar; the number of examples where the first is over these.
        examples: How many there were, a float scalar; 0 where nobody has counted them.
        valid: Whether all micro-steps are in them, and all is finite, and k is 2 or more.
    """

    mean_of_squares: tf.Tensor
    square_of_mean: tf.Tensor
    sub_batches: tf.Tensor
    examples: tf.Tensor
    valid: tf.Tensor


class _Counts(NamedTuple):
    """What is summed over replicas and micro-steps beside the squared norms, as floats.

    Attributes:
        number: Of the squared norms in the sum, for each variable.
        live: How many sub-batches had a gradient at all.
        examples: Theirs.
        micro_steps: One for each call.
    """

    number: tf.Tensor
    live: tf.Tensor
    examples: tf.Tensor
    micro_steps: tf.Tensor


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What a training step has told of its batch, on one replica.

    Attributes:
        examples: How many there are.
        norms: By variable, [m] norms of the gradients of single examples.
    """

    examples: tf.Tensor | None = None
    norms: dict[str, tf.Tensor] | None = None


_batches: OfReplica[_Batch] = OfReplica()


@dataclasses.dataclass(frozen=True)
class _Watch:
    """Where the last updates' squared norms are kept; apart from the optimizer and its checkpoints.

    Attributes:
        rows: [r, 2 n + 2], one for each update: two for each variable, k and examples.
        written: How many there were; the next one is in row ``written`` modulo r.
        of_examples: Whether the norms are those of single examples.
    """

    rows: tf.Variable
    written: tf.Variable
    of_examples: bool

    def note(self, of_update: SquaredNorms, made: tf.Tensor) -> None:
        """Keeps those of an update that was made, on one replica."""
        row = tf.concat(
            [
                of_update.mean_of_squares,
                of_update.square_of_mean,
                tf.stack([of_update.sub_batches, of_update.examples]),
            ],
            0,
        )
        position = tf.convert_to_tensor(self.written) % self.rows.shape[0]
        self.rows.scatter_update(
            tf.IndexedSlices(tf.cast(row, self.rows.dtype)[None], position[None])
        )
        # What has not entered is overwritten by the next one.
        self.written.assign_add(tf.cast(made & of_update.valid, self.written.dtype))


class WithSquaredNorms:
    """Mix-in of an algorithm: takes squared norms of sub-batches' gradients where asked to.

    A subclass asks by `MEAN_SQUARED_NORM` among its `statistics`, a callback by
    `watch_squared_norms`, before the training step is traced.
    """

    trained: Trained
    _strategy: tf.distribute.Strategy
    _accumulation: Accumulation | None
    _watch_of_norms: _Watch | None = None

    def _check_strategy(self) -> None:
        raise NotImplementedError

    # -- watching ----------------------------------------------------------------------------------

    def watch_squared_norms(self, rows: int, of_examples: bool = False) -> None:
        """Keeps the squared norms of the last updates, from the next trace on.

        See `tf_lbopt.callbacks.GradientNoiseScale`, which calls this.

        Args:
            rows: Of how many updates; they are lost if as many are made without a look at them.
            of_examples: Whether the training step gives the norms of single examples' gradients
                (`norms_of_examples`), in the place of those of sub-batches.

        Raises:
            ValueError: There is one sub-batch, or the optimizer is under a strategy without
                replicas that know their gradients.
        """
        self._check_strategy()
        replicas = self._strategy.num_replicas_in_sync
        if replicas == 1 and self._accumulation is None and not of_examples:
            raise ValueError(
                "The noise of gradients is estimated from 2 sub-batches or more, one for each "
                "replica and accumulation micro-step. Use a strategy with more replicas, set "
                "`gradient_accumulation_steps` of the optimizer, or make the model a "
                "`tf_lbopt.PerExampleNormsModel`. Received: 1 replica, "
                "gradient_accumulation_steps=None"
            )
        with inside_scope(self._strategy):
            self._watch_of_norms = _Watch(
                # One more, as the next row is written before it is known whether it enters.
                tf.Variable(
                    tf.zeros([rows + 1, 2 * len(self.trained.variables) + 2], self._norms_dtype()),
                    trainable=False,
                    name="squared_norms",
                ),
                tf.Variable(0, trainable=False, dtype=tf.int32, name="squared_norms_written"),
                of_examples,
            )

    def unwatch_squared_norms(self) -> None:
        """Stops keeping them, from the next trace on."""
        self._watch_of_norms = None

    def squared_norms_since(self, written: int) -> tuple[int, np.ndarray]:
        """What was kept since an earlier look.

        Args:
            written: What that one returned; 0 at first.

        Returns:
            How many updates have entered so far, and [m, 2 n + 2], those after ``written`` that
            are still there: mean of squares and square of the mean by variable, k and examples.
        """
        watch = self._watch_of_norms
        assert watch is not None
        size = watch.rows.shape[0]
        now = int(watch.written.numpy())
        numbers = np.arange(max(written, now - size + 1), now)
        return now, watch.rows.numpy()[numbers % size].astype(np.float64)

    @property
    def wants_norms_of_examples(self) -> bool:
        """Whether the training step is to give `norms_of_examples`."""
        return self._watch_of_norms is not None and self._watch_of_norms.of_examples

    # -- what a training step tells ----------------------------------------------------------------

    def batch_of(self, examples: tf.Tensor) -> contextlib.AbstractContextManager[None]:
        """In this block, on a replica, gradients are the mean over so many examples."""
        return self._told(examples=examples)

    def norms_of_examples(
        self, of_all: Sequence[tf.Tensor], variables: Sequence[Variable]
    ) -> contextlib.AbstractContextManager[None]:
        """In this block, on a replica, gradients are the mean over examples with these norms.

        Args:
            of_all: For each variable the [m] norms, of the loss itself: neither scaled nor divided
                by the batch or the number of replicas.
            variables: The variables.
        """
        keys = map(_compat.key_of, variables)
        return self._told(norms=dict(zip(keys, of_all, strict=True)))

    def _told(self, **what: Any) -> contextlib.AbstractContextManager[None]:
        return _batches.left(self, dataclasses.replace(_batches.get(self) or _Batch(), **what))

    # -- in an update ------------------------------------------------------------------------------

    def _norms_dtype(self) -> tf.DType:
        return widest(self.trained.dtypes)

    def _own_squares(
        self, indices: Sequence[int], gradients: Sequence[Gradient], scale: tf.Tensor | float
    ) -> tf.Tensor:
        """The squared norms of this replica's gradients and `_Counts`, as one vector.

        The gradients have no repeated indices, and are multiplied by the scale, beside their
        division by the number of replicas.
        """
        dtype = self._norms_dtype()
        batch = _batches.get(self) or _Batch()
        own = tf.cast(norms(gradients), dtype)
        squares = own * own
        live = number = tf.cast(tf.reduce_any(tf.not_equal(own, 0.0)), dtype)
        if self.wants_norms_of_examples:
            squares, number = self._squares_of_examples(indices, batch, scale)
        examples = tf.zeros([], dtype) if batch.examples is None else batch.examples
        size = len(self.trained.variables)
        if list(indices) != list(range(size)):
            squares = tf.scatter_nd(np.array(indices)[:, None], squares, [size])
        counts = _Counts(number, live, tf.cast(examples, dtype), tf.ones([], dtype))
        return tf.concat([squares, tf.stack(list(counts))], 0)

    def _squares_of_examples(
        self, indices: Sequence[int], batch: _Batch, scale: tf.Tensor | float
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """[n], the sums of the examples' squared norms, in the units of gradients; how many."""
        if batch.norms is None:
            raise ValueError(
                "The norms of the gradients of single examples are wanted, which a plain training "
                "step does not compute. Expected: the training step of a "
                "`tf_lbopt.PerExampleNormsModel`. Received: gradients alone"
            )
        dtype = self._norms_dtype()
        keys = [_compat.key_of(self.trained.variables[index]) for index in indices]
        own = [tf.cast(batch.norms[key], dtype) for key in keys]
        unit = tf.cast(scale, dtype) / self._strategy.num_replicas_in_sync
        squares = tf.stack([tf.reduce_sum(tf.square(of_one * unit)) for of_one in own])
        return squares, tf.cast(tf.size(own[0]), dtype)

    def _squared_norms(
        self,
        indices: Sequence[int],
        sums: tf.Tensor,
        total_norms: tf.Tensor,
        scale: tf.Tensor | float,
        steps: tf.Tensor | float,
    ) -> SquaredNorms:
        """The statistic of an update, on one replica.

        From the sums over replicas and micro-steps of `_own_squares`, and the norms of the
        gradients' own sums.
        """
        size = len(self.trained.variables)
        squares, counts = sums[:size], _Counts(*tf.unstack(sums[size:], num=len(_Counts._fields)))
        # A gradient arrives multiplied by the scale and divided by the number of replicas.
        unit = float(self._strategy.num_replicas_in_sync) / tf.cast(scale, sums.dtype)
        # Unlike the mean that makes the update, that of the sub-batches that have a gradient.
        means = tf.cast(total_norms, sums.dtype) * (unit * tf.math.reciprocal_no_nan(counts.live))
        if list(indices) != list(range(size)):
            means = tf.scatter_nd(np.array(indices)[:, None], means, [size])
        mean_of_squares = squares * (unit * unit * tf.math.reciprocal_no_nan(counts.number))
        sub_batches = counts.examples if self.wants_norms_of_examples else counts.live
        steps = tf.cast(steps, sums.dtype) * float(self._strategy.num_replicas_in_sync)
        complete = tf.equal(counts.micro_steps, steps)
        finite = tf.math.is_finite(tf.reduce_sum(mean_of_squares) + tf.reduce_sum(means * means))
        return SquaredNorms(
            mean_of_squares,
            means * means,
            sub_batches,
            counts.examples,
            complete & finite & (sub_batches >= 2.0),
        )
