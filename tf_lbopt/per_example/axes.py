"""Telling the batch from other axes that happen to be of the same size."""

import itertools
import weakref
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt.per_example.recording import Recording, Use

_known: weakref.WeakKeyDictionary[Any, dict[Any, list[bool] | None]] = weakref.WeakKeyDictionary()


def find_rows(recording: Recording, batch: int) -> None:
    """Sets ``rows`` of every recorded call: whether its outputs have one row per example.

    Sizes alone do not tell: positions are looked up by as many numbers as there are positions, and
    a batch may have as many examples. So the model is traced, in a graph of its own, once more with
    another batch size; whatever keeps its first size is no batch. Where that fails, ``rows`` stays
    `None`.

    Args:
        recording: Of a forward pass on a batch.
        batch: Its size.
    """
    starts = [_position(recording.calls, use) for use in recording.outermost]
    for start, end in itertools.pairwise([*starts, len(recording.calls)]):
        calls = recording.calls[start:end]
        outermost = calls[0]
        answers = _known.setdefault(outermost.layer, {})
        key = _key(outermost)
        if key not in answers:
            answers[key] = _traced(calls, batch)
        answer = answers[key]
        if answer is not None and len(answer) == len(calls):
            for use, rows in zip(calls, answer, strict=True):
                use.rows = rows


def _traced(calls: list[Use], batch: int) -> list[bool] | None:
    outermost = calls[0]
    leaves = keras.tree.flatten((outermost.args, dict(outermost.kwargs)))
    shapes = [leaf.shape for leaf in leaves if _is_tensor(leaf)]
    shapes += [shape for use in calls for shape in use.shapes if shape.rank is not None]
    sizes = {size for shape in shapes for size in shape}
    other = next(size for size in itertools.count(batch + 1) if size not in sizes)
    seen: list[Use] = []

    def call(*tensors: tf.Tensor) -> None:
        given = iter(tensors)
        args, kwargs = keras.tree.map_structure(
            lambda leaf: next(given) if _is_tensor(leaf) else leaf,
            (outermost.args, dict(outermost.kwargs)),
        )
        with tf.GradientTape() as tape, keras.StatelessScope(initialize_variables=False):
            recording = Recording([], tape)
            with recording.active():
                outermost.layer(*args, **kwargs)
        seen.extend(recording.calls)

    specs = []
    for leaf in leaves:
        if _is_tensor(leaf):
            shape = leaf.shape.as_list()
            resized = [other, *shape[1:]] if shape and shape[0] == batch else shape
            specs.append(tf.TensorSpec(resized, leaf.dtype))
    try:
        tf.function(call, autograph=False).get_concrete_function(*specs)
    except Exception:  # whatever a layer raises when its batch is another one
        return None
    if [use.layer for use in seen] != [use.layer for use in calls]:
        return None
    return [
        all(bool(shape.rank) and shape[0] in (None, other) for shape in use.shapes) for use in seen
    ]


def _key(use: Use) -> Any:
    leaves = keras.tree.flatten((use.args, dict(use.kwargs)))
    return tuple(
        (tuple(leaf.shape.as_list()), leaf.dtype) if _is_tensor(leaf) else repr(leaf)
        for leaf in leaves
    )


def _position(calls: list[Use], wanted: Use) -> int:
    return next(i for i, use in enumerate(calls) if use is wanted)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and value.shape.rank is not None
