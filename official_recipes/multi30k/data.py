"""Sentence pairs: Multi30k's files, or number words that are made up."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from official_recipes.common.data_format import DataFormatError
from official_recipes.common.text_data import first_file, read_lines

PAD, START, END = 0, 1, 2
KNOWN_FORMS = "Multi30k (train.en, train.de, val.en, val.de and test_2016_flickr.*, each also .gz)"
_TEST = ("test_2016_flickr", "test2016", "flickr2016", "test")
_MULTI30K = {"train": 29_000, "validation": 1_014, "test": 1_000}

Pairs = tuple[list[str], list[str]]
"""Sentences of the source and of the target language."""


@dataclass(frozen=True)
class PairSource:
    """Sentence pairs found in a folder and not read yet.

    Attributes:
        name: How results on this data are to be labeled, unless they are Multi30k's.
        files: Source and target file of each split; ``None`` for number words.
        languages: Of the source and of the target.
    """

    name: str
    files: dict[str, tuple[Path, Path]] | None
    languages: tuple[str, str] = ("en", "de")

    def label(self, splits: Mapping[str, Pairs]) -> str:
        """How results on these splits are to be labeled; Multi30k is told by its sizes."""
        sizes = {split: len(pairs[0]) for split, pairs in splits.items()}
        if self.files is None or sizes != _MULTI30K:
            return self.name
        return f"Multi30k, {self.languages[0]} to {self.languages[1]}"

    def load(self) -> dict[str, Pairs]:
        """Reads the splits ``train``, ``validation`` and ``test``.

        Raises:
            DataFormatError: A file cannot be read, or two do not have as many lines.
        """
        if self.files is None:
            return number_words()
        splits = {}
        for split, (source, target) in self.files.items():
            pairs = (read_lines(source), read_lines(target))
            if len(pairs[0]) != len(pairs[1]) or not pairs[0]:
                raise DataFormatError(
                    f"{source} has {len(pairs[0])} lines and {target} has {len(pairs[1])}"
                )
            if not any(map(str.strip, (*pairs[0], *pairs[1]))):
                raise DataFormatError(f"{source} and {target} have no words")
            splits[split] = pairs
        return splits


def find_pairs(folder: Path | None, source: str = "en", target: str = "de") -> PairSource:
    """Finds out which sentence pairs a folder holds; number words without a folder.

    Raises:
        DataFormatError: The folder is missing or holds no known pairs.
    """
    if folder is None:
        return PairSource("number words, English to German", None)
    if not folder.is_dir():
        raise DataFormatError(f"{folder} is not a folder")
    files = {}
    for split, stems in (
        ("train", ["train"]),
        ("validation", ["val", "valid", "validation"]),
        ("test", list(_TEST)),
    ):
        found = [
            first_file(folder, [f"{stem}.{language}{end}" for stem in stems for end in ("", ".gz")])
            for language in (source, target)
        ]
        if found[0] is None or found[1] is None:
            raise DataFormatError(f"{folder} has no {stems[0]}.{source} and {stems[0]}.{target}")
        files[split] = (found[0], found[1])
    name = f"pairs in {folder.resolve().name}, {source} to {target}"
    return PairSource(name, files, (source, target))


# -- number words ----------------------------------------------------------------------------------

_EN = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_EN_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DE = (
    "null",
    "eins",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
    "zehn",
    "elf",
    "zwölf",
    "dreizehn",
    "vierzehn",
    "fünfzehn",
    "sechzehn",
    "siebzehn",
    "achtzehn",
    "neunzehn",
)
_DE_TENS = (
    "zwanzig",
    "dreißig",
    "vierzig",
    "fünfzig",
    "sechzig",
    "siebzig",
    "achtzig",
    "neunzig",
)


def in_english(number: int) -> str:
    """Spells a number below a million."""
    if number >= 1000:
        rest = number % 1000
        return f"{in_english(number // 1000)} thousand" + (f" {in_english(rest)}" if rest else "")
    if number >= 100:
        rest = number % 100
        return f"{_EN[number // 100]} hundred" + (f" and {in_english(rest)}" if rest else "")
    if number < 20:
        return _EN[number]
    rest = number % 10
    return _EN_TENS[number // 10 - 2] + (f" {_EN[rest]}" if rest else "")


def in_german(number: int) -> str:
    """Spells a number below a million, as one word, with units before tens."""
    if number >= 1000:
        rest = number % 1000
        head = in_german(number // 1000)
        return f"{'ein' if head == 'eins' else head}tausend{in_german(rest) if rest else ''}"
    if number >= 100:
        rest = number % 100
        head = "" if number < 200 else _DE[number // 100]
        return f"{head or 'ein'}hundert{in_german(rest) if rest else ''}"
    if number < 20:
        return _DE[number]
    unit, tens = number % 10, _DE_TENS[number // 10 - 2]
    return f"{'ein' if unit == 1 else _DE[unit]}und{tens}" if unit else tens


def number_words(seed: int = 0) -> dict[str, Pairs]:
    """Returns 4,000 + 200 + 200 pairs of spelled numbers, no number in two splits."""
    numbers = random.Random(seed).sample(range(1, 100_000), 4400)
    splits = {"train": numbers[:4000], "validation": numbers[4000:4200], "test": numbers[4200:]}
    return {
        split: ([in_english(n) for n in chosen], [in_german(n) for n in chosen])
        for split, chosen in splits.items()
    }


# -- word pieces -----------------------------------------------------------------------------------


def train_tokenizer(sentences: Sequence[str], pieces: int) -> Any:
    """Returns a byte-pair encoding of both languages, made by sentencepiece.

    Args:
        sentences: The training sentences of both.
        pieces: The most pieces it may have.

    Raises:
        DataFormatError: The sentences cannot be encoded.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=pieces,
            hard_vocab_limit=False,
            model_type="bpe",
            character_coverage=1.0,
            pad_id=PAD,
            bos_id=START,
            eos_id=END,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataFormatError(f"no word pieces can be made: {error}") from error
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def encode(tokenizer: Any, sentences: Sequence[str], longest: int) -> np.ndarray:
    """Returns [sentences, pieces] int32 ids, START to END, cut to ``longest`` and padded with PAD.

    Args:
        tokenizer: Of `train_tokenizer`.
        sentences: Of one language.
        longest: The most ids of a sentence, START and END among them.
    """
    rows = [[START, *ids[: longest - 2], END] for ids in tokenizer.encode(list(sentences))]
    result = np.full((len(rows), max(map(len, rows))), PAD, np.int32)
    for row, ids in zip(result, rows, strict=True):
        row[: len(ids)] = ids
    return result
