"""What Keras ships, for the tests of what is put around it."""

import keras
import pytest

STOCK = {
    name: getattr(keras.optimizers, name)
    for name in dir(keras.optimizers)
    if isinstance(getattr(keras.optimizers, name), type)
    and issubclass(getattr(keras.optimizers, name), keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
}
ARGUMENTS = {
    "SGD": {"momentum": 0.9},
    "AdamW": {"weight_decay": 0.1},
    "Muon": {"weight_decay": 0.1},
}

needs_muon = pytest.mark.skipif(
    "Muon" not in STOCK, reason=f"Keras {keras.__version__} has no optimizer Muon"
)


def stock(name, **arguments):
    return STOCK[name](**{"learning_rate": 0.05, **ARGUMENTS.get(name, {}), **arguments})
