"""Extrapolated optimizers in `fit`: what is seen of the weights, errors, saving and resuming."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from test_extrapolation import ARGUMENTS, ROWS, Loop, assert_close, batches, initial, reference

import tf_lbopt
from tf_lbopt.aggregation.sub_batches import split


def model_of(optimizer, replicas=1, model_class=keras.Model, dtype=None, **compile_arguments):
    with strategy_of(replicas).scope():
        inputs = keras.Input([5])
        outputs = keras.layers.Dense(3, name="linear", dtype=dtype)(inputs)
        model = model_class(inputs, outputs)
        model.set_weights(initial())
        model.compile(optimizer=optimizer(), loss="mse", **compile_arguments)
    return model


def dataset(data):
    return tf.data.Dataset.from_tensor_slices(tuple(data))


def fit(model, data, **kwargs):
    return model.fit(dataset(data), verbose=0, shuffle=False, **kwargs)


class Seen(keras.callbacks.Callback):
    """Weights after every update, and the loss that validation would see."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append([w.numpy() for w in self.model.trainable_variables])


@pytest.mark.parametrize(("replicas", "sub_batches"), [(1, 1), (4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("noise", ["past_gradient", "stochastic_noise"])
@pytest.mark.quick(replicas=2, noise="past_gradient")
@pytest.mark.quick(replicas=1, sub_batches=4, noise="stochastic_noise")
def test_fit_equals_the_reference_after_every_update(replicas, sub_batches, noise):
    points = replicas * sub_batches
    data = batches(6, ROWS * points)
    arguments = {**ARGUMENTS, "noise": noise}
    model = model_of(lambda: tf_lbopt.ExtrapSGD(sub_batches=sub_batches, **arguments), replicas)
    seen = Seen()
    history = fit(model, data, callbacks=[seen], validation_data=dataset(data)).history
    expected = reference(data, points, **arguments)
    for got, (x, _) in zip(seen.weights, expected, strict=True):
        assert_close(got, x)
    kernel, bias = expected[-1][0]
    loss = np.mean((data[0] @ kernel + bias - data[1]) ** 2)
    assert history["val_loss"][0] == pytest.approx(loss, rel=1e-4)
    assert model.evaluate(dataset(data), verbose=0) == pytest.approx(loss, rel=1e-4)
    assert_close([model.predict(data[0][0], verbose=0)], [data[0][0] @ kernel + bias], rtol=1e-4)


@pytest.mark.parametrize(
    "compile_arguments",
    [{"run_eagerly": True}, {"jit_compile": True}, {"jit_compile": False}],
    ids=str,
)
def test_ways_to_compile(compile_arguments):
    data = batches(4, ROWS)
    model = model_of(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), **compile_arguments)
    fit(model, data)
    assert_close(model.get_weights(), reference(data, 1, **ARGUMENTS)[-1][0])


def test_adam_in_fit():
    data = batches(6, 2 * ROWS)
    model = model_of(lambda: tf_lbopt.ExtrapAdam(0.05, beta_1=0.8, beta_2=0.95, epsilon=1e-5), 2)
    fit(model, data)
    adam = {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-5}
    expected = reference(data, 2, learning_rate=0.05, momentum=0.0, adam=adam)
    assert_close(model.get_weights(), expected[-1][0])


def test_steps_per_execution():
    """On one device: Keras's loop over steps fails under MirroredStrategy with any optimizer."""
    data = batches(4, ROWS)
    model = model_of(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), steps_per_execution=2)
    fit(model, data)
    assert_close(model.get_weights(), reference(data, 1, **ARGUMENTS)[-1][0])


def test_a_model_that_is_built_by_its_first_batch():
    class Linear(keras.Model):
        def __init__(self):
            super().__init__()
            self.linear = keras.layers.Dense(3)

        def call(self, x):
            return self.linear(x)

    data = batches(4, ROWS)
    results = []
    for built in (False, True):
        keras.utils.set_random_seed(0)
        model = Linear()
        if built:
            model.build((None, 5))
        model.compile(optimizer=tf_lbopt.ExtrapSGD(**ARGUMENTS), loss="mse")
        fit(model, data)
        results.append(model.get_weights())
    assert_close(*results, rtol=0, atol=0)


def test_train_on_batch():
    data = batches(4, ROWS)
    model = model_of(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS))
    for x, y in zip(*data, strict=True):
        model.train_on_batch(x, y)
    assert_close(model.get_weights(), reference(data, 1, **ARGUMENTS)[-1][0])


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(replicas=2)
def test_a_second_fit_goes_on(replicas):
    data = batches(6, ROWS * replicas)
    model = model_of(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), replicas)
    fit(model, [a[:3] for a in data])
    fit(model, [a[3:] for a in data])
    assert_close(model.get_weights(), reference(data, replicas, **ARGUMENTS)[-1][0])


