"""Flags of the quickstart and the checks that need no training framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from official_recipes.common.flag_parsing import (
    BELOW_ONE,
    DIFFERENT_POSITIVES,
    FlagValueError,
    define_integer,
    define_positive_float,
    parse_unless_help,
)
from official_recipes.common.image_data import ImageSource, source_in
from official_recipes.common.output_folder import make_folder
from official_recipes.quickstart.settings import (
    DATA_DEFAULTS,
    DEFAULT_OPTIMIZERS,
    WARMUP_FRACTION,
    validation_size,
)

PROGRAM = "python -m official_recipes.quickstart"
SUMMARY = (
    "Trains a small image classifier with momentum SGD at a small batch, then with each named\n"
    "optimizer at a large batch, on logical CPU replicas, and compares the runs in a table, a\n"
    "plot and a JSON file."
)


def define_flags() -> flags.FlagValues:
    """Returns the quickstart's flags, apart from those that imported libraries define."""
    values = flags.FlagValues()
    flags.DEFINE_list(
        "optimizers",
        ",".join(DEFAULT_OPTIMIZERS),
        "Comma-separated names for the large-batch runs: any of tf_lbopt.list_optimizers(), "
        "momentum (Keras SGD with momentum 0.9) or adam (Keras).",
        flag_values=values,
    )
    per_data = ", ".join(f"{d.batch_size} on {kind}" for kind, d in DATA_DEFAULTS.items())
    define_integer(values, "batch_size", None, f"Global large batch [default: {per_data}].")
    per_data = ", ".join(f"{d.small_batch_size} on {kind}" for kind, d in DATA_DEFAULTS.items())
    define_integer(
        values,
        "small_batch_size",
        None,
        f"Global batch of the momentum SGD baseline [default: {per_data}].",
    )
    flags.DEFINE_boolean(
        "baseline", True, "Run the small-batch momentum SGD baseline first.", flag_values=values
    )
    define_integer(values, "replicas", 4, "Logical CPU devices, one replica each.")
    per_data = ", ".join(f"{d.epochs} on {kind}" for kind, d in DATA_DEFAULTS.items())
    define_integer(values, "epochs", None, f"Passes over the data [default: {per_data}].")
    define_positive_float(
        values,
        "learning_rate",
        None,
        "Peak learning rate of all large-batch runs [default: one tuned rate per optimizer].",
    )
    flags.DEFINE(
        BELOW_ONE,
        "warmup_fraction",
        WARMUP_FRACTION,
        "Share of the updates in which the learning rate rises from 0 to its peak; 0 for none.",
        flag_values=values,
    )
    define_positive_float(
        values,
        "trust_coefficient",
        None,
        "Coefficient of the trust ratio of lars, vr_lars and clars [default: their own].",
    )
    define_integer(
        values,
        "seed",
        1,
        "Seed of the initial weights and of the shuffling.",
        minimum=0,
        maximum=2**32 - 1,
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder with MNIST, CIFAR-10 or CIFAR-100 files [default: the digits inside scikit-learn].",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output_dir",
        "runs/quickstart",
        "Folder for quickstart.png and quickstart.json, made if missing.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "tune",
        False,
        "Search for learning rates on a validation part of the training split instead; prints "
        "and writes tuning.json. Takes about ten times as long as the comparison.",
        flag_values=values,
    )
    flags.DEFINE(
        DIFFERENT_POSITIVES,
        "rates",
        None,
        "With --tune: try exactly these learning rates for every large-batch optimizer.",
        flag_values=values,
    )
    return values


def parse_options(argv: Sequence[str]) -> tuple[flags.FlagValues, ImageSource] | None:
    """Parses and checks the command line; prints help and returns ``None`` when asked for it.

    Args:
        argv: The command line, program name first.

    Returns:
        The flags, with the defaults that depend on the data, and the data, not read yet.

    Raises:
        FlagValueError: A flag cannot be used.
        DataFormatError: The data are damaged.
    """
    values = define_flags()
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    names = tuple(dict.fromkeys(name.strip().lower() for name in values.optimizers))
    if not all(names) or not names:
        raise FlagValueError(
            "optimizers", "a comma-separated list of names", repr(",".join(values.optimizers))
        )
    source = source_in(values.data_dir)
    defaults = DATA_DEFAULTS[source.kind]
    values.optimizers = names
    values.small_batch_size = values.small_batch_size or defaults.small_batch_size
    values.batch_size = values.batch_size or defaults.batch_size
    values.epochs = values.epochs or defaults.epochs
    if values.rates is not None and not values.tune:
        raise FlagValueError("rates", "to be given together with --tune", "no --tune")
    _check_batches(values, source)
    make_folder("output_dir", Path(values.output_dir))
    return values, source


def _check_batches(values: flags.FlagValues, source: ImageSource) -> None:
    train_size = source.train_size
    if values.tune:
        train_size -= validation_size(train_size)
    for flag in ("batch_size", "small_batch_size") if values.baseline else ("batch_size",):
        batch = values[flag].value
        if batch % values.replicas:
            raise FlagValueError(
                flag,
                f"a multiple of --replicas={values.replicas}, so that every replica gets the "
                "same number of examples",
                batch,
            )
        if batch > train_size:
            raise FlagValueError(
                flag, f"at most the {train_size} training images of {source.name}", batch
            )
