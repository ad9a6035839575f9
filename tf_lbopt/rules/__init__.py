"""The algorithms: formulas, and each optimizer as a short composition of them."""

from tf_lbopt.rules.adam import Adam
from tf_lbopt.rules.bounds import steps_fit
from tf_lbopt.rules.clars import CLARS
from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.lamb import LAMB
from tf_lbopt.rules.lans import LANS
from tf_lbopt.rules.lars import LARS
from tf_lbopt.rules.rule import (
    MEAN_NORM,
    OWN_GRADIENT,
    VARIANCE,
    Parameters,
    Rule,
    Step,
    Update,
    dense,
)
from tf_lbopt.rules.sgd import SGD
from tf_lbopt.rules.sngm import SNGM
from tf_lbopt.rules.vrgd import VRGD

__all__ = [
    "CLARS",
    "LAMB",
    "LANS",
    "LARS",
    "MEAN_NORM",
    "OWN_GRADIENT",
    "SGD",
    "SNGM",
    "VARIANCE",
    "VRGD",
    "Adam",
    "Parameters",
    "Rule",
    "Step",
    "Update",
    "dense",
    "scale",
    "steps_fit",
]
