"""SQuAD as tf-models' question answering task takes it: records to train, JSON to evaluate."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
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


def read_articles(path: Path, skipped: Counter[str] | None = None) -> list[Any]:
    """The articles of a SQuAD v1.1 or v2.0 file, without paragraphs that have no questions.

    Args:
        path: The file.
        skipped: Where questions that cannot be used are counted by the reason, and left out;
            without it the first is an error.

    Raises:
        DataFormatError: It is none, or a question cannot be used.
    """
    articles = []
    try:
        for article in json.loads(path.read_text("utf-8-sig"))["data"]:
            paragraphs = [_usable(path, p, skipped) for p in article["paragraphs"]]
            if paragraphs := [paragraph for paragraph in paragraphs if paragraph["qas"]]:
                articles.append({**article, "paragraphs": paragraphs})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataFormatError):
            raise
        raise DataFormatError(f"{path} is no SQuAD JSON: {error!r}") from error
    if not articles:
        raise DataFormatError(f"{path} has no questions that can be used")
    return articles


def _usable(path: Path, paragraph: Any, skipped: Counter[str] | None) -> Any:
    """A paragraph with the questions that can be used, and of these the answers that can."""
    context = paragraph["context"]
    questions = []
    for question in paragraph["qas"]:
        impossible = bool(question.get("is_impossible", False))
        given = [] if impossible else question["answers"]
        problems = [_problem(context, answer) for answer in given]
        answers = [a for a, problem in zip(given, problems, strict=True) if problem is None]
        if not context.strip():
            problems = ["an empty context"]
        elif not given and not impossible:
            problems = ["no answer, without is_impossible"]
        problem = next((p for p in problems if p is not None), None)
        if problem is not None and skipped is None:
            raise DataFormatError(
                f"{path}: the question {question['id']!r} has {problem} (--skip_bad_answers leaves "
                "such out)"
            )
        if problem is not None and skipped is not None and (not answers or not context.strip()):
            skipped[problem] += 1
            continue
        _ = question["id"], question["question"]  # which tf-models reads
        questions.append({**question, "answers": answers, "is_impossible": impossible})
    return {**paragraph, "qas": questions}


def _problem(context: str, answer: Any) -> str | None:
    text, begin = answer["text"], answer["answer_start"]
    if not text.strip():
        return "an empty answer"
    found = isinstance(begin, int) and begin >= 0 and context[begin : begin + len(text)] == text
    return None if found else "an answer that is not where its answer_start says"


def has_impossible(articles: list[Any]) -> bool:
    """Whether a question has no answer, as in SQuAD v2.0."""
    return any(question["is_impossible"] for question in _questions(articles))


def _questions(articles: list[Any]) -> Iterator[Any]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            yield from paragraph["qas"]


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
) -> dict[str, Any]:
    """Writes the training records and both parts as JSON.

    Args:
        train: Articles to train on; the first answer of a question counts.
        dev: Articles to evaluate on.
        vocab_file: The vocabulary.
        folder: Where to.
        settings: How questions and paragraphs become sequences.

    Returns:
        By split, how many there are of what.

    Raises:
        DataFormatError: No question can be used.
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
    second = has_impossible([*train, *dev])
    version = "v2.0" if second else "1.1"
    if second and all(question["is_impossible"] for question in _questions(dev)):
        raise DataFormatError("no question to evaluate on has an answer, which tf-models needs")
    for name, articles in ((TRAIN_JSON, first_answers), (DEV_JSON, dev)):
        text = json.dumps({"version": version, "data": articles}, ensure_ascii=False)
        (folder / name).write_text(text + "\n", "utf-8")
    record = squad_lib.generate_tf_record_from_json_file(
        str(folder / TRAIN_JSON),
        str(vocab_file),
        str(folder / TRAIN_RECORDS),
        max_seq_length=settings.max_seq_length,
        do_lower_case=settings.do_lower_case,
        max_query_length=settings.max_query_length,
        doc_stride=settings.doc_stride,
        version_2_with_negative=second,
    )
    used = squad_lib.read_squad_examples(
        str(folder / TRAIN_JSON), is_training=True, version_2_with_negative=second
    )
    if not used:
        raise DataFormatError("tf-models finds no answer in the words of its paragraph")
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
        "unanswerable": sum(question["is_impossible"] for question in _questions(articles)),
    }
