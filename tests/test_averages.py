"""`use_ema`: averages of weights in half precision, and `callbacks.SwapEMAWeights`."""

from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from conftest import strategy_of
from harness import Run, assert_replicas_identical

import tf_lbopt
import tf_lbopt.tf_keras

HALF = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
WEIGHTS = [np.float32([1.0, 2.0]), np.float32([[0.5]])]


def expected_averages(run, updates, momentum):
    """Averages in float64, and updates with gradients of 1 on all sub-batches."""
    averages = [0.0] * len(run.variables)
    for number in range(updates):
        run.update([[np.ones_like(w) for w in WEIGHTS]] * (run.replicas * run.micro_steps))
        old = momentum if number else 0.0
        averages = [
            old * average + (1 - old) * tf.cast(v.value, tf.float64).numpy()
            for average, v in zip(averages, run.variables, strict=True)
        ]
    return averages


def averages_of(optimizer):
    return [a.numpy() for a in optimizer._model_variables_moving_average]


@HALF
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.quick(dtype="bfloat16", replicas=2)
@pytest.mark.quick(dtype="float16", micro_steps=2)
def test_averages_of_half_precision_move(dtype, replicas, micro_steps):
    run = Run(
        tf_lbopt.SNGM, replicas, micro_steps, weights=WEIGHTS, dtype=dtype,
        learning_rate=0.1, use_ema=True, ema_momentum=0.999,
    )  # fmt: skip
    expected = expected_averages(run, 5, 0.999)
    for average, value in zip(averages_of(run.optimizer), expected, strict=True):
        assert average.dtype == np.float32
        np.testing.assert_allclose(average, value, rtol=1e-6)
    assert_replicas_identical(run)
    run.optimizer.finalize_variable_values(run.variables)
    for variable, value in zip(run.variables, expected, strict=True):
        np.testing.assert_array_equal(
            variable.numpy(), np.float32(value).astype(variable.numpy().dtype)
        )
    assert_replicas_identical(run)


@pytest.mark.parametrize("compiled", [False, True])
def test_averages_overwrite_half_precision(compiled):
    def function(step):
        return tf.function(step, jit_compile=compiled)

    run = Run(
        tf_lbopt.SNGM, weights=WEIGHTS, dtype="bfloat16", function=function, learning_rate=0.1,
        use_ema=True, ema_momentum=0.999, ema_overwrite_frequency=3,
    )  # fmt: skip
    for _ in range(3):
        run.update([[np.ones_like(w) for w in WEIGHTS]])
    for average, variable in zip(averages_of(run.optimizer), run.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), average.astype(variable.numpy().dtype))


def test_averages_of_tf_keras():
    variable = tf.Variable([1.0, 2.0], dtype=tf.bfloat16)
    optimizer = tf_lbopt.tf_keras.SNGM(0.1, use_ema=True, ema_momentum=0.999)
    optimizer.build([variable])
    (average,) = optimizer._model_variables_moving_average
    assert average.dtype == tf.float32
    np.testing.assert_array_equal(average.numpy(), [1.0, 2.0])
    expected = None
    for _ in range(4):
        optimizer.apply_gradients([(tf.constant([1.0, 1.0], tf.bfloat16), variable)])
        now = tf.cast(variable, tf.float64).numpy()
        expected = now if expected is None else 0.999 * expected + 0.001 * now
    np.testing.assert_allclose(average.numpy(), expected, rtol=1e-6)
    optimizer.finalize_variable_values([variable])
    np.testing.assert_array_equal(variable.numpy(), tf.cast(expected, tf.bfloat16).numpy())


