"""The BERT recipe: its data, its configurations, its command line, and short trainings."""

import collections
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from forked_python import python
from harness_recipes import (
    assert_deviations_are_in_the_readme,
    assert_same_state,
    interrupt_preparation,
    last_checkpoint,
    signal_when,
)

from official_recipes.bert import documents, prepare_data, records, squad, train
from official_recipes.common import replicas, tfm_training
from official_recipes.common.data_format import DataFormatError
from official_recipes.common.flag_parsing import FlagValueError

pytestmark = pytest.mark.usefixtures("quick_configurations")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "official_recipes" / "bert" / "configs").glob("*.yaml"))
STEPS = {  # VRGD, Table 1
    "16k": 31250,
    "32k": 15625,
    "64k_32k": 8599,
    "64k": 7820,
    "96k_32k": 6256,
    "96k": 5214,
    "128k_64k": 4301,
}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven"]
WORDS += ["wise", "wizards", "watch", "them", "play"]
VOCABULARY = [*records.SPECIAL_TOKENS, *WORDS, "wiz", "##ards", "##s", "dog", "."]

SMALL = """
task:
  model:
    cls_heads: [{inner_dim: 16, num_classes: 2, dropout_rate: 0.1, name: next_sentence}]
    encoder:
      type: bert
      bert: {vocab_size: 32, hidden_size: 16, num_layers: 1, num_attention_heads: 2,
             intermediate_size: 32, max_position_embeddings: 64}
  train_data: {seq_length: 32, max_predictions_per_seq: 5, global_batch_size: 16}
  validation_data: {seq_length: 32, max_predictions_per_seq: 5, global_batch_size: 16}
trainer:
  train_steps: 4
  steps_per_loop: 2
  summary_interval: 2
  checkpoint_interval: 2
  validation_interval: 4
  validation_steps: -1
  optimizer_config:
    learning_rate: {polynomial: {initial_learning_rate: 0.01, decay_steps: 100, offset: 2}}
    warmup: {linear: {warmup_steps: 2}}
"""
MODEL = {
    "cls_heads": [{"inner_dim": 16, "num_classes": 2, "name": "next_sentence"}],
    "encoder": {
        "type": "bert",
        "bert": {
            "vocab_size": 32,
            "hidden_size": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
        },
    },
}


def _text(folder, number=40, name="text.txt"):
    """Documents of sentences of three to eight words."""
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(number):
        lines = [" ".join(rng.choice(WORDS, rng.integers(3, 9))) + "." for _ in range(6)]
        blocks.append("\n".join(lines))
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n\n".join(blocks) + "\n")
    return folder / name


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(f"{entry}\n" for entry in VOCABULARY))
    return path


def _prepare(*arguments):
    return prepare_data.main(["prepare_data", *(str(a) for a in arguments)])


LENGTHS = ("--max_seq_length=32", "--max_predictions_per_seq=5")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, vocab_file):
    folder = tmp_path_factory.mktemp("prepared")
    source = _text(folder / "in")
    arguments = [f"--source={source}", f"--vocab_file={vocab_file}", *LENGTHS]
    assert _prepare(*arguments, "--validation_fraction=0.2", f"--output_dir={folder / 'out'}") == 0
    return folder / "out"


def _read(documents_of, **kwargs):
    return list(documents.read_documents(documents_of, kwargs.pop("form", None), lambda _: None))


# -- documents -------------------------------------------------------------------------------------

WIKI = '<doc id="1" url="u" title="A">\nA\n\nOne two.\nThree.\n\n</doc>\n<doc id="2">\nB\n</doc>\n'
BOOK = (
    "The Project Gutenberg EBook\r\n\r\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\r\n\r\n"
    "It was\r\nthe best.\r\n\r\n * * * \r\n\r\nIt wasn\u2019t.\r\n\r\n"
    "End of the Project Gutenberg EBook of X\r\n\r\n*** END OF THIS ***\r\nlicence\r\n"
)


def test_forms_of_text(tmp_path):
    plain = tmp_path / "a.txt.gz"
    plain.write_bytes(gzip.compress("\ufeffOne.\nTwo.\n\n\n\u00dcber drei.\n".encode()))
    wiki = tmp_path / "wiki_00"
    wiki.write_text(WIKI)
    book = tmp_path / "book.txt"
    book.write_bytes(BOOK.encode())
    latin = tmp_path / "latin.txt"
    latin.write_bytes(BOOK.replace("\u2019", "\u00e9").encode("latin-1"))
    archive = tmp_path / "books.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for name in ("author/one.txt", "author/two.txt", "index.tsv"):
            member = tarfile.TarInfo(name)
            member.size = len(BOOK.encode())
            tar.addfile(member, io.BytesIO(BOOK.encode()))
    read = ["It was the best.", "It wasn\u2019t."]
    assert _read([plain]) == [["One.", "Two."], ["\u00dcber drei."]]
    assert _read([wiki]) == [["A", "One two.", "Three."], ["B"]]
    assert _read([book]) == [read]
    assert _read([latin]) == [[read[0], "It wasn\u00e9t."]]
    assert _read([archive]) == [read, read]
    assert len(_read([book], form="plain")) > 1
    done = []
    list(documents.read_documents([plain, archive], None, done.append))
    assert done == sorted(done)
    assert done[-1] == plain.stat().st_size + archive.stat().st_size


def test_finding_files(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "b/.hidden", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = documents.find_files(f"{tmp_path}/b,{tmp_path}/*.txt")
    assert [path.name for path in found] == ["1.txt", "2.txt", "a.txt"]
    for source in ("nowhere", f"{tmp_path}/*.none", ","):
        with pytest.raises(DataFormatError):
            documents.find_files(source)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("wiki", WIKI[:-8].encode(), "ends within a document"),
        ("wiki", WIKI.encode() + b"more", "line 11: text outside <doc>"),
        ("x.gz", gzip.compress(b"text " * 9999)[:-9], "damaged"),
        ("x.gz", b"no gzip", "damaged"),
        ("x.txt", b"caf\xe9 au lait", "not UTF-8"),
        ("x.tar", b"no tar", "damaged"),
    ],
)
def test_damaged_text(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match=said):
        _read([path])


