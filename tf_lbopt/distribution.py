"""Training on several machines with Keras's `fit`."""

import io
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt import _compat, _requirements
from tf_lbopt.aggregation.replica_state import ReplicaState
from tf_lbopt.optimizers.saved_state import SavedState

__all__ = ["enable_multi_worker_fit"]

_logger = logging.getLogger(__name__)

_WAIT_S = 60
_JOBS = ("chief", "worker")


def enable_multi_worker_fit() -> None:
    """Makes Keras 3's `fit` train under `tf.distribute.MultiWorkerMirroredStrategy`.

    Keras's trainer has two faults there (https://github.com/keras-team/keras/issues/20585), and its
    callbacks write on every worker. This call mends both for the process, in Keras itself. It
    changes nothing where a fault is not found, for other strategies, and when it is called again.
    Every worker calls it, before `fit`:

        import keras
        import tensorflow as tf
        import tf_lbopt

        tf_lbopt.distribution.enable_multi_worker_fit()
        strategy = tf.distribute.MultiWorkerMirroredStrategy()  # TF_CONFIG says who is who
        with strategy.scope():
            model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
            model.compile(tf_lbopt.LARS(0.1), "mse")
        model.fit(dataset, callbacks=[keras.callbacks.BackupAndRestore("/shared/backup")])

    Then `fit` (with validation), `evaluate` and `predict` do on several workers what they do on as
    many replicas of one process under `MirroredStrategy`; batch sizes are of all workers together.
    All workers must run the same program: the same data in the same order, the same callbacks.

    - ``ModelCheckpoint``, ``BackupAndRestore``, ``TensorBoard`` and ``CSVLogger`` write on the
      first worker (the chief). The others write what goes with it to temporary folders.
    - ``BackupAndRestore`` restores on all workers, so its folder must be one that they share. It
      raises a `ValueError` on all where they did not find the same backup.
    - What replicas keep of their own (sums of an accumulation under way, EXTRAP-SGD's past
      gradients) is in files that each worker writes beside the chief's,
      ``<file>.worker-<index>-of-<workers>.npz``, and reads in ``load_weights``, which all workers
      must call. Where one is missing or of another step, none is taken, with a warning. The local
      phase of `PostLocalSGD` is not saved.
    - A worker that is lost ends the others with an error. Start all again.
    - ``steps_per_execution`` must be 1; else `fit` and `evaluate` raise a `ValueError`.

    Raises:
        RuntimeError: Keras's trainer or callbacks are not those that this knows.

    Warns:
        UserWarning: Keras is newer than 3.15 or TensorFlow newer than 2.21.
    """
    _requirements.warn_if_untried("enable_multi_worker_fit")
    try:
        _compat.mend_trainer_on_several_workers()
        _compat.let_callbacks_write_once(
            lambda strategy: _place(strategy)[0] == 0,
            _check_backup,
            lambda strategy: _gather(strategy, [0]),
        )
        for method in ("save", "save_weights"):
            _compat.replace(keras.Model, method, _with_part_saved)
        _compat.replace(keras.Model, "load_weights", _with_part_loaded)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            "enable_multi_worker_fit does not know this Keras. Expected: the trainer and callbacks "
            f"of Keras 3.7 to 3.15. Received: Keras {keras.__version__}, {error!r}"
        ) from error


