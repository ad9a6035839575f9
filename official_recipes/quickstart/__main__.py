"""Entry point of ``python -m official_recipes.quickstart``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, TaskID

from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import EXIT_BAD_FLAG, FlagValueError
from official_recipes.common.image_data import DataFormatError, ImageData
from official_recipes.common.interruption import Interruption, interruption, run_program
from official_recipes.common.progress import progress_bar
from official_recipes.quickstart import settings
from official_recipes.quickstart.data import hold_out_validation
from official_recipes.quickstart.options import (
    Options,
    check_optimizer_names,
    check_sub_batches,
    parse_options,
)

if TYPE_CHECKING:
    from official_recipes.quickstart.training import RunResult, RunSettings, Trainer
    from official_recipes.quickstart.tuning import TuningResult


def main(argv: Sequence[str]) -> int:
    """Runs the quickstart.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code: 0, or 2 for flags or data that cannot be used.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; no results were written.
    """
    try:
        options = parse_options(argv)
        if options is not None:
            _run(options)
    except FlagValueError as error:
        return _fail(error)
    except DataFormatError as error:
        return _fail(FlagValueError("data_dir", "readable data", error))
    return 0


def _fail(error: FlagValueError) -> int:
    print(" ".join(str(error).split()), file=sys.stderr)
    return EXIT_BAD_FLAG


def _run(options: Options) -> None:
    # TensorFlow takes seconds to import, so it waits until the flags are known to be good.
    from official_recipes.common.replicas import cpu_strategy, quiet_tensorflow

    progress_console = Console(stderr=True)
    with progress_console.status("starting TensorFlow"):
        quiet_tensorflow()
        from official_recipes.quickstart.training import (
            Trainer,
            known_optimizers,
            optimizers_of_sub_batches,
        )
        from official_recipes.quickstart.tuning import tune_learning_rate

        check_optimizer_names(options.optimizers, known_optimizers())
        check_sub_batches(options, optimizers_of_sub_batches())
        strategy = cpu_strategy(options.replicas)
    with progress_bar(progress_console) as progress:
        data = _load(options, progress)
        if options.tune:
            data = hold_out_validation(data)
        with interruption() as interrupted:
            trainer = Trainer(strategy, data, options.seed)
            runner = _Runner(trainer, progress, interrupted, only_final_test=options.tune)
            runs = _planned_runs(options)
            if options.tune:
                # The small-batch baseline, which has an optimizer of its own, is searched for.
                baseline = options.small_batch_size is not None
                tuned = [
                    tune_learning_rate(
                        run, runner.run, None if baseline and run is runs[0] else options.rates
                    )
                    for run in runs
                ]
            else:
                compared = [runner.run(run) for run in runs]
    if options.tune:
        _write_tuning(options, data, tuned)
    else:
        _write_comparison(options, data, compared)


def _write_comparison(options: Options, data: ImageData, results: list[RunResult]) -> None:
    from official_recipes.quickstart import report

    plot, record = options.output_dir / "quickstart.png", options.output_dir / "quickstart.json"
    report.write_plot(plot, data.name, options.replicas, results)
    write_json(record, report.comparison_record(data.name, options.replicas, results))
    console = Console()
    console.print(report.result_table(data.name, options.replicas, results))
    console.print(f"wrote {plot} and {record}", soft_wrap=True)


def _write_tuning(options: Options, data: ImageData, results: list[TuningResult]) -> None:
    from official_recipes.quickstart.tuning import tuning_table

    record = options.output_dir / "tuning.json"
    write_json(record, {"data": data.name, "results": [asdict(result) for result in results]})
    console = Console()
    console.print(tuning_table(data.name, results))
    console.print(f"wrote {record}", soft_wrap=True)


def _planned_runs(options: Options) -> list[RunSettings]:
    from official_recipes.quickstart.training import RunSettings, default_learning_rate

    runs = []
    if options.small_batch_size is not None:
        runs.append(
            RunSettings(
                settings.SMALL_BATCH_OPTIMIZER,
                options.small_batch_size,
                options.epochs,
                settings.SMALL_BATCH_LEARNING_RATE,
                options.seed,
                options.warmup_fraction,
            )
        )
    for name in options.optimizers:
        rate = options.learning_rate or default_learning_rate(name)
        runs.append(
            RunSettings(
                name,
                options.batch_size,
                options.epochs,
                rate,
                options.seed,
                options.warmup_fraction,
                options.trust_coefficient,
            )
        )
    return runs


class _Runner:
    """Trains with a progress bar per run and leaves one line per finished run."""

    def __init__(
        self,
        trainer: Trainer,
        progress: Progress,
        interrupted: Interruption,
        *,
        only_final_test: bool,
    ) -> None:
        self._trainer = trainer
        self._only_final_test = only_final_test
        self._progress = progress
        self._interrupted = interrupted

    def run(self, run: RunSettings) -> RunResult:
        from official_recipes.quickstart.training import updates_per_epoch

        self._interrupted.check()
        total = updates_per_epoch(self._trainer.data, run.batch_size) * run.epochs
        task = self._progress.add_task(f"{run.label}, rate {run.learning_rate:g}", total=total)

        def after_update(updates: int) -> None:
            self._progress.update(task, completed=updates)
            self._interrupted.check()

        result = self._trainer.run(run, after_update, only_final_test=self._only_final_test)
        self._progress.remove_task(task)
        self._progress.console.print(
            f"{run.label}, rate {run.learning_rate:g}: accuracy {result.test_accuracy[-1]:.2%} "
            f"after {result.updates} updates, {result.seconds:.1f} s"
        )
        return result


def _load(options: Options, progress: Progress) -> ImageData:
    task: TaskID = progress.add_task(f"reading {options.source.name}", total=None)
    started = time.perf_counter()

    def show(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    data = options.source.load(show)
    progress.remove_task(task)
    progress.console.print(
        f"{data.name}: {len(data.train_labels)} training and {len(data.test_labels)} test images "
        f"read in {time.perf_counter() - started:.1f} s"
    )
    return data


if __name__ == "__main__":
    run_program(main, sys.argv)
