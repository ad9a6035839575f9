"""Large-batch optimizers for TensorFlow and Keras, exact under `tf.distribute`."""

# First: it says what is missing.
from tf_lbopt import _requirements, callbacks, schedules  # noqa: F401
from tf_lbopt._version import __version__
from tf_lbopt.optimizers import (
    CLARS,
    LAMB,
    LARS,
    SNGM,
    VRLAMB,
    VRLARS,
    VRSGD,
    ExtrapAdam,
    ExtrapSGD,
    LossScaleOptimizer,
    PostLocalSGD,
    VarianceReduced,
    VRAdam,
    VRMomentum,
)
from tf_lbopt.per_example import PerExampleNormsModel, per_example_gradient_norms
from tf_lbopt.registry import OptimizerInfo, list_optimizers

__all__ = [
    "CLARS",
    "LAMB",
    "LARS",
    "SNGM",
    "VRLAMB",
    "VRLARS",
    "VRSGD",
    "ExtrapAdam",
    "ExtrapSGD",
    "LossScaleOptimizer",
    "OptimizerInfo",
    "PerExampleNormsModel",
    "PostLocalSGD",
    "VRAdam",
    "VRMomentum",
    "VarianceReduced",
    "__version__",
    "callbacks",
    "list_optimizers",
    "per_example_gradient_norms",
    "schedules",
]
