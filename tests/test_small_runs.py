import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from official_recipes import small_runs

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {run.recipe: run for run in small_runs.SMALL_RUNS}


@pytest.fixture
def calls(monkeypatch):
    """What was called, with commands that write a summary in the place of the real ones."""
    made = []

    def call(command, log, limit_s):
        made.append((command, limit_s))
        log.write_text("done\n")
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in command[1:])
        if command[0].endswith(".train"):
            folder = Path(flags["model_dir"])
            folder.mkdir()
            run = FLAGS[command[0].split(".")[1]]
            summary = {
                "replicas": 2,
                "sub_batches": 1,
                "global_batch_size": 64,
                "steps": 10,
                "step_ms": 20.0,
                "metrics": {run.metric[0]: len(made) / 16},
            }
            (folder / "summary.json").write_text(json.dumps(summary))
        return "clicks" not in flags.get("output_dir", "")

    monkeypatch.setattr(small_runs, "_call", call)
    return made


def test_data_that_are_there_are_taken(tmp_path, calls, capsys):
    data = tmp_path / "data"
    (data / "criteo").mkdir(parents=True)
    out = tmp_path / "out"
    arguments = [f"--data_dir={data}", f"--output_dir={out}", "--cpu_replicas=4", "--limit_s=9"]
    assert small_runs.main(["small_runs", *arguments]) == 0
    rows = json.loads((out / "results.json").read_text())
    assert [(row["recipe"], row["optimizer"], row["data"]) for row in rows] == [
        ("resnet50", "vr_lars", "synthetic images"),
        ("resnet50", "lbopt_lars", "synthetic images"),
        ("bert", "vr_lamb", "Python's manual"),
        ("bert", "lbopt_lamb", "Python's manual"),
        ("dlrm", "vr_sgd", "Criteo sample"),
        ("dlrm", "sgd", "Criteo sample"),
    ]
    assert [row["value"] for row in rows] == [n / 16 for n in (1, 2, 4, 5, 7, 8)]
    commands = [" ".join(command) for command, _ in calls]
    assert f"--source={data}/criteo/train.csv" in commands[5]
    assert "input_path='synthetic'" in commands[0]
    assert all("--cpu_replicas=4" in command for command in commands if ".train" in command)
    assert {limit for _, limit in calls} == {9}
    assert "vr_lamb" in capsys.readouterr().out


def test_without_a_folder_of_data(tmp_path, calls):
    out = tmp_path / "out"
    assert small_runs.main(["small_runs", "--recipes=dlrm", f"--output_dir={out}"]) == 0
    assert [row["data"] for row in json.loads((out / "results.json").read_text())] == [
        "synthetic clicks"
    ] * 2
    assert "--synthetic_rows=8000" in calls[0][0]


def test_a_row_comes_when_its_run_has_ended(tmp_path, calls):
    def step(name, command):
        return small_runs._call(command, tmp_path / name, 9)

    rows = small_runs._run(FLAGS["dlrm"], tmp_path, None, 2, step)
    assert [(row["optimizer"], len(calls)) for row in rows] == [("vr_sgd", 2), ("sgd", 3)]


def test_a_command_that_fails(tmp_path, calls, capsys):
    out = tmp_path / "clicks"
    assert small_runs.main(["small_runs", "--recipes=dlrm", f"--output_dir={out}"]) == 1
    error = capsys.readouterr().err
    assert f"failed: dlrm data: see {out}/dlrm/dlrm_data.log" in error
    assert len(calls) == 1
    assert not (out / "results.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_signal_ends_the_command_too(tmp_path):
    command = [sys.executable, "-m", "official_recipes.small_runs", "--recipes=dlrm"]
    ended, held = os.pipe()  # Both processes hold it as stdin.
    with subprocess.Popen(
        [*command, f"--output_dir={tmp_path}"],
        cwd=ROOT,
        stdin=held,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(held)
        deadline = time.monotonic() + 60
        while not (tmp_path / "dlrm" / "dlrm_data.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.strip().endswith("interrupted: no results were written")
    assert select.select([ended], [], [], 10)[0]
    assert os.read(ended, 1) == b""
    os.close(ended)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipes="], "--recipes: expected names among resnet50, bert, dlrm, received ''"),
        (["--recipes=dlrm,gpt"], "received 'dlrm,gpt'"),
        (["--data_dir=/nowhere"], "--data_dir: expected a folder that exists"),
        (["--output_dir=/dev/null/out"], "--output_dir: expected a folder that can be made"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, calls, capsys, arguments, said):
    earlier = tmp_path / "out" / "dlrm" / "model"
    earlier.mkdir(parents=True)
    assert small_runs.main(["small_runs", f"--output_dir={tmp_path}/out", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]
    assert not calls
    assert earlier.is_dir()
