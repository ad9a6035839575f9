"""What one wants to know of a Keras 3 run before it takes a night: two updates, and figures."""

from __future__ import annotations

import math
import time

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
    seconds, loss = [], math.nan
    for _ in range(2):
        begin = time.perf_counter()
        history = model.fit(
            batches(task, options, 0), steps_per_epoch=micro_steps, shuffle=False, verbose=0
        )
        seconds.append(time.perf_counter() - begin)
        loss = history.history["loss"][0]
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
