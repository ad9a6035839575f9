"""Branches of a run at several batches against the same training in NumPy."""

import dataclasses
import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from test_batch_size import assert_drawn

import tf_lbopt
from tf_lbopt.batch_size import Branch, measure_critical_batch_size
from tf_lbopt.batch_size.measuring import _result, smoothed

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype("float32")
Y = (X @ [1.0, -2.0, 0.5] + RNG.normal(size=24)).astype("float32")
EXAMPLES = 48  # twice the data
SIZES = [4, 8, 16]
DATA = tf.data.Dataset.from_tensor_slices((X, Y))
# Weights and momentum at the checkpoint.
WEIGHTS, MOMENTUM = np.array([0.3, 0.1, -0.2]), np.array([0.05, -0.1, 0.02])


def make_model(micro_steps=1, replicas=1, rate=0.01, optimizer=keras.optimizers.SGD, **compiling):
    with strategy_of(replicas).scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, use_bias=False)])
        accumulation = micro_steps if micro_steps > 1 else None
        model.compile(
            optimizer(rate, momentum=0.9, gradient_accumulation_steps=accumulation),
            loss="mse",
            jit_compile=False,
            **compiling,
        )
        model.optimizer.build(model.trainable_variables)
    model.set_weights([WEIGHTS[:, None]])
    for variable in model.optimizer.variables:
        if "momentum" in variable.path:
            variable.assign(MOMENTUM[:, None])
    return model


def measure(*, make_model=make_model, dataset=DATA, batch_sizes=SIZES, **arguments):
    defaults = {"examples": EXAMPLES, "scaling": "linear", "tolerance": 0.05, "verbose": 0}
    return measure_critical_batch_size(
        make_model, dataset, batch_sizes, **{**defaults, **arguments}
    )


def reference(size, rate, smoothing):
    """Smoothed losses of a branch, by Keras's momentum."""
    w, v = WEIGHTS.copy(), MOMENTUM.copy()
    x, y = np.tile(X.astype(float), (2, 1)), np.tile(Y.astype(float), 2)
    total, left, losses = 0.0, 1.0, []
    for at in range(0, EXAMPLES, size):
        part = slice(at, at + size)
        error = x[part] @ w - y[part]
        v = 0.9 * v - rate * 2 * x[part].T @ error / size
        w = w + v
        share = math.exp(-size / smoothing)
        total = share * total + (1 - share) * np.mean(error**2)
        left *= share
        losses.append(total / (1 - left))
    return losses


@pytest.mark.parametrize("case", ["plain", "micro-steps", "replicas", "compiled loop"])
def test_branches_are_the_same_training_at_other_batches(case):
    def changed_later():
        # Only the first model's weights count.
        model = make_model(
            micro_steps=2 if case == "micro-steps" else 1,
            replicas=2 if case == "replicas" else 1,
            steps_per_execution=3 if case == "compiled loop" else 1,
        )
        if models:
            model.set_weights([np.full([3, 1], 9.0)])
        models.append(model)
        return model

    models = []
    found = measure(
        make_model=changed_later, base_batch_size=8, scaling="sqrt", smoothing=20,
        batch_sizes=[4, 8] if case == "compiled loop" else SIZES,
    )  # fmt: skip
    assert len(models) == len(found.branches)
    for branch in found.branches:
        rate = 0.01 * (branch.batch_size / 8) ** 0.5
        assert branch.learning_rate == pytest.approx(rate, rel=1e-6)
        assert branch.updates == EXAMPLES // branch.batch_size
        losses = reference(branch.batch_size, rate, smoothing=20)
        assert branch.curve[-1][0] == EXAMPLES
        assert branch.curve[-1][1] == branch.loss
        if case == "compiled loop":
            # A loss is the mean over three updates.
            continue
        assert branch.loss == pytest.approx(losses[-1], rel=1e-5)
        assert [count for count, _ in branch.curve] == [
            *range(branch.batch_size, EXAMPLES + 1, branch.batch_size)
        ]
        assert [loss for _, loss in branch.curve] == pytest.approx(losses, rel=1e-5)


