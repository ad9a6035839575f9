"""The experiments of this recipe: pretraining, and fine-tuning on SQuAD."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf
import tf_keras
from official.core import config_definitions, exp_factory, task_factory
from official.modeling import optimization
from official.nlp.tasks import masked_lm, question_answering

import tf_lbopt.tfm
from official_recipes.common import checkpoints

PRETRAINING = "large_batch_bert"
FINE_TUNING = "large_batch_squad"

_EXCLUDED = ["LayerNorm", "layer_norm", "bias"]


class _Sum(tf_keras.metrics.Metric):
    """The sum of what other metrics are."""

    def __init__(self, terms: list[Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._terms = terms

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the terms are updated."""

    def result(self) -> Any:
        """The sum."""
        return tf.add_n([term.result() for term in self._terms])


@dataclasses.dataclass
class LargeBatchBert(masked_lm.MaskedLMConfig):
    """tf-models' masked LM and next sentence task; `init_checkpoint` restores the whole model."""


@task_factory.register_task_cls(LargeBatchBert)
class LargeBatchBertTask(masked_lm.MaskedLMTask):
    """tf-models' masked LM and next sentence task, for training in phases."""

    def build_model(self, params: Any = None) -> Any:
        """The model with all its variables; tf-models' heads would get theirs when first called.

        Args:
            params: Of the model, if not those of the task.
        """
        model = super().build_model(params)
        model(model.inputs)
        return model

    def build_metrics(self, training: bool | None = None) -> Any:
        """tf-models' metrics, in validation with the loss as their sum.

        Args:
            training: Whether they are of training.
        """
        metrics = super().build_metrics(training)
        if training is False:
            losses = [metric for metric in metrics if metric.name.endswith("_loss")]
            metrics.append(_Sum(losses, name="validation_loss"))
        return metrics

    def validation_step(self, inputs: Any, model: Any, metrics: Any) -> dict[str, Any]:
        """Takes a batch into the metrics, each masked token and each pair with the same weight.

        tf-models' own takes the mean over batches and replicas, so that a short last batch weighs
        as much as the others and a replica without any of it makes the loss NaN.

        Args:
            inputs: Of one replica.
            model: What is evaluated.
            metrics: Of `build_metrics`.
        """
        outputs = self.inference_step(inputs, model)
        of_name = {metric.name: metric for metric in metrics}
        pairs = [("lm_example_loss", "masked_lm_ids", "mlm_logits", inputs["masked_lm_weights"])]
        if "next_sentence_loss" in of_name:
            pairs.append(("next_sentence_loss", "next_sentence_labels", "next_sentence", None))
        for name, labels, logits, weights in pairs:
            loss = tf_keras.losses.sparse_categorical_crossentropy(
                inputs[labels], tf.cast(outputs[logits], tf.float32), from_logits=True
            )
            of_name[name].update_state(loss, sample_weight=weights)
        self.process_metrics(metrics, inputs, outputs)
        return {}

    def initialize(self, model: Any) -> None:
        """Starts from `init_checkpoint`, if it is given.

        tf-models' own would leave the last layer of the next sentence classifier as it is, at
        random, and train from scratch where there is no checkpoint. A checkpoint of an encoder
        alone is taken as there.

        Args:
            model: What is to be trained.
        """
        if self.task_config.init_checkpoint:
            checkpoints.initialize(
                self.task_config.init_checkpoint, {"model": model}, model.checkpoint_items
            )


@dataclasses.dataclass
class LargeBatchSquad(question_answering.QuestionAnsweringConfig):
    """tf-models' question answering."""


@task_factory.register_task_cls(LargeBatchSquad)
class LargeBatchSquadTask(question_answering.QuestionAnsweringTask):
    """tf-models' question answering, which asks for the checkpoint that it is told of."""

    def initialize(self, model: Any) -> None:
        """Takes the encoder of `init_checkpoint`, if it is given.

        Args:
            model: What is to be trained.
        """
        if self.task_config.init_checkpoint:
            checkpoints.initialize(self.task_config.init_checkpoint, model.checkpoint_items)


def _optimization(rate: float, steps: int, warmup: int, power: float, kind: str) -> Any:
    config = tf_lbopt.tfm.with_optimizers(
        optimization.OptimizationConfig(
            {
                "learning_rate": {
                    "type": "polynomial",
                    "polynomial": {
                        "initial_learning_rate": rate,
                        "decay_steps": steps - warmup,
                        "offset": warmup,
                        "power": power,
                        "end_learning_rate": 0.0,
                    },
                },
                "warmup": {
                    "type": "linear",
                    "linear": {"warmup_steps": warmup, "warmup_learning_rate": 0},
                },
            }
        )
    )
    config.override({"optimizer": {"type": kind, **_optimizers()}})
    return config


def _optimizers() -> dict[str, Any]:
    ours = {"weight_decay": 0.01, "exclude_from_weight_decay": _EXCLUDED}
    theirs = {"weight_decay_rate": 0.01, "exclude_from_weight_decay": _EXCLUDED}
    return {
        **dict.fromkeys(("vr_lamb", "lbopt_lamb", "vr_adam"), ours),
        **dict.fromkeys(("adamw", "lamb"), theirs),
    }


def _as_task(cls: Any, task: Any) -> Any:
    ours = cls()
    for name in ("train_data", "validation_data"):
        setattr(ours, name, getattr(task, name))
    return ours


@exp_factory.register_config_factory(PRETRAINING)
def large_batch_bert() -> config_definitions.ExperimentConfig:
    """tf-models' `bert/pretraining` with what large batches are trained with.

    Gradients are means over the whole batch (`scale_loss`), the rate is warmed up linearly and
    decays by a square root from there, without a jump.
    """
    experiment = exp_factory.get_exp_config("bert/pretraining")
    experiment.task = _as_task(LargeBatchBert, experiment.task)
    data = {"seq_length": 128, "max_predictions_per_seq": 20, "global_batch_size": 32768}
    experiment.task.override(
        {
            "scale_loss": True,
            "train_data": data,
            "validation_data": {**data, "global_batch_size": 512, "drop_remainder": False},
        }
    )
    steps = 14063
    experiment.runtime.override({"enable_xla": False})
    experiment.trainer = _trainer(
        steps, _optimization(4.243e-3, steps, round(0.2843 * steps), 0.5, "vr_lamb")
    )
    return experiment


@exp_factory.register_config_factory(FINE_TUNING)
def large_batch_squad() -> config_definitions.ExperimentConfig:
    """tf-models' `bert/squad` for SQuAD v1.1, by default with AdamW."""
    experiment = exp_factory.get_exp_config("bert/squad")
    experiment.task = _as_task(LargeBatchSquad, experiment.task)
    experiment.task.override(
        {
            "train_data": {"global_batch_size": 32},
            "validation_data": {
                "global_batch_size": 32,
                "is_training": False,
                "drop_remainder": False,
            },
        }
    )
    steps = 8299
    experiment.trainer = _trainer(
        steps, _optimization(5e-5, steps, round(0.1 * steps), 1.0, "adamw")
    )
    return experiment


def _trainer(steps: int, optimizer_config: Any) -> config_definitions.TrainerConfig:
    return config_definitions.TrainerConfig(
        optimizer_config=optimizer_config,
        train_steps=steps,
        steps_per_loop=100,
        summary_interval=100,
        checkpoint_interval=1000,
        validation_interval=1000,
        validation_steps=-1,
    )
