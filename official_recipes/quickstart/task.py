"""What the quickstart trains: the task, and how each of the compared runs is trained."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from absl import flags

import tf_lbopt
from official_recipes.cifar.task import ImageTask
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.image_data import ImageData
from official_recipes.common.keras_options import ScheduleOptions, TrainingOptions
from official_recipes.quickstart import settings

_OF_KERAS = ("momentum", "adam")


class SmallImageTask(ImageTask):
    """Classifies images with a small network, without augmentation.

    Args:
        data: Images and labels.
        held_out: Whether ``data``'s test split is a validation split.
    """

    name = "quickstart"

    def __init__(self, data: ImageData, *, held_out: bool = False) -> None:
        super().__init__(data, "small", augmentation=False, held_out=held_out)

    def build_model(self) -> keras.Model:
        """Returns a multilayer perceptron for tiny images and a conv net for larger ones."""
        height, width, channels = self._data.train_images.shape[1:]
        inputs = keras.Input((height, width, channels), dtype="uint8")
        x = keras.layers.Rescaling(2.0 / self._data.max_value, offset=-1.0)(inputs)
        if height * width <= 256:
            x = keras.layers.Flatten()(x)
            x = keras.layers.Dense(128, activation="relu")(x)
        else:
            for filters in (16, 32) if channels == 1 else (32, 64, 64):
                x = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
                x = keras.layers.MaxPooling2D()(x)
            x = keras.layers.Flatten()(x)
        x = keras.layers.Dense(128, activation="relu")(x)
        return keras.Model(inputs, keras.layers.Dense(self._data.classes)(x))


def planned_runs(values: flags.FlagValues) -> list[TrainingOptions]:
    """Returns how each run is trained: the baseline, if there is one, then each optimizer.

    Args:
        values: The checked flags.

    Raises:
        FlagValueError: An optimizer is unknown, or the large batch has no equal sub-batches where
            an optimizer compares their gradients.
    """
    registry = {row.name: row for row in tf_lbopt.list_optimizers()}
    known = dict.fromkeys((*_OF_KERAS, *registry))
    unknown = [name for name in values.optimizers if name not in known]
    if unknown:
        raise FlagValueError(
            "optimizers", f"names among {', '.join(known)}", ", ".join(map(repr, unknown))
        )
    micro_steps = {
        name: settings.micro_steps(values.replicas)
        for name in values.optimizers
        if name in registry and registry[name].needs_sub_batches
    }
    sub_batches = values.replicas * settings.micro_steps(values.replicas)
    if micro_steps and values.batch_size % sub_batches:
        raise FlagValueError(
            "batch_size",
            f"a multiple of {sub_batches} for --optimizers={','.join(micro_steps)}, which compare "
            "the gradients of as many sub-batches",
            values.batch_size,
        )

    def run(
        name: str, batch_size: int, rate: float, arguments: dict[str, float]
    ) -> TrainingOptions:
        return TrainingOptions(
            optimizer=name,
            optimizer_arguments=arguments,
            schedule=ScheduleOptions(
                kind="polynomial",
                learning_rate=rate,
                power=settings.DECAY_POWER,
                warmup_epochs=values.warmup_fraction * values.epochs,
            ),
            batch_size=batch_size,
            epochs=values.epochs,
            replicas=values.replicas,
            gradient_accumulation_steps=micro_steps.get(name, 1),
            seed=values.seed,
            evaluate_every=0 if values.tune else 1,
        )

    runs = []
    if values.baseline:
        small = settings.SMALL_BATCH_OPTIMIZER, values.small_batch_size
        runs.append(run(*small, settings.SMALL_BATCH_LEARNING_RATE, {}))
    for name in values.optimizers:
        defaults = _defaults(registry[name].cls) if name in registry else {}
        rate = settings.LEARNING_RATES.get(name, defaults.get("learning_rate"))
        rate = rate if isinstance(rate, float) else settings.FALLBACK_LEARNING_RATE
        arguments = {}
        # ExtrapSGD has a trust ratio only if it is asked for.
        if values.trust_coefficient is not None and defaults.get("trust_coefficient") is not None:
            arguments = {"trust_coefficient": values.trust_coefficient}
        runs.append(run(name, values.batch_size, values.learning_rate or rate, arguments))
    return runs


def _defaults(cls: type) -> dict[str, Any]:
    """The default values of a constructor's arguments."""
    return {name: p.default for name, p in inspect.signature(cls).parameters.items()}