def test_python_text():
    found = list(documents.python_documents())
    assert len(found) > 50
    assert sum(len(p) for document in found for p in document) > 200_000


# -- tokens ----------------------------------------------------------------------------------------


def test_tokenizer_is_that_of_tf_models(vocab_file):
    tokenizer = records.Tokenizer(vocab_file, True, split_sentences=True)
    for text in (
        "The QUICK  brown-fox, wizards\u00a0watch\tdogs.",
        "th\u00e9 d\u00f2gs\u3000\u4e2dthe\u6587 fox\u0000es wiz\u200bards \x85 the\u0301",
        " ",
    ):
        assert tokenizer.tokenize(text) == tokenizer.full.tokenize(text)
    sentences = tokenizer.document(["The fox jumps. The dogs watch.", "\u200b", "Play"])
    assert sentences == [["the", "fox", "jumps", "."], ["the", "dogs", "watch", "."], ["play"]]
    whole = records.Tokenizer(vocab_file, True, split_sentences=False)
    assert len(whole.document(["The fox jumps. The dogs watch."])) == 1


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (VOCABULARY[1:], r"lacks \[PAD\]"),
        ([*VOCABULARY[1:], "[PAD]"], "must be first"),
        ([*VOCABULARY, "the"], "twice"),
    ],
)
def test_vocabularies_that_cannot_be(tmp_path, entries, said):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(entries))
    with pytest.raises(DataFormatError, match=said):
        records.read_vocabulary(path)


# -- pretraining records ---------------------------------------------------------------------------


def _load(pattern, **kwargs):
    """All examples, by tf-models' own loader."""
    from official.nlp.data import pretrain_dataloader

    config = pretrain_dataloader.BertPretrainDataConfig(
        input_path=str(pattern), global_batch_size=1, is_training=False, drop_remainder=False,
        seq_length=32, max_predictions_per_seq=5, **kwargs,
    )  # fmt: skip
    batches = pretrain_dataloader.BertPretrainDataLoader(config).load()
    return [{name: value.numpy()[0] for name, value in batch.items()} for batch in batches]


def _check_example(example):
    ids, mask, types = (
        example[name] for name in ("input_word_ids", "input_mask", "input_type_ids")
    )
    length = mask.sum()
    assert np.all(mask[:length] == 1)
    assert np.all(ids[length:] == 0)
    assert VOCABULARY[ids[0]] == "[CLS]"
    separators = np.flatnonzero(ids[:length] == VOCABULARY.index("[SEP]"))
    assert types[: separators[0] + 1].max() == 0
    assert separators[-1] == length - 1
    number = int(example["masked_lm_weights"].sum())
    positions = example["masked_lm_positions"]
    assert 1 <= number <= 5
    assert np.all(np.diff(positions[:number]) > 0)
    assert positions.max() < length - 1
    labels = example["masked_lm_ids"][:number]
    assert labels.min() >= len(records.SPECIAL_TOKENS)
    assert np.all(example["masked_lm_ids"][number:] == 0)
    return np.mean(ids[positions[:number]] == VOCABULARY.index("[MASK]"))


def test_prepared_data_is_what_the_loader_reads(prepared):
    record = json.loads((prepared / "dataset.json").read_text())
    found = _load(prepared / "train*")
    assert len(found) == record["splits"]["train"]["examples"]
    assert len(list(prepared.glob("train-*"))) == record["splits"]["train"]["files"] == 5
    assert len(_load(prepared / "validation*")) == record["splits"]["validation"]["examples"]
    assert record["splits"]["train"]["documents"] == 32
    assert record["splits"]["validation"]["documents"] == 8
    assert record["vocab_size"] == len(VOCABULARY)
    assert 0.7 < np.mean([_check_example(example) for example in found]) < 0.9
    assert 0.3 < np.mean([example["next_sentence_labels"] for example in found]) < 0.75


def test_a_test_split(prepared, tmp_path, vocab_file):
    """It takes its documents evenly beside the validation split's; nothing is in two splits."""
    source = _text(tmp_path / "in")
    out = tmp_path / "out"
    arguments = [f"--source={source}", f"--vocab_file={vocab_file}", *LENGTHS]
    arguments += ["--validation_fraction=0.2", "--test_fraction=0.1", f"--output_dir={out}"]
    assert _prepare(*arguments) == 0
    splits = json.loads((out / "dataset.json").read_text())["splits"]
    assert {name: split["documents"] for name, split in splits.items()} == {
        "train": 28,
        "validation": 8,
        "test": 4,
    }
    whole = json.loads((prepared / "dataset.json").read_text())["splits"]
    assert sum(split["tokens"] for split in splits.values()) == sum(
        split["tokens"] for split in whole.values()
    )
    assert len(_load(out / "test*")) == splits["test"]["examples"] > 0


def test_masked_tokens_are_of_the_text(tmp_path, vocab_file):
    """Every token of a one-sentence-a-document text, put back, makes a sentence of it."""
    source = tmp_path / "text"
    source.write_text("\n\n".join(" ".join(WORDS[i : i + 5]) for i in range(8)))
    out = tmp_path / "out"
    arguments = [f"--source={source}", f"--vocab_file={vocab_file}", *LENGTHS]
    assert _prepare(*arguments, "--validation_fraction=0", f"--output_dir={out}") == 0
    assert not list(out.glob("validation*"))
    sentences = {" ".join(WORDS[i : i + 5]) for i in range(8)}
    for example in _load(out / "train*"):
        ids = example["input_word_ids"].copy()
        number = int(example["masked_lm_weights"].sum())
        ids[example["masked_lm_positions"][:number]] = example["masked_lm_ids"][:number]
        text = " ".join(VOCABULARY[i] for i in ids[: example["input_mask"].sum()])
        first, second = re.fullmatch(r"\[CLS\] (.*) \[SEP\] (.*) \[SEP\]", text).groups()
        assert any(first in sentence for sentence in sentences)
        assert any(second in sentence for sentence in sentences)