def test_weights_set_between_steps_are_what_training_goes_on_from():
    data = batches(2, ROWS)
    model = model_of(lambda: tf_lbopt.ExtrapSGD(**{**ARGUMENTS, "momentum": 0.0}))
    start = [w + 1 for w in initial()]
    fit(model, [a[:1] for a in data])
    model.set_weights(start)
    fit(model, [a[1:] for a in data])
    moved = [a - b for a, b in zip(model.get_weights(), start, strict=True)]
    assert 1e-4 < max(np.abs(m).max() for m in moved) < 1


class Failing(keras.Model):
    """Fails in mid-step, after the weights were moved, from the third step on."""

    def train_step(self, data):
        self.calls.assign_add(1)
        with tf.control_dependencies([tf.debugging.assert_less(self.calls, 3, "third step")]):
            data = tf.nest.map_structure(tf.identity, data)
        return super().train_step(data)


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(replicas=2, run_eagerly=False)
@pytest.mark.quick(replicas=1, run_eagerly=True)
def test_an_error_in_mid_step_leaves_the_weights(replicas, run_eagerly):
    data = batches(4, ROWS * replicas)
    with strategy_of(replicas).scope():
        calls = tf.Variable(
            0,
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            synchronization=tf.VariableSynchronization.ON_READ,
        )
    Failing.calls = calls
    model = model_of(
        lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), replicas, Failing, run_eagerly=run_eagerly
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        fit(model, data)
    expected = reference(data, replicas, **ARGUMENTS)
    assert_close(model.get_weights(), expected[1][0])
    for variable in model.trainable_variables:
        copies = strategy_of(replicas).experimental_local_results(variable.value)
        for copy in copies:
            np.testing.assert_array_equal(copy.numpy(), copies[0].numpy())
    # The step was lost, nothing else.
    for local in strategy_of(replicas).experimental_local_results(calls):
        local.assign(-100)
    fit(model, [a[2:] for a in data])
    assert_close(model.get_weights(), expected[-1][0])


class Refusing(keras.Model):
    """Takes no numbers that are large."""

    def train_step(self, data):
        x, y = data
        largest = tf.reduce_max(tf.abs(x))
        with tf.control_dependencies([tf.debugging.assert_less(largest, 100.0, "too large")]):
            x = tf.identity(x)
        return super().train_step((x, y))


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("micro_steps", [None, 2])
@pytest.mark.quick(micro_steps=2)
def test_an_error_in_a_later_part_leaves_nothing_to_the_next_step(micro_steps, run_eagerly):
    """The first part is in the accumulators by then."""
    data = batches(6, 2 * ROWS)
    broken = [a.copy() for a in data]
    fails = 2 * (micro_steps or 1)
    broken[0][fails, ROWS:] = 1000.0  # in the second part
    arguments = {**ARGUMENTS, "gradient_accumulation_steps": micro_steps}
    model = model_of(
        lambda: tf_lbopt.ExtrapSGD(sub_batches=2, **arguments),
        model_class=Refusing,
        run_eagerly=run_eagerly,
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        fit(model, broken)
    fit(model, [a[fails:] for a in data])
    assert model.optimizer.iterations.numpy() == 6 // (micro_steps or 1)
    expected = reference(data, 2, micro_steps=micro_steps or 1, **ARGUMENTS)
    assert_close(model.get_weights(), expected[-1][0])


def test_an_interrupt_leaves_the_weights():
    data = batches(4, ROWS)

    class Interrupting(keras.Model):
        def train_step(self, data):
            if self.optimizer.iterations.numpy() == 2:
                raise KeyboardInterrupt
            return super().train_step(data)

    model = model_of(
        lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), model_class=Interrupting, run_eagerly=True
    )
    with pytest.raises(KeyboardInterrupt):
        fit(model, data)
    assert_close(model.get_weights(), reference(data, 1, **ARGUMENTS)[1][0])


