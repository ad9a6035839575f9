"""Keras's `fit` on two worker processes; see `multi_worker_fit`."""

import csv
import json
import re
import types

import keras
import numpy as np
import pytest
from conftest import strategy_of
from harness_workers import ROOT, Workers

import tf_lbopt
from tests import multi_worker_fit
from tf_lbopt import _compat, distribution
from tf_lbopt.aggregation.replica_state import header_of

KILLED_IN = 1  # epoch, from 0
WEIGHTS = slice(6, 14)  # of what `train` returns


def run(folder, name, replicas, *names, killed_in=-1):
    command = ["-m", "tests.multi_worker_fit", str(folder), str(replicas), str(killed_in), *names]
    return Workers(folder, name, [command, command])


def assert_equals_one_process(folder, replicas, name, epochs=2, history=True):
    """Weights to 1e-6; and all workers have the same, to the last bit."""
    first, other = (dict(np.load(folder / f"{name}-{index}.npz")) for index in (0, 1))
    expected = multi_worker_fit.train(
        strategy_of(2 * replicas), multi_worker_fit.RUNS[name], epochs=epochs
    )
    assert len(first) == len(other) == len(expected)
    # Names that Keras has numbered differ.
    for key, one, two, three in zip(
        expected, first.values(), other.values(), expected.values(), strict=True
    ):
        np.testing.assert_array_equal(one, two, err_msg=key)
        if history or three.shape != (epochs,):
            # Ratios of moments tell rounding errors of gradients that are nearly 0.
            weight = key in list(expected)[WEIGHTS]
            rtol, atol = (1e-6, 1e-6) if weight else (1e-5, 2e-5)
            np.testing.assert_allclose(one, three, rtol, atol, err_msg=key)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_fit(tmp_path):
    """With all callbacks: equal to one process, and one worker has written."""
    name = "vr_lamb_accumulated"
    with run(tmp_path, "job", 1, name) as job:
        assert job.exit_codes() == [0, 0], job.errors()
        for index in (0, 1):
            said = job.said(index).splitlines()
            assert len(said) == 2
            assert all(line.endswith("Received: steps_per_execution=2") for line in said)
    assert_equals_one_process(tmp_path, 1, name)
    # The backup is deleted at the end.
    saved = ["1.weights.h5", "2.weights.h5", "best.keras"]
    parts = [f"{path}.worker-{index}-of-2.npz" for path in saved for index in (0, 1)]
    saved = sorted([*saved, *parts, "log.csv"])
    found = files(tmp_path / name)
    assert [path for path in found if "/" not in path] == saved
    events = [path.split(".")[0] for path in found if "/" in path]
    expected = ["board/train/events", "board/validation/events"]
    assert events == (expected if multi_worker_fit.TENSORBOARD else [])
    assert not [path for path in tmp_path.glob("temporary-*/*") if path.is_dir()]
    with (tmp_path / name / "log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(losses, np.load(tmp_path / f"{name}-0.npz")["loss"])
    model = keras.models.load_model(tmp_path / name / "best.keras")
    model.load_weights(tmp_path / name / "2.weights.h5")
    weights = list(np.load(tmp_path / f"{name}-0.npz").values())[WEIGHTS]
    for one, two in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.long
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("part", [slice(3), slice(3, None)], ids=["some", "others"])
def test_every_optimizer(tmp_path, replicas, part):
    names = list(multi_worker_fit.RUNS)[part]
    with run(tmp_path, "job", replicas, *names) as job:
        assert job.exit_codes() == [0, 0], job.errors()
    for name in names:
        assert_equals_one_process(tmp_path, replicas, name)


@pytest.mark.long
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", multi_worker_fit.GROWING)
def test_a_batch_that_grows(tmp_path, replicas, name):
    """On all workers at the same update, also where the noise scale decides; as in one process."""
    with run(tmp_path, "job", replicas, name) as job:
        assert job.exit_codes() == [0, 0], job.errors()
    first, other = (dict(np.load(tmp_path / f"{name}-{index}.npz")) for index in (0, 1))
    expected = multi_worker_fit.train_growing(strategy_of(2 * replicas), name)
    steps = list(dict.fromkeys(expected["seen"][:, 1].tolist()))
    assert steps == ([1, 2, 3] if name == "growing_by_schedule" else [1, 2])
    assert len(first) == len(other) == len(expected)
    for key, one, two, three in zip(
        expected, first.values(), other.values(), expected.values(), strict=True
    ):
        np.testing.assert_array_equal(one, two, err_msg=key)
        # What is measured is a ratio of differences.
        tolerance = 1e-3 if "noise_scale" in key else 1e-6
        np.testing.assert_allclose(one, three, tolerance, tolerance, err_msg=key)


@pytest.mark.long
@pytest.mark.parametrize(
    ("replicas", "name"),
    [
        (1, "keras_sgd"),
        (1, "vr_lamb_accumulated"),
        (1, "extrap_sgd_sub_batches"),
        (2, "vr_lamb_accumulated"),
    ],
)
def test_killed_worker_and_restart(tmp_path, replicas, name):
    """The other ends with an error; the same program goes on where the epoch began."""
    with run(tmp_path, "killed", replicas, name, killed_in=KILLED_IN) as job:
        codes = job.exit_codes()
        assert codes[0] not in (0, None), job.errors()
        assert codes[1] == -9
    assert "backup/latest.weights.h5" in files(tmp_path / name)
    with run(tmp_path, "again", replicas, name) as job:
        assert job.exit_codes() == [0, 0], job.errors()
    history = dict(np.load(tmp_path / f"{name}-0.npz"))["loss"]
    assert len(history) == multi_worker_fit.EPOCHS - KILLED_IN
    assert_equals_one_process(tmp_path, replicas, name, multi_worker_fit.EPOCHS, history=False)


@pytest.mark.long
def test_documented_example(tmp_path):
    text = (ROOT / "docs" / "scaling.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.strip().count("\n") + 1 <= 10
    program = code.replace('"backup"', repr(str(tmp_path / "backup")))
    with Workers(tmp_path, "job", [["-c", program]] * 2) as job:
        assert job.exit_codes() == [0, 0], job.errors()
        first, other = (re.findall(r"loss: (\S+)", job.said(index)) for index in (0, 1))
    assert first == other
    assert len(first) == 5
    assert float(first[-1]) < float(first[0])


# -- in one process --------------------------------------------------------------------------------


PATCHED = [
    (_compat.TensorFlowTrainer, "_maybe_symbolic_build"),
    (_compat.keras_trainer, "reduce_per_replica"),
    (keras.callbacks.ModelCheckpoint, "_save_model"),
    (keras.callbacks.BackupAndRestore, "_save_model"),
    (keras.callbacks.BackupAndRestore, "_load_model"),
    (keras.callbacks.BackupAndRestore, "on_train_end"),
    (keras.callbacks.CSVLogger, "on_train_begin"),
    (keras.callbacks.TensorBoard, "set_model"),
    *((keras.Model, name) for name in ("save", "save_weights", "load_weights")),
]


def patched():
    return [vars(owner)[name] for owner, name in PATCHED]


@pytest.fixture
def restored(monkeypatch):
    """Undoes what `enable_multi_worker_fit` does to Keras."""
    for (owner, name), original in zip(PATCHED, patched(), strict=True):
        monkeypatch.setattr(owner, name, original)


def test_import_changes_nothing_and_the_call_is_idempotent(restored):
    before = patched()
    assert not any("tf_lbopt" in method.__code__.co_filename for method in before)
    tf_lbopt.distribution.enable_multi_worker_fit()
    once = patched()
    assert not set(once) & set(before)
    tf_lbopt.distribution.enable_multi_worker_fit()
    assert patched() == once


def test_what_is_right_stays(restored, monkeypatch):
    def right(values, strategy, reduction):
        return keras.tree.map_structure(lambda v: strategy.reduce("MEAN", v, axis=None), values)

    def build(self, iterator=None, data_batch=None):
        for _, _, _batches in iterator:
            break
        self._symbolic_build(data_batch=None)

    monkeypatch.setattr(_compat.keras_trainer, "reduce_per_replica", right)
    monkeypatch.setattr(_compat.TensorFlowTrainer, "_maybe_symbolic_build", build)
    tf_lbopt.distribution.enable_multi_worker_fit()
    assert patched()[:2] == [build, right]


@pytest.mark.long
def test_other_strategies_are_not_concerned(restored, tmp_path):
    run = multi_worker_fit.RUNS["lars"]
    expected = multi_worker_fit.train(strategy_of(2), run, epochs=2)
    tf_lbopt.distribution.enable_multi_worker_fit()
    callbacks = multi_worker_fit.callbacks_of(tmp_path)
    result = multi_worker_fit.train(strategy_of(2), run, callbacks)
    for (key, value), own in zip(expected.items(), result.values(), strict=True):
        np.testing.assert_array_equal(own, value, err_msg=key)
    assert len(files(tmp_path)) == (6 if multi_worker_fit.TENSORBOARD else 4)


def test_unknown_keras(restored, monkeypatch):
    monkeypatch.delattr(_compat.TensorFlowTrainer, "_maybe_symbolic_build")
    with pytest.raises(
        RuntimeError, match=f"Keras 3.7 to 3.15. Received: Keras {keras.__version__}"
    ):
        tf_lbopt.distribution.enable_multi_worker_fit()


def test_untried_version(restored, monkeypatch):
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    with pytest.warns(UserWarning, match=r"multi_worker_fit was tried .* Received: 3\.99") as found:
        tf_lbopt.distribution.enable_multi_worker_fit()
    assert found[0].filename == __file__


def test_part_of_a_worker(restored, monkeypatch, tmp_path, caplog):
    """What replicas keep comes from the file beside the chief's, if that is of the same step."""
    tf_lbopt.distribution.enable_multi_worker_fit()
    make = multi_worker_fit.RUNS["vr_lamb_accumulated"]
    model, other = (multi_worker_fit.model_of(strategy_of(2), make) for _ in range(2))
    model.fit(*multi_worker_fit.data(), multi_worker_fit.BATCH, verbose=0)
    other.optimizer.build(other.trainable_variables)
    own = model.optimizer._accumulation
    expected = own.part()
    assert len(expected) > 1
    # As if there were another worker.
    header = np.frombuffer(json.dumps({**header_of(expected), "complete": False}).encode(), "uint8")
    expected["header"] = header
    monkeypatch.setattr(own, "_stored", lambda: expected)
    monkeypatch.setattr(_compat, "on_several_workers", lambda strategy: True)
    monkeypatch.setattr(distribution, "_place", lambda strategy: (0, 2))
    monkeypatch.setattr(distribution, "_gather", lambda strategy, numbers: [numbers] * 2)
    path = tmp_path / "saved.weights.h5"
    model.save_weights(path)
    (part,) = tmp_path.glob("*.npz")
    assert part.name == "saved.weights.h5.worker-0-of-2.npz"
    other.load_weights(path)
    found = other.optimizer._accumulation.part()
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert not caplog.records
    arrays = dict(np.load(part))
    np.savez(part, **{**arrays, "stamp": arrays["stamp"] + 1})
    other.load_weights(path)
    assert len(other.optimizer._accumulation.part()) == 1  # the chief's header
    assert "files beside" in caplog.text


@pytest.mark.parametrize(
    ("jobs", "task", "expected"),
    [
        ({"worker": ["a", "b"]}, ("worker", 0), (0, 2)),
        ({"worker": ["a", "b"]}, ("worker", 1), (1, 2)),
        ({"chief": ["a"], "worker": ["b", "c"]}, ("chief", 0), (0, 3)),
        ({"chief": ["a"], "worker": ["b", "c"], "ps": ["d"]}, ("worker", 1), (2, 3)),
    ],
)
def test_place(jobs, task, expected):
    cluster = types.SimpleNamespace(as_dict=lambda: jobs)
    resolver = types.SimpleNamespace(
        cluster_spec=lambda: cluster, task_type=task[0], task_id=task[1]
    )
    strategy = types.SimpleNamespace(cluster_resolver=resolver)
    assert distribution._place(strategy) == expected


def test_workers_that_find_different_backups(monkeypatch):
    monkeypatch.setattr(distribution, "_gather", lambda strategy, numbers: [[1, 2], numbers])
    distribution._check_backup(None, "here", [1, 2])
    with pytest.raises(ValueError, match="'here', where worker 1 finds none and worker 0 epoch 2"):
        distribution._check_backup(None, "here", [0, -1])
