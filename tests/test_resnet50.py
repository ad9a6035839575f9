"""The ResNet recipe: its configurations, its command line, and one short training."""

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from conftest import strategy_of
from forked_python import python
from harness_recipes import (
    SMALL_RESNET,
    assert_deviations_are_in_the_readme,
    assert_same_state,
    interrupt_preparation,
    last_checkpoint,
    signal_when,
)

import tf_lbopt.tf_keras
import tf_lbopt.tfm
from official_recipes.common import checkpoints, remote, replicas, tfm_training
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.interruption import Interrupted, Interruption
from official_recipes.common.trainer_fields import check_trainer
from official_recipes.resnet50 import train

pytestmark = pytest.mark.usefixtures("quick_configurations")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "official_recipes" / "resnet50" / "configs").glob("*.yaml"))
IMAGENET = 1_281_167


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL_RESNET)
    return [f"--config_file={file}", f"--model_dir={tmp_path / 'model'}"]


def _params(*arguments, model_dir="unused"):
    train._register()
    options = tfm_training.Options(
        experiment=train.EXPERIMENT,
        config_file=tuple(str(a) for a in arguments),
        params_override=None,
        mode="train_and_eval",
        model_dir=model_dir,
        tpu=None,
        cpu_replicas=None,
        sub_batches=None,
    )
    return tfm_training.parse_params(options)


_OPTIONS = tfm_training.Options(
    train.EXPERIMENT, (), None, "train_and_eval", "unused", None, None, None
)