def test_mixed_precision_and_a_loss_scale():
    data = batches(5, 2 * ROWS)
    model = model_of(
        lambda: tf_lbopt.LossScaleOptimizer(tf_lbopt.ExtrapSGD(**ARGUMENTS), initial_scale=256.0),
        2,
        dtype="mixed_float16",
    )
    fit(model, data)
    assert_close(model.get_weights(), reference(data, 2, **ARGUMENTS)[-1][0], rtol=3e-2, atol=1e-2)
    exact = model_of(
        lambda: tf_lbopt.LossScaleOptimizer(tf_lbopt.ExtrapSGD(**ARGUMENTS), initial_scale=256.0),
        2,
    )
    fit(exact, data)
    assert_close(exact.get_weights(), reference(data, 2, **ARGUMENTS)[-1][0])


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.quick(replicas=2)
def test_an_overflow_on_one_replica_changes_nothing(replicas):
    data = batches(5, ROWS * replicas)
    bad = [a.copy() for a in data]
    bad[1][2, -1, 0] = np.inf  # on the last replica
    loop = Loop(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), replicas).run(bad)
    without = [np.delete(a, 2, axis=0) for a in data]
    assert_close(loop.weights(), reference(without, replicas, **ARGUMENTS)[-1][0])
    assert int(loop.optimizer.skipped_updates.numpy()) == 1
    loop.assert_replicas_identical()


# -- saving and resuming ---------------------------------------------------------------------------


def _by_checkpoint(one, other, tmp_path):
    path = tf.train.Checkpoint(variables=one.variables, optimizer=one.optimizer).save(
        str(tmp_path / "checkpoint")
    )
    tf.train.Checkpoint(variables=other.variables, optimizer=other.optimizer).restore(path)


def _by_store(one, other, tmp_path):
    store = {}
    one.optimizer.save_own_variables(store)
    other.optimizer.load_own_variables(store)
    for a, b in zip(one.variables, other.variables, strict=True):
        b.assign(a.numpy())


@pytest.mark.parametrize("save", [_by_checkpoint, _by_store])
@pytest.mark.parametrize(("replicas", "sub_batches"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("stop", [3, 4], ids=["between updates", "mid-accumulation"])
@pytest.mark.quick(replicas=2, save="_by_checkpoint", stop=4)
@pytest.mark.quick(replicas=1, save="_by_store", stop=4)
def test_resumes_in_lockstep(save, replicas, sub_batches, stop, tmp_path):
    def make():
        return tf_lbopt.ExtrapSGD(
            sub_batches=sub_batches,
            gradient_accumulation_steps=3,
            noise="stochastic_noise",
            **ARGUMENTS,
        )

    data = batches(9, ROWS * replicas * sub_batches)
    one = Loop(make, replicas).run(data, 0, stop)
    other = Loop(make, replicas)
    save(one, other, tmp_path)
    for loop in (one, other):
        loop.run(data, stop)
    assert_close(one.weights(), other.weights(), rtol=0, atol=0)
    other.assert_replicas_identical()


@pytest.mark.parametrize("save", [_by_checkpoint, _by_store])
@pytest.mark.quick(save="_by_checkpoint")
def test_on_another_number_of_replicas_past_gradients_are_lost_with_a_warning(
    save, tmp_path, caplog
):
    data = batches(4, ROWS * 4)
    four = Loop(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), 4).run(data, 0, 3)
    two = Loop(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), 2)
    save(four, two, tmp_path)
    assert "past gradients of 4 replicas" in caplog.text
    two.run(data, 3)
    # The next update is Nesterov's: without past gradients, with the momentum.
    x, v = reference([a[:3] for a in data], 4, **ARGUMENTS)[-1]
    from test_extrapolation import gradient

    point = [w + 0.9 * u for w, u in zip(x, v, strict=True)]
    mean = gradient(point, data[0][3], data[1][3])
    expected = [w + 0.9 * u - 0.05 * g for w, u, g in zip(x, v, mean, strict=True)]
    assert_close(two.weights(), expected)


