"""A folder of broken inputs: each ends the program that meets it in one line.

Quick ones are met in this process; `long` runs each program by itself, and those that fail late.
"""

import importlib
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from harness_recipes import SMALL_RESNET

from official_recipes.common import tfm_training
from official_recipes.common.data_format import DataFormatError
from official_recipes.common.files import read_json

pytestmark = pytest.mark.usefixtures("quick_configurations")

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "dog", "."]
CASES = {}


def case(program, said, *, late=False):
    """Registers what writes a broken input and returns the program's arguments.

    Args:
        program: Of the recipes, that meets it.
        said: What the line must have, besides the name of the file or flag; {} is the folder.
        late: Whether the program has built its model when it meets the input.
    """

    def register(make):
        CASES[make.__name__.strip("_")] = (program, said, late, make)
        return make

    return register


# -- images ----------------------------------------------------------------------------------------


def _jpeg(size=32):
    rng = np.random.default_rng(0)
    return tf.io.encode_jpeg(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).numpy()


def _tree(folder, *names):
    for name in names:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_jpeg())
    return folder / "images"


def _images(folder, *names):
    tree = _tree(folder, *names)
    return [f"--source={tree}", f"--output_dir={folder / 'new'}", "--validation_fraction=0.4"]


SPLITS = [f"train/{name}/{i}.jpg" for name in ("ant", "bee") for i in range(3)]


@case("resnet50.prepare_data", "bee/1.jpg is no image that can be decoded")
def _image_that_ends_early(folder):
    arguments = _images(folder, *SPLITS)
    file = folder / "images" / "train" / "bee" / "1.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    return arguments


@case(
    "resnet50.prepare_data",
    "--source: expected a folder or tar archive of images, received no images",
)
def _images_in_no_folder(folder):
    return _images(folder, "1.jpg", "2.jpg")


@case("resnet50.prepare_data", "--validation_labels")
def _validation_images_without_labels(folder):
    return _images(folder, *SPLITS, "val/ILSVRC2012_val_00000001.JPEG")


@case("resnet50.prepare_data", "labels.txt")
def _too_few_labels(folder):
    arguments = _images(folder, *SPLITS, "val/1.JPEG", "val/2.JPEG")
    (folder / "labels.txt").write_text("ant\n")
    return [*arguments[:2], f"--validation_labels={folder / 'labels.txt'}"]


@case("resnet50.prepare_data", "images.tar.gz is damaged")
def _archive_that_ends_early(folder):
    tree = _tree(folder, *SPLITS)
    file = folder / "images.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(tree, ".")
    file.write_bytes(file.read_bytes()[:-300])
    return [f"--source={file}", f"--output_dir={folder / 'new'}"]


def _resnet(folder, text=SMALL_RESNET, **override):
    (folder / "small.yaml").write_text(text)
    given = {"trainer.optimizer_config.optimizer.type": "sgd", **override}
    return [
        f"--config_file={folder / 'small.yaml'}",
        f"--model_dir={folder / 'model'}",
        "--params_override=" + ",".join(f"{name}={value}" for name, value in given.items()),
    ]