# -- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_are_consistent(file, capsys):
    from official.core import task_factory, train_utils
    from official.modeling import optimization

    params = _params(file)
    trainer, schedule = params.trainer, params.trainer.optimizer_config
    train_utils.create_optimizer(task_factory.get_task(params.task), params)
    rate = optimization.OptimizerFactory(schedule).build_learning_rate()
    rates = [float(rate(step)) for step in (0, 1, trainer.train_steps)]
    assert rates[-1] == pytest.approx(0, abs=1e-5)
    peak = schedule.learning_rate.get().initial_learning_rate
    if schedule.warmup.get() is None:
        assert rates[0] == pytest.approx(peak)
    else:
        warmup = schedule.warmup.get().warmup_steps
        assert 0 == rates[0] < rates[1]
        assert float(rate(warmup)) == pytest.approx(peak)
        assert float(rate(warmup // 2)) == pytest.approx(peak * (warmup // 2) / warmup)
    assert trainer.summary_interval % trainer.steps_per_loop == 0
    if not file.stem.endswith("_cpu"):
        batch = params.task.train_data.global_batch_size
        epochs = 150 if "mobilenet" in file.stem else 90
        assert trainer.train_steps == epochs * (IMAGENET // batch)
        size = file.stem.split("_")[1]
        assert batch == int(size.removesuffix("k")) * (1024 if size.endswith("k") else 1)
    for kind in (schedule.optimizer.type, "lbopt_adamw", "sgd"):
        params.override({"trainer": {"optimizer_config": {"optimizer": {"type": kind}}}})
        train.check(params, _OPTIONS)
        assert re.search(rf"optimizer {kind}, weight decay 0\.0\d*1", capsys.readouterr().out)
    if "vrgd" in file.stem:  # the square-root rule
        assert peak == pytest.approx(25 * (batch / 16384) ** 0.5, abs=0.005)
    if "momentum" in file.stem:  # the linear rule
        assert peak == pytest.approx(0.1 * batch / 256)
    if "lamb" in file.stem:
        assert peak == pytest.approx(0.04 * (batch / 32768) ** 0.5, abs=1e-5)
        assert warmup == round(20 * batch / 32768 * (IMAGENET // batch))


def test_there_are_configurations_for_the_batches_of_the_papers():
    vrgd = {f"vrgd_{k}k" for k in (2, 4, 8, 16, 32, 64, 96)}
    momentum = {f"momentum_{size}" for size in ("256", "2k", "4k", "8k", "16k")}
    lamb = {f"lamb_{k}k" for k in (2, 4, 8, 16, 32)}
    assert {file.stem for file in CONFIGS} >= {*vrgd, *momentum, *lamb, "sngm_8k", "clars_16k"}


def test_deviations_from_tf_models():
    train._register()
    assert_deviations_are_in_the_readme("large_batch_resnet", "resnet_imagenet", "resnet50")


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode=fly"], "--mode: expected one of train"),
        (["--config_file=nowhere.yaml"], "one of the recipe's (clars_16k, clars_16k_"),
        (["--cpu_replicas=0"], "--cpu_replicas: expected"),
        (["--nonsense=1"], "--nonsense: expected one of the flags"),
        (["--experiment=nonsense"], "--experiment: expected a registered experiment"),
        (["--params_override=task.nonsense=1"], "'nonsense' does not exist"),
        (
            ["--params_override=trainer.train_steps=many"],
            "train_steps: an integer, received 'many'",
        ),
        (["--params_override=trainer.train_steps=2.5"], "train_steps: an integer, received 2.5"),
        (
            ["--params_override=trainer.loss_upper_bound=big"],
            "loss_upper_bound: a number, received",
        ),
        (
            ["--params_override=task.train_data.is_training=7"],
            "is_training: true or false, received",
        ),
        (
            ["--params_override=trainer.optimizer_config.optimizer.type=foo"],
            "trainer.optimizer_config.optimizer.type: one of adafactor, ",
        ),
        (["--params_override=task.train_data.input_path=no/train*"], "which matches no file"),
        (["--mode=eval"], "a folder with a checkpoint"),
        (["--params_override=trainer.optimizer_config.optimizer.type=vr_nonsense"], "vr_nonsense"),
        (["--params_override=trainer.optimizer_config.optimizer.vr_lars.gamma=7"], "`gamma` must"),
        (["--sub_batches=3"], "1 x 3 = 3, received 16"),
        (["--params_override=task.train_data.global_batch_size=0"], "a multiple of replicas"),
        (
            ["--params_override=trainer.optimizer_config.optimizer.type=foo"],
            "clars, extrap_adam, extrap_sgd, lamb",  # and no default_params in between
        ),
        (
            ["--params_override=runtime.enable_xla=true,runtime.num_gpus=1"],
            "runtime.enable_xla: false with the optimizer vr_lars",
        ),
        (["--params_override=trainer.steps_per_loop=3"], "a multiple of trainer.steps_per_loop"),
        (["--model_dir=s3://bucket/run"], "that TensorFlow can reach, received 's3://bucket/run'"),
        (["--config_file=s3://bucket/x.yaml"], "--config_file: expected a file that exists"),
        (["--params_override=task.train_data.input_path=s3://bucket/train*"], "'s3' not impl"),
        (["--params_override=task.init_checkpoint=s3://bucket/run"], "a run's model_dir"),
        (["--params_override=task.init_checkpoint=tests"], "a run's model_dir, received 'tests'"),
        (["--model_dir=run[1]"], "without the characters * ? [ ]"),
        (["--model_dir=run*", "--mode=eval"], "without the characters * ? [ ]"),
        (["--dry_run", "--mode=eval"], "--dry_run: expected a --mode that trains"),
        (["--mode=export"], "--export_dir: expected a new folder for --mode=export, received None"),
        (["--mode=predict"], "--predictions: expected a file for --mode=predict, received None"),
        (["--mode=predict", "--predictions=tests"], "--predictions: expected a file for"),
        (["--mode=export", "--export_dir=tests"], "--export_dir: expected a folder that is empty"),
        (["--export_dir=new"], "--export_dir: expected --mode=export with it"),
        (["--mode=export", "--export_dir=new"], "a folder with a checkpoint for --mode=export"),
        ([], "at least 2 sub-batches"),
    ],
)
def test_mistakes_end_in_one_line(small, tmp_path, arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(tfm_training, "_strategy", lambda *_: tf.distribute.get_strategy())
    if "--params_override=trainer.optimizer_config.optimizer.vr_lars.gamma=7" in arguments:
        arguments = [*arguments, "--sub_batches=2"]
    assert train.main(["train", *small, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]
    assert "default_params" not in error[0]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train_steps": -5}, "train_steps: a positive integer, received -5"),
        ({"train_steps": 0}, "train_steps: a positive integer, received 0"),
        ({"steps_per_loop": 0}, "steps_per_loop: a positive integer, received 0"),
        ({"checkpoint_interval": 0}, "checkpoint_interval: a positive"),
        ({"summary_interval": -1}, "summary_interval: a positive"),
        ({"max_to_keep": 0}, "max_to_keep: a positive integer, or null"),
        ({"validation_interval": -1}, "validation_interval: an integer >= 0"),
        ({"validation_steps": 0}, "validation_steps: a positive integer, or -1"),
        ({"eval_tf_while_loop": True}, "since trainer.eval_tf_while_loop is true, received -1"),
        (
            {"eval_tf_while_loop": True, "eval_tf_function": False},
            "eval_tf_function: true with trainer.eval_tf_while_loop",
        ),
        ({"train_tf_function": False}, "train_tf_function: true with"),
        (
            {"train_tf_while_loop": False, "allow_tpu_summary": True},
            "allow_tpu_summary: false without",
        ),
        ({"continuous_eval_timeout": -1}, "continuous_eval_timeout: seconds, or null"),
        ({"best_checkpoint_metric_comp": "more"}, "one of higher, lower, received more"),
    ],
)
def test_numbers_of_the_trainer(fields, said):
    from official.core import config_definitions

    good = config_definitions.TrainerConfig(train_steps=10, max_to_keep=None)
    check_trainer(good, trains=True, evaluates=True)
    good.override(fields, is_strict=False)
    with pytest.raises(FlagValueError, match=re.escape(said)):
        check_trainer(good, trains=True, evaluates=True)


def test_storage_that_does_not_answer(monkeypatch):
    """What TensorFlow says after minutes of trying again, or never, is not waited for."""
    monkeypatch.setattr(remote, "LIMIT_S", 0.05)
    with pytest.raises(FlagValueError, match=r"'gs://x/y': no answer within 0\.05 s"):
        remote.reach("model_dir", "a folder", "gs://x/y", lambda _: time.sleep(5))
    assert remote.reach("model_dir", "a folder", "gs://x/y", len) == 8


def test_gpus_that_are_not_there(small, capsys):
    assert train.main(["train", *small, "--params_override=runtime.num_gpus=200"]) == 2
    assert re.search(
        r"runtime\.num_gpus of at most \d+, .*received 200$", capsys.readouterr().err.strip()
    )


def test_missing_extra_is_named(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "official.core.train_lib", None)
    assert train.main(["train", *small]) == 2
    assert "pip install '.[recipes]'" in capsys.readouterr().err


def test_dataset_that_is_not_prepared(small, capsys):
    override = "task.train_data.tfds_name=mnist,task.train_data.tfds_data_dir=/nowhere"
    assert train.main(["train", *small, f"--params_override={override}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "tfds" in error[0]


def test_stock_experiments_take_the_flag():
    train._register()
    options = tfm_training.Options(
        "resnet_imagenet", (), None, "train", "unused", None, None, sub_batches=4
    )
    assert tfm_training.parse_params(options).task.sub_batches == 4


def test_help(capsys):
    assert train.main(["train", "--help"]) == 0
    assert "--sub_batches" in capsys.readouterr().out


# -- weight decay ----------------------------------------------------------------------------------


def _with_optimizer(kind, fields=None, **task):
    train._register()
    params = _params()
    model = {"num_classes": 4, "input_size": [32, 32, 3], "backbone": {"resnet": {"model_id": 10}}}
    params.override({"task": {"model": model, **task}})
    params.override(
        {"trainer": {"optimizer_config": {"optimizer": {"type": kind, kind: fields or {}}}}}
    )
    return params


def _ours():
    from tf_lbopt.tfm import REGISTRATIONS

    return [*REGISTRATIONS]


def test_every_optimizer_has_the_weight_decay_of_the_task():
    from official.core import task_factory, train_utils

    params = _with_optimizer("sgd", weight_decay=0.125, exclude_from_weight_decay=["gamma"])
    for kind in (*_ours(), "lars", "lamb", "adamw", "adamw_experimental"):
        params.override({"trainer": {"optimizer_config": {"optimizer": {"type": kind}}}})
        optimizer = train_utils.create_optimizer(task_factory.get_task(params.task), params)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        values = [getattr(optimizer, name, None) for name in ("weight_decay", "weight_decay_rate")]
        assert 0.125 in [None if v is None else float(v) for v in values], kind
        if kind in _ours():
            excluded = optimizer.get_config()["exclude_from_weight_decay"]
        else:
            names = ("_exclude_from_weight_decay", "exclude_from_weight_decay")
            found = [getattr(optimizer, name, None) for name in (*names, names[0] + "_names")]
            excluded = next(names for names in found if names and isinstance(names, list))
        assert list(excluded) == ["gamma"], kind


def test_weight_decay_in_the_loss_leaves_out_what_is_excluded():
    """Where the optimizer has none; nothing is in the loss for one that has."""
    from official.core import task_factory, train_utils

    params = _with_optimizer("sgd", weight_decay=0.5)
    task = task_factory.get_task(params.task)
    model = task.build_model()
    train_utils.create_optimizer(task, params)
    kernels = [v for v in model.trainable_variables if "kernel" in v.name]
    assert 10 < len(kernels) < len(model.trainable_variables)
    expected = 0.25 * sum(np.sum(np.square(v.numpy(), dtype=np.float64)) for v in kernels)
    np.testing.assert_allclose(sum(float(x) for x in model.losses), expected, rtol=1e-5)
    params = _with_optimizer("lbopt_lars", weight_decay=0.5)
    train_utils.create_optimizer(task_factory.get_task(params.task), params)
    other = task_factory.get_task(params.task)
    train_utils.create_optimizer(other, params)
    assert other._decay_in_loss is None


def test_runs_say_their_weight_decay(capsys):
    params = _with_optimizer("sgd")
    for kind, fields, task, said in (
        ("vr_lars", {}, {}, "optimizer vr_lars, weight decay 0.0001, not of beta, gamma, bias"),
        ("lbopt_adamw", {"weight_decay": 0.1}, {}, "adamw, weight decay 0.1, not of"),
        ("lbopt_lars", {"weight_decay": 0.0}, {}, "no weight decay"),
        ("lamb", {}, {"weight_decay": 0.01}, "weight decay 0.01, not of"),
        ("sgd", {}, {"exclude_from_weight_decay": []}, "weight decay 0.01 in the loss of all"),
        ("sgd", {}, {"weight_decay": 0, "losses": {"l2_weight_decay": 0.1}}, "decay 0.1 in the"),
    ):
        optimizer = {"type": kind, kind: fields}
        params.override({"trainer": {"optimizer_config": {"optimizer": optimizer}}, "task": task})
        train.check(params, _OPTIONS)
        assert said in capsys.readouterr().out


def test_two_weight_decays_are_refused():
    params = _with_optimizer("sgd", losses={"l2_weight_decay": 1e-4})
    with pytest.raises(FlagValueError, match=r"one weight decay: .*received 0\.0001 and 0\.0001"):
        train.check(params, _OPTIONS)


# -- synthetic input -------------------------------------------------------------------------------


def test_synthetic_images():
    from official_recipes.resnet50.experiments import synthetic_images

    batches = list(synthetic_images(4, [16, 16, 3], 100, is_training=False))
    assert [len(labels) for _, labels in batches] == [100] * 5 + [12]
    again = list(synthetic_images(4, [16, 16, 3], 100, is_training=False))
    np.testing.assert_array_equal(batches[0][0], again[0][0])
    images, labels = next(iter(synthetic_images(4, [16, 16, 3], 64, is_training=True)))
    means = np.stack([images.numpy()[labels.numpy() == c].mean(0) for c in range(4)])
    assert np.abs(means[0] - means[1]).mean() > 0.5


def _densenet_task(size, **backbone):
    from official.core import task_factory

    params = _params(next(file for file in CONFIGS if file.stem == "clars_16k_densenet121"))
    model = {"num_classes": 4, "input_size": [32, size, 3], "backbone": backbone}
    model["norm_activation"] = {"norm_momentum": 0.8}
    params.override({"task": {"model": model, "losses": {"l2_weight_decay": 0.5}}})
    return task_factory.get_task(params.task)


@pytest.mark.parametrize("blocks", [(1, 1, 1, 1), pytest.param(None, marks=pytest.mark.long)])
def test_densenet(blocks, monkeypatch):
    """Keras's own network, with the task's normalization and decay of kernels."""
    from official_recipes.resnet50 import densenet

    build = tf_keras.applications.DenseNet121
    if blocks is not None:
        build = functools.partial(sys.modules[build.__module__].DenseNet, list(blocks))
    monkeypatch.setitem(densenet._NETWORKS, 121, build)
    task = _densenet_task(32)
    built = task.build_model()
    whole = build(weights=None, classes=4, input_shape=(32, 32, 3))
    assert built.count_params() == whole.count_params()
    layers = built.backbone.layers
    norms = [x for x in layers if isinstance(x, tf_keras.layers.BatchNormalization)]
    assert {(x.momentum, x.epsilon) for x in norms} == {(0.8, 1e-5)}
    kernels = [x for x in layers if isinstance(x, tf_keras.layers.Conv2D)]
    assert {float(x.kernel_regularizer.l2) for x in kernels} == {0.25}
    excluded = "|".join(task.task_config.exclude_from_weight_decay)
    decayed = [v for v in built.trainable_variables if not re.search(excluded, v.name)]
    assert len(decayed) == len(kernels) + 1
    assert built(tf.zeros([2, 32, 32, 3])).shape == (2, 4)


@pytest.mark.parametrize(
    ("size", "backbone", "said"),
    [
        (32, {"densenet": {"model_id": 122}}, "model_id: one of 121, 169, 201, received 122"),
        (31, {}, r"task.model.input_size: at least 32x32 for densenet, received \[32, 31, 3\]"),
    ],
)
def test_densenets_that_there_are_not(size, backbone, said):
    with pytest.raises(FlagValueError, match=said):
        _densenet_task(size, **backbone).build_model()


# -- checkpoints -----------------------------------------------------------------------------------


def _trainer(optimizer, widths=(3,)):
    """What `Resumption` needs of a trainer, after some steps."""
    model = tf_keras.Sequential([tf_keras.layers.Dense(width) for width in widths])
    model.build([None, 2])
    step = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(global_step=step, model=model, optimizer=optimizer)
    return SimpleNamespace(
        global_step=step, model=model, optimizer=optimizer, checkpoint=checkpoint
    )


def _resumed(path, optimizer, kind, widths=(3,), new_optimizer=False):
    trainer = _trainer(optimizer, widths)
    resumption = checkpoints.Resumption(trainer, "runs", kind, new_optimizer)
    resumption.restore(path)
    if hasattr(optimizer, "build"):
        optimizer.build(trainer.model.trainable_variables)
    resumption.check()
    return trainer


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of SNGM after three steps, and the trainer."""
    trainer = _trainer(tf_lbopt.tf_keras.SNGM(0.1))
    variables = trainer.model.trainable_variables
    for _ in range(3):
        trainer.optimizer.apply_gradients([(tf.ones_like(v), v) for v in variables])
        trainer.global_step.assign_add(1)
    checkpoints.Resumption(trainer, "runs", "sngm", False).check()
    return trainer.checkpoint.save(str(tmp_path / "ckpt")), trainer


def test_a_run_goes_on_with_all_that_it_had(saved, capsys):
    path, before = saved
    after = _resumed(path, tf_lbopt.tf_keras.SNGM(0.1), "sngm")
    assert int(after.global_step) == int(after.optimizer.iterations) == 3
    for old, new in zip(before.optimizer.variables, after.optimizer.variables, strict=True):
        np.testing.assert_array_equal(old, new)
    assert any(np.any(v.numpy() != 0) for v in after.optimizer.variables if v.shape.rank == 2)
    assert capsys.readouterr().out == ""


def test_another_optimizer_is_refused_and_begins_anew_where_it_may(saved, capsys):
    path, before = saved
    with pytest.raises(FlagValueError, match=r"the same optimizer, vr_adam .*-1 of sngm$"):
        _resumed(path, tf_lbopt.tf_keras.VRAdam(0.1), "vr_adam")
    after = _resumed(path, tf_lbopt.tf_keras.VRAdam(0.1), "vr_adam", new_optimizer=True)
    assert "the optimizer vr_adam begins at step 3 without a past: the c" in capsys.readouterr().out
    assert int(after.global_step) == int(after.optimizer.iterations) == 3
    for old, new in zip(before.model.variables, after.model.variables, strict=True):
        np.testing.assert_array_equal(old, new)
    assert not any(np.any(v.numpy() != 0) for v in after.optimizer.variables if v.shape.rank == 2)
    # Stock optimizers have no variables yet when the checkpoint is read.
    with pytest.raises(FlagValueError, match="-1 of sngm"):
        _resumed(path, tf_keras.optimizers.legacy.SGD(), "sgd")
    legacy = _resumed(path, tf_keras.optimizers.legacy.SGD(), "sgd", new_optimizer=True)
    assert int(legacy.optimizer.iterations) == 3


@pytest.mark.parametrize(
    ("former", "kind", "kept"),
    [
        ("clars", "lbopt_lars", True),
        ("lbopt_lars", "vr_momentum", True),
        ("clars", "sngm", False),
        ("sngm", "lbopt_sgd", False),
    ],
)
def test_momentum_that_means_the_same_goes_on(tmp_path, former, kind, kept, capsys):
    """As after CLARS's first epochs; SNGM's is no velocity."""

    def optimizer(name):
        arguments = {"trust_coefficient": 0.1} if name == "clars" else {}
        arguments |= {"momentum": 0.9} if name == "lbopt_sgd" else {}
        return tf_lbopt.tfm.REGISTRATIONS[name].cls(0.1, **arguments)

    before = _trainer(optimizer(former))
    variables = before.model.trainable_variables
    for _ in range(2):
        before.optimizer.apply_gradients([(tf.ones_like(v), v) for v in variables])
        before.global_step.assign_add(1)
    checkpoints.Resumption(before, "runs", former, False).check()
    path = before.checkpoint.save(str(tmp_path / "ckpt"))
    after = _resumed(path, optimizer(kind), kind, new_optimizer=True)
    slots = [
        [v.numpy() for v in of.optimizer.variables if v.name.startswith("momentum")]
        for of in (before, after)
    ]
    assert [len(of) for of in slots] == [2, 2]
    for old, new in zip(*slots, strict=True):
        np.testing.assert_array_equal(new, old if kept else 0 * old)
    assert ("with the momentum of" in capsys.readouterr().out) == kept


def test_more_variables_of_the_same_optimizer_are_told(saved, capsys):
    """As with sub-batches, which need some."""
    path, _ = saved
    optimizer = tf_lbopt.tf_keras.SNGM(0.1, gradient_accumulation_steps=2)
    after = _resumed(path, optimizer, "sngm")
    assert "variables of the optimizer begin anew" in capsys.readouterr().out
    assert int(after.optimizer.iterations) == 3


def test_checkpoints_that_do_not_say_their_optimizer(saved, tmp_path):
    """Such as those of tf-models' own driver: the variables tell."""
    _, before = saved
    items = {"global_step": before.global_step, "model": before.model}
    path = tf.train.Checkpoint(**items, optimizer=before.optimizer).save(str(tmp_path / "own"))
    assert int(_resumed(path, tf_lbopt.tf_keras.SNGM(0.1), "sngm").optimizer.iterations) == 3
    with pytest.raises(FlagValueError, match=r"optimizer, vr_adam .* it has SNGM"):
        _resumed(path, tf_lbopt.tf_keras.VRAdam(0.1), "vr_adam")
    anew = _resumed(path, tf_lbopt.tf_keras.VRAdam(0.1), "vr_adam", new_optimizer=True)
    assert int(anew.optimizer.iterations) == 3


@pytest.mark.parametrize("kind", ["sngm", None])
@pytest.mark.parametrize("widths", [(4,), (3, 3)])
def test_another_models_checkpoint_is_refused(saved, widths, kind):
    """In training and in evaluation, which needs no optimizer."""
    path, _ = saved
    with pytest.raises(FlagValueError, match=r"--model_dir: .* of the same model"):
        _resumed(path, tf_lbopt.tf_keras.SNGM(0.1), kind, widths)
    _resumed(path, tf_lbopt.tf_keras.VRAdam(0.1), None)


def test_a_damaged_checkpoint_is_named(saved, tmp_path):
    path, before = saved
    for ending in (".data-00000-of-00001", ".index"):
        file = Path(path + ending)
        file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(FlagValueError, match=f"can be read.*{re.escape(path)}"):
            _resumed(path, tf_lbopt.tf_keras.SNGM(0.1), "sngm")
    with pytest.raises(FlagValueError, match=r"a checkpoint of the same model, received .*ckpt-1"):
        checkpoints.initialize(path, {"model": before.model}, {})


def test_tasks_of_tf_models_begin_only_from_the_same_model(saved):
    """They have a way of their own."""
    path, before = saved
    for widths, said in (((4,), r": .*hape"), ((3, 3), " which lacks 2 variables"), ((3,), None)):
        model = _trainer(before.optimizer, widths).model

        def initialize(model=model):
            status = tf.train.Checkpoint(model=model).read(path)
            status.expect_partial().assert_existing_objects_matched()

        if said is None:
            checkpoints.begin(initialize, path)
            continue
        with pytest.raises(FlagValueError, match=f"a checkpoint of the same model, .*{said}"):
            checkpoints.begin(initialize, path)


def test_begins_only_from_the_same_model(small, tmp_path):
    """The whole model, or its backbone."""
    from official.core import task_factory

    path = Path(small[0].split("=")[1])
    other = tf.train.Checkpoint(model=tf.train.Checkpoint(x=tf.Variable(1.0)))
    params = _params(path)
    params.task.init_checkpoint = other.save(str(tmp_path / "other"))
    task = task_factory.get_task(params.task)
    model = task.build_model()
    for modules, said in (
        ("all", "a checkpoint of the same model, received .*which lacks"),
        ("backbone", "a checkpoint of the same model"),
        ("head", "init_checkpoint_modules: one of all, backbone, received 'head'"),
    ):
        task.task_config.init_checkpoint_modules = modules
        with pytest.raises(FlagValueError, match=said):
            task.initialize(model)
    task.task_config.init_checkpoint_modules = "all"
    task.task_config.init_checkpoint = str(tmp_path / "same")
    tf.train.Checkpoint(model=model).save(str(tmp_path / "same" / "ckpt"))
    before = model.get_weights()
    model.set_weights([0 * w for w in before])
    task.initialize(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_exports_and_predictions(small, tmp_path, capsys):
    """Files to probabilities: those of the model, of the SavedModel and in a file are the same."""
    from official.core import task_factory

    params = _params(Path(small[0].split("=")[1]))
    model = task_factory.get_task(params.task).build_model()
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.05, 0.3, w.shape) for w in model.get_weights()])
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "model" / "ckpt"))
    # As large as the model takes them: else the SavedModel would round what it has resized.
    images = rng.integers(0, 256, (5, 32, 32, 3))
    files = [tf.io.encode_jpeg(tf.constant(image, tf.uint8)).numpy() for image in images]
    data = tmp_path / "data"
    data.mkdir()
    (data / "classes.txt").write_text("a\nb\nc\nd\n")
    with tf.io.TFRecordWriter(str(data / "records")) as writer:
        for label, file in enumerate(files):
            features = {
                "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file])),
                "image/class/label": tf.train.Feature(
                    int64_list=tf.train.Int64List(value=[label % 4])
                ),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    fields = [
        f"task.validation_data.input_path={data / 'records'}",
        "task.validation_data.global_batch_size=2",
        "task.train_data.aug_crop=false",
        "task.validation_data.aug_crop=false",
    ]
    more = [*small, f"--params_override={','.join(fields)}"]
    export_dir, written = tmp_path / "new" / "export", tmp_path / "new" / "predictions"
    assert train.main(["train", *more, "--mode=export", f"--export_dir={export_dir}"]) == 0
    assert f"wrote {export_dir}, of {path}" in capsys.readouterr().out
    assert train.main(["train", *more, "--mode=predict", f"--predictions={written}"]) == 0
    pixels = np.array([tf.io.decode_jpeg(file).numpy() for file in files], np.float32)
    mean, deviation = np.array([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], np.float32)
    expected = tf.nn.softmax(model((pixels - mean) / deviation, training=False))
    signatures = tf.saved_model.load(str(export_dir)).signatures
    found = signatures["serving_default"](images=tf.constant(files))["probs"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert (export_dir / "classes.txt").read_text() == "a\nb\nc\nd\n"
    head, *lines = (line.split("\t") for line in written.read_text().splitlines())
    assert head == ["label", "prediction", "p0", "p1", "p2", "p3"]
    assert [line[0] for line in lines] == ["0", "1", "2", "3", "0"]
    assert [int(line[1]) for line in lines] == expected.numpy().argmax(axis=1).tolist()
    rows = [list(map(float, line[2:])) for line in lines]
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-6)
    # Another model is refused, and nothing is left.
    wider = f"--params_override={','.join(fields)},task.model.num_classes=7"
    arguments = [*small, wider, "--mode=export", f"--export_dir={tmp_path / 'other'}"]
    assert train.main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "--model_dir: expected a folder with checkpoints of this model" in error[-1]
    assert not (tmp_path / "other").exists()


# -- continuous evaluation -------------------------------------------------------------------------


class _Evaluation:
    """A runner that counts evaluations, over a folder with checkpoints."""

    def __init__(self, folder, timeout=0.0, train_steps=10):
        self.folder = folder
        self.evaluated = []
        self.step = tf.Variable(0, dtype=tf.int64)
        self.interrupted = Interruption()
        trainer = SimpleNamespace(
            continuous_eval_timeout=timeout, train_steps=train_steps, validation_steps=-1
        )
        resumption = SimpleNamespace(restore=self._restore, check=lambda: None)
        self.runner = SimpleNamespace(
            params=SimpleNamespace(trainer=trainer),
            checkpoint_manager=SimpleNamespace(resumption=resumption),
            controller=SimpleNamespace(global_step=self.step, evaluate=self._evaluate),
        )

    def _restore(self, path):
        self.step.assign(int(path.rsplit("-")[-1]))

    def _evaluate(self, steps):
        self.evaluated.append(int(self.step))

    def save(self, step):
        manager = tf.train.CheckpointManager(tf.train.Checkpoint(), str(self.folder), 1)
        manager.save(step)

    def run(self):
        tfm_training._evaluate_continuously(str(self.folder), self.runner, self.interrupted)


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(tfm_training, "_LOOK_S", 0.01)
    return _Evaluation(tmp_path)


def test_continuous_evaluation_ends_at_the_timeout(evaluation, capsys):
    evaluation.run()
    assert evaluation.evaluated == []
    evaluation.save(5)
    evaluation.run()
    assert evaluation.evaluated == [5]
    assert capsys.readouterr().out.count("no new checkpoint for") == 2


def test_continuous_evaluation_ends_at_the_first_signal(evaluation):
    evaluation.runner.params.trainer.continuous_eval_timeout = None
    evaluation.save(5)
    evaluation.interrupted._request(signal.SIGTERM)
    with pytest.raises(Interrupted):
        evaluation.run()
    assert evaluation.evaluated == [5]


@pytest.mark.parametrize("how", ["all steps", "summary"])
def test_continuous_evaluation_ends_with_the_training(evaluation, how, monkeypatch, capsys):
    """Of which it sees every checkpoint that is there when it looks."""
    evaluation.runner.params.trainer.continuous_eval_timeout = 60
    params, summary = evaluation.folder / "params.yaml", evaluation.folder / "summary.json"
    summary.write_text('{"steps": 5}')
    params.touch()
    os.utime(summary, (1, 1))  # of a run before
    evaluation.save(5)
    last = 10 if how == "all steps" else 8

    def sleep(_):
        evaluation.save(last)
        if how == "summary":
            summary.write_text(json.dumps({"steps": last}))

    monkeypatch.setattr(tfm_training.time, "sleep", sleep)
    evaluation.run()
    assert evaluation.evaluated == [5, last]
    assert f"training has ended at step {last}" in capsys.readouterr().out


# -- training --------------------------------------------------------------------------------------


def _command(small, *arguments):
    return [
        *[*python(), "-m", "official_recipes.resnet50.train", *small],
        "--cpu_replicas=2",
        *arguments,
    ]


def _run(small, *arguments, **kwargs):
    return subprocess.run(
        _command(small, *arguments), cwd=ROOT, capture_output=True, text=True, **kwargs
    )


def test_stop_and_go_on(small, tmp_path, monkeypatch, capsys):
    """SIGTERM in training checkpoints and exits 0; the same command goes on from there."""
    model_dir = tmp_path / "model"
    kind = "trainer.optimizer_config.optimizer.type=lbopt_lars"  # traced faster than vr_lars
    endless = f"--params_override={kind},trainer.train_steps=1000,trainer.checkpoint_interval=500"
    code, rest, errors = signal_when(
        _command(small, "--mode=train", endless), "steps/sec", signal.SIGTERM
    )
    assert code == 0, errors
    assert "the same command goes on from here" in rest
    path, state = last_checkpoint(model_dir)
    step = int(path.rsplit("-", 1)[1])
    assert 0 < step < 500
    momenta = [v for name, v in state.items() if name.startswith("optimizer/") and np.ndim(v) == 4]
    assert momenta
    assert any(np.any(v != 0) for v in momenta)

    done = f"--params_override={kind},trainer.train_steps={step + 2},trainer.validation_interval=2"
    monkeypatch.setattr(replicas, "_strategy", strategy_of(2))
    assert train.main(["train", *small, "--cpu_replicas=2", done]) == 0
    printed = capsys.readouterr().out
    assert f"restored from checkpoint: {path}" in printed
    assert f"eval | step: {step + 2: 6d}" in printed
    assert "accuracy" in printed
    _, after = last_checkpoint(model_dir)
    assert after["global_step/.ATTRIBUTES/VARIABLE_VALUE"] == step + 2
    iterations = [v for name, v in after.items() if "optimizer" in name and v.shape == ()]
    assert step + 2 in iterations


@pytest.mark.long
def test_a_seed_makes_equal_runs(small, tmp_path):
    def weights(name, seed):
        folder = tmp_path / name
        kind = "trainer.optimizer_config.optimizer.type=lbopt_lars,trainer.train_steps=2"
        arguments = [small[0], f"--model_dir={folder}"]
        result = _run(arguments, "--mode=train", f"--params_override={kind}", f"--seed={seed}")
        assert result.returncode == 0, result.stderr
        return {k: v for k, v in last_checkpoint(folder)[1].items() if np.ndim(v) == 4}

    one, again, other = weights("one", 7), weights("again", 7), weights("other", 8)
    assert set(one) == set(again) == set(other)
    for name, value in one.items():
        np.testing.assert_allclose(again[name], value, rtol=0, atol=1e-5, err_msg=name)
    assert any(np.abs(other[name] - value).max() > 1e-2 for name, value in one.items())


@pytest.mark.long
def test_killed_run_goes_on_with_all_its_state(small, tmp_path):
    """A second run without updates reads all that the first has written, and writes it again."""
    model_dir = tmp_path / "model"
    fixed = "--sub_batches=2"
    code, _, errors = signal_when(
        _command(small, "--mode=train", fixed, "--params_override=trainer.train_steps=1000"),
        "saved checkpoint",
        signal.SIGKILL,
    )
    assert code == -signal.SIGKILL, errors
    path, before = last_checkpoint(model_dir)
    step = int(path.rsplit("-", 1)[1])
    result = _run(small, "--mode=train", fixed, f"--params_override=trainer.train_steps={step}")
    assert result.returncode == 0, result.stderr
    assert f"restored from checkpoint: {path}" in result.stdout
    _, after = last_checkpoint(model_dir)
    assert_same_state(after, before)
    assert sum("optimizer" in name and np.ndim(v) == 4 for name, v in after.items()) > 10


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["lbopt_lars", "vr_lars", "vr_lamb", "sngm", "clars", "extrap_sgd", "sgd"]
)
def test_every_optimizer_trains(small, kind):
    override = f"--params_override=trainer.optimizer_config.optimizer.type={kind}"
    result = _run(small, override, "--sub_batches=2")
    assert result.returncode == 0, result.stderr
    assert "'validation_loss': np.float32(nan)" not in result.stdout
    assert "eval | step:      4" in result.stdout


# -- data ------------------------------------------------------------------------------------------


def _jpeg(value, kind="jpeg"):
    image = tf.fill([8, 8, 3], tf.cast(value, tf.uint8))
    return (tf.io.encode_jpeg if kind == "jpeg" else tf.io.encode_png)(image).numpy()


def _tree(folder, tiny=False, root="", per_class=3):
    """Three classes, the brightness tells which; returns it."""
    for label, name in enumerate(("ant", "bee", "cat")):
        for i in range(per_class):
            path = folder / root / "train" / name / ("images" if tiny else "") / f"{name}{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_jpeg(80 * label))
        path = folder / root / "val" / ("images" if tiny else name) / f"val_{label}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_jpeg(80 * label, "png" if label == 2 else "jpeg"))
        if tiny:
            with (folder / root / "val" / "val_annotations.txt").open("a") as file:
                file.write(f"val_{label}.JPEG\t{name}\t0\t0\t7\t7\n")
    return folder


def _examples(folder, split):
    found = []
    for path in sorted(folder.glob(f"{split}-*")):
        for record in tf.data.TFRecordDataset(str(path)):
            feature = tf.train.Example.FromString(record.numpy()).features.feature
            image = tf.io.decode_jpeg(feature["image/encoded"].bytes_list.value[0])
            found.append((feature["image/class/label"].int64_list.value[0], int(image[0, 0, 0])))
    return found


def _prepare(*arguments):
    from official_recipes.resnet50 import prepare_data

    return prepare_data.main(["prepare_data", *arguments])


@pytest.mark.parametrize("form", ["folder", "tiny", "tar", "tar.gz", "tiny in a folder.tar.xz"])
def test_prepare_data(tmp_path, form, capsys):
    tree = _tree(tmp_path / "in", tiny="tiny" in form, root="top" if "in a folder" in form else "")
    source = tree
    if "tar" in form:
        kind = {"tar": "tar", "gz": "gztar", "xz": "xztar"}[form.split(".")[-1]]
        source = shutil.make_archive(str(tmp_path / "packed"), kind, tree)
    out = tmp_path / "out"
    assert _prepare(f"--source={source}", f"--output_dir={out}", "--shards=2") == 0
    assert "9 train images in 2 files, 3 validation images" in capsys.readouterr().out
    train_examples = _examples(out, "train")
    assert sorted(label for label, _ in train_examples) == [0] * 3 + [1] * 3 + [2] * 3
    for label, value in train_examples + _examples(out, "validation"):
        assert abs(value - 80 * label) < 4
    assert sorted(label for label, _ in _examples(out, "validation")) == [0, 1, 2]
    record = json.loads((out / "dataset.json").read_text())
    assert record["classes"] == 3
    assert record["converted_to_jpeg"] == 1
    assert (out / "classes.txt").read_text().split() == ["ant", "bee", "cat"]
    assert not (out / "archive.tar").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_prepare_data_without_splits(tmp_path):
    tree = _tree(tmp_path / "in", per_class=10) / "train"
    out = tmp_path / "out"
    arguments = [f"--source={tree}", f"--output_dir={out}", "--validation_fraction=0.1"]
    assert _prepare(*arguments) == 0
    assert len(_examples(out, "train")) == 27
    assert len(_examples(out, "validation")) == 3


def test_prepare_data_mistakes(tmp_path, capsys):
    full = _tree(tmp_path / "full")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"\x1f\x8b\x08 no")
    unreadable = _tree(tmp_path / "unreadable")
    (unreadable / "train" / "ant" / "ant0.JPEG").write_bytes(b"no image")
    new = tmp_path / "new"
    for source, out, said in (
        ("nowhere", new, "--source: expected a folder or tar archive that exists"),
        (empty, new, "no images of a known layout"),
        (broken, new, "is damaged"),
        (unreadable, new, "is no image that can be decoded"),
        (full, full, "--output_dir: expected a folder that is empty or does not exist"),
        ("", new, "--source: expected a path"),
    ):
        assert _prepare(f"--source={source}", f"--output_dir={out}") == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert said in error[0]
        assert not new.exists()
        assert not (tmp_path / ".new.partial").exists()


