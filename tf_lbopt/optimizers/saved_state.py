"""An optimizer's state in a file or a checkpoint, and whose state it is.

Keras numbers an optimizer's variables, in a file, and compares no more than how many there are. So
a class's state that has as many variables as another's would be loaded for it. Here their number,
their shapes and the class are compared before anything is loaded.
"""

import json
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.aggregation.replica_state import ReplicaState
from tf_lbopt.optimizers.trained import Variable

# In a Keras file.
_KIND = "kind"
_PENDING = "pending_micro_steps"
# In what is saved beside the variables.
_STEPS = "accumulation_steps"
_SWAPPED = "averages_are_swapped"
# In a checkpoint.
_KIND_ATTRIBUTE = "_kind"


class Store(Protocol):
    """Where Keras saves what an object consists of: an entry of a file, or a dictionary."""

    def keys(self) -> Iterable[str]:
        """The names of what is in it."""

    def __getitem__(self, key: str, /) -> object: ...

    def __setitem__(self, key: str, value: np.ndarray, /) -> None: ...


class SavedState(_compat.CheckedBeforeRestoring):
    """Mix-in of an optimizer of Keras or tf_keras: saves its state, and refuses that of others."""

    _pending_micro_steps: Variable | None = None
    """The variable that counts them, if the optimizer accumulates and is built."""

    refused_state = False
    """Whether the state of another optimizer was the last to be loaded from a Keras file."""

    def _let_checkpoints_say_whose(self) -> None:
        """To be called in the constructor, when there is an optimizer of the framework."""
        setattr(self, _KIND_ATTRIBUTE, _Kind(self))

    def _replica_states(self) -> dict[str, ReplicaState]:
        """What differs from replica to replica, by the name under which it is saved."""
        return {}

    def _assigned_steps(self) -> int:
        """What `accumulation_steps` was set to, or 0."""
        return 0

    def _restore_assigned_steps(self, steps: int) -> None:
        """Sets it to what was saved, or 0."""

    averages_are_swapped = False
    """Whether the weights are in the place of their averages, and these in theirs."""

    def _restore_swapped(self, swapped: bool) -> None:
        """Notes whether they were when this state was saved."""
        self.averages_are_swapped = swapped

    def save_own_variables(self, store: Store) -> None:
        """Keras saving: all variables and what is each replica's own."""
        # An array for each replica, too: an array can not be larger than a shard of a file.
        for number, variable in enumerate(_numbered(self)):
            store[str(number)] = variable.numpy()
        store[_KIND] = np.frombuffer(_described(self).encode(), np.uint8)
        if self._pending_micro_steps is not None:
            store[_PENDING] = self._pending_micro_steps.numpy()
        for prefix, state in self._replica_states().items():
            for name, array in state.arrays().items():
                store[f"{prefix}.{name}"] = array

    def load_own_variables(self, store: Store) -> None:
        """Keras loading, of what `save_own_variables` saved.

        Raises:
            ValueError: It is the state of another optimizer, or of one for other shapes; nothing
                is loaded then. With fewer or more variables it is a warning.
        """
        arrays = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118  # no mapping
        kind = json.loads(arrays[_KIND].tobytes()) if _KIND in arrays else {}
        found = [arrays[key] for key in map(str, range(len(arrays))) if key in arrays]
        problem = _mismatch(
            self, kind.get("class") or _compat.saved_name(store), [array.shape for array in found]
        )
        self.refused_state = bool(problem)
        if problem:
            # As Keras does: a model's weights are good without the state of its optimizer, which
            # had no variables yet, or others, because a layer was trained that is frozen now.
            own = kind.get("class") == _kind_of(self) and len(found) != len(_numbered(self))
            built = self.built and kind.get("built", True)  # type: ignore[attr-defined]
            if arrays and built and not own:
                raise ValueError(problem)
            warnings.warn(problem, stacklevel=2)
            return
        self._restore_assigned_steps(kind.get(_STEPS, 0))
        self._restore_swapped(kind.get(_SWAPPED, False))
        for variable, array in zip(_numbered(self), found, strict=True):
            variable.assign(array)
        # That of one inside is not in this store. A file has it, and Keras loads it after this.
        for pending in _pending_counts(self):
            own = pending is self._pending_micro_steps
            pending.assign(arrays.get(_PENDING, 0) if own else 0)
        for prefix, state in self._replica_states().items():
            start = f"{prefix}."
            state.load(
                {key[len(start) :]: array for key, array in arrays.items() if key.startswith(start)}
            )

    def check_checkpoint(self, children: set[str]) -> None:
        """Refuses what is no state of this package; see `_compat.CheckedBeforeRestoring`."""
        if _KIND_ATTRIBUTE not in children:
            raise ValueError(_mismatch(self, None, None))


