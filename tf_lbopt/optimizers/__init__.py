"""The Keras 3 classes."""

from tf_lbopt.optimizers.lamb import LAMB
from tf_lbopt.optimizers.lars import LARS
from tf_lbopt.optimizers.loss_scale import LossScaleOptimizer
from tf_lbopt.optimizers.sngm import SNGM

__all__ = ["LAMB", "LARS", "SNGM", "LossScaleOptimizer"]
