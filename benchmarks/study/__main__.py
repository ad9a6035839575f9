"""Entry point of ``python -m benchmarks.study``."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import exit_code_of, progress_bar
from benchmarks.study.documents import render_pages
from benchmarks.study.grid import Results, Run, Study, next_runs, outcomes
from benchmarks.study.runner import TASKS, make_runner
from benchmarks.study.studies import STUDIES
from benchmarks.study.table import RESULTS, read_rows
from official_recipes.common.files import append_row
from official_recipes.common.flag_parsing import (
    FlagValueError,
    define_integer,
    help_text,
    parse_flags,
)
from official_recipes.common.interruption import interruption, run_program

PROGRAM = "python -m benchmarks.study"
SUMMARY = (
    "Makes the runs of a study that its table of results does not have yet, and prints what is\n"
    "known. Ctrl-C keeps every finished run; the same command goes on from there."
)


def define_flags() -> flags.FlagValues:
    """Returns the study's flags."""
    values = flags.FlagValues()
    flags.DEFINE_enum("study", None, sorted(STUDIES), "Which study.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Folder with the study's data.", flag_values=values)
    flags.DEFINE_string("results", str(RESULTS), "The table of results.", flag_values=values)
    flags.DEFINE_string(
        "only",
        None,
        "Make only the runs whose name, 'CELL: CONTENDER, STAGE VALUE, seed SEED' as the line of a "
        "finished run begins, matches this regular expression. Processes with expressions that "
        "share no run may fill one table at once.",
        flag_values=values,
    )
    define_integer(
        values, "minutes", None, "Begin no run after so many minutes [default: until all are done]."
    )
    flags.DEFINE_boolean(
        "render",
        False,
        "Fill the pages in docs/ from the table and draw their plots; needs no --study.",
        flag_values=values,
    )
    flags.DEFINE_boolean("run", True, "Make runs; else only print.", flag_values=values)
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the study and returns the exit code."""
    return exit_code_of(lambda: _main(argv))


def _main(argv: Sequence[str]) -> None:
    values = define_flags()
    parse_flags(values, argv)
    if values.help:
        print(help_text(values, PROGRAM, SUMMARY))
        return
    path = Path(values.results)
    if path.is_dir() or not path.parent.is_dir():
        raise FlagValueError("results", "a file in a folder that exists", str(path))
    if values.study is not None:
        _study(STUDIES[values.study], path, values)
    elif not values.render:
        raise FlagValueError("study", f"one of {', '.join(sorted(STUDIES))}", "none")
    if values.render:
        rows = read_rows(path)
        if not rows:
            raise FlagValueError("results", "a table with results to render", str(path))
        for written in render_pages(rows):
            print(f"wrote {written}")


def _study(study: Study, path: Path, values: flags.FlagValues) -> None:
    only = _pattern(values.only)
    if values.run and _left(study, path, only):
        if values.data_dir is None and TASKS[study.task] is not None:
            raise FlagValueError("data_dir", TASKS[study.task], "none")
        _run(study, path, only, values.data_dir, values.minutes)
    Console().print(summary(study, Results(study, read_rows(path))))


def _pattern(expression: str | None) -> re.Pattern[str]:
    try:
        return re.compile(expression or "")
    except re.error as error:
        raise FlagValueError("only", "a regular expression", f"{expression!r}: {error}") from None


def _left(study: Study, path: Path, only: re.Pattern[str]) -> list[Run]:
    """The runs that can be made now and are asked for."""
    runs = next_runs(study, Results(study, read_rows(path)))
    return [run for run in runs if only.search(f"{run.cell}: {_name(run)}")]


def _name(run: Run) -> str:
    """Names a run of a cell."""
    return f"{run.label}, {run.stage} {run.value:g}, seed {run.seed}"


def _run(
    study: Study, path: Path, only: re.Pattern[str], data_dir: str | None, minutes: int | None
) -> None:
    from official_recipes.common.replicas import quiet_tensorflow

    quiet_tensorflow()
    console = Console(stderr=True)
    started = time.monotonic()
    with progress_bar(console) as progress, interruption() as interrupted:
        runner = make_runner(study, None if data_dir is None else Path(data_dir))
        reading = progress.add_task("reading", total=None)
        runner.load(lambda done, total: progress.update(reading, completed=done, total=total))
        progress.remove_task(reading)
        seconds: list[float] = []
        while left := _left(study, path, only):
            interrupted.check()
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
            run = left[0]
            mean = sum(seconds) / len(seconds) if seconds else None
            estimate = "" if mean is None else f", {len(left) * mean / 60:.0f} min"
            name = _name(run)
            task = progress.add_task(f"{name} ({len(left)} known to be left{estimate})", total=None)

            def after_update(done: int, total: int, task: object = task) -> None:
                interrupted.check()
                progress.update(task, completed=done, total=total)  # type: ignore[arg-type]

            row = {**run.head(), **runner.train(run.settings, after_update)}
            append_row(path, row)
            seconds.append(row["seconds"])
            progress.remove_task(task)
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row["final"].items() if v is not None)
            console.print(
                f"{run.cell}: {name}: {'diverged' if row['diverged'] else shown}, "
                f"{row['seconds']:.0f} s",
                highlight=False,
                soft_wrap=True,
            )


def summary(study: Study, results: Results) -> Table:
    """What is known of a study's contenders."""
    table = Table(title=f"study {study.name}")
    for heading in ("cell", "contender", "tuned", "best", "runs", f"test {study.metric.name}"):
        table.add_column(heading)
    known = outcomes(study, results)
    for cell, contenders in study.comparisons:
        for contender in contenders:
            outcome = known[cell.name, contender.label]
            mean = sum(outcome.final) / len(outcome.final) if outcome.final else None
            table.add_row(
                cell.name,
                contender.label,
                ", ".join(f"{v:g}: {s:.4f}" for v, s in outcome.tried.items()),
                f"{contender.axis} {outcome.best:g}" if outcome.tried and outcome.best else "",
                str(len(outcome.final)),
                "" if mean is None else f"{mean:.4f}",
            )
    return table


if __name__ == "__main__":
    run_program(main, sys.argv)
