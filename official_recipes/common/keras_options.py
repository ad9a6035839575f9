"""Flags that all Keras 3 recipes share, and what they say, checked; needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from official_recipes.common.flag_parsing import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    FlagValueError,
    config_path,
    define_integer,
    define_positive_float,
    parse_flags,
    parse_unless_help,
)
from official_recipes.common.output_folder import check_folder, check_output_dir, make_folder

SCHEDULES = ("constant", "polynomial", "cosine", "step", "inverse_sqrt")
SCALINGS = ("linear", "sqrt")
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16")
DEVICES = ("auto", "cpu")

CHECKPOINTS = "checkpoints"
"""Folder in `model_dir`."""

_WITHOUT_TRAINING = ("eval_only", "export_dir", "predictions")

Scalar = float | int | bool | str


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate over time; epochs may be fractions.

    Attributes:
        kind: One of `SCHEDULES`.
        learning_rate: The peak, at `base_batch_size` if there is one.
        base_batch_size: The batch that the peak is for, or ``None`` for the run's own.
        scaling: One of `SCALINGS`, by which the peak is carried to the run's batch.
        power: Of the polynomial.
        boundaries: For `step`: the epochs at which the rate is multiplied by `factor`.
        factor: For `step`.
        warmup_epochs: In which the rate rises linearly from `warmup_start` to the peak.
        warmup_start: The rate of the first update of a warm-up.
    """

    kind: str
    learning_rate: float
    base_batch_size: int | None = None
    scaling: str = "sqrt"
    power: float = 1.1
    boundaries: tuple[float, ...] = ()
    factor: float = 0.1
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0


@dataclass(frozen=True)
class PostLocalOptions:
    """Post-local SGD around the optimizer.

    Attributes:
        start_epoch: When replicas begin to take steps of their own.
        period: Updates between two averages of the weights.
        average_momentum: Whether momentum is averaged too.
    """

    start_epoch: float
    period: int
    average_momentum: bool


@dataclass(frozen=True)
class TrainingOptions:
    """How to train, apart from the task.

    Attributes:
        optimizer: Its name, of the registry or one of Keras's.
        optimizer_arguments: Constructor arguments that were given.
        schedule: The learning rate over time.
        batch_size: Examples per update, over all replicas and micro-steps.
        epochs: Passes over the training split; the last incomplete batch of each is left out.
        replicas: Of the strategy.
        gradient_accumulation_steps: Micro-steps per update.
        post_local: Post-local SGD, or ``None``.
        freeze_layers: A regex over names of layers that do not train at first, or ``None``.
        freeze_epochs: In how many epochs they do not.
        dtype: A dtype policy, one of `DTYPES`.
        device: One of `DEVICES`.
        seed: Of initial weights, shuffling and augmentation.
        evaluate_every: Epochs from one evaluation to the next; 0 for only after the last.
        model_dir: Where checkpoints, logs and the result are, or ``None`` to keep nothing.
        resume: Whether to go on from the last checkpoint in `model_dir`.
        new_optimizer: Whether optimizer, schedule and number of epochs may then be others.
        checkpoint_every: Epochs from one checkpoint to the next.
        result_file: A file of JSON rows to append the result to, or ``None``.
    """

    optimizer: str
    optimizer_arguments: Mapping[str, Scalar]
    schedule: ScheduleOptions
    batch_size: int
    epochs: int
    replicas: int = 1
    gradient_accumulation_steps: int = 1
    post_local: PostLocalOptions | None = None
    freeze_layers: str | None = None
    freeze_epochs: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 1
    evaluate_every: int = 1
    model_dir: Path | None = None
    resume: bool = False
    new_optimizer: bool = False
    checkpoint_every: int = 1
    result_file: Path | None = None


