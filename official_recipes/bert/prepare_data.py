"""Entry point of ``python -m official_recipes.bert.prepare_data``."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import flags

from official_recipes.bert import documents, records, squad
from official_recipes.common.data_format import DataFormatError, data_of_flag
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    BELOW_ONE,
    FlagValueError,
    define_integer,
    parse_unless_help,
)
from official_recipes.common.output_folder import (
    check_output_dir,
    exit_code_of,
    writing,
)

PROGRAM = "python -m official_recipes.bert.prepare_data"
SUMMARY = (
    "Turns raw text into TFRecords of masked LM and next sentence examples, or with --squad_train\n"
    "SQuAD JSON (v1.1 or v2.0) into what fine-tuning reads, in a new folder that appears when all\n"
    "is written."
)
RECORD = "dataset.json"
VOCABULARY = "vocab.txt"

_SHORTEST = 8
_PREDICTIONS = {128: 20, 512: 76}  # of BERT, and of tf-models' default


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        source: Files of text, or ``None`` for that of Python.
        form: Of the text, or ``None`` to recognize it.
        squad_train: SQuAD JSON to fine-tune on, or ``None`` for pretraining data.
        squad_dev: SQuAD JSON to evaluate on, or ``None`` to hold out paragraphs.
        skip_bad_answers: Whether questions that cannot be used are counted and left out.
        output_dir: The folder to make.
        vocab_file: The vocabulary, or ``None`` to learn one.
        vocab_size: Of the vocabulary that is learned.
        do_lower_case: Whether text is lower-cased.
        validation_fraction: Of the documents or paragraphs, to hold out.
        test_fraction: Of the documents, to hold out besides.
        records: Of pretraining examples.
        squad: Of questions.
    """

    source: str | None
    form: str | None
    squad_train: Path | None
    squad_dev: Path | None
    skip_bad_answers: bool
    output_dir: Path
    vocab_file: Path | None
    vocab_size: int
    do_lower_case: bool
    validation_fraction: float
    test_fraction: float
    records: records.Settings
    squad: squad.Settings


def main(argv: Sequence[str]) -> int:
    """Writes the data.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code: 0, 2 for flags or data that cannot be used, 130 or 143 when interrupted.
    """
    return exit_code_of(lambda: _main(argv))


def _main(argv: Sequence[str]) -> None:
    options = _parse_options(argv)
    if options is not None:
        _prepare(options)


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()

    def text(name: str, help_: str) -> None:
        flags.DEFINE_string(name, None, help_, flag_values=values)

    def share(name: str, default: float, help_: str) -> None:
        flags.DEFINE(BELOW_ONE, name, default, help_, flag_values=values)

    text(
        "source",
        "Text: files, folders and patterns, separated by commas; .gz, .bz2, .xz and tar archives "
        "of books too [default: the reference manual that ships with Python].",
    )
    text(
        "format",
        f"Any of {', '.join(documents.FORMS)} [default: recognized for each file]. Plain text has "
        "a paragraph or sentence a line and a blank line between documents.",
    )
    text("squad_train", "SQuAD JSON, v1.1 or v2.0, to fine-tune on, instead of text.")
    text(
        "squad_dev",
        "SQuAD JSON to evaluate on [default: paragraphs of --squad_train are held out].",
    )
    flags.DEFINE_boolean(
        "skip_bad_answers",
        False,
        "Count answers of SQuAD that are empty or not where answer_start says, and leave them out, "
        "and their questions where no other answer is left.",
        flag_values=values,
    )
    text("output_dir", "Folder to make; must be empty if it exists.")
    text("vocab_file", "WordPiece vocabulary, one entry a line [default: learned from the text].")
    define_integer(
        values, "vocab_size", 8192, "About how many entries to learn.", minimum=64, maximum=1 << 20
    )
    flags.DEFINE_boolean(
        "do_lower_case", True, "Lower-case text, as uncased models do.", flag_values=values
    )
    define_integer(
        values,
        "max_seq_length",
        None,
        "Tokens in a sequence [default: 128, with --squad_train 384].",
        minimum=_SHORTEST,
        maximum=1 << 16,
    )
    define_integer(
        values,
        "max_predictions_per_seq",
        None,
        "The most masked tokens in a sequence [default: 20 of 128, 76 of 512, else "
        "max_seq_length x masked_lm_prob].",
    )
    share("masked_lm_prob", 0.15, "Share of the tokens to mask.")
    share("short_seq_prob", 0.1, "Share of the sequences that are made shorter.")
    define_integer(
        values, "dupe_factor", 5, "How often each training document is taken, masked anew."
    )
    flags.DEFINE_boolean(
        "whole_word_mask", False, "Mask all pieces of a word together.", flag_values=values
    )
    flags.DEFINE_boolean(
        "split_sentences",
        True,
        "Split lines into sentences (TensorFlow Text's StateBasedSentenceBreaker).",
        flag_values=values,
    )
    define_integer(values, "doc_stride", 128, "Of SQuAD: from window to window of a paragraph.")
    define_integer(values, "max_query_length", 64, "Of SQuAD: the most tokens of a question.")
    share("validation_fraction", 0.05, "Share of the documents or paragraphs to hold out.")
    share("test_fraction", 0.0, "Share of the documents to hold out besides, as a test split.")
    define_integer(values, "seed", 1, "Of all that is random.", minimum=0)
    return values


