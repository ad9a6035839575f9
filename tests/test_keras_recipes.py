"""What the Keras 3 recipes share, and the CIFAR recipe."""

import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from conftest import strategy_of
from harness_recipes import assert_same_by_single_micro_steps, cifar100_folder

import tf_lbopt
from official_recipes.cifar import train as cifar
from official_recipes.cifar.models import NETWORKS, build_model
from official_recipes.cifar.task import ImageTask, shifted_and_mirrored
from official_recipes.common import keras_program
from official_recipes.common.data_format import DataFormatError
from official_recipes.common.files import append_row
from official_recipes.common.flag_parsing import FlagValueError, parse_flags
from official_recipes.common.image_data import (
    DigitsSource,
    ImageData,
    TfdsSource,
    find_source,
)
from official_recipes.common.interruption import Interrupted
from official_recipes.common.keras_dry_run import report
from official_recipes.common.keras_optimizers import (
    _STOCK,
    InverseSqrtDecay,
    known_optimizers,
    make_optimizer,
    make_schedule,
)
from official_recipes.common.keras_options import (
    OPTIMIZER_FLAGS,
    PostLocalOptions,
    ScheduleOptions,
    TrainingOptions,
    training_options,
)
from official_recipes.common.keras_training import train

CONFIGS = sorted(cifar.CONFIGS.glob("*.yaml"))
CONSTANT = ScheduleOptions("constant", 0.05, None, "sqrt", 1.0, (), 0.1, 0.0, 0.0)
FAST = TrainingOptions("momentum", {}, CONSTANT, batch_size=64, epochs=2, replicas=2)


def digits(train_size=640, test_size=128):
    data = DigitsSource().load()
    return dataclasses.replace(
        data,
        train_images=data.train_images[:train_size],
        train_labels=data.train_labels[:train_size],
        test_images=data.test_images[:test_size],
        test_labels=data.test_labels[:test_size],
    )


def task_of(**arguments):
    return ImageTask(digits(), "two_conv", augmentation=False, **arguments)


# -- flags -----------------------------------------------------------------------------------------


def parsed(*arguments):
    values = cifar.define_flags()
    parse_flags(values, ["cifar", *arguments])
    return values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer=sngm"], ["learning_rate", "none"]),
        (["--learning_rate=-1"], ["learning_rate", "positive", "-1"]),
        (["--learning_rate=0.1", "--batch_size=100", "--replicas=3"], ["batch_size", "3", "100"]),
        (["--learning_rate=0.1", "--schedule=step"], ["boundaries", "none"]),
        (["--learning_rate=0.1", "--schedule=step", "--boundaries=5,3"], ["boundaries", "5,3"]),
        (["--learning_rate=0.1", "--warmup_epochs=20", "--epochs=20"], ["warmup_epochs", "20"]),
        (["--learning_rate=0.1", "--schedule=inverse_sqrt"], ["warmup_epochs"]),
        (["--learning_rate=0.1", "--resume"], ["resume", "model_dir"]),
        (["--learning_rate=0.1", "--new_optimizer"], ["new_optimizer", "resume"]),
        (["--learning_rate=0.1", "--freeze_epochs=2"], ["freeze_layers", "freeze_epochs", "2"]),
        (["--learning_rate=0.1", "--momentum=1"], ["momentum", "[0, 1)"]),
        (["--learning_rate=0.1", "--data_dir=nowhere"], ["data_dir", "CIFAR-10", "nowhere"]),
        (["--config_file=nothing"], ["config_file", "sngm_table2_resnet20_sngm", "nothing"]),
        (["--learning_rate=0.1", "--model=resnet18"], ["model", "one of", "resnet20", "resnet18"]),
        (["--learning_rate=0.1", "--augmentation=yep"], ["augmentation", "true or false", "yep"]),
        (["--learning_rate=0.1", "--result_file=."], ["result_file", "a file", "folder"]),
        (["--learnig_rate=0.1"], ["learnig_rate", "unknown"]),
    ],
)
def test_wrong_flags_end_in_one_line(arguments, words, capsys):
    assert cifar.main(["cifar", *arguments]) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    for word in words:
        assert word in captured


