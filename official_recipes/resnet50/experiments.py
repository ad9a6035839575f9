"""The experiment of this recipe, and its input that needs no data."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf
from official.core import config_definitions, exp_factory, task_factory
from official.modeling import optimization
from official.vision.configs import image_classification as configs
from official.vision.dataloaders import tfds_classification_decoders as tfds_decoders
from official.vision.tasks import image_classification as tasks

import tf_lbopt.tfm
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.tfm_training import SYNTHETIC

EXPERIMENT = "large_batch_resnet"
SYNTHETIC_VALIDATION_EXAMPLES = 512

_EXAMPLES = 1_281_167
_BATCH = 2048
_EPOCHS = 90
_WARMUP_EPOCHS = 5
_NOISE = 1.0
_PATTERN = 8  # height and width of what tells the synthetic classes apart


@dataclasses.dataclass
class LargeBatchResNet(configs.ImageClassificationTask):
    """tf-models' image classification, with `input_path: synthetic`."""


@task_factory.register_task_cls(LargeBatchResNet)
class LargeBatchResNetTask(tasks.ImageClassificationTask):
    """tf-models' image classification, with an input that needs no data and more of TFDS."""

    def build_inputs(
        self, params: Any, input_context: tf.distribute.InputContext | None = None
    ) -> tf.data.Dataset:
        """The dataset of one worker, in batches for one replica."""
        if params.tfds_name:
            _check_tfds(params, self.task_config.model.num_classes)
        if params.input_path != SYNTHETIC:
            return super().build_inputs(params, input_context)
        batch = params.global_batch_size
        if input_context is not None:
            batch = input_context.get_per_replica_batch_size(batch)
        return synthetic_images(
            self.task_config.model.num_classes,
            self.task_config.model.input_size,
            batch,
            params.is_training,
            tf.as_dtype(params.dtype),
        )


def _check_tfds(params: Any, classes: int) -> None:
    """Lets a dataset be read, if it has images with labels that the model can tell apart.

    tf-models has a list of the few datasets that it takes; what it does with them suits any other.
    """
    import tensorflow_datasets as tfds

    features = tfds.builder(params.tfds_name, data_dir=params.tfds_data_dir or None).info.features
    image, label = (dict(features or {}).get(key) for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise FlagValueError(
            "params_override",
            "tfds_name: a dataset with the features `image` and `label`",
            f"{params.tfds_name} with the features {sorted(features or {})}",
        )
    if label.num_classes is not None and label.num_classes > classes:
        raise FlagValueError(
            "params_override",
            f"task.model.num_classes: at least the {label.num_classes} of {params.tfds_name}",
            classes,
        )
    tfds_decoders.TFDS_ID_TO_DECODER_MAP.setdefault(
        params.tfds_name, tfds_decoders.ClassificationDecorder
    )


def synthetic_images(
    classes: int, size: list[int], batch: int, is_training: bool, dtype: tf.DType = tf.float32
) -> tf.data.Dataset:
    """Batches of a random pattern for each class, under noise: something that can be learned.

    Args:
        classes: How many.
        size: Height, width and channels.
        batch: Images in a batch.
        is_training: Endless if so; else 512 images, always the same.
        dtype: Of the images.
    """
    height, width, channels = size
    pattern_size = (_PATTERN, _PATTERN, channels)
    patterns = tf.random.stateless_normal([min(classes, 1000), *pattern_size], seed=[1, 2])

    def example(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        label = tf.cast(index % min(classes, 1000), tf.int32)
        image = tf.image.resize(patterns[label], [height, width], method="nearest")
        seed = tf.stack([index, tf.cast(is_training, tf.int64)])
        image += tf.random.stateless_normal([height, width, channels], seed, stddev=_NOISE)
        return tf.cast(image, dtype), label

    if is_training:
        dataset = tf.data.Dataset.counter().shuffle(1024)
    else:
        dataset = tf.data.Dataset.range(SYNTHETIC_VALIDATION_EXAMPLES)
    return (
        dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch, drop_remainder=is_training)
        .prefetch(2)
    )


@exp_factory.register_config_factory(EXPERIMENT)
def large_batch_resnet() -> config_definitions.ExperimentConfig:
    """tf-models' `resnet_imagenet` with what large batches are trained with.

    Label smoothing, a linear warm-up, cosine decay to 0 and no weight decay in the loss: the
    optimizers have their own, from which biases and normalization are excluded.
    """
    experiment = exp_factory.get_exp_config("resnet_imagenet")
    epoch = _EXAMPLES // _BATCH
    task = LargeBatchResNet()
    task.override(
        {name: value for name, value in experiment.task.as_dict().items() if name in task}
    )
    task.override(
        {
            # prepare_data.py counts classes from 0; in tf-models' own ImageNet they begin at 1.
            "model": {"num_classes": 1000},
            "losses": {"label_smoothing": 0.1, "l2_weight_decay": 0.0, "one_hot": True},
            "train_data": {"global_batch_size": _BATCH},
            "validation_data": {"global_batch_size": 1000, "drop_remainder": False},
        }
    )
    experiment.task = task
    experiment.runtime.override({"enable_xla": False})
    exclude = ["beta", "gamma", "bias"]
    experiment.trainer.optimizer_config = tf_lbopt.tfm.with_optimizers(
        optimization.OptimizationConfig(
            {
                "learning_rate": {
                    "type": "cosine",
                    "cosine": {
                        "initial_learning_rate": 8.8,
                        "decay_steps": (_EPOCHS - _WARMUP_EPOCHS) * epoch,
                        "offset": _WARMUP_EPOCHS * epoch,
                    },
                },
                "warmup": {
                    "type": "linear",
                    "linear": {
                        "warmup_steps": _WARMUP_EPOCHS * epoch,
                        "warmup_learning_rate": 0,
                    },
                },
            }
        )
    )
    experiment.trainer.override(
        {
            "train_steps": _EPOCHS * epoch,
            "steps_per_loop": 100,
            "summary_interval": 100,
            "checkpoint_interval": epoch,
            "validation_interval": epoch,
            "validation_steps": -1,
            "optimizer_config": {
                "optimizer": {
                    "type": "vr_lars",
                    **{
                        key: {"exclude_from_weight_decay": exclude}
                        for key in ("vr_lars", "vr_lamb", "lbopt_lars", "lbopt_lamb", "clars")
                    },
                }
            },
        }
    )
    return experiment
