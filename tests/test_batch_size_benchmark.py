"""`benchmarks.batch_size`: a small run of it, and that the page is what its results give."""

import dataclasses
import json
import shutil

import keras
import pytest
from helpers_benchmarks import assert_bad_flag_ends_in_one_line

from benchmarks import batch_size
from benchmarks.batch_size import DOCS, EXPERIMENTS, PAGE, RESULTS, branches_table, main
from tf_lbopt import callbacks


def test_the_page_is_what_its_results_give(tmp_path):
    pytest.importorskip("matplotlib")
    results = json.loads((DOCS / RESULTS).read_text())
    assert {*results} == {*EXPERIMENTS}
    (tmp_path / "images").mkdir()
    for name in (PAGE, RESULTS):
        shutil.copy(DOCS / name, tmp_path)
    assert main(["batch_size", "--render", f"--docs_dir={tmp_path}"]) == 0
    page = (DOCS / PAGE).read_text()
    assert (tmp_path / PAGE).read_text() == page
    for image in (tmp_path / "images").iterdir():
        assert (DOCS / "images" / image.name).is_file()
        assert f"(images/{image.name})" in page


def test_the_runs_of_the_results_are_those_that_are_declared():
    results = json.loads((DOCS / RESULTS).read_text())
    for name, experiment in EXPERIMENTS.items():
        declared = json.loads(json.dumps(dataclasses.asdict(experiment)))
        assert {key: results[name]["settings"][key] for key in declared} == declared


class FromLoss(keras.callbacks.Callback):
    """In the place of the noise scale."""

    def __init__(self, **arguments):
        super().__init__()

    def on_epoch_end(self, epoch, logs=None):
        logs.update(noise_scale=90.0 + epoch, noise_scale_standard_error=9.0)
        logs.update(examples_per_update=64)


@pytest.mark.long
def test_a_run_goes_on_and_fills_a_page(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(callbacks, "GradientNoiseScale", FromLoss, raising=False)
    digits = dataclasses.replace(
        EXPERIMENTS["cifar"], folder="", batch_size=256, micro_steps=2, checkpoints=(1, 2),
        batch_sizes=(128, 256), examples=512, orders=1,
    )  # fmt: skip
    monkeypatch.setattr(batch_size, "EXPERIMENTS", {"cifar": digits})
    monkeypatch.setattr(batch_size.os, "getloadavg", lambda: (1.0, 1.0, 1.0))
    make_task = batch_size.make_task
    monkeypatch.setattr(batch_size, "make_task", lambda e, _: make_task(e, None))
    blocks = [f"cifar-{name}" for name in ("comparison", "branches", "recommendation", "time")]
    page = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in blocks)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / PAGE).write_text(page)
    flags = [
        f"--docs_dir={tmp_path / 'docs'}", f"--output_dir={tmp_path / 'runs'}",
        f"--data_dir={tmp_path}", "--render",
    ]  # fmt: skip
    assert main(["batch_size", *flags]) == 0
    assert "order 1 of 1" in capsys.readouterr().out
    results = json.loads((tmp_path / "docs" / RESULTS).read_text())["cifar"]
    assert [row["updates"] for row in results["checkpoints"][1]["orders"][0]["branches"]] == [4, 2]
    assert results["history"]["noise_scale"] == [90.0, 91.0]
    filled = (tmp_path / "docs" / PAGE).read_text()
    assert "| 2 |" in filled
    assert "| 91 ± 9 |" in filled
    assert "recommended" in filled
    assert len([*(tmp_path / "docs" / "images").iterdir()]) == 3

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(batch_size, "new_model", never)
    assert main(["batch_size", *flags]) == 0
    assert (tmp_path / "docs" / PAGE).read_text() == filled


def test_tables_say_what_diverged():
    def branch(loss):
        return {"batch_size": 8, "updates": 2, "learning_rate": 0.1, "loss": loss}

    orders = [{"best_loss": 1.0, "branches": [branch(loss)]} for loss in (1.5, None, 1.0)]
    table = branches_table({"checkpoints": [{"epoch": 3, "orders": orders}]})
    assert table.splitlines()[-1] == "| 8 | 2 | 0.1 | 1 of 3 diverged |"
    table = branches_table({"checkpoints": [{"epoch": 3, "orders": orders[::2]}]})
    assert table.splitlines()[-1] == "| 8 | 2 | 0.1 | 0.250 ± 0.354 |"


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("tasks", ["--tasks=mnist", "--render"]),
        ("data_dir", []),
        ("data_dir", ["--data_dir=docs"]),
        ("docs_dir", ["--docs_dir=nothing", "--render"]),
    ],
)
def test_bad_flags(flag, arguments, monkeypatch, capsys):
    assert_bad_flag_ends_in_one_line("batch_size", flag, arguments, monkeypatch, capsys)
