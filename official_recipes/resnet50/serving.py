"""What trained models of this recipe are used for: a SavedModel, predictions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from official.vision.serving.image_classification import ClassificationModule

from official_recipes.common.tfm_export import Exported, Uses, batches
from official_recipes.resnet50.prepare_data import CLASSES


def export(params: Any, model: Any) -> Exported:
    """The contents of image files to probabilities, by tf-models' own module."""
    module = ClassificationModule(
        params=params,
        batch_size=None,
        input_image_size=list(params.task.model.input_size[:2]),
        input_type="image_bytes",
        input_name="images",
        model=model,
    )
    signatures = module.get_inference_signatures({"image_bytes": "serving_default"})
    paths = params.task.validation_data.input_path
    first = paths if isinstance(paths, str) else "".join(paths[:1])
    classes = Path(first.split(",")[0].strip()).parent / CLASSES
    known = bool(first) and "://" not in first and classes.is_file()
    return Exported(signatures, files={CLASSES: classes.read_bytes()} if known else {})


def predict(params: Any, task: Any, model: Any) -> Iterator[str]:
    """A line of each validation image: label, likeliest class and the probability of each class."""
    classes = range(params.task.model.num_classes)
    yield "\t".join(["label", "prediction", *(f"p{i}" for i in classes)]) + "\n"

    @tf.function(reduce_retracing=True)
    def probabilities(images: tf.Tensor) -> tf.Tensor:
        return tf.nn.softmax(tf.cast(task.inference_step(images, model), tf.float32))

    for images, labels in batches(task, params.task.validation_data):
        for label, row in zip(labels.numpy(), probabilities(images).numpy(), strict=True):
            fields = [str(int(label)), str(row.argmax()), *(f"{p:.6g}" for p in row)]
            yield "\t".join(fields) + "\n"


USES = Uses(export, predict)