def test_a_config_file_with_a_wrong_flag(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    for text, word in (("learning_rat: 1", "learning_rat"), ("- a", "mapping"), ("a: [", "YAML")):
        path.write_text(text)
        assert cifar.main(["cifar", f"--config_file={path}"]) == 2
        assert word in capsys.readouterr().err


def test_flags_win_over_the_config_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "learning_rate: 0.5\nepochs: 7\nboundaries: [2, 4.5]\nnesterov: true\n"
        "exclude_from_weight_decay: [/bias$, /gamma$]\n"
    )
    values = cifar.define_flags()
    arguments = ["cifar", f"--config_file={path}", "--epochs=9", "--schedule=step"]
    arguments.append("--exclude_from_layer_adaptation=")
    from official_recipes.common.keras_options import parse_training_flags

    assert parse_training_flags(values, arguments, program="", summary="", configs=cifar.CONFIGS)
    options = training_options(values)
    assert options.epochs == 9
    assert options.schedule.learning_rate == 0.5
    assert options.schedule.boundaries == (2.0, 4.5)
    assert options.optimizer_arguments == {
        "nesterov": True,
        "exclude_from_weight_decay": ["/bias$", "/gamma$"],
        "exclude_from_layer_adaptation": [],
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files(path):
    values = cifar.define_flags()
    from official_recipes.common.keras_options import parse_training_flags

    parse_training_flags(
        values, ["cifar", f"--config_file={path}"], program="", summary="", configs=cifar.CONFIGS
    )
    options = training_options(values)
    optimizer = make_optimizer(options, 10, options.epochs)
    assert math.isfinite(float(optimizer.learning_rate))
    lines = path.read_text().splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    assert set(yaml.safe_load("\n".join(named))) <= set(values)
    for line in named:
        if not line.startswith("optimizer:"):
            assert "paper" in line or "derived" in line, line


def test_every_constructor_argument_is_a_flag():
    # The learning rate is the schedule's.
    for row in tf_lbopt.list_optimizers():
        assert set(row.cls.arguments) <= {*OPTIMIZER_FLAGS, "learning_rate"}, row.name


# -- schedules and optimizers ----------------------------------------------------------------------


def schedule(kind, **arguments):
    base = dataclasses.replace(CONSTANT, kind=kind, learning_rate=1.0)
    return make_schedule(dataclasses.replace(base, **arguments), 64, updates_per_epoch=10, epochs=4)


def rates(made, steps):
    return [float(made(step)) for step in steps]


def test_schedules():
    assert rates(schedule("constant"), [0, 39]) == [1.0, 1.0]
    step = schedule("step", boundaries=(1.0, 3.0), factor=0.1)
    np.testing.assert_allclose(rates(step, [0, 9, 10, 29, 30]), [1, 1, 0.1, 0.1, 0.01], rtol=1e-6)
    polynomial = schedule("polynomial", power=2.0)
    np.testing.assert_allclose(rates(polynomial, [0, 20, 40]), [1, 0.25, 0], atol=1e-6)
    cosine = schedule("cosine", warmup_epochs=1.0, warmup_start=0.5)
    np.testing.assert_allclose(rates(cosine, [0, 5, 10, 25, 40]), [0.5, 0.75, 1, 0.5, 0], atol=1e-6)
    warm = schedule("step", boundaries=(2.0,), warmup_epochs=1.0)
    np.testing.assert_allclose(rates(warm, [0, 5, 10, 19, 20]), [0, 0.5, 1, 1, 0.1], rtol=1e-6)
    root = schedule("inverse_sqrt", warmup_epochs=1.0)
    np.testing.assert_allclose(rates(root, [5, 10, 40]), [0.5, 1.0, 0.5], rtol=1e-6)
    for scaling, expected in (("linear", 4.0), ("sqrt", 2.0)):
        scaled = schedule("constant", base_batch_size=16, scaling=scaling)
        assert rates(scaled, [3]) == [expected]


def test_schedules_are_serialized():
    made = InverseSqrtDecay(0.1, 3)
    text = json.dumps(keras.saving.serialize_keras_object(made))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert rates(again, range(9)) == rates(made, range(9))


@pytest.mark.parametrize("replicas", [1, 2])
def test_coupled_weight_decay(replicas):
    strategy = strategy_of(replicas)
    weights, decay, rate, beta = np.array([1.0, -2.0]), 0.1, 0.5, 0.9
    with strategy.scope():
        variable = keras.Variable(weights, dtype="float32")
        optimizer = tf_lbopt.SGD(rate, momentum=beta, weight_decay=decay)
        optimizer.build([variable])

    @tf.function
    def step(number):
        def on_replica():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradient = tf.cast(replica + 1, tf.float32) * tf.constant([1.0, 2.0]) * number
            optimizer.apply([gradient], [variable])

        strategy.run(on_replica)

    velocity = np.zeros(2)
    for number in (1.0, 2.0, 3.0):
        step(tf.constant(number))
        gradient = sum(range(1, replicas + 1)) * np.array([1.0, 2.0]) * number
        velocity = beta * velocity - rate * (gradient + decay * weights)
        weights = weights + velocity
    np.testing.assert_allclose(variable.numpy(), weights, rtol=1e-5)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert tf_lbopt.SGD.from_config(config).get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "sgdd"}, ["optimizer", "sngm", "sgdd"]),
        ({"optimizer": "sngm", "optimizer_arguments": {"gamma": 0.1}}, ["gamma", "sngm"]),
        ({"optimizer": "adam", "optimizer_arguments": {"momentum": 0.1}}, ["momentum", "adam"]),
        ({"optimizer": "vr_sgd", "replicas": 1}, ["replicas", "1 x 1"]),
        ({"optimizer": "vr_sgd", "optimizer_arguments": {"gamma": 2.0}}, ["gamma", "2.0"]),
        (
            {"optimizer": "vr_sgd", "post_local": PostLocalOptions(1.0, 4, False)},
            ["inner_optimizer", "VRSGD"],
        ),
    ],
)
def test_wrong_optimizers(changes, words):
    with pytest.raises(FlagValueError) as caught:
        make_optimizer(dataclasses.replace(FAST, **changes), 10, 2)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("decay", [{"weight_decay": 0.1}, {}], ids=["decay", "none"])