def test_model_file_has_the_weights_and_the_state(tmp_path):
    data = batches(6, ROWS)
    model = model_of(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS))
    fit(model, [a[:3] for a in data])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for m in (model, loaded):
        fit(m, [a[3:] for a in data])
    assert_close(model.get_weights(), loaded.get_weights(), rtol=0, atol=0)
    assert_close(model.get_weights(), reference(data, 1, **ARGUMENTS)[-1][0])


def test_a_checkpoint_has_no_copy_of_the_weights(tmp_path):
    loop = Loop(lambda: tf_lbopt.ExtrapSGD(noise="gaussian", learning_rate=0.1))
    loop.run(batches(1, ROWS))
    path = tf.train.Checkpoint(optimizer=loop.optimizer).save(str(tmp_path / "a"))
    shapes = [shape for _, shape in tf.train.list_variables(path)]
    # The velocity and, as with any Keras optimizer, the weights themselves.
    assert shapes.count([5, 3]) == 2


def test_model_checkpoint_in_mid_epoch(tmp_path):
    data = batches(4, ROWS * 2)
    model = model_of(lambda: tf_lbopt.ExtrapSGD(**ARGUMENTS), 2)
    path = str(tmp_path / "step_{batch}.weights.h5")
    callback = keras.callbacks.ModelCheckpoint(path, save_weights_only=True, save_freq=1)
    fit(model, data, callbacks=[callback])
    expected = reference(data, 2, **ARGUMENTS)
    files = sorted(tmp_path.glob("*.h5"))
    assert len(files) == 4
    for file, (x, _) in zip(files, expected, strict=True):
        model.load_weights(file)
        assert_close(model.get_weights(), x)


def test_configuration_round_trip():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    optimizer = tf_lbopt.ExtrapSGD(
        0.1,
        extrapolation_rate=schedule,
        noise="uniform",
        shared_noise=True,
        noise_seed=5,
        sub_batches=3,
        trust_coefficient=0.01,
        nesterov=False,
        exclude_from_weight_decay=["bias"],
    )
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is tf_lbopt.ExtrapSGD
    assert again.get_config() == optimizer.get_config()
    assert float(again.extrapolation_rate(10)) == pytest.approx(0.05)


# -- errors ----------------------------------------------------------------------------------------


def test_gradients_from_outside_are_refused():
    variable = keras.Variable(np.ones(2), dtype="float32")
    other = keras.Variable(np.ones(2), dtype="float32")
    optimizer = tf_lbopt.ExtrapSGD(0.1)
    optimizer.build([variable, other])
    gradients = [tf.ones(2), tf.ones(2)]
    with pytest.raises(ValueError, match=r"with optimizer\.extrapolated"):
        optimizer.apply(gradients, [variable, other])
    with (
        pytest.raises(ValueError, match="all variables that are trained"),
        optimizer.extrapolated([variable]),
    ):
        optimizer.apply(gradients, [variable, other])
    with optimizer.extrapolated():
        optimizer.apply(gradients, [variable, other])
        with pytest.raises(ValueError, match="once"):
            optimizer.apply(gradients, [variable, other])
    with (
        optimizer.extrapolated(),
        pytest.raises(ValueError, match="nested"),
        optimizer.extrapolated(),
    ):
        pass
    with pytest.raises(ValueError, match="sub_batch=1"), optimizer.extrapolated(sub_batch=1):
        pass
    foreign = keras.Variable(np.ones(2), dtype="float32")
    with pytest.raises(ValueError, match="Unknown variable"), optimizer.extrapolated([foreign]):
        pass
    with optimizer.extrapolated():
        pass  # nothing applied: the weights come back
    np.testing.assert_array_equal(other.numpy(), np.ones(2, "float32") - np.float32(0.1))


