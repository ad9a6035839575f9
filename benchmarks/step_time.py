"""Time of the whole training step: variance-reduced optimizers against their bases.

Entry point of ``python -m benchmarks.step_time``; see benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.clock import Timing, cores, interleaved
from benchmarks.command_line import (
    as_given,
    listed_names,
    output_file,
    progress_bar,
    run_benchmark,
)
from benchmarks.shapes import count
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    FlagValueError,
    define_integer,
    help_text,
    integer_parser,
    parse_flags,
)

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

PROGRAM = "python -m benchmarks.step_time"
SUMMARY = (
    "Measures the whole training step (forward, backward, reduction, update) of a convolutional\n"
    "network on logical CPU replicas, optimizers interleaved, and prints how much slower each is\n"
    "than its base."
)
TARGET = 1.05
"""A variance-reduced step should take at most this many times its base's: ResNet-20 at 32 images
per replica on 4 replicas. Printed beside what was measured, never enforced."""
_TARGET_OF = ("resnet20", 1, 32, 4)

BASES = {
    "vr_sgd": "keras_sgd",
    "vr_momentum": "keras_momentum",
    "vr_adam": "keras_adam",
    "vr_lars": "lars",
    "vr_lamb": "lamb",
    "lars": "keras_momentum",
    "lamb": "keras_momentum",
    "sngm": "keras_momentum",
    "clars": "keras_nesterov",
    "extrap_sgd": "keras_nesterov",
}
_DEFAULT = ("vr_sgd", "vr_momentum", "vr_lars", "vr_lamb", "lars", "lamb", "sngm")
_KNOWN = tuple(dict.fromkeys([*BASES, *BASES.values()]))
_NO_UPDATE = "forward_backward"
_CLASSES = 10
_REPLICAS_PARSER = integer_parser(maximum=64)
_DISTRIBUTIONS = ("tensorflow", "keras", "numpy", "tf-lbopt")


@dataclass(frozen=True)
class Architecture:
    """A residual network for small images.

    Attributes:
        channels: Of each stage; all but the first stage halve height and width.
        blocks: Basic blocks per stage.
        image: Height and width of the inputs.
    """

    channels: tuple[int, ...]
    blocks: int
    image: int


MODELS = {
    "resnet20": Architecture(channels=(16, 32, 64), blocks=3, image=32),
    "tiny": Architecture(channels=(4, 8), blocks=1, image=8),
}


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        model: Name of the architecture.
        width: Factor on the channels.
        batch_per_replica: Images per replica and update.
        replicas: Numbers of logical CPU devices, each measured in a process of its own.
        optimizers: Names of the optimizers, bases included.
        repeats: Timed rounds.
        warmup: Rounds before them, after tracing.
        output: The JSON file to write, or ``None``.
    """

    model: str
    width: int
    batch_per_replica: int
    replicas: tuple[int, ...]
    optimizers: tuple[str, ...]
    repeats: int
    warmup: int
    output: Path | None


@dataclass(frozen=True)
class Row:
    """What was measured with one optimizer, or without any; JSON holds the same names.

    Attributes:
        name: Of the optimizer.
        median_ms: Of one training step.
        p10_ms: A tenth of the steps is faster.
        p90_ms: A tenth of the steps is slower.
        loss: The mean loss of the last step over all replicas; the weights hardly move.
        nodes: Of the graph and all functions that it calls, as traced, all replicas together.
        collective_reductions_per_replica: Those among them, per replica.
        all_ms: Every single time.
    """

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    loss: float
    nodes: int
    collective_reductions_per_replica: float
    all_ms: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """An optimizer against its base; JSON holds the same names.

    Attributes:
        name: Of the optimizer.
        base: Of its base.
        ratio: Of the medians.
        median_of_ratios: Of the ratios in each round, where both ran one soon after the other.
        p10_of_ratios: A tenth of those is less.
        p90_of_ratios: A tenth of those is more.
        extra_ms: Difference of the medians.
    """

    name: str
    base: str
    ratio: float
    median_of_ratios: float
    p10_of_ratios: float
    p90_of_ratios: float
    extra_ms: float


