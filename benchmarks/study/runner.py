"""Makes the runs of a study, in one process, with the recipes' own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from absl import flags

from benchmarks.study.grid import Row, Run
from official_recipes.cifar import train as cifar
from official_recipes.common.flag_parsing import parse_flags
from official_recipes.common.image_data import ImageData, hold_out_validation
from official_recipes.common.keras_options import training_options


class Runner:
    """Trains runs on image data that is read once.

    Args:
        data_dir: Folder of the data.
        replicas: Of every run, GPUs where there are enough.
    """

    def __init__(self, data_dir: Path, replicas: int) -> None:
        from official_recipes.common.replicas import training_strategy

        self._data_dir = data_dir
        self._whole: ImageData | None = None
        # Before any other use of TensorFlow, which then knows the logical devices.
        self._strategy = training_strategy(replicas)

    def load(self, progress: Callable[[int, int], None]) -> str:
        """Reads the data; returns its name."""
        source = cifar.make_source(_parsed({"data_dir": str(self._data_dir)}))
        self._whole = cifar.load_data(source, 0, progress)
        return self._whole.name

    def train(self, run: Run, on_update: Callable[[int, int], None]) -> Row:
        """Trains once.

        Args:
            run: What to run.
            on_update: Called after every update with their number and total.

        Returns:
            The row for the table.
        """
        from official_recipes.cifar.task import ImageTask
        from official_recipes.common.keras_training import train

        assert self._whole is not None, "load comes first"
        values = _parsed(dict(run.settings))
        options = training_options(values)
        data = self._whole
        if values.validation_size:
            data = hold_out_validation(data, values.validation_size)
        task = ImageTask(
            data,
            values.model,
            augmentation=values.augmentation,
            held_out=bool(values.validation_size),
            label_smoothing=values.label_smoothing,
        )
        result = train(task, options, self._strategy, on_update)
        return {**run.head(), **result.record()}


def _parsed(settings: dict[str, float | int | bool | str]) -> flags.FlagValues:
    values = cifar.define_flags()
    arguments = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in settings.items()
    ]
    parse_flags(values, ["study", *arguments])
    return values
