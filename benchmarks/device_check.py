"""What a GPU host or a TPU makes of the optimizers: right or not, equal replicas, times, memory.

Entry point of ``python -m benchmarks.device_check``; see docs/accelerators.md.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
from benchmarks.step_time import (
    BASES,
    TimedStep,
    pairs_of,
    timed_optimizer,
    training_step,
    with_bases,
)
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    POSITIVE,
    FlagValueError,
    define_integer,
    parse_unless_help,
)
from official_recipes.common.interruption import Interrupted, Interruption, interruption
from official_recipes.common.replicas import quiet_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

PROGRAM = "python -m benchmarks.device_check"
SUMMARY = (
    "Checks every optimizer against float64 on the GPUs or the TPU of this machine, compares the\n"
    "replicas' variables bit by bit, and times whole training steps of ResNet-50 and BERT-base.\n"
    "Ctrl-C ends it with what has been measured; a second one ends it at once."
)
UPDATES, TOLERANCE = 3, 1e-4
NO_UPDATE = "forward and backward"
_STEP_BASES = {**BASES, "lamb": "keras_lamb"}
_STEPS = ("sngm", "lars", "vr_lars", "lamb", "vr_lamb")
# Examples for each replica.
_MODELS = {"resnet50": 64, "bert_base": 32}
_SMALL_MODELS = {"resnet_tiny": 4, "bert_small": 4}
_MODULES = ("tensorflow", "keras", "numpy", "tf_lbopt")


def define_flags() -> flags.FlagValues:
    """Returns the program's flags."""
    values = flags.FlagValues()
    flags.DEFINE_enum(
        "device",
        "auto",
        ["auto", "gpu", "tpu", "cpu"],
        "Where to run; auto takes all GPUs, else a TPU, else CPU devices.",
        flag_values=values,
    )
    define_integer(values, "replicas", 2, "Logical devices on a CPU.", maximum=64)
    flags.DEFINE_boolean(
        "small", False, "Tiny models and few rounds, to try the program.", flag_values=values
    )
    flags.DEFINE_list(
        "optimizers",
        "",
        "Comma-separated names: any of tf_lbopt.list_optimizers(). Empty means all; whole steps "
        f"are those of {', '.join(_STEPS)}.",
        flag_values=values,
    )
    define_integer(
        values,
        "batch_per_replica",
        None,
        "Examples of a step; else " + ", ".join(f"{n} of {m}" for m, n in _MODELS.items()) + ".",
        minimum=2,
    )
    define_integer(values, "rounds", 20, "Timed rounds at most.")
    flags.DEFINE(POSITIVE, "minutes", 10.0, "After which nothing new begins.", flag_values=values)
    flags.DEFINE_string("output", None, "JSON file to write.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Checks the device, as a command line says, program name first; returns the exit code.

    It is 1 where something is wrong or failed, and 130 after Ctrl-C.
    """
    codes: list[int] = []
    code = run_benchmark(argv, _parse, lambda values: codes.append(_run(values)))
    return code or sum(codes)


def _parse(argv: Sequence[str]) -> flags.FlagValues | None:
    values = define_flags()
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    output_file(values.output)
    return values


def strategy_of(device: str, replicas: int) -> tuple[tf.distribute.Strategy, list[str]]:
    """The strategy for all devices of a kind, and their names.

    Args:
        device: "auto", "gpu", "tpu" or "cpu".
        replicas: How many logical devices a CPU has.
    """
    import tensorflow as tf

    from official_recipes.common.replicas import cpu_strategy

    gpus = tf.config.list_physical_devices("GPU")
    tpus = tf.config.list_physical_devices("TPU")
    if device == "auto":
        device = "gpu" if gpus else "tpu" if tpus else "cpu"
    if device == "gpu":
        if not gpus:
            raise FlagValueError("device", "a device that TensorFlow finds here", "gpu")
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        names = [f"GPU:{i} {d.get('device_name', '')}".strip() for i, d in enumerate(details)]
        return _default_or_mirrored([f"GPU:{i}" for i in range(len(gpus))]), names
    if device == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
            tf.tpu.experimental.initialize_tpu_system(resolver)
            strategy = tf.distribute.TPUStrategy(resolver)
        except (ValueError, tf.errors.OpError) as error:
            received = f"tpu: {str(error)[:200]}"
            raise FlagValueError("device", "one that TensorFlow finds here", received) from error
        return strategy, [f"TPU:{i}" for i in range(strategy.num_replicas_in_sync)]
    if replicas == 1:
        tf.config.set_visible_devices([], "GPU")
        return tf.distribute.get_strategy(), ["CPU:0"]
    return cpu_strategy(replicas), [f"CPU:{i} (logical)" for i in range(replicas)]


def _default_or_mirrored(devices: list[str]) -> tf.distribute.Strategy:
    import tensorflow as tf

    if len(devices) == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(devices)


def _run(values: flags.FlagValues) -> int:
    start = time.monotonic()
    errors = Console(stderr=True)
    with errors.status("starting TensorFlow"):
        quiet_tensorflow()
        from benchmarks.checked_updates import OURS

    chosen = listed_names(values.optimizers) or tuple(OURS)
    if not {*chosen} <= {*OURS}:
        raise FlagValueError("optimizers", f"some of {', '.join(OURS)}", as_given(chosen))
    strategy, devices = strategy_of(values.device, values.replicas)
    warnings.filterwarnings("ignore", category=UserWarning)  # of few sub-batches
    code = 0
    rows: list[dict[str, Any]] = []
    try:
        with interruption(last_words="interrupted again: nothing was written") as interrupted:
            check = _Check(
                values, strategy, devices, start + 60 * values.minutes, interrupted, rows
            )
            with progress_bar(errors) as progress:
                task = progress.add_task("", total=None)
                check.show = lambda text: progress.update(task, description=text)
                if not errors.is_terminal:
                    check.show = lambda text: errors.print(text, soft_wrap=True)
                check.updates(chosen)
                given = [name for name in chosen if name in _STEP_BASES]
                steps = given if values.optimizers else _STEPS
                models = _SMALL_MODELS if values.small else _MODELS
                for number, (model, examples) in enumerate(models.items()):
                    check.steps(
                        model,
                        values.batch_per_replica or examples,
                        with_bases(steps, _STEP_BASES),
                        share=1 / (len(models) - number),
                    )
    except Interrupted as error:
        code = error.exit_code
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(_table(rows, devices))
    not_run = _not_run(rows, strategy.num_replicas_in_sync)
    for text in not_run:
        console.print(f"not run: {text}", soft_wrap=True)
    if values.output is not None:
        settings = {name: values[name].value for name in values if name not in ("help", "output")}
        modules = {name: importlib.import_module(name) for name in _MODULES}
        versions = {name: module.__version__ for name, module in modules.items()}
        record = {
            "benchmark": "device_check",
            "versions": {"python": platform.python_version(), **versions},
            "machine": {"devices": devices, "cores": cores()},
            "strategy": type(strategy).__name__,
            "settings": settings,
            "interrupted": bool(code),
            "rows": rows,
            "not_run": not_run,
        }
        write_json(Path(values.output), record)
        console.print(f"wrote {values.output}", soft_wrap=True)
    failed = [row for row in rows if "failed" in row or row.get("right") is False]
    failed += [row for row in rows if row.get("replicas_equal") is False]
    return code or int(bool(failed))


class _Check:
    """Fills rows."""

    def __init__(
        self,
        values: flags.FlagValues,
        strategy: tf.distribute.Strategy,
        devices: Sequence[str],
        deadline: float,
        interrupted: Interruption,
        rows: list[dict[str, Any]],
    ):
        self._values, self._strategy = values, strategy
        self._device = devices[0].split()[0]
        self._deadline, self._interrupted, self._rows = deadline, interrupted, rows
        self._replicas = strategy.num_replicas_in_sync
        # One replica without accumulation is a single sub-batch, of which there is no variance.
        self._micro_steps = 2 if self._replicas == 1 else 1
        self._longest = 0.0
        self.show: Callable[[str], None] = lambda text: None

    @contextlib.contextmanager
    def _row(self, what: str, name: str, until: float) -> Iterator[dict[str, Any] | None]:
        """A new row, or `None` where there is no time left for as long as the longest took.

        An error inside becomes a part of it.
        """
        self._interrupted.check()
        row: dict[str, Any] = {"what": what, "name": name}
        start = time.monotonic()
        if start + self._longest > until:
            self._rows.append({**row, "not_run": "no time left"})
            yield None
            return
        self.show(f"{what}: {name}")
        try:
            yield row
        except Interrupted:
            raise
        except Exception as error:  # of whatever kind a device has
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row["seconds"] = round(time.monotonic() - start, 1)
        self._longest = max(self._longest, row["seconds"])
        self._rows.append(row)
        gc.collect()  # variables are in cycles

    def updates(self, names: Sequence[str]) -> None:
        """Every optimizer against float64, on all replicas, with two micro-steps."""
        # Steps are to have their time, too.
        until = time.monotonic() + 0.5 * (self._deadline - time.monotonic())
        ways: dict[str, dict[str, Any]] = {"": {}}
        if self._device.startswith("GPU"):
            ways = {"": {}, " (not compiled)": {"jit_compile": False}}
        for way, arguments in ways.items():
            for name in names:
                with self._row("update", name + way, until) as row:
                    if row is not None:
                        row |= self._update(name, arguments)

    def _update(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        import keras
        import tensorflow as tf

        from benchmarks import checked_updates as checked
        from benchmarks.shapes import Shape, tiny

        shapes: list[Shape] = [(6, 5), (5,)] if self._values.small else tiny()
        micro_steps, decay = 2, {"weight_decay": 0.01}
        start = [checked.weight(i, shape).values() for i, shape in enumerate(shapes)]
        sub_batches = [
            [checked.gradient(i, shape, j).values() for i, shape in enumerate(shapes)]
            for j in range(micro_steps * self._replicas)
        ]
        with self._strategy.scope():
            variables = [keras.Variable(value, name=f"v{i}") for i, value in enumerate(start)]
            optimizer = checked.create(
                name, gradient_accumulation_steps=micro_steps, **decay, **arguments
            )
            optimizer.build(variables)

        def on_replica(gradients: list[tf.Tensor]) -> None:
            moved = hasattr(optimizer, "extrapolated")
            with optimizer.extrapolated(variables) if moved else contextlib.nullcontext():
                optimizer.apply([g / self._replicas for g in gradients], variables)

        @tf.function(autograph=False)
        def step(gradients: list[Any]) -> None:
            self._strategy.run(on_replica, (gradients,))

        for _ in range(UPDATES):
            for m in range(micro_steps):
                own = sub_batches[m * self._replicas : (m + 1) * self._replicas]
                step([self._distributed(list(layer)) for layer in zip(*own, strict=True)])
        ends = checked.expected(name, start, [sub_batches] * UPDATES, **decay)
        error = max(
            np.abs(v.numpy() - end).max() / np.abs(end - before).max()
            for v, end, before in zip(variables, ends, start, strict=True)
        )
        result: dict[str, Any] = {"error": float(error), "right": bool(error <= TOLERANCE)}
        if self._replicas > 1:
            copies = [
                [copy.numpy() for copy in self._strategy.experimental_local_results(v.value)]
                for v in (*variables, *optimizer.variables)
            ]
            result["replicas_equal"] = all(
                np.array_equal(first, copy) for first, *others in copies for copy in others
            )
        return result

    def _distributed(self, values: list[np.ndarray]) -> Any:
        """A value for each replica."""
        import tensorflow as tf

        tensors = [tf.constant(value) for value in values]
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: tensors[context.replica_id_in_sync_group]
        )

    def steps(self, model_name: str, examples: int, names: Sequence[str], share: float) -> None:
        """Whole training steps of one model, timed in turn.

        Args:
            model_name: One of `benchmarks.models.WORKLOADS`.
            examples: Of each replica.
            names: Of optimizers.
            share: Of the time that is left.
        """
        import keras

        what = f"{model_name} step"
        until = time.monotonic() + share * (self._deadline - time.monotonic())
        self._longest = 0.0
        steps: dict[str, TimedStep] = {}
        rows: dict[str, dict[str, Any]] = {}
        keras.utils.set_random_seed(0)
        with self._row(what, NO_UPDATE, until) as row:
            if row is None:
                return
            from benchmarks.models import WORKLOADS

            with self._strategy.scope():
                model = WORKLOADS[model_name].model()
            batch = self._batch(model_name, examples)
            rows[NO_UPDATE] = row
            steps[NO_UPDATE] = self._step(model, None, batch, row)
        if NO_UPDATE not in steps:
            return
        for name in names:
            # A third is left for the rounds.
            with self._row(what, name, until - (until - time.monotonic()) / 3) as row:
                if row is not None:
                    rows[name] = row
                    steps[name] = self._step(model, name, batch, row)
        self._time(what, steps, rows, until)

    def _step(self, model: Any, name: str | None, batch: Any, row: dict[str, Any]) -> TimedStep:
        """Traces a step, runs it twice, and says what memory that took beyond what was in use."""
        before = self._memory()
        with self._strategy.scope():
            optimizer = None if name is None else timed_optimizer(name, self._micro_steps)
            if optimizer is not None:
                optimizer.build(model.trainable_variables)
        step = TimedStep(
            training_step(model, optimizer, self._micro_steps, self._strategy),
            batch,
            self._strategy.experimental_local_results,
        )
        for _ in range(2):
            step()
        after = self._memory()
        if before is not None and after is not None:
            row["peak_bytes"] = after["peak"] - before["current"]
        return step

    def _memory(self) -> dict[str, int] | None:
        """What is in use on the first device, and its peak since the last call."""
        import tensorflow as tf

        try:
            used = tf.config.experimental.get_memory_info(self._device)
            tf.config.experimental.reset_memory_stats(self._device)
        except (ValueError, tf.errors.OpError):
            return None  # not every kind of device tells
        return used if used["peak"] else None  # a CPU tells of nothing

    def _batch(self, model_name: str, examples: int) -> tuple[Any, Any]:
        from benchmarks.models import WORKLOADS

        workload, generator = WORKLOADS[model_name], np.random.default_rng(0)

        def inputs() -> np.ndarray:
            shape = (examples, *workload.inputs)
            if workload.tokens:
                return generator.integers(workload.tokens, size=shape, dtype=np.int32)
            return generator.standard_normal(shape, np.float32)

        def labels() -> np.ndarray:
            size = (examples, *workload.labels)
            return generator.integers(workload.classes, size=size, dtype=np.int32)

        return (
            self._distributed([inputs() for _ in range(self._replicas)]),
            self._distributed([labels() for _ in range(self._replicas)]),
        )

    def _time(
        self, what: str, steps: dict[str, TimedStep], rows: dict[str, dict[str, Any]], until: float
    ) -> None:
        rounds = 3 if self._values.small else self._values.rounds
        times: dict[str, tuple[float, ...]] = dict.fromkeys(steps, ())
        try:
            for number in range(rounds):
                start = time.monotonic()
                self.show(f"{what}: round {number + 1} of {rounds}")
                measured = interleaved(steps, 1, self._interrupted.check, seed=number)
                times = {name: times[name] + measured[name].times for name in steps}
                if 2 * time.monotonic() - start > until:
                    break
        finally:
            if all(times.values()):
                timings = {name: Timing(values) for name, values in times.items()}
                for name, timing in timings.items():
                    rows[name] |= {
                        "median_ms": timing.median,
                        "p10_ms": timing.p10,
                        "p90_ms": timing.p90,
                        "overhead_ms": timing.median - timings[NO_UPDATE].median,
                        "all_ms": timing.times,
                    }
                for pair in pairs_of(timings, _STEP_BASES):
                    rows[pair.name] |= {
                        "base": pair.base,
                        "times_base": pair.ratio,
                        "times_base_per_round": pair.median_of_ratios,
                    }


def _not_run(rows: Sequence[dict[str, Any]], replicas: int) -> list[str]:
    """What was left out, and why."""
    result = [f"{r['what']} {r['name']}: {r['not_run']}" for r in rows if "not_run" in r]
    if replicas == 1:
        result.append("comparing replicas: there is one")
    if not any("peak_bytes" in row for row in rows):
        result.append("peak memory: this device does not tell it, or no step was run")
    return result


def _table(rows: Sequence[dict[str, Any]], devices: Sequence[str]) -> Table:
    table = Table(title=f"on {', '.join(devices)}")
    for heading in ("what", "optimizer", "result"):
        table.add_column(heading, overflow="fold")
    for heading in ("median ms", "p10–p90", "overhead ms", "× base", "peak MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row["what"], row["name"], _result(row)]
        if "median_ms" in row:
            base = f"{row['times_base']:.3f} {row['base']}" if "base" in row else ""
            cells += [
                f"{row['median_ms']:.1f}",
                f"{row['p10_ms']:.1f}–{row['p90_ms']:.1f}",
                "" if row["name"] == NO_UPDATE else f"{row['overhead_ms']:+.1f}",
                base,
                f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else "",
            ]
        table.add_row(*cells)
    return table


def _result(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return f"not run: {row['not_run']}"
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    if "error" not in row:
        return ""
    parts = [f"{'right' if row['right'] else 'WRONG'}, error {row['error']:.0e}"]
    if "replicas_equal" in row:
        parts.append("replicas equal" if row["replicas_equal"] else "REPLICAS DIFFER")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
