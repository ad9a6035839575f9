"""Training an experiment of tf-models-official from the command line.

What its own driver leaves open is done here: mistakes end in one line, CPU replicas, sub-batches,
and signals, on which a run saves its state at the end of the current loop and stops. Of several
workers (`multi_worker`) all do so together. What a checkpoint must have is in `checkpoints`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags

from official_recipes.common.files import json_text, plain
from official_recipes.common.flag_parsing import (
    FlagValueError,
    config_path,
    define_integer,
    fail,
    parse_unless_help,
)
from official_recipes.common.interruption import Interrupted, Interruption, interruption
from official_recipes.common.multi_worker import (
    MULTI_WORKER,
    Cluster,
    ClusterError,
    WorkerLostError,
    Workers,
    cluster_from_environment,
    losing_workers,
    runner_class,
)
from official_recipes.common.output_folder import (
    INSTALL,
    check_folder,
    check_output_dir,
    make_folder,
)
from official_recipes.common.record_files import naming_faults
from official_recipes.common.remote import is_remote, reach
from official_recipes.common.trainer_fields import check_trainer

if TYPE_CHECKING:
    import tensorflow as tf

    from official_recipes.common.tfm_export import Uses

USES = ("export", "predict")
"""Modes of models that are trained, with what `tfm_export` does with them."""
MODES = ("train", "eval", "train_and_eval", "continuous_eval", "train_and_post_eval", *USES)
SYNTHETIC = "synthetic"
"""As `input_path`: made-up data, where the experiment's task has some."""

SUMMARY_FILE = "summary.json"
"""What a run that trains leaves in its model_dir when it ends: see `write_summary`."""
EVALUATION_FILE = "evaluation.json"
"""The same of a run that only evaluates."""