# Constructor arguments that are flags, with their parsers; the constructors have the last word.
_NUMBERS: dict[str, tuple[flags.ArgumentParser, str]] = {
    "momentum": (BELOW_ONE, "Momentum coefficient."),
    "weight_decay": (NOT_NEGATIVE, "Weight decay, as the optimizer defines it."),
    "gamma": (POSITIVE, "Lower end of the clipped GSNR of vr_ optimizers."),
    "beta_1": (BELOW_ONE, "Decay of the first moment."),
    "beta_2": (BELOW_ONE, "Decay of the second moment."),
    "beta_3": (BELOW_ONE, "Decay of the running GSNR of vr_adam, vr_lamb, vr_lans."),
    "epsilon": (NOT_NEGATIVE, "Added to the denominator of Adam and LAMB."),
    "trust_coefficient": (POSITIVE, "Coefficient of the trust ratio of LARS and CLARS."),
    "default_trust_ratio": (POSITIVE, "Trust ratio of a variable that has none."),
    "max_trust_ratio": (POSITIVE, "Upper end of CLARS's ratio."),
    "extrapolation_rate": (NOT_NEGATIVE, "Rate of the extrapolation [default: local rate]."),
    "global_clipnorm": (POSITIVE, "Clip the mean gradient to this global norm."),
}
_BOOLEANS = {
    "nesterov": "Nesterov momentum.",
    "shared_noise": "The same random noise on all replicas (SmoothOut).",
}
_STRINGS = {
    "trust_ratio_denominator": "Of lars and vr_lars: norm_of_sum or sum_of_norms.",
    "noise": "Of extrap_sgd: past_gradient, stochastic_noise, gaussian or uniform.",
    "norm_estimator": "Of clars: sub_batch or per_example.",
}
_INTEGERS = {
    "noise_seed": (0, "Seed of random noise."),
    "sub_batches": (1, "Parts in which a replica takes its batch, for extrap_ optimizers."),
}
_PATTERNS = {
    "exclude_from_weight_decay": "Regexes over variable paths, as /bias$: what does not decay.",
    "exclude_from_layer_adaptation": "The same: what has no trust ratio [default: as for decay].",
}
OPTIMIZER_FLAGS = (*_NUMBERS, *_BOOLEANS, *_STRINGS, *_INTEGERS, *_PATTERNS)


