"""What one wants to know of a Keras 3 run before it takes a night: two updates, and figures."""

from __future__ import annotations

import math
import time
from typing import Any

import keras
import tensorflow as tf

from official_recipes.common.dry_run import count, duration, peak, size, size_in_bytes
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.keras_options import TrainingOptions
from official_recipes.common.keras_training import (
    Task,
    batches,
    compiled_model,
    updates_per_epoch,
)


class _Times(keras.callbacks.Callback):
    """When each call of the training function ended: `fit` itself takes longer to begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = time.perf_counter()
        self.ends: list[float] = []
        self.loss = math.nan

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.loss = float((logs or {})["loss"])  # which waits for it
        self.ends.append(time.perf_counter())


def report(task: Task, options: TrainingOptions, strategy: tf.distribute.Strategy) -> None:
    """Makes two updates from new weights and prints what they take; nothing is written.

    Args:
        task: What is to be learned.
        options: How.
        strategy: Of as many replicas as `options.replicas`.

    Raises:
        FlagValueError: The options do not fit the task or the optimizer, or the loss is not finite.
    """
    model = compiled_model(task, options, strategy)
    micro_steps = options.gradient_accumulation_steps
    times = _Times()
    model.fit(
        batches(task, options, 0),
        steps_per_epoch=2 * micro_steps,
        callbacks=[times],
        shuffle=False,
        verbose=0,
    )
    ends = times.ends[len(times.ends) // 2 - 1 :: len(times.ends) // 2]  # of updates
    seconds = [ends[0] - times.begin, ends[1] - ends[0]]
    loss = times.loss
    if not math.isfinite(loss):
        raise FlagValueError("learning_rate", "one with a finite loss", f"a loss of {loss}")
    weights, trained, state = (
        [variable.value for variable in variables]
        for variables in (model.variables, model.trainable_variables, model.optimizer.variables)
    )
    parts = options.replicas * micro_steps
    devices = [name.split("device:")[-1] for name in strategy.extended.worker_devices]
    updates = options.epochs * updates_per_epoch(task, options)
    held = [size_in_bytes(variables) for variables in (weights, state, trained)]
    print(f"dry run of {task.name}: two updates, nothing is written")
    print(f"devices: {options.replicas} replicas; {', '.join(devices)}")
    print(
        f"batch: {options.batch_size} in an update, {options.batch_size // parts} on a device in "
        f"each of {micro_steps} micro-steps"
    )
    print(f"sub-batches: k = {parts} ({options.replicas} replicas x {micro_steps})")
    print(
        f"parameters: {count(weights):,}, {count(trained):,} of them trained, optimizer "
        f"{type(model.optimizer).__name__}"
    )
    print(
        "memory estimate for a device, without activations and input: "
        f"{size(held[0])} weights + {size(held[1])} optimizer + at most {size(held[2])} "
        f"gradients = {size(sum(held))}; {peak()}"
    )
    print(
        f"updates: the first took {seconds[0]:.3g} s with tracing, the second {seconds[1]:.3g} s; "
        f"loss {loss:.5g}"
    )
    print(
        f"updates to go: {updates:,} in {options.epochs} epochs, about "
        f"{duration(updates * seconds[1])} at the second one's pace, without evaluation"
    )
