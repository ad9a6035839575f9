"""A typed configuration for each optimizer, and the table of those that tf-models gets to know."""

import dataclasses
from collections.abc import Mapping

import tf_keras
from official.modeling import optimization
from official.modeling.optimization.configs import optimizer_config

from tf_lbopt.optimizers.base import OPTIMIZERS
from tf_lbopt.optimizers.hyperparameters import type_of
from tf_lbopt.rules import VARIANCE
from tf_lbopt.tf_keras.base import LargeBatchOptimizer
from tf_lbopt.tf_keras.optimizers import CLASSES


@dataclasses.dataclass
class _Config(optimizer_config.BaseOptimizerConfig):
    """The fields common to all; the clips are of the base class.

    Attributes:
        name: Of the optimizer.
        weight_decay: λ ≥ 0 or `None`; what it means is the algorithm's.
        exclude_from_weight_decay: Regexes over the names of variables without decay (`"/bias$"`).
    """

    name: str = ""
    weight_decay: float | None = None
    exclude_from_weight_decay: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Registration:
    """What tf-models gets to know of an optimizer.

    Attributes:
        key: As `trainer.optimizer_config.optimizer.type` has it.
        cls: The optimizer.
        config: The class of its configuration.
    """

    key: str
    cls: type[tf_keras.optimizers.Optimizer]
    config: type[optimizer_config.BaseOptimizerConfig]


# Arguments that are no fields: norms by example are nothing that tf-models' training steps compute,
# and `sub_batches` is the task's.
_NO_FIELDS = ("learning_rate", "norm_estimator", "sub_batches")


def _registration(name: str, cls: type[LargeBatchOptimizer]) -> Registration:
    fields = [
        (argument, type_of(argument, default), default)
        for argument, default in cls.arguments.items()
        if argument not in _NO_FIELDS
    ]
    config = dataclasses.make_dataclass(
        f"{cls.__name__}Config", [("name", str, cls.__name__), *fields], bases=(_Config,)
    )
    config.__module__ = __name__
    config.__doc__ = f"Of `tf_lbopt.tf_keras.{cls.__name__}`; the fields are its arguments."
    # The keys of tf-models' own optimizers stay theirs.
    taken = name in optimization.OptimizerConfig.__dataclass_fields__
    return Registration(f"lbopt_{name}" if taken else name, cls, config)


_ROWS = [_registration(name, CLASSES[cls.__name__]) for name, cls in OPTIMIZERS.items()]

REGISTRATIONS: Mapping[str, Registration] = {row.key: row for row in _ROWS}
"""All registrations by key."""

CONFIGS = {row.config.__name__: row.config for row in _ROWS}
"""The classes of their configurations, by name."""

globals().update(CONFIGS)


def needs_sub_batches(key: str) -> bool:
    """Whether an optimizer is one of this package that needs sub-batches: at least 2, better 8."""
    return key in REGISTRATIONS and VARIANCE in REGISTRATIONS[key].cls.statistics
