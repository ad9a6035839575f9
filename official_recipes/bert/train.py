"""Entry point of ``python -m official_recipes.bert.train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from official_recipes.bert.prepare_data import RECORD
from official_recipes.common.data_format import data_of_flag
from official_recipes.common.files import read_json
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.tfm_training import (
    Options,
    run_program,
    train_from_command_line,
)

if TYPE_CHECKING:
    from official_recipes.common.tfm_export import Uses

PROGRAM = "python -m official_recipes.bert.train"
SUMMARY = (
    "Pretrains BERT (large_batch_bert) or fine-tunes it on SQuAD (large_batch_squad) as\n"
    "tf-models-official does, at large batches and with any optimizer of this package. Phase 2\n"
    "and fine-tuning start from another run's weights by task.init_checkpoint=<its model_dir>."
)
EXPERIMENT = "large_batch_bert"

_DUMMY = "dummy"


def main(argv: Sequence[str]) -> int:
    """Trains, evaluates, or both.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code.
    """
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


def _uses() -> Uses:
    from official_recipes.bert.serving import USES

    return USES


def _register() -> None:
    import warnings

    # Both are about what BERT's pretraining leaves out on purpose: labels, which come with the
    # inputs, and the encoder's own pooler, for which the next sentence classifier has its own.
    warnings.filterwarnings("ignore", message="Input dict contained keys")
    warnings.filterwarnings("ignore", message=r"Gradients do not exist for variables \['pooler_tr")
    import official.nlp.configs.finetuning_experiments
    import official.nlp.configs.pretraining_experiments  # noqa: F401

    import tf_lbopt.tfm  # noqa: F401
    from official_recipes.bert import experiments  # noqa: F401


def check(params: Any, options: Options) -> None:
    """Checks what would else go wrong late or unnoticed.

    Args:
        params: Of the experiment.
        options: The command line.

    Raises:
        FlagValueError: The data was prepared for another model, or the masked LM task is to run
            in float16.
    """
    task = params.task
    masked_lm = hasattr(task, "scale_loss")
    if masked_lm and params.runtime.mixed_precision_dtype == "float16":
        raise FlagValueError(
            "params_override",
            "runtime.mixed_precision_dtype: float32 or bfloat16, since tf-models' masked LM task "
            "does not scale its loss",
            "float16",
        )
    for needed, name in (
        (options.trains, "train_data"),
        (options.evaluates, "validation_data"),
    ):
        data = getattr(task, name, None)
        if not needed or data is None or getattr(data, "input_path", _DUMMY) in (_DUMMY, ""):
            continue
        if not masked_lm and not data.is_training:
            _check_file(data.vocab_file, f"task.{name}.vocab_file")
        _check_record(params, data, f"task.{name}", masked_lm)


def _check_file(path: str, field: str) -> None:
    import tensorflow as tf

    if not path or not tf.io.gfile.exists(path):
        raise FlagValueError("params_override", f"{field}: a file that exists", repr(path))


def _check_record(params: Any, data: Any, field: str, masked_lm: bool) -> None:
    """Compares the parameters with what prepare_data.py says of its output, if it is from there."""
    paths = data.input_path
    first = (paths if isinstance(paths, str) else paths[0]).split(",")[0]
    file = Path(first).parent / RECORD
    if "://" in first or not file.is_file():
        return
    keys = ("max_seq_length", "vocab_size", *(() if masked_lm else ("do_lower_case",)))
    with data_of_flag("params_override", f"{RECORD} as prepare_data.py writes it"):
        record = read_json(file, *keys)
    expected = {"seq_length": record["max_seq_length"]}
    if masked_lm:
        expected["max_predictions_per_seq"] = record.get("max_predictions_per_seq")
    elif not data.is_training:
        expected["do_lower_case"] = record["do_lower_case"]
        expected["version_2_with_negative"] = record.get("version_2_with_negative", False)
    for name, value in expected.items():
        if getattr(data, name) != value:
            raise FlagValueError(
                "params_override", f"{field}.{name}: {value} as in {file}", getattr(data, name)
            )
    encoder = params.task.model.encoder.get()
    if encoder.vocab_size < record["vocab_size"]:
        raise FlagValueError(
            "params_override",
            f"task.model.encoder.{params.task.model.encoder.type}.vocab_size: at least "
            f"{record['vocab_size']} as in {file}",
            encoder.vocab_size,
        )
    if encoder.max_position_embeddings < data.seq_length:
        raise FlagValueError(
            "params_override",
            f"{field}.seq_length: at most max_position_embeddings="
            f"{encoder.max_position_embeddings} of the model",
            data.seq_length,
        )


if __name__ == "__main__":
    run_program(main, sys.argv)
