"""What one wants to know of a run before it takes a night: two steps of it, and figures."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from official_recipes.common.checkpoints import optimizers_of

if TYPE_CHECKING:
    from official_recipes.common.tfm_training import Options


def report(
    params: Any, options: Options, strategy: Any, trainer: Any, restored: str | None
) -> None:
    """Makes two training steps and prints what they take; nothing is written.

    Args:
        params: Of the experiment.
        options: The command line.
        strategy: Of the run.
        trainer: tf-models' trainer, with weights and state as the run would begin.
        restored: The checkpoint that they are from, or ``None``.
    """
    from orbit import utils

    step = int(trainer.global_step.numpy())
    seconds = []
    with strategy.scope():
        for _ in range(2):
            begin = time.perf_counter()
            output = trainer.train(tf.constant(1))
            output = {name: utils.get_value(value) for name, value in output.items()}
            seconds.append(time.perf_counter() - begin)
    replicas = strategy.num_replicas_in_sync
    parts = getattr(params.task, "sub_batches", 1)
    batch = params.task.train_data.global_batch_size
    devices = [name.split("device:")[-1] for name in strategy.extended.worker_devices]
    config = params.trainer
    to_go = max(config.train_steps - step, 0)
    trainable = trainer.model.trainable_variables
    print(f"dry run of {options.experiment}: two steps, nothing is written")
    print(f"devices: {replicas} replicas; on this worker {', '.join(devices)}")
    print(
        f"batch: {batch} in a step, {batch // replicas} on a device"
        + (f", in {parts} parts of {batch // replicas // parts}" if parts > 1 else "")
    )
    print(f"sub-batches: k = {replicas * parts} ({replicas} replicas x {parts})")
    print(
        f"parameters: {count(trainer.model.variables):,}, {count(trainable):,} of them trained, "
        f"optimizer {_names(trainer.optimizer)}"
    )
    held = [
        size_in_bytes(trainer.model.variables),
        size_in_bytes(_state(trainer.optimizer)),
        size_in_bytes(trainable),
    ]
    print(
        "memory estimate for a device, without activations and input: "
        f"{size(held[0])} weights + {size(held[1])} optimizer + at most {size(held[2])} "
        f"gradients = {size(sum(held))}; {peak()}"
    )
    print(
        f"steps: the first took {seconds[0]:.3g} s with tracing, the second {seconds[1]:.3g} s; "
        f"loss {float(output['training_loss']):.5g}"
    )
    print(
        "begins with: "
        + (f"{restored}, step {step}" if restored else _initial(params, options.model_dir))
    )
    print(
        f"steps to go: {to_go:,} of {config.train_steps:,}, about "
        f"{duration(to_go * seconds[1])} at the second step's pace, without evaluation"
    )


def _initial(params: Any, model_dir: str) -> str:
    given = getattr(params.task, "init_checkpoint", "")
    return given or f"new weights, no checkpoint in {model_dir}"


def _names(optimizer: Any) -> str:
    return " and ".join(type(one).__name__ for one in optimizers_of(optimizer))


def _state(optimizer: Any) -> list[tf.Variable]:
    found = []
    for one in optimizers_of(optimizer):
        variables = one.variables
        found += variables() if callable(variables) else variables
    return found


def count(variables: Iterable[tf.Variable]) -> int:
    """How many numbers variables hold."""
    return sum(variable.shape.num_elements() or 0 for variable in variables)


def size_in_bytes(variables: Iterable[tf.Variable]) -> int:
    """What variables take, once."""
    return sum((v.shape.num_elements() or 0) * v.dtype.size for v in variables)


def size(number: float) -> str:
    """Bytes, as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def peak() -> str:
    """What was taken at most: of a GPU, or by the process."""
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        peaks = [tf.config.experimental.get_memory_info(gpu.name)["peak"] for gpu in gpus]
        return f"seen on a GPU: {size(max(peaks))}"
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"seen of this process: {size(taken * (1 if sys.platform == 'darwin' else 1024))}"


def duration(seconds: float) -> str:
    """Seconds, as a person reads them."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