class _Kind(tf.train.experimental.PythonState):
    """Has a checkpoint say whose state it is, and refuses that of another optimizer."""

    def __init__(self, optimizer: SavedState):
        super().__init__()
        self._optimizer = weakref.ref(optimizer)

    def serialize(self) -> str:
        """The optimizer's class and its variables' shapes."""
        return _described(self._optimizer())

    def deserialize(self, string_value: bytes) -> None:
        """Compares. TensorFlow calls this before it restores a variable.

        Raises:
            ValueError: It is another optimizer, or one for other variables.
        """
        optimizer: Any = self._optimizer()
        saved = json.loads(string_value)
        shapes = [tuple(shape) for shape in saved["shapes"]]
        if not (optimizer.built and saved["built"]):
            # One of them has no slots yet; TensorFlow restores the others when they are there.
            shapes = _shapes(optimizer)
        problem = _mismatch(optimizer, saved["class"], shapes)
        if problem:
            raise ValueError(problem)
        optimizer._restore_assigned_steps(saved.get(_STEPS, 0))
        optimizer._restore_swapped(saved.get(_SWAPPED, False))
        if optimizer._pending_micro_steps is not None and not saved["accumulates"]:
            # Nothing else tells: a checkpoint without the count leaves it as it is.
            optimizer._pending_micro_steps.assign(0)


def _described(optimizer: Any) -> str:
    """What is saved of an optimizer beside its variables, as JSON."""
    steps = optimizer._assigned_steps()
    return json.dumps(
        {
            "class": _kind_of(optimizer),
            "built": bool(optimizer.built),
            "shapes": _shapes(optimizer),
            "accumulates": optimizer._pending_micro_steps is not None,
            **({_STEPS: steps} if steps else {}),
            **({_SWAPPED: True} if optimizer.averages_are_swapped else {}),
        }
    )


def _kind_of(optimizer: object) -> str:
    """An optimizer's class, and in parentheses that of the one inside."""
    inner = getattr(optimizer, "inner_optimizer", None)
    name = type(optimizer).__name__
    return name if inner is None else f"{name}({_kind_of(inner)})"


def _mismatch(optimizer: Any, kind: str | None, found: Sequence[tuple[int, ...]] | None) -> str:
    """What is wrong with saved state, or nothing.

    Args:
        optimizer: For which it is to be loaded.
        kind: The `_kind_of` the optimizer whose state it is, or what is known of it.
        found: The shapes that were saved, if they are known.
    """
    own, expected = _kind_of(optimizer), _shapes(optimizer)
    if kind == own and expected == found:
        return ""
    received = "" if found is None else f", {_counted(found)}"
    return (
        f"The saved state is not that of this {own}, and nothing of it was loaded. To have a "
        "model's weights without it, give Keras `skip_mismatch=True`, leave the optimizer out of "
        "the `tf.train.Checkpoint`, or load before `compile`. "
        f"Expected: {own}, {_counted(expected)}. Received: {kind or 'unknown class'}{received}"
    )


def _counted(shapes: Sequence[tuple[int, ...]]) -> str:
    return f"{len(shapes)} variables of shapes {_validation.listed(shapes)}"


def _shapes(optimizer: Any) -> list[tuple[int, ...]]:
    return [tuple(variable.shape) for variable in _numbered(optimizer)]


def _numbered(optimizer: Any) -> list[Variable]:
    """The variables but the count of pending micro-steps, which only some optimizers have.

    So that training can go on with accumulation where it was without, and the other way round.
    """
    pending = _pending_counts(optimizer)
    return [v for v in optimizer.variables if not any(v is one for one in pending)]


def _pending_counts(optimizer: object) -> list[Variable]:
    """The counts of pending micro-steps that an optimizer, and one inside it, have."""
    both = (optimizer, getattr(optimizer, "inner_optimizer", None))
    counts = [one._pending_micro_steps for one in both if isinstance(one, SavedState)]
    return [count for count in counts if count is not None]
