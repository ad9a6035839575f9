"""Watching a forward pass: which layer call reads which variable, and what it computes from it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.per_example.registry import Registration, registration_of
from tf_lbopt.per_example.view import with_attributes


@dataclasses.dataclass
class Use:
    """One call of a layer.

    Attributes:
        layer: The layer.
        args: The positional arguments of its ``call``.
        kwargs: The keyword arguments.
        registration: The rule for it, or `None`.
        reads: For each variable that was read, by its index, the tensor that was read in its place.
            Nothing but this call uses that tensor.
        outputs: Tensors through which all that the call computed reaches the loss: what a rule
            wants the gradient of, or all that the call returned.
        prepared: What the registration's ``prepare`` returned.
        shapes: Of the tensors that the call returned.
        rows: Whether the first axis of the outputs is the batch, `None` where it can not be told.
    """

    layer: keras.layers.Layer
    args: tuple[object, ...]
    kwargs: dict[str, object]
    registration: Registration | None
    reads: dict[int, tf.Tensor] = dataclasses.field(default_factory=dict)
    outputs: list[tf.Tensor] = dataclasses.field(default_factory=list)
    prepared: object = None
    shapes: list[tf.TensorShape] = dataclasses.field(default_factory=list)
    rows: bool | None = None


class Recording:
    """Records the uses of some variables during a forward pass, in the thread that enters it.

    While a layer's ``call`` runs, every read of a variable yields a copy that is cut off from the
    variable and watched by the tape. So the tape tells the gradient that passes through each call,
    and a gradient of the variable itself is the sign of a read outside any layer's call.

    Attributes:
        tape: A persistent tape, active with the recording.
        calls: Lists of calls in the order in which they began, each of a call that was not made by
            another layer and all that it made.
        uses: The calls that read some of the variables.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self.tape = tf.GradientTape(persistent=True)
        self.calls: list[list[Use]] = []
        self.uses: list[Use] = []
        self._index = {id(variable): i for i, variable in enumerate(variables)}
        self._stack: list[Use] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Records until it is left."""
        self._graph = _current_graph()
        with self.tape, _compat.layer_hooks(self._call, self._read):
            yield

    def _call(
        self,
        original: Callable[..., object],
        layer: keras.layers.Layer,
        /,
        *args: object,
        **kwargs: object,
    ) -> object:
        if (
            not isinstance(layer, keras.layers.Layer)
            or _current_graph() is not self._graph
            or any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten((args, kwargs)))
            # A rule answers for all that its layer calls.
            or (self._stack and self._stack[-1].registration is not None)
        ):
            return original(layer, *args, **kwargs)
        registration = registration_of(layer) if _compat.calls_its_call(layer) else None
        use = Use(layer, args, kwargs, registration)
        if not self._stack:
            self.calls.append([])
        self.calls[-1].append(use)
        self._stack.append(use)
        try:
            if registration is not None and registration.activation is not None:
                outputs = self._call_up_to_activation(use, registration.activation)
            else:
                outputs = original(layer, *args, **kwargs)
            if registration is not None and registration.prepare is not None:
                with self.tape.stop_recording():
                    use.prepared = registration.prepare(layer, args, kwargs)
        finally:
            self._stack.pop()
        use.shapes = [t.shape for t in keras.tree.flatten(outputs) if isinstance(t, tf.Tensor)]
        if use.reads:
            self.uses.append(use)
            if not use.outputs:
                return _marked(use, outputs)
        return outputs

    def _call_up_to_activation(self, use: Use, name: str) -> object:
        activation = getattr(use.layer, name)
        if activation is None:
            activation = keras.activations.linear

        def applied(outputs: tf.Tensor) -> tf.Tensor:
            use.outputs.append(outputs)
            return activation(outputs)

        # Keras convolves in a function of its own in places: what that reads is a tensor already.
        tensors = {
            attribute: functools.partial(tf.convert_to_tensor, value)
            for attribute, value in vars(use.layer).items()
            if isinstance(value, keras.Variable) and value.trainable
        }
        view = with_attributes(use.layer, {**tensors, name: lambda: applied})
        outputs = view.call(*use.args, **use.kwargs)
        if len(use.outputs) != 1:  # the activation is not applied last, or not once
            use.registration, use.outputs = None, []
        return outputs

    def _read(self, variable: keras.Variable) -> tf.Tensor | None:
        index = self._index.get(id(variable))
        if index is None or not self._stack:
            return None
        reads = self._stack[-1].reads
        if _current_graph() is self._graph:
            graph: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        elif self._graph is not None and _compat.inside_control_flow_of(self._graph):
            # A loop body or branch may use tensors of the graph around it.
            graph = self._graph.as_default()
        else:
            # What a tf.function captures may outlive this pass, so it reads the variable itself.
            return None
        with graph:
            if index not in reads:
                copy = tf.stop_gradient(tf.convert_to_tensor(_compat.stored_value(variable)))
                self.tape.watch(copy)
                if not _compat.is_recorded(copy):
                    return None
                reads[index] = copy
            return reads[index]


def _marked(use: Use, outputs: object) -> object:
    """The outputs as tensors that nothing inside the call has used; ``use`` is told of them."""
    if not isinstance(outputs, tf.Tensor):
        use.registration = None

    def mark(tensor: object) -> object:
        if not isinstance(tensor, tf.Tensor):
            return tensor
        # A rule is for what the layer returns; logits apart from it would pass it by.
        copies = _compat.copies(tensor, with_logits=use.registration is None)
        use.outputs += copies
        return copies[0]

    return keras.tree.map_structure(mark, outputs)


def _current_graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