def test_an_example_weighs_the_same_at_every_batch():
    losses = RNG.normal(size=16) + 3
    coarse = smoothed(losses, examples=8, window=30)
    fine = smoothed(np.repeat(losses, 4), examples=2, window=30)
    assert coarse == pytest.approx(fine[3::4])
    assert smoothed([2.5] * 9, examples=5, window=7) == pytest.approx([2.5] * 9)


def branches_of(*losses):
    return tuple(
        Branch(2**i, 0.1, 1, loss, (), {}, 0.0)
        for i, loss in enumerate(losses)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "size", "at_the_end"),
    [
        ((1.0, 1.05, 1.2, 1.3), 2, False),
        ((1.0, 1.05, 1.1, 1.09), 8, True),
        ((1.3, 1.2, 1.0, 1.2), 4, False),  # a small batch may be the worse
        ((1.0, 1.2, 1.05, 1.2), 1, False),  # beyond a gap nothing counts
        ((1.0, 1.0, None, 1.0), 2, False),
        ((None, 1.0, 1.05, None), 4, False),
        ((1.4, 1.0), 2, True),
    ],
)
def test_the_largest_within_the_tolerance(losses, size, at_the_end):
    found = _result(branches_of(*losses), tolerance=0.1)
    assert (found.batch_size, found.at_the_end) == (size, at_the_end)
    assert found.best_loss == 1.0
    text = str(found)
    assert f"{'>= ' if at_the_end else ''}{size}:" in text
    assert text.count("diverged") == losses.count(None)


def test_it_goes_on_after_the_last_finished_branch(tmp_path):
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if len(calls) == 3:
                raise KeyboardInterrupt

    def counted():
        calls.append(None)
        return make_model(optimizer=tf_lbopt.SGD, micro_steps=2)

    calls = []
    folder = tmp_path / "new" / "folder"
    expected = measure(make_model=counted, scaling="linear")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        measure(make_model=counted, folder=folder, callbacks=lambda: [Fails()])
    assert len((folder / "branches.jsonl").read_text().splitlines()) == 2

    calls.clear()
    found = measure(make_model=counted, folder=folder)
    assert len(calls) == 1

    def without_seconds(result):
        return [dataclasses.replace(branch, seconds=0.0) for branch in result.branches]

    assert without_seconds(found) == without_seconds(expected)

    def never():
        raise AssertionError

    again = measure(make_model=never, folder=folder, batch_sizes=[16, 4], tolerance=0.0)
    assert again.branches == (found.branches[0], found.branches[2])
    assert sorted(path.name for path in folder.iterdir()) == [
        "branches.jsonl",
        "checkpoint.weights.h5",
    ]
    rows = [json.loads(line) for line in (folder / "branches.jsonl").read_text().splitlines()]
    assert [row["batch_size"] for row in rows] == SIZES
    for changed in (
        {"examples": 96},
        {"scaling": "sqrt"},
        {"smoothing": 7},
        {"base_batch_size": 9},
    ):
        with pytest.raises(ValueError, match="`folder` must be empty or of this measurement"):
            measure(make_model=never, folder=folder, **changed)


def test_what_callbacks_log_is_kept_and_progress_is_shown(capsys):
    class Logs(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs.update(noise_scale=7.0, other=math.nan)

    def batches(size):
        asked.append(size)
        return DATA.repeat().batch(size)

    asked = []
    found = measure(
        dataset=batches, batch_sizes=[8, 16], callbacks=lambda: [Logs()], verbose=1,
        make_model=lambda: make_model(micro_steps=2),
    )  # fmt: skip
    assert [branch.logs for branch in found.branches] == [{"noise_scale": 7.0}] * 2
    assert asked == [4, 8]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" s")[0][:17] for line in lines] == [
        "batch 8 (1 of 2),",
        "batch 16 (2 of 2)",
    ]


