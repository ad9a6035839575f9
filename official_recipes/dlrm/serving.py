"""What trained models of this recipe are used for: a SavedModel, predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from official_recipes.common.tfm_export import Exported, Uses, batches
from official_recipes.dlrm.experiments import ids_in_columns
from official_recipes.dlrm.inputs import check_ids, parsed_rows
from official_recipes.dlrm.raw_rows import DENSE_FEATURES


def export(params: Any, model: Any) -> Exported:
    """Features, or rows of prepared files, to probabilities of a click."""
    config = params.task.model
    sizes, given = config.vocab_sizes, config.num_dense_features
    several = ids_in_columns(config)
    numbers = DENSE_FEATURES if given is None else given

    def clicks(features: dict[str, Any]) -> dict[str, tf.Tensor]:
        # The ranking model takes a batch of one row for a row without batch.
        more = tf.nest.map_structure(lambda t: tf.concat([t, t[:1]], 0), features)
        logits = tf.cast(model(more, training=False), tf.float32)[:-1]
        return {"logits": logits, "probabilities": tf.sigmoid(logits)}

    @tf.function
    def serve(dense_features: tf.Tensor, sparse_features: tf.Tensor) -> dict[str, tf.Tensor]:
        columns = [
            column[:, 0] if size == 1 else column
            for size, column in zip(several, tf.split(sparse_features, several, 1), strict=True)
        ]
        with tf.control_dependencies([check_ids(columns, sizes)]):
            dense = tf.identity(dense_features)
        sparse = {str(index): column for index, column in enumerate(columns)}
        return clicks({"dense_features": dense, "sparse_features": sparse})

    @tf.function
    def rows(rows: tf.Tensor) -> dict[str, tf.Tensor]:
        features, _ = parsed_rows(rows, sizes, numbers, config.multi_hot_sizes)
        return clicks(features)

    return Exported(
        {
            "serving_default": serve.get_concrete_function(
                tf.TensorSpec([None, numbers], tf.float32, "dense_features"),
                tf.TensorSpec([None, sum(several)], tf.int32, "sparse_features"),
            ),
            "rows": rows.get_concrete_function(tf.TensorSpec([None], tf.string, "rows")),
        }
    )


def predict(params: Any, task: Any, model: Any) -> Iterator[str]:
    """A line of each validation row: label and the probability of a click."""
    yield "label\tprobability\n"

    @tf.function(reduce_retracing=True)
    def probabilities(features: dict[str, Any]) -> tf.Tensor:
        return tf.sigmoid(tf.cast(task.inference_step(features, model), tf.float32))

    for features, labels in batches(task, params.task.validation_data):
        there = features.pop("weights").numpy() > 0
        columns = labels.numpy()[there], probabilities(features).numpy()[there]
        for label, probability in zip(*columns, strict=True):
            yield f"{label:g}\t{probability:.6g}\n"


USES = Uses(export, predict)
