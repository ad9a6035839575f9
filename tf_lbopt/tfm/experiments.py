"""Experiments whose configuration has room for these optimizers and for sub-batches.

Configurations of tf-models are dataclasses that refuse unknown fields. Those of an experiment are
replaced, when it is looked up, by subclasses with fields more; all else stays as it was.
"""

import copy
import dataclasses
import functools
import inspect
import types
from typing import Any, TypeVar

from official.core import config_definitions, exp_factory, task_factory
from official.modeling import optimization
from official.modeling.hyperparams import base_config
from official.modeling.optimization import optimizer_factory

from tf_lbopt import _compat
from tf_lbopt.tfm.configs import REGISTRATIONS
from tf_lbopt.tfm.sub_batches import SubBatchTask

_Config = TypeVar("_Config", bound=base_config.Config)


def register_optimizers() -> None:
    """Registers all optimizers with the `OptimizerFactory`; again, it does nothing.

    In both of its tables: tasks look into that of the legacy optimizers whatever they want, since
    the class found there is never checked for being one.
    """
    for table in (optimizer_factory.LEGACY_OPTIMIZERS_CLS, optimizer_factory.NEW_OPTIMIZERS_CLS):
        for row in REGISTRATIONS.values():
            table.setdefault(row.key, row.cls)


def extend_experiments() -> None:
    """Makes `exp_factory.get_exp_config` return extended experiments; again, it does nothing."""
    _compat.replace(
        exp_factory,
        "get_exp_config",
        lambda get_exp_config: lambda exp_name: extended(get_exp_config(exp_name)),
    )


def extended(
    experiment: config_definitions.ExperimentConfig,
) -> config_definitions.ExperimentConfig:
    """Gives an experiment's configuration the fields of this package, in place.

    Args:
        experiment: An `ExperimentConfig`. Its `trainer.optimizer_config.optimizer` gets a field for
            each optimizer, its `task` gets `sub_batches`, where the task is a registered one that
            does not have that field itself.

    Returns:
        The same object.
    """
    trainer: Any = getattr(experiment, "trainer", None)
    optimization_config = getattr(trainer, "optimizer_config", None)
    if isinstance(optimization_config, optimization.OptimizationConfig):
        trainer.optimizer_config = with_optimizers(optimization_config)
    task: Any = getattr(experiment, "task", None)
    if task is not None:
        experiment.task = _as(_extended_task_config(_class_of(task)), task)
    return experiment


def with_optimizers(
    config: optimization.OptimizationConfig,
) -> optimization.OptimizationConfig:
    """A copy of a configuration that has the fields of all optimizers, for own experiments.

    Args:
        config: An `OptimizationConfig` of tf-models, or of a subclass.

    Returns:
        One of a subclass of its class.

    Example:
        >>> from official.modeling import optimization
        >>> config = with_optimizers(optimization.OptimizationConfig())
        >>> config.override({"optimizer": {"type": "vr_lars", "vr_lars": {"gamma": 0.2}}})
        >>> config.optimizer.get().gamma
        0.2
    """
    optimizer_cls = _extended_optimizer_config(_class_of(config.optimizer))
    copied = _as(_extended_optimization_config(_class_of(config), optimizer_cls), config)
    copied.optimizer = _as(optimizer_cls, config.optimizer)
    return copied


def _as(cls: type[_Config], config: base_config.Config) -> _Config:
    """A copy of a configuration as one of a subclass of its class."""
    if type(config) is cls:
        return config
    copied = cls()
    vars(copied).update(copy.deepcopy(vars(config)))
    return copied


def _class_of(config: base_config.Config) -> Any:  # mypy takes a `type` for not hashable
    return type(config)


@functools.cache
def _extended_optimizer_config(cls: Any) -> Any:
    rows = [row for row in REGISTRATIONS.values() if row.key not in cls.__dataclass_fields__]
    if not rows:
        return cls
    fields = [(row.key, row.config, dataclasses.field(default_factory=row.config)) for row in rows]
    return _dataclass(cls, fields)


@functools.cache
def _extended_optimization_config(cls: Any, optimizer_cls: Any) -> Any:
    if cls.__dataclass_fields__["optimizer"].type is optimizer_cls:
        return cls
    field = dataclasses.field(default_factory=optimizer_cls)
    return _dataclass(cls, [("optimizer", optimizer_cls, field)])


@functools.cache
def _extended_task_config(cls: Any) -> Any:
    fields = getattr(cls, "__dataclass_fields__", None)
    if fields is None or "sub_batches" in fields:
        return cls
    builder = getattr(cls, "_BUILDER", None)
    try:
        task_cls = task_factory.get_task_cls(cls) if builder is None else builder
    except LookupError:
        return cls
    if not inspect.isclass(task_cls):
        return cls
    extended_cls = _dataclass(cls, [("sub_batches", int, 1)])
    extended_task = types.new_class(task_cls.__name__, (SubBatchTask, task_cls))
    extended_task.__module__ = task_cls.__module__
    extended_task.__doc__ = task_cls.__doc__
    if builder is None:
        task_factory.register_task_cls(extended_cls)(extended_task)
    else:
        extended_cls._BUILDER = extended_task
    return extended_cls


def _dataclass(base: type[_Config], fields: list[tuple[str, type, object]]) -> type[_Config]:
    cls = dataclasses.make_dataclass(base.__name__, fields, bases=(base,))
    cls.__module__ = base.__module__
    cls.__doc__ = base.__doc__
    return cls


OptimizationConfig = _extended_optimization_config(
    optimization.OptimizationConfig, _extended_optimizer_config(optimization.OptimizerConfig)
)
"""`OptimizationConfig` of tf-models with the optimizers of this package."""