@pytest.mark.parametrize("library", [keras, tf_keras], ids=lambda library: library.__name__)
@pytest.mark.parametrize("reason", ["accumulation", "nan"])
def test_without_an_update_weights_stay(library, reason):
    """In `fit`, and while they are exchanged; also where they were loaded after `build`."""
    own = tf_lbopt if library is keras else tf_lbopt.tf_keras
    steps = 100 if reason == "accumulation" else None
    model = library.Sequential([library.layers.Dense(1)])
    model.build([None, 3])
    optimizer = own.SNGM(0.1, use_ema=True, gradient_accumulation_steps=steps)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    model.set_weights([np.float32([[1.0], [2.0], [3.0]]), np.float32([4.0])])
    x, ones, zeros = np.full([8, 3], 1.0 if steps else np.nan), np.ones([8, 3]), np.zeros([8, 1])
    callbacks = []
    if library is keras:
        callbacks = [tf_lbopt.callbacks.SwapEMAWeights()]
        assert model.evaluate(ones, zeros, callbacks=callbacks, verbose=0) == 100.0
    with pytest.warns(UserWarning, match="before an update") if steps else nullcontext():
        model.fit(x, zeros, 8, validation_data=(ones, zeros), callbacks=callbacks, verbose=0)
    kernel, bias = model.get_weights()
    np.testing.assert_array_equal(kernel, [[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(bias, [4.0])


@pytest.mark.parametrize("replicas", [1, 2])
def test_averages_where_iterations_were_set(replicas):
    run = Run(tf_lbopt.SNGM, replicas, weights=WEIGHTS, learning_rate=0.0, use_ema=True)
    with strategy_of(replicas).scope():
        run.optimizer.build(run.variables)
        run.optimizer.iterations.assign(1000)
    run.update([[np.ones_like(w) for w in WEIGHTS]] * replicas)
    for average, weights in zip(averages_of(run.optimizer), WEIGHTS, strict=True):
        np.testing.assert_allclose(average, weights, rtol=1e-6)
    assert_replicas_identical(run)


WRAPPED = {
    "plain": lambda **kwargs: tf_lbopt.SNGM(0.05, **kwargs),
    "scaled": lambda **kwargs: tf_lbopt.LossScaleOptimizer(tf_lbopt.LAMB(0.05, **kwargs)),
    "around": lambda **kwargs: tf_lbopt.VarianceReduced(
        keras.optimizers.SGD(0.05), gradient_accumulation_steps=2, **kwargs
    ),
}


class _Watch(keras.callbacks.Callback):
    """What weights and averages are at the ends of epochs and the beginnings of the next."""

    def __init__(self, owner):
        super().__init__()
        self.owner, self.ends, self.beginnings = owner, [], []

    def _now(self):
        return averages_of(self.owner), [tf.cast(v, tf.float32).numpy() for v in self.weights()]

    def weights(self):
        return [v.value for v in self.model.trainable_variables]

    def on_epoch_begin(self, epoch, logs=None):
        self.beginnings.append(self._now())

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(self._now())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.quick(dtype="bfloat16")
def test_swapping_loses_nothing(name, dtype):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    replicas = 2 if name == "scaled" else 1
    with strategy_of(replicas).scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, dtype=dtype)])
        optimizer = WRAPPED[name](use_ema=True, ema_momentum=0.999)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, "mse", jit_compile=False)
    owner = optimizer if optimizer.use_ema else optimizer.inner_optimizer
    before, swapped = _Watch(owner), _Watch(owner)
    swap = tf_lbopt.callbacks.SwapEMAWeights(swap_on_epoch=True)
    model.fit(x, x[:, :1], batch_size=8, epochs=2, verbose=0, callbacks=[before, swap, swapped])
    averages, weights = before.ends[0]
    shown = [tf.cast(tf.cast(a, dtype), tf.float32).numpy() for a in averages]
    for got, value in zip(swapped.ends[0], (weights, shown), strict=True):
        for a, b in zip(got, value, strict=True):
            np.testing.assert_array_equal(a, b)
    for got, value in zip(swapped.beginnings[1], (averages, weights), strict=True):
        for a, b in zip(got, value, strict=True):
            np.testing.assert_array_equal(a, b)
    # At the end the weights are the averages, which keep what half precision has no room for.
    for average, last in zip(averages_of(owner), before.ends[1][0], strict=True):
        np.testing.assert_array_equal(average, last)
    for variable, average in zip(model.trainable_variables, averages_of(owner), strict=True):
        np.testing.assert_array_equal(
            tf.cast(variable.value, tf.float32), tf.cast(tf.cast(average, dtype), tf.float32)
        )


def test_swapping_where_training_stops_early():
    """Weights end as the averages, also where it is a later callback that stops."""
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    optimizer = tf_lbopt.SNGM(0.05, use_ema=True, ema_momentum=0.9)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse", jit_compile=False)
    before = _Watch(optimizer)
    swap = tf_lbopt.callbacks.SwapEMAWeights(swap_on_epoch=True)
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
    )
    model.fit(x, x[:, :1], batch_size=8, epochs=5, verbose=0, callbacks=[before, swap, stop])
    assert int(optimizer.iterations.numpy()) == 2
    averages, weights = before.ends[0]
    for variable, average, raw in zip(model.trainable_variables, averages, weights, strict=True):
        np.testing.assert_array_equal(variable.numpy(), average)
        assert not np.array_equal(average, raw)


