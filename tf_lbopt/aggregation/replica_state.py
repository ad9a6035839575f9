"""State that differs from replica to replica, and how it is saved."""

import abc
import io
import json
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import tensorflow as tf

from tf_lbopt.rules.norms import compute_dtype

_HEADER = "header"


class Header(TypedDict, total=False):
    """What must be known of saved state beside its values: the first two of any, others of some.

    Attributes:
        replicas: How many there were.
        complete: Whether one process had the copies of all.
        filled: As in `Accumulation`.
        steps: Micro-steps of the update under way.
        parts: Sub-batches that each replica takes one after the other.
        updates: Made since the replicas' last average.
    """

    replicas: int
    complete: bool
    filled: list[int]
    steps: int
    parts: int
    updates: int


class ReplicaState(tf.train.experimental.PythonState):
    """Mirrored variables whose copies differ.

    What files and checkpoints store of a mirrored variable is its first copy, so this object stores
    all copies itself: as an array each in Keras files, as one string in checkpoints.

    Args:
        strategy: The strategy under which the variables live.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        super().__init__()
        self._strategy = strategy
        self._pending: dict[str, np.ndarray] | None = None
        self._missed: Header | None = None
        # Whether saved state without what workers keep is followed by that (`load_part`).
        self.awaits_part = False

    @abc.abstractmethod
    def state(self) -> dict[str, tf.Variable] | None:
        """The variables by name, or ``None`` as long as they do not exist."""

    @abc.abstractmethod
    def header(self) -> Header | None:
        """What must be known of the state beside its values; ``None`` if there is none to save."""

    @abc.abstractmethod
    def accept(self, header: Header) -> bool:
        """Whether saved state with this header has a place here."""

    @abc.abstractmethod
    def lost(self, header: Header) -> None:
        """Warns that saved state had no place here."""

    def reset(self) -> None:
        """Empties all copies."""
        for copies in self._copies().values():
            for copy in copies:
                copy.assign(empty(copy.shape, copy.dtype))

    def restored(self, header: Header) -> None:
        """Called when saved values are in place."""

    def load_pending(self) -> None:
        """Restores what was loaded before the variables existed; call it when they do."""
        if self._pending is not None:
            self.load(self._pending)

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is to store: a header and every replica's copies by name, or nothing.

        Without copies where some are other workers'; each has them in its `part`.
        """
        arrays = self._stored()
        complete = not arrays or header_of(arrays)["complete"]
        return arrays if complete else {_HEADER: arrays[_HEADER]}

    def part(self) -> dict[str, np.ndarray]:
        """What `arrays` is, with the copies of this worker's replicas only."""
        return self._stored()

    def _stored(self) -> dict[str, np.ndarray]:
        if self.state() is None:
            return self._pending or {}
        header = self.header()
        if header is None:
            return {}
        copies, replicas = self._copies(), self._strategy.num_replicas_in_sync
        complete = all(len(local) == replicas for local in copies.values())
        header = {**header, "replicas": replicas, "complete": complete}
        return {
            _HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8),
            **{
                f"{name}.{replica}": tf.cast(copy, _stored_dtype(copy)).numpy()
                for name, local in copies.items()
                for replica, copy in enumerate(local)
            },
        }

    def lacks_part(self) -> bool:
        """Whether what was loaded last is without what workers keep."""
        pending = header_of(self._pending) if self._pending else None
        return self._missed is not None or (pending is not None and not pending["complete"])

    def load_part(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restores `part` after `load`; without one, says what is lost."""
        missed, self._missed = self._missed, None
        if arrays:
            self.load(arrays)
        elif missed:
            self.lost(missed)

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restores `arrays`; before the variables exist they are kept until then.

        Where they have no place (another number of replicas, say) the state is empty, with a
        warning.
        """
        if self.state() is None:
            self._pending = dict(arrays)
            return
        self._pending = self._missed = None
        self.reset()
        if not arrays:
            return
        copies = self._copies()
        header = header_of(arrays)
        names = {f"{name}.{r}" for name, local in copies.items() for r in range(len(local))}
        fits = (
            header["replicas"] == self._strategy.num_replicas_in_sync
            and self.accept(header)
            and names == set(arrays) - {_HEADER}
            and all(
                copy.shape.is_compatible_with(arrays[f"{name}.0"].shape)
                for name, (copy, *_) in copies.items()
            )
        )
        if not fits:
            if self.awaits_part and not header["complete"]:
                self._missed = header
            else:
                self.lost(header)
            return
        for name, local in copies.items():
            for replica, variable in enumerate(local):
                variable.assign(arrays[f"{name}.{replica}"])
        self.restored(header)

    def serialize(self) -> bytes:
        """What a checkpoint stores: `arrays` as one file, or nothing."""
        # Into a SavedModel nothing: TensorFlow would not restore it from there.
        arrays = self.arrays() if tf.executing_eagerly() else {}
        if not arrays:
            return b""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its stub takes all for `allow_pickle`
        return buffer.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Restores what `serialize` stored."""
        if not string_value:
            self.load({})
            return
        with np.load(io.BytesIO(string_value)) as stored:
            self.load({name: stored[name] for name in stored.files})

    def _copies(self) -> dict[str, tuple[tf.Variable, ...]]:
        return {
            name: self._strategy.experimental_local_results(variable)
            for name, variable in (self.state() or {}).items()
        }


def header_of(arrays: Mapping[str, np.ndarray]) -> Header:
    """The header that `ReplicaState.arrays` has put to the state."""
    return json.loads(np.asarray(arrays[_HEADER], np.uint8).tobytes().decode())


def empty(shape: tf.TensorShape | Sequence[int | None], dtype: tf.DType) -> tf.Tensor:
    """Zeros of a shape; nothing along dimensions of no fixed size."""
    return tf.zeros([size or 0 for size in shape], dtype)


def _stored_dtype(variable: tf.Variable) -> tf.DType:
    # NumPy files have no bfloat16.
    return compute_dtype(variable.dtype) if variable.dtype.is_floating else variable.dtype