@dataclass(frozen=True)
class Comparison:
    """All that was measured in one process.

    Attributes:
        replicas: The number of logical CPU devices.
        micro_steps: Per update, each on as large a part of the replica's batch.
        parameters: Trainable ones of the model.
        variables: Trainable ones of the model.
        load_at_start: The system's load average before anything ran, ``None`` where unknown.
        load_at_end: The same at the end, this process included.
        forward_backward: The step without reduction of the gradients and update.
        rows: One per optimizer.
        pairs: One per optimizer that has a base.
    """

    replicas: int
    micro_steps: int
    parameters: int
    variables: int
    load_at_start: float | None
    load_at_end: float | None
    forward_backward: Row
    rows: list[Row]
    pairs: list[Pair]


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark on a command line, program name first, and returns the exit code."""
    return run_benchmark(argv, parse_options, _run)


# -- flags -----------------------------------------------------------------------------------------


def parse_options(argv: Sequence[str]) -> Options | None:
    """Parses and checks the command line; prints help and returns ``None`` when asked for it.

    Args:
        argv: The command line, program name first.

    Raises:
        FlagValueError: A flag cannot be used.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("model", "resnet20", f"Any of {', '.join(MODELS)}.", flag_values=values)
    define_integer(values, "width", 1, "Factor on the model's channels.", maximum=64)
    define_integer(values, "batch_per_replica", 32, "Images per replica and update.")
    flags.DEFINE_list(
        "replicas",
        "4",
        "Comma-separated numbers of logical CPU devices, one replica each; several numbers are "
        "measured in a process each. With 1 all optimizers accumulate over two half batches.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "optimizers",
        ",".join(_DEFAULT),
        f"Comma-separated names: any of {', '.join(_KNOWN)}. Their bases are added.",
        flag_values=values,
    )
    define_integer(values, "repeats", 20, "Timed rounds.")
    define_integer(values, "warmup", 2, "Rounds before the timed ones, after tracing.")
    flags.DEFINE_string("output", None, "JSON file to write.", flag_values=values)
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    parse_flags(values, argv)
    if values.help:
        print(help_text(values, PROGRAM, SUMMARY))
        return None

    model = values.model.strip().lower()
    if model not in MODELS:
        raise FlagValueError("model", f"one of {', '.join(MODELS)}", repr(values.model))
    optimizers = listed_names(values.optimizers)
    if not optimizers or not set(optimizers) <= set(_KNOWN):
        raise FlagValueError("optimizers", f"some of {', '.join(_KNOWN)}", as_given(optimizers))
    replicas = _numbers_of_replicas(values.replicas)
    if 1 in replicas and values.batch_per_replica % 2:
        raise FlagValueError(
            "batch_per_replica", "an even number with 1 replica", values.batch_per_replica
        )
    return Options(
        model=model,
        width=values.width,
        batch_per_replica=values.batch_per_replica,
        replicas=replicas,
        optimizers=with_bases(optimizers),
        repeats=values.repeats,
        warmup=values.warmup,
        output=output_file(values.output),
    )


def _numbers_of_replicas(entries: Sequence[str]) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(_REPLICAS_PARSER.parse(entry) for entry in entries))
    except ValueError:
        numbers = ()
    if not numbers:
        expected = f"comma-separated, each {_REPLICAS_PARSER.syntactic_help}"
        raise FlagValueError("replicas", expected, as_given(entries))
    return numbers


def with_bases(names: Sequence[str], bases: Mapping[str, str] = BASES) -> tuple[str, ...]:
    """Every base before what stands on it."""
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        if name in bases:
            add(bases[name])
        ordered[name] = None

    for name in names:
        add(name)
    return tuple(ordered)


# -- running ---------------------------------------------------------------------------------------


def _run(options: Options) -> None:
    # As wide as the table where there is no terminal to fit it into.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    measure = _measure if len(options.replicas) == 1 else _measure_in_fresh_process
    comparisons = []
    for replicas in options.replicas:
        comparisons.append(measure(options, replicas))
        console.print(_table(options, comparisons[-1]))
        if comparisons[-1].pairs:
            console.print(_pair_table(comparisons[-1]))
    if len(comparisons) > 1 and comparisons[0].pairs:
        console.print(_ratio_table(comparisons))
    for comparison in comparisons:
        console.print(_target_line(options, comparison), soft_wrap=True)
    if options.output is not None:
        write_json(options.output, _record(options, comparisons))
        console.print(f"wrote {options.output}", soft_wrap=True)