@pytest.mark.parametrize("by", ["backup", "model", "checkpoint"])
@pytest.mark.parametrize("name", ["plain", "scaled"])
@pytest.mark.quick(name="plain")
def test_what_is_saved_between_two_exchanges_is_gone_on_with(by, name, tmp_path):
    """The weights of a file are averages, and its averages weights: so training must begin."""
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")

    def new():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        model.set_weights([np.float32([[1.0], [2.0], [3.0]]), np.float32([4.0])])
        model.compile(WRAPPED[name](use_ema=True, ema_momentum=0.9), "mse", jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        return model

    def fit(model, begin, end, saves=()):
        swap = tf_lbopt.callbacks.SwapEMAWeights(swap_on_epoch=True)
        model.fit(x, x[:, :1], 8, end, 0, [swap, *saves], initial_epoch=begin, shuffle=False)

    def stop(epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt

    def save(epoch, logs=None):
        if by == "model":
            model.save(tmp_path / "model.keras")
        else:
            checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
            checkpoint.write(str(tmp_path / "checkpoint"))

    whole, model = new(), new()
    fit(whole, 0, 4)
    stopping = keras.callbacks.LambdaCallback(on_epoch_begin=stop)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    saving = backup if by == "backup" else keras.callbacks.LambdaCallback(on_epoch_end=save)
    with pytest.raises(KeyboardInterrupt):
        fit(model, 0, 4, [saving, stopping])
    resumed = keras.saving.load_model(tmp_path / "model.keras") if by == "model" else new()
    if by == "checkpoint":
        checkpoint = tf.train.Checkpoint(model=resumed, optimizer=resumed.optimizer)
        checkpoint.read(str(tmp_path / "checkpoint")).assert_consumed()
    fit(resumed, 0 if by == "backup" else 2, 4, [backup] if by == "backup" else [])
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluations_see_averages():
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    optimizer = tf_lbopt.SNGM(0.05, use_ema=True, ema_momentum=0.5)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse", jit_compile=False)
    for _ in range(3):
        model.train_on_batch(x, x[:, :1])
    weights = model.get_weights()
    kernel, bias = averages_of(optimizer)
    expected = x @ kernel + bias
    swap = [tf_lbopt.callbacks.SwapEMAWeights()]
    np.testing.assert_allclose(model.predict(x, verbose=0, callbacks=swap), expected, atol=1e-5)
    loss = model.evaluate(x, x[:, :1], verbose=0, callbacks=swap)
    assert loss == pytest.approx(np.mean((expected - x[:, :1]) ** 2), rel=1e-5)
    for now, then in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, then)
    assert np.abs(weights[0] - kernel).max() > 1e-3


@pytest.mark.parametrize("make", [lambda: tf_lbopt.SNGM(0.1), lambda: keras.optimizers.SGD(0.1)])
def test_swapping_needs_averages(make):
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(make(), "mse", jit_compile=False)
    x = np.ones([4, 2], "float32")
    with pytest.raises(ValueError, match=r"`use_ema=True`.* Received: S"):
        model.fit(x, x[:, :1], verbose=0, callbacks=[tf_lbopt.callbacks.SwapEMAWeights()])


# -- the learning rate that is set -----------------------------------------------------------------

RATES = {
    "keras": lambda: tf_lbopt.LAMB(0.1),
    "tf_keras": lambda: tf_lbopt.tf_keras.LAMB(0.1),
    "around stock": lambda: tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1)),
    "post-local": lambda: tf_lbopt.PostLocalSGD(keras.optimizers.SGD(0.1), start=1, period=2),
    "scaled": lambda: tf_lbopt.LossScaleOptimizer(tf_lbopt.LAMB(0.1)),
    "scaled stock": lambda: tf_lbopt.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
}


@pytest.mark.parametrize("name", RATES)
def test_a_rate_that_is_set_is_checked(name):
    optimizer = RATES[name]()
    for bad in (np.nan, -1, -1.0, np.inf, tf.constant(np.nan)):
        with pytest.raises(ValueError, match=r"`learning_rate` must be .*Received: "):
            optimizer.learning_rate = bad
    for bad in (True, np.bool_(True), "0.1", None, np.ones(2)):
        with pytest.raises(TypeError, match=r"(?s)`learning_rate` must be a real number.*Received"):
            optimizer.learning_rate = bad
    assert float(np.asarray(optimizer.learning_rate)) == np.float32(0.1)
    rates = (1, 0.5, np.float32(0.25), np.float64(0.125), np.array(0.75), tf.constant(0.5))
    for good in (*rates, tf.Variable(0.25), keras.Variable(0.5), optimizer.learning_rate):
        optimizer.learning_rate = good
        assert float(np.asarray(optimizer.learning_rate)) == float(np.asarray(good))
    tf.function(lambda: setattr(optimizer, "learning_rate", tf.constant(0.25)))()
    assert float(np.asarray(optimizer.learning_rate)) == 0.25


@pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_callbacks_set_the_rate(framework):
    x = np.ones([8, 2], "float32")
    model = framework.Sequential([framework.layers.Dense(1, input_shape=(2,))])
    optimizer = (tf_lbopt if framework is keras else tf_lbopt.tf_keras).SNGM(0.5)
    model.compile(optimizer, "mse", jit_compile=False)
    callbacks = [
        framework.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=0, min_delta=9),
        framework.callbacks.LearningRateScheduler(lambda epoch, rate: np.float32(rate / 2)),
    ]
    model.fit(x, x[:, :1], epochs=3, verbose=0, callbacks=callbacks)
    assert float(np.asarray(optimizer.learning_rate)) < 0.5 / 8
