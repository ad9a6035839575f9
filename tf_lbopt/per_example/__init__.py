"""Norms of the gradients of single examples, exact and without the gradients themselves."""

from tf_lbopt.per_example import layers
from tf_lbopt.per_example.contributions import Contribution, OuterProducts
from tf_lbopt.per_example.function import per_example_gradient_norms
from tf_lbopt.per_example.losses import example_losses
from tf_lbopt.per_example.model import PerExampleNormsModel
from tf_lbopt.per_example.registry import LayerCall, register_layer
from tf_lbopt.per_example.tape import PerExampleTape

__all__ = [
    "Contribution",
    "LayerCall",
    "OuterProducts",
    "PerExampleNormsModel",
    "PerExampleTape",
    "example_losses",
    "layers",
    "per_example_gradient_norms",
    "register_layer",
]
