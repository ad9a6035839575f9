"""What becomes of a model trained on tf-models: a SavedModel, and predictions in a file."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow as tf

from official_recipes.common import checkpoints
from official_recipes.common.files import atomic_write
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.interruption import interruption
from official_recipes.common.output_folder import NOTHING_WRITTEN, check_output_dir, replacing
from official_recipes.common.record_files import naming_faults


@dataclass(frozen=True)
class Exported:
    """What a SavedModel has.

    Attributes:
        signatures: Concrete functions, ``serving_default`` among them.
        resources: What they use besides the model: tables, tokenizers.
        files: Of the same folder, by name.
        note: What is missing, and why, or nothing.
    """

    signatures: Mapping[str, Any]
    resources: Sequence[Any] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Uses:
    """What a recipe's trained models are used for.

    Attributes:
        export: Takes parameters and model.
        predict: Takes parameters, task and model, and gives the parts of a text: of the file.
    """

    export: Callable[[Any, Any], Exported]
    predict: Callable[[Any, Any, Any], Iterator[str]]


class _Saved(tf.Module):
    """Variables and resources; Keras would save a model layer by layer, which takes long."""

    def __init__(self, model: Any, resources: Sequence[Any]) -> None:
        super().__init__()
        self.all_variables = list(model.variables)
        self.resources = list(resources)


def use(params: Any, mode: str, model_dir: str, output: str, uses: Uses) -> None:
    """Exports the model of the last checkpoint, or writes what it predicts.

    Args:
        params: Of the experiment.
        mode: ``export`` or ``predict``.
        model_dir: Where the checkpoint is.
        output: A new folder, or a file.
        uses: The recipe's.

    Raises:
        FlagValueError: There is no checkpoint of this model, or the output cannot be written.
        Interrupted: A signal has come, and nothing was written.
    """
    from official.core import task_factory
    from official.modeling import performance

    path = tf.train.latest_checkpoint(model_dir)
    if path is None:
        raise FlagValueError(
            "model_dir", f"a folder with a checkpoint for --mode={mode}", repr(model_dir)
        )
    if params.runtime.mixed_precision_dtype:
        performance.set_mixed_precision_policy(params.runtime.mixed_precision_dtype)
    with (
        interruption((signal.SIGINT, signal.SIGTERM), NOTHING_WRITTEN) as interrupted,
        tempfile.TemporaryDirectory(prefix="tf_lbopt_") as own_dir,  # SQuAD's features go there.
    ):
        try:
            task = task_factory.get_task(params.task, logging_dir=own_dir)
            model = task.build_model()
        except (ValueError, TypeError) as error:
            raise FlagValueError(
                "params_override", "parameters that the task takes", error
            ) from error
        checkpoints.restore_model(model, path)
        if mode == "export":
            _export(uses.export(params, model), model, output)
        else:
            with (
                naming_faults(task, ("validation_data",)),
                atomic_write(Path(output)) as temporary,
                temporary.open("w", encoding="utf-8") as file,
            ):
                for part in uses.predict(params, task, model):
                    file.write(part)
                    interrupted.check()
        interrupted.check()
    if getattr(params.trainer.optimizer_config, "ema", None) is not None:
        print("the weights are the trained ones, not their averages")
    print(f"wrote {output}, of {path}")


def _export(exported: Exported, model: Any, export_dir: str) -> None:
    with replacing(check_output_dir(export_dir, "export_dir"), "export_dir") as partial:
        tf.saved_model.save(
            _Saved(model, exported.resources), str(partial), signatures=dict(exported.signatures)
        )
        for name, content in exported.files.items():
            (partial / name).write_bytes(content)
    if exported.note:
        print(exported.note)


def batches(task: Any, data: Any) -> tf.data.Dataset:
    """The validation data of a task, each example once, in the files' order where it can be.

    Args:
        task: A task of tf-models.
        data: Its `validation_data`.
    """
    data = data.replace(**{name: 1 for name in ("cycle_length",) if hasattr(data, name)})
    return task.build_inputs(data)