class _Names:
    """Files of which only names count, but for those with a content."""

    def __init__(self, names, contents=None):
        self._names, self._contents = names, contents or {}

    def names(self):
        return [*self._names, *self._contents]

    def read(self, name):
        content = self._contents[name]
        return content.encode() if isinstance(content, str) else content


def _images(*folders, count=3):
    return [f"{folder}/{i}.jpg" for folder in folders for i in range(count)]


def _found(names, contents=None, **layout):
    """Classes, and the number of training and validation images by class."""
    from official_recipes.common.image_folders import Layout, find_images

    tree = find_images(_Names(names, contents), 0.0, 1, Layout(**layout))
    splits = [
        "".join(f"{c}{split.labels.count(i)} " for i, c in enumerate(tree.classes)).strip()
        for split in (tree.train, tree.validation)
    ]
    return (*splits, tree.left_out)


_CLASSES = ("ant", "bee")


def _split(train_folder, validation_folder, root=""):
    return [
        *_images(*(f"{root}{train_folder}/{c}" for c in _CLASSES)),
        *_images(*(f"{root}{validation_folder}/{c}" for c in _CLASSES), count=1),
    ]


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (_split("train", "val"), 0),
        (_split("Train", "Test"), 0),
        (_split("training_set", "test_set", "dataset/"), 0),
        (_split("training_set/training_set", "test_set/test_set"), 0),
        ([*_split("seg_train/seg_train", "seg_test/seg_test"), *_images("seg_pred/seg_pred")], 3),
        (_split("TRAINING", "Validation", "a/b/"), 0),
        (_split("train2017", "val2017"), 0),
        ([*_split("train", "valid"), *_images("test")], 3),
        ([*_split("train", "valid"), *_images("test/ant", count=2)], 2),
        ([*_split("train", "dev", "data/"), "data/sample.png", "data/train/x.webp"], 1),
        ([*_split("train", "val"), "train/ant/a.tif", "train/bee/b.tif", "train/ant/c.TIFF"], 3),
        ([*_split("train", "val"), "train/stray.jpg", "val/stray.jpg"], 2),
        ([n.replace("ant/", "ant/images/") for n in _split("train", "val")], 0),
    ],
)
def test_splits_are_found(names, left_out):
    train_images, validation_images, rest = _found(names)
    assert (train_images, validation_images) == ("ant3 bee3", "ant1 bee1")
    assert sum(rest.values()) == left_out