def test_whole_words_are_masked(tmp_path, vocab_file):
    source = tmp_path / "text"
    source.write_text("\n\n".join(["dog wizards dogs the\nthe wizards fox"] * 20))
    entries = [entry for entry in VOCABULARY if entry not in ("wizards", "dogs")]
    pieces = tmp_path / "vocab.txt"
    pieces.write_text("\n".join(entries))
    out = tmp_path / "out"
    arguments = [f"--source={source}", f"--vocab_file={pieces}", *LENGTHS, "--whole_word_mask"]
    arguments += ["--masked_lm_prob=0.4", "--validation_fraction=0"]
    assert _prepare(*arguments, f"--output_dir={out}") == 0
    seen = 0
    for example in _load(out / "train*"):
        number = int(example["masked_lm_weights"].sum())
        masked = dict(
            zip(
                example["masked_lm_positions"][:number],
                [entries[i] for i in example["masked_lm_ids"][:number]],
                strict=True,
            )
        )
        for position, piece in masked.items():
            if piece == "wiz":
                assert masked[position + 1] == "##ards"
                seen += 1
            if piece.startswith("##"):
                assert position - 1 in masked
    assert seen


def test_seeds(tmp_path, vocab_file):
    source = _text(tmp_path / "in", 10)
    found = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = [f"--source={source}", f"--vocab_file={vocab_file}", *LENGTHS]
        out = tmp_path / name
        assert _prepare(*arguments, f"--seed={seed}", "--validation_fraction=0.2",
                        f"--output_dir={out}") == 0  # fmt: skip
        found[name] = [path.read_bytes() for path in sorted(out.glob("train*"))]
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]


def test_blocks(tmp_path, vocab_file, monkeypatch):
    """Text that does not fit into a block is all written."""
    source = _text(tmp_path / "in", 40)
    monkeypatch.setattr(records, "BLOCK_TOKENS", 200)
    out = tmp_path / "out"
    arguments = [f"--source={source}", f"--vocab_file={vocab_file}", *LENGTHS, "--dupe_factor=1"]
    assert _prepare(*arguments, "--validation_fraction=0", f"--output_dir={out}") == 0
    record = json.loads((out / "dataset.json").read_text())["splits"]["train"]
    assert record["documents"] == 40
    assert record["files"] > 5
    assert len(_load(out / "train*")) == record["examples"]
    assert {path.name.split("-of-")[1] for path in out.glob("train*")} == {f"{record['files']:05d}"}


def test_vocabulary_is_learned(tmp_path):
    source = _text(tmp_path / "in", 40)
    out = tmp_path / "out"
    arguments = [f"--source={source}", "--vocab_size=200", *LENGTHS]
    assert _prepare(*arguments, f"--output_dir={out}") == 0
    entries = records.read_vocabulary(out / "vocab.txt")
    assert {"the", "wizards", "."} < set(entries)
    assert "[UNK]" in entries


def test_mistakes_in_preparation(tmp_path, vocab_file, capsys):
    text = _text(tmp_path / "in", 4)
    broken = tmp_path / "broken.gz"
    broken.write_bytes(b"\x1f\x8b\x08 no")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    one = tmp_path / "one.txt"
    one.write_text(text.read_text().replace("\n\n", "\n"))
    new = tmp_path / "new"
    vocabulary = f"--vocab_file={vocab_file}"
    for arguments, said in (
        (["--source=nowhere"], "--source: expected data that can be used, received 'nowhere'"),
        ([f"--source={broken}", vocabulary], "is damaged"),
        ([f"--source={empty}", vocabulary], "there is no text"),
        ([f"--source={empty}"], "there is no text"),
        ([f"--source={text}", vocabulary, "--validation_fraction=0.1"], "hold out one of 4"),
        (
            [f"--source={text}", vocabulary, "--validation_fraction=0", "--test_fraction=0.1"],
            "--test_fraction: expected 0, or enough to hold out one of 4 documents",
        ),
        (
            ["--validation_fraction=0.5", "--test_fraction=0.5"],
            "--test_fraction: expected less than 1 with --validation_fraction",
        ),
        ([f"--squad_train={text}", vocabulary, "--test_fraction=0.1"], "0 with --squad_train"),
        ([f"--source={text}", f"--vocab_file={text}"], "--vocab_file: expected data"),
        (["--vocab_file=nowhere"], "--vocab_file: expected a file that exists"),
        (["--format=pdf"], "--format: expected one of plain"),
        (["--max_seq_length=4"], "--max_seq_length: expected an integer from 8"),
        (["--max_seq_length=16", "--max_predictions_per_seq=17"], "at most --max_seq_length=16"),
        ([f"--squad_train={text}"], "--vocab_file: expected that of the pretrained model"),
        ([f"--squad_train={text}", vocabulary], "no SQuAD JSON"),
        ([f"--squad_dev={text}"], "--squad_train: expected a file"),
        (
            [f"--squad_train={text}", f"--squad_dev={text}", vocabulary],
            "--squad_dev: expected another file than --squad_train",
        ),
        ([f"--source={one}", vocabulary], "one document, of which none can be held out: plain"),
        ([f"--squad_train={text}", f"--source={text}"], "no value together with --squad_train"),
        (["--nonsense"], "--nonsense: expected one of the flags"),
    ):
        assert _prepare(*arguments, f"--output_dir={new}") == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert said in error[0]
        assert not new.exists()
        assert not (tmp_path / ".new.partial").exists()
    assert _prepare(f"--source={text}", f"--output_dir={text.parent}") == 2
    assert "--output_dir: expected a folder that is empty" in capsys.readouterr().err
    assert _prepare(f"--source={text}") == 2
    assert "--output_dir: expected a path" in capsys.readouterr().err
    assert _prepare("--help") == 0
    assert "whole_word_mask" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_preparation_leaves_nothing_that_looks_whole(tmp_path, vocab_file, number):
    source = _text(tmp_path / "in", 200)
    out = tmp_path / "out"
    arguments = [f"--source={source}", f"--vocab_file={vocab_file}", *LENGTHS]
    interrupt_preparation("bert", [*arguments, "--dupe_factor=100000"], out, number, 300)
    assert _prepare(*arguments, f"--output_dir={out}", "--dupe_factor=1") == 0
    assert not (tmp_path / ".out.partial").exists()


