"""Makes the runs of a study, in one process, with the recipes' own code."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from absl import flags

from benchmarks.study.grid import Scalar, Study
from benchmarks.study.tfm_runner import TfmRunner
from official_recipes.common.flag_parsing import parse_flags

if TYPE_CHECKING:
    from official_recipes.common.image_data import ImageData

OF_THE_STUDY = ("ratio_sub_batches", "smoothness_every", "constants_at")
"""Settings that are no flags of a recipe."""

Progress = Callable[[int, int], None]

TASKS = {
    "cifar": "a folder with CIFAR-10 or MNIST",
    "wikitext2": "a folder with WikiText-2",
    "multi30k": "a folder with Multi30k",
    "dlrm": "a folder that official_recipes.dlrm.prepare_data made",
    "bert": "a folder that official_recipes.bert.prepare_data made",
    "regression": None,
}
"""What can be studied, and the data that it needs."""


class Runner(Protocol):
    """Trains the runs of one task."""

    def load(self, progress: Progress) -> str:
        """Reads the data; returns its name."""

    def train(self, flags: Mapping[str, Scalar], on_update: Progress) -> dict[str, Any]:
        """Trains once with these flags; returns the fields of the table's row."""


def make_runner(study: Study, data_dir: Path | None) -> Runner:
    """Returns what trains a study's runs.

    Args:
        study: Whose task and number of replicas are taken.
        data_dir: Folder of the data, where the task has some.
    """
    if study.task == "regression":
        from benchmarks.study.regression import RegressionRunner

        return RegressionRunner()
    assert data_dir is not None
    numbers = {int(cell.settings.get("replicas", 1)) for cell, _ in study.comparisons}
    assert len(numbers) == 1, "a process has one strategy"
    kinds: dict[str, Callable[[str, Path, int], Runner]] = {
        "cifar": ImageRunner,
        "dlrm": TfmRunner,
        "bert": TfmRunner,
    }
    return kinds.get(study.task, RecipeRunner)(study.task, data_dir, numbers.pop())


class RecipeRunner:
    """Trains by a Keras 3 recipe.

    Args:
        recipe: Its name.
        data_dir: Folder of the data.
        replicas: Of every run, GPUs where there are enough.
    """

    def __init__(self, recipe: str, data_dir: Path, replicas: int) -> None:
        from official_recipes.common.replicas import training_strategy

        self._recipe = importlib.import_module(f"official_recipes.{recipe}.train")
        self._data_dir = data_dir
        # Before any other use of TensorFlow, which then knows the logical devices.
        self._strategy = training_strategy(replicas)

    def load(self, progress: Progress) -> str:
        """Nothing is kept from run to run; returns the folder's name."""
        progress(1, 1)
        return self._data_dir.name

    def train(self, flags: Mapping[str, Scalar], on_update: Progress) -> dict[str, Any]:
        """Trains once with the recipe's flags; returns the recipe's result."""
        from official_recipes.common.keras_options import training_options
        from official_recipes.common.keras_training import train

        values = parsed(self._recipe, flags, self._data_dir)
        result = train(self._task(values), training_options(values), self._strategy, on_update)
        return result.record()

    def _task(self, values: flags.FlagValues) -> Any:
        return self._recipe.make_task(values, lambda done, total: None)


class ImageRunner(RecipeRunner):
    """Trains the image recipe on data that are read once."""

    _whole: ImageData

    def load(self, progress: Progress) -> str:
        """Reads the images; returns their name."""
        source = self._recipe.make_source(parsed(self._recipe, {}, self._data_dir))
        self._whole = self._recipe.load_data(source, progress)
        return self._whole.name

    def train(self, flags: Mapping[str, Scalar], on_update: Progress) -> dict[str, Any]:
        """Trains once.

        Args:
            flags: Of the recipe. ``ratio_sub_batches`` adds r by VRGD's definition to the
                evaluations; those of `smoothness.Watch` add its fields to the row.
            on_update: Called after every update.
        """
        from benchmarks.study.smoothness import Watch

        self._ratio_sub_batches = int(flags.get("ratio_sub_batches", 0))
        self._watch = watch = Watch(flags)

        def after_update(done: int, total: int) -> None:
            watch.after_update(done, total)
            on_update(done, total)

        row = super().train(flags, after_update)
        return {**row, **watch.fields()}

    def _task(self, values: flags.FlagValues) -> Any:
        task = self._watch.on(self._recipe.task_of(self._whole, values))
        if self._ratio_sub_batches:
            from benchmarks.study.ratio import measure_ratio

            return measure_ratio(task, values.batch_size, self._ratio_sub_batches)
        return task


def parsed(recipe: Any, settings: Mapping[str, Scalar], data_dir: Path) -> flags.FlagValues:
    """A recipe's flags."""
    values = recipe.define_flags()
    arguments = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in settings.items()
        if name not in OF_THE_STUDY
    ]
    parse_flags(values, ["study", f"--data_dir={data_dir}", *arguments])
    return values
