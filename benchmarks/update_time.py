"""Time of one optimizer update, side by side, against what memory allows.

Entry point of ``python -m benchmarks.update_time``; see benchmarks/README.md.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.clock import (
    MemoryCopy,
    Timing,
    cores,
    interleaved,
    peak_resident_bytes,
    resident_bytes,
)
from benchmarks.command_line import (
    as_given,
    listed_names,
    output_file,
    progress_bar,
    run_benchmark,
)
from benchmarks.shapes import MODELS, Shape, count
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    FlagValueError,
    define_integer,
    help_text,
    parse_flags,
)

if TYPE_CHECKING:
    import tensorflow as tf

    from benchmarks.contenders import Contender

PROGRAM = "python -m benchmarks.update_time"
SUMMARY = (
    "Measures one update of every optimizer on the variable shapes of known models, interleaved\n"
    "with copies of memory, and prints how far each is from what memory allows."
)
_COPY = "memory copy"
_LAMB = "keras_lamb"
_WEIGHTING = "weighting"
_DISTRIBUTIONS = ("tensorflow", "keras", "numpy", "tf-lbopt", "tf_keras", "tf-models-official")


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        shapes: Names of the models.
        optimizers: Names of the optimizers; none means all.
        repeats: Timed rounds.
        warmup: Rounds before them.
        weight_decay: λ of all optimizers, or 0.
        replicas: The number of logical CPU devices.
        output: The JSON file to write, or ``None``.
    """

    shapes: tuple[str, ...]
    optimizers: tuple[str, ...]
    repeats: int
    warmup: int
    weight_decay: float
    replicas: int
    output: Path | None


