"""The experiment of this recipe: its parameters, its model and its task."""

from __future__ import annotations

import os

# TensorFlow Recommenders asks TensorFlow for its Keras and needs the old one.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from official_recipes.common.tfm_training import WrongKerasError

if tf.keras.Model is not tf_keras.Model:
    raise WrongKerasError(
        "TF_USE_LEGACY_KERAS: expected 1 in the environment before tf.keras is first used, as "
        "train.py sets it, received a process that has used tf.keras without it (another recipe "
        "ran in it?)"
    )

import tensorflow_recommenders as tfrs
from official.core import base_task, config_definitions, exp_factory, task_factory
from official.modeling import optimization
from official.modeling.hyperparams import base_config
from official.modeling.optimization import optimizer_factory

import tf_lbopt.tfm
from official_recipes.common import checkpoints
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.dlrm.inputs import click_logs
from official_recipes.dlrm.optimizers import EmbeddingsApart, PlateauPolynomial
from official_recipes.dlrm.raw_rows import DENSE_FEATURES
from tf_lbopt.tfm import REGISTRATIONS

EXPERIMENT = "large_batch_dlrm"
INTERACTIONS = ("dot", "cross", "multi_layer_dcn")

_ROWS = 4_195_197_692  # of Criteo Terabyte's first 23 days
_BATCH = 65_536

_LrConfig: Any = optimization.LrConfig
_OptimizationConfig: Any = tf_lbopt.tfm.OptimizationConfig


# -- parameters ------------------------------------------------------------------------------------


@dataclasses.dataclass
class PlateauPolynomialConfig(base_config.Config):
    """A constant rate up to step `decay_start`, then polynomial decay over `decay_steps`."""

    initial_learning_rate: float = 39.6
    decay_start: int = 32_000
    decay_steps: int = 40_000
    end_learning_rate: float = 0.0
    power: float = 2.0


@dataclasses.dataclass
class LrConfig(_LrConfig):
    """tf-models' learning rates, and `plateau_polynomial`."""

    plateau_polynomial: PlateauPolynomialConfig = dataclasses.field(
        default_factory=PlateauPolynomialConfig
    )


@dataclasses.dataclass
class EmbeddingsConfig(_OptimizationConfig):
    """The optimizer of the embeddings.

    Attributes:
        optimizer: Its type is null: as the rest has it.
        learning_rate: Of type null: as the rest has it, with its warm-up.
    """

    learning_rate: LrConfig = dataclasses.field(default_factory=LrConfig)


@dataclasses.dataclass
class OptimizationConfig(_OptimizationConfig):
    """The optimizer of all variables.

    Attributes:
        embeddings: The embeddings' own, if it has a type.
    """

    learning_rate: LrConfig = dataclasses.field(default_factory=LrConfig)
    embeddings: EmbeddingsConfig = dataclasses.field(default_factory=EmbeddingsConfig)


@dataclasses.dataclass
class DataConfig(base_config.Config):
    """Files of one split.

    Attributes:
        input_path: Files or patterns, separated by commas.
        global_batch_size: Rows in a step of all replicas together.
        is_training: Whether rows are shuffled and come without end.
        shuffle_buffer_size: Rows to choose the next one from; 1 for none.
        cycle_length: Files to read from at a time.
    """

    input_path: str = ""
    global_batch_size: int = 0
    is_training: bool = True
    shuffle_buffer_size: int = 100_000
    cycle_length: int = 16


