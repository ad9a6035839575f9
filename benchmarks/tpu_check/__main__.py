"""Entry point of ``python -m benchmarks.tpu_check``; see docs/accelerators.md."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import progress_bar, run_benchmark
from benchmarks.study.render import fill
from benchmarks.tpu_check.figures import above
from benchmarks.tpu_check.tables import COLUMNS, cells, pages
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import FlagValueError, parse_unless_help
from official_recipes.common.interruption import run_program
from official_recipes.common.replicas import quiet_tensorflow

PROGRAM = "python -m benchmarks.tpu_check"
SUMMARY = (
    "Compiles one update of every optimizer for a TPU v5e 2x2, without one, and fails where a\n"
    "figure is above the one that is stored. Nothing runs."
)
ROOT = Path(__file__).parents[2]
STORED = ROOT / "docs" / "tpu_check.json"
PAGE = ROOT / "docs" / "accelerators.md"
_HERE = ("tensorflow", "keras", "tf_keras")
_THERE = ("jax", "libtpu")


class Compiler:
    """The process that compiles, in the environment of jax and libtpu."""

    def __init__(self, python: Path, folder: Path, keep: bool):
        self._command = [str(python), "-m", "benchmarks.tpu_check.compiler"]
        self._command += [str(folder)] if keep else []
        self._process: subprocess.Popen[str] | None = None
        self._python = python
        self._known: dict[str, dict[str, Any]] = {}

    def versions(self) -> dict[str, str]:
        """Of jax and libtpu."""
        code = f"import importlib.metadata as m; print(*map(m.version, {_THERE}))"
        done = subprocess.run(
            [self._python, "-c", code], capture_output=True, text=True, check=True
        )
        return dict(zip(_THERE, done.stdout.split(), strict=True))

    def __call__(self, file: Path, chips: int) -> dict[str, Any]:
        """The figures of a program, or an error; equal programs are compiled once."""
        key = f"{chips} {hashlib.sha256(file.read_bytes()).hexdigest()}"
        if key not in self._known:
            self._known[key] = self._compile(file, chips)
        return self._known[key]

    def _compile(self, file: Path, chips: int) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{chips} {file}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._process = None
        return {"error": f"the compiler ended with code {code}", "seconds": 0.0}

    def end(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.communicate()


def define_flags() -> flags.FlagValues:
    """Returns the program's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "only", "", "Only what this regular expression is found in the name of.", flag_values=values
    )
    flags.DEFINE_string(
        "python",
        str(ROOT / ".venv-tpu" / "bin" / "python"),
        "The Python that has jax and libtpu.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "update", False, "Store the figures, and fill docs/accelerators.md.", flag_values=values
    )
    flags.DEFINE_boolean("list", False, "Name what would be compiled, and end.", flag_values=values)
    flags.DEFINE_string(
        "keep", None, "A folder for the programs, as lowered and as compiled.", flag_values=values
    )
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the check on a command line, program name first, and returns the exit code."""
    failed: list[str] = []
    code = run_benchmark(argv, _parse, lambda values: failed.extend(_run(values)))
    return code or int(bool(failed))


def _parse(argv: Sequence[str]) -> flags.FlagValues | None:
    values = define_flags()
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    try:
        re.compile(values.only)
    except re.error as error:
        expected = "a regular expression"
        raise FlagValueError("only", expected, f"{values.only!r}: {error}") from None
    if not Path(values.python).is_file():
        raise FlagValueError(
            "python", "a Python with jax and libtpu; `make tpu-check` makes one", values.python
        )
    if values.keep is not None and not Path(values.keep).is_dir():
        raise FlagValueError("keep", "a folder that exists", repr(values.keep))
    return values


def _run(values: flags.FlagValues) -> list[str]:
    """Compiles, prints, and returns what is worse than stored."""
    quiet_tensorflow()
    from benchmarks.tpu_check.cases import all_cases

    chosen = {n: case for n, case in all_cases().items() if re.search(values.only, n)}
    if not chosen:
        raise FlagValueError("only", "what is in the name of a case; see --list", values.only)
    if values.list:
        print("\n".join(chosen))
        return []
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(values.keep or temporary)
        compiler = Compiler(Path(values.python), folder, values.keep is not None)
        versions = {name: importlib.metadata.version(name) for name in _HERE} | compiler.versions()
        rows = _rows(chosen, compiler, folder, console)
    stored = json.loads(STORED.read_text()) if STORED.exists() else {"versions": {}, "rows": {}}
    Console(width=max(console.width, 140)).print(table(rows, stored["rows"]))
    failed = [f"{name}: {row['error']}" for name, row in rows.items() if "error" in row]
    if values.update:
        kept = {n: r for n, r in stored["rows"].items() if versions == stored["versions"]}
        made = {n: row for n, row in rows.items() if "error" not in row}
        order = [n for n in all_cases() if n in kept or n in made]
        content = {"versions": versions, "rows": {n: {**kept, **made}[n] for n in order}}
        write_json(STORED, content)
        fill(PAGE, pages(content))
    elif stored["versions"] != versions:
        console.print(f"not compared: stored with {stored['versions']}, these are of {versions}")
    else:
        known = {n: stored["rows"].get(n, {}) for n in rows}
        failed = [f"{n}: {text}" for n, row in rows.items() for text in above(row, known[n])]
    for text in failed:
        console.print(f"[red]{text}[/red]", highlight=False, soft_wrap=True)
    return failed


def _rows(
    chosen: Mapping[str, Any], compiler: Compiler, folder: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """The figures of each, which is compiled while the next one is lowered."""
    rows: dict[str, dict[str, Any]] = {}
    warnings.filterwarnings("ignore", category=UserWarning)  # of few sub-batches
    with progress_bar(console) as progress, ThreadPoolExecutor(1) as executor:
        task = progress.add_task("", total=len(chosen))
        waiting: tuple[str, dict[str, Any], Future[dict[str, Any]]] | None = None

        def collect() -> None:
            if waiting is not None:
                name, row, future = waiting
                rows[name] = {**row, **future.result()}
                progress.advance(task)
                if not console.is_terminal:
                    made = cells(rows[name], {})
                    console.print(f"{len(rows)}/{len(chosen)} {name}: {', '.join(made)}")

        for name, case in chosen.items():
            progress.update(task, description=name)
            start = time.monotonic()
            program, long_divisions = case.lower()
            gc.collect()  # variables are in cycles
            file = folder / f"{name.replace(' ', '_')}.hlo.pb"
            file.write_bytes(program)
            row = {
                "program_bytes": len(program),
                "long_divisions": long_divisions,
                "seconds_to_lower": round(time.monotonic() - start, 1),
            }
            collect()
            waiting = name, row, executor.submit(compiler, file, case.chips)
        collect()
        executor.submit(compiler.end)
    return rows


def table(rows: Mapping[str, Any], stored: Mapping[str, Any]) -> Table:
    """What was found, and how the bytes moved differ from what is stored."""
    result = Table()
    result.add_column("one update of", overflow="fold")
    for column in COLUMNS:
        result.add_column(column, justify="right")
    for name, row in rows.items():
        result.add_row(name, *cells(row, stored.get(name, {})))
    return result


if __name__ == "__main__":
    run_program(main, sys.argv)