def _records(folder, label):
    features = {"image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[_jpeg()]))}
    if label is not None:
        value = tf.train.Int64List(value=[label])
        features["image/class/label"] = tf.train.Feature(int64_list=value)
    example = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
    file = folder / "records"
    with tf.io.TFRecordWriter(str(file)) as out:
        for _ in range(40):
            out.write(example)
    return file


@case("resnet50.train", "records, which is no TFRecord file or ends early", late=True)
def _records_that_end_early(folder):
    file = _records(folder, 1)
    file.write_bytes(file.read_bytes()[:-100])
    return _resnet(folder, **{"task.train_data.input_path": file})


@case("resnet50.train", "no label in image/class/label", late=True)
def _records_without_labels(folder):
    return _resnet(folder, **{"task.train_data.input_path": _records(folder, None)})


@case("resnet50.train", "label 4, not one from 0 to 3", late=True)
def _records_of_more_classes(folder):
    return _resnet(folder, **{"task.train_data.input_path": _records(folder, 4)})


@case("resnet50.train", "'modell' does not exist")
def _configuration_with_an_unknown_field(folder):
    return _resnet(folder, SMALL_RESNET.replace("model:", "modell:", 1))


@case("resnet50.train", "small.yaml")
def _configuration_that_is_no_yaml(folder):
    return _resnet(folder, "task: [")


@case("resnet50.train", "small.yaml")
def _configuration_that_is_no_text(folder):
    arguments = _resnet(folder)
    (folder / "small.yaml").write_bytes(b"\xff\xfe\x00\x01")
    return arguments


@case(
    "resnet50.train", "expected dataset.json as prepare_data.py writes it, received {}/dataset.json"
)
def _description_that_is_no_json(folder):
    arguments = _resnet(folder, **{"task.train_data.input_path": _records(folder, 1)})
    (folder / "dataset.json").write_text('{"classes": ')
    return arguments


@case("resnet50.train", "{}/other/ckpt-1", late=True)
def _checkpoint_that_ends_early(folder):
    path = tf.train.Checkpoint(model=tf.train.Checkpoint(x=tf.Variable(tf.ones([99])))).save(
        str(folder / "other" / "ckpt")
    )
    data = Path(f"{path}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:20])
    return _resnet(folder, **{"task.init_checkpoint": folder / "other"})


# -- clicks ----------------------------------------------------------------------------------------


def _row(**changes):
    fields = ["0", *map(str, range(13)), *(f"{i:08x}" for i in range(26))]
    for index, value in changes.items():
        fields[int(index[1:])] = value
    return "\t".join(fields) + "\n"


def _clicks(folder, *rows):
    (folder / "rows.tsv").write_text("".join(rows))
    return [f"--source={folder / 'rows.tsv'}", f"--output_dir={folder / 'new'}"]


@case("dlrm.prepare_data", "rows.tsv, line 2: expected 40 fields")
def _short_row(folder):
    return _clicks(folder, _row(), "0\t1\t2\n", _row())


@case("dlrm.prepare_data", "rows.tsv, line 3: expected 0 or 1 in field 1")
def _label_that_is_none(folder):
    return _clicks(folder, _row(), _row(), _row(f0="2"))


@case("dlrm.prepare_data", "rows.tsv, line 2: expected an integer in field 3")
def _integer_of_400_digits(folder):
    return _clicks(folder, _row(), _row(f2="1" * 400))


@case("dlrm.prepare_data", "--source has no rows")
def _empty_file(folder):
    return _clicks(folder)


@case("dlrm.prepare_data", "malformed")
def _nothing_but_malformed_rows(folder):
    return [*_clicks(folder, "a\n", "b\n"), "--skip_malformed"]


@case("dlrm.prepare_data", "--validation_source: expected")
def _one_file_for_both_splits(folder):
    arguments = _clicks(folder, *[_row()] * 9)
    return [*arguments, f"--validation_source={folder / 'rows.tsv'}"]


@case("dlrm.prepare_data", "rows.tsv, line 2")
def _clicks_that_are_no_text(folder):
    arguments = _clicks(folder)
    (folder / "rows.tsv").write_bytes(_row().encode() + b"\xff\xfe\x00\n" + _row().encode())
    return arguments


@case("dlrm.prepare_data", "--label")
def _table_without_the_label(folder):
    (folder / "table.csv").write_text("a,b\n1,2\n3,4\n")
    out = f"--output_dir={folder / 'new'}"
    return [f"--source={folder / 'table.csv'}", out, "--label=click", "--categorical=*"]


def _prepared_clicks(folder, last):
    """Rows that are prepared, but for one whose last id is another."""
    sizes = [4] * 26
    row = ["0", *["0.5"] * 13, *["1"] * 26]
    lines = ["\t".join(row) + "\n"] * 60
    lines[7] = "\t".join([*row[:-1], *last]) + "\n"
    for name in ("train", "validation"):
        (folder / f"{name}-00000-of-00001.tsv").write_text("".join(lines))
    model = f"{{embedding_dim: 4, bottom_mlp: [8, 4], top_mlp: [8, 1], vocab_sizes: {sizes}}}"
    (folder / "small.yaml").write_text(f"""
task:
  model: {model}
  train_data: {{input_path: '{folder}/train*', global_batch_size: 8, shuffle_buffer_size: 1}}
  validation_data: {{input_path: '{folder}/validation*', global_batch_size: 8}}
trainer:
  train_steps: 8
  steps_per_loop: 2
  summary_interval: 2
  checkpoint_interval: 8
  validation_interval: 8
  optimizer_config: {{optimizer: {{type: sgd}}}}
""")
    return [f"--config_file={folder / 'small.yaml'}", f"--model_dir={folder / 'model'}"]


@case("dlrm.train", "tsv, line 8: expected an id from 0 to", late=True)
def _id_beyond_the_vocabulary(folder):
    return _prepared_clicks(folder, ["4"])


@case("dlrm.train", "tsv, line 8: expected an id from 0 to", late=True)
def _negative_id(folder):
    return _prepared_clicks(folder, ["-1"])


@case("dlrm.train", "tsv, line 8: expected", late=True)
def _short_prepared_row(folder):
    return _prepared_clicks(folder, [])


# -- text ------------------------------------------------------------------------------------------


def _text(folder, content, *arguments):
    file = folder / "text.txt"
    file.write_bytes(content)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return [
        *arguments,
        *([] if arguments else [f"--source={file}"]),
        f"--vocab_file={folder / 'vocab.txt'}",
        f"--output_dir={folder / 'new'}",
    ]


@case("bert.prepare_data", "one document, of which none can be held out")
def _text_of_one_document(folder):
    return _text(folder, b"the quick fox .\n" * 20)


@case("bert.prepare_data", "there is no text")
def _text_of_blank_lines(folder):
    return _text(folder, b"\n \n")


@case("bert.prepare_data", "text.txt")
def _text_in_another_encoding(folder):
    return _text(folder, b"the quick f\xf6x .\n\nthe dog .\n\n" * 20)


@case("bert.prepare_data", "vocab.txt")
def _vocabulary_without_special_entries(folder):
    arguments = _text(folder, b"the quick fox .\n\nthe dog .\n\n" * 20)
    (folder / "vocab.txt").write_text("the\nfox\n")
    return arguments


def _squad(folder, context="the quick brown fox", **change):
    answers = [{"text": "fox", "answer_start": 16}]
    question = {"id": "1", "question": "the fox ?", "answers": answers, **change}
    paragraph = {"context": context, "qas": [question]}
    content = {"version": "1.1", "data": [{"title": "a", "paragraphs": [paragraph] * 4}]}
    (folder / "squad.json").write_text(json.dumps(content))
    return _text(folder, b"", f"--squad_train={folder / 'squad.json'}")


@case("bert.prepare_data", "squad.json: the question '1' has an empty answer")
def _empty_answer(folder):
    return _squad(folder, answers=[{"text": "", "answer_start": 0}])


@case("bert.prepare_data", "squad.json")
def _empty_context(folder):
    return _squad(folder, context="")


@case("bert.prepare_data", "squad.json: the question '1' has no answer, without is_impossible")
def _no_answer_in_version_1(folder):
    return _squad(folder, answers=[])


@case("bert.prepare_data", "squad.json")
def _questions_that_are_no_json(folder):
    arguments = _squad(folder)
    file = folder / "squad.json"
    file.write_bytes(file.read_bytes()[:-9])
    return arguments


@case("bert.train", "expected dataset.json as prepare_data.py writes it, received {}/dataset.json")
def _description_of_text_that_is_no_json(folder):
    for name in ("train", "validation"):
        tf.io.TFRecordWriter(str(folder / f"{name}.tf_record")).close()
    (folder / "dataset.json").write_text("[")
    data = [f"task.{n}_data.input_path={folder}/{n}*" for n in ("train", "validation")]
    return ["--params_override=" + ",".join(data), f"--model_dir={folder / 'model'}"]


def _pairs(folder, english="a b\nc d\n", german="ä b\nc d\n"):
    for split in ("train", "val", "test"):
        (folder / f"{split}.en").write_text("a b\nc d\n")
        (folder / f"{split}.de").write_text("ä b\nc d\n")
    (folder / "train.en").write_text(english)
    (folder / "train.de").write_text(german)
    return ["--optimizer=adam", "--learning_rate=0.1", f"--data_dir={folder}", "--replicas=1"]


@case("multi30k.train", "train.en has 2 lines and ")
def _sentences_without_a_translation(folder):
    return _pairs(folder, german="ä b\n")


@case("multi30k.train", "train.en")
def _no_sentences(folder):
    return _pairs(folder, english="", german="")


def _words(folder, train="a b c\n" * 50):
    (folder / "train.txt").write_text(train)
    for name in ("valid", "test"):
        (folder / f"{name}.txt").write_text("a b c\n" * 50)
    return ["--optimizer=adam", "--learning_rate=0.1", f"--data_dir={folder}", "--replicas=1"]


@case("wikitext2.train", "the training text has no words")
def _no_words(folder):
    return _words(folder, "")


@case("wikitext2.train", "valid.txt")
def _words_that_are_no_text(folder):
    arguments = _words(folder)
    (folder / "valid.txt").write_bytes(b"\xff\xfe\xff")
    return arguments


# -- small images ----------------------------------------------------------------------------------


def _mnist(folder, cut=0):
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = struct.pack(">4B3I", 0, 0, 8, 3, 20, 28, 28) + rng.bytes(20 * 784)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images[: len(images) - cut])
        labels = struct.pack(">4BI", 0, 0, 8, 1, 20) + bytes(range(10)) * 2
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return ["--optimizer=sgd", "--learning_rate=0.1", f"--data_dir={folder}", "--replicas=1"]


@case("cifar.train", "train-images-idx3-ubyte")
def _idx_file_that_ends_early(folder):
    return _mnist(folder, 5)


@case("quickstart.__main__", "train-images-idx3-ubyte")
def _idx_file_of_the_quickstart_that_ends_early(folder):
    batches = ["--optimizers=momentum", "--batch_size=4", "--nobaseline"]
    return [*_mnist(folder, 5)[2:], *batches, f"--output_dir={folder / 'model'}"]


@case("cifar.train", "archive")
def _jpeg_archive_that_is_none(folder):
    (folder / "cifar10_jpeg.tar.gz").write_bytes(b"no archive")
    return ["--optimizer=sgd", "--learning_rate=0.1", f"--data_dir={folder}", "--replicas=1"]


@case("cifar.train", "learning_rat")
def _configuration_with_an_unknown_flag(folder):
    (folder / "a.yaml").write_text("learning_rat: 1\n")
    return [f"--config_file={folder / 'a.yaml'}"]


@case("cifar.train", "{}/model/settings.json", late=True)
def _run_to_resume_without_its_settings(folder):
    arguments = [*_mnist(folder), "--batch_size=4", f"--model_dir={folder / 'model'}", "--resume"]
    tf.train.CheckpointManager(
        tf.train.Checkpoint(model=tf.Variable(1.0)), folder / "model" / "checkpoints", 2
    ).save()
    return arguments


@case("cifar.train", "{}/model/checkpoints/ckpt-1", late=True)
def _damaged_checkpoint_of_a_run(folder):
    arguments = [*_mnist(folder), f"--model_dir={folder / 'model'}", "--eval_only"]
    checkpoint = tf.train.Checkpoint(model=tf.Variable(1.0))
    path = tf.train.CheckpointManager(checkpoint, folder / "model" / "checkpoints", 2).save()
    Path(f"{path}.data-00000-of-00001").write_bytes(b"")
    return arguments


# -- all of them -----------------------------------------------------------------------------------


def _check(name, folder, code, error):
    said = CASES[name][1].replace("{}", str(folder))
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert "Traceback" not in error
    assert said in lines[0]
    assert "--" in lines[0] or str(folder) in lines[0]  # a flag or the file
    assert code == 2
    assert not (folder / "new").exists()
    assert not (folder / ".new.partial").exists()


@pytest.mark.parametrize("name", [name for name, (_, _, late, _) in CASES.items() if not late])
def test_one_line(name, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tfm_training, "_strategy", lambda *_: tf.distribute.get_strategy())
    program, _, _, make = CASES[name]
    arguments = make(tmp_path)
    capfd.readouterr()
    code = importlib.import_module(f"official_recipes.{program}").main([program, *arguments])
    _check(name, tmp_path, code, capfd.readouterr().err)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_one_line_of_a_program(name, tmp_path):
    program, _, _, make = CASES[name]
    # Set by other tests, or to keep them quiet: users have none of them.
    env = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    result = subprocess.run(
        [sys.executable, "-m", f"official_recipes.{program}", *make(tmp_path)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    _check(name, tmp_path, result.returncode, result.stderr)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ('{"b": 1}', "with a"),
        (b"\xff", "codec"),
        (None, "No such"),
    ],
)
def test_json_files_are_named(content, said, tmp_path):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataFormatError, match=said) as error:
        read_json(path, "a")
    assert str(path) in str(error.value)
