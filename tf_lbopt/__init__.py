"""Large-batch optimizers for TensorFlow and Keras, exact under `tf.distribute`."""

# First: it says what is missing.
from tf_lbopt import (  # noqa: F401
    _requirements,
    batch_size,
    callbacks,
    distribution,
    optimizers,
    schedules,
)
from tf_lbopt._version import __version__
from tf_lbopt.optimizers import *  # noqa: F403
from tf_lbopt.per_example import PerExampleNormsModel, per_example_gradient_norms
from tf_lbopt.registry import OptimizerInfo, list_optimizers

__all__ = [
    "OptimizerInfo",
    "PerExampleNormsModel",
    "__version__",
    "batch_size",
    "callbacks",
    "distribution",
    "list_optimizers",
    "per_example_gradient_norms",
    "schedules",
]
__all__ += optimizers.__all__