def test_classes_that_sound_like_splits():
    """A folder `train` between others that have images is a class."""
    assert _found(_images("bus", "car", "train"))[0] == "bus3 car3 train3"
    assert _found(_images("bus", "bullet_train"))[0] == "bullet_train3 bus3"
    assert _found(_images("flask", "test_tube"))[0] == "flask3 test_tube3"
    assert _found(_split("train", "val/images"), train_folder="train")[0] == "ant3 bee3"
    nested = _images("ant/old", "ant/new", "bee/old")
    assert _found(nested, train_folder=".")[0] == "ant6 bee3"
    assert _found(_split("1", "2", "animals/"), train_folder="animals/1")[0] == "ant3 bee3"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (_images("Train", "Test"), "no images of a known layout in Train"),
        (_split("1", "2", "animals/"), "the folders of animals (1, 2) have no images but only"),
        (_images("ant/train", "ant/test", "bee/train", "bee/test"), "(test, train), so either"),
        (_split("images", "labels"), "(images, labels) have no images but only folders (ant, bee)"),
        (_images("bus", "train", "test"), "some look like splits (test, train)"),
        (_images("ant", "bee", "Test"), "some look like splits (Test), the others like classes"),
        (_split("train1", "train2"), "not like one of training"),
        (_split("train", "other"), "the folders other, train look like splits, but not like one"),
        ([*_split("train", "val"), *_images("valid/ant")], "at most one of validation"),
        (_images("test/ant", "test/bee"), "the only split is test; say by --train_folder"),
        (_images("train/ant"), "one class only, ant, in train"),
        ([*_images("train/ant", "train/bee", "val")], "the 3 images of val are in no folders"),
        ([*_images("train/ant", "train/bee", "test/images")], "the 3 images of test are in no"),
        ([*_images("train/ant", "train/bee", "val/cat", "val/bee")], "without training images"),
        (["ant/a.webp", "bee/b.webp"], "(found: 0 such files, 2 .webp files)"),
        ([], "(found: 0 such files)"),
    ],
)
def test_layouts_that_can_be_read_in_two_ways(names, said):
    from official_recipes.common.data_format import DataFormatError

    with pytest.raises(DataFormatError) as error:
        _found(names)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"train_folder": "trian"}, "--train_folder: expected a folder with images inside the"),
        (
            {"train_folder": "train", "validation_folder": "x"},
            "--validation_folder: .* received 'x'",
        ),
        ({"validation_folder": "val"}, "--train_folder: expected a folder, as --validation_folder"),
        ({"validation_folder": "", "validation_labels": Path("x")}, "--validation_labels: "),
    ],
)
def test_layout_that_is_not_there(layout, said):
    with pytest.raises(FlagValueError, match=said):
        _found(_split("train", "val"), **layout)


