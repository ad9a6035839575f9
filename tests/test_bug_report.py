"""`python -m tf_lbopt`: the report, and its check of one update of each optimizer."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from forked_python import python
from harness import KINDS

import tf_lbopt
from benchmarks.references import reference
from tf_lbopt import __main__ as bug_report
from tf_lbopt import registry

ROOT = pathlib.Path(__file__).parents[1]
NAMES = [info.name for info in tf_lbopt.list_optimizers()]


def run(folder, *arguments, command=(sys.executable,), **environment):
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, "-m", "tf_lbopt", *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def only(monkeypatch, *names):
    rows = [info for info in tf_lbopt.list_optimizers() if info.name in names]
    monkeypatch.setattr(registry, "_ALL", rows)


@pytest.mark.parametrize(
    "flags", [("--no-update",), pytest.param((), marks=pytest.mark.long)], ids=["quick", "all"]
)
def test_the_program(flags, tmp_path):
    done = run(tmp_path, "--json", *flags, command=python())
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["versions"]["tf_lbopt"] == tf_lbopt.__version__
    assert report["versions"]["TensorFlow"].startswith(tf.__version__)
    assert "backend tensorflow" in report["versions"]["Keras"]
    assert report["registered"]["Keras 3"] == f"{len(NAMES)} of {len(NAMES)} optimizers"
    assert ("updates" in report) is not bool(flags)
    if not flags:
        assert report["updates"].pop("on")
        assert [*report["updates"]] == NAMES
        assert all(result.startswith("ok, error ") for result in report["updates"].values())


def test_one_update_of_each_kind(monkeypatch):
    only(monkeypatch, *KINDS)
    results = bug_report.check_updates(strategy_of(1))
    assert sorted(results) == sorted(KINDS)
    assert all(result.startswith("ok, error ") for result in results.values())


@pytest.mark.parametrize(
    ("environment", "hides", "expected"),
    [
        ({"KERAS_BACKEND": "jax"}, "", "tf_lbopt runs on Keras's TensorFlow backend."),
        ({}, "tensorflow", "tf_lbopt needs TensorFlow 2.16 or later. "),
    ],
    ids=["backend", "no_tensorflow"],
)
def test_what_is_missing_is_one_line(environment, hides, expected, tmp_path):
    if hides:
        code = f"import sys\nsys.modules[{hides!r}] = None\n"
        (tmp_path / "sitecustomize.py").write_text(code, encoding="utf-8")
    done = run(tmp_path, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(expected)


def test_it_fits_into_a_report(monkeypatch, capsys):
    only(monkeypatch, "lars", "sgd")
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("/home/me"))
    for name in ("tf_keras", "official"):  # as where they are not installed
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(bug_report.ARGUMENTS, "weight_decay", "/home/me/x" + 50 * " long")
    assert bug_report.main([]) == 1
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "/home/me" not in text
    assert "FAILED: TypeError: `weight_decay` must be" in text
    assert "weight_decay='~/x long long" in text
    assert "not there: pip install 'tf-lbopt[tf-keras]'" in text
    assert "not there: pip install 'tf-lbopt[recipes]'" in text
    assert text.splitlines()[-1] == "FAILED: see above"
    assert bug_report.main(["--no-update"]) == 0
    text = capsys.readouterr().out
    assert "One update" not in text
    assert text.splitlines()[-1] == "ok"


def assigns(value):
    """An `apply` that does the same to all variables."""

    def apply(optimizer, gradients, variables):
        for variable in variables:
            variable.assign(value(variable))

    return apply


def wrong_in_float32(variable):
    return variable + (1.0 if variable.dtype == "float64" else 1.1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (wrong_in_float32, "FAILED: expected 2."),
        (lambda v: v + (1.0 if v.dtype == "float64" else np.nan), ", got nan for [0, 0] of layer"),
        (lambda v: v + 0.0, "FAILED: expected in float64 a step of layer 0, got one of 0.0"),
        (lambda v: v + np.inf, "FAILED: expected in float64 a step of layer 0, got one of inf"),
        (lambda v: v + "a", "FAILED: "),
    ],
    ids=["wrong", "nan", "unmoved", "infinite", "raises"],
)
def test_a_broken_optimizer(value, expected, monkeypatch, capsys):
    only(monkeypatch, "sgd", "lars")
    monkeypatch.setattr(tf_lbopt.SGD, "apply", assigns(value))
    monkeypatch.setattr(bug_report, "_PARTS", {})
    assert bug_report.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["updates"]["sgd"].startswith("FAILED: ")
    assert expected in report["updates"]["sgd"]
    assert report["updates"]["lars"].startswith("ok, error ")


def test_gpus(monkeypatch):
    """As TensorFlow would tell of two, whose memory is in use."""

    def in_use(device, growth):
        raise RuntimeError("Physical devices cannot be modified after being initialized")

    found = [tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU") for i in (0, 1)]
    logical = [tf.config.LogicalDevice(f"/device:GPU:{i}", "GPU") for i in (0, 1)]
    details = {"compute_capability": (9, 0), "device_name": "A GPU"}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: found)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: logical)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details)
    monkeypatch.setattr(tf.config.experimental, "get_memory_growth", lambda device: False)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", in_use)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: "mirrored")
    row = "compute_capability (9, 0), device_name A GPU, memory growth off"
    assert bug_report._devices() == {"GPU:0": row, "GPU:1": row, "logical": "2 GPU"}
    assert bug_report._strategy() == ("mirrored", "2 GPUs")
    del logical[1]
    assert bug_report._strategy() == (tf.distribute.get_strategy(), "a GPU")


def test_a_device_that_fails(monkeypatch, capsys):
    def fails():
        raise RuntimeError("no\ndriver")

    for name in ("_devices", "_strategy"):
        monkeypatch.setattr(bug_report, name, fails)
    monkeypatch.setattr(bug_report, "_PARTS", {})
    assert bug_report.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["tf_lbopt"] == tf_lbopt.__version__
    assert report["devices"] == report["updates"] == {"all": "FAILED: RuntimeError: no driver"}


def test_a_broken_part(monkeypatch, capsys):
    monkeypatch.setattr(bug_report, "_PARTS", {"tf_lbopt.nothing": ("numpy", "recipes", "TABLE")})
    assert bug_report.main(["--no-update", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["registered"]["tf_lbopt.nothing"].startswith("FAILED: ModuleNotFoundError: ")
    assert "updates" not in report


@pytest.mark.parametrize("name", ["vr_lamb", pytest.param("extrap_sgd", marks=pytest.mark.long)])
def test_several_replicas(name, monkeypatch):
    only(monkeypatch, name)
    results = bug_report.check_updates(strategy_of(2))
    assert results[name].startswith("ok, error ")
    assert float(results[name].split()[2]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_expected_is_the_reference(name):
    (info,) = tf_lbopt.list_optimizers(name)
    weights, sub_batches = bug_report.inputs(4)
    right = reference(name, weights, [sub_batches], **bug_report.ARGUMENTS)
    # VRGD's γ is rounded to float32.
    tolerance = 1e-8 if info.needs_sub_batches else 1e-12
    for found, end in zip(bug_report.expected(info.cls, weights, sub_batches), right, strict=True):
        np.testing.assert_allclose(found, end, rtol=0, atol=tolerance * np.abs(end).max())


def test_what_the_project_has_run():
    cells = json.loads((ROOT / "docs" / "compatibility.json").read_text(encoding="utf-8"))
    ran = {}
    for cell in cells.values():
        versions = [cell["versions"][name].split(".") for name in ("tensorflow", "keras")]
        (_, tensorflow), (_, keras) = ((int(v[0]), int(v[1])) for v in versions)
        ran.setdefault(tensorflow, set()).add(keras)
    expected = {f"2.{t}": tuple(f"3.{k}" for k in sorted(ran[t])) for t in sorted(ran)}
    assert expected == bug_report.RUN
    assert bug_report._combination("2.20.0", "3.15.1").endswith(": run by the project")
    assert bug_report._combination("2.20.1", "3.9.0").endswith(
        "TensorFlow 2.20 with Keras 3.9: not run by the project, which ran Keras 3.11, 3.12, 3.15"
    )
    assert "which ran TensorFlow 2.16, 2.17" in bug_report._combination("2.30.0", "3.15.0")
