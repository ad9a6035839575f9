"""The WikiText-2 and Multi30k recipes."""

import dataclasses
import gzip
import json
import math
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from forked_python import python
from harness_recipes import assert_same_by_single_micro_steps

from official_recipes.cifar.task import ImageTask
from official_recipes.common.data_format import DataFormatError
from official_recipes.common.flag_parsing import FlagValueError, parse_flags
from official_recipes.common.image_data import DigitsSource
from official_recipes.common.keras_export import export, predict
from official_recipes.common.keras_optimizers import known_optimizers, make_optimizer
from official_recipes.common.keras_options import (
    ScheduleOptions,
    TrainingOptions,
    parse_training_flags,
    training_options,
)
from official_recipes.common.keras_training import train
from official_recipes.common.text_data import read_lines
from official_recipes.multi30k import data as pairs
from official_recipes.multi30k import train as multi30k
from official_recipes.multi30k.model import Shape, Transformer
from official_recipes.multi30k.task import PieceCrossentropy, TranslationTask
from official_recipes.wikitext2 import data as language
from official_recipes.wikitext2 import train as wikitext2
from official_recipes.wikitext2.task import LanguageTask
from tf_lbopt.per_example.losses import example_losses

CONSTANT = ScheduleOptions("constant", 0.5, None, "sqrt", 1.0, (), 0.1, 0.0, 0.0)
FAST = TrainingOptions("momentum", {}, CONSTANT, batch_size=16, epochs=2, replicas=2)
SHARED = Path(__file__).parents[2] / "shared" / "data"


def with_rate(options, rate):
    return dataclasses.replace(
        options, schedule=dataclasses.replace(options.schedule, learning_rate=rate)
    )


def language_task(**arguments):
    text = [f"the {a} {b} follows the {a}" for a in ("cat", "dog") for b in ("and", "or")] * 60
    data = language.as_ids("cats", text, text[:9], "validation")
    arguments = {"sequence_length": 7, "hidden": 16, "layers": 2, "dropout": 0.0, **arguments}
    return LanguageTask(data, **arguments)


def translation_task(count=160, **arguments):
    splits = {
        split: (source[:count], target[:count])
        for split, (source, target) in pairs.number_words().items()
    }
    arguments = {"pieces": 120, "longest": 20, "label_smoothing": 0.1, **arguments}
    return TranslationTask("numbers", splits, Shape(1, 32, 64, 2, 0.0), **arguments)


# -- flags and files -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [wikitext2, multi30k])
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--optimizer=sngm"], "learning_rate"),
        (["--learning_rate=0.1", "--data_dir=nowhere"], "nowhere"),
        (["--learning_rate=0.1", "--layers=0"], "layers"),
        (["--learning_rate=0.1", "--dropout=1"], "dropout"),
    ],
)
def test_wrong_flags_end_in_one_line(recipe, arguments, word, capsys):
    assert recipe.main(["recipe", *arguments]) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    assert word in captured


