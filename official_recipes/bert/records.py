"""Masked LM and next sentence examples, as tf-models' `BertPretrainDataLoader` reads them.

Tokens, sentence pairs and masks are made by tf-models' own code, sentences by TensorFlow Text; here
they are fed block by block, so that the text may be larger than memory.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from official_recipes.bert.documents import Document
from official_recipes.common.data_format import DataFormatError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY_CHARACTERS = 20_000_000
"""From how much text, at most, a vocabulary is learned."""

BLOCK_TOKENS = 3_000_000
"""What is in memory at once; a random next sentence is from the same block."""

_EXAMPLES_PER_SHARD = 10_000
_WORDS_CACHED = 1 << 20

Check = Callable[[], None]
Tokens = list[str]


@dataclass(frozen=True)
class Settings:
    """What decides on the examples.

    Attributes:
        max_seq_length: Tokens in an example.
        max_predictions_per_seq: The most masked tokens in an example.
        masked_lm_prob: Share of the tokens to mask.
        short_seq_prob: Share of the examples that are made shorter than they could be.
        dupe_factor: How often each training document is taken, with other masks and pairs.
        whole_word_mask: Whether the pieces of a word are masked together.
        split_sentences: Whether paragraphs are split into sentences.
        seed: Of all that is random.
    """

    max_seq_length: int
    max_predictions_per_seq: int
    masked_lm_prob: float
    short_seq_prob: float
    dupe_factor: int
    whole_word_mask: bool
    split_sentences: bool
    seed: int


@dataclass
class Split:
    """What was written of a split.

    Attributes:
        documents: How many.
        tokens: In the text, before it is taken several times.
        examples: How many.
        shards: The files, by the names they have while the number of them is unknown.
    """

    documents: int = 0
    tokens: int = 0
    examples: int = 0
    shards: list[Path] = field(default_factory=list)


def learn_vocabulary(
    documents: Iterable[Document], size: int, do_lower_case: bool, check: Check
) -> list[str]:
    """Learns a WordPiece vocabulary.

    Args:
        documents: As many are taken as have `VOCABULARY_CHARACTERS`.
        size: The most entries; small texts make fewer.
        do_lower_case: Whether the text will be lower-cased.
        check: Called between documents, to interrupt.

    Raises:
        DataFormatError: There are no words.
    """
    import tensorflow as tf
    from tensorflow_text.tools.wordpiece_vocab import bert_vocab_from_dataset

    def texts() -> Iterator[str]:
        characters = 0
        for document in documents:
            check()
            yield from document
            characters += sum(map(len, document))
            if characters >= VOCABULARY_CHARACTERS:
                break

    kept = list(texts())
    if not kept:
        raise DataFormatError("there is no text")
    dataset = tf.data.Dataset.from_tensor_slices(kept).batch(1000)
    vocabulary = bert_vocab_from_dataset.bert_vocab_from_dataset(
        dataset,
        size,
        list(SPECIAL_TOKENS),
        {"lower_case": do_lower_case},
        {
            "lower_thresh": 2,
            # Where a piece begins it is counted once, so entries times the count that they need is
            # at most about the length of the text. Every halving above that is time for nothing.
            "upper_thresh": max(4, 2 * sum(map(len, kept)) // size),
            # Longer pieces and rarer characters hardly occur; without the bounds it takes minutes.
            "max_token_length": 20,
            "max_unique_chars": 400,
        },
    )
    check()
    return vocabulary


def read_vocabulary(path: Path) -> list[str]:
    """The entries of a vocabulary file.

    Raises:
        DataFormatError: It cannot be BERT's.
    """
    try:
        entries = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(f"{path} is no text that can be read: {error}") from error
    if missing := [token for token in SPECIAL_TOKENS if token not in entries]:
        raise DataFormatError(f"{path} lacks {', '.join(missing)}")
    if entries[0] != "[PAD]":
        raise DataFormatError(f"{path}: sequences are filled up with 0, so [PAD] must be first")
    if len(set(entries)) < len(entries):
        raise DataFormatError(f"{path} has an entry twice")
    return entries


class Tokenizer:
    """tf-models' BERT tokenizer, which remembers words.

    It is the same function: that tokenizer takes what is between spaces by itself.

    Args:
        vocab_file: The vocabulary.
        do_lower_case: Whether text is lower-cased and stripped of accents.
        split_sentences: Whether paragraphs are split into sentences.
    """

    def __init__(self, vocab_file: Path, do_lower_case: bool, split_sentences: bool) -> None:
        import tensorflow_text
        from official.nlp.tools import tokenization

        self.full = tokenization.FullTokenizer(str(vocab_file), do_lower_case)
        self._word = functools.lru_cache(_WORDS_CACHED)(self.full.tokenize)
        self._breaker = tensorflow_text.StateBasedSentenceBreaker() if split_sentences else None

    def tokenize(self, text: str) -> Tokens:
        """The pieces of a text."""
        return [piece for word in text.split(" ") for piece in self._word(word)]

    def document(self, paragraphs: Document) -> list[Tokens]:
        """The sentences of a document, without those that have no tokens."""
        sentences = paragraphs
        if self._breaker is not None:
            broken = self._breaker.break_sentences(paragraphs)
            sentences = [s.decode("utf-8", "replace") for s in broken.flat_values.numpy()]
        return [tokens for sentence in sentences if (tokens := self.tokenize(sentence))]


class Writer:
    """Writes documents of one split.

    Args:
        folder: Where to.
        name: Of the split.
        tokenizer: Makes tokens.
        settings: What decides on the examples.
        duplicates: How often each document is taken.
        check: Called now and then, to interrupt.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        tokenizer: Tokenizer,
        settings: Settings,
        duplicates: int,
        check: Check,
    ) -> None:
        self.split = Split()
        self._folder = folder
        self._name = name
        self._tokenizer = tokenizer
        self._settings = settings
        self._duplicates = duplicates
        self._check = check
        self._random = random.Random(f"{settings.seed} {name}")
        self._vocabulary = list(tokenizer.full.vocab)
        self._block: list[list[Tokens]] = []
        self._block_tokens = 0

    def add(self, document: Document) -> None:
        """Takes a document; writes when there is a block of them."""
        sentences = self._tokenizer.document(document)
        if not sentences:
            return
        self._block.append(sentences)
        tokens = sum(map(len, sentences))
        self._block_tokens += tokens
        self.split.documents += 1
        self.split.tokens += tokens
        if self._block_tokens >= BLOCK_TOKENS:
            self._write_block()

    def close(self) -> None:
        """Writes what is left, and names the files by how many there are."""
        if self._block:
            self._write_block()
        shards = self.split.shards
        for index, path in enumerate(shards):
            shards[index] = path.with_name(f"{self._name}-{index:05d}-of-{len(shards):05d}")
            path.rename(shards[index])

    def _write_block(self) -> None:
        self._random.shuffle(self._block)
        for _ in range(self._duplicates):
            examples: list[Any] = []
            for index in range(len(self._block)):
                self._check()
                examples += self._examples(index)
            self._random.shuffle(examples)
            self._write(examples)
        self._block, self._block_tokens = [], 0

    def _examples(self, index: int) -> list[Any]:
        from official.nlp.data import create_pretraining_data

        settings = self._settings
        return create_pretraining_data.create_instances_from_document(
            self._block,
            index,
            settings.max_seq_length,
            settings.short_seq_prob,
            settings.masked_lm_prob,
            settings.max_predictions_per_seq,
            self._vocabulary,
            self._random,
            settings.whole_word_mask,
        )

    def _write(self, examples: list[Any]) -> None:
        from official.nlp.data import create_pretraining_data

        split = self.split
        first = len(split.shards)
        number = max(1, math.ceil(len(examples) / _EXAMPLES_PER_SHARD))
        new = [self._folder / f"{self._name}-{first + i:05d}" for i in range(number)]
        create_pretraining_data.write_instance_to_example_files(
            examples,
            self._tokenizer.full,
            self._settings.max_seq_length,
            self._settings.max_predictions_per_seq,
            [str(path) for path in new],
            gzip_compress=False,
            use_v2_feature_names=False,
        )
        split.shards += new
        split.examples += len(examples)
