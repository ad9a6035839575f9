"""Flags of the quickstart and the checks that need no training framework."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from official_recipes.common.flag_parsing import (
    FlagValueError,
    PositiveFloatsParser,
    ShareParser,
    define_integer,
    define_positive_float,
    help_text,
    parse_flags,
)
from official_recipes.common.image_data import KNOWN_FORMS, DataFormatError, ImageSource
from official_recipes.common.output_folder import make_folder
from official_recipes.quickstart.data import choose_source, validation_size
from official_recipes.quickstart.settings import (
    DATA_DEFAULTS,
    DEFAULT_OPTIMIZERS,
    WARMUP_FRACTION,
    micro_steps,
)

PROGRAM = "python -m official_recipes.quickstart"
SUMMARY = (
    "Trains a small image classifier with momentum SGD at a small batch, then with each named\n"
    "optimizer at a large batch, on logical CPU replicas, and compares the runs in a table, a\n"
    "plot and a JSON file."
)


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        source: The data, not read yet.
        optimizers: Names of the optimizers to run at the large batch.
        small_batch_size: Global batch of the baseline, or ``None`` without a baseline.
        batch_size: Global batch of all other runs.
        replicas: The number of logical CPU devices.
        epochs: Passes over the training split.
        learning_rate: Peak rate of all large-batch runs, or ``None`` for one per optimizer.
        warmup_fraction: Share of the updates in which the rate rises to its peak.
        trust_coefficient: τ of the optimizers with a trust ratio, or ``None`` for their defaults.
        seed: Seed of the initial weights and of the shuffling.
        output_dir: Where results are written.
        tune: Whether to search for learning rates instead of comparing.
        rates: All rates that the search tries, or ``None`` to look around the default one.
    """

    source: ImageSource
    optimizers: tuple[str, ...]
    small_batch_size: int | None
    batch_size: int
    replicas: int
    epochs: int
    learning_rate: float | None
    warmup_fraction: float
    trust_coefficient: float | None
    seed: int
    output_dir: Path
    tune: bool
    rates: tuple[float, ...] | None


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
        ShareParser(),
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
        PositiveFloatsParser(),
        "rates",
        None,
        "With --tune: try exactly these learning rates for every large-batch optimizer.",
        flag_values=values,
    )
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    return values


def parse_options(argv: Sequence[str]) -> Options | None:
    """Parses and checks the command line; prints help and returns ``None`` when asked for it.

    Args:
        argv: The command line, program name first.

    Raises:
        FlagValueError: A flag cannot be used.
    """
    values = define_flags()
    parse_flags(values, argv)
    if values.help:
        print(help_text(values, PROGRAM, SUMMARY))
        return None

    optimizers = tuple(dict.fromkeys(name.strip().lower() for name in values.optimizers))
    if not all(optimizers) or not optimizers:
        raise FlagValueError(
            "optimizers", "a comma-separated list of names", repr(",".join(values.optimizers))
        )
    source = _source(values.data_dir)
    defaults = DATA_DEFAULTS[source.kind]
    options = Options(
        source=source,
        optimizers=optimizers,
        small_batch_size=(values.small_batch_size or defaults.small_batch_size)
        if values.baseline
        else None,
        batch_size=values.batch_size or defaults.batch_size,
        replicas=values.replicas,
        epochs=values.epochs or defaults.epochs,
        learning_rate=values.learning_rate,
        warmup_fraction=values.warmup_fraction,
        trust_coefficient=values.trust_coefficient,
        seed=values.seed,
        output_dir=Path(values.output_dir),
        tune=values.tune,
        rates=values.rates,
    )
    if options.rates is not None and not options.tune:
        raise FlagValueError("rates", "to be given together with --tune", "no --tune")
    _check_batches(options)
    make_folder("output_dir", options.output_dir)
    return options


def check_optimizer_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Checks the names of ``--optimizers`` against those there are.

    Raises:
        FlagValueError: A name is unknown.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise FlagValueError(
            "optimizers", f"names among {', '.join(known)}", ", ".join(map(repr, unknown))
        )


def check_sub_batches(options: Options, of_sub_batches: Collection[str]) -> None:
    """Checks that the large batch has equal parts where the optimizer compares their gradients.

    Args:
        options: The command line.
        of_sub_batches: Names of all optimizers that compare gradients of sub-batches.

    Raises:
        FlagValueError: It has not.
    """
    names = [name for name in options.optimizers if name in of_sub_batches]
    sub_batches = options.replicas * micro_steps(options.replicas)
    if names and options.batch_size % sub_batches:
        raise FlagValueError(
            "batch_size",
            f"a multiple of {sub_batches} for --optimizers={','.join(names)}, which compare the "
            "gradients of as many sub-batches",
            options.batch_size,
        )


def _source(data_dir: str | None) -> ImageSource:
    try:
        return choose_source(None if data_dir is None else Path(data_dir))
    except DataFormatError as error:
        raise FlagValueError(
            "data_dir", f"a folder with {KNOWN_FORMS}", f"{data_dir!r} ({error})"
        ) from error


def _check_batches(options: Options) -> None:
    batches = {"batch_size": options.batch_size}
    if options.small_batch_size is not None:
        batches["small_batch_size"] = options.small_batch_size
    for flag, batch in batches.items():
        if batch % options.replicas:
            raise FlagValueError(
                flag,
                f"a multiple of --replicas={options.replicas}, so that every replica gets the "
                "same number of examples",
                batch,
            )
    try:
        train_size = options.source.train_size
    except DataFormatError as error:
        raise FlagValueError("data_dir", "readable data", error) from error
    if options.tune:
        train_size -= validation_size(train_size)
    for flag, batch in batches.items():
        if batch > train_size:
            raise FlagValueError(
                flag, f"at most the {train_size} training images of {options.source.name}", batch
            )