def test_a_branch_may_diverge():
    found = measure(make_model=lambda: make_model(rate=1e-3), base_batch_size=4, scaling="linear",
                    batch_sizes=[4, 48], dataset=lambda size: exploding(size))  # fmt: skip
    assert [branch.loss is None for branch in found.branches] == [False, True]
    assert found.branches[1].curve == ()
    assert found.batch_size == 4
    with pytest.raises(ValueError, match="no branch has a finite loss"):
        measure(dataset=lambda size: exploding(48), batch_sizes=[16, 48])


def exploding(size):
    bad = np.where(np.arange(EXAMPLES) == EXAMPLES - 1, np.nan, 1.0) if size == 48 else 1.0
    x, y = np.tile(X, (2, 1)), np.tile(Y, 2) * bad
    return tf.data.Dataset.from_tensor_slices((x, y.astype("float32"))).batch(size)


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    curve = tuple((8 * i, 3.0 - 0.1 * i) for i in range(1, 7))
    branches = [dataclasses.replace(b, curve=curve) for b in branches_of(1.0, 1.05, 1.3)]
    found = _result((*branches, *branches_of(None)), tolerance=0.1)
    found.plot(tmp_path / "branches.png")
    assert_drawn(tmp_path / "branches.png")
    found.plot(str(tmp_path / "with_noise.png"), noise_scale=3.0)
    assert_drawn(tmp_path / "with_noise.png")


def of_schedule():
    model = make_model()
    model.compile(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9)), loss="mse")
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"make_model": make_model()}, TypeError, ["`make_model`", "a function", "Sequential"]),
        ({"make_model": lambda: None}, ValueError, ["`make_model`", "built and compiled", "None"]),
        (
            {"make_model": lambda: keras.Sequential([keras.layers.Dense(1)])},
            ValueError,
            ["`make_model`", "built and compiled"],
        ),
        ({"make_model": of_schedule}, ValueError, ["`make_model`", "constant", "schedule"]),
        (
            {"make_model": lambda: make_model(micro_steps=3)},
            ValueError,
            ["`batch_sizes`", "3 micro-steps", "Received: 4"],
        ),
        ({"dataset": [1, 2]}, TypeError, ["`dataset`", "tf.data.Dataset", "[1, 2]", "list"]),
        ({"batch_sizes": [4]}, ValueError, ["`batch_sizes`", "two or more", "[4]"]),
        ({"batch_sizes": [4, 4]}, ValueError, ["`batch_sizes`", "two or more"]),
        ({"batch_sizes": [4, 2.5]}, TypeError, ["`batch_sizes`", "2.5"]),
        ({"examples": 40}, ValueError, ["`examples`", "examples=40", "16"]),
        ({"examples": 0}, ValueError, ["`examples`", ">= 1"]),
        ({"scaling": "cubic"}, ValueError, ["'linear'", "cubic"]),
        ({"scaling": "adascale"}, ValueError, ["`noise_scale`", "adascale"]),
        ({"noise_scale": 3.0}, ValueError, ["`noise_scale`", "linear"]),
        ({"tolerance": -0.1}, ValueError, ["`tolerance`", ">= 0"]),
        ({"smoothing": 0}, ValueError, ["`smoothing`", ">= 1"]),
        ({"base_batch_size": 0}, ValueError, ["`base_batch_size`", ">= 1"]),
        ({"folder": 3}, TypeError, ["`folder`", "a path or None", "3 (of type int)"]),
        ({"folder": "/proc/no/folder"}, ValueError, ["`folder`", "/proc/no/folder"]),
    ],
)
def test_bad_arguments(arguments, error, parts):
    with pytest.raises(error) as caught:
        measure(**arguments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_that_end_early():
    with pytest.raises(ValueError, match=r"`dataset` must have at least 48 examples.* 5 batches"):
        measure(dataset=lambda size: DATA.batch(size, drop_remainder=True).take(5))