def test_real_wikipedia(shared_data):
    files = documents.find_files(str(shared_data / "wikipedia-sample"))
    found = _read(files)
    assert len(found) == 153
    assert 600_000 < sum(len(p.split()) for document in found for p in document) < 700_000


def test_real_books(shared_data):
    done = []
    file = shared_data / "gutenberg" / "gutenberg_books.tar.xz"
    reader = documents.read_documents([file], None, done.append)
    for _, book in zip(range(3), reader, strict=False):
        assert sum(len(p.split()) for p in book) > 20_000
        assert not any("PROJECT GUTENBERG EBOOK" in p for p in (book[0], book[-1]))
    assert 0 < done[0] <= file.stat().st_size


# -- SQuAD -----------------------------------------------------------------------------------------


def _squad(folder, paragraphs=10):
    """Paragraphs that begin with a number; the question is for the word after "fox"."""
    rng = np.random.default_rng(0)
    articles = []
    for i in range(paragraphs):
        # Without "the", which the metrics leave out of answers.
        words = [str(w) for w in rng.choice([w for w in WORDS if w not in ("the", "fox")], 30)]
        words[12] = "fox"
        context = " ".join(words)
        begin = context.index("fox ") + 4
        answer = {"text": words[13], "answer_start": begin}
        question = {"id": f"q{i}", "question": "Who watch the fox?", "answers": [answer]}
        articles.append({"title": str(i), "paragraphs": [{"context": context, "qas": [question]}]})
    file = folder / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": articles}))
    return file


SQUAD_LENGTHS = ("--max_seq_length=48", "--doc_stride=16", "--max_query_length=8")


def test_squad(tmp_path, vocab_file):
    file = _squad(tmp_path)
    out = tmp_path / "out"
    arguments = [f"--squad_train={file}", f"--vocab_file={vocab_file}", *SQUAD_LENGTHS]
    assert _prepare(*arguments, "--validation_fraction=0.3", f"--output_dir={out}") == 0
    record = json.loads((out / "dataset.json").read_text())
    assert record["splits"]["dev"] == {
        "paragraphs": 3,
        "questions": 3,
        "unanswerable": 0,
    }
    assert record["splits"]["train"]["questions_used"] == 7
    parts = [squad.read_articles(out / name) for name in ("train.json", "dev.json")]
    contexts = [{p["context"] for a in part for p in a["paragraphs"]} for part in parts]
    assert [len(part) for part in contexts] == [7, 3]
    assert not contexts[0] & contexts[1]
    from official.nlp.data import question_answering_dataloader

    config = question_answering_dataloader.QADataConfig(
        input_path=str(out / "train.tf_record"), global_batch_size=1, is_training=False,
        drop_remainder=False, seq_length=48,
    )  # fmt: skip
    config.is_training = True
    reader = question_answering_dataloader.QuestionAnsweringDataLoader(config)
    found = 0
    for raw in tf.data.TFRecordDataset(config.input_path):
        features, labels = reader._parse(reader._decode(raw))
        begin, end = int(labels["start_positions"]), int(labels["end_positions"])
        ids = features["input_word_ids"].numpy()
        if begin:
            found += 1
            assert begin == end
            assert VOCABULARY[ids[begin - 1]] == "fox"
            assert features["input_type_ids"][begin] == 1
    assert found >= 7


def test_squad_with_files_of_its_own(tmp_path, vocab_file):
    file = _squad(tmp_path)
    out = tmp_path / "out"
    dev = shutil.copy(file, tmp_path / "dev.json")
    arguments = [f"--squad_train={file}", f"--squad_dev={dev}", f"--vocab_file={vocab_file}"]
    assert _prepare(*arguments, *SQUAD_LENGTHS, f"--output_dir={out}") == 0
    assert len(squad.read_articles(out / "dev.json")) == 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p, q: q["answers"].clear(), "no answer, without is_impossible"),
        (lambda p, q: q["answers"][0].update(answer_start=1), "is not where its answer_start"),
        (lambda p, q: q["answers"][0].update(answer_start=-3), "is not where its answer_start"),
        (lambda p, q: q["answers"][0].update(text="", answer_start=0), "an empty answer"),
        (lambda p, q: p.update(context=" "), "an empty context"),
        (lambda p, q: (p.update(context=""), q.update(is_impossible=True)), "an empty context"),
        (lambda p, q: q.pop("answers"), "no SQuAD JSON"),
        (lambda p, q: q.pop("question"), "no SQuAD JSON"),
    ],
)
def test_squad_that_is_none(tmp_path, change, said):
    file = _changed_squad(tmp_path, change)
    with pytest.raises(DataFormatError, match=said) as error:
        squad.read_articles(file)
    assert str(file) in str(error.value)
    if "JSON" not in said:
        skipped = collections.Counter()
        assert len(squad.read_articles(file, skipped)) == 9
        assert [(said in reason, n) for reason, n in skipped.items()] == [(True, 1)]


def _changed_squad(folder, change):
    file = _squad(folder)
    content = json.loads(file.read_text())
    (paragraph,) = content["data"][0]["paragraphs"]
    change(paragraph, paragraph["qas"][0])
    file.write_text(json.dumps(content))
    return file


