"""What a batch costs by the noise scale: formulas, histories of every kind, the command."""

import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from forked_python import python

from tf_lbopt import schedules
from tf_lbopt.batch_size import recommend, scale_learning_rate, steps_and_examples
from tf_lbopt.batch_size.__main__ import main

NOISE = [50.0, 200.0, 800.0]
HISTORY = {
    "loss": [2.0, 1.5, 1.2],
    "noise_scale": NOISE,
    "noise_scale_standard_error": [5.0, 20.0, 80.0],
    "examples_per_update": [64.0, 64.0, 64.0],
}
EXAMPLES = 3 * 64 * 1000


@pytest.mark.parametrize("noise", [0.5, 70.0, 1e5])
@pytest.mark.parametrize("batch", [1, 64, 1e6])
def test_steps_and_examples(noise, batch):
    steps, examples = steps_and_examples(noise, batch)
    # Equation 2.11 of McCandlish et al. 2018, and that examples are batch times updates.
    assert (steps - 1) * (examples - 1) == pytest.approx(1)
    assert steps * batch / examples == pytest.approx(noise)


def test_a_batch_of_the_noise_scale_takes_twice_the_fewest_of_both():
    assert steps_and_examples(300, 300) == (2.0, 2.0)


@pytest.mark.parametrize("k", [0.25, 1, 8, 4096])
def test_the_gain_is_adascales(k):
    # Johnson et al. 2020: of a variance and a squared mean of gradients at the base batch.
    trace, squared_norm, base = 3.7, 0.02, 32
    variance = trace / base
    gain = (variance + squared_norm) / (variance / k + squared_norm)
    rate = scale_learning_rate("adascale", 0.1, base, int(k * base), trace / squared_norm)
    assert rate == pytest.approx(0.1 * gain)


def test_the_gain_lies_between_none_and_the_linear_rule():
    rates = [scale_learning_rate("adascale", 0.1, 32, 256, noise) for noise in (1e-6, 300, 1e12)]
    assert rates[0] == pytest.approx(0.1)
    assert 0.1 < rates[1] < 0.8
    assert rates[2] == pytest.approx(0.8)


def test_other_rules_are_those_of_the_schedules():
    for rule, function in (("linear", schedules.linear_scaling), ("sqrt", schedules.sqrt_scaling)):
        assert scale_learning_rate(rule, 0.3, 100, 700) == function(0.3, 100, 700)


def test_the_table_is_that_of_a_run_at_another_batch():
    # An update at batch B makes 1/(1 + n/B) of the progress of one at an endless batch.
    batch, updates = 64, [1000, 1000, 1000]
    progress = [u / (1 + n / batch) for u, n in zip(updates, NOISE, strict=True)]
    table = recommend(
        HISTORY, devices=2, examples_per_second=500, examples=EXAMPLES, batch_sizes=[16, 64, 1024]
    )
    for row in table.rows:
        needed = sum(p * (1 + n / row.batch) for p, n in zip(progress, NOISE, strict=True))
        fewest = sum(p * n for p, n in zip(progress, NOISE, strict=True))
        assert row.updates == pytest.approx(needed)
        assert row.examples == pytest.approx(needed * row.batch)
        assert row.hours == pytest.approx(needed * row.batch / 2 / 500 / 3600)
        assert row.efficiency == pytest.approx(fewest / row.examples)
    assert table.rows[1].updates == pytest.approx(3000)
    assert table.noise_scale == pytest.approx(fewest / sum(progress))
    assert table.last_noise_scale == 800
    errors = [n / 10 / (64 + n) for n in NOISE]
    assert table.standard_error == pytest.approx(
        math.hypot(*errors) / sum(1 / (64 + n) for n in NOISE)
    )


@pytest.mark.parametrize(
    ("devices", "share", "recommended"),
    [(1, None, 128), (3, None, 96), (4, 8, 32), (16, 512, 128), (1024, None, 1024)],
)
def test_recommended_is_the_noise_scale_or_what_devices_take_at_once(devices, share, recommended):
    table = recommend(HISTORY, devices, 100, examples=EXAMPLES, examples_per_device=share)
    assert 128 < table.noise_scale < 192
    assert table.batch == recommended
    assert all(row.batch % devices == 0 for row in table.rows)
    assert [row.batch for row in table.rows] == sorted({row.batch for row in table.rows})
    if share:
        at_once = share * devices
        slower = [row.hours for row in table.rows if row.batch >= at_once]
        faster = [row.hours for row in table.rows if row.batch <= at_once]
        assert slower == sorted(slower)
        assert faster == sorted(faster, reverse=True)


