"""The experiment of this recipe, and its input that needs no data."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import tensorflow as tf
import tf_keras
from google.protobuf import message
from official.core import config_definitions, exp_factory, task_factory
from official.modeling import optimization
from official.vision.configs import image_classification as configs
from official.vision.dataloaders import tfds_classification_decoders as tfds_decoders
from official.vision.tasks import image_classification as tasks

import tf_lbopt.tfm
from official_recipes.common import checkpoints
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.tfm_training import SYNTHETIC
from official_recipes.resnet50.densenet import ImageClassificationModel

EXPERIMENT = "large_batch_resnet"
SYNTHETIC_VALIDATION_EXAMPLES = 512

_EXAMPLES = 1_281_167
_BATCH = 2048
_EPOCHS = 90
_WARMUP_EPOCHS = 5
_NOISE = 1.0
_VALIDATION_LOSS = "validation_loss"
_DECAYS = ("weight_decay", "weight_decay_rate")
_EXCLUDED = "exclude_from_weight_decay"
_PATTERN = 8  # height and width of what tells the synthetic classes apart


@dataclasses.dataclass
class LargeBatchResNet(configs.ImageClassificationTask):
    """tf-models' image classification, with `input_path: synthetic` and one weight decay for all.

    Attributes:
        model: With one backbone more, `densenet`.
        weight_decay: λ of every optimizer whose own field has its default. One without such a field
            gets λ/2 times the sum of squares in the loss, as `losses.l2_weight_decay` is.
        exclude_from_weight_decay: Regexes over names of variables without it, for every optimizer
            whose own field is not set.
    """

    model: ImageClassificationModel = dataclasses.field(default_factory=ImageClassificationModel)
    weight_decay: float = 1e-4
    exclude_from_weight_decay: list[str] = dataclasses.field(
        default_factory=lambda: ["beta", "gamma", "bias"]
    )


@dataclasses.dataclass(frozen=True)
class WeightDecay:
    """What an optimizer makes of the task's weight decay.

    Attributes:
        value: λ.
        excluded: Regexes over names of variables without it.
        field: Of the optimizer's configuration; ``None`` where the decay is in the loss.
    """

    value: float
    excluded: tuple[str, ...]
    field: str | None

    def __str__(self) -> str:
        if not self.value:
            return "no weight decay"
        where = "" if self.field else " in the loss"
        but = f", not of {', '.join(self.excluded)}" if self.excluded else " of all variables"
        return f"weight decay {self.value:g}{where}{but}"


def weight_decay_of(config: Any, task: LargeBatchResNet) -> WeightDecay:
    """The weight decay of an optimizer in this task.

    Args:
        config: An `OptimizationConfig`.
        task: Of the same experiment.
    """
    optimizer = config.optimizer.get()
    field = next((name for name in _DECAYS if hasattr(optimizer, name)), None)
    value: Any = None if field is None else getattr(optimizer, field)
    if field is None or value == getattr(type(optimizer)(), field):  # AdamW's default is 0.004
        value = task.weight_decay
    excluded = getattr(optimizer, _EXCLUDED, None)
    return WeightDecay(
        float(value),
        tuple(task.exclude_from_weight_decay or () if excluded is None else excluded),
        field,
    )


@task_factory.register_task_cls(LargeBatchResNet)
class LargeBatchResNetTask(tasks.ImageClassificationTask):
    """tf-models' image classification, with an input that needs no data and more of TFDS."""

    _decay_in_loss: WeightDecay | None = None

    def create_optimizer(
        self, optimizer_config: Any, runtime_config: Any = None, dp_config: Any = None
    ) -> Any:
        """The optimizer with the task's weight decay.

        Args:
            optimizer_config: Of the experiment's trainer.
            runtime_config: Of the experiment.
            dp_config: For differential privacy.
        """
        decay = weight_decay_of(optimizer_config, self.task_config)
        if decay.field is None:
            self._decay_in_loss = decay
            return super().create_optimizer(optimizer_config, runtime_config, dp_config)
        optimizer_config = copy.deepcopy(optimizer_config)
        fields = vars(optimizer_config.optimizer.get())
        fields[decay.field] = decay.value
        if _EXCLUDED in fields:
            fields[_EXCLUDED] = list(decay.excluded) or None
        optimizer = super().create_optimizer(optimizer_config, runtime_config, dp_config)
        if _EXCLUDED not in fields and decay.excluded:
            getattr(optimizer, "inner_optimizer", optimizer).exclude_from_weight_decay(
                var_names=list(decay.excluded)
            )
        return optimizer

    def build_model(self) -> Any:
        """The model, with the weight decay in its loss where the optimizer has none."""
        model = super().build_model()

        def decay_in_loss() -> tf.Tensor:
            decay = self._decay_in_loss
            if decay is None or not decay.value:
                return tf.zeros([])
            decayed = [
                tf.cast(variable, tf.float32)
                for variable in model.trainable_variables
                if not any(re.search(pattern, variable.name) for pattern in decay.excluded)
            ]
            return decay.value * tf.add_n([tf.nn.l2_loss(variable) for variable in decayed])

        model.add_loss(decay_in_loss)
        return model

    def initialize(self, model: Any) -> None:
        """Starts from `init_checkpoint`, if it is given: from all of it, or from the backbone.

        Args:
            model: What is to be trained.
        """
        config = self.task_config
        if not config.init_checkpoint:
            return
        items = {"all": {"model": model}, "backbone": {"backbone": model.backbone}}
        modules = config.init_checkpoint_modules
        if modules not in items:
            raise FlagValueError(
                "params_override",
                "task.init_checkpoint_modules: one of all, backbone",
                repr(modules),
            )
        checkpoints.initialize(config.init_checkpoint, items[modules])

    def build_inputs(
        self, params: Any, input_context: tf.distribute.InputContext | None = None
    ) -> tf.data.Dataset:
        """The dataset of one worker, in batches for one replica."""
        if params.tfds_name:
            _check_tfds(params, self.task_config.model.num_classes)
        if params.input_path != SYNTHETIC:
            dataset = super().build_inputs(params, input_context)
            return dataset.map(self._with_labels_of_classes)
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

    def _with_labels_of_classes(
        self, images: tf.Tensor, labels: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        classes = self.task_config.model.num_classes
        if not labels.dtype.is_integer:  # of mixup, or of several classes in an image
            return images, labels
        right = tf.reduce_all((labels >= 0) & (labels < classes))
        with tf.control_dependencies(
            [tf.debugging.Assert(right, [f"labels must be from 0 to {classes - 1}", labels])]
        ):
            return images, tf.identity(labels)

    def record_fault(self, record: bytes, data: Any) -> str | None:
        """What is wrong with a record of TFRecord files, for `naming_faults`.

        Args:
            record: A serialized example.
            data: The parameters of its split.
        """
        try:
            features = tf.train.Example.FromString(record).features.feature
        except message.DecodeError:
            return "no tf.train.Example"
        encoded = features[data.image_field_key].bytes_list.value
        labels = features[data.label_field_key].int64_list.value
        name = b"".join(features["image/filename"].bytes_list.value[:1]).decode(errors="replace")
        of = f" ({name})" if name else ""
        if not encoded:
            return f"no image in {data.image_field_key}{of}"
        if not labels and not data.is_multilabel:
            return f"no label in {data.label_field_key}{of}"
        classes = self.task_config.model.num_classes
        outside = [label for label in labels if not 0 <= label < classes]
        if outside:
            return f"label {outside[0]}, not one from 0 to {classes - 1}{of}"
        try:
            decode = tf.io.decode_jpeg if data.decode_jpeg_only else tf.io.decode_image
            decode(encoded[0], channels=3)
        except tf.errors.OpError:
            kind = "JPEG" if data.decode_jpeg_only else "image"
            return f"no {kind} that can be decoded in {data.image_field_key}{of}"
        return None

    def build_metrics(self, training: bool = True) -> list[Any]:
        """tf-models' metrics, in validation with the loss among them.

        Args:
            training: Whether they are of training.
        """
        metrics = super().build_metrics(training)
        if not training:
            metrics.append(tf_keras.metrics.Mean(_VALIDATION_LOSS))
        return metrics

    def validation_step(self, inputs: Any, model: Any, metrics: Any = None) -> dict[str, Any]:
        """Takes a batch into the metrics, each image with the same weight.

        tf-models' own fails on a replica that gets no image of a last batch, and takes the mean of
        the loss over batches and replicas, however few images they have.

        Args:
            inputs: Images and labels of one replica.
            model: What is evaluated.
            metrics: Of `build_metrics`.
        """
        images, labels = inputs
        losses = self.task_config.losses
        if (losses.one_hot or losses.soft_labels) and not self.task_config.train_data.is_multilabel:
            labels = tf.one_hot(labels, self.task_config.model.num_classes)
        count = tf.shape(images)[0]
        if images.shape[0] is None:
            # Convolutions and normalization do not take zero images: one is added, and taken away.
            shape = images.shape
            missing = tf.cast(count == 0, tf.int32)
            images = tf.pad(images, [[0, missing], *[[0, 0]] * (len(shape) - 1)])
            images = tf.ensure_shape(images, shape)
        outputs = tf.nest.map_structure(
            lambda x: tf.cast(x, tf.float32)[:count], self.inference_step(images, model)
        )
        loss = self.build_losses(labels, outputs, model.losses)
        if getattr(self.task_config.model, "output_softmax", False):
            outputs = tf.nn.softmax(outputs, axis=-1)
        for metric in metrics or []:
            if metric.name == _VALIDATION_LOSS:
                metric.update_state(loss, sample_weight=count)
        self.process_metrics(
            [metric for metric in metrics or [] if metric.name != _VALIDATION_LOSS], labels, outputs
        )
        return {}


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

    Label smoothing, a linear warm-up, cosine decay to 0, and one weight decay for every optimizer,
    from which biases and normalization are excluded.
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
            "optimizer_config": {"optimizer": {"type": "vr_lars"}},
        }
    )
    return experiment
