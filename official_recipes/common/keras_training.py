"""Training a task with Keras 3's `compile` and `fit`: batches, checkpoints, results.

The batch of every update is a function of the seed, the epoch and the update's number alone, so
that a resumed run sees what the run that was stopped would have seen.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

import tf_lbopt
from official_recipes.common.checkpoints import take_velocity
from official_recipes.common.data_format import data_of_flag
from official_recipes.common.files import append_row, plain, read_json, write_json
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.input_pipeline import without_autotuning
from official_recipes.common.keras_optimizers import make_optimizer
from official_recipes.common.keras_options import CHECKPOINTS, TrainingOptions, check_batch

_VERSIONS = ("tensorflow", "keras", "numpy", "tf-lbopt")
_HISTORY = "history.json"
_RESULT = "result.json"
_SETTINGS = "settings.json"
_EVALUATION = "evaluation.json"
_UNREADABLE = (AssertionError, ValueError, IndexError, RuntimeError, tf.errors.OpError)
# Flags that are called otherwise where they are settings.
_FLAGS = {
    "kind": "schedule",
    "start_epoch": "post_local_start_epoch",
    "period": "post_local_period",
}
# What a trained model does not depend on.
_OF_TRAINING = ("augmentation", "label_smoothing")
# What may change between a run and its continuation.
_NOT_OF_THE_RUN = (
    *("model_dir", "resume", "new_optimizer", "result_file", "checkpoint_every", "device"),
)
# What may with a new optimizer.
_OF_THE_OPTIMIZER = (
    *("optimizer", "optimizer_arguments", "schedule", "epochs", "gradient_accumulation_steps"),
    *("post_local", "freeze_layers", "freeze_epochs", "evaluate_every"),
)

Metrics = dict[str, float]


@dataclass(frozen=True)
class Serving:
    """The functions of a SavedModel.

    Attributes:
        functions: Each with the specifications of its arguments, by its signature's name; the first
            is ``serving_default`` too.
        resources: What they use besides the model: tables, tokenizers.
        note: What is missing, and why, or nothing.
    """

    functions: Mapping[str, tuple[Callable[..., Any], Sequence[tf.TensorSpec]]]
    resources: Sequence[Any] = ()
    note: str = ""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts, as text.

    Attributes:
        lines: Of a file.
        note: What a reader must know besides, or nothing.
    """

    lines: Sequence[str]
    note: str = ""


class Task(Protocol):
    """What is to be learned."""

    @property
    def name(self) -> str:
        """Of the task, for results."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What tells this task from others of its name, for results: data, model, ..."""

    @property
    def train_size(self) -> int:
        """The number of training examples."""

    @property
    def metric(self) -> str:
        """The metric that matters most, one of those that `evaluate` returns."""

    def build_model(self) -> keras.Model:
        """Returns a new model, a `tf_lbopt.PerExampleNormsModel`, with random weights."""

    def loss(self) -> Any:
        """Returns the loss, for `compile`."""

    def batch(self, indices: tf.Tensor, seed: tf.Tensor) -> Any:
        """Returns the examples with these indices, as `fit` takes them; runs inside tf.data.

        Args:
            indices: [batch] int64.
            seed: [2] int64, another one in every batch of a run, for random augmentation.
        """

    def evaluate(self, model: keras.Model, split: str, *, final: bool) -> Metrics:
        """Returns metrics of a split, named without it; slow ones only at the end of the run."""

    def splits(self) -> tuple[str, ...]:
        """Returns the splits to evaluate, the one that `metric` is read from first."""

    def files(self) -> Mapping[str, bytes]:
        """Returns what belongs beside an exported model, by the files' names: a vocabulary, ..."""

    def plain_model(self, model: keras.Model) -> keras.Model:
        """Returns the model as a file is to have it, which needs as little code as can be."""

    def serving(self, model: keras.Model) -> Serving:
        """Returns the functions of an exported model."""

    def predictions(self, model: keras.Model) -> Predictions:
        """Returns what a model predicts for the data to evaluate."""