def test_without_the_runs_examples_or_batch_all_is_relative():
    for history, examples in (
        (HISTORY, None),
        ({"noise_scale": [100.0, 300.0]}, EXAMPLES),
        ({**HISTORY, "examples_per_update": [64.0, math.nan, 64.0]}, EXAMPLES),
    ):
        table = recommend(history, 1, 100, examples=examples, batch_sizes=[100])
        (row,) = table.rows
        assert row.hours is None
        assert (row.updates, row.examples) == steps_and_examples(table.noise_scale, 100)
        assert "hours" not in str(table)
    assert recommend({"noise_scale": [100.0, 300.0]}, 1, 1).noise_scale == 200


def test_epochs_without_a_positive_noise_scale_are_left_out():
    odd = {
        "noise_scale": [math.nan, 50.0, -7.0, 200.0, math.inf, 800.0, None],
        "noise_scale_standard_error": [1.0, 5.0, 1.0, 20.0, math.nan, 80.0, None],
        "examples_per_update": [64.0] * 7,
    }
    table = recommend(odd, 1, 100, examples=EXAMPLES)
    expected = recommend(HISTORY, 1, 100, examples=EXAMPLES)
    assert table.rows == expected.rows
    assert table.standard_error == expected.standard_error
    assert (table.values, table.missing) == (3, 4)
    assert "(4 left out)" in str(table)


def write_events(folder, prefix):
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default():
        for epoch in range(3):
            for name, values in HISTORY.items():
                tf.summary.scalar(prefix + name, values[epoch], step=epoch)
    writer.close()


def as_kinds(tmp_path):
    """The same history in every form."""
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    write_events(tmp_path / "ours" / "run", "")
    write_events(tmp_path / "keras" / "train", "epoch_")
    write_events(tmp_path / "both", "")
    write_events(tmp_path / "both" / "train", "epoch_")
    history = keras.callbacks.History()
    history.history = HISTORY
    return [
        history,
        {name: np.array(values, np.float32) for name, values in HISTORY.items()},
        tmp_path / "history.json",
        str(tmp_path / "ours"),
        tmp_path / "keras",
        tmp_path / "both",
    ]


def test_histories_of_every_kind(tmp_path):
    expected = recommend(HISTORY, 1, 100, examples=EXAMPLES)
    for history in as_kinds(tmp_path):
        table = recommend(history, 1, 100, examples=EXAMPLES)
        assert table.rows == expected.rows
        assert str(table) == str(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"history": {"loss": [1.0]}}, ValueError, ["GradientNoiseScale", "loss"]),
        ({"history": 3}, TypeError, ["`history`", "Received: history=3", "int"]),
        ({"history": "/no/such/file.json"}, ValueError, ["`history`", "/no/such/file.json"]),
        ({"history": {"noise_scale": 3.0}}, ValueError, ["list of numbers", "3.0"]),
        ({"history": {"noise_scale": ["many"]}}, ValueError, ["list of numbers", "many"]),
        ({"history": {"noise_scale": []}}, ValueError, ["positive noise scale", "[]"]),
        ({"history": {"noise_scale": [-1.0, math.inf]}}, ValueError, ["positive", "[-1.0, inf]"]),
        (
            {"history": {"noise_scale": [1.0], "examples_per_update": [1, 2]}},
            ValueError,
            ["1 of `noise_scale`", "2 of `examples_per_update`"],
        ),
        ({"devices": 0}, ValueError, ["`devices`", "devices=0"]),
        ({"examples_per_second": 0.0}, ValueError, ["`examples_per_second`", "> 0"]),
        ({"examples": 1.5}, TypeError, ["`examples`", "or None", "1.5"]),
        ({"examples_per_device": 0}, ValueError, ["`examples_per_device`", ">= 1"]),
        ({"batch_sizes": []}, ValueError, ["`batch_sizes`", "one or more"]),
        ({"batch_sizes": [8, 0]}, ValueError, ["`batch_sizes`", "batch_sizes=0"]),
        ({"batch_sizes": 8}, TypeError, ["`batch_sizes`", "sequence of integers", "int"]),
        ({"batch_sizes": "8"}, TypeError, ["`batch_sizes`", "sequence of integers", "str"]),
    ],
)
def test_bad_arguments_of_recommend(arguments, error, parts):
    with pytest.raises(error) as caught:
        recommend(**{"history": HISTORY, "devices": 1, "examples_per_second": 1.0, **arguments})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda: steps_and_examples(0, 1), ValueError, "`noise_scale`"),
        (lambda: steps_and_examples(1, math.nan), ValueError, "`batch`"),
        (lambda: scale_learning_rate("cubic", 1, 1, 1), ValueError, "`rule`"),
        (lambda: scale_learning_rate("adascale", 1, 1, 1), ValueError, "`noise_scale`"),
        (lambda: scale_learning_rate("linear", 1, 1, 1, 5), ValueError, "`noise_scale`"),
        (lambda: scale_learning_rate("adascale", -1, 1, 1, 5), ValueError, "`learning_rate`"),
        (lambda: scale_learning_rate("adascale", 1, 0, 1, 5), ValueError, "`base_batch_size`"),
        (lambda: scale_learning_rate("adascale", 1, 1, 1.5, 5), TypeError, "`batch_size`"),
    ],
)
def test_bad_arguments_of_formulas(call, error, part):
    with pytest.raises(error, match=part):
        call()