def _measure_in_fresh_process(options: Options, replicas: int) -> Comparison:
    """Several ``MirroredStrategy`` objects in one process would break each other."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "step_time.json"
        settings = {
            **_settings(options),
            "optimizers": ",".join(options.optimizers),
            "replicas": replicas,
            "output": output,
        }
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        # The progress goes to stderr and is seen; the tables are printed here, from the record.
        subprocess.run(
            [sys.executable, "-m", "benchmarks.step_time", *arguments],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        (content,) = json.loads(output.read_text(encoding="utf-8"))["comparisons"]
    return Comparison(
        **{
            **content,
            "forward_backward": Row(**content["forward_backward"]),
            "rows": [Row(**row) for row in content["rows"]],
            "pairs": [Pair(**pair) for pair in content["pairs"]],
        }
    )


def _measure(options: Options, replicas: int) -> Comparison:
    # TensorFlow takes seconds to import, so it waits until the flags are known to be good.
    from official_recipes.common.replicas import cpu_strategy, quiet_tensorflow

    load_at_start = _load()
    # One replica without accumulation is a single sub-batch, of which there is no variance.
    micro_steps = 2 if replicas == 1 else 1
    console = Console(stderr=True)
    with console.status("starting TensorFlow"):
        quiet_tensorflow()
        import keras
        import tensorflow as tf

        if replicas > 1:
            strategy: tf.distribute.Strategy = cpu_strategy(replicas)
        else:
            tf.config.set_visible_devices([], "GPU")
            strategy = tf.distribute.get_strategy()
        from benchmarks.contenders import collective_reductions, graph_nodes

        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = build_model(MODELS[options.model], options.width)
    batch = _batch(MODELS[options.model], options.batch_per_replica, strategy)

    rounds = 1 + options.warmup + options.repeats
    with progress_bar(console) as progress:
        names = (_NO_UPDATE, *options.optimizers)
        task = progress.add_task("tracing", total=len(names) * rounds)

        def tick() -> None:
            progress.advance(task)

        steps: dict[str, TimedStep] = {}
        for name in names:
            progress.update(task, description=f"{replicas} replicas: tracing {name}")
            with strategy.scope():
                optimizer = None if name == _NO_UPDATE else timed_optimizer(name, micro_steps)
                if optimizer is not None:
                    optimizer.build(model.trainable_variables)
            steps[name] = TimedStep(
                training_step(model, optimizer, micro_steps, strategy),
                batch,
                strategy.experimental_local_results,
            )
            steps[name]()
            tick()
        progress.update(task, description=f"{replicas} replicas: warming up")
        interleaved(steps, options.warmup, tick)
        progress.update(task, description=f"{replicas} replicas: measuring")
        timings = interleaved(steps, options.repeats, tick)

    rows = []
    for name in names:
        timing = timings[name]
        traced = steps[name].traced
        rows.append(
            Row(
                name=name,
                median_ms=timing.median,
                p10_ms=timing.p10,
                p90_ms=timing.p90,
                loss=steps[name].loss,
                nodes=len(graph_nodes(traced)),
                collective_reductions_per_replica=collective_reductions(traced, replicas),
                all_ms=timing.times,
            )
        )
    return Comparison(
        replicas=replicas,
        micro_steps=micro_steps,
        parameters=count([tuple(v.shape) for v in model.trainable_variables]),
        variables=len(model.trainable_variables),
        load_at_start=load_at_start,
        load_at_end=_load(),
        forward_backward=rows[0],
        rows=rows[1:],
        pairs=pairs_of(timings),
    )


def build_model(architecture: Architecture, width: int = 1) -> keras.Model:
    """The residual network of He et al. 2016, section 4.2, with parameter-free shortcuts.

    Args:
        architecture: Stages, blocks and image size; (16, 32, 64) and 3 give ResNet-20.
        width: Factor on the channels.
    """
    import keras

    from official_recipes.cifar.models import residual_network

    inputs = keras.Input((architecture.image, architecture.image, 3))
    channels = [width * stage_channels for stage_channels in architecture.channels]
    return keras.Model(inputs, residual_network(inputs, channels, architecture.blocks, _CLASSES))


def _batch(
    architecture: Architecture, batch_per_replica: int, strategy: tf.distribute.Strategy
) -> tuple[Any, Any]:
    """Other images and labels on every replica, in memory."""
    import numpy as np
    import tensorflow as tf

    generator = np.random.default_rng(0)
    shape = (batch_per_replica, architecture.image, architecture.image, 3)

    def distributed(make: Callable[[], Any]) -> Any:
        values = [tf.constant(make()) for _ in range(strategy.num_replicas_in_sync)]
        return strategy.experimental_distribute_values_from_function(
            lambda context: values[context.replica_id_in_sync_group]
        )

    return (
        distributed(lambda: generator.standard_normal(shape, np.float32)),
        distributed(lambda: generator.integers(_CLASSES, size=batch_per_replica)),
    )


def timed_optimizer(name: str, micro_steps: int) -> keras.optimizers.Optimizer:
    """An optimizer that leaves the weights where they are.

    Args:
        name: One of `BASES` or their bases, or "keras_lamb".
        micro_steps: Per update.
    """
    import keras

    import tf_lbopt
    from benchmarks.contenders import LEARNING_RATE

    # All work on one set of weights, which so small a rate does not move.
    settings: dict[str, Any] = {"learning_rate": LEARNING_RATE}
    if micro_steps > 1:
        settings["gradient_accumulation_steps"] = micro_steps
    match name:
        case "keras_sgd":
            return keras.optimizers.SGD(**settings)
        case "keras_momentum":
            return keras.optimizers.SGD(momentum=0.9, nesterov=False, **settings)
        case "keras_nesterov":
            return keras.optimizers.SGD(momentum=0.9, nesterov=True, **settings)
        case "keras_adam":
            return keras.optimizers.Adam(**settings)
        case "keras_lamb":
            return keras.optimizers.Lamb(**settings)
    (info,) = tf_lbopt.list_optimizers(name)
    if "momentum" in inspect.signature(info.cls).parameters:
        settings["momentum"] = 0.9
    return info.cls(**settings)


def training_step(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer | None,
    micro_steps: int,
    strategy: tf.distribute.Strategy,
) -> tf.types.experimental.PolymorphicFunction:
    """One step on all replicas; without an optimizer it ends with the replicas' own gradients.

    Args:
        model: Returns logits.
        optimizer: Updates its variables.
        micro_steps: Into how many parts a replica's batch is split.
        strategy: That the model was made under.
    """
    import tensorflow as tf

    variables = model.trainable_variables
    sub_batches = micro_steps * strategy.num_replicas_in_sync

    def on_replica(images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        losses, sums = [], []
        parts = zip(tf.split(images, micro_steps), tf.split(labels, micro_steps), strict=True)
        for part_images, part_labels in parts:
            with _where_gradients_are_taken(optimizer, variables):
                loss, gradients = loss_and_gradients(
                    model, part_images, part_labels, strategy.num_replicas_in_sync
                )
                losses.append(loss / sub_batches)
                if optimizer is None:
                    # TensorFlow leaves out what no result depends on; control dependencies do not
                    # count.
                    sums += map(tf.reduce_sum, gradients)
                else:
                    optimizer.apply(gradients, variables)
        return [tf.add_n(losses), *sums]

    @tf.function(autograph=False)
    def step(images: Any, labels: Any) -> Any:
        return strategy.run(on_replica, (images, labels))

    return step


def loss_and_gradients(
    model: keras.Model, inputs: tf.Tensor, labels: tf.Tensor, replicas: int = 1
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """A batch's mean loss, and the gradients of a replica's share of it.

    Args:
        model: Returns logits.
        inputs: The batch.
        labels: The right classes.
        replicas: How many there are.
    """
    import tensorflow as tf

    with tf.GradientTape() as tape:
        logits = model(inputs, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        share = loss / replicas
    return loss, tape.gradient(share, model.trainable_variables)


def _where_gradients_are_taken(
    optimizer: keras.optimizers.Optimizer | None, variables: Sequence[Any]
) -> contextlib.AbstractContextManager[None]:
    if hasattr(optimizer, "extrapolated"):
        return optimizer.extrapolated(variables)
    return contextlib.nullcontext()


class TimedStep:
    """Runs one training step to its end; keeps the loss."""

    def __init__(
        self,
        function: tf.types.experimental.PolymorphicFunction,
        batch: tuple[Any, Any],
        local: Callable[[Any], Any],
    ) -> None:
        self.traced = function.get_concrete_function(*batch)
        self._function = function
        self._batch = batch
        self._local = local
        self.loss = 0.0

    def __call__(self) -> None:
        """Runs it; reading the losses waits for all replicas."""
        loss, *_ = self._function(*self._batch)
        self.loss = sum(float(share) for share in self._local(loss))


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def pairs_of(timings: Mapping[str, Timing], bases: Mapping[str, str] = BASES) -> list[Pair]:
    """Those of which both were timed, against their bases."""
    pairs = []
    for name, base in bases.items():
        if not {name, base} <= {*timings}:
            continue
        own, other = timings[name], timings[base]
        ratios = Timing(tuple(a / b for a, b in zip(own.times, other.times, strict=True)))
        pairs.append(
            Pair(
                name=name,
                base=base,
                ratio=own.median / other.median,
                median_of_ratios=ratios.median,
                p10_of_ratios=ratios.p10,
                p90_of_ratios=ratios.p90,
                extra_ms=own.median - other.median,
            )
        )
    return pairs


# -- results ---------------------------------------------------------------------------------------


def _table(options: Options, comparison: Comparison) -> Table:
    batch = f"{options.batch_per_replica} images per replica"
    if comparison.micro_steps > 1:
        batch += f" in {comparison.micro_steps} micro-steps"
    load = comparison.load_at_start
    at_load = "" if load is None else f", load at the start {load:.1f}"
    table = Table(
        title=f"{options.model}, width {options.width}: {comparison.parameters:,} "
        f"parameters in {comparison.variables} variables, {batch}, {_replicas(comparison)}",
        caption=f"whole training steps; {options.repeats} rounds; {cores()} cores{at_load}",
    )
    table.add_column("optimizer")
    headings = ("median ms", "p10–p90", "beyond forward and backward", "reductions", "graph nodes")
    for heading in headings:
        table.add_column(heading, justify="right")
    floor = comparison.forward_backward
    for row in (floor, *comparison.rows):
        table.add_row(
            row.name,
            f"{row.median_ms:.1f}",
            f"{row.p10_ms:.1f}–{row.p90_ms:.1f}",
            "–" if row is floor else f"{row.median_ms - floor.median_ms:+.1f} ms",
            f"{row.collective_reductions_per_replica:g}",
            str(row.nodes),
        )
    return table


def _pair_table(comparison: Comparison) -> Table:
    table = Table(title="against the base")
    table.add_column("optimizer")
    table.add_column("base")
    for heading in ("× base", "ms more", "× base per round", "p10–p90"):
        table.add_column(heading, justify="right")
    for pair in comparison.pairs:
        table.add_row(
            pair.name,
            pair.base,
            f"{pair.ratio:.3f}",
            f"{pair.extra_ms:+.1f}",
            f"{pair.median_of_ratios:.3f}",
            f"{pair.p10_of_ratios:.3f}–{pair.p90_of_ratios:.3f}",
        )
    return table


def _ratio_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="× base by the number of replicas (ratio of medians)")
    table.add_column("optimizer")
    table.add_column("base")
    for comparison in comparisons:
        table.add_column(str(comparison.replicas), justify="right")
    for pairs in zip(*(comparison.pairs for comparison in comparisons), strict=True):
        table.add_row(pairs[0].name, pairs[0].base, *(f"{pair.ratio:.3f}" for pair in pairs))
    return table


def _target_line(options: Options, comparison: Comparison) -> str:
    where = _replicas(comparison)
    reduced = [pair for pair in comparison.pairs if pair.name.startswith("vr_")]
    if not reduced:
        return f"{where}: no variance-reduced optimizer was measured"
    ratios = ", ".join(f"{pair.name} {pair.ratio:.3f}" for pair in reduced)
    target = f"target at most {TARGET:g} "
    if (options.model, options.width, options.batch_per_replica, comparison.replicas) == _TARGET_OF:
        met = max(pair.ratio for pair in reduced) <= TARGET
        return f"{where}: {ratios}; {target}{'met' if met else 'missed'}"
    model, _, batch, replicas = _TARGET_OF
    return f"{where}: {ratios}; {target}only of {model}, {batch} images on {replicas} replicas"


def _replicas(comparison: Comparison) -> str:
    return f"{comparison.replicas} replica{'s' if comparison.replicas > 1 else ''}"


def _settings(options: Options) -> dict[str, Any]:
    return {
        name: value
        for name, value in asdict(options).items()
        if name not in ("replicas", "optimizers", "output")
    }


def _record(options: Options, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}
    return {
        "benchmark": "step_time",
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"cores": cores()},
        "settings": _settings(options),
        "target": TARGET,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