def test_blocks_belong_into_the_replica_function():
    strategy = strategy_of(2)
    with strategy.scope():
        variable = keras.Variable(np.ones(2), dtype="float32")
        optimizer = tf_lbopt.ExtrapSGD(0.1)
        optimizer.build([variable])
        with pytest.raises(ValueError, match=r"strategy\.run"), optimizer.extrapolated():
            pass


def test_a_batch_that_does_not_divide_is_refused():
    model = model_of(lambda: tf_lbopt.ExtrapSGD(0.1, sub_batches=3))
    with pytest.raises(ValueError, match=r"sub_batches=3(.|\n)*Received: 4"):
        fit(model, batches(2, 4))
    unknown = dataset([a[0] for a in batches(1, 4)]).batch(4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="sub_batches=3"):
        model_of(lambda: tf_lbopt.ExtrapSGD(0.1, sub_batches=3)).fit(unknown, verbose=0)
    # XLA makes no assertions: it must not be able to compile the step.
    compiled = model_of(lambda: tf_lbopt.ExtrapSGD(0.1, sub_batches=3), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="multiple_of_parts"):
        compiled.fit(unknown, verbose=0)
    assert_close(compiled.get_weights(), initial())


def test_a_layer_that_writes_its_weights_is_refused():
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(3))
    model = keras.Sequential([keras.Input([5]), layer])
    model.compile(optimizer=tf_lbopt.ExtrapSGD(0.1), loss="mse")
    with pytest.raises(ValueError, match=r"Received: a model with the layer 'spectral_norm"):
        fit(model, batches(1, 4))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"noise": "past"}, "`noise` must be one of 'past_gradient'"),
        ({"sub_batches": 0}, "`sub_batches` must be an integer >= 1"),
        ({"extrapolation_rate": -0.1}, "`extrapolation_rate` must be a real number >= 0"),
        ({"shared_noise": True}, "are for noise='gaussian'"),
        ({"noise_seed": 1}, "are for noise='gaussian'"),
        ({"noise": "uniform", "noise_seed": -1}, "`noise_seed` must be an integer >= 0"),
        ({"trust_coefficient": 0.0}, "`trust_coefficient` must be a real number > 0"),
    ],
)
def test_bad_arguments(arguments, expected):
    with pytest.raises(ValueError, match="Received") as caught:
        tf_lbopt.ExtrapSGD(0.1, **arguments)
    assert expected in str(caught.value)


def test_no_variance_reduction_around_it():
    with pytest.raises(ValueError, match="ExtrapSGD"):
        tf_lbopt.VarianceReduced(tf_lbopt.ExtrapSGD(0.1))


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_wrapper_that_keras_adds_is_refused(replicas):
    model = model_of(lambda: keras.optimizers.LossScaleOptimizer(tf_lbopt.ExtrapSGD(0.1)), replicas)
    with pytest.raises(ValueError, match=r"tf_lbopt\.LossScaleOptimizer\(ExtrapSGD"):
        fit(model, batches(1, ROWS * replicas))
    assert_close(model.get_weights(), initial())


def test_a_batch_in_parts_has_what_is_not_of_examples_in_each():
    data = {"x": tf.reshape(tf.range(8), [4, 2]), "scale": tf.constant(2.0), "none": None}
    first, second = split(data, 2, "sub_batches")
    np.testing.assert_array_equal(first["x"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(second["x"], [[4, 5], [6, 7]])
    assert first["scale"] is second["scale"] is data["scale"]
    assert first["none"] is second["none"] is None