@dataclass
class RunResult:
    """One finished run; the lists hold one value per epoch.

    Attributes:
        task: The task's name.
        task_settings: Of the task.
        options: The training options.
        updates: Weight updates made.
        train_loss: Mean loss over the epoch's batches.
        metrics: Of each evaluation, with ``epoch``, as ``<split>_<metric>``.
        seconds: Wall time of training and evaluation, earlier parts of a resumed run included.
        resumed_from: Epochs after which the run was resumed, if it was.
        earlier: Other optimizers that the run began with, each with its last epoch.
    """

    task: str
    task_settings: dict[str, Any]
    options: TrainingOptions
    updates: int
    train_loss: list[float]
    metrics: list[Metrics]
    seconds: float
    resumed_from: int | None = None
    earlier: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether a loss became infinite or NaN, which ends a run early."""
        values = [*self.train_loss, *(v for row in self.metrics for v in row.values())]
        return not all(map(math.isfinite, values))

    def record(self) -> dict[str, Any]:
        """Returns the result as plain data that JSON can hold."""
        content = {
            "task": self.task,
            **self.task_settings,
            **dataclasses.asdict(self.options),
            "updates": self.updates,
            "diverged": self.diverged,
            "final": self.metrics[-1] if self.metrics else {},
            "train_loss": self.train_loss,
            "evaluations": self.metrics,
            "seconds": round(self.seconds, 2),
            "resumed_from": self.resumed_from,
            "earlier_optimizers": self.earlier,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        }
        return plain(content)


def updates_per_epoch(task: Task, options: TrainingOptions) -> int:
    """Returns the number of whole batches in the training split."""
    return task.train_size // options.batch_size


def micro_steps_per_call(options: TrainingOptions) -> int:
    """Returns how many micro-steps `fit` makes before it comes back to Python.

    All of an update's where it can: Keras's loop over them fails under ``MirroredStrategy``
    (docs/known_defects.md), and post-local SGD decides between steps.
    """
    alone = options.replicas == 1 and options.post_local is None
    return options.gradient_accumulation_steps if alone else 1


def compiled_model(
    task: Task, options: TrainingOptions, strategy: tf.distribute.Strategy
) -> keras.Model:
    """Returns a new model that is ready for `fit`.

    Args:
        task: What is to be learned.
        options: How.
        strategy: Of as many replicas as `options.replicas`.

    Raises:
        FlagValueError: The options do not fit the task or the optimizer.
    """
    check_batch(options, task.train_size)
    keras.utils.clear_session()  # Frees the last run's graphs and gives the same names again.
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(options.dtype)
    with strategy.scope():
        model = task.build_model()
        model.compile(
            optimizer=make_optimizer(options, updates_per_epoch(task, options), options.epochs),
            loss=task.loss(),
            auto_scale_loss=False,  # tf_lbopt's own wrapper scales it where that is needed.
            steps_per_execution=micro_steps_per_call(options),
        )
    return model


def train(
    task: Task,
    options: TrainingOptions,
    strategy: tf.distribute.Strategy,
    on_update: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[int, float, Metrics], None] | None = None,
) -> RunResult:
    """Trains once.

    Args:
        task: What is to be learned.
        options: How.
        strategy: Of as many replicas as `options.replicas`.
        on_update: Called after every update with the number of updates made and their total.
        on_epoch: Called after every epoch with its number, training loss and metrics.

    Returns:
        The curves of the run; where there is a model_dir, its ``result.json`` holds them too.

    Raises:
        FlagValueError: The options do not fit the task, the optimizer or what is in model_dir.
    """
    model = compiled_model(task, options, strategy)
    per_epoch = updates_per_epoch(task, options)
    run = RunResult(task.name, dict(task.settings), options, 0, [], [], 0.0)
    checkpoints = (
        _Checkpoints(model, strategy, run, task) if options.model_dir is not None else None
    )
    first = checkpoints.restore() if checkpoints is not None else 0
    progress = _Progress(task, run, first, per_epoch, on_update, on_epoch)
    callbacks: list[keras.callbacks.Callback] = [keras.callbacks.TerminateOnNaN(), progress]
    if options.post_local is not None:
        callbacks.insert(0, tf_lbopt.callbacks.EndPeriod())
    if options.freeze_layers:
        callbacks.append(_freezing(options, model))
    if checkpoints is not None:
        assert options.model_dir is not None
        callbacks.append(checkpoints)
        callbacks.append(
            keras.callbacks.TensorBoard(str(options.model_dir / "tensorboard"), write_graph=False)
        )
    earlier = run.seconds
    started = time.perf_counter()
    progress.now = lambda: earlier + time.perf_counter() - started
    if first < options.epochs and not run.diverged:
        model.fit(
            batches(task, options, first),
            initial_epoch=first,
            epochs=options.epochs,
            steps_per_epoch=per_epoch * options.gradient_accumulation_steps,
            callbacks=callbacks,
            shuffle=False,  # The dataset shuffles.
            verbose=0,
        )
    run.seconds = progress.now()
    run.updates = int(model.optimizer.iterations.numpy())
    if options.model_dir is not None:
        write_json(options.model_dir / _RESULT, run.record())
    if options.result_file is not None:
        append_row(options.result_file, run.record())
    return run


def _freezing(options: TrainingOptions, model: keras.Model) -> keras.callbacks.Callback:
    assert options.freeze_layers is not None
    assert options.freeze_epochs is not None
    try:
        freezing = tf_lbopt.callbacks.FreezeLayers(options.freeze_layers, options.freeze_epochs)
        freezing.set_model(model)
        freezing.on_train_begin()  # Which finds the layers; `fit` does it again.
    except ValueError as error:
        raise FlagValueError(
            "freeze_layers", "layers of the model", f"{options.freeze_layers!r}: {error}"
        ) from error
    return freezing


def evaluate(task: Task, options: TrainingOptions, strategy: tf.distribute.Strategy) -> Metrics:
    """Evaluates the last checkpoint of `options.model_dir`, and leaves ``evaluation.json`` there.

    Args:
        task: What was learned.
        options: Those of the run; what concerns the training does not matter.
        strategy: Where the model is made.

    Returns:
        The metrics of all splits, as ``<split>_<metric>``.

    Raises:
        FlagValueError: The checkpoint is of another model.
    """
    assert options.model_dir is not None
    with strategy.scope():
        model, path = _last_model(task, options)
    metrics = {
        f"{split}_{name}": value
        for split in task.splits()
        for name, value in task.evaluate(model, split, final=True).items()
    }
    content = {"task": task.name, **task.settings, "checkpoint": path, "metrics": metrics}
    write_json(options.model_dir / _EVALUATION, content)
    return metrics


def trained_model(task: Task, options: TrainingOptions) -> keras.Model:
    """Returns the model of the last checkpoint of `options.model_dir`, on one device.

    Args:
        task: What was learned.
        options: Those of the run; what concerns the training does not matter.

    Raises:
        FlagValueError: The checkpoint is of another model, or the run had other data.
    """
    assert options.model_dir is not None
    settings = options.model_dir / _SETTINGS
    if settings.is_file():
        run = json.loads(settings.read_text(encoding="utf-8"))
        for name, value in plain(dict(task.settings)).items():
            if name in run and run[name] != value and name not in _OF_TRAINING:
                raise FlagValueError(
                    "model_dir", f"a run with the same {name}, {value!r}", repr(run[name])
                )
    return _last_model(task, options)[0]


def _last_model(task: Task, options: TrainingOptions) -> tuple[keras.Model, str]:
    assert options.model_dir is not None
    keras.utils.clear_session()
    keras.config.set_dtype_policy(options.dtype)
    model = task.build_model()
    path = tf.train.latest_checkpoint(str(options.model_dir / CHECKPOINTS))
    try:
        status = tf.train.Checkpoint(model=model).read(path).expect_partial()
        status.assert_existing_objects_matched()
    except _UNREADABLE as error:
        raise FlagValueError(
            "model_dir", "a checkpoint of this model, with the run's flags", f"{path}: {error}"
        ) from error
    return model, path


def batches(task: Task, options: TrainingOptions, first_epoch: int) -> tf.data.Dataset:
    """Micro-batches from an epoch on, without end: a last epoch that is cut off is no error."""
    per_epoch = updates_per_epoch(task, options)
    size = options.batch_size // options.gradient_accumulation_steps
    seed = tf.constant(options.seed, tf.int64)

    def epoch_batches(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(task.train_size, dtype=tf.int64), seed=tf.stack([seed, epoch])
        )
        batches = tf.reshape(order[: per_epoch * options.batch_size], [-1, size])
        return tf.data.Dataset.from_tensor_slices(batches).enumerate(
            epoch * per_epoch * options.gradient_accumulation_steps
        )

    def examples(number: tf.Tensor, indices: tf.Tensor) -> Any:
        return task.batch(tf.ensure_shape(indices, [size]), tf.stack([seed, number]))

    return without_autotuning(
        tf.data.Dataset.counter(first_epoch)
        .flat_map(epoch_batches)
        .map(examples, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .prefetch(2)
    )


class _Progress(keras.callbacks.Callback):
    """Counts, evaluates and records; comes before callbacks that read the logs."""

    def __init__(
        self,
        task: Task,
        run: RunResult,
        first_epoch: int,
        per_epoch: int,
        on_update: Callable[[int, int], None] | None,
        on_epoch: Callable[[int, float, Metrics], None] | None,
    ) -> None:
        super().__init__()
        self.now: Callable[[], float] = lambda: 0.0
        self._task = task
        self._run = run
        self._micro_steps = run.options.gradient_accumulation_steps
        self._updates = first_epoch * per_epoch
        self._total = run.options.epochs * per_epoch
        self._on_update = on_update
        self._on_epoch = on_epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if (batch + 1) % self._micro_steps:  # `batch` is the last micro-step of a call.
            return
        self._updates += 1
        if self._on_update is not None:
            self._on_update(self._updates, self._total)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        logs = {} if logs is None else logs
        options, run = self._run.options, self._run
        loss = float(np.asarray(logs.get("loss", math.nan)))
        run.train_loss.append(loss)
        metrics: Metrics = {}
        last = epoch + 1 == options.epochs or self.model.stop_training
        if last or (options.evaluate_every and (epoch + 1) % options.evaluate_every == 0):
            for split in self._task.splits():
                for name, value in self._task.evaluate(self.model, split, final=last).items():
                    metrics[f"{split}_{name}"] = value
            run.metrics.append({"epoch": float(epoch + 1), **metrics})
            logs.update(metrics)
        run.seconds = self.now()
        if self._on_epoch is not None:
            self._on_epoch(epoch + 1, loss, metrics)


class _Checkpoints(keras.callbacks.Callback):
    """Saves model, optimizer and curves after epochs, and brings them back."""

    def __init__(
        self, model: keras.Model, strategy: tf.distribute.Strategy, run: RunResult, task: Task
    ) -> None:
        super().__init__()
        assert run.options.model_dir is not None
        self._task = task
        self._changed_settings: dict[str, Any] | None = None
        self._folder = run.options.model_dir
        self._run = run
        self._epoch = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._trained = model
        with strategy.scope():
            model.optimizer.build(model.trainable_variables)
        self._checkpoint = tf.train.Checkpoint(
            model=model, optimizer=model.optimizer, epoch=self._epoch
        )
        self._manager = tf.train.CheckpointManager(
            self._checkpoint, str(self._folder / CHECKPOINTS), max_to_keep=2
        )

    def restore(self) -> int:
        """Brings the last checkpoint back, if the run is to be resumed; returns its epoch."""
        path = self._manager.latest_checkpoint
        settings = self._folder / _SETTINGS
        of_the_run = {**self._run.task_settings, **dataclasses.asdict(self._run.options)}
        now = plain({key: v for key, v in of_the_run.items() if key not in _NOT_OF_THE_RUN})
        if path is None:
            write_json(settings, now)
            return 0
        if not self._run.options.resume:
            raise FlagValueError(
                "model_dir",
                "a folder without checkpoints, or --resume to go on",
                repr(str(self._folder)),
            )
        with data_of_flag("model_dir", "a run that can be resumed"):
            saved = read_json(settings)
            history = read_json(self._folder / _HISTORY, "train_loss", "metrics", "seconds")
        run = self._run
        may_differ = _OF_THE_OPTIMIZER if run.options.new_optimizer else ()
        self._check_settings(*(_without(may_differ, of) for of in (saved, now)))
        of_optimizer = [_only(("optimizer", "optimizer_arguments"), of) for of in (saved, now)]
        changed = of_optimizer[0] != of_optimizer[1]
        try:
            if changed:
                self._restore_model(path)
            else:
                self._checkpoint.restore(path).assert_existing_objects_matched()
        except _UNREADABLE as error:
            raise FlagValueError(
                "model_dir", "a run that can be resumed", f"{path}: {error}"
            ) from error
        epoch = int(self._epoch.numpy())
        run.earlier = history.get("earlier_optimizers", [])
        if changed:
            self._change_optimizer(path, epoch, of_optimizer[0])
        self._changed_settings = now if saved != now else None
        run.train_loss = [math.nan if x is None else x for x in history["train_loss"][:epoch]]
        run.metrics = [row for row in history["metrics"] if row["epoch"] <= epoch]
        run.seconds = history["seconds"][epoch - 1]
        run.resumed_from = epoch
        return epoch

    def _restore_model(self, path: str) -> None:
        # Its own checkpoint would read the optimizer that it is compiled with, too.
        other = self._task.build_model()
        saved = tf.train.Checkpoint(model=other, epoch=self._epoch)
        saved.read(path).expect_partial().assert_existing_objects_matched()
        for variable, value in zip(self._trained.variables, other.variables, strict=True):
            variable.assign(value)

    def _change_optimizer(self, path: str, epoch: int, former: dict[str, Any]) -> None:
        run, optimizer = self._run, self._trained.optimizer
        updates = epoch * updates_per_epoch(self._task, run.options)
        optimizer.iterations.assign(updates)
        run.earlier = [e for e in run.earlier if e["epochs"] < epoch]
        run.earlier.append({**former, "epochs": epoch})
        name, before = run.options.optimizer, former["optimizer"]
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        kept = take_velocity(path, before, inner, name)
        print(
            f"{name} begins after {epoch} epochs "
            + (f"with the momentum of {before}" if kept else f"without the past of {before}")
        )

    def _check_settings(self, saved: dict[str, Any], now: dict[str, Any]) -> None:
        before, after = _by_flag(saved), _by_flag(now)
        for flag in sorted({*before, *after}):
            if before.get(flag) != after.get(flag):
                raise FlagValueError(
                    flag, f"{before.get(flag)}, as in the run to resume", after.get(flag)
                )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        options = self._run.options
        last = epoch + 1 == options.epochs or self.model.stop_training
        self._append_history()
        if last or (epoch + 1) % options.checkpoint_every == 0:
            self._epoch.assign(epoch + 1)
            self._manager.save()
            if self._changed_settings is not None:  # not before the checkpoint is theirs
                write_json(self._folder / _SETTINGS, self._changed_settings)
                self._changed_settings = None

    def _append_history(self) -> None:
        path = self._folder / _HISTORY
        run = self._run
        seconds = []
        if len(run.train_loss) > 1 and path.is_file():
            seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        seconds = [*seconds[: len(run.train_loss) - 1], run.seconds]
        write_json(
            path,
            {
                "train_loss": run.train_loss,
                "metrics": run.metrics,
                "seconds": seconds,
                "earlier_optimizers": run.earlier,
            },
        )


def _only(names: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in names}


def _without(names: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _by_flag(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names of the flags that they come from."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_by_flag(value))
        elif value is not None:
            flat[_FLAGS.get(name, name)] = value
    return flat
