"""Two worker processes that train together, through TF_CONFIG."""

import importlib
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from harness_recipes import SMALL_RESNET
from harness_workers import LIMIT_S, ROOT, Workers, config_of

from official_recipes.common import multi_worker
from official_recipes.common.multi_worker import Cluster, ClusterError, cluster_from_environment
from official_recipes.resnet50 import train

SMALL = SMALL_RESNET.replace("global_batch_size: 16", "global_batch_size: 8").replace(
    "float32}", "float32, distribution_strategy: multi_worker_mirrored, all_reduce_alg: ring}"
)


# -- who is who ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("", Cluster(1, 0)),
        (config_of({"worker": ["a:1"]}, "worker", 0), Cluster(1, 0)),
        (config_of({"worker": ["a:1", "b:1"]}, "worker", 1), Cluster(2, 1)),
        (config_of({"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "chief", 0), Cluster(3, 0)),
        (config_of({"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "worker", 0), Cluster(3, 1)),
    ],
)
def test_cluster(config, expected, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    assert cluster_from_environment() == expected
    assert expected.chief == (expected.index == 0)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[1]",
        '{"cluster": {"worker": ["a:1", "b:1"]}}',
        config_of({"worker": ["a:1", "b:1"]}, "worker", 2),
        config_of({"worker": ["a:1", "b:1"]}, "ps", 0),
    ],
)
def test_unusable_cluster(config, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ClusterError, match="TF_CONFIG: expected"):
        cluster_from_environment()
    assert train.main(["train", "--model_dir=unused"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cpu_replicas=2"], "--cpu_replicas: expected no such flag where TF_CONFIG names 2"),
        (["--mode=continuous_eval"], "--mode: expected another where TF_CONFIG names 2 workers"),
        (
            ["--params_override=runtime.distribution_strategy=mirrored"],
            "runtime.distribution_strategy=multi_worker_mirrored, since TF_CONFIG names 2 workers",
        ),
    ],
)
def test_flags_that_workers_can_not_have(arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.setenv("TF_CONFIG", config_of({"worker": ["a:1", "b:1"]}, "worker", 0))
    flags = [f"--config_file={tmp_path / 'small.yaml'}", f"--model_dir={tmp_path / 'model'}"]
    assert train.main(["train", *flags, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (None, [0, 0], None),
        (signal.SIGTERM, [0, 0], signal.SIGTERM),
        (None, [0, 1], signal.SIGTERM),
        (signal.SIGTERM, [1, 0], signal.SIGINT),
    ],
)
def test_signal_that_all_agree_on(own, others, expected, monkeypatch):
    workers = multi_worker.Workers(None, Cluster(2, 0))
    monkeypatch.setattr(workers, "gather", lambda numbers: [numbers, others])
    assert workers.agreed_signal(own) == expected


# -- training --------------------------------------------------------------------------------------


class _Job(Workers):
    """Two workers of the ResNet recipe."""

    def __init__(self, folder, name, *arguments, workers=2, own_arguments=((), ())):
        config = folder / "small.yaml"
        config.write_text(SMALL)
        flags = [f"--config_file={config}", f"--model_dir={folder / 'model'}", *arguments]
        program = ["-m", "tests.multi_worker_run"]
        files = [str(folder / f"{name}-{index}.npz") for index in range(workers)]
        commands = [
            [*program, file, *flags, *own] for file, own in zip(files, own_arguments, strict=False)
        ]
        super().__init__(folder, name, commands)

    def ends(self):
        """What the workers had at their ends, which must be the same."""
        states = [dict(np.load(file.with_suffix(".npz"))) for file in self.files]
        for other in states[1:]:
            assert list(states[0]) == list(other)
            for name, value in states[0].items():
                np.testing.assert_array_equal(other[name], value, err_msg=name)
        return states[0]


def _kind(kind, *overrides):
    kind = f"trainer.optimizer_config.optimizer.type={kind}"
    return f"--params_override={','.join([kind, *overrides])}"


def _latest_step(folder):
    state = (folder / "model" / "checkpoint").read_text()
    return int(re.search(r'^model_checkpoint_path: "ckpt-(\d+)"', state, re.M).group(1))


@pytest.mark.long
def test_two_workers(tmp_path):
    """They end with the same weights and state; the chief alone speaks and writes."""
    with _Job(tmp_path, "job", "--mode=train", _kind("vr_lars")) as job:
        assert job.exit_codes() == [0, 0], job.errors()
        state = job.ends()
        assert state["step"] == 4
        assert all(np.isfinite(value).all() for value in state.values())
        assert "waiting for all 2 workers" in job.said(0)
        assert "train | step:      4" in job.said(0)
        assert job.said(1) == ""
    summary = json.loads((tmp_path / "model" / "summary.json").read_text())
    assert (summary["steps"], summary["replicas"]) == (4, 2)
    assert _latest_step(tmp_path) == 4
    assert len(list((tmp_path / "model" / "train").iterdir())) == 1  # file of summaries


@pytest.mark.long
def test_dry_run(tmp_path):
    """Two steps together; the chief alone speaks, and neither writes."""
    with _Job(tmp_path, "job", "--dry_run", _kind("vr_lars")) as job:
        assert job.exit_codes() == [0, 0], job.errors()
        job.ends()
        for said in (
            "two steps, nothing is written",
            "devices: 2 replicas; on this worker CPU:0",
            "batch: 8 in a step, 4 on a device",
            "k = 2 (2 replicas x 1)",
            "steps to go: 4 of 4",
        ):
            assert said in job.said(0)
        assert job.said(1) == ""
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "recipe", ["cifar.train", "wikitext2.train", "multi30k.train", "quickstart.__main__"]
)
def test_keras_recipes_train_in_one_process(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", config_of({"worker": ["a:1", "b:1"]}, "worker", 0))
    monkeypatch.chdir(tmp_path)
    flags = ["--optimizer=momentum", "--learning_rate=0.1", "--model_dir=run", "--dry_run"]
    flags = [] if "quickstart" in recipe else flags
    assert importlib.import_module(f"official_recipes.{recipe}").main([recipe, *flags]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "TF_CONFIG: expected one worker" in error
    assert "received 2 workers" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lbopt_lars", "clars", "sngm", "vr_lamb", "extrap_sgd", "sgd"])
def test_every_optimizer_agrees(tmp_path, kind):
    with _Job(tmp_path, "job", "--sub_batches=2", _kind(kind)) as job:
        assert job.exit_codes() == [0, 0], job.errors()
        assert job.ends()["step"] == 4
        assert "eval | step:      4" in job.said(0)


@pytest.mark.long
def test_workers_are_replicas(tmp_path):
    """Updates on two workers are those on two replicas of one process, to the last bit."""
    files = [tmp_path / f"{index}.npz" for index in range(3)]
    program = ["-m", "tests.multi_worker_updates"]
    with Workers(tmp_path, "job", [[*program, str(file)] for file in files[:2]]) as job:
        alone = [sys.executable, *program, str(files[2])]
        subprocess.run(alone, cwd=ROOT, timeout=LIMIT_S, check=True)
        assert job.exit_codes() == [0, 0], job.errors()
    expected = dict(np.load(files[2]))
    for file in files[:2]:
        state = dict(np.load(file))
        assert list(state) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_worker_and_restart(tmp_path, killed):
    """The others end with a word on it; the same command goes on, all at the same step."""
    endless = _kind("vr_lars", "trainer.train_steps=1000")
    with _Job(tmp_path, "killed", "--mode=train", endless) as job:
        job.wait_for("saved checkpoint")
        job.processes[killed].send_signal(signal.SIGKILL)
        assert job.exit_codes()[1 - killed] == 1
        assert "another worker is gone" in job.said(1 - killed, "err").splitlines()[-1]
    step = _latest_step(tmp_path)
    assert step > 0
    more = _kind("vr_lars", f"trainer.train_steps={step + 2}")
    with _Job(tmp_path, "again", "--mode=train", more) as job:
        assert job.exit_codes() == [0, 0], job.errors()
        for index in (0, 1):
            assert f"begins at {step} from {tmp_path / 'model' / f'ckpt-{step}'}" in job.said(
                index, "err"
            )
        assert job.ends()["step"] == step + 2


@pytest.mark.long
@pytest.mark.parametrize("receiver", [0, 1])
def test_signal_to_one_worker_stops_all(tmp_path, receiver):
    endless = "trainer.train_steps=1000,trainer.checkpoint_interval=500"
    with _Job(tmp_path, "stopped", "--mode=train", _kind("lbopt_lars", endless)) as job:
        job.wait_for("steps/sec")
        job.processes[receiver].send_signal(signal.SIGTERM)
        assert job.exit_codes() == [0, 0], job.errors()
        state = job.ends()
        assert f"stopped at step {state['step']}; the same command goes on from here" in job.said(0)
    assert 0 < state["step"] < 500
    assert _latest_step(tmp_path) == state["step"]


@pytest.mark.long
def test_workers_with_other_parameters_end(tmp_path):
    own = ((), (_kind("vr_lars", "trainer.train_steps=6"),))
    with _Job(tmp_path, "differ", "--mode=train", own_arguments=own) as job:
        assert job.exit_codes() == [2, 2]
        for index in (0, 1):
            assert "others on worker 1 than on worker 0" in job.said(index, "err")
