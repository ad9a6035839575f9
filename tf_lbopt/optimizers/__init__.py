"""The Keras 3 classes."""

from tf_lbopt.optimizers.accumulated import Accumulated, Adasum
from tf_lbopt.optimizers.adascale import AdaScale
from tf_lbopt.optimizers.clars import CLARS
from tf_lbopt.optimizers.extrap import ExtrapAdam, ExtrapSGD
from tf_lbopt.optimizers.layerwise import LAMB, LANS, LARS
from tf_lbopt.optimizers.loss_scale import LossScaleOptimizer
from tf_lbopt.optimizers.post_local_sgd import PostLocalSGD
from tf_lbopt.optimizers.sgd import SGD, Adam, AdamW
from tf_lbopt.optimizers.sngm import SNGM
from tf_lbopt.optimizers.vrgd import (
    VRLAMB,
    VRLANS,
    VRLARS,
    VRSGD,
    VarianceReduced,
    VRAdam,
    VRMomentum,
)

__all__ = [
    "CLARS",
    "LAMB",
    "LANS",
    "LARS",
    "SGD",
    "SNGM",
    "VRLAMB",
    "VRLANS",
    "VRLARS",
    "VRSGD",
    "Accumulated",
    "AdaScale",
    "Adam",
    "AdamW",
    "Adasum",
    "ExtrapAdam",
    "ExtrapSGD",
    "LossScaleOptimizer",
    "PostLocalSGD",
    "VRAdam",
    "VRMomentum",
    "VarianceReduced",
]