_FLAT = [*_images("train/ant", "train/bee"), *(f"val/ILSVRC2012_val_{i}.JPEG" for i in range(3))]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("val/imagenet_2012_validation_synset_labels.txt", "bee\nant\nbee\n"),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\nILSVRC2012_val_2,bee 1 2 3 4 bee 1 2 3 4\n"
            "ILSVRC2012_val_1,ant 1 2 3 4 \nILSVRC2012_val_0,bee 1 1 1 1\n",
        ),
        (
            "val/val_annotations.txt",
            "".join(
                f"ILSVRC2012_val_{i}.JPEG\t{c}\t0\t0\n" for i, c in enumerate(["bee", "ant", "bee"])
            ),
        ),
    ],
)
def test_labels_of_flat_validation_images(file, text, tmp_path):
    from official_recipes.common.data_format import DataFormatError

    assert _found(_FLAT, {file: text})[:2] == ("ant3 bee3", "ant1 bee2")
    given = tmp_path / "labels"
    given.write_text(text)
    assert _found(_FLAT, validation_labels=given)[:2] == ("ant3 bee3", "ant1 bee2")
    assert _found(_FLAT, validation_folder="")[:2] == ("ant3 bee3", "ant0 bee0")
    lines = text.splitlines()
    for wrong, said in (
        (
            "\n".join(lines[:-1]),
            "has 2 lines with a class in each"
            if "," not in text and "\t" not in text
            else "has no line for val/ILSVRC",
        ),
        (
            text.replace("ant", "cow"),
            "has the class 'cow' for val/ILSVRC2012_val_1" if "ILS" in text else "no line for val/",
        ),
    ):
        given.write_text(wrong)
        with pytest.raises(DataFormatError, match=said):
            _found(_FLAT, validation_labels=given)


