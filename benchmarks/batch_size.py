"""How large a batch may be on two small tasks: the noise scale of a run, and branches of it.

Entry point of ``python -m benchmarks.batch_size``; see docs/batch_size.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from benchmarks.command_line import as_given, listed_names, run_benchmark
from benchmarks.study.render import fill
from official_recipes.common.files import read_json, write_json
from official_recipes.common.flag_parsing import FlagValueError, parse_flags, parse_unless_help
from official_recipes.common.interruption import run_program
from official_recipes.common.output_folder import make_folder

if TYPE_CHECKING:
    import keras

    from official_recipes.common.keras_options import TrainingOptions
    from official_recipes.common.keras_training import Task
    from tf_lbopt.batch_size import CriticalBatchSize

PROGRAM = "python -m benchmarks.batch_size"
SUMMARY = (
    "Trains small models with the noise scale in their history, and from some of their epochs on\n"
    "branches at other batches: how large a batch may be, measured in two ways. What is finished\n"
    "is kept in --output_dir, and the same command goes on from there."
)
DOCS = Path(__file__).parents[1] / "docs"
RESULTS = "batch_size.json"
PAGE = "batch_size.md"
_CURVE_POINTS = 20
# Of the noise scale: about the last 200 updates.
_EMA = 0.99
_VERSIONS = ("tensorflow", "keras", "numpy", "tf-lbopt")


@dataclass(frozen=True)
class Experiment:
    """A run of a recipe's model, and branches of it.

    Attributes:
        title: For the page.
        recipe: Whose task it is.
        folder: Of its data, below `data_dir`.
        flags: Of the recipe.
        optimizer: Its name in `tf_lbopt`.
        arguments: Of its constructor.
        learning_rate: At `batch_size`, constant.
        scaling: Of the rate, over the branches' batches.
        batch_size: Of the run, in examples.
        micro_steps: Of each update. With 1 the noise scale is that of single examples, else of
            micro-steps, for models whose layers have no rule for examples.
        checkpoints: The epochs after which branches begin; the last ends the run.
        batch_sizes: Of the branches.
        examples: Of each branch.
        orders: In how many orders of the data the branches are trained.
    """

    title: str
    recipe: str
    folder: str
    flags: tuple[str, ...]
    optimizer: str
    arguments: Mapping[str, Any]
    learning_rate: float
    scaling: str
    batch_size: int
    micro_steps: int
    checkpoints: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    examples: int
    orders: int


EXPERIMENTS = {
    "cifar": Experiment(
        title="two convolutions on CIFAR-10",
        recipe="cifar",
        folder="cifar10-jpeg",
        # Random shifts would be others at another batch.
        flags=("--model=two_conv", "--noaugmentation"),
        optimizer="SGD",
        arguments={"momentum": 0.9},
        learning_rate=0.01,
        scaling="linear",
        batch_size=64,
        micro_steps=2,
        checkpoints=(1, 4),
        batch_sizes=(32, 64, 128, 256, 512, 1024),
        examples=16384,
        orders=3,
    ),
    "wikitext2": Experiment(
        title="an LSTM on WikiText-2",
        recipe="wikitext2",
        folder="wikitext-2",
        flags=("--hidden=64",),
        optimizer="Adam",
        arguments={"global_clipnorm": 1.0},
        learning_rate=0.002,
        scaling="sqrt",
        batch_size=16,
        micro_steps=2,
        checkpoints=(1, 2),
        batch_sizes=(8, 16, 32, 64, 128, 256),
        examples=1024,
        orders=1,
    ),
}


def define_flags() -> flags.FlagValues:
    """Returns the flags."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "data_dir", None, "Folder with cifar10-jpeg and wikitext-2; without it nothing is run.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("tasks", list(EXPERIMENTS), "Which of them to run.", flag_values=values)
    flags.DEFINE_string(
        "output_dir", "runs/batch_size", "Folder for what is finished.", flag_values=values
    )
    flags.DEFINE_string(
        "docs_dir", str(DOCS), "Folder of the page and of its results.", flag_values=values
    )
    flags.DEFINE_boolean("render", False, "Fill the page from its results.", flag_values=values)
    return values