@pytest.mark.parametrize("name", _STOCK)
def test_keras_s_own_accumulate(name, decay):
    """Clipped are means, with a decay and without: SGD's is of this package with one."""
    arguments = {**decay, "global_clipnorm": 0.5}
    stock = dataclasses.replace(FAST, optimizer=name, optimizer_arguments=arguments, replicas=1)
    accumulating = dataclasses.replace(stock, gradient_accumulation_steps=4)
    of_parts = np.random.default_rng(1).normal(size=(16, 2, 4)).astype(np.float32)
    of_updates = of_parts.reshape(4, 4, 2, 4).mean(axis=1)
    weights = []
    for options, gradients in ((stock, of_updates), (accumulating, of_parts)):
        optimizer = make_optimizer(options, 10, 2)
        variable = keras.Variable(np.linspace(-1, 1, 8).reshape(2, 4), dtype="float32")
        for gradient in gradients:
            optimizer.apply([tf.constant(gradient)], [variable])
        weights.append(variable.numpy())
    np.testing.assert_allclose(weights[1], weights[0], rtol=0, atol=2e-6)


# -- data ------------------------------------------------------------------------------------------


def test_augmentation_against_one_image_at_a_time():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, size=(200, 6, 6, 3), dtype=np.uint8)
    seed = tf.constant([3, 4], tf.int64)
    result = shifted_and_mirrored(tf.constant(images), seed).numpy()
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, shifted_and_mirrored(tf.constant(images), seed))
    found = set()
    for before, after in zip(images, result, strict=True):
        matches = []
        for mirrored in (False, True):
            image = before[:, ::-1] if mirrored else before
            padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
            for down in range(9):
                for right in range(9):
                    if np.array_equal(padded[down : down + 6, right : right + 6], after):
                        matches.append((mirrored, down, right))
        assert matches
        if len(matches) == 1:
            found.add(matches[0])
    assert {m for m, _, _ in found} == {False, True}
    assert {d for _, d, _ in found} == {r for _, _, r in found} == set(range(9))


