"""Word-level text: WikiText-2's files, or English text that ships with Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from official_recipes.common.data_format import DataFormatError
from official_recipes.common.text_data import (
    first_file,
    python_topics,
    read_lines,
)

UNKNOWN, END = "<unk>", "<eos>"
_OF_VALIDATION = ", trained on its validation text"
_WIKITEXT2 = {"train": 2_051_910, "valid": 213_886, "test": 241_211}  # words
KNOWN_FORMS = (
    "WikiText-2 (train.txt, valid.txt and test.txt, or wiki.train.tokens and so on; without the "
    "training file, the validation file is trained on and the test file evaluated)"
)


@dataclass(frozen=True)
class LanguageData:
    """Two texts as word ids.

    Attributes:
        name: How results on this data are to be labeled.
        vocabulary: Words by id, `UNKNOWN` and `END` first, then as the training text has them.
        train: [tokens] int32.
        held_out: [tokens] int32; words that the training text does not have are `UNKNOWN`.
        held_out_name: ``validation`` or ``test``.
    """

    name: str
    vocabulary: tuple[str, ...]
    train: np.ndarray
    held_out: np.ndarray
    held_out_name: str

    def with_validation(self, words: int) -> LanguageData:
        """Returns the same with the last words of the training text as text to evaluate on.

        The vocabulary becomes that of the rest: a word that is never trained on would cost the more
        the better the others are learned.

        Args:
            words: How many.

        Raises:
            ValueError: Nothing would be left to train on.
        """
        if not 0 < words < len(self.train):
            raise ValueError(f"{words} of {len(self.train)} words cannot be set apart")
        train, held_out = self.train[:-words], self.train[-words:]
        # Ids are in the order of the words' first occurrence.
        known = max(int(train.max()) + 1, len((UNKNOWN, END)))
        return replace(
            self,
            vocabulary=self.vocabulary[:known],
            train=train,
            held_out=np.where(held_out < known, held_out, 0).astype(held_out.dtype),
            held_out_name="validation",
        )


@dataclass(frozen=True)
class TextSource:
    """Text found in a folder and not read yet.

    Attributes:
        name: How results on this data are to be labeled, unless it is WikiText-2.
        train: Files to train on; ``None`` for Python's own text.
        held_out: The file to evaluate on.
        held_out_name: ``validation`` or ``test``.
    """

    name: str
    train: Path | None
    held_out: Path | None
    held_out_name: str

    def load(self) -> LanguageData:
        """Reads both texts.

        Raises:
            DataFormatError: A file cannot be read or is empty.
        """
        if self.train is None or self.held_out is None:
            paragraphs = python_topics()
            held_out = paragraphs[::10]
            train = [text for index, text in enumerate(paragraphs) if index % 10]
        else:
            train, held_out = read_lines(self.train), read_lines(self.held_out)
        data = as_ids(self.name, train, held_out, self.held_out_name)
        of_validation = self.held_out_name == "test"
        sizes = [
            _WIKITEXT2[s] for s in (("valid", "test") if of_validation else ("train", "valid"))
        ]
        end = data.vocabulary.index(END)
        if [int(np.sum(text != end)) for text in (data.train, data.held_out)] != sizes:
            return data
        return replace(data, name="WikiText-2" + (_OF_VALIDATION if of_validation else ""))


def find_text(folder: Path | None) -> TextSource:
    """Finds out which text a folder holds; Python's own text without a folder.

    Raises:
        DataFormatError: The folder is missing or holds no known text.
    """
    if folder is None:
        return TextSource("Python's help topics", None, None, "validation")
    if not folder.is_dir():
        raise DataFormatError(f"{folder} is not a folder")
    found = {
        split: first_file(folder, [f"{split}.txt", f"wiki.{split}.tokens", f"wiki.{split}.raw"])
        for split in ("train", "valid", "test")
    }
    train, valid, test = found["train"], found["valid"], found["test"]
    name = f"text in {folder.resolve().name}"
    if train is not None and valid is not None:
        return TextSource(name, train, valid, "validation")
    if valid is not None and test is not None:
        return TextSource(name + _OF_VALIDATION, valid, test, "test")
    raise DataFormatError(f"{folder} has no known text")


def as_ids(
    name: str, train: Sequence[str], held_out: Sequence[str], held_out_name: str
) -> LanguageData:
    """Turns lines into word ids; every line ends with `END`, empty lines are left out.

    Raises:
        DataFormatError: A text has no words.
    """
    texts = [
        [word for line in lines if line.strip() for word in (*line.split(), END)]
        for lines in (train, held_out)
    ]
    for text, of in zip(texts, ("training", held_out_name), strict=True):
        if not text:
            raise DataFormatError(f"{name}: the {of} text has no words")
    vocabulary = tuple(dict.fromkeys([UNKNOWN, END, *texts[0]]))
    ids = {word: index for index, word in enumerate(vocabulary)}
    arrays = [np.array([ids.get(word, 0) for word in text], np.int32) for text in texts]
    return LanguageData(name, vocabulary, arrays[0], arrays[1], held_out_name)