def _devkit(ids, field="WNID"):
    """A meta.mat as ImageNet's development kit has it, with a number for each class."""
    from scipy.io import savemat

    row = [("ILSVRC2012_ID", "f8"), (field, "O"), ("words", "O"), ("num_children", "f8")]
    synsets = np.array([(i, name, f"the {name}", 0) for i, name in ids], row)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    return file.getvalue()


_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = _devkit([(7, "ant"), (2, "bee"), (3, "animal")])


@pytest.mark.parametrize("folder", ["", "val/", "ILSVRC2012_devkit_t12/data/", None])
def test_development_kit(folder, tmp_path):
    """Numbers of ImageNet's kit, which are not in the order of the classes' names."""
    layout = {}
    if folder is None:
        (tmp_path / _TRUTH).write_text("7\n7\n2\n")
        (tmp_path / "meta.mat").write_bytes(_META)
        layout = {"validation_labels": tmp_path / _TRUTH}
    contents = {f"{folder}{_TRUTH}": b"7\n7\n2\n", f"{folder}meta.mat": _META}
    names = [*_FLAT, *contents] if folder is not None else _FLAT
    assert _found(names, contents, **layout)[:2] == ("ant3 bee3", "ant2 bee1")


@pytest.mark.parametrize(
    ("truth", "meta", "said"),
    [
        ("7\n7\n2\n", None, f"kit/{_TRUTH} needs the development kit's meta.mat beside it: no"),
        ("7\n7\n2\n", b"", "kit/meta.mat is no meta.mat of ImageNet's development kit"),
        ("7\n7\n2\n", b"MATLAB 5.0 MAT-file" * 20, "kit/meta.mat is no meta.mat of ImageNet's"),
        *(("7\n7\n2\n", _META[:size], "kit/meta.mat is no meta.mat") for size in (130, 200, -9)),
        ("7\n7\n2\n", _devkit([(7, "ant")], "name"), "kit/meta.mat is no meta.mat of ImageNet's"),
        ("7\n9\n2\n", _META, f"line 2 of kit/{_TRUTH} is no number of kit/meta.mat: '9'"),
        ("7\n7\n3\n", _META, "is the class animal, which is none of the training images'"),
        ("7\n7\n", _META, f"kit/{_TRUTH} has 2 lines with a class in each for 3 images"),
    ],
)
def test_development_kit_mistakes(truth, meta, said):
    from official_recipes.common.data_format import DataFormatError

    contents = {f"kit/{_TRUTH}": truth.encode()}
    contents |= {} if meta is None else {"kit/meta.mat": meta}
    with pytest.raises(DataFormatError) as error:
        _found([*_FLAT, *contents], contents)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_images(tmp_path, capsys):
    """Each image is decoded once: what ends early is an error, or counted and listed."""
    tree = _tree(tmp_path / "in")
    ants = tree / "train" / "ant"
    (ants / "cut.JPEG").write_bytes(_noise_jpeg()[:-200])
    (ants / "none.png").write_bytes(b"")
    (ants / "other.webp").write_bytes(b"RIFF")
    out = tmp_path / "out"
    arguments = [f"--source={tree}", f"--output_dir={out}"]
    assert _prepare(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "is no image that can be decoded (--skip_broken" in error[0]
    assert not out.exists()
    assert _prepare(*arguments, "--skip_broken") == 0
    printed = capsys.readouterr().out
    assert "wrote 9 train images" in printed
    assert "left out: 1 .webp files, 2 images that can not be decoded" in printed
    assert (out / "broken.txt").read_text().split() == ["train/ant/cut.JPEG", "train/ant/none.png"]
    record = json.loads((out / "dataset.json").read_text())
    assert record["splits"]["train"]["images"] == 9 == len(_examples(out, "train"))
    assert record["left_out"]["images that can not be decoded"] == 2


def _noise_jpeg(size=64):
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3)).astype("uint8")
    return tf.io.encode_jpeg(image).numpy()


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)]
)
def test_interrupted_preparation_leaves_nothing_that_looks_whole(tmp_path, number):
    tree = _tree(tmp_path / "in", per_class=1)
    for i in range(2500):
        os.link(tree / "train" / "ant" / "ant0.JPEG", tree / "train" / "bee" / f"x{i}.JPEG")
    out = tmp_path / "out"
    interrupt_preparation("resnet50", [f"--source={tree}"], out, number, python=python())
    assert _prepare(f"--source={tree}", f"--output_dir={out}", "--shards=1") == 0
    assert not (tmp_path / ".out.partial").exists()
    assert len(_examples(out, "train")) == 2503