def test_every_epoch_has_every_example_once_and_another_order():
    from official_recipes.common.keras_training import batches as batches_of

    class Indices:
        train_size = 70

        def batch(self, indices, seed):
            return indices, seed

    options = dataclasses.replace(FAST, batch_size=32, gradient_accumulation_steps=2)

    def take(first, count):
        return [
            (indices.numpy().tolist(), seed.numpy().tolist())
            for indices, seed in batches_of(Indices(), options, first).take(count)
        ]

    batches = take(0, 8)
    epochs = [[i for indices, _ in batches[at : at + 4] for i in indices] for at in (0, 4)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 64
    assert epochs[0] != epochs[1]
    assert len({tuple(seed) for _, seed in batches}) == 8
    assert take(1, 4) == batches[4:]


def test_the_end_of_a_run_waits_for_no_tuning_of_the_pipeline(monkeypatch):
    given = []
    monkeypatch.setattr(keras.Model, "fit", lambda model, data, **_: given.append(data))
    train(task_of(), FAST, strategy_of(2))
    assert given[0].options().autotune.enabled is False


def test_cifar100(tmp_path):
    source = find_source(cifar100_folder(tmp_path))
    assert (source.kind, source.train_size) == ("cifar100", 6)
    data = source.load()
    assert data.classes == 100
    assert data.train_images.shape == (6, 32, 32, 3)
    content = pickle.loads((tmp_path / "train").read_bytes(), encoding="bytes")
    np.testing.assert_array_equal(
        data.train_images[2, :, :, 1].ravel(), content[b"data"][2, 1024:2048]
    )
    assert data.test_labels.tolist() == [96, 97, 98, 99]
    (tmp_path / "test").write_bytes(b"no pickle")
    with pytest.raises(DataFormatError, match="test"):
        source.load()


def test_tfds():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=12):
        data = TfdsSource("cifar10").load()
    assert data.name == "CIFAR-10"
    assert data.train_images.shape == data.test_images.shape == (12, 32, 32, 3)
    with pytest.raises(DataFormatError, match="no_such_set"):
        TfdsSource("no_such_set").load()


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "parameters"),
    # He et al. give 0.27 M and 0.85 M; VGG-A's convolutions have 9,220,480 weights and biases.
    [
        ("resnet20", 269_722),
        ("resnet56", 853_018),
        ("vgg11", 9_220_480 + 5_130),
        ("vgg11_bn", 9_220_480 - 2_752 + 2 * 2_752 + 5_130),
    ],
)
def test_networks(network, parameters):
    model = build_model(network, (32, 32, 3), 10, [125.0] * 3, [60.0] * 3)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == parameters
    assert model(np.zeros([2, 32, 32, 3], np.uint8)).shape == (2, 10)


def test_images_are_normalized():
    data = digits()
    model = ImageTask(data, "two_conv").build_model()
    layer = next(x for x in model.layers if isinstance(x, keras.layers.Normalization))
    normalized = np.asarray(layer(data.train_images))
    assert abs(normalized.mean()) < 1e-4
    assert abs(normalized.std() - 1) < 1e-4


def test_names_of_networks_are_known_before_tensorflow():
    assert set(cifar.MODELS) == set(NETWORKS)


# -- training --------------------------------------------------------------------------------------

QUICK = ("vr_lamb",)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.long)
        for name in known_optimizers()
    ],
)
def test_every_optimizer_learns(name):
    peak = {"clars": 1.0, "vr_sgd": 0.3, "lars": 10.0, "vr_lars": 10.0}.get(name, 0.05)
    peak = 0.01 if "adam" in name or "lamb" in name else peak
    options = dataclasses.replace(
        FAST,
        optimizer=name,
        epochs=6,
        schedule=dataclasses.replace(CONSTANT, learning_rate=peak),
    )
    result = train(task_of(), options, strategy_of(2))
    assert result.updates == 60
    assert result.train_loss[-1] < 0.6 * result.train_loss[0]
    assert result.metrics[-1]["test_accuracy"] > 0.5
    json.dumps(result.record(), allow_nan=False)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.long
def test_mixed_precision(dtype):
    options = dataclasses.replace(FAST, optimizer="vr_momentum", dtype=dtype, epochs=4)
    try:
        result = train(task_of(), options, strategy_of(2))
    finally:
        keras.config.set_dtype_policy("float32")
    assert result.train_loss[-1] < 0.8 * result.train_loss[0]


def test_accumulation_is_one_update_of_the_whole_batch():
    one = dataclasses.replace(FAST, optimizer="sngm", epochs=1)
    two = dataclasses.replace(one, gradient_accumulation_steps=2)
    results = [train(task_of(), options, strategy_of(2)) for options in (one, two)]
    assert [r.updates for r in results] == [10, 10]
    np.testing.assert_allclose(results[0].train_loss, results[1].train_loss, rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        row.name if row.name == "vr_lamb" else pytest.param(row.name, marks=pytest.mark.long)
        for row in tf_lbopt.list_optimizers()
    ],
)
def test_a_call_of_several_micro_steps(name, monkeypatch):
    options = dataclasses.replace(
        FAST, optimizer=name, replicas=1, gradient_accumulation_steps=4, epochs=1
    )
    assert_same_by_single_micro_steps(task_of(), options, monkeypatch)


