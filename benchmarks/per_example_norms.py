"""Cost of per-example gradient norms: against the gradient alone and against naive ways.

Entry point of ``python -m benchmarks.per_example_norms``; see benchmarks/README.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.clock import Timing, cores, interleaved, peak_resident_bytes, resident_bytes
from benchmarks.command_line import (
    as_given,
    listed_names,
    output_file,
    progress_bar,
    run_benchmark,
)
from benchmarks.shapes import count
from benchmarks.step_time import MODELS as RESIDUAL
from benchmarks.step_time import build_model as build_residual
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    FlagValueError,
    define_integer,
    help_text,
    parse_flags,
)

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

PROGRAM = "python -m benchmarks.per_example_norms"
SUMMARY = (
    "Measures the gradient of a batch with the norms of its examples' gradients, beside the\n"
    "gradient alone and beside the norms by tf.vectorized_map and by a loop over the examples:\n"
    "time, interleaved, and peak memory, each in a process of its own."
)
WAYS = ("gradient", "with_norms", "vectorized_map", "loop")
_NAIVE = WAYS[2:]
_DISTRIBUTIONS = ("tensorflow", "keras", "numpy", "tf-lbopt")
_CLASSES = 10


@dataclass(frozen=True)
class Targets:
    """Printed beside what was measured at batch 128, never enforced.

    Attributes:
        gradients: At most so many times the time of the gradient alone.
        memory: At most so many times its peak memory.
        naive: At least so many times as fast as the faster of the naive ways.
    """

    gradients: float
    memory: float = 2.0
    naive: float = 5.0


TARGETS = {"mlp": Targets(1.5), "bert_tiny": Targets(1.5), "resnet20": Targets(3.0)}
_TARGET_BATCH = 128
_MODELS = (*TARGETS, "tiny")


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        models: Names.
        ways: Names, in the order of `WAYS`.
        batch: Examples.
        repeats: Timed rounds of the gradient with and without norms.
        naive_repeats: Timed rounds of the naive ways.
        warmup: Rounds before them, after tracing.
        memory: Whether to measure memory, too.
        memory_only: Whether to measure nothing but the memory of the one model and way.
        output: The JSON file to write, or ``None``.
    """

    models: tuple[str, ...]
    ways: tuple[str, ...]
    batch: int
    repeats: int
    naive_repeats: int
    warmup: int
    memory: bool
    memory_only: bool
    output: Path | None


@dataclass(frozen=True)
class Memory:
    """The resident memory of a process that computes in one way; JSON holds the same names.

    Attributes:
        before_bytes: After tracing, with model and batch, before the first step.
        peak_bytes: The most that the process held during some steps.
    """

    before_bytes: int
    peak_bytes: int

    @property
    def step_bytes(self) -> int:
        """What the steps took."""
        return self.peak_bytes - self.before_bytes


@dataclass(frozen=True)
class Row:
    """What was measured of one way; JSON holds the same names.

    Attributes:
        name: Of the way.
        median_ms: Of one step.
        p10_ms: A tenth of the steps is faster.
        p90_ms: A tenth of the steps is slower.
        times_gradient: Ratio of the medians.
        median_of_ratios: Of the ratios to the gradient alone in each round; for the naive ways,
            which have fewer rounds, ``None``.
        mean_norms: Per variable, over the examples; ``None`` for the gradient alone.
        memory: Of a process of its own, ``None`` where it was not measured.
        all_ms: Every single time.
    """

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    times_gradient: float
    median_of_ratios: float | None
    mean_norms: tuple[float, ...] | None
    memory: Memory | None
    all_ms: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """All ways with one model.

    Attributes:
        model: Its name.
        parameters: Trainable ones.
        variables: Trainable ones.
        rows: One per way that could be run.
        failed: The naive ways whose process died.
    """

    model: str
    parameters: int
    variables: int
    rows: list[Row]
    failed: tuple[str, ...]


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
    flags.DEFINE_list(
        "models",
        ",".join(TARGETS),
        f"Comma-separated names: any of {', '.join(_MODELS)}.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "ways",
        ",".join(WAYS),
        f"Comma-separated names: any of {', '.join(WAYS)}; the gradient alone is added.",
        flag_values=values,
    )
    define_integer(values, "batch", _TARGET_BATCH, "Examples.")
    define_integer(values, "repeats", 20, "Timed rounds of the gradient with and without norms.")
    define_integer(values, "naive_repeats", 3, "Timed rounds of the naive ways.")
    define_integer(values, "warmup", 1, "Rounds before the timed ones, after tracing.")
    flags.DEFINE_boolean(
        "memory", True, "Measure peak memory, a process for each way.", flag_values=values
    )
    flags.DEFINE_boolean(
        "memory_only",
        False,
        "Measure nothing but the memory of one model and one way, in this process.",
        flag_values=values,
    )
    flags.DEFINE_string("output", None, "JSON file to write.", flag_values=values)
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    parse_flags(values, argv)
    if values.help:
        print(help_text(values, PROGRAM, SUMMARY))
        return None

    models, ways = listed_names(values.models), listed_names(values.ways)
    if not models or not set(models) <= set(_MODELS):
        raise FlagValueError("models", f"some of {', '.join(_MODELS)}", as_given(models))
    if not ways or not set(ways) <= set(WAYS):
        raise FlagValueError("ways", f"some of {', '.join(WAYS)}", as_given(ways))
    if values.memory_only:
        if len(models) > 1:
            raise FlagValueError("models", "one name with --memory_only", as_given(models))
        if len(ways) > 1:
            raise FlagValueError("ways", "one name with --memory_only", as_given(ways))
    elif "gradient" not in ways:
        ways = ("gradient", *ways)
    return Options(
        models=models,
        ways=tuple(way for way in WAYS if way in ways),
        batch=values.batch,
        repeats=values.repeats,
        naive_repeats=values.naive_repeats,
        warmup=values.warmup,
        memory=values.memory,
        memory_only=values.memory_only,
        output=output_file(values.output),
    )


