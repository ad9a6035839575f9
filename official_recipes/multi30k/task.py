"""Translation with a transformer, as a task of the Keras 3 recipes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from official_recipes.common.keras_training import Metrics, Predictions, Serving
from official_recipes.multi30k.data import END, PAD, START, Pairs, encode, train_tokenizer
from official_recipes.multi30k.model import Shape, Transformer

TOKENIZER = "tokenizer.model"

_BATCH = 128
_IDS = tf.TensorSpec([None, None], tf.int32)


@keras.saving.register_keras_serializable(package="official_recipes")
class PieceCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits per piece, padding left out, with label smoothing.

    Args:
        label_smoothing: ε: the target is 1 − ε on the right piece and ε/n on each of n.
        **kwargs: Of `keras.losses.Loss`.
    """

    def __init__(self, label_smoothing: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Of each sentence, such that their mean is the mean over the pieces of them all."""
        y_true = tf.cast(y_true, tf.int32)  # Keras has made floats of them.
        log_probabilities = tf.nn.log_softmax(y_pred)
        right = tf.gather(log_probabilities, y_true, batch_dims=2)
        smooth = tf.reduce_mean(log_probabilities, axis=-1)
        losses = -(1 - self.label_smoothing) * right - self.label_smoothing * smooth
        there = tf.cast(tf.not_equal(y_true, PAD), losses.dtype)
        sentences = tf.cast(tf.shape(y_true)[0], losses.dtype)
        share = tf.math.divide_no_nan(sentences, tf.reduce_sum(there))
        return share * tf.reduce_sum(losses * there, axis=1)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal loss."""
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


class TranslationTask:
    """Translates sentences.

    Args:
        name: Of the data, for results.
        splits: Sentence pairs of ``train``, ``validation`` and ``test``.
        shape: Of the transformer.
        pieces: The most pieces of the shared vocabulary.
        longest: The most pieces of a sentence; longer ones are cut.
        label_smoothing: In [0, 1).
        to_translate: Sentences for `predictions`; ``None`` for those of the test split.
    """

    name = "multi30k"
    metric = "bleu"

    def __init__(
        self,
        data_name: str,
        splits: Mapping[str, Pairs],
        shape: Shape,
        *,
        pieces: int,
        longest: int,
        label_smoothing: float,
        to_translate: Sequence[str] | None = None,
    ) -> None:
        self._to_translate = splits["test"][0] if to_translate is None else to_translate
        self._data_name = data_name
        self._splits = splits
        self._shape = shape
        self._longest = longest
        self._label_smoothing = label_smoothing
        self._tokenizer = train_tokenizer([*splits["train"][0], *splits["train"][1]], pieces)
        self._pieces = int(self._tokenizer.vocab_size())
        self._ids = {
            split: [encode(self._tokenizer, sentences, longest) for sentences in pairs]
            for split, pairs in splits.items()
        }
        self._train = [tf.constant(ids) for ids in self._ids["train"]]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Data and network."""
        shape = self._shape
        return {
            "data": self._data_name,
            "model": f"transformer-{shape.layers}x{shape.width}",
            "inner": shape.inner,
            "heads": shape.heads,
            "dropout": shape.dropout,
            "label_smoothing": self._label_smoothing,
            "pieces": self._pieces,
            "longest": self._longest,
            "train_size": self.train_size,
        }

    @property
    def train_size(self) -> int:
        """The number of sentence pairs."""
        return len(self._ids["train"][0])

    def splits(self) -> tuple[str, ...]:
        """Validation after every evaluation; the test split, once, at the end."""
        return ("validation", "test")

    def build_model(self) -> keras.Model:
        """Returns the transformer, with its variables."""
        model = Transformer(self._shape, self._pieces, self._longest)
        ids = np.full([1, 2], START, np.int32)
        model((ids, ids))
        return model

    def loss(self) -> keras.losses.Loss:
        """Cross-entropy per piece."""
        return PieceCrossentropy(self._label_smoothing)

    def batch(self, indices: tf.Tensor, seed: tf.Tensor) -> Any:
        """Source and shifted target ids, no longer than the batch's longest sentences."""
        del seed
        source, target = (_trimmed(tf.gather(ids, indices)) for ids in self._train)
        return (source, target[:, :-1]), target[:, 1:]

    def evaluate(self, model: keras.Model, split: str, *, final: bool) -> Metrics:
        """Loss per piece without smoothing, and at the end BLEU of greedy translations."""
        if split == "test" and not final:
            return {}
        metrics = {"loss": self._loss_of(model, split)}
        if final:
            metrics["bleu"] = self._bleu(self.translate(model, split), split)
        return metrics

    def _loss_of(self, model: keras.Model, split: str) -> float:
        measure = _loss_function(model)
        total = count = 0.0
        for source, target in self._batches(split):
            loss, pieces = measure(source, target)
            total, count = total + float(loss), count + float(pieces)
        return total / count

    def _batches(self, split: str) -> list[tuple[tf.Tensor, tf.Tensor]]:
        source, target = self._ids[split]
        return [
            (
                _trimmed(tf.constant(source[at : at + _BATCH])),
                _trimmed(tf.constant(target[at : at + _BATCH])),
            )
            for at in range(0, len(source), _BATCH)
        ]

    def translate(self, model: keras.Model, split: str) -> list[str]:
        """Returns the translations of a split's source sentences, piece after likeliest piece."""
        greedy = greedy_translation(model, self._longest)
        return [
            sentence
            for source, _ in self._batches(split)
            for sentence in self._sentences(greedy(source))
        ]

    def _sentences(self, ids: tf.Tensor) -> list[str]:
        return self._tokenizer.decode([[i for i in row if i > END] for row in ids.numpy().tolist()])

    def files(self) -> Mapping[str, bytes]:
        """The word pieces of both languages, for sentencepiece."""
        return {TOKENIZER: self._tokenizer.serialized_model_proto()}

    def plain_model(self, model: keras.Model) -> keras.Model:
        """Returns the model itself, which needs its own code where it is loaded."""
        return model

    def serving(self, model: keras.Model) -> Serving:
        """Translations of sentences, or of their ids, piece after likeliest piece."""
        longest = self._longest
        greedy = greedy_translation(model, longest)

        def translate_ids(source: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"ids": greedy(source)}

        of_ids = {"ids": (translate_ids, [tf.TensorSpec([None, None], tf.int32, name="ids")])}
        try:
            import tensorflow_text
        except ImportError as error:
            return Serving(of_ids, note=f"the SavedModel takes ids, not text: {error}")
        tokenizer = tensorflow_text.SentencepieceTokenizer(self._tokenizer.serialized_model_proto())

        def translate(text: tf.Tensor) -> dict[str, tf.Tensor]:
            pieces = tokenizer.tokenize(text)[:, : longest - 2]
            count = tf.shape(text)[0]
            ends = [tf.fill([count, 1], piece) for piece in (START, END)]
            target = greedy(tf.concat([ends[0], pieces, ends[1]], axis=1).to_tensor(PAD))
            words = tf.ragged.boolean_mask(target, target > END)
            return {"translation": tokenizer.detokenize(words)}

        of_text = (translate, [tf.TensorSpec([None], tf.string, name="text")])
        return Serving({"serve": of_text, **of_ids}, [tokenizer])

    def predictions(self, model: keras.Model) -> Predictions:
        """The translation of each sentence, in a line; an empty one for an empty one."""
        greedy = greedy_translation(model, self._longest)
        sentences = self._to_translate
        pieces = [len(ids) + 2 for ids in self._tokenizer.encode(list(sentences))]
        # Those of a like length together: less padding, and fewer steps.
        order = sorted((i for i, s in enumerate(sentences) if s.strip()), key=pieces.__getitem__)
        lines = [""] * len(sentences)
        for at in range(0, len(order), _BATCH):
            part = order[at : at + _BATCH]
            ids = encode(self._tokenizer, [sentences[i] for i in part], self._longest)
            for i, line in zip(part, self._sentences(greedy(tf.constant(ids))), strict=True):
                lines[i] = line
        cut = sum(count > self._longest for count in pieces)
        note = f"{cut} of {len(sentences)} sentences were cut to --longest={self._longest} pieces"
        return Predictions(lines, note if cut else "")

    def _bleu(self, translations: list[str], split: str) -> float:
        import sacrebleu

        return float(sacrebleu.corpus_bleu(translations, [self._splits[split][1]]).score)


@functools.lru_cache(maxsize=1)  # Or every evaluation of a model traces it anew.
def _loss_function(model: keras.Model) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    @tf.function(input_signature=[_IDS, _IDS])
    def measure(source: tf.Tensor, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        logits = model((source, target[:, :-1]), training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(target[:, 1:], logits)
        there = tf.cast(tf.not_equal(target[:, 1:], PAD), losses.dtype)
        return tf.reduce_sum(losses * there), tf.reduce_sum(there)

    return measure


def greedy_translation(model: keras.Model, longest: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a `tf.function` from source ids to those of the translation.

    Args:
        model: A `Transformer`.
        longest: The most ids of a translation, START and END among them.

    Returns:
        It takes [batch, pieces] int32 and returns [batch, longest]: START, pieces, END and PAD.
    """

    @tf.function(input_signature=[_IDS])
    def greedy(source: tf.Tensor) -> tf.Tensor:
        memory, mask = model.encode(source, training=False)
        count = tf.shape(source)[0]
        target = tf.fill([count, longest], PAD)
        target = tf.concat([tf.fill([count, 1], START), target[:, 1:]], axis=1)
        ended = tf.zeros([count], tf.bool)
        at = tf.constant(1)
        while at < longest and not tf.reduce_all(ended):
            logits = model.decode(memory, mask, target[:, :at], training=False)[:, -1]
            piece = tf.where(ended, PAD, tf.argmax(logits, axis=-1, output_type=tf.int32))
            column = tf.one_hot(at, longest, dtype=tf.int32)
            target += piece[:, None] * column
            ended |= tf.equal(piece, END)
            at += 1
        return target

    return greedy


def _trimmed(ids: tf.Tensor) -> tf.Tensor:
    """Leaves out columns of nothing but padding at the end."""
    there = tf.reduce_any(tf.not_equal(ids, PAD), axis=0)
    return ids[:, : tf.reduce_sum(tf.cast(there, tf.int32))]