@dataclass(frozen=True)
class Row:
    """What was found out about one optimizer; JSON holds the same names."""

    name: str
    micro_steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    floor_ms: float
    times_own_floor: float
    times_momentum_floor: float
    times_keras_lamb: float | None
    slots_per_parameter: float
    accumulators_per_parameter: float | None
    collective_reductions_per_replica: float
    all_ms: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """The rows of one model."""

    model: str
    shapes: list[Shape]
    copy: Timing
    bytes_per_ms: float
    momentum_floor_ms: float
    weighting: Timing | None
    weighting_floor_ms: float
    rows: list[Row]
    resident_bytes_after_warmup: int | None
    resident_bytes_at_end: int | None
    peak_resident_bytes: int


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark on a command line, program name first, and returns the exit code."""
    return run_benchmark(argv, parse_options, _run)


# -- flags -----------------------------------------------------------------------------------------


class _WeightDecayParser(flags.ArgumentParser):
    syntactic_help = "a number >= 0"

    def parse(self, argument: str | float) -> float:
        try:
            value = float(argument)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected {self.syntactic_help}, received {argument!r}")
        return value


def parse_options(argv: Sequence[str]) -> Options | None:
    """Parses and checks the command line; prints help and returns ``None`` when asked for it.

    Args:
        argv: The command line, program name first.

    Raises:
        FlagValueError: A flag cannot be used.
    """
    values = flags.FlagValues()
    flags.DEFINE_list(
        "shapes",
        "resnet50",
        f"Comma-separated models whose variable shapes to use: {', '.join(MODELS)}.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "optimizers",
        "",
        "Comma-separated names: any of tf_lbopt.list_optimizers(), keras_sgd, keras_adam, "
        "keras_lamb, keras_lion, keras_muon, tf_models_lars, tf_models_lamb. Empty means all.",
        flag_values=values,
    )
    define_integer(values, "repeats", 20, "Timed rounds.")
    define_integer(values, "warmup", 3, "Rounds before the timed ones.")
    flags.DEFINE(
        _WeightDecayParser(),
        "weight_decay",
        0.0,
        "Weight decay of all optimizers; 0 means none.",
        flag_values=values,
    )
    define_integer(values, "replicas", 1, "Logical CPU devices, one replica each.", maximum=64)
    flags.DEFINE_string("output", None, "JSON file to write.", flag_values=values)
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    parse_flags(values, argv)
    if values.help:
        print(help_text(values, PROGRAM, SUMMARY))
        return None

    shapes = listed_names(values.shapes)
    if not shapes or not set(shapes) <= set(MODELS):
        raise FlagValueError("shapes", f"some of {', '.join(MODELS)}", as_given(values.shapes))
    return Options(
        shapes=shapes,
        optimizers=listed_names(values.optimizers),
        repeats=values.repeats,
        warmup=values.warmup,
        weight_decay=values.weight_decay,
        replicas=values.replicas,
        output=output_file(values.output),
    )


# -- measuring -------------------------------------------------------------------------------------


def _run(options: Options) -> None:
    # TensorFlow takes seconds to import, so it waits until the flags are known to be good.
    from official_recipes.common.replicas import cpu_strategy, quiet_tensorflow

    progress_console = Console(stderr=True)
    with progress_console.status("starting TensorFlow"):
        quiet_tensorflow()
        import tensorflow as tf

        if options.replicas > 1:
            strategy: tf.distribute.Strategy = cpu_strategy(options.replicas)
        else:
            tf.config.set_visible_devices([], "GPU")
            strategy = tf.distribute.get_strategy()
        from benchmarks.contenders import contenders

        known, skipped = contenders(options.weight_decay, options.replicas)
    chosen = _choose(options.optimizers, known, skipped)
    skipped = [
        entry for entry in skipped if not options.optimizers or entry[0] in options.optimizers
    ]

    # As wide as the table where there is no terminal to fit it into.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for name, reason in skipped:
        console.print(f"{name} is skipped: {reason}", soft_wrap=True)
    comparisons = []
    for model in options.shapes:
        comparisons.append(_compare(model, chosen, strategy, options, progress_console))
        console.print(_table(comparisons[-1], options))
        if comparisons[-1].weighting is not None:
            console.print(_weighting_line(comparisons[-1]))
        console.print(_memory_line(comparisons[-1]))
        gc.collect()  # the graphs hold cycles, and with them the slots
    if options.output is not None:
        write_json(options.output, _record(options, comparisons, skipped))
        console.print(f"wrote {options.output}", soft_wrap=True)


def _choose(
    names: Sequence[str], known: Sequence[Contender], skipped: Sequence[tuple[str, str]]
) -> list[Contender]:
    if not names:
        return list(known)
    available = {contender.name: contender for contender in known}
    unknown = set(names) - set(available) - {name for name, _ in skipped}
    if unknown:
        raise FlagValueError("optimizers", f"some of {', '.join(available)}", as_given(names))
    return [available[name] for name in names if name in available]


def _compare(
    model: str,
    chosen: Sequence[Contender],
    strategy: tf.distribute.Strategy,
    options: Options,
    console: Console,
) -> Comparison:
    from benchmarks import contenders as contending

    shapes = MODELS[model]()
    rounds = options.warmup + options.repeats
    with progress_bar(console) as progress:
        task = progress.add_task(f"{model}: building", total=len(chosen) * (rounds + 1) + rounds)

        def tick() -> None:
            progress.advance(task)

        with strategy.scope():
            variables, gradient_sets = _variables_and_gradients(shapes)
            small_variables, _ = _variables_and_gradients(MODELS["tiny"]())
            optimizers, updates = {}, {}
            for contender in chosen:
                optimizer = contender.optimizer(variables)
                optimizers[contender.name] = optimizer
                updates[contender.name] = contending.update_function(
                    contender, optimizer, variables, gradient_sets, strategy
                )
                tick()
            accumulators = {
                c.name: contending.accumulators_per_parameter(c, small_variables) for c in chosen
            }
        tasks: dict[str, Callable[[], object]] = {_COPY: MemoryCopy(), **updates}
        if any(name.startswith("vr_") for name in updates):
            tasks[_WEIGHTING] = contending.weighting_function(gradient_sets)
        progress.update(task, description=f"{model}: warming up")
        interleaved(tasks, options.warmup, tick)
        resident_before = resident_bytes()
        progress.update(task, description=f"{model}: measuring")
        timings = interleaved(tasks, options.repeats, tick)
        resident_after = resident_bytes()

    bytes_per_ms = MemoryCopy.bytes_moved / timings[_COPY].median
    floats = count(shapes) * options.replicas

    def floor_ms(slots: float) -> float:
        # Gradient, weights and slots are read; weights and slots are written.
        return 4 * floats * (3 + 2 * slots) / bytes_per_ms

    rows = []
    for contender in chosen:
        timing = timings[contender.name]
        slots = contending.slots_per_parameter(optimizers[contender.name], shapes)
        is_lamb = "lamb" in contender.name and _LAMB in timings
        rows.append(
            Row(
                name=contender.name,
                micro_steps=contender.micro_steps,
                median_ms=timing.median,
                p10_ms=timing.p10,
                p90_ms=timing.p90,
                floor_ms=floor_ms(slots),
                times_own_floor=timing.median / floor_ms(slots),
                times_momentum_floor=timing.median / floor_ms(1),
                times_keras_lamb=timing.median / timings[_LAMB].median if is_lamb else None,
                slots_per_parameter=slots,
                accumulators_per_parameter=accumulators[contender.name],
                collective_reductions_per_replica=contending.collective_reductions(
                    updates[contender.name], options.replicas
                ),
                all_ms=timing.times,
            )
        )
    return Comparison(
        model=model,
        shapes=shapes,
        copy=timings[_COPY],
        bytes_per_ms=bytes_per_ms,
        momentum_floor_ms=floor_ms(1),
        weighting=timings.get(_WEIGHTING),
        # ḡ and σ² are read, r ḡ is written, once (on one replica).
        weighting_floor_ms=12 * count(shapes) / bytes_per_ms,
        rows=rows,
        resident_bytes_after_warmup=resident_before,
        resident_bytes_at_end=resident_after,
        peak_resident_bytes=peak_resident_bytes(),
    )


def _variables_and_gradients(
    shapes: Sequence[Shape],
) -> tuple[list[Any], list[list[tf.Tensor]]]:
    import keras
    import numpy as np
    import tensorflow as tf

    generator = np.random.default_rng(0)

    def normal(shape: Shape) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    variables = [keras.Variable(0.05 * normal(shape)) for shape in shapes]
    means = [1e-3 * normal(shape) for shape in shapes]
    return variables, [
        [tf.constant(mean + 1e-3 * normal(mean.shape)) for mean in means] for _ in range(2)
    ]


# -- results ---------------------------------------------------------------------------------------


def _table(comparison: Comparison, options: Options) -> Table:
    decay = f"weight decay {options.weight_decay:g}" if options.weight_decay else "no weight decay"
    table = Table(
        title=f"{comparison.model}: {len(comparison.shapes)} variables, "
        f"{count(comparison.shapes) / 1e6:.1f} M parameters, {decay}, "
        f"{options.replicas} replica{'s' if options.replicas > 1 else ''}, {cores()} cores",
        caption=f"memory floor of momentum SGD {comparison.momentum_floor_ms:.2f} ms; memory copy "
        f"{comparison.bytes_per_ms / 1e6:.1f} GB/s, {comparison.copy.median:.1f} ms "
        f"({comparison.copy.p10:.1f}–{comparison.copy.p90:.1f}); {options.repeats} rounds",
    )
    table.add_column("optimizer")
    headings = ["median ms", "p10–p90", "× own floor", "× momentum floor", "× keras lamb"]
    headings += ["slots", "accumulators"]
    if options.replicas > 1:
        headings.append("reductions")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in comparison.rows:
        label = row.name if row.micro_steps == 1 else f"{row.name} ({row.micro_steps} micro-steps)"
        cells = [
            label,
            f"{row.median_ms:.2f}",
            f"{row.p10_ms:.2f}–{row.p90_ms:.2f}",
            f"{row.times_own_floor:.2f}",
            f"{row.times_momentum_floor:.2f}",
            "–" if row.times_keras_lamb is None else f"{row.times_keras_lamb:.2f}",
            f"{row.slots_per_parameter:g}",
            "–"
            if row.accumulators_per_parameter is None
            else f"+{row.accumulators_per_parameter:g}",
        ]
        if options.replicas > 1:
            cells.append(f"{row.collective_reductions_per_replica:g}")
        table.add_row(*cells)
    return table


def _weighting_line(comparison: Comparison) -> str:
    timing = comparison.weighting
    assert timing is not None
    times = timing.median / comparison.weighting_floor_ms
    return (
        f"VRGD's step from sub-batch statistics to r ḡ: {timing.median:.1f} ms "
        f"({timing.p10:.1f}–{timing.p90:.1f}), {times:.1f} × its memory floor"
    )


def _memory_line(comparison: Comparison) -> str:
    before, after = comparison.resident_bytes_after_warmup, comparison.resident_bytes_at_end
    peak = f"peak resident memory {comparison.peak_resident_bytes / 2**30:.2f} GiB"
    if before is None or after is None:
        return peak
    return (
        f"{peak}; {before / 2**30:.2f} GiB after warm-up, {after / 2**30:.2f} GiB at the end "
        f"({(after - before) / 2**20:+.1f} MiB)"
    )


def _record(
    options: Options, comparisons: Sequence[Comparison], skipped: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    settings = asdict(options)
    for not_a_setting in ("shapes", "optimizers", "output"):
        del settings[not_a_setting]
    return {
        "benchmark": "update_time",
        "versions": versions,
        "machine": {"cores": cores()},
        "settings": settings,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
        "comparisons": [
            {
                "model": c.model,
                "variables": len(c.shapes),
                "parameters": count(c.shapes),
                "shapes": c.shapes,
                "memory_copy": {
                    "bytes": MemoryCopy.bytes_moved,
                    "median_ms": c.copy.median,
                    "p10_ms": c.copy.p10,
                    "p90_ms": c.copy.p90,
                    "all_ms": c.copy.times,
                },
                "momentum_floor_ms": c.momentum_floor_ms,
                "weighting_floor_ms": c.weighting_floor_ms,
                "weighting_median_ms": None if c.weighting is None else c.weighting.median,
                "optimizers": [asdict(row) for row in c.rows],
                "resident_bytes": {
                    "after_warmup": c.resident_bytes_after_warmup,
                    "at_end": c.resident_bytes_at_end,
                    "peak": c.peak_resident_bytes,
                },
            }
            for c in comparisons
        ],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