# -- models ----------------------------------------------------------------------------------------


def build_model(name: str) -> keras.Model:
    """The model of a name, with logits as its output.

    Args:
        name: ``mlp`` (784 inputs, four hidden layers of 512), ``bert_tiny`` (2 layers, hidden size
            128, 2 heads, 30522 tokens, 128 positions, two classes of the first position),
            ``resnet20`` (as in `benchmarks.step_time`) or ``tiny``, a small MLP.
    """
    import keras

    layers = keras.layers
    if name in ("mlp", "tiny"):
        inputs, hidden, depth = (784, 512, 4) if name == "mlp" else (6, 5, 2)
        dense = [layers.Dense(hidden, activation="relu") for _ in range(depth)]
        return keras.Sequential([keras.Input((inputs,)), *dense, layers.Dense(_CLASSES)])
    if name == "resnet20":
        return build_residual(RESIDUAL[name])
    size, heads, tokens, positions = 128, 2, 30522, 128
    ids = keras.Input((positions,), dtype="int32")
    numbers = keras.ops.zeros_like(ids) + keras.ops.arange(positions)
    x = layers.Embedding(tokens, size)(ids) + layers.Embedding(positions, size)(numbers)
    x = layers.LayerNormalization()(x)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(heads, size // heads)(x, x))
        inner = layers.Dense(4 * size, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(size)(inner))
    pooled = layers.Dense(size, activation="tanh")(x[:, 0])
    return keras.Model(ids, layers.Dense(2)(pooled))


def batch_for(model: keras.Model, batch: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Random inputs and labels, the same on every call."""
    import numpy as np
    import tensorflow as tf

    generator = np.random.default_rng(0)
    shape = (batch, *model.input_shape[1:])
    if model.inputs[0].dtype == "int32":
        x = tf.constant(generator.integers(30522, size=shape, dtype=np.int32))
    else:
        x = tf.constant(generator.standard_normal(shape, np.float32))
    return x, tf.constant(generator.integers(model.output_shape[-1], size=batch))


def step_of(way: str, model: keras.Model) -> Callable[[Any, Any], Any]:
    """A traced function of inputs and labels; returns the mean norms, and makes the gradient."""
    import keras
    import tensorflow as tf

    from tf_lbopt.per_example import example_losses, per_example_gradient_norms

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = [variable.value for variable in model.trainable_variables]

    def gradient(x: tf.Tensor, y: tf.Tensor, training: bool) -> list[Any]:
        with tf.GradientTape() as tape:
            mean = tf.reduce_mean(example_losses(loss, y, model(x, training=training)))
        return tape.gradient(mean, variables)

    def norms_of_one(pair: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        x, y = pair
        # An example on its own has no batch to be normalized by.
        gradients = gradient(x[None], y[None], training=False)
        return tf.stack([_norm(g) for g in gradients])

    def step(x: tf.Tensor, y: tf.Tensor) -> Any:
        if way == "gradient":
            return [], _values(gradient(x, y, training=True))
        if way == "with_norms":
            norms, gradients = per_example_gradient_norms(model, x, y, loss)
            return [tf.reduce_mean(own) for own in norms], _values(gradients)
        if way == "vectorized_map":
            norms = tf.vectorized_map(norms_of_one, (x, y))
        else:
            norms = tf.map_fn(norms_of_one, (x, y), fn_output_signature=tf.float32)
        means = tf.unstack(tf.reduce_mean(norms, axis=0), num=len(variables))
        return means, _values(gradient(x, y, training=True))

    return tf.function(step, autograph=False)


def _norm(gradient: Any) -> tf.Tensor:
    """Of one example's gradient; of a sparse one without making a table of it."""
    import tensorflow as tf

    if not isinstance(gradient, tf.IndexedSlices):
        return tf.norm(gradient)
    same = gradient.indices[:, None] == gradient.indices[None, :]
    products = tf.matmul(gradient.values, gradient.values, transpose_b=True)
    return tf.sqrt(tf.reduce_sum(tf.where(same, products, tf.zeros_like(products))))


def _values(gradients: Sequence[Any]) -> list[tf.Tensor]:
    import tensorflow as tf

    return [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]


# -- running ---------------------------------------------------------------------------------------


def _run(options: Options) -> None:
    if options.memory_only:
        memory = _measure_memory(options)
        print(f"{memory.step_bytes / 2**20:.0f} MiB")
        if options.output is not None:
            write_json(options.output, asdict(memory))
        return
    # As wide as the table where there is no terminal to fit it into.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    comparisons = []
    for model in options.models:
        comparisons.append(_measure(options, model))
        console.print(_table(options, comparisons[-1]))
    for comparison in comparisons:
        console.print(_target_line(options, comparison), soft_wrap=True)
    if options.output is not None:
        write_json(options.output, _record(options, comparisons))
        console.print(f"wrote {options.output}", soft_wrap=True)


def _measure(options: Options, name: str) -> Comparison:
    console = Console(stderr=True)
    with console.status("starting TensorFlow"):
        model, x, y = _start(name, options.batch)
    memories: dict[str, Memory] = {}
    failed = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=_rounds(options, options.ways))

        def tick() -> None:
            progress.advance(task)

        for way in options.ways:
            # Vectorizing can end the process, so it is first tried in another one.
            if not options.memory and way != "vectorized_map":
                continue
            progress.update(task, description=f"{name}: memory of {way}")
            try:
                memory = _memory_in_fresh_process(options, name, way)
            except subprocess.CalledProcessError:
                if way not in _NAIVE:
                    raise
                failed.append(way)
                continue
            if options.memory:
                memories[way] = memory
        ways = [way for way in options.ways if way not in failed]
        progress.update(task, total=_rounds(options, ways))
        naive = [way for way in ways if way in _NAIVE]
        own = [way for way in ways if way not in _NAIVE]
        steps: dict[str, _Step] = {}
        for way in ways:
            progress.update(task, description=f"{name}: tracing {way}")
            steps[way] = _Step(step_of(way, model), x, y)
            steps[way]()
            tick()
        progress.update(task, description=f"{name}: warming up")
        interleaved(steps, options.warmup, tick)
        progress.update(task, description=f"{name}: measuring")
        timings = interleaved({way: steps[way] for way in own}, options.repeats, tick)
        timings |= interleaved({way: steps[way] for way in naive}, options.naive_repeats, tick)

    alone = timings["gradient"]
    rows = [_row(way, timings[way], alone, steps[way].means, memories.get(way)) for way in ways]
    return Comparison(
        model=name,
        parameters=count([tuple(v.shape) for v in model.trainable_variables]),
        variables=len(model.trainable_variables),
        rows=rows,
        failed=tuple(failed),
    )


def _rounds(options: Options, ways: Sequence[str]) -> int:
    return sum(
        1 + options.warmup + (options.naive_repeats if way in _NAIVE else options.repeats)
        for way in ways
    )


class _Step:
    """Runs one step to its end; keeps the mean norms."""

    def __init__(self, function: Callable[[Any, Any], Any], x: tf.Tensor, y: tf.Tensor) -> None:
        self._function, self._batch = function, (x, y)
        self.means: list[float] = []

    def __call__(self) -> None:
        # A traced function returns when all that it was asked for is computed.
        means, _ = self._function(*self._batch)
        self.means = [float(mean) for mean in means]


def _row(way: str, timing: Timing, alone: Timing, means: list[float], memory: Memory | None) -> Row:
    ratios = None
    if way not in _NAIVE:
        pairs = zip(timing.times, alone.times, strict=True)
        ratios = Timing(tuple(own / other for own, other in pairs)).median
    return Row(
        name=way,
        median_ms=timing.median,
        p10_ms=timing.p10,
        p90_ms=timing.p90,
        times_gradient=timing.median / alone.median,
        median_of_ratios=ratios,
        mean_norms=tuple(means) if means else None,
        memory=memory,
        all_ms=timing.times,
    )


def _start(name: str, batch: int) -> tuple[keras.Model, tf.Tensor, tf.Tensor]:
    # TensorFlow takes seconds to import, so it waits until the flags are known to be good.
    from official_recipes.common.replicas import quiet_tensorflow

    quiet_tensorflow()
    import keras
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    keras.utils.set_random_seed(0)
    model = build_model(name)
    return model, *batch_for(model, batch)


def _measure_memory(options: Options) -> Memory:
    model, x, y = _start(options.models[0], options.batch)
    function = step_of(options.ways[0], model)
    # Tracing takes memory of its own, and is no part of a step.
    function.get_concrete_function(x, y)  # type: ignore[attr-defined]
    before = resident_bytes() or 0
    for _ in range(2):
        function(x, y)
    return Memory(before_bytes=before, peak_bytes=_peak_bytes())


def _peak_bytes() -> int:
    """The most memory that this process held; its resource usage also counts its parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return peak_resident_bytes()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _memory_in_fresh_process(options: Options, model: str, way: str) -> Memory:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "memory.json"
        arguments = [
            f"--models={model}",
            f"--ways={way}",
            f"--batch={options.batch}",
            "--memory_only",
            f"--output={output}",
        ]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.per_example_norms", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return Memory(**json.loads(output.read_text(encoding="utf-8")))


# -- results ---------------------------------------------------------------------------------------


def _table(options: Options, comparison: Comparison) -> Table:
    table = Table(
        title=f"{comparison.model}: {comparison.parameters:,} parameters in "
        f"{comparison.variables} variables, {options.batch} examples",
        caption=f"{options.repeats} rounds, {options.naive_repeats} of the naive ways; "
        f"{cores()} cores",
    )
    table.add_column("way")
    for heading in ("median ms", "p10–p90", "× gradient", "per round", "MiB", "× gradient"):
        table.add_column(heading, justify="right")
    alone = comparison.rows[0].memory
    for row in comparison.rows:
        memory = row.memory
        table.add_row(
            row.name,
            f"{row.median_ms:.1f}",
            f"{row.p10_ms:.1f}–{row.p90_ms:.1f}",
            f"{row.times_gradient:.2f}",
            "–" if row.median_of_ratios is None else f"{row.median_of_ratios:.2f}",
            "–" if memory is None else f"{memory.step_bytes / 2**20:.0f}",
            "–" if memory is None or alone is None else _ratio_of(memory, alone),
        )
    for way in comparison.failed:
        table.add_row(way, "failed", *["–"] * 5)
    return table


def _ratio_of(memory: Memory, alone: Memory) -> str:
    return f"{memory.step_bytes / max(1, alone.step_bytes):.2f}"


def _target_line(options: Options, comparison: Comparison) -> str:
    rows = {row.name: row for row in comparison.rows}
    targets = TARGETS.get(comparison.model)
    ours = rows.get("with_norms")
    if ours is None or targets is None or options.batch != _TARGET_BATCH:
        return f"{comparison.model}: no targets for what was measured"
    parts = [_verdict("time", ours.times_gradient, targets.gradients)]
    if ours.memory is not None and rows["gradient"].memory is not None:
        ratio = ours.memory.step_bytes / max(1, rows["gradient"].memory.step_bytes)
        parts.append(_verdict("memory", ratio, targets.memory))
    naive = [rows[way].median_ms for way in _NAIVE if way in rows]
    if naive:
        faster = min(naive) / ours.median_ms
        met = "met" if faster >= targets.naive else "missed"
        parts.append(
            f"{faster:.1f} × as fast as the best naive way (at least {targets.naive:g}: {met})"
        )
    return f"{comparison.model}: {', '.join(parts)}"


def _verdict(what: str, ratio: float, most: float) -> str:
    return (
        f"{what} {ratio:.2f} × gradient (at most {most:g}: {'met' if ratio <= most else 'missed'})"
    )


def _record(options: Options, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}
    return {
        "benchmark": "per_example_norms",
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"cores": cores()},
        "settings": {
            name: value
            for name, value in asdict(options).items()
            if name not in ("models", "ways", "output", "memory_only")
        },
        "targets": {name: asdict(targets) for name, targets in TARGETS.items()},
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
