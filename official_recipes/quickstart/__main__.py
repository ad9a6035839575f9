"""Entry point of ``python -m official_recipes.quickstart``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from official_recipes.common.data_format import data_of_flag
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import FlagValueError, fail
from official_recipes.common.image_data import ImageSource, hold_out_validation
from official_recipes.common.interruption import interruption, run_program
from official_recipes.common.multi_worker import ClusterError, check_alone
from official_recipes.common.progress import Bar, progress_bar
from official_recipes.quickstart.options import parse_options
from official_recipes.quickstart.settings import validation_size


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
        with data_of_flag("data_dir", "readable data"):
            check_alone()
            options = parse_options(argv)
            if options is not None:
                _run(*options)
    except (FlagValueError, ClusterError) as error:
        return fail(error)
    return 0


def _run(values: flags.FlagValues, source: ImageSource) -> None:
    # TensorFlow takes seconds to import, so it waits until the flags are known to be good.
    from official_recipes.common.replicas import quiet_tensorflow, training_strategy

    console = Console(stderr=True)
    with console.status("starting TensorFlow"):
        quiet_tensorflow()
        from official_recipes.common.keras_options import TrainingOptions
        from official_recipes.common.keras_training import RunResult, train
        from official_recipes.quickstart import report, tuning
        from official_recipes.quickstart.task import SmallImageTask, planned_runs

        runs = planned_runs(values)
        strategy = training_strategy(values.replicas, "cpu")
    with progress_bar(console) as progress, interruption() as interrupted:
        started = time.perf_counter()
        data = source.load(Bar(progress, f"reading {source.name}", interrupted))
        progress.console.print(
            f"{data.name}: {len(data.train_labels)} training and {len(data.test_labels)} test "
            f"images read in {time.perf_counter() - started:.1f} s"
        )
        if values.tune:
            data = hold_out_validation(data, validation_size(len(data.train_labels)))
        task = SmallImageTask(data, held_out=values.tune)
        folder = Path(values.output_dir)

        def trained(run: TrainingOptions) -> RunResult:
            text = f"{report.label(run)}, rate {run.schedule.learning_rate:g}"
            bar = Bar(progress, text, interrupted)
            result = train(task, run, strategy, bar)
            bar.remove()  # There may be updates that were not made.
            progress.console.print(
                f"{text}: accuracy {result.metrics[-1][f'{task.splits()[0]}_accuracy']:.2%} "
                f"after {result.updates} updates, {result.seconds:.1f} s"
            )
            return result

        if values.tune:
            # The small-batch baseline, which has an optimizer of its own, is searched for.
            tuned = [
                tuning.tune_learning_rate(
                    run, trained, None if values.baseline and run is runs[0] else values.rates
                )
                for run in runs
            ]
            written = [folder / "tuning.json"]
            table, record = tuning.tuning_table(data.name, tuned), tuning.record(data.name, tuned)
        else:
            results = [trained(run) for run in runs]
            written = [folder / "quickstart.png", folder / "quickstart.json"]
            report.write_plot(written[0], data.name, results)
            table = report.result_table(data.name, results)
            record = report.comparison_record(data.name, values, results)
    write_json(written[-1], record)
    output = Console()
    output.print(table)
    output.print(f"wrote {' and '.join(map(str, written))}", soft_wrap=True)


if __name__ == "__main__":
    run_program(main, sys.argv)
