"""SQuAD v1.1 as tf-models' question answering task takes it: records to train, JSON to evaluate."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from official_recipes.common.data_format import DataFormatError

TRAIN_RECORDS = "train.tf_record"
TRAIN_JSON = "train.json"
DEV_JSON = "dev.json"


@dataclass(frozen=True)
class Settings:
    """How questions and paragraphs become sequences.

    Attributes:
        max_seq_length: Tokens in a sequence.
        doc_stride: How far the next window of a long paragraph begins.
        max_query_length: Tokens of a question, at most.
        do_lower_case: Whether text is lower-cased.
    """

    max_seq_length: int
    doc_stride: int
    max_query_length: int
    do_lower_case: bool


def read_articles(path: Path) -> list[Any]:
    """The articles of a SQuAD v1.1 file.

    Raises:
        DataFormatError: It is none.
    """
    try:
        articles = json.loads(path.read_text("utf-8"))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    _check_question(path, paragraph["context"], question)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataFormatError):
            raise
        raise DataFormatError(f"{path} is no SQuAD v1.1 JSON: {error!r}") from error
    if not articles:
        raise DataFormatError(f"{path} has no articles")
    return articles


def _check_question(path: Path, context: str, question: Any) -> None:
    if not question["answers"]:
        raise DataFormatError(
            f"{path} has a question without answer, {question['id']}: that is SQuAD v2.0"
        )
    for answer in question["answers"]:
        begin = answer["answer_start"]
        if context[begin : begin + len(answer["text"])] != answer["text"]:
            raise DataFormatError(
                f"{path}: the answer of {question['id']} is not where its answer_start says"
            )


def hold_out_paragraphs(
    articles: list[Any], share: float, seed: int
) -> tuple[list[Any], list[Any]]:
    """Splits articles by paragraph, so that no paragraph is in both parts.

    Args:
        articles: Of one file.
        share: Of the paragraphs, to hold out.
        seed: Of the choice.

    Returns:
        The articles with what stays, and with what is held out; none without paragraphs.

    Raises:
        DataFormatError: One of the parts has no paragraph.
    """
    places = [
        (i, j) for i, article in enumerate(articles) for j in range(len(article["paragraphs"]))
    ]
    held_out = set(random.Random(seed).sample(places, round(share * len(places))))
    if not 0 < len(held_out) < len(places):
        raise DataFormatError(
            f"of {len(places)} paragraphs {len(held_out)} would be held out; there must be some "
            "in both parts"
        )

    def part(of_held_out: bool) -> list[Any]:
        chosen = [
            {
                **article,
                "paragraphs": [
                    paragraph
                    for j, paragraph in enumerate(article["paragraphs"])
                    if ((i, j) in held_out) == of_held_out
                ],
            }
            for i, article in enumerate(articles)
        ]
        return [article for article in chosen if article["paragraphs"]]

    return part(False), part(True)


def write(
    train: list[Any], dev: list[Any], vocab_file: Path, folder: Path, settings: Settings
) -> dict[str, dict[str, int]]:
    """Writes the training records and both parts as JSON.

    Args:
        train: Articles to train on; the first answer of a question counts.
        dev: Articles to evaluate on.
        vocab_file: The vocabulary.
        folder: Where to.
        settings: How questions and paragraphs become sequences.

    Returns:
        By split, how many there are of what.
    """
    from official.nlp.data import squad_lib

    first_answers = [
        {
            **article,
            "paragraphs": [
                {**p, "qas": [{**q, "answers": q["answers"][:1]} for q in p["qas"]]}
                for p in article["paragraphs"]
            ],
        }
        for article in train
    ]
    for name, articles in ((TRAIN_JSON, first_answers), (DEV_JSON, dev)):
        text = json.dumps({"version": "1.1", "data": articles}, ensure_ascii=False)
        (folder / name).write_text(text + "\n", "utf-8")
    record = squad_lib.generate_tf_record_from_json_file(
        str(folder / TRAIN_JSON),
        str(vocab_file),
        str(folder / TRAIN_RECORDS),
        max_seq_length=settings.max_seq_length,
        do_lower_case=settings.do_lower_case,
        max_query_length=settings.max_query_length,
        doc_stride=settings.doc_stride,
    )
    used = squad_lib.read_squad_examples(
        str(folder / TRAIN_JSON), is_training=True, version_2_with_negative=False
    )
    return {
        "train": {
            **_count(train),
            "questions_used": len(used),
            "examples": record["train_data_size"],
        },
        "dev": _count(dev),
    }


def _count(articles: list[Any]) -> dict[str, int]:
    paragraphs = [p for article in articles for p in article["paragraphs"]]
    return {
        "paragraphs": len(paragraphs),
        "questions": sum(len(p["qas"]) for p in paragraphs),
    }
