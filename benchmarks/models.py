"""Models whose whole training steps are measured."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import keras
from keras import ops

from benchmarks.step_time import MODELS, build_model

Layers = keras.layers


class Bert(keras.Model):
    """A BERT encoder, which predicts the first positions' tokens by the table of its embedding.

    Args:
        layers: Encoder layers.
        width: Of the embeddings; the heads are 64 wide.
        tokens: The vocabulary's size.
        length: The most positions.
        predicted: How many positions are predicted.
    """

    def __init__(self, layers: int, width: int, tokens: int, length: int, predicted: int):
        super().__init__()
        self.predicted = predicted
        self.embedding = Layers.Embedding(tokens, width)
        # Sliced, not looked up, so that its gradient is dense.
        self.positions = self.add_weight(shape=(length, width), name="positions")
        self.norm = Layers.LayerNormalization()
        self.blocks = [
            (
                Layers.MultiHeadAttention(width // 64, 64),
                Layers.LayerNormalization(),
                Layers.Dense(4 * width, activation="gelu"),
                Layers.Dense(width),
                Layers.LayerNormalization(),
            )
            for _ in range(layers)
        ]
        # Keras does not look into tuples.
        self.parts = [layer for block in self.blocks for layer in block]

    def call(self, ids: Any, training: bool | None = None) -> Any:
        """[batch, length] ids to [batch, predicted, tokens] logits."""
        x = self.norm(self.embedding(ids) + self.positions[: ids.shape[1]])
        for attention, after, inner, outer, last in self.blocks:
            x = after(x + attention(x, x))
            x = last(x + outer(inner(x)))
        table = ops.transpose(ops.convert_to_tensor(self.embedding.embeddings))
        return ops.matmul(x[:, : self.predicted], table)


@dataclasses.dataclass(frozen=True)
class Workload(abc.ABC):
    """A model and its batches.

    Attributes:
        inputs: Shape of an example.
        labels: Shape of an example's labels.
        tokens: Upper bound of the inputs, where they are ids; or 0.
        classes: Upper bound of the labels.
    """

    inputs: tuple[int, ...]
    labels: tuple[int, ...]
    tokens: int
    classes: int

    @abc.abstractmethod
    def model(self) -> keras.Model:
        """Makes the model."""


@dataclasses.dataclass(frozen=True)
class ResNet(Workload):
    """A residual network: "resnet50", or one of `benchmarks.step_time`."""

    name: str = "resnet50"

    def model(self) -> keras.Model:
        """Makes the model."""
        if self.name == "resnet50":
            return keras.applications.ResNet50(
                weights=None, classes=self.classes, classifier_activation=None
            )
        return build_model(MODELS[self.name])


@dataclasses.dataclass(frozen=True)
class Encoder(Workload):
    """A BERT of some layers."""

    layers: int = 12
    width: int = 768

    def model(self) -> keras.Model:
        """Makes the model."""
        model = Bert(self.layers, self.width, self.tokens, *self.inputs, *self.labels)
        model(ops.zeros((1, *self.inputs), "int32"))
        return model


WORKLOADS: dict[str, Workload] = {
    "resnet50": ResNet((224, 224, 3), (), 0, 1000),
    "bert_base": Encoder((128,), (20,), 30522, 30522),
    "resnet20": ResNet((32, 32, 3), (), 0, 10, "resnet20"),
    "bert_tiny": Encoder((64,), (8,), 4608, 4608, layers=2, width=128),
    "resnet_tiny": ResNet((8, 8, 3), (), 0, 10, "tiny"),
    "bert_small": Encoder((8,), (2,), 64, 64, layers=1, width=64),
}
