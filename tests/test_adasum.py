"""`Adasum` against float64, on two and four replicas."""

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
from helpers_stock import needs_muon, stock
from test_accumulated import SHAPES, gradients_with_a_table

import tf_lbopt
from benchmarks import references
from tf_lbopt.aggregation.adasum import adasum


def run_of(name, replicas, micro_steps=1, **arguments):
    return Run(
        lambda **k: tf_lbopt.Adasum(stock(name), **k),
        replicas,
        micro_steps,
        weights=initial_weights(SHAPES),
        **arguments,
    )


def of_replicas(gradients, replicas):
    """``[update][replica][layer]`` means over micro-steps, of ``[update][sub-batch][layer]``."""
    return [
        [references.mean_gradients([update[d::replicas]])[0] for d in range(replicas)]
        for update in gradients
    ]


def stock_weights(name, gradients):
    single = [[[g.astype("float32") for g in layers]] for layers in gradients]
    return Run(lambda: stock(name), weights=initial_weights(SHAPES)).updates(single).weights()


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# -- two gradients ---------------------------------------------------------------------------------


def test_of_two_gradients():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(6, 5)).astype("float32") for _ in range(2))
    zeros, e, f = np.zeros_like(a), np.eye(6, 5, dtype="float32"), np.eye(6, 5, 1, dtype="float32")
    pairs = [(a, b), (a, a), (a, zeros), (zeros, b), (zeros, zeros), (e, f), (a, -a), (a, 2 * b)]
    (expected,) = references.adasum([[[x for x, _ in pairs], [y for _, y in pairs]]])
    got = adasum(*([tf.constant(x) for x in of_all] for of_all in zip(*pairs, strict=True)))
    assert_close(got, expected)
    np.testing.assert_allclose(got[1], a, rtol=1e-5, atol=1e-6)  # the mean of equal ones
    np.testing.assert_array_equal(got[2], a)
    np.testing.assert_array_equal(got[4], zeros)
    np.testing.assert_allclose(got[5], e + f)  # the sum of orthogonal ones


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_squares_that_underflow_or_overflow(scale):
    rng = np.random.default_rng(0)
    a, b = (scale * rng.normal(size=20) for _ in range(2))
    got = adasum(*([tf.constant(x, tf.float32)] for x in (a, b)))[0]
    expected = references.adasum([[[a / scale], [b / scale]]])[0][0]
    np.testing.assert_allclose(got / np.float32(scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value):
    a, b = np.ones(3, "float32"), np.zeros(3, "float32")
    b[1] = value
    for pair in ((a, b), (b, a), (0 * a, b)):
        assert not np.isfinite(adasum(*([tf.constant(x)] for x in pair))[0]).all()


# -- replicas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW", pytest.param("Muon", marks=needs_muon)])
@pytest.mark.parametrize(("replicas", "micro_steps"), [(2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.quick(name="SGD", replicas=2, micro_steps=2)
def test_equals_the_reference(name, replicas, micro_steps):
    """Dense gradients and those of a table; inside a replica a plain mean over micro-steps."""
    gradients, dense = gradients_with_a_table(3, replicas * micro_steps)
    run = run_of(name, replicas, micro_steps).updates(gradients)
    assert run.optimizer.iterations.numpy() == 3
    assert_replicas_identical(run)
    expected = references.adasum(of_replicas(dense, replicas))
    assert_close(run.weights(), stock_weights(name, expected))
    means = stock_weights(name, references.mean_gradients(dense))
    assert np.abs(means[1] - run.weights()[1]).max() > 1e-3


def test_four_replicas_eagerly():
    gradients = sub_batch_gradients(2, 4, SHAPES)
    run = run_of("SGD", 4, function=lambda step: step).updates(gradients)
    assert_replicas_identical(run)
    assert_close(run.weights(), stock_weights("SGD", references.adasum(gradients)))


def test_one_replica_is_itself():
    gradients = sub_batch_gradients(2, 1, SHAPES)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        variables = [keras.Variable(w) for w in initial_weights(SHAPES)]
        optimizer = tf_lbopt.Adasum(stock("SGD"))
        optimizer.build(variables)
    for update in gradients:
        strategy.run(lambda g: optimizer.apply(g, variables), args=(update[0],))
    assert_close(
        [v.numpy() for v in variables],
        stock_weights("SGD", references.mean_gradients(gradients)),
    )


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.quick(micro_steps=1)
def test_a_nan_discards_the_update(micro_steps):
    gradients = sub_batch_gradients(2, 2 * micro_steps, SHAPES)
    run = run_of("AdamW", 2, micro_steps).update(gradients[0])
    before = run.state()
    gradients[1][-1][1][0, 0] = np.nan
    run.update(gradients[1])
    assert_states_equal(before, run.state())
    assert run.optimizer.skipped_updates.numpy() == 1
    assert_replicas_identical(run)


@pytest.mark.long
def test_loss_scale_is_taken_out_again_in_a_compiled_update():
    gradients = sub_batch_gradients(2, 2, SHAPES)
    scaled = [[[1024 * g for g in layers] for layers in update] for update in gradients]
    run = run_of("SGD", 2, loss_scale_factor=1024.0, jit_compile=True).updates(scaled)
    expected = references.adasum(of_replicas(gradients, 2))
    assert_close(run.weights(), stock_weights("SGD", expected))


def test_through_fit():
    """The gradient of each replica's own mean loss, though `fit` divides by their number."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(1, use_bias=False)])
        model.compile(tf_lbopt.Adasum(keras.optimizers.SGD(0.1)), "mse")
    w = model.get_weights()[0].astype("float64")
    shares = [[2 * x[d : d + 4].T @ (x[d : d + 4] @ w - y[d : d + 4]) / 4] for d in (0, 4)]
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    expected = w - 0.1 * references.adasum([shares])[0][0]
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-4, atol=1e-5)


def test_configuration():
    optimizer = tf_lbopt.Adasum(stock("SGD"), 2)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is tf_lbopt.Adasum
    assert again.get_config() == optimizer.get_config()


def test_is_refused_elsewhere():
    variable = keras.Variable([1.0])
    with pytest.raises(ValueError, match=r"power of two.*Received: 1 replicas under \w*Default"):
        tf_lbopt.Adasum(stock("SGD")).apply([tf.ones([1])], [variable])
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(3)])
    with strategy.scope():
        variable = keras.Variable([1.0])
        optimizer = tf_lbopt.Adasum(stock("SGD"))
        optimizer.build([variable])
    with pytest.raises(ValueError, match=r"power of two.*Received: 3 replicas under Mirrored"):
        strategy.run(lambda: optimizer.apply([tf.ones([1])], [variable]))


def test_statistics_are_refused():
    with pytest.raises(ValueError, match="sub-batches"):
        tf_lbopt.Adasum(tf_lbopt.VRSGD(0.1))
