"""The transformer of Vaswani et al. 2017, from Keras's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

import tf_lbopt
from official_recipes.multi30k.data import PAD


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer.

    Attributes:
        layers: In the encoder, and as many in the decoder.
        width: Of the embeddings.
        inner: Of the dense layers.
        heads: Of the attention.
        dropout: Share that is dropped after each sub-layer and of the embeddings.
    """

    layers: int
    width: int
    inner: int
    heads: int
    dropout: float


@keras.saving.register_keras_serializable(package="official_recipes")
class Embedded(keras.layers.Layer):
    """Word pieces with sinusoidal positions, and their logits by the same table.

    Args:
        pieces: Rows of the table.
        width: Of each.
        longest: The most positions.
    """

    def __init__(self, pieces: int, width: int, longest: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.pieces, self.width, self.longest = pieces, width, longest
        angles = np.arange(longest)[:, None] / 10000 ** (2 * (np.arange(width) // 2) / width)
        positions = np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles))
        self._positions = positions.astype("float32")

    def build(self, input_shape: Any) -> None:
        """Makes the table."""
        self.table = self.add_weight(
            shape=(self.pieces, self.width),
            initializer=keras.initializers.RandomNormal(stddev=self.width**-0.5),
            name="table",
        )

    def call(self, ids: Any) -> Any:
        """[batch, pieces] ids to [batch, pieces, width]."""
        # Keras builds a model under a strategy with floats in the place of its inputs.
        x = ops.take(self.table, ops.cast(ids, "int32"), axis=0) * self.width**0.5
        positions = ops.convert_to_tensor(self._positions)[: ops.shape(ids)[1]]
        return ops.cast(x, self.compute_dtype) + ops.cast(positions, self.compute_dtype)

    def logits(self, x: Any) -> Any:
        """[batch, pieces, width] to [batch, pieces, table rows] float32."""
        table = ops.cast(self.table, x.dtype)
        return ops.cast(ops.matmul(x, ops.transpose(table)), "float32")

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal layer."""
        return {
            **super().get_config(),
            "pieces": self.pieces,
            "width": self.width,
            "longest": self.longest,
        }


class Transformer(tf_lbopt.PerExampleNormsModel):
    """Encoder and decoder with shared embeddings; layer normalization after each sub-layer.

    Args:
        shape: Its sizes.
        pieces: Of the shared vocabulary.
        longest: The most positions.
    """

    def __init__(self, shape: Shape, pieces: int, longest: int):
        super().__init__()
        self.embedded = Embedded(pieces, shape.width, longest, name="embedding")
        self.dropout = keras.layers.Dropout(shape.dropout)
        self.encoder = [_Block(shape, False, name=f"encoder_{i}") for i in range(shape.layers)]
        self.decoder = [_Block(shape, True, name=f"decoder_{i}") for i in range(shape.layers)]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Source and target ids, [batch, pieces] each, to logits of the pieces that follow."""
        source, target = inputs
        memory, mask = self.encode(source, training=training)
        return self.decode(memory, mask, target, training=training)

    def encode(self, source: Any, training: bool | None = None) -> tuple[Any, Any]:
        """Source ids to what the decoder attends to, and where it may."""
        mask = ops.not_equal(source, PAD)[:, None, :]
        x = self.dropout(self.embedded(source), training=training)
        for block in self.encoder:
            x = block(x, attention_mask=mask, training=training)
        return x, mask

    def decode(self, memory: Any, mask: Any, target: Any, training: bool | None = None) -> Any:
        """Logits of the next piece after each of the target's."""
        x = self.dropout(self.embedded(target), training=training)
        for block in self.decoder:
            x = block(x, memory=memory, memory_mask=mask, training=training)
        return self.embedded.logits(x)


class _Block(keras.layers.Layer):
    def __init__(self, shape: Shape, decodes: bool, name: str):
        super().__init__(name=name)

        def attention() -> keras.layers.Layer:
            return keras.layers.MultiHeadAttention(shape.heads, shape.width // shape.heads)

        self._decodes = decodes
        self.attention = attention()
        self.memory_attention = attention() if decodes else None
        self.inner = keras.layers.Dense(shape.inner, activation="relu")
        self.outer = keras.layers.Dense(shape.width)
        self.norms = [
            keras.layers.LayerNormalization(epsilon=1e-6) for _ in range(3 if decodes else 2)
        ]
        self.dropout = keras.layers.Dropout(shape.dropout)

    def build(self, input_shape: Any) -> None:
        self.attention.build(input_shape, input_shape)
        if self.memory_attention is not None:
            self.memory_attention.build(input_shape, input_shape)
        self.inner.build(input_shape)
        self.outer.build((*input_shape[:-1], self.inner.units))
        for norm in self.norms:
            norm.build(input_shape)

    def call(
        self,
        x: Any,
        attention_mask: Any = None,
        memory: Any = None,
        memory_mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        norms = iter(self.norms)

        def added(x: Any, y: Any) -> Any:
            return next(norms)(x + self.dropout(y, training=training))

        x = added(
            x, self.attention(x, x, attention_mask=attention_mask, use_causal_mask=self._decodes)
        )
        if self.memory_attention is not None:
            x = added(x, self.memory_attention(x, memory, attention_mask=memory_mask))
        return added(x, self.outer(self.inner(x)))
