"""Runs exported programs on the device that JAX has, without TensorFlow.

    python -m benchmarks.run_programs FILE... [--rounds=20] [--updates=5] [--output=FILE]

Files are the .json ones of `benchmarks.xla_programs`, their .hlo.pb beside them. First each program
is checked: after some updates the weights must be as in float64. Then those of one model are timed
in turn, in another order each round, together with a pass that reads and writes 256 MiB. The floor
of an update is what it must move (gradients read, weights and slots read and written; accumulators
and second passes for norms do not count) at the speed of that pass.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import Timing, interleaved
from benchmarks.program_files import NotAProgramError, Program, read
from benchmarks.tpu_check.tables import markdown
from official_recipes.common.files import write_json
from official_recipes.common.interruption import NO_RESULTS

NO_JAX = "needs JAX: pip install jax, on a GPU 'jax[cuda12]' ({error})"
COLUMNS = (
    "median ms",
    "p10–p90",
    "× floor",
    "× keras_sgd",
    "× keras_lamb",
    "× base",
    "error",
    "compiled in s",
)
_PASS = "read and write"
_PASS_FLOATS = 1 << 26


class _Task:
    """A program with its arguments on the device."""

    def __init__(self, program: Program, updates: int, inputs: dict[Any, Any]):
        import jax

        from benchmarks._jax_compat import Executable

        self.program, self._updates = program, updates
        start = time.perf_counter()
        self._run = Executable(program.code, jax.local_devices()[0])
        self.seconds = time.perf_counter() - start
        self._arguments = []
        for argument in program.arguments:
            key = (argument.terms, argument.shape, argument.dtype)
            if argument.role != "input":
                self._arguments.append(jax.device_put(argument.values()))
            elif key not in inputs:
                inputs[key] = jax.device_put(argument.values())
            if argument.role == "input":
                self._arguments.append(inputs[key])

    def __call__(self) -> None:
        """Some updates, to their end."""
        self._update(self._updates)

    def _update(self, updates: int) -> None:
        import jax

        for _ in range(updates):
            for argument, result in zip(
                self.program.results, self._run(self._arguments), strict=True
            ):
                if argument >= 0:
                    self._arguments[argument] = result
        jax.block_until_ready(self._arguments)

    def error(self) -> float:
        """How far a weight is off after the first updates, as a part of its change.

        It is that of the worst weight, of whole steps the median of all.
        """
        self._update(self.program.updates)
        errors = [
            expected.error(
                self.program.arguments[expected.argument].values(),
                np.asarray(self._arguments[expected.argument]),
            )
            for expected in self.program.expected
        ]
        # Either is NaN where one is.
        return float((np.max if self.program.kind == "update" else np.median)(errors))


def _pass() -> Callable[[], None]:
    """Reads an array larger than any cache and writes it."""
    import jax

    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = [add(jax.numpy.zeros(_PASS_FLOATS, np.float32))]

    def run() -> None:
        array[0] = add(array[0]).block_until_ready()

    return run


def measure(programs: Sequence[Program], rounds: int, updates: int) -> dict[str, Any]:
    """Checks and times the programs of one group.

    Args:
        programs: They.
        rounds: How many are timed.
        updates: Of each program in each round, one after the other.
    """
    inputs: dict[Any, Any] = {}
    tasks: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for program in programs:
        row = rows[program.name] = {"name": program.name, "base": program.base}
        try:
            task = _Task(program, updates, inputs)
            error = task.error()
        except Exception as failure:  # XLA's own have no common class
            row["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
        else:
            row |= {"error": error, "right": error <= program.tolerance, "seconds": task.seconds}
            row |= {"least_bytes": program.least_bytes, "parameters": program.parameters}
            tasks[program.name] = task
        print(f"{program.group} {program.name}: {_verdict(row)}", file=sys.stderr, flush=True)
    timed = {_PASS: _pass(), **tasks}
    interleaved(timed, 2, lambda: None)
    timings = interleaved(timed, rounds, lambda: None)
    speed = 8 * _PASS_FLOATS / timings[_PASS].median  # bytes per ms
    times = {
        name: Timing(tuple(t / updates for t in timing.times))
        for name, timing in timings.items()
        if name != _PASS
    }
    for name, timing in times.items():
        row = rows[name]
        row |= {"median_ms": timing.median, "p10_ms": timing.p10, "p90_ms": timing.p90}
        row["all_ms"] = timing.times
        if row["least_bytes"]:
            row["times_floor"] = timing.median * speed / row["least_bytes"]
        for column, other in (
            ("times_keras_sgd", "keras_sgd"),
            ("times_keras_lamb", "keras_lamb"),
            ("times_base", row["base"]),
        ):
            if other in times:
                row[column] = timing.median / times[other].median
    return {"model": programs[0].group, "bytes_per_ms": speed, "rows": list(rows.values())}


def _verdict(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"]
    return f"{'right' if row['right'] else 'WRONG'}, error {row['error']:.1e} of the change"


def table(group: dict[str, Any]) -> str:
    """A group's rows."""

    def ratio(row: dict[str, Any], column: str) -> str:
        return f"{row[column]:.2f}" if column in row else ""

    def cells(row: dict[str, Any]) -> list[str]:
        if "failed" in row:
            return [row["name"], row["failed"], *[""] * (len(COLUMNS) - 1)]
        columns = ("times_floor", "times_keras_sgd", "times_keras_lamb", "times_base")
        return [
            row["name"],
            f"{row['median_ms']:.2f}",
            f"{row['p10_ms']:.2f}–{row['p90_ms']:.2f}",
            *(ratio(row, column) for column in columns),
            f"{row['error']:.0e}" + ("" if row["right"] else " WRONG"),
            f"{row['seconds']:.1f}",
        ]

    return markdown([group["model"], *COLUMNS], map(cells, group["rows"]))


def main(argv: Sequence[str]) -> int:
    """Runs what a command line names, program name first, and returns the exit code.

    It is 1 where a program fails or is wrong.
    """
    try:
        return _run(argv[1:])
    except NotAProgramError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(NO_RESULTS, file=sys.stderr)
        return 130


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run_programs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .json of a program")
    parser.add_argument("--rounds", type=int, default=20, help="that are timed (20)")
    parser.add_argument("--updates", type=int, default=5, help="of each in a round (5)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    if min(options.rounds, options.updates) < 1:
        parser.error("--rounds and --updates are at least 1")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output: no folder {options.output.parent}")
    groups: dict[str, list[Program]] = {}
    for file in options.files:
        program = read(file)
        groups.setdefault(program.group, []).append(program)
    try:
        import jax
    except ImportError as error:
        print(NO_JAX.format(error=error), file=sys.stderr)
        return 2
    jax.config.update("jax_enable_x64", True)  # counters
    device = jax.local_devices()[0]
    record = {
        "benchmark": "run_programs",
        "device": f"{device.platform} {device.device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        "made_with": next(iter(groups.values()))[0].versions,
        "settings": {"rounds": options.rounds, "updates": options.updates},
        "groups": [
            measure(programs, options.rounds, options.updates) for programs in groups.values()
        ],
    }
    print(f"on {record['device']}, {options.rounds} rounds of {options.updates} updates")
    for group in record["groups"]:
        print(f"\n{table(group)}\n\nread and written: {group['bytes_per_ms'] / 1e6:.1f} GB/s")
    if options.output:
        write_json(options.output, record)
    rows = [row for group in record["groups"] for row in group["rows"]]
    return int(not all(row.get("right") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
