"""From a recording to gradients and norms: which variable takes which way."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.per_example.chunks import squares_and_sum
from tf_lbopt.per_example.contributions import Contribution, PerExample, combined
from tf_lbopt.per_example.general import (
    NotReplayableError,
    Replay,
    has_rows,
    squares_by_backward_passes,
    squares_by_replay,
)
from tf_lbopt.per_example.recording import Use
from tf_lbopt.per_example.registry import LayerCall, LayerRule
from tf_lbopt.rules.norms import Gradient, compute_dtype

# Of the sum of the examples' norms: what the sum of replayed gradients may differ from the batch's.
_TOLERANCE = 1e-3
_HALF_PRECISION_TOLERANCE = 5e-2


class Backward:
    """One backward pass over a recorded forward pass, and the norms from it.

    A variable takes the fastest of three ways that is exact for it: the rules of all layer calls
    that read it; repeating, one example at a time, the calls that have no rule; or a backward pass
    through the whole batch for each example, if it is read outside any layer's call or by a call
    that can not be repeated.

    Args:
        variables: The variables of the recording.
        uses: What was recorded.
        tape: The persistent tape of the recording.
        losses: The examples' losses, [batch].
        subset: Norms of only so many examples, from the first; `None` means of all.

    Attributes:
        gradients: Of the sum of the losses, one per variable; `None` where there is none.
        without_rule: Names of what had to take the second or third way, after `norms`.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        uses: Sequence[Use],
        tape: tf.GradientTape,
        losses: tf.Tensor,
        subset: int | None = None,
    ):
        self._variables = variables
        self._index = {id(variable): i for i, variable in enumerate(variables)}
        self._tape = tape
        self._losses = losses
        self._batch = losses.shape[0]
        if subset is not None and self._batch is not None and subset >= self._batch:
            subset = None
        self._subset = subset
        self._stored = [_compat.stored_value(variable) for variable in variables]
        self._uses = uses
        of_stored, of_reads, of_outputs = tape.gradient(
            losses, (self._stored, self._reads(), [use.outputs for use in uses])
        )
        self.gradients = self._totals(of_stored, of_reads)
        self.without_rule: list[str] = []
        self._read_outside = {i for i, gradient in enumerate(of_stored) if gradient is not None}
        self._live = [
            (use, gradients)
            for use, gradients in zip(uses, of_outputs, strict=True)
            if any(gradient is not None for gradient in gradients)
        ]

    def gradients_of(self, loss: tf.Tensor) -> list[Gradient | None]:
        """The gradients of another loss of the same forward pass, one per variable."""
        return self._totals(*self._tape.gradient(loss, (self._stored, self._reads())))

    def norms(self) -> list[tf.Tensor]:
        """The norms of the gradients of the losses, [batch] or [subset], one per variable.

        Replaces `gradients` where the norms give them as well, so that what the tape would do for
        them need not be run.
        """
        parts, replays = self._by_way()
        squares = self._replayed(parts, replays)
        squares |= self._by_backward_passes()
        before: list[tf.Tensor] = []
        for index in self._as_gradients_arrive(set(parts) - set(squares)):
            # In a graph nothing else would keep several layers from taking their memory at once.
            with tf.control_dependencies(before):
                before = self._by_rules(index, parts[index])
            squares[index] = before[0]
        return [self._norms(index, squares.get(index)) for index in range(len(self._variables))]

    # -- which way ---------------------------------------------------------------------------------

    def _by_way(self) -> tuple[dict[int, list[Contribution]], list[Replay]]:
        """What the rules contribute to each variable, and the calls to repeat."""
        parts: dict[int, list[Contribution]] = {}
        replays: list[Replay] = []
        self._whole_batch = set(self._read_outside)
        for index in self._read_outside:
            self.without_rule.append(f"{self._variables[index].path} (read outside its layer)")
        for use, gradients in self._live:
            if use.registration is None:
                self.without_rule.append(_name(use))
                try:
                    replays.append(Replay(use, gradients, self._batch))
                except NotReplayableError:
                    self._whole_batch.update(use.reads)
                continue
            contributions = self._contributions(use, use.registration.rule, gradients[0])
            for index in use.reads:
                if index in contributions:
                    parts.setdefault(index, []).append(contributions[index])
                else:
                    self.without_rule.append(f"{self._variables[index].path} in {_name(use)}")
                    self._whole_batch.add(index)
        return parts, replays

    def _contributions(
        self, use: Use, rule: LayerRule, gradient: tf.Tensor
    ) -> dict[int, Contribution]:
        """What the rule says of the variables that the call read; nothing if it does not apply."""
        (output,) = use.outputs
        if use.rows is False or not has_rows(output, self._batch):
            return {}
        if self._batch is None or output.shape[0] is None:
            with tf.control_dependencies([self._check_rows(use, output)]):
                gradient = tf.identity(gradient)
        # What a rule makes of the inputs would else be made, and held, from the forward pass on.
        with tf.control_dependencies([gradient]):
            args, kwargs = keras.tree.map_structure(
                lambda x: tf.identity(x) if isinstance(x, tf.Tensor) else x,
                (use.args, dict(use.kwargs)),
            )
        call = LayerCall(use.layer, args, kwargs, output, gradient, use.prepared)
        pairs = rule(call)
        if pairs is NotImplemented:
            return {}
        contributions = {}
        for variable, value in pairs:
            index = self._index.get(id(variable))
            if index not in use.reads:
                continue
            contribution = value if isinstance(value, Contribution) else PerExample(value)
            if isinstance(contribution, PerExample):
                self._check_shape(use, variable, contribution.tensors[0])
            if all(has_rows(tensor, self._batch) for tensor in contribution.tensors):
                contributions[index] = contribution
        return contributions

    def _check_rows(self, use: Use, output: tf.Tensor) -> Any:
        return tf.debugging.assert_equal(
            tf.shape(output)[0],
            tf.shape(self._losses)[0],
            message=f"The layer {use.layer.name} does not have one row per example. Per-example "
            "gradient norms need the batch as the first axis everywhere, or a batch size that is "
            "known when the function is traced (drop_remainder=True).",
        )

    def _check_shape(self, use: Use, variable: keras.Variable, value: tf.Tensor) -> None:
        if not value.shape.is_compatible_with([self._batch, *variable.shape]):
            raise ValueError(
                f"The rule for {type(use.layer).__name__} must return, for {variable.path}, a "
                f"tensor [batch, *shape of the variable], {[self._batch, *variable.shape]}. "
                f"Received a tensor of shape {value.shape.as_list()}"
            )

    # -- the three ways ----------------------------------------------------------------------------

    def _as_gradients_arrive(self, indices: set[int]) -> list[int]:
        """Some variables in the order in which the backward pass is done with their uses."""
        first = {i: n for n, (use, _) in reversed(list(enumerate(self._live))) for i in use.reads}
        return sorted(indices, key=lambda index: first[index], reverse=True)

    def _by_rules(self, index: int, parts: list[Contribution]) -> list[tf.Tensor]:
        squares, total = squares_and_sum(
            combined(parts), self._variables[index].shape, self._subset
        )
        if total is None:
            return [squares]
        self.gradients[index] = tf.cast(total, self._stored[index].dtype)
        return [squares, total]

    def _replayed(
        self, parts: dict[int, list[Contribution]], replays: list[Replay]
    ) -> dict[int, tf.Tensor]:
        while True:
            replays = [replay for replay in replays if set(replay.use.reads) - self._whole_batch]
            indices = {i for replay in replays for i in replay.use.reads} - self._whole_batch
            if not indices:
                return {}
            contributions = {i: combined(parts[i]) for i in indices if i in parts}
            try:
                squares, sums = squares_by_replay(
                    replays, contributions, self._variables, sorted(indices), self._examples()
                )
                break
            except NotReplayableError:
                for replay in replays:
                    if replay.failed:
                        self._whole_batch.update(replay.use.reads)
                replays = [replay for replay in replays if not replay.failed]
        expected = self._expected_sums()
        for index in squares:
            squares[index] = self._checked(index, squares[index], sums[index], expected[index])
        return squares

    def _by_backward_passes(self) -> dict[int, tf.Tensor]:
        indices = sorted(self._whole_batch)
        if not indices:
            return {}
        stored = [self._stored[index] for index in indices]
        reads = [
            [use.reads[index] for use, _ in self._live if index in use.reads] for index in indices
        ]

        def backward(example: tf.Tensor) -> list[Gradient | None]:
            one_hot = tf.one_hot(example, tf.shape(self._losses)[0], dtype=self._losses.dtype)
            of_stored, of_reads = self._tape.gradient(
                self._losses, (stored, reads), output_gradients=one_hot
            )
            return [added([a, *b]) for a, b in zip(of_stored, of_reads, strict=True)]

        dtypes = [compute_dtype(variable.dtype) for variable in stored]
        squares = squares_by_backward_passes(backward, dtypes, self._examples())
        return dict(zip(indices, squares, strict=True))

    # -- checking what was repeated ----------------------------------------------------------------

    def _expected_sums(self) -> list[Gradient | None]:
        """What the gradients of the examples, or of those in the subset, add up to."""
        if self._subset is None:
            return self.gradients
        within = tf.range(tf.shape(self._losses)[0]) < self._subset
        totals: list[list[Any]] = [[] for _ in self._variables]
        for use, gradients in self._live:
            pairs = [
                (output, _masked(gradient, within))
                for output, gradient in zip(use.outputs, gradients, strict=True)
                if gradient is not None and has_rows(output, self._batch)
            ]
            own = self._tape.gradient(
                [output for output, _ in pairs],
                list(use.reads.values()),
                output_gradients=[gradient for _, gradient in pairs],
            )
            for index, gradient in zip(use.reads, own, strict=True):
                totals[index].append(gradient)
        return [added(total) for total in totals]

    def _checked(
        self, index: int, squares: tf.Tensor, total: tf.Tensor, expected: Gradient | None
    ) -> tf.Tensor:
        """The squares, if the gradients add up to that of the batch."""
        dtype = total.dtype
        if expected is None:
            expected = tf.zeros_like(total)
        difference = total - tf.cast(tf.convert_to_tensor(expected), dtype)
        half = any(
            tensor.dtype.size < 4
            for use, _ in self._live
            if index in use.reads
            for tensor in use.outputs
        )
        tolerance = tf.cast(_HALF_PRECISION_TOLERANCE if half else _TOLERANCE, dtype)
        bound = tolerance * tf.reduce_sum(tf.sqrt(squares))
        # Not finite on either side is for the caller to find, not for this check.
        wrong = tf.norm(difference) > bound
        check = tf.debugging.Assert(
            tf.logical_not(wrong),
            [
                "The per-example gradients of "
                f"{self._variables[index].path} do not add up to the gradient of the batch: some "
                "layer that reads it gives another result for a single example than within the "
                "batch (it couples examples, or draws random numbers other than by a "
                "keras.random.SeedGenerator). Give that layer a rule by "
                "tf_lbopt.per_example.register_layer."
            ],
        )
        with tf.control_dependencies([] if check is None else [check]):
            # Under XLA, which leaves assertions out.
            return tf.where(wrong, tf.cast(float("nan"), dtype), squares)

    # -- odds and ends -----------------------------------------------------------------------------

    def _examples(self) -> int | tf.Tensor:
        if self._subset is None:
            return tf.shape(self._losses)[0] if self._batch is None else self._batch
        return self._subset if self._batch else tf.minimum(self._subset, tf.shape(self._losses)[0])

    def _norms(self, index: int, squares: tf.Tensor | None) -> tf.Tensor:
        dtype = compute_dtype(self._stored[index].dtype)
        if squares is None:
            return tf.zeros([self._examples()], dtype)
        return tf.cast(tf.sqrt(squares), dtype)

    def _reads(self) -> list[list[tf.Tensor]]:
        return [list(use.reads.values()) for use in self._uses]

    def _totals(
        self, of_stored: Sequence[Any], of_reads: Sequence[Sequence[Any]]
    ) -> list[Gradient | None]:
        """For each variable the sum over all ways."""
        gradients: list[list[Any]] = [[gradient] for gradient in of_stored]
        for use, own in zip(self._uses, of_reads, strict=True):
            for index, gradient in zip(use.reads, own, strict=True):
                gradients[index].append(gradient)
        return [added(several) for several in gradients]


def added(gradients: Iterable[Gradient | None]) -> Gradient | None:
    """The sum of those that are not `None`; sparse if all are."""
    several = [gradient for gradient in gradients if gradient is not None]
    if len(several) < 2:
        return several[0] if several else None
    if all(isinstance(gradient, tf.IndexedSlices) for gradient in several):
        return tf.IndexedSlices(
            tf.concat([gradient.values for gradient in several], axis=0),
            tf.concat([tf.cast(gradient.indices, tf.int64) for gradient in several], axis=0),
            dense_shape=several[0].dense_shape,
        )
    return tf.add_n([tf.convert_to_tensor(gradient) for gradient in several])


def _masked(gradient: tf.Tensor, within: tf.Tensor) -> tf.Tensor:
    shape = [-1] + [1] * (gradient.shape.rank - 1)
    return gradient * tf.cast(tf.reshape(within, shape), gradient.dtype)


def _name(use: Use) -> str:
    return f"{use.layer.name} ({type(use.layer).__name__})"