def _parse_options(argv: Sequence[str]) -> Options | None:
    values = _define_flags()
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    if values.format is not None and values.format not in documents.FORMS:
        raise FlagValueError("format", f"one of {', '.join(documents.FORMS)}", repr(values.format))
    squad_train, squad_dev, vocab_file = (
        _existing(values, name) for name in ("squad_train", "squad_dev", "vocab_file")
    )
    if squad_train is None and squad_dev is not None:
        raise FlagValueError("squad_train", "a file, since --squad_dev is given", None)
    if squad_train is not None and squad_dev is not None and squad_dev.samefile(squad_train):
        raise FlagValueError("squad_dev", "another file than --squad_train", repr(str(squad_dev)))
    if squad_train is not None:
        if values.source is not None:
            raise FlagValueError("source", "no value together with --squad_train", values.source)
        if vocab_file is None:
            raise FlagValueError(
                "vocab_file", "that of the pretrained model, with --squad_train", None
            )
        if values.test_fraction:
            raise FlagValueError("test_fraction", "0 with --squad_train", values.test_fraction)
    if values.validation_fraction + values.test_fraction >= 1:
        raise FlagValueError(
            "test_fraction", "less than 1 with --validation_fraction", values.test_fraction
        )
    length = values.max_seq_length or (128 if squad_train is None else 384)
    if squad_train is not None and values.max_query_length > length - _SHORTEST:
        raise FlagValueError(
            "max_query_length", f"at most --max_seq_length - {_SHORTEST}", values.max_query_length
        )
    if values.masked_lm_prob == 0:
        raise FlagValueError("masked_lm_prob", "a number in (0, 1)", 0.0)
    predictions = values.max_predictions_per_seq or _PREDICTIONS.get(
        length, math.ceil(length * values.masked_lm_prob)
    )
    if predictions > length:
        raise FlagValueError(
            "max_predictions_per_seq", f"at most --max_seq_length={length}", predictions
        )
    return Options(
        source=values.source,
        form=values.format,
        squad_train=squad_train,
        squad_dev=squad_dev,
        skip_bad_answers=values.skip_bad_answers,
        output_dir=check_output_dir(values.output_dir),
        vocab_file=vocab_file,
        vocab_size=values.vocab_size,
        do_lower_case=values.do_lower_case,
        validation_fraction=values.validation_fraction,
        test_fraction=values.test_fraction,
        records=records.Settings(
            max_seq_length=length,
            max_predictions_per_seq=predictions,
            masked_lm_prob=values.masked_lm_prob,
            short_seq_prob=values.short_seq_prob,
            dupe_factor=values.dupe_factor,
            whole_word_mask=values.whole_word_mask,
            split_sentences=values.split_sentences,
            seed=values.seed,
        ),
        squad=squad.Settings(
            max_seq_length=length,
            doc_stride=values.doc_stride,
            max_query_length=values.max_query_length,
            do_lower_case=values.do_lower_case,
        ),
    )


def _existing(values: flags.FlagValues, name: str) -> Path | None:
    given = values[name].value
    if given is None:
        return None
    if not Path(given).is_file():
        raise FlagValueError(name, "a file that exists", repr(given))
    return Path(given)


def _prepare(options: Options) -> None:
    files = None
    if options.squad_train is None and options.source is not None:
        files = _for_flag("source", documents.find_files, options.source)
    vocabulary = None
    if options.vocab_file is not None:
        vocabulary = _for_flag("vocab_file", records.read_vocabulary, options.vocab_file)

    from absl import logging

    from official_recipes.common.replicas import quiet_tensorflow

    quiet_tensorflow()
    logging.set_verbosity(logging.ERROR)
    with writing(options.output_dir) as (partial, progress, stop):
        task = progress.add_task("starting", total=None)

        def show(description: str, done: int = 0, total: int | None = None) -> None:
            progress.update(task, description=description, completed=done, total=total)

        if options.squad_train is None:
            record = _write_text(options, files, vocabulary, partial, show, stop.check)
        else:
            assert vocabulary is not None
            record = _write_squad(options, vocabulary, partial, show)
        write_json(partial / RECORD, record)
    described = "; ".join(
        f"{name}: " + ", ".join(f"{number} {what}" for what, number in split.items())
        for name, split in record["splits"].items()
    )
    print(f"wrote {described}; vocabulary of {record['vocab_size']}; to {options.output_dir}")
    for reason, number in record.get("unused_questions", {}).items():
        print(f"unused questions: {number} with {reason}", file=sys.stderr)


