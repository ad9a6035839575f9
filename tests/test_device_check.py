"""`benchmarks.device_check` on logical CPU devices: what it finds, keeps and leaves out."""

import functools
import json
import os
import signal

import conftest
import pytest
from helpers_benchmarks import assert_bad_flag_ends_in_one_line

from benchmarks import checked_updates, device_check

ARGUMENTS = ["device_check", "--small", "--optimizers=vr_sgd"]


@pytest.fixture(autouse=True)
def _two_replicas(monkeypatch):
    # The process has one strategy of two replicas.
    devices = conftest.strategy_of(2), ["CPU:1", "CPU:2"]
    monkeypatch.setattr(device_check, "strategy_of", lambda *_: devices)


@pytest.fixture
def run(tmp_path):
    def run_it(*arguments):
        output = tmp_path / "record.json"
        code = device_check.main([*ARGUMENTS, f"--output={output}", *arguments])
        assert os.listdir(tmp_path) == ["record.json"]
        return code, json.loads(output.read_text())

    return run_it


@pytest.fixture
def without_steps(monkeypatch):
    monkeypatch.setattr(device_check._Check, "steps", lambda *_, **__: None)


def test_finds_all_right_and_times_the_steps(run, monkeypatch, capsys):
    monkeypatch.setattr(device_check, "_SMALL_MODELS", {"bert_small": 4})
    code, record = run()
    assert code == 0
    assert record["strategy"] == "MirroredStrategy"
    assert not record["interrupted"]
    update, *steps = record["rows"]
    assert (update["name"], update["right"], update["replicas_equal"]) == ("vr_sgd", True, True)
    assert [row["name"] for row in steps] == ["forward and backward", "keras_sgd", "vr_sgd"]
    for row in steps:
        assert len(row["all_ms"]) == 3
        assert row["median_ms"] - row["overhead_ms"] == pytest.approx(steps[0]["median_ms"])
    last = steps[-1]
    assert last["base"] == "keras_sgd"
    assert last["times_base"] == pytest.approx(last["median_ms"] / steps[-2]["median_ms"])
    printed = capsys.readouterr()
    assert "replicas equal" in printed.out
    assert "update: vr_sgd" in printed.err


def test_wrong_weights_fail(run, monkeypatch, without_steps, capsys):
    wrong = functools.partial(checked_updates.expected, gamma=0.2)
    monkeypatch.setattr(checked_updates, "expected", wrong)
    code, record = run()
    assert code == 1
    assert record["rows"][0]["error"] > 0.01
    assert "WRONG" in capsys.readouterr().out


def test_an_error_is_a_row(run, monkeypatch, without_steps, capsys):
    def broken(*_, **__):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(checked_updates, "create", broken)
    code, record = run()
    assert code == 1
    assert record["rows"][0]["failed"] == "RuntimeError: no kernel for this"
    assert "FAILED" in capsys.readouterr().out


def test_what_has_no_time_is_named(run, monkeypatch, capsys):
    code, record = run("--minutes=1e-6")
    assert code == 0
    assert all(row["not_run"] == "no time left" for row in record["rows"])
    assert "not run: update vr_sgd: no time left" in capsys.readouterr().out
    assert "update vr_sgd: no time left" in record["not_run"]


def test_ctrl_c_keeps_what_was_measured(run, monkeypatch, capsys):
    def interrupted(check, *_, **__):
        signal.raise_signal(signal.SIGINT)
        check._interrupted.check()
        raise AssertionError("went on")

    monkeypatch.setattr(device_check._Check, "steps", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        code, record = run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert record["interrupted"]
    assert [row["name"] for row in record["rows"]] == ["vr_sgd"]
    assert "right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("optimizers", ["--optimizers=adagrad"]),
        ("device", ["--device=abacus"]),
        ("minutes", ["--minutes=0"]),
        ("output", ["--output=absent/file.json"]),
    ],
)
def test_bad_flags(flag, arguments, monkeypatch, capsys):
    assert_bad_flag_ends_in_one_line("device_check", flag, arguments, monkeypatch, capsys)