@dataclasses.dataclass
class ModelConfig(base_config.Config):
    """The network.

    Attributes:
        num_dense_features: Numbers in a row; none to take what is recorded beside the data.
        vocab_sizes: Of the categorical columns; empty to take what is recorded beside the data.
        multi_hot_sizes: How many ids a row has in each column at most, whose embeddings are
            averaged; empty to take what is recorded beside the data, or 1 in all.
        embedding_dim: Width of all embeddings, or a list of one for each column. With the dot
            interaction it is the same for all and for the last layer of the bottom network.
        joint_embeddings: Whether the embeddings of all columns of one width are one variable, and
            so one layer to layer-wise optimizers and to the mean of VR optimizers; else one for
            each column, with which a step takes several times as long to trace.
        bottom_mlp: Widths of the layers over the numbers.
        top_mlp: Widths of the layers over the interaction; the last is 1.
        interaction: dot (DLRM), cross (DCN) or multi_layer_dcn (DCN v2).
        dcn_num_layers: Layers of multi_layer_dcn.
        dcn_low_rank_dim: Rank of their kernels.
        skip_gather: Whether the top network is given the upper half of the products too, as zeros,
            which is faster; none for not with layer-wise optimizers, whose norms would count the
            weights that belong to those zeros and never change.
        concat_dense: Whether the top network sees the output of the bottom network too.
    """

    num_dense_features: int | None = None
    vocab_sizes: list[int] = dataclasses.field(default_factory=list)
    multi_hot_sizes: list[int] = dataclasses.field(default_factory=list)
    embedding_dim: int | list[int] = 128
    joint_embeddings: bool = True
    bottom_mlp: list[int] = dataclasses.field(default_factory=lambda: [512, 256, 128])
    top_mlp: list[int] = dataclasses.field(default_factory=lambda: [1024, 1024, 512, 256, 1])
    interaction: str = "dot"
    dcn_num_layers: int = 3
    dcn_low_rank_dim: int = 512
    skip_gather: bool | None = None
    concat_dense: bool = True


@dataclasses.dataclass
class LargeBatchDLRM(base_config.Config):
    """Click prediction.

    Attributes:
        init_checkpoint: Weights to begin with.
        model: The network.
        train_data: Rows to train on.
        validation_data: Rows to evaluate on, each of them once.
        auc_thresholds: How many points of the ROC curve the AUC is computed from.
    """

    init_checkpoint: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train_data: DataConfig = dataclasses.field(default_factory=DataConfig)
    validation_data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(is_training=False)
    )
    auc_thresholds: int = 8000


# -- the model -------------------------------------------------------------------------------------