def _for_flag(flag: str, function: Callable[..., Any], *arguments: Any) -> Any:
    with data_of_flag(flag, "data that can be used"):
        return function(*arguments)


Show = Callable[..., None]
"""Takes what is being done, and how much of how much is done."""


def _write_text(
    options: Options,
    files: list[Path] | None,
    vocabulary: list[str] | None,
    folder: Path,
    show: Show,
    check: Callable[[], None],
) -> dict[str, Any]:
    total = None if files is None else sum(path.stat().st_size for path in files) >> 10

    def read(description: str) -> Iterator[documents.Document]:
        show(description, total=total)
        if files is None:
            yield from documents.python_documents()
        else:
            yield from documents.read_documents(
                files, options.form, lambda done: show(description, done >> 10, total)
            )

    def write() -> dict[str, records.Split]:
        entries = vocabulary
        if entries is None:
            text = "reading for the vocabulary (KiB)"
            entries = records.learn_vocabulary(
                read(text), options.vocab_size, options.do_lower_case, check
            )
        (folder / VOCABULARY).write_text("".join(f"{entry}\n" for entry in entries), "utf-8")
        return _write_records(options, read("writing examples (KiB of text)"), folder, check)

    splits = _for_flag("source", write)
    return {
        "task": "pretraining",
        "vocab_size": len((folder / VOCABULARY).read_text("utf-8").splitlines()),
        "do_lower_case": options.do_lower_case,
        **asdict(options.records),
        "splits": {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "examples": split.examples,
                "files": len(split.shards),
            }
            for name, split in splits.items()
        },
    }


def _write_records(
    options: Options,
    texts: Iterator[documents.Document],
    folder: Path,
    check: Callable[[], None],
) -> dict[str, records.Split]:
    settings = options.records
    tokenizer = records.Tokenizer(
        folder / VOCABULARY, options.do_lower_case, settings.split_sentences
    )
    shares = {"validation": options.validation_fraction}
    if options.test_fraction:
        shares["test"] = options.test_fraction
    writers = {
        name: records.Writer(
            folder, name, tokenizer, settings, 1 if name in shares else settings.dupe_factor, check
        )
        for name in ("train", *shares)
    }
    held_out_share = sum(shares.values())
    number = held_out = 0
    for number, document in enumerate(texts, 1):
        name = "train"
        if _is_chosen(number, held_out_share):
            held_out += 1
            in_validation = _is_chosen(held_out, options.validation_fraction / held_out_share)
            name = "validation" if in_validation else "test"
        writers[name].add(document)
        check()
    for writer in writers.values():
        writer.close()
    if not writers["train"].split.examples:
        raise DataFormatError("there is no text")
    for name, share in shares.items():
        if share and not writers[name].split.examples:
            if number == 1:
                raise DataFormatError(
                    "one document, of which none can be held out: plain text has a blank line "
                    f"between documents (or --{name}_fraction=0)"
                )
            raise FlagValueError(
                f"{name}_fraction",
                f"0, or enough to hold out one of {number} documents (in plain text a blank line "
                "is between them)",
                share,
            )
    return {name: writer.split for name, writer in writers.items()}


def _is_chosen(number: int, share: float) -> bool:
    """Whether the share has the document; evenly spread over them, whatever their number."""
    return math.floor(number * share) > math.floor((number - 1) * share)


def _write_squad(
    options: Options, vocabulary: list[str], folder: Path, show: Show
) -> dict[str, Any]:
    show("reading questions")
    skipped: Counter[str] = Counter()
    counter = skipped if options.skip_bad_answers else None
    train = _for_flag("squad_train", squad.read_articles, options.squad_train, counter)
    if options.squad_dev is not None:
        dev = _for_flag("squad_dev", squad.read_articles, options.squad_dev, counter)
    else:
        train, dev = _for_flag(
            "validation_fraction",
            squad.hold_out_paragraphs,
            train,
            options.validation_fraction,
            options.records.seed,
        )
    (folder / VOCABULARY).write_text("".join(f"{entry}\n" for entry in vocabulary), "utf-8")
    show("writing questions")
    splits = _for_flag(
        "squad_train", squad.write, train, dev, folder / VOCABULARY, folder, options.squad
    )
    lost = splits["train"]["questions"] - splits["train"]["questions_used"]
    if lost:
        skipped["an answer that is not in the words that tf-models makes of its paragraph"] = lost
    return {
        "task": "squad",
        "vocab_size": len(vocabulary),
        **asdict(options.squad),
        "version_2_with_negative": squad.has_impossible([*train, *dev]),
        "seed": options.records.seed,
        "unused_questions": dict(skipped),
        "splits": splits,
    }


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main(sys.argv))