def make_task(experiment: Experiment, data_dir: Path | None) -> Task:
    """Reads the data, or without a folder those that the recipe brings along; returns its task.

    Raises:
        FlagValueError: The data are missing.
    """
    recipe = importlib.import_module(f"official_recipes.{experiment.recipe}.train")
    values = recipe.define_flags()
    data = [] if data_dir is None else [f"--data_dir={data_dir / experiment.folder}"]
    parse_flags(values, ["", *data, "--learning_rate=1", *experiment.flags])
    return recipe.make_task(values, lambda done, total: None)


def new_model(task: Task, experiment: Experiment) -> keras.Model:
    """The model of a run and of its branches."""
    import keras

    import tf_lbopt

    keras.utils.set_random_seed(1)
    model, micro_steps = task.build_model(), experiment.micro_steps
    arguments = {**experiment.arguments}
    if micro_steps > 1:
        model = task.plain_model(model)
        arguments["gradient_accumulation_steps"] = micro_steps
    optimizer = getattr(tf_lbopt, experiment.optimizer)
    model.compile(
        optimizer=optimizer(experiment.learning_rate, **arguments),
        loss=task.loss(),
        steps_per_execution=micro_steps,
    )
    return model


def _options(
    experiment: Experiment, batch_size: int, *, epochs: int = 1, order: int = 0
) -> TrainingOptions:
    from official_recipes.common.keras_options import ScheduleOptions, TrainingOptions

    return TrainingOptions(
        experiment.optimizer,
        experiment.arguments,
        ScheduleOptions("constant", experiment.learning_rate),
        batch_size,
        epochs,
        gradient_accumulation_steps=experiment.micro_steps,
        seed=order,
    )


