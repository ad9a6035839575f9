"""Defaults that depend on the data: batches, epochs and one learning rate per optimizer."""

from __future__ import annotations

from dataclasses import dataclass

# The schedule is the same for every run: linear warm-up, then polynomial decay to zero. The power
# is the choice of the SNGM paper.
WARMUP_FRACTION = 0.1
DECAY_POWER = 1.1

DEFAULT_OPTIMIZERS = (
    "momentum",
    "vr_momentum",
    "lars",
    "vr_lars",
    "lamb",
    "vr_lamb",
    "sngm",
)

SMALL_BATCH_OPTIMIZER = "momentum"

# VRGD's ratio of fewer sub-batches sits at its lower end for most elements.
SUB_BATCHES = 8


def micro_steps(replicas: int) -> int:
    """Returns in how many parts a replica takes its batch, so that k is at least `SUB_BATCHES`."""
    return -(-SUB_BATCHES // replicas)


def validation_size(train_size: int) -> int:
    """Returns how many training images --tune sets apart, a fifth.

    Learning rates are tuned on these, so that the test images play no part in the choice.
    """
    return round(train_size * 0.2)


@dataclass(frozen=True)
class DataDefaults:
    """Sizes of a run on one kind of data."""

    small_batch_size: int
    batch_size: int
    epochs: int


DATA_DEFAULTS = {
    "digits": DataDefaults(small_batch_size=32, batch_size=512, epochs=40),
    "mnist": DataDefaults(small_batch_size=128, batch_size=4096, epochs=5),
    "cifar10": DataDefaults(small_batch_size=128, batch_size=4096, epochs=10),
    "cifar100": DataDefaults(small_batch_size=128, batch_size=4096, epochs=10),
}

# Peak learning rates. Chosen with `python -m official_recipes.quickstart --tune` on the digits, on
# a validation part of the training split (the test split plays no part in the choice), the same way
# for every optimizer: five rates a factor of about three apart, more while the best one lies at an
# end, two seeds, and the best mean validation accuracy at the end of training, ties to the lower
# loss. (Those of the vr_ optimizers with 4 sub-batches, from before they took 8.) They are the
# starting point on other data, where --tune finds better ones.
SMALL_BATCH_LEARNING_RATE = 0.03
LEARNING_RATES = {
    "momentum": 0.3,
    "adam": 0.003,
    "clars": 1.0,
    "lars": 30.0,
    "lamb": 0.03,
    "extrap_sgd": 0.3,
    "extrap_adam": 0.03,
    "sngm": 0.3,
    "vr_sgd": 1.0,
    "vr_momentum": 0.3,
    "vr_adam": 0.003,
    "vr_lars": 30.0,
    "vr_lamb": 0.01,
}

# Where no rate is listed above and the optimizer's constructor has no default either.
FALLBACK_LEARNING_RATE = 0.1
