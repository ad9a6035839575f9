"""Checkpoints: to begin from, and to go on from, also with another optimizer.

TensorFlow restores what fits and says nothing of the rest. Here what does not fit is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.remote import reach

_INIT_FIELD = "task.init_checkpoint"
_KIND_KEY = "optimizer_kind/.ATTRIBUTES/py_state"
_NAMES_SHOWN = 3
_SLOT_KEY = re.compile(r"(optimizer/(?:\w+/)?)_variables/(\d+)/\.ATTRIBUTES/VARIABLE_VALUE")
# Whose momentum is the velocity of Keras's SGD: the last step's part that goes on.
_WITH_VELOCITY = ("sgd", "momentum", "nesterov", "vr_momentum", "lars", "vr_lars", "clars")
_UNREADABLE = (tf.errors.OpError, ValueError, IndexError, RuntimeError)


class MismatchError(ValueError):
    """A checkpoint is another model's, or can not be read."""


class OptimizerKind(tf.train.experimental.PythonState):
    """The name of the optimizer, as a part of the checkpoints that it trains.

    Args:
        name: The name in the registration.
    """

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def serialize(self) -> str:
        """What the checkpoint stores."""
        return self._name

    def deserialize(self, string_value: bytes) -> None:
        """Does nothing: the name is compared before anything is restored."""


# -- to begin from ---------------------------------------------------------------------------------


def find_checkpoint(given: str) -> str:
    """The path of the checkpoint that `task.init_checkpoint` names.

    Args:
        given: That path, or a folder, of which it is the latest.

    Raises:
        FlagValueError: There is none.
    """
    expected = f"{_INIT_FIELD}: a checkpoint, or a run's model_dir"

    def find(given: str) -> str | None:
        found = tf.train.latest_checkpoint(given) if tf.io.gfile.isdir(given) else given
        return found if found and tf.io.gfile.exists(f"{found}.index") else None

    found = reach("params_override", expected, given, find)
    if found is None:
        raise FlagValueError("params_override", expected, repr(given))
    return found


def initialize(given: str, items: dict[str, Any], alone: dict[str, Any] | None = None) -> None:
    """Gives a new model the weights of a checkpoint, which must have all of them.

    Args:
        given: The value of `task.init_checkpoint`.
        items: What to restore, by its name in the checkpoint.
        alone: What to restore instead where the checkpoint has no ``model``, as one of an encoder.

    Raises:
        FlagValueError: There is no checkpoint, or it is another model's.
    """
    path = find_checkpoint(given)
    try:
        if alone is not None and not _has_model(path):
            items = alone
        _match(path, _read(tf.train.Checkpoint(**items), path))
    except MismatchError as error:
        raise _other_model(error) from error
    print(f"initialized from checkpoint: {path}")


def restore_model(model: Any, path: str) -> None:
    """Gives a model the weights of a run's checkpoint, which must have all of them.

    Args:
        model: Of the run.
        path: The checkpoint.

    Raises:
        FlagValueError: It is another model's, or can not be read.
    """
    try:
        _match(path, _read(tf.train.Checkpoint(model=model), path))
    except MismatchError as error:
        raise FlagValueError(
            "model_dir", "a folder with checkpoints of this model, with the run's parameters", error
        ) from error


def begin(initialize: Callable[[], None], given: str) -> None:
    """Calls a task's own way to begin, also that of a task of tf-models.

    Args:
        initialize: The task's method.
        given: The value of `task.init_checkpoint`, for errors.

    Raises:
        FlagValueError: It can not begin with that.
    """
    try:
        initialize()
    except FlagValueError:
        raise
    except AssertionError as error:
        raise _other_model(f"{given}, which {_lack(error)}") from error
    except _UNREADABLE as error:
        raise _other_model(f"{given}: {_first_line(error)}") from error


def _other_model(received: object) -> FlagValueError:
    return FlagValueError(
        "params_override", f"{_INIT_FIELD}: a checkpoint of the same model", received
    )


def _has_model(path: str) -> bool:
    try:
        return any(name.startswith("model/") for name, _ in tf.train.list_variables(path))
    except _UNREADABLE as error:
        raise MismatchError(f"{path}, which can not be read: {_first_line(error)}") from error


# -- to go on from ---------------------------------------------------------------------------------