def test_bad_answers_are_left_out_and_counted(tmp_path, vocab_file, capsys):
    """A question stays where it has another answer; one that tf-models drops is counted too."""

    def change(paragraph, question):
        more = {**question, "id": "two", "answers": [{"text": "", "answer_start": 0}]}
        good = {"text": "fox", "answer_start": paragraph["context"].index("fox")}
        question["answers"] = [{"text": "fox", "answer_start": 1}, good]
        # tf-models splits at other spaces than Python.
        paragraph["context"] += " quick\u00a0fox"
        text = "quick\u00a0fox"
        begin = paragraph["context"].index(text)
        lost = {**question, "id": "lost", "answers": [{"text": text, "answer_start": begin}]}
        paragraph["qas"] += [more, lost]

    file = _changed_squad(tmp_path, change)
    arguments = [f"--squad_train={file}", f"--vocab_file={vocab_file}", *SQUAD_LENGTHS]
    out = tmp_path / "out"
    (tmp_path / "dev").mkdir()
    arguments += [f"--squad_dev={_squad(tmp_path / 'dev')}", f"--output_dir={out}"]
    assert _prepare(*arguments) == 2
    assert "--squad_train: expected data that can be used" in capsys.readouterr().err
    assert not out.exists()
    assert _prepare(*arguments, "--skip_bad_answers") == 0
    errors = capsys.readouterr().err
    assert "unused questions: 1 with an empty answer" in errors
    record = json.loads((out / "dataset.json").read_text())
    assert "unused questions: 1 with an answer that is not in the words" in errors
    assert record["splits"]["train"]["questions"] == 11
    assert record["splits"]["train"]["questions_used"] == 10
    assert sorted(record["unused_questions"].values()) == [1, 1]


def test_squad_2_without_answers_to_evaluate(tmp_path, vocab_file):
    articles = squad.read_articles(_squad(tmp_path))
    none = squad.read_articles(_changed_squad(tmp_path, lambda p, q: q.update(is_impossible=True)))
    settings = squad.Settings(48, 16, 8, True)
    with pytest.raises(DataFormatError, match="no question to evaluate on has an answer"):
        squad.write(articles, none[:1], vocab_file, tmp_path, settings)


def test_squad_2(tmp_path, vocab_file, capsys):
    """Unanswerable questions point at [CLS]; the training asks for tf-models' metric of v2.0."""
    content = json.loads(_squad(tmp_path).read_text())
    for article in content["data"]:
        (paragraph,) = article["paragraphs"]
        (question,) = paragraph["qas"]
        none = {"id": question["id"] + "n", "question": "Who?", "is_impossible": True}
        plausible = {"plausible_answers": question["answers"], "answers": []}
        paragraph["qas"] = [{**question, "is_impossible": False}, {**none, **plausible}]
    file = tmp_path / "v2.json"
    file.write_text(json.dumps(content))
    out = tmp_path / "out"
    arguments = [f"--squad_train={file}", f"--vocab_file={vocab_file}", *SQUAD_LENGTHS]
    assert _prepare(*arguments, "--validation_fraction=0.3", f"--output_dir={out}") == 0
    record = json.loads((out / "dataset.json").read_text())
    assert record["version_2_with_negative"] is True
    assert record["splits"]["train"]["unanswerable"] == 7
    assert record["splits"]["train"]["questions_used"] == 14
    assert record["unused_questions"] == {}
    impossible = 0
    for raw in tf.data.TFRecordDataset(str(out / "train.tf_record")):
        feature = tf.train.Example.FromString(raw.numpy()).features.feature
        if feature["is_impossible"].int64_list.value[0]:
            impossible += 1
            assert feature["start_positions"].int64_list.value[0] == 0
            assert feature["end_positions"].int64_list.value[0] == 0
    assert impossible >= 7
    override = {
        "task.validation_data.input_path": out / "dev.json",
        "task.validation_data.vocab_file": out / "vocab.txt",
        "task.validation_data.seq_length": 48,
    }
    override = ",".join(f"{name}={value}" for name, value in override.items())
    capsys.readouterr()
    run = [f"--model_dir={tmp_path}", "--mode=eval", "--experiment=large_batch_squad"]
    assert train.main(["train", *run, f"--params_override={override}"]) == 2
    said = "task.validation_data.version_2_with_negative: True as in"
    assert said in capsys.readouterr().err


def test_real_squad(shared_data):
    articles = squad.read_articles(shared_data / "qa" / "xquad.en.json")
    train_part, dev = squad.hold_out_paragraphs(articles, 0.2, seed=1)
    assert squad._count(train_part)["paragraphs"] == 192
    assert squad._count(dev)["paragraphs"] == 48
    assert squad._count(train_part)["questions"] + squad._count(dev)["questions"] == 1190


# -- configurations --------------------------------------------------------------------------------


def _params(*files, experiment=train.EXPERIMENT, override=None):
    train._register()
    options = tfm_training.Options(
        experiment=experiment,
        config_file=tuple(str(file) for file in files),
        params_override=override,
        mode="train_and_eval",
        model_dir="unused",
        tpu=None,
        cpu_replicas=None,
        sub_batches=None,
    )
    return tfm_training.parse_params(options), options


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_are_consistent(file):
    from official.core import task_factory, train_utils
    from official.modeling import optimization

    experiment = "large_batch_squad" if "squad" in file.stem else train.EXPERIMENT
    params, _ = _params(file, experiment=experiment)
    trainer, schedule = params.trainer, params.trainer.optimizer_config
    params.task.validation_data.input_path = ""  # else the question answering task reads it
    train_utils.create_optimizer(task_factory.get_task(params.task), params)
    rate = optimization.OptimizerFactory(schedule).build_learning_rate()
    warmup = schedule.warmup.get().warmup_steps
    peak = schedule.learning_rate.get().initial_learning_rate
    rates = [float(rate(step)) for step in (0, 1, warmup, warmup + 1, trainer.train_steps)]
    assert 0 == rates[0] < rates[1]
    assert rates[2] == pytest.approx(peak)
    assert 0.8 * peak < rates[3] < peak
    assert rates[4] == pytest.approx(0, abs=1e-7)
    assert trainer.summary_interval % trainer.steps_per_loop == 0
    for data in (params.task.train_data, params.task.validation_data):
        encoder = params.task.model.encoder.get()
        assert data.seq_length <= encoder.max_position_embeddings
    if experiment == train.EXPERIMENT:
        assert params.task.scale_loss
        assert params.task.model.cls_heads[0].inner_dim == encoder.hidden_size


