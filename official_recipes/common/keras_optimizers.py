"""Optimizers by name and learning-rate schedules for the Keras 3 recipes."""

from __future__ import annotations

import inspect
import math
from typing import Any

import keras

import tf_lbopt
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.keras_options import ScheduleOptions, TrainingOptions
from tf_lbopt.schedules import Warmup, linear_scaling, sqrt_scaling

_PACKAGE = "official_recipes"


@keras.saving.register_keras_serializable(package=_PACKAGE)
class InverseSqrtDecay(keras.optimizers.schedules.LearningRateSchedule):
    """``η √(W / (W + t))``, t updates after a warm-up of W updates: the Transformer's schedule.

    Args:
        learning_rate: η.
        warmup_steps: W ≥ 1.
    """

    def __init__(self, learning_rate: float, warmup_steps: int):
        super().__init__()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps

    def __call__(self, step: Any) -> Any:
        """The learning rate, `step` updates after the warm-up."""
        step = keras.ops.cast(step, "float32")
        return self.learning_rate * keras.ops.sqrt(self.warmup_steps / (self.warmup_steps + step))

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal schedule."""
        return {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps}


def make_schedule(
    options: ScheduleOptions, batch_size: int, updates_per_epoch: int, epochs: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns the learning rate as a function of the update.

    Args:
        options: What it is.
        batch_size: Of the run.
        updates_per_epoch: To turn epochs into updates.
        epochs: Of the whole run.
    """
    warmup = round(options.warmup_epochs * updates_per_epoch)
    rate = options.learning_rate
    if options.base_batch_size is not None:
        rule = linear_scaling if options.scaling == "linear" else sqrt_scaling
        rate = rule(rate, options.base_batch_size, batch_size)
    rest = max(1, updates_per_epoch * epochs - warmup)
    schedules = keras.optimizers.schedules
    after: Any = rate
    if options.kind == "polynomial":
        after = schedules.PolynomialDecay(rate, rest, end_learning_rate=0.0, power=options.power)
    elif options.kind == "cosine":
        after = schedules.CosineDecay(rate, rest)
    elif options.kind == "inverse_sqrt":
        after = InverseSqrtDecay(rate, max(1, warmup))
    elif options.kind == "step":
        # Boundaries are epochs from the start of the run; to Keras, the last steps of a rate.
        ends = [round(epoch * updates_per_epoch) - warmup - 1 for epoch in options.boundaries]
        rates = [rate * options.factor**number for number in range(len(ends) + 1)]
        after = schedules.PiecewiseConstantDecay(ends, rates)
    return Warmup(after, warmup, options.warmup_start)


# Arguments that every optimizer takes, also where its signature says **kwargs.
_OF_ALL = ("gradient_accumulation_steps", "global_clipnorm")

_STOCK: dict[str, tuple[type[keras.optimizers.Optimizer], dict[str, Any]]] = {
    "sgd": (keras.optimizers.SGD, {}),
    "momentum": (keras.optimizers.SGD, {"momentum": 0.9}),
    "nesterov": (keras.optimizers.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (keras.optimizers.AdamW, {"weight_decay": 0.0}),
    "lion": (keras.optimizers.Lion, {"weight_decay": 0.0}),
}
if hasattr(keras.optimizers, "Muon"):  # older versions have none
    _STOCK["muon"] = (keras.optimizers.Muon, {"weight_decay": 0.0})
_OF_KERAS = {factory for factory, _ in _STOCK.values()}


def known_optimizers() -> tuple[str, ...]:
    """Every name that ``--optimizer`` takes."""
    return tuple(dict.fromkeys((*_STOCK, *(row.name for row in tf_lbopt.list_optimizers()))))


def make_optimizer(
    options: TrainingOptions, updates_per_epoch: int, epochs: int
) -> keras.optimizers.Optimizer:
    """Builds the optimizer with its schedule, accumulation and wrappers.

    Args:
        options: What was asked for.
        updates_per_epoch: To turn epochs into updates.
        epochs: Of the whole run.

    Raises:
        FlagValueError: The optimizer is unknown, or does not take an argument or its value.
    """
    name = options.optimizer
    if name not in known_optimizers():
        raise FlagValueError("optimizer", f"one of {', '.join(known_optimizers())}", repr(name))
    schedule = make_schedule(options.schedule, options.batch_size, updates_per_epoch, epochs)
    factory, arguments = _stock(options) if name in _STOCK else _ours(options)
    accumulation: dict[str, Any] = {}
    if options.gradient_accumulation_steps > 1:
        accumulation["gradient_accumulation_steps"] = options.gradient_accumulation_steps
    accepted = {*inspect.signature(factory).parameters, *_OF_ALL}
    for argument in arguments:
        if argument not in accepted:
            raise FlagValueError(
                argument,
                f"not to be given with --optimizer={name}, which has no such argument",
                arguments[argument],
            )
    try:
        if accumulation and factory in _OF_KERAS:
            clip = arguments.pop("global_clipnorm", None)
            optimizer = factory(learning_rate=schedule, **arguments)
            optimizer = tf_lbopt.Accumulated(optimizer, **accumulation, global_clipnorm=clip)
        else:
            optimizer = factory(learning_rate=schedule, **arguments, **accumulation)
        if options.post_local is not None:
            optimizer = tf_lbopt.PostLocalSGD(
                optimizer,
                start=math.ceil(options.post_local.start_epoch * updates_per_epoch),
                period=options.post_local.period,
                average_momentum=options.post_local.average_momentum,
            )
        if options.dtype == "mixed_float16":
            optimizer = tf_lbopt.LossScaleOptimizer(optimizer)
    except (TypeError, ValueError) as error:
        raise FlagValueError("optimizer", f"arguments that {name} takes", error) from error
    return optimizer


def _stock(options: TrainingOptions) -> tuple[Any, dict[str, Any]]:
    factory, defaults = _STOCK[options.optimizer]
    arguments = {**defaults, **options.optimizer_arguments}
    if options.optimizer == "muon":  # one decay for all, as in the others
        arguments["adam_weight_decay"] = arguments["weight_decay"]
    if factory is keras.optimizers.SGD and arguments.get("weight_decay"):
        # Keras's is decoupled: it does not pass through the momentum, so that the same number
        # decays weights ten times less at momentum 0.9. Papers mean the coupled one.
        return tf_lbopt.SGD, arguments
    return factory, arguments


def _ours(options: TrainingOptions) -> tuple[Any, dict[str, Any]]:
    row = next(row for row in tf_lbopt.list_optimizers() if row.name == options.optimizer)
    if row.needs_sub_batches:
        _check_sub_batches(options)
    return row.cls, dict(options.optimizer_arguments)


def _check_sub_batches(options: TrainingOptions) -> None:
    if options.replicas * options.gradient_accumulation_steps < 2:
        raise FlagValueError(
            "replicas",
            f"at least 2 sub-batches (replicas x micro-steps) for {options.optimizer}, which "
            "compares their gradients",
            f"{options.replicas} x {options.gradient_accumulation_steps}",
        )