def _place(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """Which worker this process is, from 0 for the chief, and of how many."""
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict()
    sizes = [len(jobs.get(job, ())) for job in _JOBS]
    return resolver.task_id + (sizes[0] if resolver.task_type == "worker" else 0), sum(sizes)


def _gather(strategy: tf.distribute.Strategy, numbers: Sequence[int]) -> list[list[int]]:
    """Every worker's numbers, equally many, in the workers' order; all workers call this."""

    @tf.function
    def gather(own: tf.Tensor) -> tf.Tensor:
        return strategy.gather(strategy.run(tf.identity, args=(own,)), axis=0)

    rows = gather(tf.constant([numbers], tf.int64)).numpy().tolist()
    return rows[:: len(rows) // _place(strategy)[1]]


def _check_backup(strategy: tf.distribute.Strategy, folder: str, position: list[int]) -> None:
    """Raises on all workers if not all find the same backup."""
    chief, *others = _gather(strategy, position)
    for number, other in enumerate(others, 1):
        if other != chief:
            found = [f"epoch {epoch}" if weights else "none" for weights, epoch in (other, chief)]
            raise ValueError(
                "`backup_dir` must be a folder that all workers share. Received: backup_dir="
                f"{str(folder)!r}, where worker {number} finds {found[0]} and worker 0 {found[1]}"
            )


# -- what each worker's replicas keep of their own -------------------------------------------------


def _with_part_saved(save: Callable[..., object]) -> Callable[..., object]:
    def save_all(
        model: keras.Model, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        save(model, filepath, *args, **kwargs)
        states = _replica_states(model)
        if states:
            arrays: dict[str, Any] = {
                f"{prefix}/{name}": array
                for prefix, state in states.items()
                for name, array in state.part().items()
            }
            buffer = io.BytesIO()
            np.savez(buffer, stamp=_stamp(model), **arrays)
            _write(_part_of(model, filepath), buffer.getvalue())

    return save_all


def _write(path: str, content: bytes) -> None:
    end = time.monotonic() + _WAIT_S
    while True:
        try:
            with tf.io.gfile.GFile(f"{path}.partial", "wb") as file:
                file.write(content)
            tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)  # whole, or the former one
            return
        except tf.errors.NotFoundError as error:  # the chief may have yet to make the folder
            if time.monotonic() > end:
                raise ValueError(
                    "Files must be saved in a folder that all workers share. "
                    f"Received: {path!r}, which can not be written ({error})"
                ) from error
            time.sleep(0.1)


def _with_part_loaded(load: Callable[..., object]) -> Callable[..., object]:
    def load_all(
        model: keras.Model, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        states = _replica_states(model)
        for state in states.values():
            state.awaits_part = True
        try:
            load(model, filepath, *args, **kwargs)
        finally:
            for state in states.values():
                state.awaits_part = False
        lacking = {prefix: state for prefix, state in states.items() if state.lacks_part()}
        if lacking:
            part = _own_part(model, filepath)
            for prefix, state in lacking.items():
                start = f"{prefix}/"
                state.load_part(
                    {n[len(start) :]: array for n, array in part.items() if n.startswith(start)}
                )

    return load_all


def _own_part(model: keras.Model, filepath: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """What this worker has saved beside a file; nothing if not all workers have that of its step.

    Some would otherwise update where others accumulate.
    """
    path, stored = _part_of(model, filepath), {}
    if tf.io.gfile.exists(path):
        with tf.io.gfile.GFile(path, "rb") as file, np.load(io.BytesIO(file.read())) as part:
            stored = {name: part[name] for name in part.files}
    fits = np.array_equal(stored.pop("stamp", []), _stamp(model))
    gathered = _gather(model.distribute_strategy, [fits])
    missing = [str(worker) for worker, (ok,) in enumerate(gathered) if not ok]
    if not missing:
        return stored
    _logger.warning(
        "What the replicas keep of their own is left out: the files beside %s are not of its step, "
        "or missing, on worker %s.", filepath, ", ".join(missing),
    )  # fmt: skip
    return {}


def _optimizers_of(model: keras.Model) -> list[SavedState]:
    """Those of this package that train a model: its optimizer and what is inside."""
    optimizer, found = getattr(model, "optimizer", None), []
    while optimizer is not None:
        if isinstance(optimizer, SavedState):
            found.append(optimizer)
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return found


def _replica_states(model: keras.Model) -> dict[str, ReplicaState]:
    """What differs from replica to replica, if they are on several workers."""
    if not _compat.on_several_workers(model.distribute_strategy):
        return {}
    return {
        f"{number}/{prefix}": state
        for number, optimizer in enumerate(_optimizers_of(model))
        for prefix, state in optimizer._replica_states().items()
    }


def _part_of(model: keras.Model, filepath: str | os.PathLike[str]) -> str:
    """The file of this worker beside one of the chief's."""
    path = _compat.path_asked_for(os.fspath(filepath))
    return "{}.worker-{}-of-{}.npz".format(path, *_place(model.distribute_strategy))


def _stamp(model: keras.Model) -> list[int]:
    """Of which step a model's state is: updates, and micro-steps of the next."""
    counters = [
        counter
        for optimizer in _optimizers_of(model)
        for counter in (optimizer.iterations, optimizer._pending_micro_steps)  # type: ignore[attr-defined]
    ]
    return [0 if counter is None else int(counter.numpy()) for counter in counters]