@pytest.mark.parametrize(
    "names", [("large_batch_bert", "bert/pretraining"), ("large_batch_squad", "bert/squad")]
)
def test_deviations_from_tf_models(names):
    train._register()
    assert_deviations_are_in_the_readme(*names, "bert")


def test_configurations_of_the_paper():
    stems = {file.stem for file in CONFIGS}
    for key, total in STEPS.items():
        batches = [1024 * int(part.removesuffix("k")) for part in key.split("_")]
        phases = []
        for phase, batch in ((1, batches[0]), (2, batches[-1])):
            stem = f"vrgd_{key}_phase{phase}"
            assert stem in stems
            file = next(file for file in CONFIGS if file.stem == stem)
            params, _ = _params(file)
            length = params.task.train_data.seq_length
            assert length == (128, 512)[phase - 1]
            assert params.task.train_data.global_batch_size == batch
            assert bool(params.task.init_checkpoint) == (phase == 2)
            peak = params.trainer.optimizer_config.learning_rate.get().initial_learning_rate
            known = (6e-3, 65536) if phase == 1 else (4e-3, 32768)
            assert peak == pytest.approx(known[0] * (batch / known[1]) ** 0.5, rel=1e-3)
            phases.append((params.trainer.train_steps, batch))
        assert sum(steps for steps, _ in phases) == total
        sequences = [steps * batch for steps, batch in phases]
        assert sequences[0] / sum(sequences) == pytest.approx(0.9, abs=2e-4)
        assert sum(sequences) == pytest.approx(500_000 * 1024, rel=2e-3)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, prepared):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    data = ",".join(
        f"task.{name}_data.input_path={prepared}/{name}*" for name in ("train", "validation")
    )
    return [
        f"--config_file={file}",
        f"--model_dir={tmp_path / 'model'}",
        f"--params_override={data}",
    ]


def _more(small, override):
    return [*small[:2], f"{small[2]},{override}"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.train_data.seq_length=16", "task.train_data.seq_length: 32 as in"),
        ("task.train_data.max_predictions_per_seq=4", "max_predictions_per_seq: 5 as in"),
        ("task.model.encoder.bert.vocab_size=8", "bert.vocab_size: at least"),
        ("task.model.encoder.bert.max_position_embeddings=16", "at most max_position_embeddings"),
        ("runtime.mixed_precision_dtype=float16", "does not scale its loss"),
        ("task.init_checkpoint=nowhere", "a checkpoint, or a run's model_dir, received 'nowhere'"),
        ("task.train_data.input_path=no/train*", "which matches no file"),
        ("trainer.optimizer_config.optimizer.vr_lamb.gamma=7", "`gamma` must"),
        ("trainer.train_steps=4", "at least 2 sub-batches"),
    ],
)
def test_mistakes_end_in_one_line(small, override, said, capsys, monkeypatch):
    monkeypatch.setattr(tfm_training, "_strategy", lambda *_: tf.distribute.get_strategy())
    parts = ["--sub_batches=2"] if "gamma" in override else []
    assert train.main(["train", *_more(small, override), *parts]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]


def test_squad_without_vocabulary(tmp_path, capsys):
    file = _squad(tmp_path)
    override = f"task.train_data.input_path={file},task.validation_data.input_path={file}"
    arguments = ["--experiment=large_batch_squad", f"--model_dir={tmp_path / 'model'}"]
    assert train.main(["train", *arguments, f"--params_override={override}"]) == 2
    assert "task.validation_data.vocab_file: expected" not in (said := capsys.readouterr().err)
    assert "task.validation_data.vocab_file: a file that exists" in said


# -- the tasks -------------------------------------------------------------------------------------


def _task(tmp_path, init_checkpoint=""):
    from official.core import task_factory

    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    params, _ = _params(file)
    params.task.init_checkpoint = str(init_checkpoint)
    return task_factory.get_task(params.task)


def test_phase_2_starts_with_all_weights_of_phase_1(tmp_path):
    first, second = _task(tmp_path).build_model(), _task(tmp_path).build_model()
    rng = np.random.default_rng(0)
    first.set_weights([rng.normal(size=w.shape).astype("float32") for w in first.get_weights()])
    assert len(first.get_weights()) > 25
    path = tf.train.Checkpoint(model=first, **first.checkpoint_items).save(str(tmp_path / "ckpt"))
    for given in (path, tmp_path):
        second.set_weights([0 * w for w in second.get_weights()])
        _task(tmp_path, given).initialize(second)
        for one, two in zip(first.get_weights(), second.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)