def define_training_flags(
    *, batch_size: int, epochs: int, replicas: int = 2, schedule: str = "polynomial"
) -> flags.FlagValues:
    """Returns the flags of a Keras 3 recipe, apart from those that imported libraries define.

    Args:
        batch_size: The default.
        epochs: The default.
        replicas: The default.
        schedule: The default, one of `SCHEDULES`.
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config_file",
        None,
        "YAML file of flags (name: value), or the name of one of the recipe's; flags on the "
        "command line win.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "optimizer",
        "momentum",
        "Any of tf_lbopt.list_optimizers(), or of Keras: sgd, momentum, nesterov (SGD with coupled "
        "weight decay), adam (AdamW), lion, muon.",
        flag_values=values,
    )
    define_positive_float(values, "learning_rate", None, "Peak learning rate. Required.")
    define_integer(
        values,
        "base_batch_size",
        None,
        "The batch that --learning_rate is for; it is then scaled to --batch_size.",
    )
    flags.DEFINE_enum(
        "scaling",
        "sqrt",
        SCALINGS,
        "With --base_batch_size: by the ratio of the batches or by its square root.",
        flag_values=values,
    )
    for name, (parser, text) in _NUMBERS.items():
        flags.DEFINE(parser, name, None, text, flag_values=values)
    for name, text in _BOOLEANS.items():
        flags.DEFINE_boolean(name, None, text, flag_values=values)
    for name, text in _STRINGS.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, (minimum, text) in _INTEGERS.items():
        define_integer(values, name, None, text, minimum=minimum)
    for name, text in _PATTERNS.items():
        flags.DEFINE_list(name, None, text, flag_values=values)
    flags.DEFINE_enum(
        "schedule", schedule, SCHEDULES, "Learning rate after the warm-up.", flag_values=values
    )
    define_positive_float(values, "power", 1.1, "Of --schedule=polynomial.")
    flags.DEFINE_list(
        "boundaries", "", "Of --schedule=step: epochs at which the rate drops.", flag_values=values
    )
    define_positive_float(values, "factor", 0.1, "Of --schedule=step: by which the rate drops.")
    flags.DEFINE(
        NOT_NEGATIVE,
        "warmup_epochs",
        0.0,
        "Epochs (or a part of one) in which the rate rises linearly to its peak.",
        flag_values=values,
    )
    flags.DEFINE(
        NOT_NEGATIVE, "warmup_start", 0.0, "Rate at the start of a warm-up.", flag_values=values
    )
    define_integer(
        values, "batch_size", batch_size, "Examples per update, all replicas and micro-steps."
    )
    define_integer(values, "epochs", epochs, "Passes over the training split.")
    define_integer(values, "replicas", replicas, "Devices, one replica each.", maximum=64)
    define_integer(
        values,
        "gradient_accumulation_steps",
        1,
        "Micro-steps per update, each on as large a part of the batch.",
    )
    flags.DEFINE(
        NOT_NEGATIVE,
        "post_local_start_epoch",
        None,
        "Post-local SGD around the optimizer: from this epoch on, replicas take their own steps.",
        flag_values=values,
    )
    define_integer(values, "post_local_period", 8, "Local steps between two averages.")
    flags.DEFINE_boolean(
        "average_momentum", False, "Post-local SGD averages momentum too.", flag_values=values
    )
    flags.DEFINE_string(
        "freeze_layers",
        None,
        "Layers that do not train in the first --freeze_epochs: a regex over their names.",
        flag_values=values,
    )
    define_integer(values, "freeze_epochs", None, "How many epochs --freeze_layers do not train.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Dtype policy.", flag_values=values)
    flags.DEFINE_enum(
        "device",
        "auto",
        DEVICES,
        "auto: GPUs if there are as many as replicas, else logical CPU devices.",
        flag_values=values,
    )
    define_integer(
        values,
        "seed",
        1,
        "Seed of initial weights, shuffling and augmentation; equal seeds give equal results.",
        minimum=0,
        maximum=2**31 - 1,
    )
    define_integer(
        values,
        "evaluate_every",
        1,
        "Epochs from one evaluation to the next; 0 for only after the last.",
        minimum=0,
    )
    flags.DEFINE_string(
        "model_dir",
        None,
        "Folder for checkpoints, TensorBoard logs and result.json, made if missing.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "resume", False, "Go on from the last checkpoint in --model_dir.", flag_values=values
    )
    flags.DEFINE_boolean(
        "new_optimizer",
        False,
        "With --resume: go on with another optimizer, other rates or other --epochs.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "dry_run",
        False,
        "Make two updates, say what they take, and end; nothing is written.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "eval_only",
        False,
        "Train nothing: evaluate the last checkpoint of --model_dir, into evaluation.json there. "
        "The flags of data and model are those of the run.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "export_dir",
        None,
        "Train nothing: write the model of the last checkpoint of --model_dir into this new "
        "folder, as model.keras and as a SavedModel. The flags of data and model are those of the "
        "run.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "predictions",
        None,
        "Train nothing: write what the last checkpoint of --model_dir predicts to this file. The "
        "flags of data and model are those of the run.",
        flag_values=values,
    )
    define_integer(values, "checkpoint_every", 1, "Epochs from one checkpoint to the next.")
    flags.DEFINE_string(
        "result_file", None, "Append the result, one JSON row, to this file.", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Folder with the data.", flag_values=values)
    return values


def parse_training_flags(
    values: flags.FlagValues,
    argv: Sequence[str],
    *,
    program: str,
    summary: str,
    configs: Path,
) -> bool:
    """Parses the command line and a config file into ``values``.

    Args:
        values: The recipe's flags.
        argv: The command line, program name first.
        program: How the recipe is called, for help.
        summary: What it does, for help.
        configs: The folder of the recipe's own config files.

    Returns:
        Whether to go on; help was asked for and printed otherwise.

    Raises:
        FlagValueError: A flag cannot be used.
    """
    if not parse_unless_help(values, argv, program, summary, configs):
        return False
    if values.config_file is not None:
        _read_config(values, config_path(values.config_file, configs))
    return True


def _read_config(values: flags.FlagValues, path: Path) -> None:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise FlagValueError("config_file", "a YAML file", f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise FlagValueError("config_file", "a YAML mapping of flags", str(path))
    arguments = [str(path)]
    for name, value in content.items():
        if name not in values or name in ("config_file", "help"):
            raise FlagValueError("config_file", f"flags of the recipe in {path}", repr(name))
        if values[name].present:
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        arguments.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    parse_flags(values, arguments)


def training_options(values: flags.FlagValues) -> TrainingOptions:
    """Returns what the parsed flags say of the training.

    Raises:
        FlagValueError: They contradict each other, or a folder cannot be made.
    """
    if without_training(values):
        if values.dry_run:
            raise FlagValueError(
                "dry_run", f"not to be given with --{without_training(values)[0]}", True
            )
        _check_use(values)
        values.learning_rate = values.learning_rate or 1.0  # which nothing reads
    if values.learning_rate is None:
        raise FlagValueError("learning_rate", "a positive number", "none (it has no default)")
    if values.resume and not values.model_dir:
        raise FlagValueError("resume", "to be given together with --model_dir", "no --model_dir")
    if values.new_optimizer and not values.resume:
        raise FlagValueError("new_optimizer", "to be given together with --resume", "no --resume")
    if bool(values.freeze_layers) != bool(values.freeze_epochs):
        raise FlagValueError(
            "freeze_layers",
            "to be given together with --freeze_epochs",
            f"{values.freeze_layers!r} and {values.freeze_epochs}",
        )
    options = TrainingOptions(
        optimizer=values.optimizer,
        optimizer_arguments={
            name: getattr(values, name)
            for name in OPTIMIZER_FLAGS
            if getattr(values, name) is not None
        },
        schedule=_schedule(values),
        batch_size=values.batch_size,
        epochs=values.epochs,
        replicas=values.replicas,
        gradient_accumulation_steps=values.gradient_accumulation_steps,
        post_local=_post_local(values),
        freeze_layers=values.freeze_layers,
        freeze_epochs=values.freeze_epochs,
        dtype=values.dtype,
        device=values.device,
        seed=values.seed,
        evaluate_every=values.evaluate_every,
        model_dir=None if values.model_dir is None else Path(values.model_dir),
        resume=values.resume,
        new_optimizer=values.new_optimizer,
        checkpoint_every=values.checkpoint_every,
        result_file=None if values.result_file is None else Path(values.result_file),
    )
    parts = options.replicas * options.gradient_accumulation_steps
    if options.batch_size % parts:
        raise FlagValueError(
            "batch_size",
            f"a multiple of replicas x micro-steps = {options.replicas} x "
            f"{options.gradient_accumulation_steps} = {parts}",
            options.batch_size,
        )
    if options.result_file is not None and options.result_file.is_dir():
        raise FlagValueError("result_file", "a file", f"the folder {options.result_file}")
    for flag, folder in (
        ("model_dir", options.model_dir),
        ("result_file", options.result_file and options.result_file.parent),
    ):
        if folder is not None:
            (check_folder if values.dry_run else make_folder)(flag, folder)
    return options


def without_training(values: flags.FlagValues) -> list[str]:
    """The flags that were given of those by which a run trains nothing."""
    return [name for name in _WITHOUT_TRAINING if getattr(values, name)]


def _check_use(values: flags.FlagValues) -> None:
    use, *more = without_training(values)
    if more:
        raise FlagValueError(use, f"to be given without --{more[0]}", "both")
    if not values.model_dir or not has_checkpoint(Path(values.model_dir)):
        raise FlagValueError(use, "a --model_dir with a checkpoint", repr(values.model_dir))
    if use == "export_dir":
        check_output_dir(values.export_dir, "export_dir")
    if use == "predictions":
        if Path(values.predictions).is_dir():
            raise FlagValueError(use, "a file", f"the folder {values.predictions}")
        make_folder(use, Path(values.predictions).parent)


def has_checkpoint(model_dir: Path) -> bool:
    """Whether a run has left a checkpoint there."""
    return any((model_dir / CHECKPOINTS).glob("*.index"))


def check_batch(options: TrainingOptions, train_size: int) -> None:
    """Checks that the training split has at least one batch.

    Raises:
        FlagValueError: It has not.
    """
    if options.batch_size > train_size:
        raise FlagValueError(
            "batch_size", f"at most the {train_size} training examples", options.batch_size
        )


def _schedule(values: flags.FlagValues) -> ScheduleOptions:
    try:
        boundaries = tuple(float(entry) for entry in values.boundaries if entry.strip())
    except ValueError:
        boundaries = (0.0,)
    if any(low >= high for low, high in zip((0.0, *boundaries), boundaries, strict=False)):
        raise FlagValueError(
            "boundaries", "rising positive epochs", repr(",".join(values.boundaries))
        )
    if values.schedule == "step" and not boundaries:
        raise FlagValueError("boundaries", "epochs for --schedule=step", "none")
    if values.schedule == "inverse_sqrt" and not values.warmup_epochs:
        raise FlagValueError(
            "warmup_epochs", "a warm-up for --schedule=inverse_sqrt", values.warmup_epochs
        )
    if values.warmup_epochs >= values.epochs:
        raise FlagValueError(
            "warmup_epochs", f"less than the {values.epochs} epochs", values.warmup_epochs
        )
    return ScheduleOptions(
        kind=values.schedule,
        learning_rate=values.learning_rate,
        base_batch_size=values.base_batch_size,
        scaling=values.scaling,
        power=values.power,
        boundaries=boundaries if values.schedule == "step" else (),
        factor=values.factor,
        warmup_epochs=values.warmup_epochs,
        warmup_start=values.warmup_start,
    )


def _post_local(values: flags.FlagValues) -> PostLocalOptions | None:
    if values.post_local_start_epoch is None:
        return None
    return PostLocalOptions(
        values.post_local_start_epoch, values.post_local_period, values.average_momentum
    )
