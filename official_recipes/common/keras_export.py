"""What becomes of a trained Keras 3 model: files to load elsewhere, and predictions."""

from __future__ import annotations

from pathlib import Path

import keras

from official_recipes.common.files import atomic_write
from official_recipes.common.keras_options import TrainingOptions
from official_recipes.common.keras_training import Task, trained_model
from official_recipes.common.output_folder import check_output_dir, replacing

MODEL_FILE = "model.keras"
SAVED_MODEL = "saved_model"


def export(task: Task, options: TrainingOptions, export_dir: str) -> str:
    """Writes the model of the last checkpoint of `options.model_dir`.

    Args:
        task: What was learned.
        options: Those of the run.
        export_dir: A new folder. It gets ``model.keras``, the SavedModel ``saved_model`` and the
            task's own files.

    Returns:
        What is missing, and why, or nothing.

    Raises:
        FlagValueError: The folder cannot be made, or the checkpoint is of another model.
    """
    folder = check_output_dir(export_dir, "export_dir")
    model = trained_model(task, options)
    serving = task.serving(model)
    with replacing(folder, "export_dir") as partial:
        task.plain_model(model).save(partial / MODEL_FILE)
        for name, content in task.files().items():
            (partial / name).write_bytes(content)
        archive = keras.export.ExportArchive()
        for resource in (model, *serving.resources):
            archive.track(resource)
        for name, (function, signature) in serving.functions.items():
            archive.add_endpoint(name, function, signature)
        archive.write_out(str(partial / SAVED_MODEL), verbose=False)
    return serving.note


def predict(task: Task, options: TrainingOptions, file: str) -> str:
    """Writes what the model of the last checkpoint of `options.model_dir` predicts.

    Args:
        task: What was learned.
        options: Those of the run.
        file: To write, or to replace.

    Returns:
        What a reader must know besides, or nothing.

    Raises:
        FlagValueError: The checkpoint is of another model.
    """
    predicted = task.predictions(trained_model(task, options))
    with atomic_write(Path(file)) as temporary:
        text = "".join(f"{line}\n" for line in predicted.lines)
        temporary.write_text(text, encoding="utf-8")
    return predicted.note