def test_norms_of_examples_are_those_of_micro_steps_of_one_example():
    arguments = {"norm_estimator": "per_example"}
    whole = dataclasses.replace(
        FAST, optimizer="clars", optimizer_arguments=arguments, batch_size=8, epochs=1, replicas=1
    )
    single = dataclasses.replace(whole, optimizer_arguments={}, gradient_accumulation_steps=8)
    task = ImageTask(digits(64), "two_conv", augmentation=False)
    by_example, one_by_one = (
        train(task, options, tf.distribute.get_strategy()) for options in (whole, single)
    )
    np.testing.assert_allclose(by_example.train_loss, one_by_one.train_loss, rtol=1e-5)
    large = train(
        task, dataclasses.replace(whole, optimizer_arguments={}), tf.distribute.get_strategy()
    )
    assert abs(large.train_loss[0] / by_example.train_loss[0] - 1) > 1e-3


def test_label_smoothing_and_a_validation_split():
    data = cifar.load_data(DigitsSource())
    values = cifar.define_flags()
    parse_flags(values, ["", "--model=two_conv", "--validation_size=300", "--label_smoothing=0.1"])
    task = cifar.task_of(data, values)
    assert task.train_size == 1137
    assert task.splits() == ("validation",)
    result = train(task, dataclasses.replace(FAST, epochs=1, evaluate_every=0), strategy_of(2))
    assert set(result.metrics[-1]) == {"epoch", "validation_accuracy", "validation_loss"}
    parse_flags(values, ["", "--validation_size=2000"])
    with pytest.raises(FlagValueError, match="validation_size"):
        cifar.task_of(data, values)


def test_frozen_layers(monkeypatch):
    """They stay as they are while the others train, and join in after that."""
    options = dataclasses.replace(
        FAST, optimizer="nesterov", epochs=3, freeze_layers="^dense_1$", freeze_epochs=2
    )
    build, models, weights = ImageTask.build_model, [], []
    monkeypatch.setattr(
        ImageTask, "build_model", lambda self: models.append(build(self)) or models[-1]
    )
    task = task_of()
    train(
        task,
        options,
        strategy_of(2),
        on_epoch=lambda *_: weights.append(models[0].get_weights()),
    )
    changed = [
        [not np.array_equal(*pair) for pair in zip(*both, strict=True)]
        for both in itertools.pairwise(weights)
    ]
    assert changed[0][-2:] == [False, False]  # kernel and bias of the last layer
    assert all(changed[0][:-2])
    assert all(changed[1])
    for layers, said in (("nothing", "found no layer"), (".", "leave something"), ("(", "regular")):
        with pytest.raises(FlagValueError, match=f"--freeze_layers: .*{said}"):
            train(task, dataclasses.replace(options, freeze_layers=layers), strategy_of(2))


def test_dry_run(tmp_path, capsys, monkeypatch):
    """Two updates and figures; nothing is written; what `fit` takes besides is not timed."""
    fit, calls = keras.Model.fit, []
    monkeypatch.setattr(
        keras.Model, "fit", lambda *args, **more: calls.append(more) or fit(*args, **more)
    )
    folder = tmp_path / "run"
    flags = [
        "--optimizer=sngm",
        "--learning_rate=0.1",
        "--batch_size=64",
        "--replicas=2",
        "--epochs=5",
    ]
    flags += ["--gradient_accumulation_steps=2", f"--model_dir={folder}", "--dry_run"]
    options = training_options(parsed(*flags))
    report(task_of(), options, strategy_of(2))
    out = capsys.readouterr().out
    assert [call["steps_per_epoch"] for call in calls] == [4]
    parameters = task_of().build_model().count_params()
    for said in (
        "two updates, nothing is written",
        "devices: 2 replicas; CPU:",
        "batch: 64 in an update, 16 on a device in each of 2 micro-steps",
        "k = 4 (2 replicas x 2)",
        f"parameters: {parameters:,}, {parameters:,} of them trained",
        "updates to go: 50 in 5 epochs",
    ):
        assert said in out
    assert not folder.exists()
    with pytest.raises(FlagValueError, match="--dry_run: expected not to be given with --eval"):
        training_options(parsed(*flags, "--eval_only"))