def test_languages(tmp_path, capsys):
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.en").write_text("a b\n")
        (tmp_path / f"{split}.fr").write_text("ä b\n")
    values = multi30k.define_flags()
    folder = f"--data_dir={tmp_path}"
    parse_flags(values, ["recipe", folder, "--source_language=fr", "--target_language=en"])
    source = multi30k.make_source(values)
    assert source.load()["train"] == (["ä b"], ["a b"])
    assert source.name == f"pairs in {tmp_path.name}, fr to en"
    for arguments, said in (
        ([folder], "has no train.en and train.de"),
        (["--target_language=fr"], "--data_dir: expected a folder with sentences of en and fr"),
        ([folder, "--target_language=en"], "--target_language: expected another"),
    ):
        assert multi30k.main(["recipe", "--learning_rate=0.1", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error


def test_heads_must_divide_the_width(capsys):
    assert multi30k.main(["recipe", "--learning_rate=0.1", "--width=30"]) == 2
    assert "--heads=4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "path"),
    [(r, p) for r in (wikitext2, multi30k) for p in sorted(r.CONFIGS.glob("*.yaml"))],
    ids=lambda value: getattr(value, "stem", ""),
)
def test_config_files(recipe, path):
    values = recipe.define_flags()
    parse_training_flags(
        values, ["recipe", f"--config_file={path}"], program="", summary="", configs=path.parent
    )
    options = training_options(values)
    assert make_optimizer(options, 20, options.epochs).sub_batches == values.sub_batches
    for line in path.read_text().splitlines():
        assert line.startswith("#") or "paper" in line or "derived" in line, line


def test_lines_and_damaged_files(tmp_path):
    (tmp_path / "a.txt").write_text("ä b\n\nc\n")
    (tmp_path / "a.gz").write_bytes(gzip.compress("ä b\n\nc".encode()))
    assert read_lines(tmp_path / "a.txt") == read_lines(tmp_path / "a.gz") == ["ä b", "", "c"]
    windows = b"\xef\xbb\xbf" + "ä b\r\n\r\nc\r\n".encode()
    (tmp_path / "w.txt").write_bytes(windows)
    assert read_lines(tmp_path / "w.txt") == ["ä b", "", "c"]
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"abc")[:-5])
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("b.gz", "c.txt", "d.txt"):
        with pytest.raises(DataFormatError, match=name):
            read_lines(tmp_path / name)


def test_texts(tmp_path):
    (tmp_path / "valid.txt").write_text(" = A = \n \n a b a \n")
    (tmp_path / "test.txt").write_text("a c\n")
    data = language.find_text(tmp_path).load()
    assert data.vocabulary == ("<unk>", "<eos>", "=", "A", "a", "b")
    assert data.train.tolist() == [2, 3, 2, 1, 4, 5, 4, 1]
    assert data.held_out.tolist() == [4, 0, 1]
    assert data.held_out_name == "test"
    assert data.name == f"text in {tmp_path.name}, trained on its validation text"
    (tmp_path / "train.txt").write_text("b\n")
    source = language.find_text(tmp_path)
    assert (source.held_out_name, source.load().vocabulary[2:]) == ("validation", ("b",))
    (tmp_path / "valid.txt").write_text("\n")
    with pytest.raises(DataFormatError, match="no words"):
        source.load()
    default = language.find_text(None).load()
    assert len(default.train) > 10 * len(default.held_out) / 2 > 10_000
    with pytest.raises(DataFormatError, match="no known text"):
        language.find_text(tmp_path.parent)


def test_pairs(tmp_path):
    for split in ("train", "val", "test_2016_flickr"):
        (tmp_path / f"{split}.en").write_text("a b\nc\n")
        (tmp_path / f"{split}.de.gz").write_bytes(gzip.compress("ä\nö\n".encode()))
    found = pairs.find_pairs(tmp_path)
    splits = found.load()
    assert splits["test"] == (["a b", "c"], ["ä", "ö"])
    assert found.label(splits) == f"pairs in {tmp_path.name}, en to de"
    sizes = {"train": 29_000, "validation": 1014, "test": 1000}
    assert found.label({k: (["a"] * n,) * 2 for k, n in sizes.items()}) == "Multi30k, en to de"
    (tmp_path / "val.en").write_text("a b\n")
    with pytest.raises(DataFormatError, match="1 lines"):
        found.load()
    (tmp_path / "train.en").unlink()
    with pytest.raises(DataFormatError, match=r"train\.en"):
        pairs.find_pairs(tmp_path)


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (7, "seven", "sieben"),
        (21, "twenty one", "einundzwanzig"),
        (100, "one hundred", "einhundert"),
        (342, "three hundred and forty two", "dreihundertzweiundvierzig"),
        (1001, "one thousand one", "eintausendeins"),
        (
            71_680,
            "seventy one thousand six hundred and eighty",
            "einundsiebzigtausendsechshundertachtzig",
        ),
    ],
)
def test_number_words(number, english, german):
    assert pairs.in_english(number) == english
    assert pairs.in_german(number) == german


