"""The callback against gradients of one example at a time."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of

from tf_lbopt.callbacks import FreezeLayers, GradientVarianceFactor


def data(rows=21):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(rows, 6)).astype("float32"),
        rng.integers(0, 3, rows),
        rng.uniform(0.5, 2, rows).astype("float32"),
    )


def model_of(replicas=1):
    with strategy_of(replicas).scope():
        model = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(5, activation="tanh"),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )
        model.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    return model


def brute_force(model, x, y, weights):
    squares, sums = 0.0, 0.0
    for row, label, weight in zip(x, y, weights, strict=True):
        with tf.GradientTape() as tape:
            predicted = model(row[None], training=False)
            loss = (
                weight
                * keras.losses.sparse_categorical_crossentropy(np.array([label]), predicted)[0]
            )
        own = tape.gradient(loss, [v.value for v in model.trainable_variables])
        own = [g.numpy().astype(float) for g in own]
        squares = squares + np.array([np.sum(g**2) for g in own])
        sums = own if isinstance(sums, float) else [a + g for a, g in zip(sums, own, strict=True)]
    n = len(x)
    return [s / n / np.sum((g / n) ** 2) for s, g in zip(squares, sums, strict=True)]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.quick(replicas=2, weighted=True)
@pytest.mark.quick(replicas=1, weighted=False)
def test_equals_brute_force_after_every_epoch(replicas, weighted):
    x, y, weights = data()
    weights = weights if weighted else np.ones_like(weights)
    model = model_of(replicas)
    callback = GradientVarianceFactor(x, y, weights if weighted else None, batch_size=8)
    expected = []
    reference = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: expected.append(brute_force(model, x, y, weights))
    )
    history = model.fit(
        x[:20], y[:20], batch_size=10, epochs=2, verbose=0, callbacks=[callback, reference]
    ).history
    names = [name for name in history if name.startswith("variance_factor/")]
    assert len(names) == len(model.trainable_variables) == 6
    assert names[-1].endswith("bias")
    got = np.array([history[name] for name in names]).T
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    assert np.min(got) >= 1


def test_every_and_tensorboard(tmp_path):
    x, y, _ = data()
    callback = GradientVarianceFactor(x, y, every=2, log_dir=str(tmp_path))
    model = model_of()
    history = model.fit(x, y, epochs=4, verbose=0, callbacks=[callback]).history
    assert {len(v) for name, v in history.items() if name.startswith("variance")} == {2}
    (file,) = tmp_path.glob("events*")
    events = list(tf.compat.v1.train.summary_iterator(str(file)))
    steps = {event.step for event in events if event.summary.value}
    assert steps == {1, 3}


def test_layers_frozen_in_between():
    x, y, _ = data()
    model = model_of()
    callback = GradientVarianceFactor(x, y)
    model.fit(x, y, verbose=0, callbacks=[callback])
    model.layers[0].trainable = False
    model.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    history = model.fit(x, y, verbose=0, callbacks=[callback]).history
    assert sum(name.startswith("variance") for name in history) == 4


@pytest.mark.parametrize("freeze_first", [False, True])
@pytest.mark.quick(freeze_first=False)
def test_layers_frozen_by_a_callback(freeze_first):
    x, y, weights = data()
    model = model_of()
    got, expected = [], []

    def compare(epoch, logs):
        got.append([v for name, v in logs.items() if name.startswith("variance_factor/")])
        expected.append(brute_force(model, x, y, np.ones_like(weights)))

    freeze = FreezeLayers(model.layers[0], epochs=1)
    measure = [GradientVarianceFactor(x, y), keras.callbacks.LambdaCallback(on_epoch_end=compare)]
    callbacks = [freeze, *measure] if freeze_first else [*measure, freeze]
    model.fit(x, y, epochs=3, verbose=0, callbacks=callbacks)
    assert [len(factors) for factors in got] == [6 if freeze_first else 4, 6, 6]
    for own, reference in zip(got, expected, strict=True):
        np.testing.assert_allclose(own, reference, rtol=1e-3)


def test_errors():
    x, y, _ = data()
    with pytest.raises(ValueError, match=r"same number of examples.*Received: \[20, 21\]"):
        GradientVarianceFactor(x, y[:20])
    with pytest.raises(ValueError, match="`every` must be an integer >= 1"):
        GradientVarianceFactor(x, y, every=0)
    with pytest.raises(TypeError, match=r"`x` must be an array.*Received: x=<.*Dataset\)"):
        GradientVarianceFactor(tf.data.Dataset.from_tensor_slices((x, y)), y)
    with pytest.raises(TypeError, match=r"`y` must be an array.*Received: y=None"):
        GradientVarianceFactor(x, None)
    inputs = keras.Input([6])
    outputs = [keras.layers.Dense(3)(inputs), keras.layers.Dense(3)(inputs)]
    model = keras.Model(inputs, outputs)
    model.compile(optimizer="sgd", loss=["mse", "mse"])
    with pytest.raises(ValueError, match="needs one loss"):
        model.fit(x, [x[:, :3], x[:, 3:]], verbose=0, callbacks=[GradientVarianceFactor(x, x)])
