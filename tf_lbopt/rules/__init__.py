"""The algorithms: formulas, and each optimizer as a short composition of them."""

from tf_lbopt.rules.lamb import LAMB
from tf_lbopt.rules.lars import LARS
from tf_lbopt.rules.rule import Layer, Rule, Step
from tf_lbopt.rules.sngm import SNGM

__all__ = ["LAMB", "LARS", "SNGM", "Layer", "Rule", "Step"]
