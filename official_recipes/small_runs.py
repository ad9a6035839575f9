"""The three recipes of tf-models-official, each with two optimizers, on small data, in minutes.

Entry point of ``python -m official_recipes.small_runs``, which ``make recipes`` calls.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from absl import flags
from rich.console import Console
from rich.table import Table

from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    FlagValueError,
    define_integer,
    fail,
    parse_unless_help,
)
from official_recipes.common.interruption import Interrupted, run_program
from official_recipes.common.output_folder import make_folder
from official_recipes.common.progress import progress_bar

PROGRAM = "python -m official_recipes.small_runs"
SUMMARY = (
    "Prepares small data, trains ResNet-18, BERT-tiny and a small DLRM on logical CPU replicas,\n"
    "each with a variance-reduced optimizer and its base, and prints one table. Real data are\n"
    "taken from --data_dir where it has them, otherwise what the recipes bring along."
)
_KILLED = 1
_RECIPES = Path(__file__).parent


@dataclass(frozen=True)
class SmallRun:
    """One recipe.

    Attributes:
        recipe: Its package.
        config: Its config file.
        source: Where its data are below `data_dir`.
        prepare: Flags of its prepare_data for that source, with ``{source}`` in them, or for none.
        without_source: The same without; ``None`` where nothing is to be prepared.
        data_name: Of the results, with and without the source.
        inputs: Fields of the parameters with the prepared files, ``{data}`` in them.
        without_inputs: The same where nothing was prepared.
        optimizers: Names in the registration: the variance-reduced one and its base.
        metric: Of the summary, and how it is called in the table.
    """

    recipe: str
    config: str
    source: str
    prepare: tuple[str, ...]
    without_source: tuple[str, ...] | None
    data_name: tuple[str, str]
    inputs: Mapping[str, str]
    without_inputs: Mapping[str, str]
    optimizers: tuple[str, str]
    metric: tuple[str, str]


_FILES = {
    "task.train_data.input_path": "{data}/train*",
    "task.validation_data.input_path": "{data}/validation*",
}
_CHUNKS = {**_FILES, "task.validation_data.input_path": "{data}/validation*,{data}/test*"}
_SYNTHETIC = {
    "task.train_data.input_path": "synthetic",
    "task.validation_data.input_path": "synthetic",
}

SMALL_RUNS = (
    SmallRun(
        recipe="resnet50",
        config="images_cpu.yaml",
        source="tiny-imagenet-40/tiny-imagenet-40.tar.gz",
        prepare=("--source={source}",),
        without_source=None,
        data_name=("Tiny ImageNet, 40 classes", "synthetic images"),
        inputs=_FILES,
        without_inputs=_SYNTHETIC,
        optimizers=("vr_lars", "lbopt_lars"),
        metric=("accuracy", "accuracy"),
    ),
    SmallRun(
        recipe="bert",
        config="bert_tiny_cpu.yaml",
        source="wikipedia-sample/wiki_00",
        prepare=("--source={source}", "--vocab_size=4096", "--dupe_factor=1"),
        without_source=("--vocab_size=4096", "--dupe_factor=1"),
        data_name=("Wikipedia sample, a quarter", "Python's manual"),
        inputs=_FILES,
        without_inputs=_FILES,
        optimizers=("vr_lamb", "lbopt_lamb"),
        metric=("masked_lm_accuracy", "masked LM accuracy"),
    ),
    SmallRun(
        recipe="dlrm",
        config="criteo_sample_cpu.yaml",
        source="criteo",
        prepare=(
            "--source={source}/train.csv",
            "--validation_source={source}/dev.csv",
            "--test_source={source}/test.csv",
            "--min_frequency=4",
        ),
        without_source=("--synthetic_rows=8000", "--test_fraction=0.05"),
        data_name=("Criteo sample", "synthetic clicks"),
        inputs=_CHUNKS,
        without_inputs=_CHUNKS,
        optimizers=("vr_sgd", "sgd"),
        metric=("auc", "AUC"),
    ),
)


def define_flags() -> flags.FlagValues:
    """Returns the flags."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of small real data sets: "
        + ", ".join(run.source for run in SMALL_RUNS)
        + " [default: what the recipes bring along].",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output_dir",
        "runs/recipes",
        "Folder for prepared data, models, logs and results.json; what it has of an earlier call "
        "is removed.",
        flag_values=values,
    )
    define_integer(values, "cpu_replicas", 2, "Logical CPU devices.", maximum=64)
    define_integer(values, "limit_s", 1800, "Seconds after which one command is ended.")
    flags.DEFINE_list(
        "recipes",
        ",".join(run.recipe for run in SMALL_RUNS),
        "Which ones to run.",
        flag_values=values,
    )
    return values


