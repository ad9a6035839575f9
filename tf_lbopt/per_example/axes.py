"""Telling the batch from other axes that happen to be of the same size."""

import itertools
import weakref
from collections.abc import Sequence

import keras
import tensorflow as tf

from tf_lbopt.per_example.recording import Recording, Use

_known: weakref.WeakKeyDictionary[keras.layers.Layer, dict[object, list[bool]]] = (
    weakref.WeakKeyDictionary()
)


def find_rows(recording: Recording, batch: int) -> None:
    """Sets ``rows`` of every recorded call: whether its outputs have one row per example.

    Sizes alone do not tell: positions are looked up by as many numbers as there are positions, and
    a batch may have as many examples. So the model is traced, in a graph of its own, once more with
    another batch size; whatever keeps its first size is no batch. Where that fails, ``rows`` stays
    `None`.
    """
    for calls in recording.calls:
        arguments = keras.tree.flatten((calls[0].args, calls[0].kwargs))
        key = tuple(
            (*leaf.shape, leaf.dtype) if _is_tensor(leaf) else repr(leaf) for leaf in arguments
        )
        answers = _known.setdefault(calls[0].layer, {})
        if key not in answers:
            answers[key] = _traced(calls, [leaf for leaf in arguments if _is_tensor(leaf)], batch)
        if len(answers[key]) == len(calls):
            for use, rows in zip(calls, answers[key], strict=True):
                use.rows = rows


def _traced(calls: Sequence[Use], tensors: Sequence[tf.Tensor], batch: int) -> list[bool]:
    """An answer for each call, or none at all."""
    outermost = calls[0]
    shapes = [tensor.shape for tensor in tensors]
    shapes += [shape for use in calls for shape in use.shapes if shape.rank is not None]
    sizes = {size for shape in shapes for size in shape}
    other = next(size for size in itertools.count(batch + 1) if size not in sizes)
    again = Recording([])

    def call(*given: tf.Tensor) -> None:
        left = iter(given)
        args, kwargs = keras.tree.map_structure(
            lambda leaf: next(left) if _is_tensor(leaf) else leaf,
            (outermost.args, outermost.kwargs),
        )
        with keras.StatelessScope(initialize_variables=False), again.active():
            outermost.layer(*args, **kwargs)

    specs = [
        tf.TensorSpec(
            [other, *tensor.shape[1:]] if tensor.shape[:1] == [batch] else tensor.shape,
            tensor.dtype,
        )
        for tensor in tensors
    ]
    try:
        tf.function(call, autograph=False).get_concrete_function(*specs)
    except Exception:  # whatever a layer raises when its batch is another one
        return []
    seen = [use for group in again.calls for use in group]
    if [use.layer for use in seen] != [use.layer for use in calls]:
        return []
    return [
        all(bool(shape.rank) and shape[0] in (None, other) for shape in use.shapes) for use in seen
    ]


def _is_tensor(value: object) -> bool:
    return isinstance(value, tf.Tensor) and value.shape.rank is not None
