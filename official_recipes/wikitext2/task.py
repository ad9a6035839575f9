"""Language modeling with an LSTM, as a task of the Keras 3 recipes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tf_lbopt
from official_recipes.common.keras_training import Metrics, Predictions, Serving
from official_recipes.wikitext2.data import END, UNKNOWN, LanguageData

VOCABULARY = "vocabulary.txt"

_EVALUATION_BATCH = 64


class LanguageTask:
    """Predicts the next word.

    A training example is a window of `sequence_length` words, and the LSTM starts each with a zero
    state: windows can then be shuffled and shared out among replicas.

    Args:
        data: Word ids.
        sequence_length: Words per window.
        hidden: Units of each layer, and width of the embedding.
        layers: LSTM layers.
        dropout: Share of the inputs of each layer that is dropped.
    """

    name = "wikitext2"
    metric = "perplexity"

    def __init__(
        self, data: LanguageData, *, sequence_length: int, hidden: int, layers: int, dropout: float
    ) -> None:
        self._data = data
        self._length = sequence_length
        self._hidden = hidden
        self._layers = layers
        self._dropout = dropout
        # One word more than the window: what is to be predicted after its last word.
        count = (len(data.train) - 1) // sequence_length
        starts = np.arange(count)[:, None] * sequence_length
        self._windows = tf.constant(data.train[starts + np.arange(sequence_length + 1)])

    @property
    def settings(self) -> Mapping[str, Any]:
        """Data and network."""
        return {
            "data": self._data.name,
            "model": f"lstm-{self._layers}x{self._hidden}",
            "sequence_length": self._length,
            "dropout": self._dropout,
            "vocabulary": len(self._data.vocabulary),
            "split": self._data.held_out_name,
            "train_size": self.train_size,
        }

    @property
    def train_size(self) -> int:
        """The number of windows."""
        return int(self._windows.shape[0])

    def splits(self) -> tuple[str, ...]:
        """The one text that is not trained on."""
        return (self._data.held_out_name,)

    def build_model(self) -> keras.Model:
        """Returns the network: [batch, words] ids to float32 logits of the next words."""
        inputs = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(len(self._data.vocabulary), self._hidden)(inputs)
        for _ in range(self._layers):
            if self._dropout:
                x = keras.layers.Dropout(self._dropout)(x)
            x = keras.layers.LSTM(self._hidden, return_sequences=True)(x)
        if self._dropout:
            x = keras.layers.Dropout(self._dropout)(x)
        logits = keras.layers.Dense(len(self._data.vocabulary))(x)
        outputs = keras.layers.Activation("linear", dtype="float32")(logits)
        return tf_lbopt.PerExampleNormsModel(inputs, outputs)

    def loss(self) -> keras.losses.Loss:
        """Mean cross-entropy per word."""
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def batch(self, indices: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Windows, and the words that follow each of their words."""
        del seed
        windows = tf.gather(self._windows, indices)
        return windows[:, :-1], windows[:, 1:]

    def evaluate(self, model: keras.Model, split: str, *, final: bool) -> Metrics:
        """Mean cross-entropy per word of the whole text, and its exponential."""
        del final
        assert split == self._data.held_out_name
        measure = _loss_function(model)
        total = sum(float(measure(part[:, :-1], part[:, 1:])) for part in self._held_out())
        mean = total / (len(self._data.held_out) - 1)
        return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}

    def _held_out(self) -> Iterator[np.ndarray]:
        """Windows of the text to evaluate, in its order; the last word of each is no input."""
        text, length = self._data.held_out, self._length
        whole = (len(text) - 1) // length
        starts = np.arange(whole)[:, None] * length
        windows = text[starts + np.arange(length + 1)]
        for at in range(0, whole, _EVALUATION_BATCH):
            yield windows[at : at + _EVALUATION_BATCH]
        rest = text[whole * length :]
        if len(rest) > 1:
            yield rest[None]

    def files(self) -> Mapping[str, bytes]:
        """The vocabulary: the word of the id i in line i, from 0."""
        return {VOCABULARY: "".join(f"{w}\n" for w in self._data.vocabulary).encode()}

    def plain_model(self, model: keras.Model) -> keras.Model:
        """Returns the same layers as a model of Keras's own class."""
        return keras.Model(model.inputs, model.outputs)

    def serving(self, model: keras.Model) -> Serving:
        """Log probabilities of the words of lines, and the likeliest next one; or logits of ids.

        A line is taken to come after the end of another one.
        """
        words = tf.constant(self._data.vocabulary)
        table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(words, tf.range(len(self._data.vocabulary))),
            self._data.vocabulary.index(UNKNOWN),
        )
        end = self._data.vocabulary.index(END)

        def serve(text: tf.Tensor) -> dict[str, tf.Tensor]:
            split = tf.strings.split(text)
            ids = table.lookup(split.to_tensor(UNKNOWN))
            before = tf.concat([tf.fill([tf.shape(ids)[0], 1], end), ids], axis=1)
            logs = tf.nn.log_softmax(model(before, training=False))
            there = tf.sequence_mask(split.row_lengths(), dtype=logs.dtype)
            last = tf.gather(logs, split.row_lengths(), batch_dims=1)
            return {
                "log_probabilities": there * tf.gather(logs[:, :-1], ids, batch_dims=2),
                "next_word": tf.gather(words, tf.argmax(last, axis=-1)),
            }

        def logits_of(ids: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"logits": model(ids, training=False)}

        return Serving(
            {
                "serve": (serve, [tf.TensorSpec([None], tf.string, name="text")]),
                "ids": (logits_of, [tf.TensorSpec([None, None], tf.int32, name="ids")]),
            },
            [table],
        )

    def predictions(self, model: keras.Model) -> Predictions:
        """A line of each held-out word but the first: word, log probability, likeliest word."""

        @tf.function(reduce_retracing=True)
        def measure(part: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            logs = tf.nn.log_softmax(model(part[:, :-1], training=False))
            likeliest = tf.argmax(logs, axis=-1)
            return tf.gather(logs, part[:, 1:], batch_dims=2), likeliest

        words = self._data.vocabulary
        lines = ["word\tlog_probability\tprediction"]
        for part in self._held_out():
            columns = (part[:, 1:], *(tensor.numpy() for tensor in measure(part)))
            for word, log, likeliest in zip(*map(np.ravel, columns), strict=True):
                lines.append(f"{words[word]}\t{log:.6g}\t{words[likeliest]}")
        return Predictions(lines)


@functools.lru_cache(maxsize=1)  # Or every evaluation of a model traces it anew.
def _loss_function(model: keras.Model) -> Callable[..., tf.Tensor]:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    return tf.function(lambda x, y: loss(y, model(x, training=False)), reduce_retracing=True)