class Resumption:
    """Restores a trainer from a checkpoint of its model_dir, if that is of the same run.

    Args:
        trainer: tf-models' trainer.
        model_dir: The folder, for errors.
        kind: The name of the optimizer, or ``None`` where none is needed, as in evaluation.
        new_optimizer: Whether an optimizer may begin anew where the checkpoint is of another one.

    Attributes:
        recorded: The optimizer that the last checkpoint names, or ``None``.
    """

    def __init__(self, trainer: Any, model_dir: str, kind: str | None, new_optimizer: bool):
        self._trainer = trainer
        self._model_dir = model_dir
        self._kind = kind
        self._new_optimizer = new_optimizer
        self._path = ""
        self.recorded: str | None = None
        self._status: Any = None
        self._begins_anew = False

    def restore(self, path: str) -> None:
        """Restores step, model and optimizer; call `check` when the optimizer has its variables.

        Args:
            path: The checkpoint.

        Raises:
            FlagValueError: It is another model's or another optimizer's, or can not be read.
        """
        self._path, self._status, self._begins_anew = path, None, False
        self.recorded = recorded = self._recorded()
        if None not in (self._kind, recorded) and recorded != self._kind:
            if not self._new_optimizer:
                raise self._other_optimizer(f"of {recorded}")
            self._begin_anew()
            return
        try:
            self._status = _read(self._trainer.checkpoint, path)
        except MismatchError as error:
            self._restore_model()  # Or else it is the model's.
            if self._kind is None:
                return
            if not self._new_optimizer:
                raise self._other_optimizer(str(error)) from error
            self._begin_anew()

    def check(self) -> None:
        """Checks that the checkpoint had everything that there is; new ones name the optimizer.

        Raises:
            FlagValueError: It had not.
        """
        if self._status is not None:
            try:
                _match(self._path, self._status)
            except MismatchError as error:
                self._restore_model()  # Or else it is the model's.
                self._tell_or_raise(error)
            self._status = None
        if self._begins_anew:
            self._take_velocity()
            self._begins_anew = False
        if self._kind is not None:
            self._trainer.checkpoint.optimizer_kind = OptimizerKind(self._kind)

    def _begin_anew(self) -> None:
        self._restore_model()
        self._begins_anew = True
        step = self._trainer.global_step
        for optimizer in optimizers_of(self._trainer.optimizer):
            optimizer.iterations.assign(tf.cast(step, optimizer.iterations.dtype))

    def _take_velocity(self) -> None:
        former, kind = self.recorded or "another one", self._kind or ""
        begins = f"the optimizer {kind} begins at step {self._trainer.global_step.numpy()}"
        one, *more = optimizers_of(self._trainer.optimizer)
        if not more and take_velocity(self._path, former, one, kind):
            print(f"{begins} with the momentum of {former}, of which the checkpoint is")
        else:
            print(f"{begins} without a past: the checkpoint is of {former}")

    def _tell_or_raise(self, error: MismatchError) -> None:
        if self._kind is None:
            return
        # The same optimizer has more variables with other arguments, or with sub-batches.
        if self._new_optimizer or self.recorded == self._kind:
            print(f"variables of the optimizer begin anew: {error}")
            return
        raise self._other_optimizer(str(error)) from error

    def _recorded(self) -> str | None:
        try:
            reader = tf.train.load_checkpoint(self._path)
            return reader.get_tensor(_KIND_KEY).decode() if reader.has_tensor(_KIND_KEY) else None
        except _UNREADABLE as error:
            raise FlagValueError(
                "model_dir",
                "a folder whose last checkpoint can be read",
                f"{self._path}: {_first_line(error)}",
            ) from error

    def _restore_model(self) -> None:
        trainer = self._trainer
        saved = tf.train.Checkpoint(global_step=trainer.global_step, model=trainer.model)
        try:
            _match(self._path, _read(saved, self._path))
        except MismatchError as error:
            raise FlagValueError(
                "model_dir", "a new folder, or one with checkpoints of the same model", error
            ) from error

    def _other_optimizer(self, received: str) -> FlagValueError:
        return FlagValueError(
            "model_dir",
            f"a new folder, or one with checkpoints of the same optimizer, {self._kind} (or "
            f"--new_optimizer, to go on with this one)",
            received if self._path in received else f"{self._path} {received}",
        )


def take_velocity(path: str, former: str, optimizer: Any, kind: str) -> bool:
    """Gives an optimizer the momentum of another one, if both mean the same by it.

    Args:
        path: A checkpoint.
        former: The name of the optimizer that it is of, in the registration or of Keras.
        optimizer: With its variables, which are of the checkpoint's model.
        kind: Its name.

    Returns:
        Whether it was given it.
    """
    if not {former.removeprefix("lbopt_"), kind.removeprefix("lbopt_")} <= {*_WITH_VELOCITY}:
        return False
    variables = optimizer.variables
    slots = [
        variable
        for variable in (variables() if callable(variables) else variables)
        if re.search(r"_momentum$|^momentum/", getattr(variable, "path", variable.name))
    ]
    reader = tf.train.load_checkpoint(path)
    keys: dict[str, list[tuple[int, str]]] = {}  # of an optimizer, or of one around it
    for key in reader.get_variable_to_shape_map():
        if match := _SLOT_KEY.fullmatch(key):
            keys.setdefault(match[1], []).append((int(match[2]), key))
    shapes = [tuple(slot.shape) for slot in slots]
    for numbered in keys.values():
        values = [reader.get_tensor(key) for _, key in sorted(numbered)[: len(slots)]]
        if slots and [value.shape for value in values] == shapes:
            for slot, value in zip(slots, values, strict=True):
                slot.assign(value)
            return True
    return False


def optimizers_of(optimizer: Any) -> Iterator[Any]:
    """The optimizers under one roof, or the only one."""
    for one in getattr(optimizer, "optimizers", None) or [optimizer]:
        yield getattr(one, "inner_optimizer", one)


def _read(saved: tf.train.Checkpoint, path: str) -> Any:
    try:
        return saved.read(path).expect_partial()
    except _UNREADABLE as error:
        raise MismatchError(f"{path}: {_first_line(error)}") from error


def _match(path: str, status: Any) -> None:
    try:
        status.assert_existing_objects_matched()
    except AssertionError as error:
        raise MismatchError(f"{path}, which {_lack(error)}") from error


def _lack(error: AssertionError) -> str:
    count = re.search(r"Found (\d+)", str(error))
    names = re.findall(r"<tf.Variable '([^':]+)", str(error))
    names = [name for name in dict.fromkeys(names) if "/replica_" not in name]
    shown = f" ({', '.join(names[:_NAMES_SHOWN])}, ...)" if names else ""
    return f"lacks {count[1] if count else 'some'} variables{shown}"


def _first_line(error: Exception) -> str:
    line = str(error).strip().split("\n")[0]
    _, received, state = line.partition(" Received: ")  # of an optimizer of this package
    return f"it has {state}" if received else line