def main(argv: Sequence[str]) -> int:
    """Runs everything and returns the exit code: 0, 2 for bad flags, 1 if a command failed."""
    values = define_flags()
    try:
        if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
            return 0
        _check(values)
    except FlagValueError as error:
        return fail(error)
    chosen = [run for run in SMALL_RUNS if run.recipe in values.recipes]
    output = Path(values.output_dir)
    data_dir = None if values.data_dir is None else Path(values.data_dir)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("recipes", total=sum(1 + len(r.optimizers) for r in chosen))
        for run in chosen:
            folder = output / run.recipe
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

            def step(name: str, command: Sequence[str], folder: Path = folder) -> bool:
                progress.update(task, description=name)
                done = _call(command, folder / f"{name.replace(' ', '_')}.log", values.limit_s)
                progress.advance(task)
                if not done:
                    failed.append(f"{name}: see {folder / name.replace(' ', '_')}.log")
                return done

            for row in _run(run, folder, data_dir, values.cpu_replicas, step):
                rows.append(row)
                progress.console.print(
                    f"{row['recipe']} {row['optimizer']}: {row['metric']} {row['value']:.4f}, "
                    f"{row['seconds']:.0f} s",
                    highlight=False,
                )
    if rows:
        write_json(output / "results.json", rows)
        # Without a terminal rich assumes 80 columns, too few for this table.
        Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return _KILLED if failed else 0


def _check(values: flags.FlagValues) -> None:
    known = [run.recipe for run in SMALL_RUNS]
    if not values.recipes or not {*values.recipes} <= {*known}:
        raise FlagValueError(
            "recipes", f"names among {', '.join(known)}", repr(",".join(values.recipes))
        )
    if values.data_dir is not None and not Path(values.data_dir).is_dir():
        raise FlagValueError("data_dir", "a folder that exists", repr(values.data_dir))
    make_folder("output_dir", Path(values.output_dir))


def _run(
    run: SmallRun, folder: Path, data_dir: Path | None, replicas: int, step: Any
) -> Iterator[dict[str, Any]]:
    source = None if data_dir is None else data_dir / run.source
    real = source is not None and source.exists()
    prepare = run.prepare if real else run.without_source
    module = f"official_recipes.{run.recipe}"
    data = folder / "data"
    if prepare is not None:
        arguments = [argument.format(source=source) for argument in prepare]
        command = [f"{module}.prepare_data", *arguments, f"--output_dir={data}"]
        if not step(f"{run.recipe} data", command):
            return
    fields = run.inputs if real or prepare is not None else run.without_inputs
    for optimizer in run.optimizers:
        overrides = {
            **fields,
            "trainer.optimizer_config.optimizer.type": optimizer,
        }
        model = folder / optimizer
        command = [
            f"{module}.train",
            f"--config_file={_RECIPES / run.recipe / 'configs' / run.config}",
            "--params_override="
            + ",".join(f"{k}='{v.format(data=data)}'" for k, v in overrides.items()),
            f"--cpu_replicas={replicas}",
            f"--model_dir={model}",
        ]
        started = time.monotonic()
        if not step(f"{run.recipe} {optimizer}", command):
            continue
        summary = json.loads((model / "summary.json").read_text(encoding="utf-8"))
        yield {
            "recipe": run.recipe,
            "data": run.data_name[0 if real else 1],
            "optimizer": optimizer,
            "sub_batches": summary["replicas"] * summary["sub_batches"],
            "batch": summary["global_batch_size"],
            "steps": summary["steps"],
            "metric": run.metric[1],
            "value": summary["metrics"][run.metric[0]],
            "step_ms": summary["step_ms"],
            "seconds": round(time.monotonic() - started, 1),
        }


def _call(command: Sequence[str], log: Path, limit_s: int) -> bool:
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            file.write(f"\nended after {limit_s} s\n".encode())
            return False
    return done.returncode == 0


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns one row per run."""
    result = Table(title="small runs of the recipes")
    for heading in ("recipe", "data", "optimizer"):
        result.add_column(heading)
    for heading in ("batch", "k", "steps", "metric", "value", "ms per step", "seconds"):
        result.add_column(heading, justify="right")
    for row in rows:
        step = "" if row["step_ms"] is None else f"{row['step_ms']:.0f}"
        result.add_row(
            row["recipe"],
            row["data"],
            row["optimizer"],
            str(row["batch"]),
            str(row["sub_batches"]),
            str(row["steps"]),
            row["metric"],
            f"{row['value']:.4f}",
            step,
            f"{row['seconds']:.0f}",
        )
    return result


def _end(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise Interrupted(number)  # upon which subprocess.run ends the command, too


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    run_program(main, sys.argv)
