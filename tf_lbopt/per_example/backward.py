"""From a recording to gradients and norms, by the rules of layers or one example at a time."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.aggregation.sparse import added, merge_repeated_indices
from tf_lbopt.per_example.contributions import Contribution, known_size, squares_and_sum
from tf_lbopt.per_example.recording import Recording, Use
from tf_lbopt.per_example.registry import LayerCall
from tf_lbopt.rules.norms import Gradient, compute_dtype

# Pairs of a variable's index and a tensor that was read in its place.
_Reads: TypeAlias = Sequence[tuple[int, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class _Pass:
    """From where a backward pass starts, and where it ends.

    Attributes:
        outputs: Tensors with one row per example.
        gradients: Of the losses with respect to them.
        reads: What was read in the place of variables.
    """

    outputs: Sequence[tf.Tensor]
    gradients: Sequence[tf.Tensor]
    reads: _Reads

    def ending_at(self, indices: set[int]) -> "_Pass":
        """The pass for some variables."""
        return dataclasses.replace(self, reads=[read for read in self.reads if read[0] in indices])


class Backward:
    """One backward pass over a recorded forward pass, and the norms from it.

    The norms of a variable are those of the rules, if all layer calls that read it have one that
    applies. Otherwise they take a backward pass for each example, through the calls that read the
    variable; if it is read outside any layer's call, or by one whose outputs do not have one row
    per example, from the losses on. With a ``subset`` they are of so many examples, from the first.

    Attributes:
        gradients: Of the sum of the losses, one per variable; `None` where there is none.
        without_rule: Names of what no rule covers, after `norms`.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        recording: Recording,
        losses: tf.Tensor,
        subset: int | None,
    ):
        self._variables = variables
        self._index = {id(variable): i for i, variable in enumerate(variables)}
        self._tape = recording.tape
        self._losses = losses
        self._batch = losses.shape[0]
        if subset is not None and self._batch is not None and subset >= self._batch:
            subset = None
        self._subset = subset
        # Of how many examples there are norms.
        self._examples = keras.ops.shape(losses)[0]
        if subset is not None:
            self._examples = subset if self._batch else tf.minimum(subset, self._examples)
        self._stored = [_compat.stored_value(variable) for variable in variables]
        self._reads: _Reads = [
            *enumerate(self._stored),
            *(read for use in recording.uses for read in use.reads.items()),
        ]
        of_reads, of_outputs = self._tape.gradient(
            losses, (_tensors(self._reads), [use.outputs for use in recording.uses])
        )
        self.gradients = self._by_variable(self._reads, of_reads)
        self.without_rule: list[str] = []
        self._read_outside = {i for i in range(len(variables)) if of_reads[i] is not None}
        self._live = []
        for use, given in zip(recording.uses, of_outputs, strict=True):
            pairs = [pair for pair in zip(use.outputs, given, strict=True) if pair[1] is not None]
            if pairs:
                outputs, gradients = zip(*pairs, strict=True)
                self._live.append((use, _Pass(outputs, gradients, list(use.reads.items()))))

    def gradients_of(self, loss: tf.Tensor) -> list[Gradient | None]:
        """The gradients of another loss of the same forward pass, one per variable."""
        return self._by_variable(self._reads, self._tape.gradient(loss, _tensors(self._reads)))

    def norms(self) -> list[tf.Tensor]:
        """The norms of the gradients of the losses, [batch] or [subset], one per variable.

        Replaces `gradients` where the norms give them as well, so that what the tape would do for
        them need not be run.
        """
        parts, passes = self._parts_and_passes()
        squares = self._one_at_a_time(passes)
        before: list[tf.Tensor] = []
        # In the order in which the backward pass is done with the calls.
        for index in [index for index in reversed(parts) if index not in squares]:
            first, *others = parts[index]
            # In a graph nothing else would keep several layers from taking their memory at once.
            with tf.control_dependencies(before):
                whole = first.plus(others) if others else first
                before = squares_and_sum(whole, self._variables[index].shape, self._subset)
            squares[index], *total = before
            if total:
                self.gradients[index] = tf.cast(total[0], self._stored[index].dtype)
        none = tf.zeros([self._examples])
        return [
            tf.cast(tf.sqrt(squares.get(index, none)), compute_dtype(stored.dtype))
            for index, stored in enumerate(self._stored)
        ]

    def _parts_and_passes(self) -> tuple[dict[int, list[Contribution]], list[_Pass]]:
        """What the rules contribute to each variable, and the passes for what they do not cover."""
        parts: dict[int, list[Contribution]] = {}
        passes: list[_Pass] = []
        from_losses, from_outputs = set(self._read_outside), set[int]()
        for index in self._read_outside:
            self.without_rule.append(f"{self._variables[index].path} (read outside its layer)")
        for use, whole in self._live:
            name = f"{use.layer.name} ({type(use.layer).__name__})"
            covered: dict[int, Contribution] = {}
            rows = use.rows is not False and all(has_rows(o, self._batch) for o in whole.outputs)
            if rows:
                whole = self._with_rows(use, whole)
                passes.append(whole)
                covered = self._contributions(use, whole.gradients[0])
            if use.registration is None:
                self.without_rule.append(name)
            elif use.registration.activation is not None:
                # Which may have read what is not covered, past the output that the rule is given.
                rows = False
            for index in use.reads:
                if index in covered:
                    parts.setdefault(index, []).append(covered[index])
                    continue
                (from_outputs if rows else from_losses).add(index)
                if use.registration is not None:
                    self.without_rule.append(f"{self._variables[index].path} in {name}")
        passes = [one.ending_at(from_outputs - from_losses) for one in passes]
        losses = _Pass([self._losses], [tf.ones_like(self._losses)], self._reads)
        passes.append(losses.ending_at(from_losses))
        return parts, [one for one in passes if one.reads]

    def _with_rows(self, use: Use, whole: _Pass) -> _Pass:
        """Checks, if it can not be told before, that the outputs have as many rows as the batch."""
        if self._batch is not None and all(o.shape[0] is not None for o in whole.outputs):
            return whole
        checks = [
            tf.debugging.assert_equal(
                tf.shape(output)[0],
                tf.shape(self._losses)[0],
                message=f"The layer {use.layer.name} does not have one row per example. "
                "Per-example gradient norms need the batch as the first axis everywhere, or a "
                "batch size that is known when the function is traced (drop_remainder=True).",
            )
            for output in whole.outputs
        ]
        with tf.control_dependencies(checks):
            rows = tf.shape(self._losses)[:1]
            # XLA, which makes no assertions, can not compile this for another number of rows.
            gradients = [
                tf.reshape(
                    gradient,
                    tf.concat([rows, tf.shape(gradient)[1:]], 0),
                    name="one_row_an_example",
                )
                for gradient in whole.gradients
            ]
        return dataclasses.replace(whole, gradients=gradients)

    def _contributions(self, use: Use, gradient: tf.Tensor) -> dict[int, Contribution]:
        """What the rule says of the variables that the call read; nothing if none applies."""
        if use.registration is None:
            return {}
        # What a rule makes of the inputs would else be made, and held, from the forward pass on.
        with tf.control_dependencies([gradient]):
            args, kwargs = keras.tree.map_structure(
                lambda x: tf.identity(x) if isinstance(x, tf.Tensor) else x,
                (use.args, use.kwargs),
            )
        call = LayerCall(use.layer, args, kwargs, use.outputs[0], gradient, use.prepared)
        pairs = use.registration.rule(call)
        if pairs is NotImplemented:
            return {}
        contributions = {}
        for variable, value in pairs:
            index = self._index.get(id(variable))
            if index not in use.reads:
                continue
            if not isinstance(value, Contribution):
                shape = [self._batch, *variable.shape]
                if not value.shape.is_compatible_with(shape):
                    raise ValueError(
                        f"The rule for {type(use.layer).__name__} must return, for "
                        f"{variable.path}, a tensor [batch, *shape of the variable], {shape}. "
                        f"Received a tensor of shape {value.shape.as_list()}"
                    )
                value = Contribution((value,), lambda own: own, known_size(variable.shape))
            if all(has_rows(tensor, self._batch) for tensor in value.tensors):
                contributions[index] = value
        return contributions

    def _one_at_a_time(self, passes: Sequence[_Pass]) -> dict[int, tf.Tensor]:
        """Squared norms from passes in which only the gradients of one example's rows are left."""
        reads = [read for one in passes for read in one.reads]
        if not reads:
            return {}
        dtypes = {index: compute_dtype(self._stored[index].dtype) for index, _ in reads}

        def squares_of(example: tf.Tensor) -> list[tf.Tensor]:
            own = tf.range(tf.shape(self._losses)[0]) == example
            received: list[Gradient | None] = []
            for one in passes:
                received += self._tape.gradient(
                    one.outputs,
                    _tensors(one.reads),
                    output_gradients=[_masked(gradient, own) for gradient in one.gradients],
                )
            gradients = self._by_variable(reads, received)
            return [_square(gradients[index], dtype) for index, dtype in dtypes.items()]

        squares = tf.map_fn(
            squares_of,
            tf.range(self._examples),
            parallel_iterations=1,
            fn_output_signature=list(dtypes.values()),
        )
        return dict(zip(dtypes, squares, strict=True))

    def _by_variable(
        self, reads: _Reads, gradients: Sequence[Gradient | None]
    ) -> list[Gradient | None]:
        """For each variable the sum over what was read in its place."""
        parts: list[list[Gradient | None]] = [[] for _ in self._variables]
        for (index, _), gradient in zip(reads, gradients, strict=True):
            parts[index].append(gradient)
        return [added(several) for several in parts]


def _tensors(reads: _Reads) -> list[tf.Tensor]:
    return [tensor for _, tensor in reads]


def has_rows(tensor: tf.Tensor, batch: int | None) -> bool:
    """Whether the first axis of a tensor is the batch, as far as static shapes tell."""
    return bool(tensor.shape.rank) and tensor.shape[0] in (None, batch)


def _masked(gradient: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    shape = [-1] + [1] * (gradient.shape.rank - 1)
    return tf.where(tf.reshape(rows, shape), gradient, tf.zeros_like(gradient))


def _square(gradient: Gradient | None, dtype: tf.DType) -> tf.Tensor:
    if gradient is None:
        return tf.zeros([], dtype)
    if isinstance(gradient, tf.IndexedSlices):
        gradient = merge_repeated_indices(gradient).values
    return tf.reduce_sum(tf.square(tf.cast(gradient, dtype)))
