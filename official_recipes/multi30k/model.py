"""The transformer of Vaswani et al. 2017, from Keras's layers."""

from __future__ import annotations

import dataclasses
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


@keras.saving.register_keras_serializable(package="official_recipes")
class Transformer(tf_lbopt.PerExampleNormsModel):
    """Encoder and decoder with shared embeddings; layer normalization after each sub-layer.

    Args:
        shape: Its sizes.
        pieces: Of the shared vocabulary.
        longest: The most positions.
        **kwargs: Of `keras.Model`.
    """

    def __init__(self, shape: Shape, pieces: int, longest: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._arguments: dict[str, Any] = {
            "shape": dataclasses.asdict(shape),
            "pieces": pieces,
            "longest": longest,
        }
        dtype = self.dtype_policy  # Of the config where the model is loaded.
        self.embedded = Embedded(pieces, shape.width, longest, name="embedding", dtype=dtype)
        self.dropout = keras.layers.Dropout(shape.dropout, dtype=dtype)
        # By a name each: a checkpoint does not look into the lists of Keras's layers.
        for name, decodes in (("encoder", False), ("decoder", True)):
            for i in range(shape.layers):
                setattr(self, f"{name}_{i}", _Block(shape, decodes, f"{name}_{i}", dtype))

    @property
    def encoder(self) -> list[keras.layers.Layer]:
        """Its blocks, the first one first."""
        return [getattr(self, f"encoder_{i}") for i in range(self._arguments["shape"]["layers"])]

    @property
    def decoder(self) -> list[keras.layers.Layer]:
        """Its blocks, the first one first."""
        return [getattr(self, f"decoder_{i}") for i in range(self._arguments["shape"]["layers"])]

    def get_config(self) -> dict[str, Any]:  # type: ignore[override]
        """The arguments that make an equal model."""
        parent: Any = super()
        return {**parent.get_config(), **self._arguments}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Transformer:
        """A model of these arguments, without its variables."""
        del custom_objects
        return cls(**{**config, "shape": Shape(**config["shape"])})

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Makes the variables."""
        del config
        ids = np.zeros([1, 2], np.int32)
        self((ids, ids))

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
    def __init__(self, shape: Shape, decodes: bool, name: str, dtype: Any):
        super().__init__(name=name, dtype=dtype)

        def attention() -> keras.layers.Layer:
            width = shape.width // shape.heads
            return keras.layers.MultiHeadAttention(shape.heads, width, dtype=dtype)

        self._decodes = decodes
        self.attention = attention()
        self.memory_attention = attention() if decodes else None
        self.inner = keras.layers.Dense(shape.inner, activation="relu", dtype=dtype)
        self.outer = keras.layers.Dense(shape.width, dtype=dtype)
        self._norms = [f"norm_{i}" for i in range(3 if decodes else 2)]
        for norm in self._norms:  # By a name each, as the blocks.
            setattr(self, norm, keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype))
        self.dropout = keras.layers.Dropout(shape.dropout, dtype=dtype)

    def build(self, input_shape: Any) -> None:
        self.attention.build(input_shape, input_shape)
        if self.memory_attention is not None:
            self.memory_attention.build(input_shape, input_shape)
        self.inner.build(input_shape)
        self.outer.build((*input_shape[:-1], self.inner.units))
        for norm in self._norms:
            getattr(self, norm).build(input_shape)

    def call(
        self,
        x: Any,
        attention_mask: Any = None,
        memory: Any = None,
        memory_mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        norms = (getattr(self, norm) for norm in self._norms)

        def added(x: Any, y: Any) -> Any:
            return next(norms)(x + self.dropout(y, training=training))

        x = added(
            x, self.attention(x, x, attention_mask=attention_mask, use_causal_mask=self._decodes)
        )
        if self.memory_attention is not None:
            x = added(x, self.memory_attention(x, memory, attention_mask=memory_mask))
        return added(x, self.outer(self.inner(x)))