def test_divergence_is_recorded():
    options = dataclasses.replace(
        FAST, schedule=dataclasses.replace(CONSTANT, learning_rate=1e20), epochs=3
    )
    result = train(task_of(), options, strategy_of(2))
    assert result.diverged
    assert json.loads(json.dumps(result.record(), allow_nan=False))["diverged"]


def test_equal_seeds_give_equal_results_and_a_resumed_run_too(tmp_path):
    options = dataclasses.replace(FAST, optimizer="extrap_sgd", epochs=3, model_dir=tmp_path / "a")
    (tmp_path / "a").mkdir()
    task = ImageTask(digits(256, 64), "two_conv", augmentation=False)
    whole = train(task, options, strategy_of(2))

    class KilledError(Exception):
        pass

    def kill(epoch, loss, metrics):
        if epoch == 2:
            raise KilledError

    (tmp_path / "b").mkdir()
    cut = dataclasses.replace(options, model_dir=tmp_path / "b")
    with pytest.raises(KilledError):
        train(task, cut, strategy_of(2), on_epoch=kill)
    with pytest.raises(FlagValueError, match="resume"):
        train(task, cut, strategy_of(2))
    for change, said in (
        ({"optimizer": "sngm"}, "--optimizer: expected extrap_sgd, as in the run to resume"),
        ({"optimizer_arguments": {"momentum": 0.5}}, "--momentum: expected None, .*received 0.5"),
        (
            {"schedule": dataclasses.replace(cut.schedule, kind="cosine")},
            "--schedule: expected constant, as in the run to resume, received cosine",
        ),
        (
            {"post_local": PostLocalOptions(1.0, 4, False)},
            "--average_momentum: expected None, as in the run to resume, received False",
        ),
    ):
        with pytest.raises(FlagValueError, match=said):
            train(task, dataclasses.replace(cut, resume=True, **change), strategy_of(2))
    resumed = train(task, dataclasses.replace(cut, resume=True), strategy_of(2))
    assert (resumed.resumed_from, resumed.updates) == (1, 12)
    np.testing.assert_allclose(resumed.train_loss, whole.train_loss, rtol=1e-5)
    assert [row["epoch"] for row in resumed.metrics] == [1, 2, 3]
    written = json.loads((tmp_path / "b" / "result.json").read_text())
    assert written["train_loss"] == resumed.train_loss
    other = train(task, dataclasses.replace(options, model_dir=None, seed=2), strategy_of(2))
    assert not np.allclose(other.train_loss, whole.train_loss, rtol=1e-3)


def test_another_optimizer_goes_on(tmp_path, capsys):
    """With weights, updates and momentum, where it has the same; and is then that of the run."""
    first = dataclasses.replace(FAST, epochs=1, replicas=1, model_dir=tmp_path)
    train(task_of(), first, strategy_of(1))
    then = dataclasses.replace(
        first,
        optimizer="vr_momentum",
        optimizer_arguments={"gamma": 1.0},  # which is the same
        gradient_accumulation_steps=2,
        schedule=ScheduleOptions("step", 0.05, None, "sqrt", 1.0, (2.0,), 0.1, 0.0, 0.0),
        epochs=3,
        resume=True,
    )
    with pytest.raises(FlagValueError, match=r"--boundaries: .* as in the run to resume"):
        train(task_of(), then, strategy_of(1))
    then = dataclasses.replace(then, new_optimizer=True)
    with pytest.raises(FlagValueError, match="--seed: expected 1, as in the run to resume"):
        train(task_of(), dataclasses.replace(then, seed=2), strategy_of(1))
    whole = train(
        task_of(),
        dataclasses.replace(first, epochs=3, schedule=then.schedule, model_dir=None),
        strategy_of(1),
    )
    capsys.readouterr()
    result = train(task_of(), then, strategy_of(1))
    assert capsys.readouterr().out == (
        "vr_momentum begins after 1 epochs with the momentum of momentum\n"
    )
    np.testing.assert_allclose(result.train_loss, whole.train_loss, rtol=1e-4)
    assert result.updates == 30
    again = train(task_of(), then, strategy_of(1))  # as after a kill
    assert again.resumed_from == 3
    assert capsys.readouterr().out == ""
    earlier = [{"optimizer": "momentum", "optimizer_arguments": {}, "epochs": 1}]
    assert again.record()["earlier_optimizers"] == earlier
    adam = dataclasses.replace(then, optimizer="adam", optimizer_arguments={})
    adam = dataclasses.replace(adam, gradient_accumulation_steps=1)
    assert train(task_of(), adam, strategy_of(1)).updates == 30
    said = "adam begins after 3 epochs without the past of vr_momentum\n"
    assert capsys.readouterr().out == said