_OUTPUTS = {"export": ("export_dir", "new folder"), "predict": ("predictions", "file")}
_LAST_WORDS = "interrupted again: what came after the last checkpoint is lost"
_DIVERGED = "The loss value is"  # NaN, or beyond trainer.loss_upper_bound
_PATTERN = "*?[]\\"  # TensorFlow takes a folder's name for a pattern where it looks for checkpoints
_LOOK_S = 1.0  # for new checkpoints


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        experiment: Name of a registered experiment.
        config_file: YAML files with overrides, in their order.
        params_override: More overrides, or ``None``.
        mode: One of `MODES`.
        model_dir: Where checkpoints and summaries are.
        tpu: Name or address, or ``None``.
        cpu_replicas: Logical CPU devices, or ``None`` for what `runtime` says.
        sub_batches: Parts of a replica's batch, or ``None`` for what `task` says.
        seed: Of all that is random, or ``None`` for another one in each run.
        dry_run: Whether to make two steps only, and to write nothing.
        new_optimizer: Whether to go on from a checkpoint of another optimizer.
        output: The folder or the file that `USES` write, else ``None``.
    """

    experiment: str
    config_file: tuple[str, ...]
    params_override: str | None
    mode: str
    model_dir: str
    tpu: str | None
    cpu_replicas: int | None
    sub_batches: int | None
    seed: int | None = None
    dry_run: bool = False
    new_optimizer: bool = False
    output: str | None = None

    @property
    def trains(self) -> bool:
        """Whether the mode includes training."""
        return self.mode.startswith("train")

    @property
    def evaluates(self) -> bool:
        """Whether the mode reads the validation data."""
        return "eval" in self.mode or self.mode == "predict"


class DivergedError(RuntimeError):
    """The loss became NaN."""


class WrongKerasError(ImportError):
    """A recipe needs another Keras than the one that this process has imported."""


def run_program(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> NoReturn:
    """Runs a recipe's main function as a whole program and ends the process with its exit code.

    A pipe or a file gets each line as it is printed. Nothing is torn down at the end: the
    destructor of a distributed dataset's iterator waits for threads of tf.data, one of which can
    sleep for up to a minute (seen with TensorFlow 2.20).

    Args:
        main: Takes the command line and returns the exit code.
        argv: The command line, program name first.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    exit_code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def train_from_command_line(
    argv: Sequence[str],
    *,
    program: str,
    summary: str,
    register: Callable[[], None],
    default_experiment: str,
    configs: Path,
    check: Callable[[Any, Options], None] | None = None,
    uses: Callable[[], Uses] | None = None,
) -> int:
    """The main function of a recipe, whose tasks' models come with all their variables.

    Args:
        argv: The command line, program name first.
        program: How the recipe is called, for help.
        summary: What it does, for help.
        register: Registers the recipe's experiments; called when the flags are known to be good.
        default_experiment: Of ``--experiment``.
        configs: The folder of the recipe's own config files.
        check: More checks of the parameters; raises `FlagValueError`.
        uses: What the modes `USES` do, imported when it is called.

    Returns:
        The exit code: 0, also after SIGTERM; 1 for a run that diverged or lost a worker; 2 for
        flags, parameters or data that cannot be used; 130 after Ctrl-C.
    """
    try:
        started = time.monotonic()
        cluster = cluster_from_environment()
        options = parse_options(argv, program, summary, default_experiment, configs, cluster)
        if options is None:
            return 0
        with _quiet_unless(cluster.chief):
            _run(options, cluster, register, check, uses, started)
    except (FlagValueError, ClusterError, WrongKerasError) as error:
        return fail(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("tf_lbopt", "official_recipes"):
            raise
        return fail(f"the module {error.name} is missing: {INSTALL}")
    except (DivergedError, WorkerLostError) as error:
        return fail(error, 1)
    except Interrupted as error:
        return 0 if error.signal_number == signal.SIGTERM else error.exit_code
    return 0


# -- flags -----------------------------------------------------------------------------------------


def parse_options(
    argv: Sequence[str],
    program: str,
    summary: str,
    default_experiment: str,
    configs: Path,
    cluster: Cluster,
) -> Options | None:
    """Parses and checks the command line; prints help and returns ``None`` when asked for it.

    Raises:
        FlagValueError: A flag cannot be used.
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        "experiment", default_experiment, "A registered experiment.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "config_file",
        [],
        "YAML file of overrides, or the name of one of the recipe's own; given several times, "
        "later ones win.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "params_override",
        None,
        "More overrides, as a.b=1,a.c=2 or YAML; they win over --config_file.",
        flag_values=values,
    )
    flags.DEFINE_string("mode", "train_and_eval", f"Any of {', '.join(MODES)}.", flag_values=values)
    flags.DEFINE_string(
        "model_dir",
        None,
        "Folder of checkpoints and summaries, made if missing. A run goes on from the last "
        "checkpoint in it.",
        flag_values=values,
    )
    flags.DEFINE_string("tpu", None, "Name or address of a TPU.", flag_values=values)
    define_integer(
        values,
        "cpu_replicas",
        None,
        "Train on so many logical CPU devices instead of what the parameters' runtime says.",
        maximum=64,
    )
    define_integer(
        values,
        "sub_batches",
        None,
        "Each replica takes its batch in so many parts within a step; short for task.sub_batches.",
    )
    define_integer(
        values,
        "seed",
        None,
        "Of initial weights, order of the data and dropout [default: another one in each run].",
        minimum=0,
        maximum=2**32 - 1,
    )
    flags.DEFINE_boolean(
        "dry_run",
        False,
        "Build everything, make two steps, say what they take, and write nothing.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "new_optimizer",
        False,
        "Go on from a checkpoint of another optimizer: weights and step are its, and the "
        "momentum where it means the same.",
        flag_values=values,
    )
    for mode, (flag, kind) in _OUTPUTS.items():
        flags.DEFINE_string(
            flag, None, f"Of --mode={mode}: the {kind} to write.", flag_values=values
        )
    if not parse_unless_help(values, argv, program, summary, configs):
        return None
    if values.mode not in MODES:
        raise FlagValueError("mode", f"one of {', '.join(MODES)}", repr(values.mode))
    if not values.model_dir:
        raise FlagValueError("model_dir", "a folder", repr(values.model_dir))
    options = Options(
        experiment=values.experiment,
        config_file=tuple(
            file if is_remote(file) else str(config_path(file, configs))
            for file in values.config_file
        ),
        params_override=values.params_override,
        mode=values.mode,
        model_dir=values.model_dir,
        tpu=values.tpu,
        cpu_replicas=values.cpu_replicas,
        sub_batches=values.sub_batches,
        seed=values.seed,
        dry_run=values.dry_run,
        new_optimizer=values.new_optimizer,
        output=_output(values),
    )
    if options.dry_run and not options.trains:
        raise FlagValueError("dry_run", "a --mode that trains", options.mode)
    if cluster.size > 1:
        _check_cluster(options, cluster)
    _check_model_dir(options, cluster)
    return options


def _output(values: flags.FlagValues) -> str | None:
    """Checks that the outputs which are given are the mode's, and returns its output."""
    for mode, (flag, kind) in _OUTPUTS.items():
        given = getattr(values, flag)
        if mode != values.mode:
            if given:
                raise FlagValueError(flag, f"--mode={mode} with it", values.mode)
            continue
        if not given or (kind == "file" and Path(given).is_dir()):
            raise FlagValueError(flag, f"a {kind} for --mode={mode}", repr(given))
        if kind == "file":
            make_folder(flag, Path(given).parent)
        else:
            check_output_dir(given, flag)
        return str(given)
    return None


def _check_cluster(options: Options, cluster: Cluster) -> None:
    workers = f"TF_CONFIG names {cluster.size} workers"
    if options.cpu_replicas is not None:
        raise FlagValueError(
            "cpu_replicas", f"no such flag where {workers}: each is one", options.cpu_replicas
        )
    if options.mode in ("continuous_eval", *USES):
        raise FlagValueError(
            "mode", f"another where {workers} ({options.mode} runs in one process)", options.mode
        )


def _check_model_dir(options: Options, cluster: Cluster) -> None:
    folder = options.model_dir
    found = [character for character in _PATTERN if character in folder]
    if found:
        raise FlagValueError(
            "model_dir", f"a path without the characters {' '.join(_PATTERN)}", repr(folder)
        )
    if is_remote(folder) or not cluster.chief:
        return  # `_reach_model_dir` asks for it, which takes TensorFlow.
    if options.trains:
        check_folder("model_dir", Path(folder))
    elif not Path(folder).is_dir():
        raise _no_checkpoint(options)


def _no_checkpoint(options: Options) -> FlagValueError:
    return FlagValueError(
        "model_dir",
        f"a folder with a checkpoint for --mode={options.mode}",
        repr(options.model_dir),
    )


def _reach_model_dir(options: Options) -> None:
    """Checks that a remote folder answers."""
    import tensorflow as tf

    folder = options.model_dir
    if not is_remote(folder):
        return
    expected = "a folder that TensorFlow can reach"
    if not reach("model_dir", expected, folder, tf.io.gfile.exists) and not options.trains:
        raise _no_checkpoint(options)


# -- parameters ------------------------------------------------------------------------------------


def parse_params(options: Options) -> Any:
    """The experiment's parameters with all overrides.

    Raises:
        FlagValueError: An experiment, a file or a field does not exist or has no such value.
    """
    import tensorflow as tf
    import yaml
    from official.core import train_utils

    wrong = (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
        tf.errors.OpError,
        OSError,
    )
    try:
        train_utils.exp_factory.get_exp_config(options.experiment)
    except LookupError as error:
        raise FlagValueError(
            "experiment", "a registered experiment", repr(options.experiment)
        ) from error
    given = train_utils.ParseConfigOptions(options.experiment, [], options.tpu or "")
    parser = train_utils.ExperimentParser(given)
    params = parser.parse_runtime(parser.base_experiment())
    for file in filter(is_remote, options.config_file):
        reach("config_file", "a file that exists", file, tf.io.gfile.stat)
    for flag, overrides in (
        ("config_file", options.config_file),
        ("params_override", [options.params_override or ""]),
    ):
        for override in overrides:
            given.config_file, given.params_override = [override], override
            try:
                params = (
                    parser.parse_config_file(params)
                    if flag == "config_file"
                    else parser.parse_params_override(params)
                )
            except wrong as error:
                raise FlagValueError(
                    flag, f"fields of the experiment {options.experiment}", f"{override!r}: {error}"
                ) from error
    if options.sub_batches is not None:
        try:
            params.override({"task": {"sub_batches": options.sub_batches}})
        except KeyError as error:
            raise FlagValueError(
                "sub_batches", "an experiment whose task has sub-batches", options.experiment
            ) from error
    _check_values(params)
    try:
        params.validate()
    except (KeyError, ValueError) as error:
        raise FlagValueError("params_override", "consistent parameters", error) from error
    return params


def _check_values(config: Any, path: str = "") -> None:
    """Checks numbers, truth values and names of alternatives, which tf-models takes as they come.

    Raises:
        FlagValueError: One is something else.
    """
    from official.modeling.hyperparams import base_config, oneof

    fields = {field.name for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(type(config))
    hints = {name: hint for name, hint in hints.items() if name in fields}
    for name, hint in hints.items():
        value = getattr(config, name, None)
        if isinstance(value, base_config.Config):
            _check_values(value, f"{path}{name}.")
            continue
        expected = None if value is None else _expected(hint, value)
        if isinstance(config, oneof.OneOfConfig) and name == "type" and value is not None:
            choices = sorted(hints.keys() - {"type"})
            expected = None if value in choices else f"one of {', '.join(choices)}"
        if expected is not None:
            raise FlagValueError("params_override", f"{path}{name}: {expected}", repr(value))


def _expected(hint: Any, value: Any) -> str | None:
    """What a field of this type takes if this is not it; ``None`` for types that are not simple."""
    several = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = {*(typing.get_args(hint) if several else (hint,))} - {type(None)}
    if kinds == {bool}:
        return None if isinstance(value, bool) else "true or false"
    if not kinds <= {int, float}:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if float in kinds:
        return None if number else "a number"
    return None if number and float(value).is_integer() else "an integer"


def check_data(params: Any, options: Options) -> None:
    """Checks that the files of all splits that the mode needs are there, and what it begins from.

    Raises:
        FlagValueError: A path or pattern matches nothing, or a TFDS dataset is not prepared.
    """
    for needed, name in (
        (options.trains, "train_data"),
        (options.evaluates, "validation_data"),
    ):
        data = getattr(params.task, name, None)
        if not needed or data is None:
            continue
        if getattr(data, "tfds_name", None):
            _check_tfds(data, f"task.{name}")
        elif getattr(data, "input_path", None) != SYNTHETIC:
            _check_paths(data.input_path, f"task.{name}.input_path")
    if options.trains and getattr(params.task, "init_checkpoint", None):
        from official_recipes.common.checkpoints import find_checkpoint

        find_checkpoint(params.task.init_checkpoint)


def _check_paths(paths: Any, field: str) -> None:
    import tensorflow as tf

    expected = "files that exist (prepare_data.py makes them)"
    listed = [paths] if isinstance(paths, str) else list(paths or [])
    patterns = [p.strip() for path in listed for p in str(path).split(",") if p.strip()]
    if not patterns:
        raise FlagValueError("params_override", f"{field}: {expected}", repr(paths))
    for pattern in patterns:
        said = f"{field}: {expected}"
        if not reach("params_override", said, pattern, tf.io.gfile.glob):
            raise FlagValueError("params_override", said, f"{pattern!r}, which matches no file")


def _check_tfds(data: Any, field: str) -> None:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(data.tfds_name, data_dir=data.tfds_data_dir or None)
        prepared = (
            builder.data_path.exists() and data.tfds_split.split("[")[0] in builder.info.splits
        )
    except Exception as error:
        raise FlagValueError(
            "params_override", f"{field}.tfds_name: a dataset of TFDS", f"{data.tfds_name}: {error}"
        ) from error
    if not prepared:
        raise FlagValueError(
            "params_override",
            f"{field}: a dataset and split prepared by `tfds build {data.tfds_name}`",
            f"tfds_name={data.tfds_name}, tfds_split={data.tfds_split}, "
            f"tfds_data_dir={data.tfds_data_dir!r}",
        )


def check_batches(params: Any, options: Options, replicas: int) -> None:
    """Checks that batches split evenly, and as the optimizer needs it; and that it can reduce.

    Raises:
        FlagValueError: They do not.
    """
    from tf_lbopt.tfm import REGISTRATIONS, needs_sub_batches

    parts = getattr(params.task, "sub_batches", 1)
    if options.trains:
        batch = params.task.train_data.global_batch_size
        if batch < 1 or batch % (replicas * parts):
            raise FlagValueError(
                "params_override",
                "task.train_data.global_batch_size: a multiple of replicas x sub-batches = "
                f"{replicas} x {parts} = {replicas * parts}",
                batch,
            )
        config = params.trainer.optimizer_config
        configs = [config, getattr(config, "embeddings", config)]  # which may have their own
        ours = [c.optimizer.type for c in configs if c.optimizer.type in REGISTRATIONS]
        # What tf-models compiles then has the update in it, which has to leave the replica.
        compiled = params.runtime.enable_xla and params.runtime.num_gpus > 0
        if ours and compiled and params.runtime.distribution_strategy != "one_device":
            raise FlagValueError(
                "params_override", f"runtime.enable_xla: false with the optimizer {ours[0]}", "true"
            )
        kinds = [c.optimizer.type for c in configs if needs_sub_batches(c.optimizer.type)]
        if kinds and replicas * parts < 2:
            raise FlagValueError(
                "sub_batches",
                f"at least 2 sub-batches (replicas x --sub_batches) for the optimizer {kinds[0]}, "
                "which compares their gradients",
                f"{replicas} x {parts}",
            )
    if options.evaluates:
        batch = params.task.validation_data.global_batch_size
        if batch < 1 or batch % replicas:
            raise FlagValueError(
                "params_override",
                f"task.validation_data.global_batch_size: a multiple of the {replicas} replicas",
                batch,
            )


# -- running ---------------------------------------------------------------------------------------


def _run(
    options: Options,
    cluster: Cluster,
    register: Callable[[], None],
    check: Callable[[Any, Options], None] | None,
    uses: Callable[[], Uses] | None,
    started: float,
) -> None:
    # TensorFlow takes seconds to import, so it waits until the flags are known to be good.
    from official_recipes.common.replicas import quiet_tensorflow

    quiet_tensorflow()
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    import official.core.train_lib  # noqa: F401  # may be missing

    if options.seed is not None:
        import tf_keras

        tf_keras.utils.set_random_seed(options.seed)
    register()
    _reach_model_dir(options)
    params = parse_params(options)
    check_trainer(params.trainer, options.trains, options.evaluates)
    if check is not None:
        check(params, options)
    check_data(params, options)
    if options.output is not None:
        assert uses is not None
        from official_recipes.common.tfm_export import use

        check_batches(params, options, 1)
        use(params, options.mode, options.model_dir, options.output, uses())
        return
    if cluster.size == 1:
        strategy = _strategy(params, options)
        check_batches(params, options, strategy.num_replicas_in_sync)
        with contextlib.ExitStack() as stack:
            own_dir = stack.enter_context(_folder()) if options.dry_run else ""
            _train(params, options, strategy, Workers(strategy, cluster, own_dir), started)
        return
    _check_runtime(params, cluster)
    with contextlib.ExitStack() as stack:
        stack.enter_context(losing_workers(options.model_dir))
        print(f"waiting for all {cluster.size} workers", flush=True)
        strategy = _strategy(params, options)
        writes = cluster.chief and not options.dry_run
        own_dir = "" if writes else stack.enter_context(_folder())
        workers = Workers(strategy, cluster, own_dir)
        try:
            workers.check_same_params(params)
            check_batches(params, options, strategy.num_replicas_in_sync)
            _train(params, options, strategy, workers, started)
        except (Interrupted, DivergedError):  # all workers at once
            workers.leave()
            raise
        except FlagValueError:
            workers.leave(together=False)
            raise
        workers.leave()


@contextlib.contextmanager
def _quiet_unless(chief: bool) -> Iterator[None]:
    """Leaves stdout to the chief, whose lines are enough."""
    if chief:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tf_lbopt_worker_")


def _check_runtime(params: Any, cluster: Cluster) -> None:
    kind = params.runtime.distribution_strategy
    if kind != MULTI_WORKER:
        raise FlagValueError(
            "params_override",
            f"runtime.distribution_strategy={MULTI_WORKER}, since TF_CONFIG names {cluster.size} "
            "workers",
            repr(kind),
        )
    # tf-models' own answer to SIGTERM would keep the signal from ours.
    params.override({"trainer": {"preemption_on_demand_checkpoint": False}})


def _strategy(params: Any, options: Options) -> tf.distribute.Strategy:
    import tensorflow as tf
    from official.common import distribute_utils

    from official_recipes.common.replicas import cpu_strategy

    if options.cpu_replicas is not None:
        try:
            return cpu_strategy(options.cpu_replicas)
        except RuntimeError as error:
            raise FlagValueError(
                "cpu_replicas", "as many as in what this process has run", error
            ) from error
    gpus = len(tf.config.list_physical_devices("GPU"))
    if params.runtime.num_gpus > gpus:  # which tf.distribute takes for so many replicas on the CPU
        raise FlagValueError(
            "params_override",
            f"runtime.num_gpus of at most {gpus}, as many as TensorFlow sees (or --cpu_replicas)",
            params.runtime.num_gpus,
        )
    try:
        return distribute_utils.get_distribution_strategy(
            distribution_strategy=params.runtime.distribution_strategy,
            all_reduce_alg=params.runtime.all_reduce_alg,
            num_gpus=params.runtime.num_gpus,
            tpu_address=params.runtime.tpu,
        )
    except (ValueError, AttributeError) as error:
        raise FlagValueError(
            "params_override",
            "a runtime that this machine has (or --cpu_replicas)",
            f"runtime.distribution_strategy={params.runtime.distribution_strategy!r}, "
            f"runtime.num_gpus={params.runtime.num_gpus}: {error}",
        ) from error


def _train(
    params: Any,
    options: Options,
    strategy: tf.distribute.Strategy,
    workers: Workers,
    started: float,
) -> None:
    import tensorflow as tf
    from official.core import task_factory, train_utils
    from official.modeling import performance

    if params.runtime.mixed_precision_dtype:
        performance.set_mixed_precision_policy(params.runtime.mixed_precision_dtype)
    with strategy.scope():
        try:
            task = task_factory.get_task(params.task, logging_dir=options.model_dir)
            if options.trains:
                train_utils.create_optimizer(task, params)
        except (ValueError, TypeError) as error:
            raise FlagValueError(
                "params_override", "parameters that the task and the optimizer take", error
            ) from error
    params.lock()
    with interruption((signal.SIGINT, signal.SIGTERM), _LAST_WORDS) as interrupted:
        runner = runner_class()(
            workers,
            optimizer_kind=_optimizer_kind(params) if options.trains else None,
            new_optimizer=options.new_optimizer,
            model_dir=options.model_dir,
            distribution_strategy=strategy,
            task=task,
            mode=options.mode,
            params=params,
        )
        controller, manager = runner.controller, runner.checkpoint_manager
        if options.mode == "eval" and manager.restored is None:
            raise _no_checkpoint(options)
        if options.trains:
            _build_optimizer(runner.trainer, strategy)
        with strategy.scope():
            manager.resumption.check()
        if options.dry_run:
            from official_recipes.common.dry_run import report

            report(params, options, strategy, runner.trainer, manager.restored)
            return
        if options.trains and workers.cluster.chief:
            if is_remote(options.model_dir):
                expected = "a folder that can be made"
                reach("model_dir", expected, options.model_dir, tf.io.gfile.makedirs)
            else:
                make_folder("model_dir", Path(options.model_dir))
            train_utils.serialize_config(params, options.model_dir)
        record = _Record(runner.trainer)
        stop = _StopOnSignal(interrupted, controller, workers, saves=options.trains)
        skips = _SkippedUpdates(runner.trainer)
        controller.train_actions = (*controller.train_actions, record.trained, skips, stop)
        controller.eval_actions = (*controller.eval_actions, record.evaluated, stop)
        needed = (("train_data", options.trains), ("validation_data", options.evaluates))
        try:
            with (
                naming_faults(task, tuple(name for name, reads in needed if reads)),
                strategy.scope(),
            ):
                if options.mode == "continuous_eval":
                    _evaluate_continuously(options.model_dir, runner, interrupted)
                else:
                    _run_mode(options.mode, controller, params.trainer)
        except RuntimeError as error:
            if _DIVERGED not in str(error):
                raise
            raise DivergedError(
                f"training diverged: in the loop that ended at step "
                f"{controller.global_step.numpy()} the mean loss is NaN or larger than "
                f"trainer.loss_upper_bound={params.trainer.loss_upper_bound:g}; lower the learning "
                "rate or lengthen the warm-up (checkpoints of before are in "
                f"{options.model_dir})"
            ) from error
        if record.ran and workers.cluster.chief:
            trained_by = manager.resumption.recorded or _optimizer_type(params)
            write_summary(
                options.model_dir,
                SUMMARY_FILE if options.trains else EVALUATION_FILE,
                {
                    "experiment": options.experiment,
                    "mode": options.mode,
                    "optimizer": _optimizer_type(params) if options.trains else trained_by,
                    "steps": int(controller.global_step.numpy()),
                    "seconds": round(time.monotonic() - started, 3),
                    "step_ms": record.step_ms,
                    "metrics": record.metrics,
                    "train_metrics": record.train_metrics,
                    "replicas": strategy.num_replicas_in_sync,
                    "sub_batches": getattr(params.task, "sub_batches", 1),
                    "global_batch_size": getattr(
                        getattr(params.task, "train_data", None), "global_batch_size", None
                    ),
                },
            )


def _optimizer_kind(params: Any) -> str:
    """The name of the optimizer, as `checkpoints` compares it."""
    config = params.trainer.optimizer_config
    kind = str(_optimizer_type(params))
    own = getattr(config, "embeddings", None)
    if own is not None and own.optimizer.type is not None:
        kind += f" (embeddings: {own.optimizer.type})"
    return kind if getattr(config, "ema", None) is None else f"{kind} (with averages)"


def _optimizer_type(params: Any) -> str | None:
    optimizer = getattr(params.trainer.optimizer_config, "optimizer", None)
    return getattr(optimizer, "type", None)


class _Record:
    """What `write_summary` needs to know of a run: its loops' times and its last metrics."""

    def __init__(self, trainer: Any):
        self.metrics: dict[str, Any] = {}
        self.train_metrics: dict[str, Any] = {}
        self.ran = False
        self._ms: list[float] = []
        if hasattr(trainer, "train"):
            trainer.train = self._timed(trainer.train)

    def _timed(self, train: Callable[[Any], Any]) -> Callable[[Any], Any]:
        from orbit import utils

        def timed(num_steps: Any) -> Any:
            start = time.perf_counter()
            output = train(num_steps)
            for value in (output or {}).values():  # Waits for what is still running on a device.
                utils.get_value(value)
            self._ms.append(1000 * (time.perf_counter() - start) / int(num_steps))
            return output

        return timed

    def trained(self, output: Any) -> None:
        """A loop of training has ended."""
        self.ran, self.train_metrics = True, plain(output)

    def evaluated(self, output: Any) -> None:
        """An evaluation has ended."""
        self.ran, self.metrics = True, plain(output)

    @property
    def step_ms(self) -> float | None:
        """Median over the loops but the first, in which the step is traced; none without others."""
        return round(statistics.median(self._ms[1:]), 3) if len(self._ms) > 1 else None


class _SkippedUpdates:
    """Says, after a loop, how many of its updates were skipped: they are no steps of the schedule.

    tf-models counts steps by itself, an optimizer of this package those that it made.
    """

    def __init__(self, trainer: Any):
        optimizer = getattr(trainer, "optimizer", None)
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        self._counter = getattr(inner, "skipped_updates", None)
        self._seen = self._count()

    def _count(self) -> int:
        return 0 if self._counter is None else int(self._counter.numpy())

    def __call__(self, output: Any) -> None:
        del output
        count = self._count()
        if count > self._seen:
            print(
                f"skipped updates: {count - self._seen} in this loop, {count} in all (gradients "
                "that were not finite)"
            )
        self._seen = count


def write_summary(model_dir: str, name: str, summary: dict[str, Any]) -> None:
    """Writes what a run came to, whole or not at all.

    A run that trained or evaluated and was neither interrupted nor diverged leaves it, with the
    fields ``experiment``, ``mode``, ``optimizer``, ``steps`` (the last), ``seconds`` (wall time
    from the program's start), ``step_ms`` (median over this run's loops but the first, or null),
    ``metrics`` (of the last evaluation), ``train_metrics`` (of the last loop of training),
    ``replicas``, ``sub_batches`` and ``global_batch_size``. Values that are not finite are null.

    Args:
        model_dir: The folder, also one that only TensorFlow can reach.
        name: `SUMMARY_FILE` or `EVALUATION_FILE`.
        summary: The fields.
    """
    import tensorflow as tf

    path = os.path.join(model_dir, name)
    partial = f"{path}.partial"
    with tf.io.gfile.GFile(partial, "w") as file:
        file.write(json_text(summary))
    tf.io.gfile.rename(partial, path, overwrite=True)


def _build_optimizer(trainer: Any, strategy: tf.distribute.Strategy) -> None:
    # What a checkpoint has for variables that do not exist yet is given to them when they are made.
    # A run without updates would else write a checkpoint without them.
    from tf_lbopt.tf_keras.base import LargeBatchOptimizer

    optimizer = getattr(trainer.optimizer, "inner_optimizer", trainer.optimizer)
    if isinstance(optimizer, LargeBatchOptimizer):
        with strategy.scope():
            optimizer.build(trainer.model.trainable_variables)


def _run_mode(mode: str, controller: Any, trainer: Any) -> None:
    # Not by the runner's own method, which ends with counting operations in yet another graph.
    if mode in ("train", "train_and_post_eval"):
        controller.train(steps=trainer.train_steps)
    if mode == "train_and_eval":
        controller.train_and_evaluate(
            train_steps=trainer.train_steps,
            eval_steps=trainer.validation_steps,
            eval_interval=trainer.validation_interval,
        )
    if mode in ("eval", "train_and_post_eval"):
        controller.evaluate(steps=trainer.validation_steps)


def _evaluate_continuously(model_dir: str, runner: Any, interrupted: Interruption) -> None:
    """Evaluates every checkpoint that it finds, until training has ended, a timeout or a signal.

    tf-models' own waits without looking for signals, and goes on waiting after the timeout.
    """
    import tensorflow as tf

    trainer, resumption = runner.params.trainer, runner.checkpoint_manager.resumption
    timeout = trainer.continuous_eval_timeout
    seen, since = None, time.monotonic()
    while True:
        path = tf.train.latest_checkpoint(model_dir)
        if path is not None and path != seen:
            try:
                resumption.restore(path)
                resumption.check()
            except FlagValueError:
                if tf.io.gfile.exists(f"{path}.index"):
                    raise
                continue  # Training has removed it: max_to_keep.
            runner.controller.evaluate(steps=trainer.validation_steps)
            seen, since = path, time.monotonic()
        step = int(runner.controller.global_step.numpy())
        if seen is not None and (step >= trainer.train_steps or _ended(model_dir, step)):
            print(f"training has ended at step {step}")
            return
        interrupted.check()
        if timeout is not None and time.monotonic() - since >= timeout:
            print(f"no new checkpoint for trainer.continuous_eval_timeout={timeout} s")
            return
        time.sleep(_LOOK_S)


def _ended(model_dir: str, step: int) -> bool:
    """Whether the run that trained up to this step has come to its end, and no other has begun."""
    import tensorflow as tf

    summary, begun = (os.path.join(model_dir, name) for name in (SUMMARY_FILE, "params.yaml"))
    try:
        if tf.io.gfile.stat(summary).mtime_nsec < tf.io.gfile.stat(begun).mtime_nsec:
            return False
        with tf.io.gfile.GFile(summary) as file:
            return json.loads(file.read()).get("steps") == step
    except (tf.errors.OpError, ValueError):
        return False


class _StopOnSignal:
    """Saves the state after a loop (or an evaluation) and ends the run, if a signal has come.

    To any worker: all agree on it. tf-models' own action for this works only where the strategy has
    a cluster resolver, and leaves the process running.
    """

    def __init__(self, interrupted: Interruption, controller: Any, workers: Workers, saves: bool):
        self._interrupted = interrupted
        self._controller = controller
        self._workers = workers
        self._saves = saves

    def __call__(self, output: Any) -> None:
        del output
        number = self._workers.agreed_signal(self._interrupted.signal_number)
        if number is None:
            return
        if self._saves:
            self._controller.save_checkpoint()
            print(
                f"stopped at step {self._controller.global_step.numpy()}; the same command goes "
                "on from here"
            )
        raise Interrupted(number)