def test_word_pieces():
    sentences = [text for split in pairs.number_words().values() for text in split[1]]
    tokenizer = pairs.train_tokenizer(sentences, 80)
    ids = pairs.encode(tokenizer, sentences[:50], longest=12)
    assert ids.shape[1] <= 12
    for row, sentence in zip(ids, sentences, strict=False):
        inner = [i for i in row.tolist() if i > pairs.END]
        assert row[0] == pairs.START
        assert pairs.END in row
        if len(inner) < 10:
            assert tokenizer.decode(inner) == sentence


# -- models and losses -----------------------------------------------------------------------------


def test_perplexity_is_that_of_every_word():
    task = language_task()
    keras.utils.set_random_seed(1)
    model = task.build_model()
    text = task._data.held_out
    total = 0.0
    for start in range(0, len(text) - 1, 7):
        window = text[start : start + 8]
        logits = model(window[None, :-1]).numpy()[0].astype(np.float64)
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log[np.arange(len(window) - 1), window[1:]].sum()
    metrics = task.evaluate(model, "validation", final=True)
    np.testing.assert_allclose(metrics["loss"], total / (len(text) - 1), rtol=1e-5)
    assert metrics["perplexity"] == math.exp(metrics["loss"])


def test_loss_leaves_padding_out_and_smooths():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype("float32")
    ids = np.array([[3, 4, 0], [2, 0, 0]], np.int32)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = [
        0.9 * -log[i, j, ids[i, j]] + 0.1 * -log[i, j].mean() for i, j in ((0, 0), (0, 1), (1, 0))
    ]
    loss = PieceCrossentropy(0.1)
    np.testing.assert_allclose(float(loss(ids, logits)), np.mean(losses), rtol=1e-5)
    of_sentences = np.array([losses[0] + losses[1], losses[2]]) * 2 / 3
    np.testing.assert_allclose(example_losses(loss, ids, logits), of_sentences, rtol=1e-5)
    assert PieceCrossentropy.from_config(loss.get_config()).label_smoothing == 0.1
    assert float(loss(np.zeros_like(ids), logits)) == 0.0


def test_the_decoder_sees_neither_the_future_nor_padding():
    keras.utils.set_random_seed(0)
    model = Transformer(Shape(2, 16, 32, 2, 0.0), 20, 10)
    source = np.array([[5, 6, 7, 0, 0]], np.int32)
    target = np.array([[1, 8, 9, 10]], np.int32)
    logits = model((source, target)).numpy()
    assert logits.shape == (1, 4, 20)
    changed = target.copy()
    changed[0, 3] = 11
    np.testing.assert_allclose(model((source, changed)).numpy()[:, :3], logits[:, :3], atol=1e-5)
    longer = np.pad(source, ((0, 0), (0, 3)))
    np.testing.assert_allclose(model((longer, target)).numpy(), logits, atol=1e-5)
    other = source.copy()
    other[0, 2] = 8
    assert np.abs(model((other, target)).numpy() - logits).max() > 1e-3


def test_greedy_translation_ends_at_the_end():
    task = translation_task(40)
    model = task.build_model()
    translations = task.translate(model, "test")
    assert len(translations) == 40
    ids = task._ids["test"][0][:1]
    memory, mask = model.encode(tf.constant(ids))
    target = [pairs.START]
    while len(target) < 20 and target[-1] != pairs.END:
        logits = model.decode(memory, mask, tf.constant([target]))
        target.append(int(np.argmax(logits[0, -1])))
    inner = [i for i in target[1:] if i > pairs.END]
    assert translations[0] == task._tokenizer.decode(inner)


# -- training --------------------------------------------------------------------------------------

QUICK = ("vr_lamb", "extrap_adam")
RATES = {"clars": 1.0, "lars": 30.0, "vr_lars": 30.0}


def _all(quick):
    return [
        n if n in quick else pytest.param(n, marks=pytest.mark.long) for n in known_optimizers()
    ]


def _rate(name):
    return RATES.get(name, 0.03 if "adam" in name or "lamb" in name else 0.5)


@pytest.mark.parametrize("name", _all(QUICK[:1]))
def test_language_models_learn(name):
    options = with_rate(dataclasses.replace(FAST, optimizer=name, epochs=4), _rate(name))
    options = dataclasses.replace(options, optimizer_arguments={"global_clipnorm": 1.0})
    result = train(language_task(layers=1), options, strategy_of(2))
    perplexities = [row["validation_perplexity"] for row in result.metrics]
    assert perplexities[-1] < 0.7 * perplexities[0]


