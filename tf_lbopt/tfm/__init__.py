"""The optimizers of this package in tf-models-official, and gradient accumulation for its tasks.

Importing this module registers them with tf-models' `OptimizerFactory` under their names in
`tf_lbopt.list_optimizers`, ``sngm`` and so on; those whose names are tf-models' own as
``lbopt_sgd``, ``lbopt_adam``, ``lbopt_adamw``, ``lbopt_lars`` and ``lbopt_lamb``. Every registered
experiment takes them:

    --params_override=trainer.optimizer_config.optimizer.type=vr_lars,
                      trainer.optimizer_config.optimizer.vr_lars.gamma=0.1

The tasks of experiments get a field too, `task.sub_batches=n`: each replica takes its batch in n
parts within one step. See `SubBatchTask`.

Example:
    >>> from official.core import exp_factory
    >>> from official.modeling import optimization
    >>> import official.vision
    >>> experiment = exp_factory.get_exp_config("resnet_imagenet")
    >>> experiment.override({"task": {"sub_batches": 4}})
    >>> config = experiment.trainer.optimizer_config
    >>> config.override({"optimizer": {"type": "vr_lars", "vr_lars": {"gamma": 0.1}}})
    >>> type(optimization.OptimizerFactory(config).build_optimizer(0.1)).__name__
    'VRLARS'
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("official") is None:
    raise ImportError(
        "tf_lbopt.tfm needs tf-models-official: pip install 'tf-lbopt[recipes]'. Received: none"
    )

from tf_lbopt.tfm.configs import (
    CONFIGS,
    REGISTRATIONS,
    Registration,
    needs_sub_batches,
)
from tf_lbopt.tfm.experiments import (
    OptimizationConfig,
    extend_experiments,
    extended,
    register_optimizers,
    with_optimizers,
)
from tf_lbopt.tfm.sub_batches import SubBatchTask

__all__ = [
    "REGISTRATIONS",
    "OptimizationConfig",
    "Registration",
    "SubBatchTask",
    "extended",
    "needs_sub_batches",
    "with_optimizers",
]
__all__.extend(CONFIGS)

globals().update(CONFIGS)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


register_optimizers()
extend_experiments()
