"""From a recording to gradients and norms, by the rules of layers or one example at a time."""

import dataclasses
from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.aggregation.sparse import merge_repeated_indices
from tf_lbopt.per_example.chunks import squares_and_sum
from tf_lbopt.per_example.contributions import Contribution, known_size
from tf_lbopt.per_example.recording import Recording, Use
from tf_lbopt.per_example.registry import LayerCall
from tf_lbopt.rules.norms import Gradient, compute_dtype


@dataclasses.dataclass(frozen=True)
class _Pass:
    """From where a backward pass starts, and where it ends.

    Attributes:
        outputs: Tensors with one row per example.
        gradients: Of the losses with respect to them.
        reads: Pairs of a variable's index and what was read in its place.
    """

    outputs: Sequence[tf.Tensor]
    gradients: Sequence[tf.Tensor]
    reads: Sequence[tuple[int, tf.Tensor]]

    def ending_at(self, indices: set[int]) -> "_Pass":
        """The pass for some variables."""
        return dataclasses.replace(self, reads=[read for read in self.reads if read[0] in indices])


class Backward:
    """One backward pass over a recorded forward pass, and the norms from it.

    The norms of a variable are those of the rules, if all layer calls that read it have one that
    applies. Otherwise they take a backward pass for each example, through the calls that read the
    variable; if it is read outside any layer's call, or by one whose outputs do not have one row
    per example, from the losses on.

    Args:
        variables: The variables of the recording.
        recording: Of the forward pass.
        losses: The examples' losses, [batch].
        subset: Norms of only so many examples, from the first; `None` means of all.

    Attributes:
        gradients: Of the sum of the losses, one per variable; `None` where there is none.
        without_rule: Names of what no rule covers, after `norms`.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        recording: Recording,
        losses: tf.Tensor,
        subset: int | None = None,
    ):
        self._variables = variables
        self._index = {id(variable): i for i, variable in enumerate(variables)}
        self._tape, self._uses = recording.tape, recording.uses
        self._losses = losses
        self._batch = losses.shape[0]
        if subset is not None and self._batch is not None and subset >= self._batch:
            subset = None
        self._subset = subset
        self._stored = [_compat.stored_value(variable) for variable in variables]
        of_stored, of_reads, of_outputs = self._tape.gradient(
            losses, (self._stored, self._reads(), [use.outputs for use in self._uses])
        )
        self.gradients = self._totals(of_stored, of_reads)
        self.without_rule: list[str] = []
        self._read_outside = {i for i, gradient in enumerate(of_stored) if gradient is not None}
        self._live = []
        for use, given in zip(self._uses, of_outputs, strict=True):
            pairs = [pair for pair in zip(use.outputs, given, strict=True) if pair[1] is not None]
            if pairs:
                outputs, gradients = zip(*pairs, strict=True)
                self._live.append((use, _Pass(outputs, gradients, list(use.reads.items()))))

    def gradients_of(self, loss: tf.Tensor) -> list[Gradient | None]:
        """The gradients of another loss of the same forward pass, one per variable."""
        return self._totals(*self._tape.gradient(loss, (self._stored, self._reads())))

    def norms(self) -> list[tf.Tensor]:
        """The norms of the gradients of the losses, [batch] or [subset], one per variable.

        Replaces `gradients` where the norms give them as well, so that what the tape would do for
        them need not be run.
        """
        parts, passes = self._parts_and_passes()
        squares = self._one_at_a_time(passes)
        before: list[tf.Tensor] = []
        for index in self._in_backward_order(set(parts) - set(squares)):
            # In a graph nothing else would keep several layers from taking their memory at once.
            with tf.control_dependencies(before):
                before = self._by_rules(index, parts[index])
            squares[index] = before[0]
        return [self._norms(index, squares.get(index)) for index in range(len(self._variables))]

    def _parts_and_passes(self) -> tuple[dict[int, list[Contribution]], list[_Pass]]:
        """What the rules contribute to each variable, and the passes for what they do not cover."""
        parts: dict[int, list[Contribution]] = {}
        passes: list[_Pass] = []
        from_losses, from_outputs = set(self._read_outside), set[int]()
        for index in self._read_outside:
            self.without_rule.append(f"{self._variables[index].path} (read outside its layer)")
        for use, whole in self._live:
            covered: dict[int, Contribution] = {}
            rows = use.rows is not False and all(has_rows(o, self._batch) for o in whole.outputs)
            if rows:
                whole = self._with_rows(use, whole)
                passes.append(whole)
                covered = self._contributions(use, whole.gradients[0])
            if use.registration is None:
                self.without_rule.append(_name(use))
            for index in use.reads:
                if index in covered:
                    parts.setdefault(index, []).append(covered[index])
                elif use.registration is None:
                    (from_outputs if rows else from_losses).add(index)
                else:
                    self.without_rule.append(f"{self._variables[index].path} in {_name(use)}")
                    # An activation may have read it, past the output that the rule is given.
                    activation = use.registration.activation is not None
                    (from_outputs if rows and not activation else from_losses).add(index)
        from_outputs -= from_losses
        passes = [one.ending_at(from_outputs) for one in passes]
        reads = [read for _, whole in self._live for read in whole.reads]
        reads += enumerate(self._stored)
        losses = _Pass([self._losses], [tf.ones_like(self._losses)], reads)
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
            gradients = [tf.identity(gradient) for gradient in whole.gradients]
        return dataclasses.replace(whole, gradients=gradients)

    # -- by rules ----------------------------------------------------------------------------------

    def _contributions(self, use: Use, gradient: tf.Tensor) -> dict[int, Contribution]:
        """What the rule says of the variables that the call read; nothing if none applies."""
        if use.registration is None:
            return {}
        # What a rule makes of the inputs would else be made, and held, from the forward pass on.
        with tf.control_dependencies([gradient]):
            args, kwargs = keras.tree.map_structure(
                lambda x: tf.identity(x) if isinstance(x, tf.Tensor) else x,
                (use.args, dict(use.kwargs)),
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
                self._check_shape(use, variable, value)
                value = Contribution((value,), lambda own: own, known_size(variable.shape))
            if all(has_rows(tensor, self._batch) for tensor in value.tensors):
                contributions[index] = value
        return contributions

    def _check_shape(self, use: Use, variable: keras.Variable, value: tf.Tensor) -> None:
        if not value.shape.is_compatible_with([self._batch, *variable.shape]):
            raise ValueError(
                f"The rule for {type(use.layer).__name__} must return, for {variable.path}, a "
                f"tensor [batch, *shape of the variable], {[self._batch, *variable.shape]}. "
                f"Received a tensor of shape {value.shape.as_list()}"
            )

    def _in_backward_order(self, indices: set[int]) -> list[int]:
        """Some variables in the order in which the backward pass is done with their uses."""
        first = {i: n for n, (use, _) in reversed(list(enumerate(self._live))) for i in use.reads}
        return sorted(indices, key=lambda index: first[index], reverse=True)

    def _by_rules(self, index: int, parts: list[Contribution]) -> list[tf.Tensor]:
        whole = parts[0].plus(parts[1:]) if len(parts) > 1 else parts[0]
        squares, *total = squares_and_sum(whole, self._variables[index].shape, self._subset)
        if total:
            self.gradients[index] = tf.cast(total[0], self._stored[index].dtype)
        return [squares, *total]

    # -- one example at a time ---------------------------------------------------------------------

    def _one_at_a_time(self, passes: Sequence[_Pass]) -> dict[int, tf.Tensor]:
        """Squared norms from passes in which only the gradients of one example's rows are left."""
        indices = sorted({index for one in passes for index, _ in one.reads})
        if not indices:
            return {}
        dtypes = [compute_dtype(self._stored[index].dtype) for index in indices]

        def squares_of(example: tf.Tensor) -> list[tf.Tensor]:
            own = tf.range(tf.shape(self._losses)[0]) == example
            parts: dict[int, list[Gradient | None]] = {index: [] for index in indices}
            for one in passes:
                received = self._tape.gradient(
                    one.outputs,
                    [read for _, read in one.reads],
                    output_gradients=[_masked(gradient, own) for gradient in one.gradients],
                )
                for (index, _), gradient in zip(one.reads, received, strict=True):
                    parts[index].append(gradient)
            return [
                _square(added(parts[index]), dtype)
                for index, dtype in zip(indices, dtypes, strict=True)
            ]

        squares = tf.map_fn(
            squares_of,
            tf.range(self._examples()),
            parallel_iterations=1,
            fn_output_signature=dtypes,
        )
        return dict(zip(indices, squares, strict=True))

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
        self,
        of_stored: Sequence[Gradient | None],
        of_reads: Sequence[Sequence[Gradient | None]],
    ) -> list[Gradient | None]:
        """For each variable the sum over all its uses."""
        gradients = [[gradient] for gradient in of_stored]
        for use, own in zip(self._uses, of_reads, strict=True):
            for index, gradient in zip(use.reads, own, strict=True):
                gradients[index].append(gradient)
        return [added(several) for several in gradients]


def has_rows(tensor: tf.Tensor, batch: int | None) -> bool:
    """Whether the first axis of a tensor is the batch, as far as static shapes tell."""
    return bool(tensor.shape.rank) and tensor.shape[0] in (None, batch)


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


def _masked(gradient: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    shape = [-1] + [1] * (gradient.shape.rank - 1)
    return tf.where(tf.reshape(rows, shape), gradient, tf.zeros_like(gradient))


def _square(gradient: Gradient | None, dtype: tf.DType) -> tf.Tensor:
    if gradient is None:
        return tf.zeros([], dtype)
    if isinstance(gradient, tf.IndexedSlices):
        gradient = merge_repeated_indices(gradient).values
    return tf.reduce_sum(tf.square(tf.cast(gradient, dtype)))


def _name(use: Use) -> str:
    return f"{use.layer.name} ({type(use.layer).__name__})"
