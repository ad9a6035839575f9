"""`VarianceReduced` around what Keras ships and what this package has, and looking at GSNR."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from harness import (
    Run,
    assert_replicas_identical,
    assert_states_equal,
    initial_weights,
    sub_batch_gradients,
)
from helpers_stock import STOCK, stock

import tf_lbopt
from benchmarks.references import gsnr, variance_reduced


def test_the_table_has_what_keras_ships():
    assert {"SGD", "Adam", "AdamW", "Nadam", "Muon", "Lion", "Adafactor", "RMSprop"} <= set(STOCK)
    assert len(STOCK) >= 14


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("beta_3", [None, 0.5])
@pytest.mark.quick(name=("AdamW", "Muon", "Adafactor"), replicas=2, beta_3=None)
@pytest.mark.quick(name="Nadam", replicas=(1, 2))
def test_every_keras_optimizer_sees_the_weighted_gradient(name, replicas, micro_steps, beta_3):
    """Against the stock optimizer, on one device, given r ḡ from NumPy."""
    if beta_3 is not None and (replicas, micro_steps) != (2, 2):
        pytest.skip("the running mean is one code path for all splits")
    gradients = sub_batch_gradients(4, sub_batches=4)
    run = Run(
        lambda **k: tf_lbopt.VarianceReduced(stock(name), gamma=0.2, beta_3=beta_3, **k),
        replicas,
        micro_steps,
    ).updates(gradients)
    assert run.optimizer.iterations.numpy() == 4
    assert run.optimizer.inner_optimizer.iterations.numpy() == 4
    assert_replicas_identical(run)
    plain = Run(lambda: stock(name)).updates(
        [
            [[g.astype("float32") for g in layers]]
            for layers in variance_reduced(gradients, 0.2, beta_3)
        ]
    )
    for got, want, start in zip(run.weights(), plain.weights(), initial_weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
        assert np.abs(got - start).max() > 1e-6


PAIRS = {
    "vr_sgd": (
        lambda **k: tf_lbopt.VRSGD(0.1, **k),
        lambda **k: tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1), **k),
    ),
    "vr_momentum": (
        lambda **k: tf_lbopt.VRMomentum(0.1, nesterov=True, **k),
        lambda **k: tf_lbopt.VarianceReduced(
            keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), **k
        ),
    ),
    "vr_adam": (
        lambda **k: tf_lbopt.VRAdam(0.05, weight_decay=0.1, **k),
        lambda **k: tf_lbopt.VarianceReduced(
            keras.optimizers.AdamW(0.05, weight_decay=0.1), beta_3=0.9, **k
        ),
    ),
    "vr_lars": (
        lambda **k: tf_lbopt.VRLARS(
            0.5, trust_coefficient=0.1, weight_decay=0.01, exclude_from_weight_decay=["_1"], **k
        ),
        lambda **k: tf_lbopt.VarianceReduced(
            tf_lbopt.LARS(
                0.5, trust_coefficient=0.1, weight_decay=0.01, exclude_from_weight_decay=["_1"]
            ),
            **k,
        ),
    ),
    "vr_lamb": (
        lambda **k: tf_lbopt.VRLAMB(0.05, weight_decay=0.01, **k),
        lambda **k: tf_lbopt.VarianceReduced(
            tf_lbopt.LAMB(0.05, weight_decay=0.01), beta_3=0.9, **k
        ),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("extra", [{}, {"clipnorm": 0.3}], ids=str)
@pytest.mark.quick(name=("vr_lamb", "vr_momentum"), extra={})
def test_equals_the_named_ones(name, extra):
    named, wrapped = PAIRS[name]
    gradients = sub_batch_gradients(5, sub_batches=4)
    one = Run(named, 2, 2, **extra).updates(gradients)
    other = Run(wrapped, 2, 2, **extra).updates(gradients)
    for a, b in zip(one.weights(), other.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["Nadam", "Muon", "Adam"])
@pytest.mark.quick(name=("Nadam", "Muon"))
def test_skips_everywhere(name):
    gradients = sub_batch_gradients(2, sub_batches=4)

    def make(**kwargs):
        return tf_lbopt.VarianceReduced(stock(name), **kwargs)

    run = Run(make, 2, 2).update(gradients[0])
    before = run.state()
    gradients[1][1][0][0, 0] = np.nan
    run.update(gradients[1])
    assert_states_equal(before, run.state())
    assert run.optimizer.skipped_updates.numpy() == 1


def test_learning_rate_is_the_inner_ones():
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 4, 0.0)
    gradients = sub_batch_gradients(4, sub_batches=2)
    one = Run(lambda **k: tf_lbopt.VarianceReduced(keras.optimizers.SGD(schedule), **k), 2).updates(
        gradients
    )
    other = Run(tf_lbopt.VRSGD, 2, learning_rate=schedule).updates(gradients)
    for a, b in zip(one.weights(), other.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    optimizer = tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.5), gradient_accumulation_steps=2)
    optimizer.learning_rate = 0.25
    assert optimizer.inner_optimizer.learning_rate.numpy() == 0.25


@pytest.mark.parametrize("inner", ["Nadam", "ours"])
def test_config_and_checkpoint(inner, tmp_path):
    def make(**kwargs):
        base = tf_lbopt.LAMB(0.05) if inner == "ours" else stock(inner)
        return tf_lbopt.VarianceReduced(base, gamma=0.3, beta_3=0.8, **kwargs)

    text = json.dumps(keras.saving.serialize_keras_object(make(gradient_accumulation_steps=3)))
    restored = keras.saving.deserialize_keras_object(json.loads(text))
    assert restored.get_config() == json.loads(text)["config"]
    assert restored.gradient_accumulation_steps == 3

    gradients = sub_batch_gradients(4, sub_batches=2)
    original = Run(make, 2).updates(gradients[:2])
    path = tf.train.Checkpoint(
        variables=[v.value for v in original.variables], optimizer=original.optimizer
    ).save(str(tmp_path / "checkpoint"))
    fresh = Run(make, 2, weights=initial_weights(seed=9))
    tf.train.Checkpoint(
        variables=[v.value for v in fresh.variables], optimizer=fresh.optimizer
    ).restore(path).assert_consumed()
    for run in (original, fresh):
        run.updates(gradients[2:])
    assert_states_equal(original.state(), fresh.state())


def test_keras_file(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 5)), rng.normal(size=(32, 1))
    model = keras.Sequential([keras.Input([5]), keras.layers.Dense(1)])
    model.compile(
        optimizer=tf_lbopt.VarianceReduced(stock("Adam"), gradient_accumulation_steps=2),
        loss="mse",
    )
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        one.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("inner", "kwargs", "message"),
    [
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), {}, "scale"),
        (lambda: tf_lbopt.LossScaleOptimizer(keras.optimizers.SGD(0.1)), {}, "scale"),
        (lambda: keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.1))), {}, "several"),
        (lambda: tf_lbopt.VRSGD(0.1), {}, "sub-batches"),
        (lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), {},
         "gradient_accumulation_steps"),
        (lambda: keras.optimizers.SGD(0.1, clipnorm=1.0), {}, "clipnorm"),
        (lambda: keras.optimizers.SGD(0.1, use_ema=True), {}, "use_ema"),
        (lambda: keras.optimizers.SGD(0.1), {"weight_decay": 0.1}, "weight_decay"),
        (lambda: keras.optimizers.SGD(0.1), {"learning_rate": 0.1}, "learning_rate"),
        (lambda: keras.optimizers.SGD(0.1), {"gamma": 0.0}, "gamma"),
    ],
)  # fmt: skip
def test_refusals(inner, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        tf_lbopt.VarianceReduced(inner(), **kwargs)
    assert "Received" in str(error.value)


def test_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match="inner_optimizer"):
        tf_lbopt.VarianceReduced("sgd")


def test_one_sub_batch_is_refused():
    optimizer = tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        optimizer.apply([tf.ones([2])], [keras.Variable([1.0, 2.0])])


def test_two_strategies_are_noticed():
    outside = keras.optimizers.SGD(0.1)
    with strategy_of(2).scope(), pytest.raises(ValueError, match=r"same strategy.*a SGD"):
        tf_lbopt.VarianceReduced(outside)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf_lbopt.VarianceReduced(keras.optimizers.Adam(0.1), gradient_accumulation_steps=2),
        lambda: tf_lbopt.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
        lambda: tf_lbopt.LossScaleOptimizer(tf_lbopt.LAMB(0.1)),
    ],
)
def test_set_weights_sets_the_inner_ones_too(make):
    variable = keras.Variable([1.0, 2.0])
    first, second = make(), make()
    for _ in range(4):
        first.apply([tf.constant([1.0, 2.0])], [variable])
    weights = [v.numpy() for v in first.variables]
    with pytest.raises(ValueError, match="`build`"):
        second.set_weights(weights)
    second.build([variable])
    with pytest.raises(ValueError, match="Received: "):
        second.set_weights(weights[:-1])
    second.set_weights(weights)
    for got, weight in zip(second.variables, weights, strict=True):
        np.testing.assert_array_equal(got.numpy(), weight)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tf_lbopt.VRLAMB(0.1), marks=pytest.mark.long),
        lambda: tf_lbopt.VarianceReduced(keras.optimizers.Adam(0.1)),
    ],
)
def test_trained_on_several_replicas_used_on_one(make, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 5)), rng.normal(size=(16, 1))
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(1)])
        model.compile(optimizer=make(), loss="mse")
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)
    np.testing.assert_allclose(
        loaded.evaluate(x, y, verbose=0), model.evaluate(x, y, verbose=0), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"needs at least 2.*Received: 1 replica"):
        loaded.fit(x, y, batch_size=8, verbose=0)


# -- looking at GSNR -------------------------------------------------------------------------------


@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 4), (4, 1)])
def test_summaries_are_right(replicas, micro_steps):
    shapes = [(40, 30), (7,)]
    gradients = sub_batch_gradients(1, sub_batches=4, shapes=shapes)
    for sub_batch in gradients[0]:
        sub_batch[0][:10] = 0.0  # dead elements
    run = Run(
        tf_lbopt.VRSGD, replicas, micro_steps, learning_rate=0.1, weights=initial_weights(shapes)
    )
    run.optimizer.watch_gsnr()
    run.updates(gradients)
    summaries = list(run.optimizer.gsnr_summaries().values())
    for summary, layer in zip(summaries, zip(*gradients[0], strict=True), strict=True):
        g = np.asarray(layer, np.float64)
        live = g.any(axis=0)
        ratio = np.where(live, g.mean(0) ** 2 / np.where(live, g.var(0), 1.0), 0.0)
        normalized = np.sort((ratio / ratio[live].mean()).ravel())
        np.testing.assert_allclose(summary["mean"], ratio[live].mean(), rtol=1e-4)
        for name, q in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
            expected = normalized[round(q * (normalized.size - 1))]
            np.testing.assert_allclose(summary[name], expected, rtol=1e-3, atol=1e-6)
        r = gsnr(layer, 0.1)
        np.testing.assert_allclose(summary["at_gamma"], np.mean(r <= 0.1), atol=1e-6)
        np.testing.assert_allclose(summary["at_one"], np.mean(r >= 1.0), atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda o: o, tf_lbopt.LossScaleOptimizer], ids=["bare", "scaled"])
@pytest.mark.quick(wrap=tf_lbopt.LossScaleOptimizer)
def test_callback_logs_and_writes(wrap, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 5)), rng.normal(size=(64, 1))
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(1)])
        model.compile(optimizer=wrap(tf_lbopt.VRMomentum(0.01)), loss="mse")
    model.fit(x, y, batch_size=16, verbose=0)
    callback = tf_lbopt.callbacks.GradientSignalToNoise(every=2, log_dir=str(tmp_path))
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[callback]).history
    names = [name for name in history if name.startswith("gsnr/")]
    assert len(names) == 2 * 8
    assert all(np.isfinite(history[name]).all() for name in names)
    kernel_mean = next(name for name in names if name.endswith("kernel/mean"))
    assert history[kernel_mean][0] != history[kernel_mean][1]
    written = {
        value.tag
        for file in tmp_path.iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }
    assert written == set(names)
    # Afterwards the training step is as it was: nothing is kept, and a checkpoint has no trace.
    again = model.fit(x, y, batch_size=16, verbose=0).history
    assert not [name for name in again if name.startswith("gsnr/")]


def test_callback_refuses_a_model_that_is_not_built():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(optimizer=tf_lbopt.VRSGD(0.1, gradient_accumulation_steps=2), loss="mse")
    x, y = np.ones([16, 3]), np.ones([16, 1])
    callbacks = [tf_lbopt.callbacks.GradientSignalToNoise(every=1)]
    with pytest.raises(ValueError, match=f"Received the model '{model.name}', which is not built"):
        model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
    model(x)
    history = model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks).history
    assert sum(name.startswith("gsnr/") for name in history) == 2 * 8


def test_callback_refuses_other_optimizers():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(optimizer=tf_lbopt.SNGM(0.1), loss="mse")
    with pytest.raises(ValueError, match="VRGD"):
        model.fit(
            np.ones([4, 2]),
            np.ones([4, 1]),
            verbose=0,
            callbacks=[tf_lbopt.callbacks.GradientSignalToNoise()],
        )