def assert_drawn(path):
    image = tf.io.decode_png(path.read_bytes()).numpy()
    assert image.shape[0] > 300
    assert len(np.unique(image.astype(np.int64) @ 256 ** np.arange(image.shape[-1]))) > 50


def test_the_command_prints_the_table_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for history in as_kinds(tmp_path)[2:]:
        assert main([str(history), "--examples_per_second=10", f"--examples={EXAMPLES}"]) == 0
        *table, last = capsys.readouterr().out.splitlines()
        assert "\n".join(table) == str(recommend(HISTORY, 1, 10, examples=EXAMPLES))
        folder = tmp_path if str(history).endswith("json") else tmp_path / str(history)
        assert last == f"wrote {folder / 'batch_size.png'}"
        assert_drawn(folder / "batch_size.png")
    output = tmp_path / "other.png"
    flags = ["--batch_sizes=10,20", "--devices=2", f"--output={output}"]
    assert main([str(tmp_path / "history.json"), *flags]) == 0
    assert "updates/fewest" in capsys.readouterr().out
    assert_drawn(output)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_bad_input_ends_the_command_in_one_line(tmp_path, capsys):
    good = tmp_path / "good.json"
    good.write_text(json.dumps(HISTORY))
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "loss.json").write_text('{"loss": [1.0]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "events.out.tfevents.1").write_bytes(b"no event " * 10)
    for arguments, part in [
        (["nothing.json"], "nothing.json"),
        (["text.json"], "text.json"),
        (["list.json"], "list"),
        (["loss.json"], "GradientNoiseScale"),
        (["empty"], "nothing"),
        (["broken"], "can not be read"),
        ([good, "--devices=0"], "`devices`"),
        ([good, "--devices=x"], "--devices"),
        ([good, "--batch_sizes=1,x"], "--batch_sizes: must be integers with commas"),
        ([good, "--examples=5"], "--examples_per_second"),
        ([good, "--output=/no/such/folder/a.png"], "/no/such/folder"),
        ([good, "--unknown=1"], "--unknown"),
        ([], "history"),
    ]:
        paths = [str(tmp_path / part) for part in arguments[:1]]
        try:
            code = main([*paths, *arguments[1:]])
        except SystemExit as exit_:
            code = exit_.code
        error = capsys.readouterr().err
        assert code == 2, arguments
        assert error.count("\n") == 1, error
        assert part in error


def test_without_matplotlib_the_table_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    assert main([str(tmp_path / "history.json")]) == 2
    said = capsys.readouterr()
    assert said.out.strip() == str(recommend(HISTORY, 1, 1))
    assert said.err == "Plots need matplotlib: `pip install matplotlib`. Received: none\n"


def test_it_is_a_program(tmp_path):
    program = (
        "import runpy, warnings\n"
        "warnings.simplefilter('error', RuntimeWarning)\n"
        "runpy.run_module('tf_lbopt.batch_size', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(
        [*python(), "-c", program, "nothing"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "nothing" in done.stderr.splitlines()[-1]