@pytest.mark.parametrize("name", _all(QUICK[1:]))
def test_translation_learns(name):
    rate = {"clars": 0.3, "lars": 10.0, "vr_lars": 10.0}.get(name, _rate(name) / 5)
    options = with_rate(dataclasses.replace(FAST, optimizer=name, epochs=3, seed=2), rate)
    result = train(translation_task(), options, strategy_of(2))
    assert result.metrics[-1]["validation_loss"] < result.metrics[0]["validation_loss"]
    assert 0 <= result.metrics[-1]["test_bleu"] <= 100
    assert "test_bleu" not in result.metrics[0]


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=pytest.mark.long) for t in (language_task, translation_task)]
)
def test_norms_of_examples(task):
    options = with_rate(dataclasses.replace(FAST, optimizer="clars", epochs=2, replicas=1), 1.0)
    options = dataclasses.replace(options, optimizer_arguments={"norm_estimator": "per_example"})
    result = train(task(), options, tf.distribute.get_strategy())
    assert result.train_loss[-1] < 0.95 * result.train_loss[0]


@pytest.mark.long
def test_sparse_gradients_in_a_call_of_several_micro_steps(monkeypatch):
    options = dataclasses.replace(FAST, optimizer="vr_momentum", replicas=1, epochs=1)
    options = dataclasses.replace(options, gradient_accumulation_steps=4)
    assert_same_by_single_micro_steps(language_task(), options, monkeypatch)


@pytest.mark.long
def test_dropout_and_accumulation():
    options = dataclasses.replace(FAST, optimizer="sngm", gradient_accumulation_steps=2)
    result = train(language_task(dropout=0.2), options, strategy_of(2))
    assert result.train_loss[-1] < result.train_loss[0]


LOADED = """
import json, sys
import keras
import numpy as np
import official_recipes.multi30k.model  # and with it tf_lbopt
logits = {}
for path, arrays in json.loads(sys.argv[1]).items():
    inputs = tuple(np.array(array, np.int32) for array in arrays)
    model = keras.saving.load_model(path)
    logits[path] = np.asarray(model(inputs if len(inputs) > 1 else inputs[0])).tolist()
print(json.dumps(logits))
"""


def _small_images():
    data = DigitsSource().load()
    part = {"train_images": data.train_images[:64], "train_labels": data.train_labels[:64]}
    return ImageTask(dataclasses.replace(data, **part), "resnet8")


TASKS = {
    "multi30k": (lambda: translation_task(32), [[[1, 5, 6]]] * 2),
    "wikitext2": (language_task, [[[1, 5, 6]]]),
    "cifar": (_small_images, [np.ones([2, 8, 8, 1]).tolist()]),
}


def _by_checkpoint(task, path):
    """A new model with all of its weights from a checkpoint."""
    model = task.build_model()
    for weight in model.weights:
        weight.assign(keras.ops.full_like(weight, 7))
    status = tf.train.Checkpoint(model=model).read(path).expect_partial()
    status.assert_existing_objects_matched()
    assert not [weight.path for weight in model.weights if np.any(weight.numpy() == 7)]
    return model


