"""The main function of the Keras 3 recipes: flags, strategy, progress, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console

from official_recipes.common.flag_parsing import FlagValueError, fail
from official_recipes.common.interruption import Interrupted, interruption
from official_recipes.common.keras_options import (
    TrainingOptions,
    has_checkpoint,
    parse_training_flags,
    training_options,
    without_training,
)
from official_recipes.common.multi_worker import ClusterError, check_alone
from official_recipes.common.progress import Bar, progress_bar

if TYPE_CHECKING:
    from official_recipes.common.keras_training import RunResult, Task

_LAST_WORDS = "interrupted: what came after the last checkpoint is lost"
EXIT_DIVERGED = 1


@dataclass(frozen=True)
class Recipe:
    """What one recipe has of its own.

    Attributes:
        program: How it is called, for help.
        summary: What it does, for help.
        define_flags: Returns its flags, those of all recipes among them.
        configs: The folder of its config files.
        check: Looks at the flags before TensorFlow is imported.
        make_task: Reads the data and returns the task.
    """

    program: str
    summary: str
    define_flags: Callable[[], flags.FlagValues]
    configs: Path
    check: Callable[[flags.FlagValues], Any]
    make_task: Callable[[flags.FlagValues, Callable[[int, int], None]], Task]


def run_recipe(recipe: Recipe, argv: Sequence[str]) -> int:
    """Runs a recipe from its command line.

    Args:
        recipe: The recipe.
        argv: The command line, program name first.

    Returns:
        The exit code: 0, 2 for flags or data that cannot be used, 1 if training diverged.

    Raises:
        KeyboardInterrupt: A signal ended the run; what its last checkpoint holds is not lost.
    """
    try:
        values = recipe.define_flags()
        go_on = parse_training_flags(
            values,
            argv,
            program=recipe.program,
            summary=recipe.summary,
            configs=recipe.configs,
        )
        if not go_on:
            return 0
        check_alone()
        options = training_options(values)
        recipe.check(values)
        try:
            result = _run(recipe, values, options)
        except Interrupted:
            folder = options.model_dir
            trains = not without_training(values)
            if folder is not None and trains and has_checkpoint(folder):
                print(f"{folder} has a checkpoint: --resume goes on from it", file=sys.stderr)
            raise
    except (FlagValueError, ClusterError) as error:
        return fail(error)
    if result is not None and result.diverged:
        print(
            f"training diverged in epoch {len(result.train_loss)}; lower --learning_rate or "
            "lengthen --warmup_epochs",
            file=sys.stderr,
        )
        return EXIT_DIVERGED
    return 0


def _run(recipe: Recipe, values: flags.FlagValues, options: TrainingOptions) -> RunResult | None:
    # TensorFlow takes seconds to import, so it waits until the flags are known to be good.
    from official_recipes.common.replicas import quiet_tensorflow, training_strategy

    console = Console(stderr=True)
    with console.status("starting TensorFlow"):
        quiet_tensorflow()
        from official_recipes.common.keras_training import evaluate, train

        # What is exported or predicted comes from one device.
        replicas = 1 if values.export_dir or values.predictions else options.replicas
        strategy = training_strategy(replicas, options.device)
    with progress_bar(console) as progress, interruption(last_words=_LAST_WORDS) as interrupted:
        task = recipe.make_task(values, Bar(progress, "reading", interrupted))
        if values.dry_run:
            from official_recipes.common.keras_dry_run import report

            report(task, options, strategy)
            return None
        if without_training(values):
            import tensorflow as tf

            # It would list all that a checkpoint of another model has.
            tf.get_logger().setLevel("ERROR")
            if values.eval_only:
                for name, value in evaluate(task, options, strategy).items():
                    print(f"{name} {value:.4g}")
            else:
                _use(task, options, values)
            return None
        bar = Bar(progress, f"{options.optimizer}, batch {options.batch_size}", interrupted)

        def after_epoch(epoch: int, loss: float, metrics: dict[str, float]) -> None:
            shown = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
            Console().print(
                f"epoch {epoch}/{options.epochs}: loss {loss:.4f}{shown}",
                highlight=False,
                soft_wrap=True,
            )

        result = train(task, options, strategy, bar, after_epoch)
    where = "" if options.model_dir is None else f"; wrote {options.model_dir / 'result.json'}"
    print(f"{result.updates} updates in {result.seconds:.1f} s{where}")
    return result


def _use(task: Task, options: TrainingOptions, values: flags.FlagValues) -> None:
    from official_recipes.common.keras_export import export, predict

    written = values.export_dir or values.predictions
    note = (export if values.export_dir else predict)(task, options, written)
    if note:
        print(note, file=sys.stderr)
    print(f"wrote {written}")