def test_prepared_data_trains(tmp_path, small):
    """On the prepared files the stock reader finds what it needs (nothing is trained)."""
    out = tmp_path / "out"
    assert _prepare(f"--source={_tree(tmp_path / 'in')}", f"--output_dir={out}") == 0
    params = _params(Path(small[0].split("=")[1]))
    params.override({"task": {"train_data": {"input_path": f"{out}/train*"}}})
    from official.core import task_factory

    task = task_factory.get_task(params.task)
    images, labels = next(iter(task.build_inputs(params.task.train_data)))
    assert images.shape == (16, 32, 32, 3)
    assert set(labels.numpy()) <= {0, 1, 2}


def _record(label=1, image=b"", name=b"x.jpg"):
    feature = {"image/filename": tf.train.Feature(bytes_list=tf.train.BytesList(value=[name]))}
    if image:
        value = tf.train.BytesList(value=[image])
        feature["image/encoded"] = tf.train.Feature(bytes_list=value)
    if label is not None:
        value = tf.train.Int64List(value=[label])
        feature["image/class/label"] = tf.train.Feature(int64_list=value)
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def test_faults_of_records_are_named(tmp_path, small):
    """A fault in the input ends in one line with the file and the record."""
    from official.core import task_factory

    from official_recipes.common.record_files import naming_faults

    good = _record(3, _noise_jpeg())
    cut = "which is no TFRecord file or ends early: 19 records can be read"
    cases = {
        "whole": (good, None),
        "noimage": (_record(1), "noimage, record 9: no image in image/encoded (x.jpg)"),
        "nolabel": (_record(None, _noise_jpeg()), "record 9: no label in image/class/label"),
        "beyond": (_record(4, _noise_jpeg()), "record 9: label 4, not one from 0 to 3 (x.jpg)"),
        "negative": (_record(-1, _noise_jpeg()), "record 9: label -1, not one from 0 to 3"),
        "jpeg": (_record(1, _noise_jpeg()[:-200]), "record 9: no JPEG that can be decoded"),
        "odd": (b"odd", "record 9: no tf.train.Example"),
        "ends": (good, f"ends, {cut}"),
    }
    params = _params(Path(small[0].split("=")[1]))
    for name, (record, said) in cases.items():
        path = tmp_path / name
        with tf.io.TFRecordWriter(str(path)) as out:
            for index in range(20):
                out.write(record if index == 9 else good)
        if name == "ends":
            path.write_bytes(path.read_bytes()[:-100])
        data = {"input_path": str(path), "is_training": False, "global_batch_size": 8}
        params.override({"task": {"validation_data": {**data, "drop_remainder": False}}})
        task = task_factory.get_task(params.task)
        dataset = task.build_inputs(params.task.validation_data)
        if said is None:
            with naming_faults(task, ("validation_data",)):
                assert sum(len(labels) for _, labels in dataset) == 20
            continue
        with (
            pytest.raises(FlagValueError) as error,
            naming_faults(task, ("train_data", "validation_data")),
        ):
            list(dataset)
        assert said in str(error.value), name
        assert (
            f"task.validation_data.input_path: records for this task, received {tmp_path}"
            in str(error.value)
        )
    with pytest.raises(tf.errors.InvalidArgumentError), naming_faults(task, ("validation_data",)):
        tf.debugging.assert_equal(1, 2)
    # Of the file alone, where the task knows nothing of its records.
    plain = SimpleNamespace(task_config=params.task)
    for name, expected in (("ends", FlagValueError), ("noimage", tf.errors.InvalidArgumentError)):
        params.override({"task": {"validation_data": {"input_path": str(tmp_path / name)}}})
        dataset = task.build_inputs(params.task.validation_data)
        with pytest.raises(expected), naming_faults(plain, ("validation_data",)):
            list(dataset)


