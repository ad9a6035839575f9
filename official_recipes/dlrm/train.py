"""Entry point of ``python -m official_recipes.dlrm.train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from official_recipes.common.flag_parsing import FlagValueError, fail
from official_recipes.common.tfm_training import Options, run_program, train_from_command_line

if TYPE_CHECKING:
    from official_recipes.common.tfm_export import Uses

PROGRAM = "python -m official_recipes.dlrm.train"
SUMMARY = (
    "Trains DLRM on click logs as prepare_data.py writes them, at large batches and with any\n"
    "optimizer of this package. The flags are those of the tf-models command line,\n"
    "and --cpu_replicas, --sub_batches and --seed."
)
EXPERIMENT = "large_batch_dlrm"
_DENSE_ONLY = ("lars",)
"""Optimizers of tf-models that can not take the sparse gradients of embeddings."""


def main(argv: Sequence[str]) -> int:
    """Trains, evaluates, or both.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code.
    """
    # TensorFlow Recommenders needs it; too late once TensorFlow has been asked for its Keras.
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    checked: list[tuple[Any, Options]] = []

    def check(params: Any, options: Options) -> None:
        _check(params, options)
        checked.append((params, options))

    try:
        return train_from_command_line(
            argv,
            program=PROGRAM,
            summary=SUMMARY,
            register=_register,
            default_experiment=EXPERIMENT,
            configs=Path(__file__).parent / "configs",
            check=check,
            uses=_uses,
        )
    except Exception as error:
        bad_row = _bad_row(error, *checked[0]) if checked else None
        if bad_row is None:
            raise
        return fail(bad_row)


def _uses() -> Uses:
    from official_recipes.dlrm.serving import USES

    return USES


def _register() -> None:
    import tf_lbopt.tfm  # noqa: F401
    from official_recipes.dlrm import experiments  # noqa: F401


def _bad_row(error: Exception, params: Any, options: Options) -> FlagValueError | None:
    """The error of a row that stopped the run; `None` if it was none."""
    import tensorflow as tf

    from official_recipes.dlrm.inputs import first_bad_row, matching_files

    if not isinstance(error, tf.errors.InvalidArgumentError):
        return None
    model = params.task.model
    for needed, name in ((options.trains, "train_data"), (options.evaluates, "validation_data")):
        if not needed:
            continue
        files = matching_files(getattr(params.task, name).input_path)
        found = first_bad_row(
            files, model.vocab_sizes, model.num_dense_features, model.multi_hot_sizes
        )
        if found is not None:
            return FlagValueError(
                "params_override",
                f"task.{name}.input_path: rows as prepare_data.py writes them",
                found,
            )
    return None


def _check(params: Any, options: Options) -> None:
    """Completes the columns from what is recorded beside the data, and checks the rest."""
    from official_recipes.dlrm.experiments import INTERACTIONS
    from official_recipes.dlrm.inputs import recorded_columns
    from official_recipes.dlrm.raw_rows import DENSE_FEATURES

    model = params.task.model
    data = params.task.train_data if options.trains else params.task.validation_data
    found = recorded_columns(data.input_path)
    if not model.vocab_sizes:
        if found is None:
            raise FlagValueError(
                "params_override",
                "task.model.vocab_sizes, or a dataset.json of prepare_data.py beside input_path",
                repr(data.input_path),
            )
        model.vocab_sizes = found[1]
    if model.num_dense_features is None:
        model.num_dense_features = DENSE_FEATURES if found is None else found[0]
    if found is not None and (model.num_dense_features, len(model.vocab_sizes)) != (
        found[0],
        len(found[1]),
    ):
        raise FlagValueError(
            "params_override",
            f"task.model: num_dense_features={found[0]} and {len(found[1])} vocab_sizes, as "
            "recorded beside the data",
            f"{model.num_dense_features} and {len(model.vocab_sizes)}",
        )
    if found is not None and not model.multi_hot_sizes:
        model.multi_hot_sizes = found[2]
    columns, sizes, dot = len(model.vocab_sizes), model.multi_hot_sizes, model.interaction == "dot"
    given = model.embedding_dim
    widths = given if isinstance(given, list) else [given] * columns
    for name, wrong, expected in (
        ("interaction", model.interaction not in INTERACTIONS, f"one of {', '.join(INTERACTIONS)}"),
        ("dcn_num_layers", model.dcn_num_layers < 1, "a positive integer"),
        ("dcn_low_rank_dim", model.dcn_low_rank_dim < 1, "a positive integer"),
        (
            "multi_hot_sizes",
            sizes and not _integers(sizes, columns, 1),
            f"{columns} positive integers, one for each column",
        ),
        (
            "embedding_dim",
            not _integers(widths, columns, 2),
            f"an integer of at least 2, or a list of {columns}, one for each column",
        ),
        (
            "embedding_dim",
            dot and widths != widths[:1] * columns,
            "one width for all columns with interaction=dot, not with cross and multi_layer_dcn",
        ),
        (
            "bottom_mlp",
            dot and model.bottom_mlp[-1:] != widths[:1],
            f"widths that end in embedding_dim = {given}",
        ),
        ("top_mlp", model.top_mlp[-1:] != [1], "widths that end in 1"),
        ("vocab_sizes", min(model.vocab_sizes) < 1, "positive sizes"),
    ):
        if wrong:
            received = getattr(model, name)
            raise FlagValueError("params_override", f"task.model.{name}: {expected}", received)
    # Its layers of TensorFlow Recommenders multiply numbers of both types then.
    if model.interaction == "multi_layer_dcn" and params.runtime.mixed_precision_dtype not in (
        None,
        "float32",
    ):
        raise FlagValueError(
            "params_override",
            "runtime.mixed_precision_dtype: float32 with interaction=multi_layer_dcn",
            params.runtime.mixed_precision_dtype,
        )
    if params.trainer.train_tf_while_loop:
        # How many rows of a table a replica has looked up differs from step to step, and TensorFlow
        # 2.20 takes a collective in a loop to be of one shape in all its iterations.
        raise FlagValueError(
            "params_override",
            "trainer.train_tf_while_loop: false",
            params.trainer.train_tf_while_loop,
        )
    config = params.trainer.optimizer_config
    if model.skip_gather is None:
        model.skip_gather = not hasattr(config.optimizer.get(), "exclude_from_layer_adaptation")
    for name, kind in (
        ("embeddings.optimizer", config.embeddings.optimizer.type),
        ("optimizer", config.embeddings.optimizer.type or config.optimizer.type),
    ):
        if kind in _DENSE_ONLY:
            raise FlagValueError(
                "params_override",
                f"trainer.optimizer_config.{name}.type: one that takes sparse gradients, such as "
                f"lbopt_{kind}",
                kind,
            )
    for name, optimizer in (
        ("optimizer", config.optimizer),
        ("embeddings.optimizer", config.embeddings.optimizer),
    ):
        # This recipe's step takes its gradients at the weights themselves.
        if (optimizer.type or "").startswith("extrap_"):
            raise FlagValueError(
                "params_override",
                f"trainer.optimizer_config.{name}.type: one that does not extrapolate",
                optimizer.type,
            )


def _integers(values: Sequence[Any], count: int, low: int) -> bool:
    return len(values) == count and all(isinstance(v, int) and v >= low for v in values)


if __name__ == "__main__":
    run_program(main, sys.argv)
