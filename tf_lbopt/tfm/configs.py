"""A typed configuration for each optimizer, and the table of those that tf-models gets to know."""

import dataclasses
from collections.abc import Mapping

import tf_keras
from official.modeling.optimization.configs import optimizer_config

from tf_lbopt.rules import VARIANCE
from tf_lbopt.tf_keras import optimizers


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


@dataclasses.dataclass
class SNGMConfig(_Config):
    """Of `tf_lbopt.tf_keras.SNGM`; the fields are its arguments."""

    name: str = "SNGM"
    momentum: float = 0.9


@dataclasses.dataclass
class VRSGDConfig(_Config):
    """Of `tf_lbopt.tf_keras.VRSGD`; the fields are its arguments."""

    name: str = "VRSGD"
    gamma: float = 0.1


@dataclasses.dataclass
class VRMomentumConfig(_Config):
    """Of `tf_lbopt.tf_keras.VRMomentum`; the fields are its arguments."""

    name: str = "VRMomentum"
    momentum: float = 0.9
    nesterov: bool = False
    gamma: float = 0.1


@dataclasses.dataclass
class VRAdamConfig(_Config):
    """Of `tf_lbopt.tf_keras.VRAdam`; the fields are its arguments."""

    name: str = "VRAdam"
    beta_1: float = 0.9
    beta_2: float = 0.999
    beta_3: float = 0.9
    epsilon: float = 1e-7
    gamma: float = 0.1


@dataclasses.dataclass
class _LayerwiseConfig(_Config):
    """Of an optimizer with a rate per layer.

    Attributes:
        exclude_from_layer_adaptation: Regexes over the names of variables that have none; `None`
            for those that do not decay, `[]` for no variables.
        default_trust_ratio: The trust ratio of a variable that has none.
    """

    exclude_from_layer_adaptation: list[str] | None = None
    default_trust_ratio: float = 1.0


@dataclasses.dataclass
class LARSConfig(_LayerwiseConfig):
    """Of `tf_lbopt.tf_keras.LARS`; the fields are its arguments."""

    name: str = "LARS"
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    nesterov: bool = False
    trust_ratio_denominator: str = "norm_of_sum"


@dataclasses.dataclass
class VRLARSConfig(LARSConfig):
    """Of `tf_lbopt.tf_keras.VRLARS`; the fields are its arguments."""

    name: str = "VRLARS"
    gamma: float = 0.1


@dataclasses.dataclass
class LAMBConfig(_LayerwiseConfig):
    """Of `tf_lbopt.tf_keras.LAMB`; the fields are its arguments."""

    name: str = "LAMB"
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-6


@dataclasses.dataclass
class VRLAMBConfig(LAMBConfig):
    """Of `tf_lbopt.tf_keras.VRLAMB`; the fields are its arguments."""

    name: str = "VRLAMB"
    beta_3: float = 0.9
    gamma: float = 0.1


@dataclasses.dataclass
class CLARSConfig(_LayerwiseConfig):
    """Of `tf_lbopt.tf_keras.CLARS`; the fields are its arguments.

    The norms are those of the sub-batches' gradients; tf-models has no way to norms by example.
    """

    name: str = "CLARS"
    momentum: float = 0.9
    trust_coefficient: float = 0.01
    max_trust_ratio: float | None = None
    nesterov: bool = True


@dataclasses.dataclass
class ExtrapSGDConfig(_LayerwiseConfig):
    """Of `tf_lbopt.tf_keras.ExtrapSGD`; the fields are its arguments.

    Its `sub_batches` are those of the task.
    """

    name: str = "ExtrapSGD"
    momentum: float = 0.9
    nesterov: bool = True
    extrapolation_rate: float | None = None
    noise: str = "past_gradient"
    shared_noise: bool = False
    noise_seed: int | None = None
    trust_coefficient: float | None = None


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


# The keys `lars` and `lamb` are tf-models' own optimizers and stay so.
_ROWS = (
    Registration("sngm", optimizers.SNGM, SNGMConfig),
    Registration("vr_sgd", optimizers.VRSGD, VRSGDConfig),
    Registration("vr_momentum", optimizers.VRMomentum, VRMomentumConfig),
    Registration("vr_adam", optimizers.VRAdam, VRAdamConfig),
    Registration("vr_lars", optimizers.VRLARS, VRLARSConfig),
    Registration("vr_lamb", optimizers.VRLAMB, VRLAMBConfig),
    Registration("clars", optimizers.CLARS, CLARSConfig),
    Registration("extrap_sgd", optimizers.ExtrapSGD, ExtrapSGDConfig),
    Registration("lbopt_lars", optimizers.LARS, LARSConfig),
    Registration("lbopt_lamb", optimizers.LAMB, LAMBConfig),
)

REGISTRATIONS: Mapping[str, Registration] = {row.key: row for row in _ROWS}
"""All registrations by key."""


def needs_sub_batches(key: str) -> bool:
    """Whether an optimizer is one of this package that needs sub-batches: at least 2, better 8."""
    return key in REGISTRATIONS and VARIANCE in REGISTRATIONS[key].cls.statistics