class Embeddings(tf_keras.layers.Layer):
    """Looks the ids of categorical columns up; several of a row are averaged.

    Args:
        vocab_sizes: Of the columns.
        widths: Of their embeddings.
        joint: Whether the tables of one width are one variable.
    """

    def __init__(self, vocab_sizes: Sequence[int], widths: Sequence[int], joint: bool) -> None:
        super().__init__()
        self._vocab_sizes = list(vocab_sizes)
        self._widths = list(widths)
        self._joint = joint
        self._tables = []
        for group in self._groups():
            width = self._widths[group[0]]
            self._tables.append(
                tf_keras.layers.Embedding(
                    sum(self._vocab_sizes[column] for column in group),
                    width,
                    tf_keras.initializers.TruncatedNormal(stddev=1 / math.sqrt(width)),
                )
            )

    def call(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """An embedding for each row, by the columns' names.

        Args:
            inputs: By their names ids, or rows x ids, at least one of a row, filled up with -1.
        """
        found = {}
        for group, table in zip(self._groups(), self._tables, strict=True):
            ids: list[tf.Tensor] = []
            offsets: list[int] = []
            ends, first = [0], 0
            for column in group:
                ids += _vectors(inputs[str(column)])
                offsets += [first] * (len(ids) - len(offsets))
                ends.append(len(ids))
                first += self._vocab_sizes[column]
            rows = tf.cast(tf.stack(ids), tf.int64) + tf.constant(offsets, tf.int64)[:, None]
            embedded = tf.unstack(table(rows))
            for column, (begin, end) in zip(group, itertools.pairwise(ends), strict=True):
                found[str(column)] = _mean(embedded[begin:end], inputs[str(column)])
        return found

    def _groups(self) -> list[list[int]]:
        """The columns of each table."""
        columns = range(len(self._widths))
        if not self._joint:
            return [[column] for column in columns]
        return [
            [column for column in columns if self._widths[column] == width]
            for width in dict.fromkeys(self._widths)
        ]


def _vectors(ids: tf.Tensor) -> list[tf.Tensor]:
    if ids.shape.rank == 1:
        return [ids]
    # What fills up repeats a row's first id, so that no other row of the table gets a gradient.
    return tf.unstack(tf.where(ids < 0, ids[:, :1], ids), axis=1)


def _mean(embedded: Sequence[tf.Tensor], ids: tf.Tensor) -> tf.Tensor:
    """The mean embedding of the ids that are there."""
    if ids.shape.rank == 1:
        return embedded[0]
    there = tf.cast(ids >= 0, embedded[0].dtype)
    weights = there / tf.reduce_sum(there, 1, keepdims=True)
    return tf.reduce_sum(tf.stack(embedded, 1) * weights[..., None], 1)


class Concatenated(tf_keras.layers.Layer):
    """All features side by side. The ranking model loses their shapes where the batch has any size.

    Args:
        width: Of all together.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """One tensor, rows x width."""
        return tf.reshape(tf.concat(inputs, 1), [-1, self._width])


# -- the task --------------------------------------------------------------------------------------


@task_factory.register_task_cls(LargeBatchDLRM)
class LargeBatchDLRMTask(base_task.Task):
    """Trains the ranking model of TensorFlow Recommenders by the optimizer that it is given.

    tf-models' own task ignores that, has rates by name only, halves the loss it reports on two
    replicas, and leaves the last rows out of an evaluation.
    """

    _model: Any = None

    def build_model(self) -> tf_keras.Model:
        """The model, with all its variables. It returns the log-odds of a click."""
        config = self.task_config.model
        if config.interaction == "dot":
            interaction = tfrs.layers.feature_interaction.DotInteraction(
                skip_gather=config.skip_gather is not False
            )
        else:
            layers = tfrs.layers.feature_interaction
            interaction = tf_keras.Sequential(
                [
                    Concatenated(sum(embedding_widths(config)) + config.bottom_mlp[-1]),
                    layers.Cross()
                    if config.interaction == "cross"
                    else layers.MultiLayerDCN(config.dcn_low_rank_dim, config.dcn_num_layers),
                ]
            )
        model = tfrs.experimental.models.Ranking(
            # tf-models has a layer that gives tables to TPUEmbedding, which updates them itself.
            embedding_layer=Embeddings(
                config.vocab_sizes, embedding_widths(config), config.joint_embeddings
            ),
            bottom_stack=tfrs.layers.blocks.MLP(config.bottom_mlp, final_activation="relu"),
            feature_interaction=interaction,
            top_stack=tfrs.layers.blocks.MLP(config.top_mlp),
            concat_dense=config.concat_dense,
            task=tfrs.tasks.Ranking(loss=tf_keras.losses.BinaryCrossentropy(from_logits=True)),
        )
        model(
            {
                "dense_features": tf.zeros([2, _dense_features(config)]),
                "sparse_features": {
                    str(index): tf.zeros([2] if size == 1 else [2, size], tf.int32)
                    for index, size in enumerate(ids_in_columns(config))
                },
            }
        )
        self._model = model
        return model

    def initialize(self, model: tf_keras.Model) -> None:
        """Starts from `init_checkpoint`, if it is given.

        Args:
            model: What is to be trained.
        """
        if self.task_config.init_checkpoint:
            checkpoints.initialize(self.task_config.init_checkpoint, {"model": model})

    def create_optimizer(
        self, optimizer_config: Any, runtime_config: Any = None, dp_config: Any = None
    ) -> Any:
        """The optimizer; two under one roof if the embeddings have their own."""
        given: dict[str, Any] = {} if dp_config is None else {"dp_config": dp_config}
        dense = super().create_optimizer(optimizer_config, runtime_config, **given)
        embeddings = getattr(optimizer_config, "embeddings", None)
        if embeddings is None or embeddings.optimizer.type is None:
            return dense
        if runtime_config is not None and runtime_config.mixed_precision_dtype == "float16":
            raise ValueError(
                "embeddings with an optimizer of their own need float32 or mixed_bfloat16. "
                "Received: runtime.mixed_precision_dtype=float16"
            )
        if embeddings.ema is not None or optimizer_config.ema is not None:
            raise ValueError("`ema` does not work if the embeddings have an optimizer of their own")
        own = copy.deepcopy(embeddings)
        if own.learning_rate.type is None:
            own.learning_rate = optimizer_config.learning_rate
            own.warmup = optimizer_config.warmup
        sub_batches = getattr(self.task_config, "sub_batches", 1)
        if own.optimizer.type in REGISTRATIONS and sub_batches > 1:
            vars(own.optimizer.get())["gradient_accumulation_steps"] = sub_batches
        optimizer = EmbeddingsApart(
            super().create_optimizer(own, runtime_config),
            dense,
            lambda: self._model.embedding_trainable_variables,
            lambda: self._model.dense_trainable_variables,
            sub_batches,
        )
        if self._model is not None:
            optimizer.build()
        return optimizer

    def build_inputs(
        self, params: Any, input_context: tf.distribute.InputContext | None = None
    ) -> tf.data.Dataset:
        """The dataset of one worker, in batches for one replica."""
        model = self.task_config.model
        replicas = 1 if input_context is None else input_context.num_replicas_in_sync
        parts = getattr(self.task_config, "sub_batches", 1) if params.is_training else 1
        # The ranking model would take a batch of one row for a row without batch.
        if params.global_batch_size < 2 * replicas * parts:
            raise FlagValueError(
                "params_override",
                "global_batch_size: at least 2 rows in each of the "
                f"{replicas} x {parts} parts of a batch",
                params.global_batch_size,
            )
        return click_logs(
            params,
            model.vocab_sizes,
            _dense_features(model),
            input_context,
            model.multi_hot_sizes,
        )

    def build_losses(self, labels: Any, model_outputs: Any, aux_losses: Any = None) -> tf.Tensor:
        """The mean cross-entropy of a replica's rows."""
        loss = tf.reduce_mean(_cross_entropy(labels, model_outputs))
        return tf.add_n([loss, *aux_losses]) if aux_losses else loss

    def build_metrics(self, training: bool = True) -> list[tf_keras.metrics.Metric]:
        """AUC; in evaluation more."""
        metrics = tf_keras.metrics
        auc = metrics.AUC(self.task_config.auc_thresholds, from_logits=True, name="auc")
        if training:
            return [auc]
        return [
            auc,
            metrics.BinaryCrossentropy(from_logits=True, name="log_loss"),
            metrics.BinaryAccuracy(threshold=0.0, name="accuracy"),
        ]

    def process_metrics(
        self, metrics: Any, labels: Any, model_outputs: Any, weights: Any = None, **_: Any
    ) -> None:
        """Adds rows, which may be weighted, to the metrics."""
        labels, outputs = labels[:, None], tf.cast(model_outputs, tf.float32)[:, None]
        for metric in metrics:
            metric.update_state(labels, outputs, weights)

    def validation_step(self, inputs: Any, model: Any, metrics: Any = None) -> dict[str, Any]:
        """Adds a batch to the metrics. The mean loss is one of them, with every row weighing 1."""
        features, labels = inputs
        features = dict(features)
        weights = features.pop("weights")
        outputs = self.inference_step(features, model)
        self.process_metrics(metrics or [], labels, outputs, weights)
        return {}


def embedding_widths(model: ModelConfig) -> list[int]:
    """The width of each column's embeddings."""
    given = model.embedding_dim
    return [given] * len(model.vocab_sizes) if isinstance(given, int) else list(given)


def ids_in_columns(model: ModelConfig) -> list[int]:
    """How many ids a row has in each column at most."""
    return list(model.multi_hot_sizes) or [1] * len(model.vocab_sizes)


def _dense_features(model: ModelConfig) -> int:
    given = model.num_dense_features
    return DENSE_FEATURES if given is None else given


def _cross_entropy(labels: Any, logits: Any) -> tf.Tensor:
    return tf.nn.sigmoid_cross_entropy_with_logits(
        tf.cast(labels, tf.float32), tf.cast(logits, tf.float32)
    )


# -- the experiment --------------------------------------------------------------------------------

optimizer_factory.LR_CLS.setdefault("plateau_polynomial", PlateauPolynomial)


@exp_factory.register_config_factory(EXPERIMENT)
def large_batch_dlrm() -> config_definitions.ExperimentConfig:
    """DLRM on Criteo Terabyte, one epoch with VR-SGD at batch 64k, as `vrgd_64k.yaml` has it."""
    steps = _ROWS // _BATCH
    experiment = config_definitions.ExperimentConfig(
        task=LargeBatchDLRM(
            train_data=DataConfig(global_batch_size=_BATCH, shuffle_buffer_size=1_000_000),
            validation_data=DataConfig(is_training=False, global_batch_size=_BATCH),
        ),
        trainer=config_definitions.TrainerConfig(
            train_steps=steps,
            validation_steps=-1,
            validation_interval=steps,
            checkpoint_interval=3200,
            steps_per_loop=100,
            train_tf_while_loop=False,  # See train.py.
            summary_interval=100,
            optimizer_config=OptimizationConfig(
                {
                    "optimizer": {"type": "vr_sgd", "vr_sgd": {"weight_decay": 0.0}},
                    "learning_rate": {"type": "plateau_polynomial"},
                    "warmup": {
                        "type": "linear",
                        "linear": {"warmup_steps": 3200, "warmup_learning_rate": 0},
                    },
                }
            ),
        ),
    )
    experiment.runtime.override({"enable_xla": False, "mixed_precision_dtype": "float32"})
    return experiment
