import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_python import python
from harness_recipes import cifar100_folder

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["-m", "official_recipes.quickstart"]


def start(*arguments, cwd=ROOT, command=COMMAND):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.Popen(
        [*python(), *command, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=120):
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output, errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs=0"], "--epochs: expected a positive integer, received '0'"),
        (["--epochs=many"], "--epochs: expected a positive integer, received 'many'"),
        (["--replicas=-1"], "--replicas: expected a positive integer, received '-1'"),
        (["--learning_rate=nan"], "--learning_rate: expected a positive number, received 'nan'"),
        (["--learning_rate=0"], "--learning_rate: expected a positive number, received '0'"),
        (["--seed=-1"], "--seed: expected an integer from 0 to 4294967295, received '-1'"),
        (["--batch_size=510"], "--batch_size: expected a multiple of --replicas=4"),
        (["--small_batch_size=30"], "--small_batch_size: expected a multiple of --replicas=4"),
        (["--batch_size=1440"], "--batch_size: expected at most the 1437 training images"),
        (["--tune", "--batch_size=1200"], "--batch_size: expected at most the 1150 training"),
        (["--data_dir=/no/such/folder"], "--data_dir: expected a folder with MNIST"),
        (["--warmup_fraction=1"], "--warmup_fraction: expected a number in [0, 1), received '1'"),
        (
            ["--trust_coefficient=0"],
            "--trust_coefficient: expected a positive number, received '0'",
        ),
        (["--tune", "--rates=1,x"], "--rates: expected a comma-separated list of different posit"),
        (["--tune", "--rates=1,1"], "--rates: expected a comma-separated list of different posit"),
        (["--rates=1"], "--rates: expected to be given together with --tune"),
        (["--optimizers="], "--optimizers: expected a comma-separated list of names"),
        (["--optimizer=sngm"], "--optimizer: expected one of the flags"),
        (["--nobaseline=3"], "--flags: expected a well-formed command line"),
        (["sngm"], "--flags: expected only flags of the form --name=value, received 'sngm'"),
    ],
)
def test_bad_flag_is_one_line(tmp_path, capsys, monkeypatch, arguments, expected):
    from official_recipes.quickstart.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(expected)
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_without_known_data(tmp_path, capsys):
    from official_recipes.quickstart.__main__ import main

    assert main(["quickstart", f"--data_dir={tmp_path}"]) == 2
    assert f"({tmp_path} has no known data)" in capsys.readouterr().err


@pytest.mark.long
def test_cifar100(tmp_path):
    folder = cifar100_folder(tmp_path)
    arguments = ["--optimizers=sngm", "--nobaseline", "--batch_size=4", "--replicas=2"]
    arguments += [f"--data_dir={folder}", "--epochs=1", f"--output_dir={tmp_path / 'out'}"]
    code, output, errors = finish(start(*arguments))
    assert code == 0, errors
    assert "sngm" in output
    assert (tmp_path / "out" / "quickstart.png").is_file()


def test_output_dir_that_is_a_file(tmp_path, capsys):
    from official_recipes.quickstart.__main__ import main

    path = tmp_path / "file"
    path.touch()
    assert main(["quickstart", f"--output_dir={path}"]) == 2
    assert capsys.readouterr().err.startswith("--output_dir: expected a folder")


def test_help_and_bad_flags_need_no_tensorflow():
    script = (
        "import sys\n"
        "from official_recipes.quickstart.__main__ import main\n"
        "code = main(['quickstart', *sys.argv[1:]])\n"
        "assert 'tensorflow' not in sys.modules and 'keras' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    for flag, code in (("--help", 0), ("--epochs=0", 2)):
        done = subprocess.run(
            [sys.executable, "-c", script, flag], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert ("--learning_rate" in done.stdout) == (code == 0)


def test_unknown_optimizer(tmp_path, capsys):
    from official_recipes.quickstart.__main__ import main

    code = main(["quickstart", "--optimizers=sngm,lasr", f"--output_dir={tmp_path}"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("--optimizers: expected names among momentum, adam, ")
    assert captured.err.endswith("received 'lasr'\n")
    assert captured.err.count("\n") == 1


def test_a_batch_without_equal_sub_batches(tmp_path, capsys):
    from official_recipes.quickstart.__main__ import main

    names = "--optimizers=sngm,vr_lars,vr_sgd"
    arguments = ["--replicas=3", "--batch_size=300", "--nobaseline", names]
    code = main(["quickstart", *arguments, f"--output_dir={tmp_path}"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith(
        "--batch_size: expected a multiple of 9 for --optimizers=vr_lars,vr_sgd"
    )
    assert captured.err.endswith("received 300\n")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("replicas", "steps"), [(1, 8), (3, 3), (4, 2), (8, 1), (16, 1)])
def test_variance_is_taken_over_8_sub_batches_or_more(replicas, steps):
    from official_recipes.quickstart.settings import micro_steps

    assert micro_steps(replicas) == steps


def test_end_to_end(tmp_path):
    code, output, errors = finish(
        start(
            "--replicas=2",
            "--epochs=2",
            "--optimizers=vr_momentum,sngm",
            "--batch_size=256",
            "--small_batch_size=64",
            f"--output_dir={tmp_path}",
        )
    )
    assert code == 0, errors
    assert "Traceback" not in errors
    for heading in ("optimizer", "batch", "updates", "test accuracy", "seconds"):
        assert heading in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart.json", "quickstart.png"]

    png = (tmp_path / "quickstart.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert width > 800
    assert height > 600

    record = json.loads((tmp_path / "quickstart.json").read_text())
    assert record["data"] == "scikit-learn digits"
    assert record["replicas"] == 2
    runs = record["runs"]
    assert [(run["optimizer"], run["batch_size"], run["updates"]) for run in runs] == [
        ("momentum", 64, 44),
        ("vr_momentum", 256, 10),
        ("sngm", 256, 10),
    ]
    for run in runs:
        assert not run["diverged"]
        assert len(run["train_loss"]) == len(run["test_accuracy"]) == 2
        assert run["train_loss"][1] < run["train_loss"][0]
        assert run["final_test_accuracy"] == run["test_accuracy"][-1]
        assert run["seconds"] > 0
        # A tenth of the images has each label, so 0.1 is what a guess reaches.
        assert 0.15 < run["final_test_accuracy"] <= 1
    assert runs[0]["final_test_accuracy"] > 0.8


# What a shell starts in the background ignores SIGINT, and so do its children.
INTERRUPTIBLE = [
    "-c",
    "import runpy, signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "runpy.run_module('official_recipes.quickstart', run_name='__main__', alter_sys=True)\n",
]


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(
    "seconds",
    # Building the first model, tracing, and training, on a machine that is not busy.
    [0.0, 2.0, 5.0],
)
def test_interrupt(tmp_path, seconds):
    process = start("--epochs=500", f"--output_dir={tmp_path}", command=INTERRUPTIBLE)
    line = process.stderr.readline()  # The data is read; training begins.
    assert line.startswith("scikit-learn digits"), line
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    code, output, errors = finish(process)
    assert code == 130, errors
    assert output == ""
    assert errors.splitlines()[-1] == "interrupted: no results were written"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
