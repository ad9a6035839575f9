"""Trains a network on CIFAR with any optimizer; ``--help`` lists the flags.

Entry point of ``python -m official_recipes.cifar.train``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from official_recipes.common.data_format import data_of_flag
from official_recipes.common.flag_parsing import (
    BELOW_ONE,
    FlagValueError,
    define_integer,
)
from official_recipes.common.image_data import (
    ImageData,
    ImageSource,
    ProgressCallback,
    TfdsSource,
    fewer_training_images,
    hold_out_validation,
    source_in,
)
from official_recipes.common.interruption import run_program
from official_recipes.common.keras_options import define_training_flags
from official_recipes.common.keras_program import Recipe, run_recipe

if TYPE_CHECKING:
    from official_recipes.cifar.task import ImageTask

# Kept here too, so that a wrong name is found before TensorFlow is imported.
MODELS = ("two_conv", "sigmoid_cnn", "resnet8", "resnet20", "resnet56", "vgg11", "vgg11_bn")
CONFIGS = Path(__file__).parent / "configs"


def define_flags() -> flags.FlagValues:
    """Returns the recipe's flags."""
    values = define_training_flags(batch_size=128, epochs=20)
    flags.DEFINE_enum("model", "resnet20", MODELS, "The network.", flag_values=values)
    flags.DEFINE_boolean(
        "augmentation", True, "Shift by up to 4 pixels and mirror.", flag_values=values
    )
    flags.DEFINE(BELOW_ONE, "label_smoothing", 0.0, "Label smoothing.", flag_values=values)
    flags.DEFINE_string(
        "tfds",
        None,
        "A data set of TensorFlow Datasets instead (cifar10, cifar100); --data_dir is its folder.",
        flag_values=values,
    )
    define_integer(
        values,
        "validation_size",
        0,
        "Training images to set apart and evaluate on instead of the test split.",
        minimum=0,
    )
    define_integer(
        values,
        "training_images",
        None,
        "Train on so many of the training images, evenly spaced ones [default: on all].",
    )
    define_integer(
        values,
        "evaluated_training_images",
        0,
        "Training images to evaluate on too, without augmentation.",
        minimum=0,
    )
    return values


def make_source(values: flags.FlagValues) -> ImageSource:
    """Returns the data that the flags name, not read yet.

    Raises:
        FlagValueError: The folder is missing or holds no known data.
    """
    if values.tfds is None:
        return source_in(values.data_dir)
    return TfdsSource(values.tfds, None if values.data_dir is None else Path(values.data_dir))


def load_data(source: ImageSource, progress: ProgressCallback | None = None) -> ImageData:
    """Reads the images; digits become 32x32 RGB, so that every network takes them.

    Raises:
        FlagValueError: They cannot be read.
    """
    with data_of_flag("data_dir", "readable data"):
        data = source.load(progress)
    return _as_rgb(data) if source.kind == "digits" else data


def _as_rgb(data: ImageData) -> ImageData:
    import dataclasses

    import numpy as np

    def enlarged(images: np.ndarray) -> np.ndarray:
        scaled = images.astype(np.uint16) * 255 // data.max_value
        return np.repeat(np.kron(scaled, np.ones((1, 4, 4, 1), np.uint16)), 3, -1).astype(np.uint8)

    return dataclasses.replace(
        data,
        name=f"{data.name} (as 32x32 RGB)",
        train_images=enlarged(data.train_images),
        test_images=enlarged(data.test_images),
        max_value=255,
    )


def make_task(values: flags.FlagValues, progress: ProgressCallback) -> ImageTask:
    """Reads the data and returns the task."""
    return task_of(load_data(make_source(values), progress), values)


def task_of(data: ImageData, values: flags.FlagValues) -> ImageTask:
    """Returns the task that the flags describe, on images that are there already.

    Raises:
        FlagValueError: The images are too few for the validation split.
    """
    from official_recipes.cifar.task import ImageTask

    size, most = values.validation_size, len(data.train_labels)
    if size:
        if not data.classes <= size < most:
            raise FlagValueError(
                "validation_size",
                f"from {data.classes} to less than the {most} training images",
                size,
            )
        data = hold_out_validation(data, size)
    most = len(data.train_labels)
    if values.training_images is not None:
        if not data.classes <= values.training_images <= most:
            raise FlagValueError(
                "training_images",
                f"from {data.classes} to the {most} training images",
                values.training_images,
            )
        most = values.training_images
        data = fewer_training_images(data, most)
    if values.evaluated_training_images > most:
        raise FlagValueError(
            "evaluated_training_images",
            f"at most the {most} training images",
            values.evaluated_training_images,
        )
    return ImageTask(
        data,
        values.model,
        augmentation=values.augmentation,
        held_out=bool(values.validation_size),
        label_smoothing=values.label_smoothing,
        evaluated_training_images=values.evaluated_training_images,
    )


RECIPE = Recipe(
    program="python -m official_recipes.cifar.train",
    summary=(
        "Trains a network on CIFAR-10 or CIFAR-100 (or, without --data_dir, on the digits inside\n"
        "scikit-learn) with any optimizer, and evaluates it on the test split."
    ),
    define_flags=define_flags,
    configs=CONFIGS,
    check=make_source,
    make_task=make_task,
)


def main(argv: Sequence[str]) -> int:
    """Runs the recipe and returns the exit code."""
    return run_recipe(RECIPE, argv)


if __name__ == "__main__":
    run_program(main, sys.argv)
