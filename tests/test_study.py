"""The study: what is run next, what is kept, what is written into documents."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure

import tf_lbopt
from benchmarks.study import regression, runner
from benchmarks.study.__main__ import main, summary
from benchmarks.study.documents import DOCS, render_pages
from benchmarks.study.evidence import (
    good_rates,
    plot_answer,
    plot_extrap,
    plot_loss,
    plot_rates,
    plot_vrgd,
    plot_warmup,
    tuned_table,
)
from benchmarks.study.grid import (
    ACCURACY,
    FINAL,
    TUNING,
    Cell,
    Contender,
    Metric,
    Results,
    Study,
    next_runs,
    outcomes,
)
from benchmarks.study.render import comparison_table, fill, shown
from benchmarks.study.studies import STUDIES
from benchmarks.study.table import RESULTS, read_rows
from benchmarks.study.tfm_runner import TfmRunner
from official_recipes.common.keras_optimizers import make_optimizer
from official_recipes.common.keras_options import training_options

CELL = Cell(
    "cell", {"batch_size": 64}, validation_size=10, tuning_seeds=(1, 2), final_seeds=(1, 2, 3)
)
BASE = Contender("base", {"optimizer": "momentum"}, values=(0.1, 0.2, 0.4))
TAKER = Contender(
    "taker", {"optimizer": "extrap_sgd"}, "extrapolation_rate", (1.0, 2.0, 4.0), "base"
)
FIXED = Contender("fixed", {"optimizer": "sngm"}, takes_from="base")
STUDY = Study("study", [(CELL, [BASE, TAKER, FIXED])])


def carry_out(study, score, limit=200, at_once=1):
    """Runs a study to its end with a made-up score in the place of training.

    As many runs as are given are made before it is asked what is left.
    """
    rows = []
    while left := next_runs(study, Results(study, rows)):
        for run in left[:at_once]:
            value = score(run)
            split = "validation" if run.stage == TUNING else "test"
            rows.append(
                {
                    **run.head(),
                    "diverged": value is None,
                    "final": {"epoch": 1.0, f"{split}_{study.metric.name}": value},
                }
            )
        assert len(rows) < limit
    return rows


def at_best(best):
    def score(run):
        return 1 / (1 + abs(math.log2(run.value / best))) + 0.01 * run.seed

    return score


def test_tuning_comes_first_and_the_best_is_never_at_the_edge():
    rows = carry_out(STUDY, at_best(0.05))
    outcome = outcomes(STUDY, Results(STUDY, rows))["cell", "base"]
    assert outcome.best == 0.05
    assert sorted(outcome.tried) == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert len(outcome.final) == 3
    assert [row["stage"] for row in rows[:10]] == [TUNING] * 10
    finals = [row for row in rows if row["stage"] == FINAL and row["label"] == "base"]
    assert [row["flags"]["seed"] for row in finals] == [1, 2, 3]
    assert {row["flags"]["validation_size"] for row in finals} == {0}
    assert {row["flags"]["learning_rate"] for row in finals} == {0.05}


def test_the_grid_grows_upward_too_and_ends_somewhere():
    up = outcomes(STUDY, Results(STUDY, carry_out(STUDY, at_best(1.6))))["cell", "base"]
    assert up.best == 1.6
    assert max(up.tried) == 3.2
    far = outcomes(STUDY, Results(STUDY, carry_out(STUDY, at_best(1e9))))["cell", "base"]
    assert len(far.tried) == 9


def test_whole_numbers_have_a_lower_end():
    period = Contender("period", {}, "post_local_period", (4, 8, 16))
    study = Study("study", [(CELL, [period])])
    outcome = outcomes(study, Results(study, carry_out(study, lambda run: 1 / run.value)))
    assert sorted(outcome["cell", "period"].tried) == [1, 2, 4, 8, 16]
    assert all(isinstance(value, int) for value in outcome["cell", "period"].tried)


def test_a_rate_of_one_is_no_lower_end():
    rate = Contender("rate", {}, values=(1.0, 2.0, 4.0))
    study = Study("study", [(CELL, [rate])])
    outcome = outcomes(study, Results(study, carry_out(study, at_best(0.5))))["cell", "rate"]
    assert sorted(outcome.tried) == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert outcome.best == 0.5


def test_a_contender_takes_over_the_best_rate():
    rows = carry_out(STUDY, at_best(0.2))
    for label in ("taker", "fixed"):
        mine = [row for row in rows if row["label"] == label]
        assert {row["flags"]["learning_rate"] for row in mine} == {0.2}
    assert not [r for r in rows if r["label"] == "fixed" and r["stage"] == TUNING]
    started = [row for row in rows if row["label"] == "base"][:1]
    assert {run.label for run in next_runs(STUDY, Results(STUDY, started))} == {"base"}


def test_divergence_is_the_worst_result():
    rows = carry_out(STUDY, lambda run: None if run.value > 0.3 else run.value)
    outcome = outcomes(STUDY, Results(STUDY, rows))["cell", "base"]
    assert outcome.best == 0.2
    assert outcome.tried[0.4] == -math.inf


def test_a_tie_is_broken_by_the_loss():
    rows = carry_out(STUDY, lambda run: 0.1)
    assert max(outcomes(STUDY, Results(STUDY, rows))["cell", "base"].tried) == 0.4
    for row in rows:
        split = "validation" if row["stage"] == TUNING else "test"
        row["final"][f"{split}_loss"] = 2.3 - 0.01 * row["value"]
    known = Results(STUDY, [row for row in rows if row["value"] >= 0.1])
    (run, *_) = next_runs(STUDY, known)
    assert run.value == 0.8


def test_rows_of_other_settings_do_not_count():
    rows = carry_out(STUDY, at_best(0.2))
    other = Study("study", [(Cell("cell", {"batch_size": 128}, 10), [BASE])])
    assert len(next_runs(other, Results(other, rows))) == 3
    renamed = Study("other", STUDY.comparisons)
    assert next_runs(renamed, Results(renamed, rows))
    assert not next_runs(STUDY, Results(STUDY, rows))


def test_the_table_of_a_killed_writer(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text('{"a": 1}\n{"b": 2}\n{"c"')
    assert read_rows(path) == [{"a": 1}, {"b": 2}]
    path.write_text('{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path)


def test_documents_are_filled(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("head\n<!-- begin x -->\nold\n<!-- end x -->\ntail\n")
    fill(path, {"x": "new | table"})
    assert path.read_text() == "head\n<!-- begin x -->\nnew | table\n<!-- end x -->\ntail\n"
    with pytest.raises(ValueError, match="blocks"):
        fill(path, {"y": ""})
    path.write_text("<!-- begin x -->\n")
    with pytest.raises(ValueError, match="end x"):
        fill(path, {"x": ""})


def test_tables():
    rows = carry_out(STUDY, at_best(0.2))
    table = comparison_table(STUDY, Results(STUDY, rows), CELL, [BASE, TAKER, FIXED])
    lines = table.splitlines()
    assert len(lines) == 5
    assert "**0.2: 101.5 %**" in lines[2]
    assert "102.00 ± 1.00 %" in lines[2]
    assert "as base" in lines[4]
    assert shown(ACCURACY, []) == "not run"
    assert shown(ACCURACY, [0.5]) == "50.00 %"
    assert shown(ACCURACY, [0.5, -math.inf]) == "1 of 2 diverged, else 50.00 %"
    assert shown(ACCURACY, [-math.inf]) == "1 of 1 diverged"
    assert summary(STUDY, Results(STUDY, rows)).row_count == 3


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_every_run_of_a_study_has_flags_that_the_recipe_takes(study):
    assert study.task in runner.TASKS
    if study.task in ("regression", "dlrm", "bert"):
        pytest.skip("its settings are no flags; they are used below")
    rows = carry_out(
        study, lambda run: 1 / (1 + abs(math.log(run.value / 0.1))), limit=2000, at_once=2000
    )
    recipe = importlib.import_module(f"official_recipes.{study.task}.train")
    # Seeds and rates apart, of which one is as good as another.
    for row in {(row["cell"], row["label"], row["stage"]): row for row in rows}.values():
        values = runner.parsed(recipe, row["flags"], Path("."))
        options = training_options(values)
        assert options.seed == row["flags"]["seed"]
        make_optimizer(options, 10, 2)


def test_documents_hold_what_the_table_says(tmp_path, monkeypatch):
    # The layout of a figure takes as long as the figure; test_plots_of_the_first_edition has it.
    save = Figure.savefig

    def without_layout(self, path, **kwargs):
        self.set_layout_engine("none")
        save(self, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", without_layout)
    (tmp_path / "images").mkdir()
    for document in DOCS.glob("*.md"):
        (tmp_path / document.name).write_text(document.read_text())
    written = render_pages(read_rows(RESULTS), tmp_path)
    assert {path.name for path in written} >= {"extrapolation.md", "evidence.md"}
    for path in written:
        if path.suffix == ".md":
            assert path.read_text() == (DOCS / path.name).read_text()
        else:
            assert path.stat().st_size > 10_000


def test_good_rates():
    outcome = outcomes(STUDY, Results(STUDY, carry_out(STUDY, at_best(0.2))))["cell", "base"]
    assert sorted(outcome.tried) == [0.1, 0.2, 0.4]
    assert outcome.close(ACCURACY) == [0.2]
    assert good_rates(outcome, ACCURACY) == "0.2"
    wide = Metric("accuracy", close=0.6)
    assert outcome.close(wide) == [0.1, 0.2, 0.4]
    assert good_rates(outcome, wide) == "0.1–0.4 (≥ ×4)"


ANSWER_PLOTS = (plot_answer, plot_loss, plot_warmup, plot_vrgd, plot_extrap, plot_rates)


@pytest.mark.parametrize("plot", ANSWER_PLOTS, ids=lambda plot: plot.__name__)
def test_plots_of_the_first_edition(plot, tmp_path):
    """Nothing is drawn of nothing; something of runs at one batch or two, or of a few methods."""
    labels = ["momentum", "momentum, warm-up", "LARS, warm-up", "VR-LARS, warm-up"]
    labels += ["EXTRAP-SGD, warm-up"]
    contenders = [Contender(label, {}, values=(0.1, 0.2, 0.4)) for label in labels]
    cells = [Cell(f"B={size}", {"batch_size": size}, 10) for size in (64, 256)]
    study = Study("study", [(cell, contenders) for cell in cells])
    rows = carry_out(study, lambda run: None if run.value > 0.3 else run.value + 0.01 * run.seed)
    for row in rows:
        row["train_loss"] = [2.0, 1.5, 1.2]
    assert not plot(study, Results(study, []), tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []
    for kept in (rows, [row for row in rows if row["cell"] == "B=64"]):
        path = tmp_path / f"{len(kept)}.png"
        assert plot(study, Results(study, kept), path)
        assert path.stat().st_size > 10_000


def test_a_loss_is_better_where_it_is_lower():
    loss = Metric("loss", lower_is_better=True, scale=1.0, unit="")
    study = Study("study", [(CELL, [BASE, FIXED])], metric=loss)
    rows = carry_out(study, lambda run: None if run.value > 0.3 else abs(run.value - 0.11))
    outcome = outcomes(study, Results(study, rows))["cell", "base"]
    assert outcome.best == 0.1
    assert outcome.tried[0.4] == math.inf
    assert [row["flags"]["seed"] for row in outcome.rows] == [1, 2, 3]
    table = tuned_table(study, Results(study, rows), CELL, [BASE, FIXED]).splitlines()
    assert "0.01 ± 0.00" in table[2]
    assert "as base" in table[3]
    renamed = dataclasses.replace(study, metric=dataclasses.replace(loss, digits=4, label="nats"))
    table = tuned_table(renamed, Results(renamed, rows), CELL, [BASE]).splitlines()
    assert "test nats" in table[0]
    assert "0.0100 ± 0.0000" in table[2]
    nothing = tuned_table(study, Results(study, []), CELL, [BASE, FIXED])
    assert nothing.strip() == "Not run yet: base; fixed."
    assert shown(loss, [1.0, math.inf]) == "1 of 2 diverged, else 1.00"


@pytest.mark.parametrize("inputs", regression.INPUTS)
def test_regression_is_what_the_optimizer_does(inputs):
    settings = {
        "inputs": inputs,
        "noise": 0.5,
        "optimizer": "vr_sgd",
        "learning_rate": 0.1,
        "batch_size": 64,
        "sub_batches": 4,
        "gamma": 0.2,
        "steps": 3,
        "seed": 7,
    }
    curves = regression.optimize(settings)
    draw = {"normal": tf.random.stateless_normal, "uniform": tf.random.stateless_uniform}[inputs]
    w = tf.Variable(tf.zeros([10]))
    optimizer = tf_lbopt.VRSGD(0.1, gamma=0.2, gradient_accumulation_steps=4)
    true = tf.constant(regression.TRUE_WEIGHTS)
    for step in range(3):
        x = draw([4, 16, 10], [7, step])
        noise = 0.5 * tf.random.stateless_normal([4, 16], [7, 3 + step])
        for part in range(4):
            with tf.GradientTape() as tape:
                error = tf.linalg.matvec(x[part], w - true) - noise[part]
                loss = tf.reduce_mean(tf.square(error))
            optimizer.apply([tape.gradient(loss, w)], [w])
        np.testing.assert_allclose(curves.weights[step + 1], w.numpy(), rtol=2e-5)
    assert (curves.ratios >= 0.2 - 1e-6).all()
    assert (curves.ratios <= 1).all()
    plain = regression.optimize({**settings, "optimizer": "sgd"})
    assert (plain.ratios == 1).all()
    assert plain.test_loss[-1] < plain.test_loss[0]


def test_a_run_of_the_regression_study():
    made = regression.RegressionRunner()
    flags = {
        "inputs": "normal",
        "noise": 0.0,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "batch_size": 64,
        "sub_batches": 2,
        "gamma": 0.1,
        "steps": 5,
        "seed": 1,
    }
    final = made.train({**flags, "validation_size": 0, "curve": True}, lambda done, total: None)
    assert final["final"]["test_log10_loss"] < 2.6
    assert final["curve"]["steps"] == [0, 1, 2, 3, 4, 5]
    assert len(final["curve"]["weights"]) == 6
    tuning = made.train({**flags, "validation_size": 1}, lambda done, total: None)
    assert "curve" not in tuning
    assert tuning["final"]["validation_log10_loss"] != final["final"]["test_log10_loss"]
    far = made.train(
        {**flags, "validation_size": 0, "learning_rate": 9.0}, lambda done, total: None
    )
    assert far["diverged"]


DLRM_FLAGS = {
    **next(iter(STUDIES["dlrm"].comparisons))[0].settings,
    "optimizer": "vr_sgd",
    "sub_batches": 4,
    "learning_rate": 2.0,
    "seed": 3,
}


@pytest.mark.parametrize(("size", "split"), [(1, "validation"), (0, "test")])
def test_a_run_on_tf_models(tmp_path, monkeypatch, size, split):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}-00000-of-00001").touch()
    made = TfmRunner("dlrm", tmp_path, 2)
    assert made.load(lambda done, total: None) == tmp_path.name
    flags = {**DLRM_FLAGS, "validation_size": size}
    outcome = {}

    def run(command, **kwargs):
        outcome["command"] = command
        folder = next(a for a in command if a.startswith("--model_dir=")).split("=")[1]
        if not outcome["error"]:
            summary = {"metrics": {"auc": 0.75}, "step_ms": 9.0, "seconds": 3.0}
            Path(folder, "summary.json").write_text(json.dumps(summary))
        return subprocess.CompletedProcess(
            command, bool(outcome["error"]), stdout="", stderr=outcome["error"]
        )

    monkeypatch.setattr(subprocess, "run", run)
    outcome["error"] = ""
    row = made.train(flags, lambda done, total: None)
    assert row["final"] == {f"{split}_auc": 0.75}
    assert not row["diverged"]
    (override,) = [a for a in outcome["command"] if a.startswith("--params_override=")]
    assert f"task.validation_data.input_path='{tmp_path}/{split}*'" in override
    assert "plateau_polynomial.initial_learning_rate=2.0" in override
    assert {"--seed=3", "--sub_batches=4", "--cpu_replicas=2"} <= set(outcome["command"])
    outcome["error"] = "training diverged: in the loop"
    assert made.train(flags, lambda done, total: None)["diverged"]
    outcome["error"] = "no such file"
    with pytest.raises(RuntimeError, match="no such file"):
        made.train(flags, lambda done, total: None)


def test_data_that_was_not_prepared(tmp_path):
    for name in ("train", "validation", "test"):
        with pytest.raises(ValueError, match=f"no {name} files"):
            TfmRunner("dlrm", tmp_path, 2).load(lambda done, total: None)
        (tmp_path / f"{name}-00000-of-00001").touch()


@pytest.mark.long
def test_a_run_on_tf_models_trains(tmp_path):
    data = tmp_path / "clicks"
    command = [sys.executable, "-m", "official_recipes.dlrm.prepare_data"]
    command += ["--synthetic_rows=4000", "--test_fraction=0.1", f"--output_dir={data}"]
    root = Path(__file__).parents[1]
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    small = {"trainer.train_steps": 4, "trainer.steps_per_loop": 2, "trainer.summary_interval": 2}
    small |= {"trainer.checkpoint_interval": 4, "trainer.validation_interval": 4}
    small |= {"task.train_data.global_batch_size": 64, "validation_size": 0}
    row = TfmRunner("dlrm", data, 2).train({**DLRM_FLAGS, **small}, lambda done, total: None)
    assert 0.3 < row["final"]["test_auc"] < 1


def test_wrong_flags(capsys):
    assert main(["study"]) == 2
    assert "extrapolation" in capsys.readouterr().err


def test_only_some_runs(tmp_path, monkeypatch, capsys):
    settings = {"inputs": "normal", "noise": 1.0, "gamma": 0.1, "steps": 2}
    contenders = [
        Contender(label, {"optimizer": name, "learning_rate": 0.01})
        for label, name in (("SGD", "sgd"), ("VR-SGD", "vr_sgd"))
    ]
    cells = [
        Cell(f"B={size}", {**settings, "batch_size": size, "sub_batches": 2}, 1, final_seeds=(1, 2))
        for size in (8, 16)
    ]
    study = Study(
        "regression",
        [(cell, contenders) for cell in cells],
        metric=Metric("log10_loss", lower_is_better=True),
        task="regression",
    )
    monkeypatch.setitem(STUDIES, "regression", study)
    table = tmp_path / "rows.jsonl"
    command = ["study", "--study=regression", f"--results={table}"]

    def made():
        return [(row["cell"], row["label"], row["flags"]["seed"]) for row in read_rows(table)]

    assert main([*command, "--only=^B=16: VR"]) == 0
    assert main([*command, "--only=B=8: SGD, final .*, seed 2$"]) == 0
    first = [("B=16", "VR-SGD", 1), ("B=16", "VR-SGD", 2), ("B=8", "SGD", 2)]
    assert made() == first
    assert main(command) == 0
    assert made()[3:] == [
        ("B=8", "SGD", 1),
        ("B=8", "VR-SGD", 1),
        ("B=8", "VR-SGD", 2),
        ("B=16", "SGD", 1),
        ("B=16", "SGD", 2),
    ]
    assert main([*command, f"--results={tmp_path / 'no' / 'rows.jsonl'}"]) == 2
    assert "--results: expected a file in a folder that exists" in capsys.readouterr().err
    assert main(["study", "--render", f"--results={tmp_path / 'rows.jsonll'}"]) == 2
    assert "--results: expected a table with results to render" in capsys.readouterr().err
    assert main([*command, "--only=("]) == 2
    assert "--only: expected a regular expression, received '('" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_from_the_command_line(tmp_path):
    script = (
        "import sys, benchmarks.study.__main__ as m\n"
        "from benchmarks.study.grid import *\n"
        "cell = Cell('c', {'model': 'two_conv', 'batch_size': 64, 'epochs': 1, 'replicas': 2}, 100,"
        " final_seeds=(1,))\n"
        "m.STUDIES['extrapolation'] = Study('extrapolation', [(cell, [Contender('sgd',"
        " {'optimizer': 'momentum', 'learning_rate': 0.05})])])\n"
        "from official_recipes.cifar import train as cifar\n"
        "from official_recipes.common.image_data import DigitsSource\n"
        "cifar.make_source = lambda values: DigitsSource()\n"
        f"m.run_program(m.main, ['study', '--study=extrapolation', '--data_dir=.',"
        f" '--results={tmp_path / 'rows.jsonl'}'])\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=root)
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["label"] == "sgd"
    assert row["stage"] == FINAL
    assert 0 < row["final"]["test_accuracy"] < 1
    assert row["versions"]["keras"]
