"""The Keras 3 classes."""

from tf_lbopt.optimizers.clars import CLARS
from tf_lbopt.optimizers.extrap_adam import ExtrapAdam
from tf_lbopt.optimizers.extrap_sgd import ExtrapSGD
from tf_lbopt.optimizers.lamb import LAMB
from tf_lbopt.optimizers.lars import LARS
from tf_lbopt.optimizers.loss_scale import LossScaleOptimizer
from tf_lbopt.optimizers.post_local_sgd import PostLocalSGD
from tf_lbopt.optimizers.sngm import SNGM
from tf_lbopt.optimizers.variance_reduced import VarianceReduced
from tf_lbopt.optimizers.vr_adam import VRAdam
from tf_lbopt.optimizers.vr_layerwise import VRLAMB, VRLARS
from tf_lbopt.optimizers.vr_sgd import VRSGD, VRMomentum

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
    "PostLocalSGD",
    "VRAdam",
    "VRMomentum",
    "VarianceReduced",
]
