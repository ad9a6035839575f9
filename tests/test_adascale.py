"""AdaScale against float64, its refusals and its state."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from harness import (
    SPLITS,
    Run,
    assert_replicas_identical,
    assert_states_equal,
    initial_weights,
    sub_batch_gradients,
)

import tf_lbopt
from benchmarks.references import adascale
from tf_lbopt.callbacks import GradientNoiseScale

MOMENTUM = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


def schedule(t):
    return 0.05 if t <= 3 else 0.02 if t <= 8 else 0.01


def inner(**kwargs):
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([3, 8], [0.05, 0.02, 0.01])
    return tf_lbopt.SGD(rate, **kwargs)


def make(**kwargs):
    return tf_lbopt.AdaScale(inner(**MOMENTUM), **kwargs)


def gradients_of(updates=6, sub_batches=8, scale=1.0):
    """With noise of some sizes, an empty sub-batch among them."""
    gradients = sub_batch_gradients(updates, sub_batches)
    for n, update in enumerate(gradients):
        means = [np.mean(of_layer, axis=0) for of_layer in zip(*update, strict=True)]
        noise = n + 1
        update[:] = [
            [m + noise * (g - m) for g, m in zip(layers, means, strict=True)] for layers in update
        ]
    for layer in gradients[2][1] if updates > 2 else ():
        layer[...] = 0
    return [[[(scale * g).astype("float32") for g in s] for s in u] for u in gradients]


def clipped(layers):
    norm = np.sqrt(sum(np.sum(g**2) for g in layers))
    return [g * min(1.0, 3.0 / norm) for g in layers]


def assert_as_reference(run, expected, rtol=2e-5):
    weights, gains, tau = expected
    for a, b in zip(run.weights(), weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(run.inner.gain.numpy(), gains[-1], rtol=rtol)
    np.testing.assert_allclose(run.inner.scale_invariant_steps, tau, rtol=rtol)
    assert_replicas_identical(run)


@pytest.mark.parametrize(("replicas", "micro_steps"), SPLITS)
@pytest.mark.parametrize("compiled", ["auto", True])
@pytest.mark.quick(compiled="auto", replicas=4)
@pytest.mark.quick(compiled=True, replicas=1)
def test_equals_the_reference(replicas, micro_steps, compiled):
    run = Run(
        make, replicas, micro_steps, global_clipnorm=3.0, loss_scale_factor=8.0,
        jit_compile=compiled,
    )  # fmt: skip
    run.updates(gradients_of(scale=8.0))
    expected = adascale(initial_weights(), gradients_of(), schedule, clip=clipped, **MOMENTUM)
    assert expected[2] > 9  # the schedule is at its last rate, which 6 updates do not reach
    assert len(set(np.round(expected[1], 2))) == 6
    assert_as_reference(run, expected)
    assert int(run.optimizer.iterations.numpy()) == 6


def test_updates_that_are_discarded_or_without_an_estimate():
    gradients = gradients_of(3, 2)[:2]
    run = Run(make, 2).update(gradients[0])
    before = run.state()
    bad = [[g.copy() for g in layers] for layers in gradients[1]]
    bad[1][0][0, 0] = np.nan
    run.update(bad)
    assert_states_equal(before, run.state())
    run.update(gradients[1])
    assert_as_reference(run, adascale(initial_weights(), gradients, schedule, **MOMENTUM))
    tau, variance = run.inner.scale_invariant_steps, run.inner._variance.numpy()
    run.update([gradients[1][0], [np.zeros_like(g) for g in gradients[1][1]]])
    assert float(run.inner.gain.numpy()) == 1.0
    assert run.inner.scale_invariant_steps == pytest.approx(tau + 1.0)
    assert run.inner._variance.numpy() == variance


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(replicas=2)
def test_resumes_in_mid_accumulation(replicas, tmp_path):
    gradients = gradients_of(4, 4)
    steps = 4 // replicas

    def begin():
        run = Run(make, replicas, steps)
        return run, tf.train.Checkpoint(variables=run.variables, optimizer=run.optimizer)

    def micro_steps(run, numbers):
        for number in numbers:
            update, first = gradients[number // steps], number % steps * replicas
            run.micro_step([list(map(tf.constant, update[first + r])) for r in range(replicas)])

    whole = 4 * steps
    run, saved = begin()
    micro_steps(run, range(whole - 1))
    path = saved.write(str(tmp_path / "state"))
    other, to_be_restored = begin()
    micro_steps(other, range(1))
    to_be_restored.read(path).assert_existing_objects_matched()
    for each in (run, other):
        micro_steps(each, range(whole - 1, whole))
    assert_states_equal(run.state(), other.state())
    assert_as_reference(other, adascale(initial_weights(), gradients, schedule, **MOMENTUM))


def test_fit_saves_loads_and_logs_the_gain(tmp_path):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(40, n)).astype("float32") for n in (5, 1))
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(1)])
        optimizer = make(gradient_accumulation_steps=2)
        model.compile(optimizer=optimizer, loss="mse")
    fit = {"x": x, "y": y, "batch_size": 8, "shuffle": False, "verbose": 0}
    history = model.fit(**fit, callbacks=[GradientNoiseScale()]).history  # 5 micro-steps
    assert 1 < history["gain"][0] == float(model.optimizer.gain.numpy()) < 4
    model.save(tmp_path / "model.keras")
    with strategy_of(2).scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        one.fit(**fit)
        assert int(one.optimizer.iterations.numpy()) == 5
    assert loaded.optimizer.scale_invariant_steps > 5
    values = ([v.numpy() for v in (*m.weights, *m.optimizer.variables)] for m in (model, loaded))
    for a, b in zip(*values, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (lambda: keras.optimizers.SGD(0.1), "must be a tf_lbopt.SGD.*Received: SGD"),
        (lambda: tf_lbopt.LAMB(0.1), "must be a tf_lbopt.SGD.*Received: LAMB"),
        (lambda: tf_lbopt.SGD(0.1, clipnorm=1.0), "`clipnorm` must be given to AdaScale"),
    ],
)
def test_refuses_other_optimizers(wrapped, message):
    with pytest.raises(ValueError, match=message):
        tf_lbopt.AdaScale(wrapped())


def test_refuses_a_single_sub_batch():
    with pytest.raises(ValueError, match=r"2 sub-batches or more.*Received: 1 replica"):
        Run(make).update(gradients_of(3, 2)[0][:1])
