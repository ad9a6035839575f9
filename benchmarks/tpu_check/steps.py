"""Training steps of small models of the recipes: forward, backward and update."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from benchmarks.tpu_check._compat import lowered, only_first_copies, tpu_strategy_of
from official_recipes.common import tfm_training

_EXAMPLES = 8
_LENGTH, _PREDICTIONS = 32, 5

_CONFIGS = {
    # ResNet-18.
    "resnet50": """
task:
  model:
    num_classes: 10
    input_size: [32, 32, 3]
    backbone: {type: resnet, resnet: {model_id: 18}}
  train_data: {input_path: synthetic, global_batch_size: 32}
runtime: {mixed_precision_dtype: float32}
""",
    "bert": f"""
task:
  model:
    encoder:
      bert: {{num_layers: 2, hidden_size: 128, num_attention_heads: 2, intermediate_size: 512}}
  train_data:
    global_batch_size: 32
    seq_length: {_LENGTH}
    max_predictions_per_seq: {_PREDICTIONS}
""",
}


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One training step of a recipe, with a batch of 8 on each replica.

    Attributes:
        optimizer: The recipe's name of it.
        recipe: "resnet50" (ResNet-18, 32 x 32 pixels) or "bert" (two layers of 128).
        chips: How many replicas there are, one on each.
    """

    optimizer: str
    recipe: str
    chips: int = 4

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.optimizer} training_step {self.recipe} {self.chips} chips"

    def lower(self) -> tuple[bytes, int]:
        """See `lowered`."""
        from official.core import task_factory, train_utils

        program = importlib.import_module(f"official_recipes.{self.recipe}.train")
        program._register()
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "small.yaml"
            config.write_text(_CONFIGS[self.recipe])
            params = tfm_training.parse_params(
                tfm_training.Options(
                    experiment=program.EXPERIMENT,
                    config_file=(str(config),),
                    params_override=f"trainer.optimizer_config.optimizer.type={self.optimizer}",
                    mode="train",
                    model_dir="unused",
                    tpu=None,
                    cpu_replicas=None,
                    sub_batches=1,
                )
            )
        task = task_factory.get_task(params.task)
        strategy = tpu_strategy_of(self.chips)
        with only_first_copies(), strategy.scope():
            model = task.build_model()
            optimizer = train_utils.create_optimizer(task, params)
            optimizer.build(model.trainable_variables)
            metrics = task.build_metrics(training=True)
        names, batch = _batch(self.recipe)

        def on_replica(*tensors: tf.Tensor) -> None:
            inputs: Any = tensors if names is None else dict(zip(names, tensors, strict=True))
            task.train_step(inputs, model, optimizer, metrics=metrics)

        return lowered(strategy, on_replica, batch)


def _batch(recipe: str) -> tuple[list[str] | None, list[tf.Tensor]]:
    """A batch's tensors, and their names where a model takes a dictionary."""
    if recipe == "resnet50":
        return None, [tf.zeros([_EXAMPLES, 32, 32, 3]), tf.zeros([_EXAMPLES], tf.int32)]
    batch = {
        **{
            name: tf.zeros([_EXAMPLES, _LENGTH], tf.int32)
            for name in ("input_word_ids", "input_mask", "input_type_ids")
        },
        **{
            name: tf.zeros([_EXAMPLES, _PREDICTIONS], tf.int32)
            for name in ("masked_lm_positions", "masked_lm_ids")
        },
        "masked_lm_weights": tf.zeros([_EXAMPLES, _PREDICTIONS]),
        "next_sentence_labels": tf.zeros([_EXAMPLES, 1], tf.int32),
    }
    return list(batch), list(batch.values())


def training_steps() -> Iterator[TrainingStep]:
    """All that are compiled."""
    for recipe in _CONFIGS:
        for optimizer in ("lbopt_lars", "lbopt_lamb", "vr_lars", "vr_lamb"):
            yield TrainingStep(optimizer, recipe)