def test_an_encoder_alone_is_taken(tmp_path):
    first, second = _task(tmp_path).build_model(), _task(tmp_path).build_model()
    path = tf.train.Checkpoint(**first.checkpoint_items).save(str(tmp_path / "ckpt"))
    _task(tmp_path, path).initialize(second)
    for one, two in zip(
        first.encoder_network.get_weights(), second.encoder_network.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = _task(tmp_path).build_model()
    other = tf.train.Checkpoint(model=tf.train.Checkpoint(x=tf.Variable(1.0)))
    path = other.save(str(tmp_path / "other"))
    with pytest.raises(FlagValueError, match="a checkpoint of the same model"):
        _task(tmp_path, path).initialize(model)


def _batch(number, rng):
    return {
        "input_word_ids": tf.constant(rng.integers(5, 20, (number, 32)), tf.int32),
        "input_mask": tf.ones((number, 32), tf.int32),
        "input_type_ids": tf.zeros((number, 32), tf.int32),
        "masked_lm_positions": tf.constant(rng.integers(1, 30, (number, 5)), tf.int32),
        "masked_lm_ids": tf.constant(rng.integers(5, 20, (number, 5)), tf.int32),
        "masked_lm_weights": tf.constant(rng.integers(0, 2, (number, 5)), tf.float32),
        "next_sentence_labels": tf.constant(rng.integers(0, 2, (number, 1)), tf.int32),
    }


def test_validation_weighs_examples_not_batches(tmp_path):
    """Whatever the batches, empty ones too, the metrics are those of all examples at once."""
    task = _task(tmp_path)
    model = task.build_model()
    rng = np.random.default_rng(0)
    whole = _batch(12, rng)
    results = []
    for sizes in ([12], [5, 5, 2, 0]):
        metrics = task.build_metrics(training=False)
        begin = 0
        for size in sizes:
            part = {name: value[begin : begin + size] for name, value in whole.items()}
            assert task.validation_step(part, model, metrics) == {}
            begin += size
        results.append({metric.name: float(metric.result()) for metric in metrics})
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    outputs = model(whole, training=False)
    picked = tf.gather(tf.nn.log_softmax(outputs["mlm_logits"]), whole["masked_lm_ids"],
                       axis=2, batch_dims=2)  # fmt: skip
    weights = whole["masked_lm_weights"].numpy()
    expected = -(picked.numpy() * weights).sum() / weights.sum()
    assert results[0]["lm_example_loss"] == pytest.approx(expected, rel=1e-5)
    assert results[0]["validation_loss"] == pytest.approx(
        results[0]["lm_example_loss"] + results[0]["next_sentence_loss"], rel=1e-5
    )
    assert "validation_loss" not in [metric.name for metric in task.build_metrics(training=True)]


def test_what_does_not_decay(tmp_path):
    """Biases and normalization, and nothing else, are without weight decay."""
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    params, _ = _params(file)
    patterns = params.trainer.optimizer_config.optimizer.vr_lamb.exclude_from_weight_decay
    model = _task(tmp_path).build_model()
    for variable in model.trainable_variables:
        excluded = any(re.search(pattern, variable.name) for pattern in patterns)
        assert excluded == (len(variable.shape) == 1 or variable.name.endswith("bias:0"))


# -- training --------------------------------------------------------------------------------------


def _command(*arguments):
    return [
        *[*python(), "-m", "official_recipes.bert.train"],
        *["--cpu_replicas=2", *(str(a) for a in arguments)],
    ]


def _run(*arguments):
    return subprocess.run(_command(*arguments), cwd=ROOT, capture_output=True, text=True)


def _kind(kind):
    return f"trainer.optimizer_config.optimizer.type={kind}"


def test_training(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(replicas, "_strategy", strategy_of(2))
    assert train.main(["train", *_more(small, _kind("lbopt_lamb")), "--cpu_replicas=2"]) == 0
    printed = capsys.readouterr().out
    assert "eval | step:      4" in printed
    assert "nan" not in printed
    summary = json.loads((tmp_path / "model" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert 0 < summary["metrics"]["lm_example_loss"] < 5
    path, state = last_checkpoint(tmp_path / "model")
    assert path.endswith("ckpt-4")
    assert any("optimizer" in name and np.any(v) for name, v in state.items() if np.ndim(v) == 2)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["vr_lamb", "vr_adam", "adamw", "lamb"])
def test_every_optimizer_trains(small, kind):
    result = _run(*_more(small, _kind(kind)), "--sub_batches=2")
    assert result.returncode == 0, result.stderr
    assert "eval | step:      4" in result.stdout
    assert "nan" not in result.stdout


@pytest.mark.long
def test_killed_run_goes_on_with_all_its_state(small, tmp_path):
    endless = _more(small, "trainer.train_steps=100000")
    code, _, errors = signal_when(
        _command(*endless, "--mode=train"), "saved checkpoint", signal.SIGKILL
    )
    assert code == -signal.SIGKILL, errors
    path, before = last_checkpoint(tmp_path / "model")
    step = int(path.rsplit("-", 1)[1])
    result = _run(*_more(small, f"trainer.train_steps={step}"), "--mode=train")
    assert result.returncode == 0, result.stderr
    assert f"restored from checkpoint: {path}" in result.stdout
    _, after = last_checkpoint(tmp_path / "model")
    assert_same_state(after, before)


@pytest.mark.long
def test_exports_and_predictions(small, tmp_path):
    """Ids to logits, and masked tokens to a file."""
    model = _task(tmp_path).build_model()
    tf.train.Checkpoint(model=model).save(str(tmp_path / "model" / "ckpt"))
    export_dir, written = tmp_path / "export", tmp_path / "predictions"
    assert train.main(["train", *small, "--mode=export", f"--export_dir={export_dir}"]) == 0
    assert train.main(["train", *small, "--mode=predict", f"--predictions={written}"]) == 0
    shown = {"input_word_ids": [[2, 5, 7, 3, 0]], "input_mask": [[1, 1, 1, 1, 0]]}
    shown |= {"input_type_ids": [[0] * 5], "masked_lm_positions": [[1, 2]]}
    inputs = {name: tf.constant(value) for name, value in shown.items()}
    signatures = tf.saved_model.load(str(export_dir)).signatures
    found, expected = signatures["serving_default"](**inputs), model(inputs, training=False)
    assert set(found) == {"mlm_logits", "next_sentence"}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)
    assert (export_dir / "vocab.txt").read_text().startswith("[PAD]\n")
    lines = [line.split("\t") for line in written.read_text().splitlines()]
    assert lines[0] == ["id", "prediction", "log_probability"]
    assert len(lines) > 10
    assert all(float(line[2]) < 0 for line in lines[1:])


@pytest.mark.long
def test_squad_exports_and_predictions(tmp_path, vocab_file):
    """Questions and contexts as text: their ids, and the logits of the model."""
    pytest.importorskip("tensorflow_text")
    from official.core import task_factory

    file = _squad(tmp_path, 2)
    fields = {
        "task": {
            "model": {"encoder": MODEL["encoder"]},
            "validation_data": {
                "input_path": str(file),
                "vocab_file": str(vocab_file),
                "seq_length": 48,
                "doc_stride": 16,
                "query_length": 4,
                "global_batch_size": 4,
            },
        }
    }
    config = tmp_path / "squad.yaml"
    config.write_text(json.dumps(fields))
    params, _ = _params(config, experiment="large_batch_squad")
    params.task.validation_data.input_preprocessed_data_path = str(tmp_path)
    model = task_factory.get_task(params.task).build_model()
    tf.train.Checkpoint(model=model).save(str(tmp_path / "model" / "ckpt"))
    command = ["train", "--experiment=large_batch_squad", f"--config_file={config}"]
    command += [f"--model_dir={tmp_path / 'model'}"]
    export_dir, written = tmp_path / "export", tmp_path / "answers.json"
    assert train.main([*command, "--mode=export", f"--export_dir={export_dir}"]) == 0
    assert train.main([*command, "--mode=predict", f"--predictions={written}"]) == 0
    assert sorted(json.loads(written.read_text())) == ["q0", "q1"]
    vocabulary = (export_dir / "vocab.txt").read_text().splitlines()
    questions = ["Who watch the fox over dogs?", "fox"]
    contexts = ["The quick brown fox.", "seven " * 90]
    signatures = tf.saved_model.load(str(export_dir)).signatures
    found = signatures["text"](question=tf.constant(questions), context=tf.constant(contexts))
    texts = [
        "[CLS] [UNK] watch the fox [SEP] the quick brown fox . [SEP]",
        "[CLS] fox [SEP] " + "seven " * 41 + "[SEP]",
    ]
    ids = np.zeros((2, 48), np.int32)
    types = np.zeros((2, 48), np.int32)
    for row, text in enumerate(texts):
        tokens = [vocabulary.index(token) for token in text.split()]
        ids[row, : len(tokens)] = tokens
        types[row, tokens.index(vocabulary.index("[SEP]")) + 1 : len(tokens)] = 1
    np.testing.assert_array_equal(found["input_word_ids"], ids)
    inputs = {"input_word_ids": ids, "input_mask": np.int32(ids != 0), "input_type_ids": types}
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    by_ids = signatures["serving_default"](**inputs)
    expected = model(inputs, training=False)
    for name, value in zip(("start_logits", "end_logits"), expected, strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(by_ids[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_two_phases_and_squad(small, tmp_path, vocab_file):
    """Phase 1, phase 2 from it at twice the length, and fine-tuning from that, which learns."""
    one = tmp_path / "model"
    assert _run(*_more(small, _kind("lbopt_lamb"))).returncode == 0
    data = tmp_path / "long"
    arguments = [f"--source={_text(tmp_path / 'in')}", f"--vocab_file={vocab_file}"]
    arguments += ["--max_seq_length=64", "--max_predictions_per_seq=10", f"--output_dir={data}"]
    assert _prepare(*arguments, "--validation_fraction=0.2") == 0
    two = tmp_path / "two"
    override = [f"task.init_checkpoint={one}", _kind("lbopt_lamb"), "trainer.train_steps=2"]
    for name in ("train", "validation"):
        part = f"task.{name}_data"
        override += [f"{part}.input_path={data}/{name}*", f"{part}.seq_length=64"]
        override += [f"{part}.max_predictions_per_seq=10"]
    result = _run(small[0], f"--model_dir={two}", f"--params_override={','.join(override)}")
    assert result.returncode == 0, result.stderr
    assert f"initialized from checkpoint: {one}/ckpt-4" in result.stdout

    out = tmp_path / "squad"
    arguments = [f"--squad_train={_squad(tmp_path, 120)}", f"--vocab_file={vocab_file}"]
    assert _prepare(*arguments, *SQUAD_LENGTHS, f"--output_dir={out}") == 0
    file = tmp_path / "squad.yaml"
    model = {"encoder": MODEL["encoder"]}
    file.write_text(
        json.dumps(
            {
                "task": {
                    "init_checkpoint": str(two),
                    "model": model,
                    "train_data": {
                        "input_path": f"{out}/train.tf_record",
                        "seq_length": 48,
                        "global_batch_size": 16,
                    },
                    "validation_data": {
                        "input_path": f"{out}/dev.json",
                        "vocab_file": f"{out}/vocab.txt",
                        "seq_length": 48,
                        "global_batch_size": 4,
                    },
                },
                "trainer": {
                    "train_steps": 300,
                    "validation_interval": 300,
                    "optimizer_config": {
                        "learning_rate": {
                            "polynomial": {
                                "initial_learning_rate": 0.01,
                                "decay_steps": 280,
                                "offset": 20,
                            }
                        },
                        "warmup": {"linear": {"warmup_steps": 20}},
                    },
                },
            }
        )
    )
    result = _run(
        "--experiment=large_batch_squad", f"--config_file={file}", f"--model_dir={tmp_path / 'qa'}"
    )
    assert result.returncode == 0, result.stderr
    assert "initialized from checkpoint" in result.stdout
    metrics = json.loads((tmp_path / "qa" / "summary.json").read_text())["metrics"]
    assert metrics["final_f1"] == metrics["exact_match"]  # answers of one word
    assert metrics["final_f1"] > 0.5  # a word at random: below 0.1
