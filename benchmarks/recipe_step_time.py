"""Time of the whole training step of the ResNet recipe, optimizers side by side.

Entry point of ``python -m benchmarks.recipe_step_time``; see benchmarks/README.md.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from benchmarks.clock import Timing, cores, interleaved
from benchmarks.command_line import (
    as_given,
    exit_code_of,
    listed_names,
    output_file,
    progress_bar,
)
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    FlagValueError,
    define_integer,
    help_text,
    parse_flags,
)

PROGRAM = "python -m benchmarks.recipe_step_time"
SUMMARY = (
    "Measures the training step of the task of official_recipes/resnet50 (forward, backward,\n"
    "reduction, update, metrics) on logical CPU replicas, optimizers interleaved on one model."
)
TARGET = 1.05
"""VR-LARS should take at most this many times LARS. Printed beside what was measured."""

BASE = "lbopt_lars"
_DEFAULT = (BASE, "vr_lars")


@dataclass(frozen=True)
class Row:
    """What was measured with one optimizer; JSON holds the same names.

    Attributes:
        name: Its key in tf-models.
        median_ms: Of one step.
        p10_ms: A tenth of the steps is faster.
        p90_ms: A tenth of the steps is slower.
        median_ratio: Of its time to the base's in each round, where both ran soon after the other.
        all_ms: Every single time.
    """

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    median_ratio: float
    all_ms: tuple[float, ...]


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code: 0, 2 for flags that cannot be used, 130 when interrupted.
    """

    def run() -> None:
        values = _flags()
        parse_flags(values, argv)
        if values.help:
            print(help_text(values, PROGRAM, SUMMARY))
        else:
            _run(values, output_file(values.output))

    return exit_code_of(run)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    define_integer(values, "replicas", 2, "Logical CPU devices.", maximum=64)
    define_integer(values, "sub_batches", 1, "Parts of a replica's batch.")
    define_integer(values, "batch_per_replica", 16, "Images per replica and step.")
    define_integer(values, "image", 64, "Height and width.", minimum=32)
    define_integer(values, "depth", 50, "ResNet-50 or ResNet-18.")
    flags.DEFINE_list(
        "optimizers",
        ",".join(_DEFAULT),
        f"Keys of tf_lbopt.tfm.REGISTRATIONS; {BASE} is added.",
        flag_values=values,
    )
    define_integer(values, "repeats", 20, "Timed rounds.")
    define_integer(values, "warmup", 2, "Rounds before the timed ones, after tracing.")
    flags.DEFINE_string("output", None, "JSON file to write.", flag_values=values)
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    return values


def _run(values: flags.FlagValues, output: Path | None) -> None:
    if values.batch_per_replica % values.sub_batches:
        raise FlagValueError(
            "batch_per_replica",
            f"a multiple of --sub_batches={values.sub_batches}",
            values.batch_per_replica,
        )
    if values.replicas * values.sub_batches < 2:
        raise FlagValueError("replicas", "at least 2 sub-batches in all", values.replicas)
    from official_recipes.common.replicas import cpu_strategy, quiet_tensorflow

    quiet_tensorflow()
    import official.vision.registry_imports  # noqa: F401

    from tf_lbopt.tfm import REGISTRATIONS

    names = tuple(dict.fromkeys([BASE, *listed_names(values.optimizers)]))
    if not set(names) <= set(REGISTRATIONS):
        raise FlagValueError("optimizers", f"some of {', '.join(REGISTRATIONS)}", as_given(names))
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    steps: dict[str, Callable[[], Any]] = {}
    strategy = cpu_strategy(values.replicas)
    with progress_bar(Console(stderr=True)) as progress:
        rounds = 1 + values.warmup + values.repeats
        shown = progress.add_task("tracing", total=rounds * len(names))
        steps = _steps(names, strategy, values, lambda: progress.advance(shown))
        interleaved(steps, values.warmup, lambda: progress.advance(shown))
        timings = interleaved(steps, values.repeats, lambda: progress.advance(shown))
    rows = [_row(name, timings) for name in names]
    print(
        f"ResNet-{values.depth}, {values.image} x {values.image}, {values.replicas} replicas x "
        f"{values.batch_per_replica} images in {values.sub_batches} parts, {cores()} cores, load "
        f"average {'unknown' if load is None else f'{load[0]:.1f}'} at the start"
    )
    for row in rows:
        print(
            f"{row.name:12} median {row.median_ms:8.1f} ms (10 % to 90 %: {row.p10_ms:.1f} to "
            f"{row.p90_ms:.1f}), {row.median_ratio:.3f} of {BASE}"
        )
    print(f"target for vr_lars: at most {TARGET} of {BASE}")
    if output is not None:
        settings = {name: values[name].value for name in values if name not in ("help", "output")}
        write_json(output, {"settings": settings, "rows": [asdict(row) for row in rows]})


def _row(name: str, timings: dict[str, Timing]) -> Row:
    timing, base = timings[name], timings[BASE]
    ratios = [a / b for a, b in zip(timing.times, base.times, strict=True)]
    return Row(name, timing.median, timing.p10, timing.p90, statistics.median(ratios), timing.times)


def _steps(
    names: Sequence[str], strategy: Any, values: flags.FlagValues, tick: Callable[[], None]
) -> dict[str, Callable[[], Any]]:
    import numpy as np
    import tensorflow as tf
    from official.core import exp_factory, task_factory, train_utils

    from official_recipes.resnet50 import experiments

    def parameters(name: str) -> Any:
        params = exp_factory.get_exp_config(experiments.EXPERIMENT)
        size = [values.image, values.image, 3]
        backbone = {"resnet": {"model_id": values.depth}}
        params.override(
            {
                "task": {
                    "sub_batches": values.sub_batches,
                    "model": {"num_classes": 40, "input_size": size, "backbone": backbone},
                },
                "trainer": {
                    "optimizer_config": {
                        "optimizer": {"type": name, name: {"weight_decay": 1e-4}},
                        # All work on one set of weights, which so small a rate does not move.
                        "learning_rate": {
                            "type": "constant",
                            "constant": {"learning_rate": 1e-9},
                        },
                        "warmup": {"type": None},
                    }
                },
            }
        )
        return params

    with strategy.scope():
        task = task_factory.get_task(parameters(BASE).task)
        model = task.build_model()
        metrics = task.build_metrics(training=True)
    generator = np.random.default_rng(0)
    shape = (values.batch_per_replica, values.image, values.image, 3)
    shards = [
        (
            tf.constant(generator.standard_normal(shape, np.float32)),
            tf.constant(generator.integers(40, size=shape[0])),
        )
        for _ in range(values.replicas)
    ]
    batch = strategy.experimental_distribute_values_from_function(
        lambda context: shards[context.replica_id_in_sync_group]
    )

    def step_with(name: str) -> Callable[[], Any]:
        with strategy.scope():
            optimizer = train_utils.create_optimizer(task, parameters(name))
            optimizer.build(model.trainable_variables)

        def on_replica(batch: Any) -> tf.Tensor:
            logs = task.train_step(batch, model=model, optimizer=optimizer, metrics=metrics)
            return logs[task.loss]

        @tf.function
        def step(batch: Any) -> Any:
            return strategy.reduce("MEAN", strategy.run(on_replica, (batch,)), axis=None)

        return lambda: step(batch).numpy()

    steps = {}
    for name in names:
        steps[name] = step_with(name)
        steps[name]()
        tick()
    return steps


if __name__ == "__main__":
    sys.exit(main(sys.argv))
