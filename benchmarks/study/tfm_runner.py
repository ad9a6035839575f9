"""Makes the runs of a study by a recipe on tf-models-official, a process each."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.grid import Scalar

CONFIGS = Path(__file__).parents[2] / "official_recipes"
_FLAGS = ("sub_batches", "seed")
_DIVERGED = "training diverged"
OVER_ALL = "all elements"
"""Of the setting ``layer_mean``."""


class TfmRunner:
    """Trains and evaluates by ``official_recipes.<recipe>.train``.

    Args:
        recipe: Its name.
        data_dir: What the recipe's ``prepare_data`` made.
        replicas: Logical CPU devices of every run.
    """

    def __init__(self, recipe: str, data_dir: Path, replicas: int) -> None:
        self._recipe = recipe
        self._data_dir = data_dir
        self._replicas = replicas

    def load(self, progress: Callable[[int, int], None]) -> str:
        """Looks for the prepared files; returns the folder's name.

        Raises:
            ValueError: There are none.
        """
        for split in ("train", "validation", "test"):
            if not list(self._data_dir.glob(f"{split}*")):
                raise ValueError(f"{self._data_dir} has no {split} files of prepare_data")
        progress(1, 1)
        return self._data_dir.name

    def train(
        self, flags: Mapping[str, Scalar], on_update: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Trains once.

        Args:
            flags: ``config`` (a file of the recipe, without ending), ``optimizer``,
                ``learning_rate`` and ``rate_field`` (below ``optimizer_config.learning_rate``),
                ``sub_batches``, ``seed``, ``validation_size`` (whether the validation split is
                evaluated on, not the test split), ``layer_mean`` (`OVER_ALL` for that of
                `benchmarks.study.layer_mean`), and any field of the parameters by its path.
            on_update: Called once, at the end.

        Returns:
            The result's fields.

        Raises:
            RuntimeError: The run failed in another way than by diverging.
        """
        tuning = bool(flags["validation_size"])
        split = "validation" if tuning else "test"
        with tempfile.TemporaryDirectory(prefix="tf_lbopt_study_") as folder:
            done = subprocess.run(
                self.command(flags, Path(folder)), capture_output=True, text=True, check=False
            )
            summary_file = Path(folder) / "summary.json"
            diverged = done.returncode != 0 and _DIVERGED in done.stderr
            if done.returncode != 0 and not diverged:
                raise RuntimeError(f"the run failed: {done.stderr.strip()[-2000:]}")
            summary: dict[str, Any] = {}
            if not diverged:
                summary = json.loads(summary_file.read_text(encoding="utf-8"))
        steps = int(flags["trainer.train_steps"])
        on_update(steps, steps)
        metrics = summary.get("metrics", {})
        return {
            "task": self._recipe,
            "data": self._data_dir.name,
            "diverged": diverged,
            "final": {f"{split}_{name}": value for name, value in metrics.items()},
            "train": summary.get("train_metrics"),
            "step_ms": summary.get("step_ms"),
            "seconds": summary.get("seconds"),
        }

    def command(self, flags: Mapping[str, Scalar], model_dir: Path) -> list[str]:
        """The command line of a run."""
        split = "validation" if flags["validation_size"] else "test"
        optimizer = "trainer.optimizer_config"
        program = f"official_recipes.{self._recipe}.train"
        if flags.get("layer_mean") == OVER_ALL:
            program = "benchmarks.study.layer_mean"
        fields = {
            "task.train_data.input_path": f"{self._data_dir}/train*",
            "task.validation_data.input_path": f"{self._data_dir}/{split}*",
            f"{optimizer}.optimizer.type": flags["optimizer"],
            f"{optimizer}.learning_rate.{flags['rate_field']}": flags["learning_rate"],
            **{name: value for name, value in flags.items() if "." in name},
        }
        return [
            *[sys.executable, "-m", program],
            f"--config_file={CONFIGS / self._recipe / 'configs' / str(flags['config'])}.yaml",
            "--params_override="
            + ",".join(
                f"{name}='{value}'" if isinstance(value, str) else f"{name}={value}"
                for name, value in fields.items()
            ),
            f"--cpu_replicas={self._replicas}",
            f"--model_dir={model_dir}",
            *[f"--{name}={flags[name]}" for name in _FLAGS if name in flags],
        ]