def test_models_of_checkpoints_and_files_are_whole(tmp_path):
    """A saved model needs a process with Keras and the model's own code only."""
    files, expected = {}, {}
    for name, (made, inputs) in TASKS.items():
        task = made()
        path = tf.train.Checkpoint(model=task.build_model()).write(str(tmp_path / name))
        model = _by_checkpoint(task, path)
        file = str(tmp_path / f"{name}.keras")
        model.save(file)
        files[file] = inputs
        arrays = tuple(np.array(array, np.int32) for array in inputs)
        expected[file] = np.asarray(model(arrays if len(arrays) > 1 else arrays[0]))
    run = subprocess.run(
        [*python(), "-c", LOADED, json.dumps(files)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for file, logits in json.loads(run.stdout.splitlines()[-1]).items():
        np.testing.assert_allclose(logits, expected[file], rtol=1e-4, atol=1e-5)


def test_evaluation_only(tmp_path, capsys):
    """Of a checkpoint that was written before; one of another model is refused."""
    (tmp_path / "valid.txt").write_text("a b a b c\n" * 40)
    (tmp_path / "test.txt").write_text("a b c\n" * 9)
    folder = tmp_path / "model"
    small = ["--hidden=4", "--sequence_length=5", f"--data_dir={tmp_path}", "--replicas=1"]
    arguments = ["recipe", "--eval_only", f"--model_dir={folder}", *small]
    assert wikitext2.main(arguments) == 2
    assert "--eval_only: expected a --model_dir with a checkpoint" in capsys.readouterr().err
    assert not folder.exists()
    values = wikitext2.define_flags()
    parse_flags(values, arguments)
    task = wikitext2.make_task(values, lambda done, total: None)
    model = task.build_model()
    checkpoint = tf.train.Checkpoint(model=model)
    tf.train.CheckpointManager(checkpoint, str(folder / "checkpoints"), 2).save()
    assert wikitext2.main(arguments) == 0
    found = json.loads((folder / "evaluation.json").read_text())
    expected = task.evaluate(model, "test", final=True)
    assert found["metrics"]["test_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert f"test_perplexity {expected['perplexity']:.4g}" in capsys.readouterr().out
    assert wikitext2.main([*arguments, "--hidden=6"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "--model_dir: expected a checkpoint of this model" in error[-1]
    tf.get_logger().setLevel("WARNING")


EXPORTED = """
import json, sys
import keras
import numpy as np
import tensorflow as tf
import tensorflow_text
folder = sys.argv[1]
load = lambda name: tf.saved_model.load(f"{folder}/{name}/saved_model").signatures
plain = lambda outputs: {
    name: np.vectorize(lambda x: x.decode() if isinstance(x, bytes) else x)(value.numpy()).tolist()
    for name, value in outputs.items()
}
file = lambda name: keras.saving.load_model(f"{folder}/{name}/model.keras")
PART
assert not {"tf_lbopt", "official_recipes"} & set(sys.modules)
print(json.dumps(found))
"""
EXPORTED_CLASSIFIER = """
images = tf.constant(json.loads(sys.argv[2]), tf.uint8)
files = tf.stack([tf.io.encode_png(image) for image in images])
lines = tf.constant(["the cat and the", "", "the x"])
words, classes = load("wikitext2"), load("cifar")
found = {
    "words": plain(words["serving_default"](text=lines)),
    "images": plain(classes["serving_default"](images=images)),
    "encoded": plain(classes["encoded"](images=files)),
    "keras": np.asarray(file("cifar")(images)).tolist(),
    "ids": plain(words["ids"](ids=tf.constant([[3, 4]]))),
    "keras_ids": np.asarray(file("wikitext2")(np.array([[3, 4]]))).tolist(),
}
"""
EXPORTED_TRANSLATOR = """
translator = load("multi30k")
found = plain(translator["serving_default"](text=tf.constant(json.loads(sys.argv[2]))))
"""


def _exported(folder, name, task):
    """A new model of the task, exported; and the lines of its predictions."""
    options = dataclasses.replace(FAST, replicas=1, model_dir=folder / "runs" / name)
    checkpoint = tf.train.Checkpoint(model=task.build_model())
    manager = tf.train.CheckpointManager(checkpoint, str(options.model_dir / "checkpoints"), 2)
    manager.save()
    assert export(task, options, str(folder / name)) == ""
    assert predict(task, options, str(folder / "lines")) == ""
    return checkpoint.model, (folder / "lines").read_text().split("\n")[:-1]


def _elsewhere(folder, part, argument):
    """What a process with TensorFlow and Keras makes of what was exported."""
    run = subprocess.run(
        [*python(), "-c", EXPORTED.replace("PART", part), str(folder), json.dumps(argument)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_exports_and_predictions(tmp_path):
    """Of images and words: what is exported needs nothing of this package."""
    images_task = ImageTask(_small_images()._data, "two_conv")
    classifier, rows = _exported(tmp_path, "cifar", images_task)
    words_task = language_task(layers=1)
    words, lines = _exported(tmp_path, "wikitext2", words_task)
    images = images_task._data.test_images[:3]
    found = _elsewhere(tmp_path, EXPORTED_CLASSIFIER, images.tolist())

    def softmax(logits):
        return keras.ops.convert_to_numpy(keras.ops.softmax(np.asarray(logits)))

    def check_close(value, expected):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)

    logits = classifier(images, training=False)
    for key in ("images", "encoded"):
        check_close(found[key]["probabilities"], softmax(logits))
    check_close(found["keras"], logits)
    rows = [line.split("\t") for line in rows[1:]]
    check_close([list(map(float, row[2:])) for row in rows[:3]], softmax(logits))
    accuracy = np.mean([row[0] == row[1] for row in rows])
    assert accuracy == images_task.evaluate(classifier, "test", final=True)["accuracy"]
    # The end of a line comes before each line.
    vocabulary = (tmp_path / "wikitext2" / "vocabulary.txt").read_text().splitlines()
    ids = [vocabulary.index(word) for word in ["<eos>", "the", "cat", "and", "the"]]
    probabilities = softmax(words(np.array([ids])))[0]
    log_probabilities = found["words"]["log_probabilities"]
    check_close(log_probabilities[0], np.log(probabilities[np.arange(4), ids[1:]]))
    assert log_probabilities[1] == [0.0] * 4
    assert log_probabilities[2][2:] == [0.0] * 2
    assert found["words"]["next_word"][0] == vocabulary[probabilities[-1].argmax()]
    for value in (found["ids"]["logits"], found["keras_ids"]):
        check_close(value, words(np.array([[3, 4]])))
    rows = [line.split("\t") for line in lines[1:]]
    assert [row[0] for row in rows] == [vocabulary[i] for i in words_task._data.held_out[1:]]
    loss = words_task.evaluate(words, "validation", final=True)["loss"]
    assert np.mean([-float(row[1]) for row in rows]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.long
def test_an_exported_translator(tmp_path):
    """Its SavedModel takes text, and translates as what BLEU is computed from."""
    sentences = ["forty two", "", "seven"]
    task = translation_task(32, to_translate=sentences)
    model, lines = _exported(tmp_path, "multi30k", task)
    found = _elsewhere(tmp_path, EXPORTED_TRANSLATOR, sentences)
    task._ids["test"] = [pairs.encode(task._tokenizer, sentences, 20)] * 2
    expected = task.translate(model, "test")
    assert found["translation"] == expected
    assert lines == [expected[0], "", expected[2]]
    tokenizer = (tmp_path / "multi30k" / "tokenizer.model").read_bytes()
    assert tokenizer == task._tokenizer.serialized_model_proto()
    ids = (np.array([[1, 5, 6]], np.int32),) * 2
    loaded = keras.saving.load_model(tmp_path / "multi30k" / "model.keras")
    np.testing.assert_allclose(loaded(ids), model(ids), rtol=1e-5, atol=1e-6)


def test_wrong_exports_end_in_one_line(tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "ckpt-1.index").touch()
    (folder / "settings.json").write_text('{"label_smoothing": 0.5, "longest": 9}')
    (tmp_path / "text").write_text("two\n")
    run, export_dir = f"--model_dir={folder}", f"--export_dir={tmp_path / 'new'}"
    file = f"--predictions={tmp_path / 'out'}"
    for arguments, words in (
        ([export_dir], "--export_dir: expected a --model_dir with a checkpoint"),
        ([file, f"--model_dir={tmp_path}"], "--predictions: expected a --model_dir with"),
        ([run, export_dir, file], "--export_dir: expected to be given without --predictions"),
        ([run, export_dir, "--eval_only"], "--eval_only: expected to be given without"),
        ([run, f"--export_dir={tmp_path}"], "--export_dir: expected a folder that is empty"),
        ([run, f"--predictions={tmp_path}"], "--predictions: expected a file"),
        ([run, "--eval_only", f"--translate={tmp_path / 'text'}"], "--translate: expected to be"),
        ([run, file, f"--translate={tmp_path / 'no'}"], "--translate: expected a file of sentenc"),
        (
            [run, export_dir, "--pieces=200"],
            "--model_dir: expected a run with the same longest, 48",
        ),
    ):
        assert multi30k.main(["recipe", *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert words in error[-1], error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text"]
    tf.get_logger().setLevel("WARNING")


def test_long_sentences_are_cut_and_counted(tmp_path):
    task = translation_task(32, to_translate=["one " * 30, "two"], longest=6)
    predicted = task.predictions(task.build_model())
    assert len(predicted.lines) == 2
    assert predicted.note == "1 of 2 sentences were cut to --longest=6 pieces"


@pytest.mark.long
@pytest.mark.parametrize("name", TASKS)
def test_what_was_trained_gives_its_metrics_again(tmp_path, name):
    task = TASKS[name][0]()
    options = dataclasses.replace(FAST, replicas=1, epochs=1, seed=5, model_dir=tmp_path)
    train(task, options, tf.distribute.get_strategy())
    model = _by_checkpoint(task, tf.train.latest_checkpoint(str(tmp_path / "checkpoints")))
    model.save(tmp_path / "model.keras")
    recorded = json.loads((tmp_path / "result.json").read_text())["final"]
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for split in task.splits():
        for metric, value in task.evaluate(loaded, split, final=True).items():
            assert value == pytest.approx(recorded[f"{split}_{metric}"], rel=1e-5)


def test_a_saved_translator_keeps_its_precision(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = translation_task(40).build_model()
    finally:
        keras.config.set_dtype_policy("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    policies = {layer.dtype_policy.name for layer in loaded._flatten_layers()}
    assert policies == {"mixed_bfloat16"}
    ids = np.array([[1, 5, 6]], np.int32)
    np.testing.assert_array_equal(loaded((ids, ids)), model((ids, ids)))


def test_words_set_apart_to_tune_on():
    values = wikitext2.define_flags()
    parse_flags(values, ["recipe", "--validation_size=3", "--sequence_length=10"])
    whole = wikitext2.make_source(values).load()
    task = wikitext2.make_task(values, lambda done, total: None)
    assert task.splits() == ("validation",)
    assert task.train_size == (len(whole.train) - 30 - 1) // 10
    part = whole.with_validation(30)
    np.testing.assert_array_equal(part.train, whole.train[:-30])
    seen = {whole.vocabulary[word] for word in part.train}
    # Words that only the part set apart has are unknown, and no unit of the model waits for them.
    assert set(part.vocabulary) == seen | {"<unk>", "<eos>"}
    assert [part.vocabulary[word] for word in part.held_out] == [
        whole.vocabulary[word] if whole.vocabulary[word] in seen else "<unk>"
        for word in whole.train[-30:]
    ]
    assert "<unk>" in [part.vocabulary[word] for word in part.held_out]
    assert part.held_out.dtype == np.int32
    with pytest.raises(ValueError, match="set apart"):
        whole.with_validation(len(whole.train))
    parse_flags(values, ["recipe", "--validation_size=1000000"])
    with pytest.raises(FlagValueError, match="validation_size"):
        wikitext2.make_task(values, lambda done, total: None)


@pytest.mark.long
def test_real_text():
    if not SHARED.is_dir():
        pytest.skip("real data is not at ../shared/data")
    values = wikitext2.define_flags()
    parse_flags(values, ["recipe", f"--data_dir={SHARED / 'wikitext-2'}"])
    data = wikitext2.make_source(values).load()
    assert data.name == "WikiText-2, trained on its validation text"
    assert (len(data.train), len(data.held_out)) == (216_347, 244_102)
    values = multi30k.define_flags()
    parse_flags(values, ["recipe", f"--data_dir={SHARED / 'multi30k'}"])
    source = multi30k.make_source(values)
    splits = source.load()
    assert source.label(splits) == "Multi30k, en to de"
    assert {k: len(v[0]) for k, v in splits.items()} == {
        "train": 29_000,
        "validation": 1014,
        "test": 1000,
    }
