"""An optimizer's state in a Keras file, and whose state it is.

Keras numbers an optimizer's variables, in a file, and compares no more than how many there are. So
a class's state that has as many variables as another's would be loaded for it. Here their number,
their shapes and the class are compared before anything is loaded.
"""

import json
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.distribution.replica_state import ReplicaState

_KIND = "kind"
KIND_ATTRIBUTE = "_kind"
"""Under which an optimizer has its `Kind`."""

_PENDING = "pending_micro_steps"


def kind_of(optimizer: Any) -> str:
    """An optimizer's class, and in parentheses that of the one inside."""
    inner = getattr(optimizer, "inner_optimizer", None)
    name = type(optimizer).__name__
    return name if inner is None else f"{name}({kind_of(inner)})"


class Kind(tf.train.experimental.PythonState):
    """Has a checkpoint say whose state it is, and refuses that of another optimizer.

    Args:
        optimizer: Whose state it is.
    """

    def __init__(self, optimizer: Any):
        super().__init__()
        self._optimizer = weakref.ref(optimizer)

    def serialize(self) -> str:
        """The `kind_of` the optimizer."""
        return kind_of(self._optimizer())

    def deserialize(self, string_value: bytes) -> None:
        """Compares. TensorFlow calls this before it restores a variable.

        Raises:
            ValueError: It is another.
        """
        kind, own = string_value.decode(), kind_of(self._optimizer())
        if kind != own:
            raise ValueError(
                f"The checkpoint has the state of another optimizer, and nothing was restored. "
                f"Expected: {own}. Received: {kind}"
            )


def check_checkpoint(optimizer: Any, children: set[str], shapes: Sequence[tuple[int, ...]]) -> None:
    """Compares what a checkpoint has for an optimizer, but for the class, with its variables.

    Args:
        optimizer: Of Keras or tf_keras.
        children: The names of what the saved optimizer had.
        shapes: Of its variables, without the count of pending micro-steps.

    Raises:
        ValueError: It is the state of an optimizer that is none of this package, or of one with
            other variables.
    """
    pending = _pending(optimizer)
    expected = [tuple(v.shape) for v in _compat.own_variables(optimizer) if v is not pending]
    ours = KIND_ATTRIBUTE in children
    # Either may be from before its `build`; TensorFlow restores the rest when it is there.
    fits = expected == list(shapes) or expected[: optimizer.variables_before_build] == list(shapes)
    if ours and (fits or not optimizer.built):
        return
    kind = type(optimizer).__name__
    raise ValueError(
        f"The checkpoint has other state than that of this {kind}, and nothing was restored. To "
        "restore a model alone, leave its optimizer out of the `tf.train.Checkpoint`, or restore "
        f"before `compile`. Expected: {kind}, {_listed(expected)}. Received: "
        f"{'other variables' if ours else 'an optimizer of unknown class'}, {_listed(shapes)}"
    )


def save(optimizer: Any, store: Any, states: Mapping[str, ReplicaState]) -> None:
    """Puts an optimizer's state into a store.

    An array for each variable and replica: an array can not be larger than a shard of a file.

    Args:
        optimizer: Of Keras or tf_keras.
        store: A mapping as `save_own_variables` gets it.
        states: What differs from replica to replica, by name.
    """
    for number, variable in enumerate(_numbered(optimizer)):
        store[str(number)] = variable.numpy()
    kind = {"class": kind_of(optimizer), "built": bool(optimizer.built)}
    store[_KIND] = np.frombuffer(json.dumps(kind).encode(), np.uint8)
    pending = _pending(optimizer)
    if pending is not None:
        store[_PENDING] = pending.numpy()
    for prefix, state in states.items():
        for name, array in state.arrays().items():
            store[f"{prefix}.{name}"] = array


def load(optimizer: Any, store: Any, states: Mapping[str, ReplicaState]) -> None:
    """Loads what `save` has put into a store.

    Args:
        optimizer: Of Keras or tf_keras.
        store: A mapping as `load_own_variables` gets it.
        states: As in `save`.

    Raises:
        ValueError: It is the state of another optimizer, or of one for other variables; nothing is
            loaded then.
    """
    arrays = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118  # no mapping
    kind = json.loads(arrays[_KIND].tobytes()) if _KIND in arrays else {}
    variables = _numbered(optimizer)
    found = [arrays[key] for key in map(str, range(len(arrays))) if key in arrays]
    problem = mismatch(
        optimizer,
        [tuple(variable.shape) for variable in variables],
        kind.get("class") or _compat.saved_name(store),
        [array.shape for array in found],
    )
    if problem:
        # Keras takes a model's weights from a file before its optimizer has variables, or had any.
        if arrays and optimizer.built and kind.get("built", True):
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=3)
        return
    for variable, array in zip(variables, found, strict=True):
        variable.assign(array)
    pending = _pending(optimizer)
    if pending is not None:
        pending.assign(arrays.get(_PENDING, np.zeros([], "int64")))
    for prefix, state in states.items():
        start = f"{prefix}."
        state.load(
            {key[len(start) :]: array for key, array in arrays.items() if key.startswith(start)}
        )


def mismatch(
    optimizer: Any,
    expected: Sequence[tuple[int, ...]],
    kind: str | None,
    found: Sequence[tuple[int, ...]],
) -> str:
    """What is wrong with saved state, or nothing.

    Args:
        optimizer: For which it is to be loaded.
        expected: The shapes of its variables.
        kind: The `kind_of` the optimizer whose state it is, or what is known of it.
        found: The shapes that were saved.
    """
    own = kind_of(optimizer)
    if kind == own and list(expected) == list(found):
        return ""
    return (
        f"The saved state is not that of this {own}, and nothing of it was loaded. To load a "
        "model's weights without it, give Keras `skip_mismatch=True`, or load them before "
        f"`compile`. Expected: {own}, {_listed(expected)}. Received: {kind or 'unknown class'}, "
        f"{_listed(found)}"
    )


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    text = ", ".join(str(tuple(shape)) for shape in shapes[:12])
    return f"{len(shapes)} variables of shapes {text}{', ...' if len(shapes) > 12 else ''}"


def _pending(optimizer: Any) -> Any:
    return getattr(optimizer, "_pending_micro_steps", None)


def _numbered(optimizer: Any) -> list[Any]:
    """The variables but the count of pending micro-steps, which only some optimizers have.

    So that training can go on with accumulation where it was without, and the other way round.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    pending = [_pending(optimizer), _pending(inner)]
    return [v for v in optimizer.variables if not any(v is one for one in pending)]