def test_damaged_runs_are_not_resumed(tmp_path):
    options = dataclasses.replace(FAST, epochs=1, replicas=1, evaluate_every=0)
    task = task_of()
    train(task, dataclasses.replace(options, model_dir=tmp_path), strategy_of(1))
    again = dataclasses.replace(options, model_dir=tmp_path, resume=True)
    for name in ("settings.json", "history.json", "checkpoints/ckpt-1.data-00000-of-00001"):
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(whole[:20])
        said = re.escape(str(file).split(".data")[0])
        with pytest.raises(FlagValueError, match=f"--model_dir: .*be resumed, received {said}: "):
            train(task, again, strategy_of(1))
        file.write_bytes(whole)
    assert train(task, again, strategy_of(1)).resumed_from == 1


def command(folder, *more):
    arguments = [
        "--model=two_conv",
        "--optimizer=sngm",
        "--learning_rate=0.2",
        "--batch_size=64",
        f"--model_dir={folder / 'run'}",
        f"--result_file={folder / 'results.jsonl'}",
        *more,
    ]
    return [sys.executable, "-m", "official_recipes.cifar.train", *arguments]


@pytest.mark.long
def test_a_run_that_is_killed_and_resumed(tmp_path):
    process = subprocess.Popen(command(tmp_path, "--epochs=12"), stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 300
    while not (checkpoints / "checkpoint").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results.jsonl").exists()
    done = subprocess.run(
        command(tmp_path, "--epochs=12", "--resume"), capture_output=True, text=True, check=True
    )
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["resumed_from"] >= 1
    assert len(row["train_loss"]) == 12
    assert row["updates"] == 12 * 22
    assert row["optimizer"] == "sngm"
    assert row["final"]["test_accuracy"] > 0.9
    assert f"epoch {row['resumed_from'] + 1}/12" in done.stdout
    assert list((tmp_path / "run" / "tensorboard" / "train").iterdir())


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(recipe, values, options):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(keras_program, "_run", interrupted)
    arguments = [*command(tmp_path)[2:], "--epochs=3"]
    with pytest.raises(KeyboardInterrupt):
        cifar.main(arguments)
    assert capsys.readouterr().err == ""
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "ckpt-1.index").touch()
    with pytest.raises(KeyboardInterrupt):
        cifar.main(arguments)
    said = f"{tmp_path / 'run'} has a checkpoint: --resume goes on from it\n"
    assert capsys.readouterr().err == said


def test_rows_are_appended_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"half of a ro')
    append_row(path, {"b": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"b": 2}]
    with pytest.raises(ValueError, match="JSON"):
        append_row(path, {"c": math.nan})
    assert len(path.read_text().splitlines()) == 2


DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10-jpeg"


@pytest.mark.long
def test_on_cifar10():
    if not DATA.is_dir():
        pytest.skip("CIFAR-10 (JPEG) is not at ../shared/data/cifar10-jpeg")
    data = cifar.load_data(find_source(DATA))
    small = dataclasses.replace(
        data, train_images=data.train_images[:10_000], train_labels=data.train_labels[:10_000]
    )
    assert isinstance(small, ImageData)
    options = dataclasses.replace(FAST, batch_size=128, epochs=4)
    result = train(ImageTask(small, "two_conv"), options, strategy_of(2))
    assert result.metrics[-1]["test_accuracy"] > 0.35


def test_the_stock_optimizers_are_keras_own():
    for name in ("sgd", "momentum", "nesterov", "adam"):
        made = make_optimizer(dataclasses.replace(FAST, optimizer=name), 10, 2)
        assert type(made) in (keras.optimizers.SGD, keras.optimizers.AdamW)
    made = make_optimizer(
        dataclasses.replace(FAST, optimizer_arguments={"weight_decay": 0.1}), 10, 2
    )
    assert type(made) is tf_lbopt.SGD
    assert made.weight_decay == 0.1