def test_classes_of_the_data_are_compared(tmp_path, small):
    out = tmp_path / "out"
    assert _prepare(f"--source={_tree(tmp_path / 'in')}", f"--output_dir={out}") == 0
    params = _params(Path(small[0].split("=")[1]))
    for field in ("train_data", "validation_data"):
        params.override({"task": {"train_data": {"input_path": "synthetic"}}})
        params.override({"task": {field: {"input_path": f"{out}/train*"}}})
        with pytest.raises(
            FlagValueError, match=r"num_classes: 3 as in .*dataset\.json, received 4"
        ):
            train.check(params, _OPTIONS)
    params.override({"task": {"model": {"num_classes": 3}}})
    train.check(params, _OPTIONS)
    other = shutil.copytree(out, tmp_path / "other")
    params.override({"task": {"train_data": {"input_path": f"{other}/train*"}}})
    train.check(params, _OPTIONS)
    (other / "classes.txt").write_text("ant\nbee\ncow\n")
    with pytest.raises(
        FlagValueError, match=r"the same classes .*other/classes\.txt than in .*out/"
    ):
        train.check(params, _OPTIONS)


def test_evaluation_without_images_on_a_replica():
    """Metrics are means over images; no image at all changes nothing."""
    from official.core import task_factory

    params = _with_optimizer("sgd", validation_data={"drop_remainder": False})
    task = task_factory.get_task(params.task)
    model = task.build_model()
    for batches in ((3, 1, 0), (4,)):
        metrics = task.build_metrics(training=False)
        step = tf.function(
            lambda images, labels, metrics=metrics: task.validation_step(
                (images, labels), model, metrics
            ),
            input_signature=[
                tf.TensorSpec([None, 32, 32, 3]),
                tf.TensorSpec([None], tf.int32),
            ],
        )
        images, labels = next(iter(_synthetic(4)))
        start = 0
        for count in batches:
            assert step(images[start : start + count], labels[start : start + count]) == {}
            start += count
        results = {metric.name: float(metric.result()) for metric in metrics}
        if len(batches) > 1:
            expected = results
    assert set(results) == {"accuracy", "top_5_accuracy", "validation_loss"}
    assert results == pytest.approx(expected, rel=1e-5)


def _synthetic(batch):
    from official_recipes.resnet50.experiments import synthetic_images

    return synthetic_images(4, [32, 32, 3], batch, is_training=False)


def _prepare_squares(data_dir, dataset="bright_squares", label="label"):
    """Makes a prepared dataset of TFDS: squares whose brightness is their class."""
    import tensorflow_datasets as tfds

    class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = dataset

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3))
            features = {"image": image, label: tfds.features.ClassLabel(num_classes=4)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(64), "test": self._generate_examples(32)}

        def _generate_examples(self, count):
            rng = np.random.default_rng(count)
            for i in range(count):
                image = rng.integers(0, 20, (40, 36, 3)) + 60 * (i % 4)
                yield i, {"image": image.astype("uint8"), label: i % 4}

    Squares(data_dir=str(data_dir)).download_and_prepare()


def _tfds_override(data_dir, name="bright_squares"):
    return "--params_override=" + ",".join(
        f"task.{data}.input_path='',task.{data}.tfds_name={name},task.{data}.tfds_split={split},"
        f"task.{data}.tfds_data_dir={data_dir},task.{data}.decode_jpeg_only=false"
        for data, split in (("train_data", "train"), ("validation_data", "test"))
    )


@pytest.mark.long
def test_dataset_of_tfds_trains(small, tmp_path):
    _prepare_squares(tmp_path / "tfds")
    kind = "trainer.optimizer_config.optimizer.type=lbopt_lars"
    steps = "trainer.train_steps=24,trainer.validation_interval=24"
    override = f"{_tfds_override(tmp_path / 'tfds')},{kind},{steps}"
    result = _run(small, override)
    assert result.returncode == 0, result.stderr
    assert "eval | step:     24" in result.stdout
    losses = [
        float(x) for x in re.findall(r"'training_loss': np.float32\(([0-9.]+)\)", result.stdout)
    ]
    assert len(losses) == 12
    assert losses[-1] < losses[0]


def test_dataset_of_tfds_is_read(small, tmp_path):
    _prepare_squares(tmp_path / "tfds")
    params = _params(Path(small[0].split("=")[1]))
    override = _tfds_override(tmp_path / "tfds").removeprefix("--params_override=")
    from official.modeling.hyperparams import params_dict

    params = params_dict.override_params_dict(params, override, is_strict=True)
    from official.core import task_factory

    task = task_factory.get_task(params.task)
    images, labels = next(iter(task.build_inputs(params.task.validation_data)))
    assert images.shape == (32, 32, 32, 3)
    brightness = images.numpy().mean(axis=(1, 2, 3))
    means = [brightness[labels.numpy() == label].mean() for label in range(4)]
    assert np.all(np.diff(means) > 0.5)


def test_dataset_of_tfds_that_does_not_fit(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tfm_training, "_strategy", lambda *_: tf.distribute.get_strategy())
    _prepare_squares(tmp_path / "tfds")
    _prepare_squares(tmp_path / "tfds", dataset="odd_squares", label="kind")
    kind = ",trainer.optimizer_config.optimizer.type=lbopt_lars"
    capsys.readouterr()
    for override, said in (
        (_tfds_override(tmp_path / "tfds", "odd_squares"), "the features `image` and `label`"),
        (
            _tfds_override(tmp_path / "tfds") + ",task.model.num_classes=3",
            "task.model.num_classes: at least the 4 of bright_squares",
        ),
    ):
        assert train.main(["train", *small, override + kind]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert said in error[0]


def test_unknown_fields_of_files_are_named(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("trainer: {nonsense: 1}")
    with pytest.raises(FlagValueError, match=r"--config_file: .*'nonsense' does not exist"):
        _params(file)