def train(task: Task, experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Makes the run, unless it is there: its history, and weights of its checkpoints.

    Args:
        task: Of the experiment.
        experiment: What to train.
        folder: Where the run is kept.

    Returns:
        ``history`` by epoch, ``examples`` that it has seen, and ``seconds`` of training.
    """
    import keras

    from official_recipes.common.keras_training import batches, updates_per_epoch
    from tf_lbopt.callbacks import GradientNoiseScale

    path = folder / "run.json"
    if path.exists():
        return read_json(path, "history", "examples", "seconds")
    options = _options(experiment, experiment.batch_size, epochs=max(experiment.checkpoints))
    model = new_model(task, experiment)

    def keep(epoch: int, logs: Mapping[str, float]) -> None:
        if epoch + 1 in experiment.checkpoints:
            model.save_weights(_weights(folder, epoch + 1))

    updates = updates_per_epoch(task, options)
    started = time.perf_counter()
    history = model.fit(
        batches(task, options, 0),
        epochs=options.epochs,
        steps_per_epoch=updates * experiment.micro_steps,
        shuffle=False,
        verbose=2,
        callbacks=[
            GradientNoiseScale(ema=_EMA),
            keras.callbacks.LambdaCallback(on_epoch_end=keep),
        ],
    )
    run = {
        "history": history.history,
        "examples": updates * experiment.batch_size * options.epochs,
        "seconds": time.perf_counter() - started,
    }
    # The history by itself is what `python -m tf_lbopt.batch_size` takes.
    write_json(folder / "history.json", history.history)
    write_json(path, run)
    return read_json(path)


def _weights(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch}.weights.h5"


def branch(
    task: Task, experiment: Experiment, folder: Path, epoch: int, order: int
) -> CriticalBatchSize:
    """Measures the critical batch size after an epoch of the run.

    Args:
        task: Of the experiment.
        experiment: What was trained.
        folder: Where the run is kept.
        epoch: After which the branches begin.
        order: Of the data, from 1.
    """
    from official_recipes.common.keras_training import batches
    from tf_lbopt.batch_size import measure_critical_batch_size

    def at_checkpoint() -> keras.Model:
        model = new_model(task, experiment)
        model.optimizer.build(model.trainable_variables)
        model.load_weights(_weights(folder, epoch))
        return model

    return measure_critical_batch_size(
        at_checkpoint,
        lambda size: batches(
            task, _options(experiment, size * experiment.micro_steps, order=order), 0
        ),
        experiment.batch_sizes,
        examples=experiment.examples,
        scaling=experiment.scaling,
        base_batch_size=experiment.batch_size,
        folder=folder / f"epoch_{epoch}_order_{order}",
    )


def results_of(task: Task, experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Makes the run and its branches, or what is missing of them.

    Args:
        task: Of the experiment.
        experiment: What to do.
        folder: Where all of it is kept.

    Returns:
        What the page has of it.
    """
    run = train(task, experiment, folder)
    checkpoints = []
    for epoch in experiment.checkpoints:
        measured = []
        for order in range(1, experiment.orders + 1):
            print(f"{experiment.title}, after epoch {epoch}, order {order} of {experiment.orders}")
            result = dataclasses.asdict(branch(task, experiment, folder, epoch, order))
            for row in result["branches"]:
                # One order's curves are drawn.
                every = max(1, len(row["curve"]) // _CURVE_POINTS)
                row["curve"] = row["curve"][::-every][::-1] if order == 1 else []
            measured.append(result)
        checkpoints.append({"epoch": epoch, "orders": measured})
    return {
        "settings": {**dataclasses.asdict(experiment), **task.settings},
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[2], 1),
        **run,
        "checkpoints": checkpoints,
    }


def critical(content: Mapping[str, Any]) -> CriticalBatchSize:
    """The result of branches as the page's results have it."""
    from tf_lbopt.batch_size import Branch, CriticalBatchSize

    branches = tuple(
        Branch(**{**row, "curve": tuple(map(tuple, row["curve"]))}) for row in content["branches"]
    )
    return CriticalBatchSize(**{**content, "branches": branches})


def comparison_table(result: Mapping[str, Any]) -> str:
    """Returns a Markdown table: noise scale and critical batch size at each checkpoint."""
    history = result["history"]
    lines = [
        "| after epoch | training loss | noise scale | critical batch size, by order of the data |",
        "|---:|---:|---:|---:|",
    ]
    for checkpoint in result["checkpoints"]:
        at = checkpoint["epoch"] - 1
        error = history["noise_scale_standard_error"][at]
        sizes = ", ".join(
            f"{'≥ ' if found['at_the_end'] else ''}{found['batch_size']:,}"
            for found in checkpoint["orders"]
        )
        noise = _shown(history["noise_scale"][at], ".0f")
        lines.append(
            f"| {checkpoint['epoch']} | {history['loss'][at]:.3f} | {noise} ± "
            f"{_shown(error, '.0f')} | {sizes} |"
        )
    return "\n".join(lines)


def branches_table(result: Mapping[str, Any]) -> str:
    """Returns a Markdown table: how far each batch's loss is above the best, over all orders."""
    epochs = [checkpoint["epoch"] for checkpoint in result["checkpoints"]]
    lines = [
        "| batch | updates | rate | "
        + " | ".join(f"after epoch {epoch}" for epoch in epochs)
        + " |",
        "|---:|---:|---:|" + "---:|" * len(epochs),
    ]
    first = result["checkpoints"][0]["orders"][0]["branches"]
    for place, row in enumerate(first):
        cells = []
        for checkpoint in result["checkpoints"]:
            above = [
                math.inf if (loss := found["branches"][place]["loss"]) is None
                else loss - found["best_loss"]
                for found in checkpoint["orders"]
            ]  # fmt: skip
            cells.append(_mean_and_deviation(above))
        lines.append(
            f"| {row['batch_size']:,} | {row['updates']:,} | {row['learning_rate']:.3g} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def _mean_and_deviation(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} diverged"
    spread = f" ± {statistics.stdev(finite):.3f}" if len(finite) > 1 else ""
    return f"{statistics.fmean(finite):.3f}{spread}"


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, f",{form}")


def render(results: Mapping[str, Any], docs: Path) -> list[Path]:
    """Fills the page and draws its plots.

    Args:
        results: By task.
        docs: The folder of the page.

    Returns:
        What was written.
    """
    from tf_lbopt.batch_size import recommend

    blocks, written = {}, [docs / PAGE]
    for name, result in results.items():
        table = recommend(
            result["history"],
            devices=1,
            examples_per_second=result["examples"] / result["seconds"],
            examples=result["examples"],
        )
        blocks[f"{name}-comparison"] = comparison_table(result)
        blocks[f"{name}-branches"] = branches_table(result)
        blocks[f"{name}-recommendation"] = f"```\n{table}\n```"
        blocks[f"{name}-time"] = _times(result)
        written.append(docs / "images" / f"batch_size_{name}.png")
        table.plot(written[-1])
        for checkpoint in result["checkpoints"]:
            epoch = checkpoint["epoch"]
            written.append(docs / "images" / f"batch_size_{name}_epoch_{epoch}.png")
            noise = result["history"]["noise_scale"][epoch - 1]
            critical(checkpoint["orders"][0]).plot(written[-1], noise)
    fill(docs / PAGE, blocks)
    return written


def _times(result: Mapping[str, Any]) -> str:
    branches = [
        row["seconds"]
        for checkpoint in result["checkpoints"]
        for found in checkpoint["orders"]
        for row in found["branches"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['seconds'] / 60:.1f} minutes for the run and {sum(branches) / 60:.1f} for its "
        f"{len(branches)} branches, on {result['cores']} cores with a load average of "
        f"{result['load']} in the last quarter of an hour (this run alone makes about "
        f"{result['cores']}); {versions}."
    )


def _parse(argv: Sequence[str]) -> Any:
    values = define_flags()
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    tasks = listed_names(values.tasks)
    if not tasks or not {*tasks} <= {*EXPERIMENTS}:
        raise FlagValueError("tasks", f"some of {', '.join(EXPERIMENTS)}", as_given(values.tasks))
    if values.data_dir is None and not values.render:
        raise FlagValueError("data_dir", "a folder with data, or --render", None)
    if values.data_dir is not None:
        for name in tasks:
            folder = Path(values.data_dir) / EXPERIMENTS[name].folder
            if not folder.is_dir():
                raise FlagValueError("data_dir", f"a folder with {folder.name}", values.data_dir)
    if not Path(values.docs_dir).is_dir():
        raise FlagValueError("docs_dir", "a folder", repr(values.docs_dir))
    return values


def _run(values: Any) -> None:
    from official_recipes.common.replicas import quiet_tensorflow

    quiet_tensorflow()
    path = Path(values.docs_dir) / RESULTS
    results = read_json(path) if path.exists() else {}
    if values.data_dir is not None:
        for name in listed_names(values.tasks):
            folder = Path(values.output_dir) / name
            make_folder("output_dir", folder)
            task = make_task(EXPERIMENTS[name], Path(values.data_dir))
            results[name] = results_of(task, EXPERIMENTS[name], folder)
            write_json(path, results)
    if values.render:
        ordered = {name: results[name] for name in EXPERIMENTS if name in results}
        for written in render(ordered, Path(values.docs_dir)):
            print(f"wrote {written}")


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and returns the exit code."""
    return run_benchmark(argv, _parse, _run)


if __name__ == "__main__":
    run_program(main, sys.argv)
