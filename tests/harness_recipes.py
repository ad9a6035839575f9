"""What the tests of several recipes have in common."""

import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from official_recipes.common import keras_training
from official_recipes.common.keras_options import TrainingOptions

ROOT = Path(__file__).resolve().parents[1]
SMALL_RESNET = """
task:
  model:
    num_classes: 4
    input_size: [32, 32, 3]
    backbone: {type: resnet, resnet: {model_id: 10}}
  train_data: {input_path: synthetic, global_batch_size: 16}
  validation_data: {input_path: synthetic, global_batch_size: 32}
trainer:
  train_steps: 4
  steps_per_loop: 2
  summary_interval: 2
  checkpoint_interval: 2
  validation_interval: 4
  validation_steps: 1
  optimizer_config:
    learning_rate: {cosine: {initial_learning_rate: 2.0, decay_steps: 100, offset: 0}}
    warmup: {linear: {warmup_steps: 2}}
runtime: {mixed_precision_dtype: float32}
"""
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def interrupt_preparation(
    recipe: str,
    arguments: list[str],
    output_dir: Path,
    number: int,
    limit_s: int = 60,
    python: Sequence[str] = (sys.executable,),
) -> None:
    """Sends a signal to a recipe's ``prepare_data`` as soon as it writes training records.

    Checks that nothing looks like prepared data then, and that only a killed process leaves the
    folder that it worked in.
    """
    partial = output_dir.parent / f".{output_dir.name}.partial"
    command = [
        *[*python, "-c"],
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"from official_recipes.{recipe}.prepare_data import main; sys.exit(main(sys.argv))",
        *[*arguments, f"--output_dir={output_dir}"],
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + limit_s
            while not list(partial.glob("train-*")):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            _, errors = process.communicate(timeout=min(limit_s, 120))
        finally:
            process.kill()
    assert process.returncode == _EXIT_CODES[number]
    assert not output_dir.exists()
    assert partial.exists() == (number == signal.SIGKILL)
    if number != signal.SIGKILL:
        assert errors.strip().endswith("interrupted: nothing was written")


def signal_when(
    command: list[str], said: str, number: int, env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Sends a signal to a program as soon as it prints a line with ``said``.

    Returns:
        The exit code, and what it still printed to stdout and to stderr.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,  # A pipe that nobody empties may block the program.
        subprocess.Popen(
            command, cwd=ROOT, text=True, env=env, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        for line in process.stdout:
            if said in line:
                break
        process.send_signal(number)
        rest, _ = process.communicate(timeout=300)
        errors.seek(0)
        return process.returncode, rest, errors.read()


def last_checkpoint(folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The path of a folder's last checkpoint, and the values that it has by their names."""
    path = tf.train.latest_checkpoint(str(folder))
    names = [name for name, _ in tf.train.list_variables(path) if name.endswith("VARIABLE_VALUE")]
    return path, {name: tf.train.load_variable(path, name) for name in names}


def assert_same_state(after: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> None:
    """A checkpoint written without training in between has all that the one before has."""
    assert set(after) == set(before)
    for name, value in before.items():
        if not name.startswith("save_counter"):
            np.testing.assert_array_equal(after[name], value, err_msg=name)


def assert_same_by_single_micro_steps(
    task: keras_training.Task, options: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on one device that makes all micro-steps of an update in one call is the same run.

    To the last bit, and counted by updates, as one that makes each in a call of its own.
    """

    def curves_and_counts() -> tuple[list[float], list[dict[str, float]], list[tuple[int, int]]]:
        counts: list[tuple[int, int]] = []
        result = keras_training.train(
            task,
            options,
            tf.distribute.get_strategy(),
            on_update=lambda *numbers: counts.append(numbers),
        )
        return result.train_loss, result.metrics, counts

    assert keras_training.micro_steps_per_call(options) == options.gradient_accumulation_steps > 1
    together = curves_and_counts()
    monkeypatch.setattr(keras_training, "micro_steps_per_call", lambda options: 1)
    assert curves_and_counts() == together
    total = options.epochs * keras_training.updates_per_epoch(task, options)
    assert together[2] == [(number, total) for number in range(1, total + 1)]


def cifar100_folder(folder):
    """Writes CIFAR-100 as its authors do, of a few random images."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 6), ("test", 4)):
        content = {
            b"data": rng.integers(0, 256, size=(count, 3072), dtype=np.uint8),
            b"fine_labels": list(range(100 - count, 100)),
            b"coarse_labels": [0] * count,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def _leaves(parameters: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _as_written(parameters: dict, name: str) -> str:
    if name not in parameters:
        return "–"
    value = parameters[name]
    return f"{len(value)} values" if isinstance(value, list) and len(value) > 8 else f"`{value}`"


def assert_deviations_are_in_the_readme(ours: str, theirs: str, recipe: str) -> None:
    """The README's table has what both experiments have, and all in which they differ."""
    from official.core import exp_factory

    experiments = [_leaves(exp_factory.get_exp_config(name).as_dict()) for name in (ours, theirs)]
    text = (ROOT / "official_recipes" / recipe / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| parameter \| `{ours}` \| `{theirs}` \|.*?\n\n", text, re.M | re.S)
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \| (.+) \|$", table, re.M)
    assert len(rows) == table.count("\n") - 3  # all but the header, the line under it, and the end
    written = {name: list(values) for name, *values, _ in rows}
    assert written == {name: [_as_written(e, name) for e in experiments] for name in written}
    first, second = experiments
    assert {n for n in first.keys() & second.keys() if first[n] != second[n]} <= written.keys()
    assert all(values != ["–", "–"] for values in written.values())
