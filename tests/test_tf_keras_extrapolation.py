"""ExtrapSGD for tf_keras against the Keras 3 class, its definition, and in `fit`."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from conftest import strategy_of
from harness_tf_keras import dynamic, fixed
from test_extrapolation import (
    ARGUMENTS,
    ROWS,
    Loop,
    assert_close,
    batches,
    gradient,
    initial,
    reference,
)

import tf_lbopt
from tf_lbopt.tf_keras import ExtrapSGD

WRAPPERS = {"plain": lambda o: o, "dynamic": dynamic, "fixed": fixed}


@pytest.fixture(autouse=True)
def _fresh_keras_state():
    yield
    tf_keras.mixed_precision.set_global_policy("float32")


def test_a_layer_that_writes_its_weights_is_refused():
    class Normalized(tf_keras.layers.SpectralNormalization):
        """Without its own code, which works with TF_USE_LEGACY_KERAS=1 only."""

        def build(self, input_shape):
            self.layer.build(input_shape)

        def call(self, inputs, training=None):
            return self.layer(inputs)

    layer = Normalized(tf_keras.layers.Dense(3), name="spectral")
    model = tf_keras.Sequential([tf_keras.Input([5]), layer])
    model.compile(optimizer=ExtrapSGD(0.1), loss="mse")
    with pytest.raises(ValueError, match=r"Received: a model with the layer 'spectral'"):
        model.fit(tf.zeros([4, 5]), tf.zeros([4, 3]), verbose=0)


class TfKerasLoop(Loop):
    """The same loop with tf_keras's variables and loss scaling."""

    def __init__(self, optimizer, replicas=1, wrap=lambda o: o, run_eagerly=False, build=True):
        self.replicas, self.strategy = replicas, strategy_of(replicas)
        with self.strategy.scope():
            self.variables = [
                tf.Variable(w, dtype=tf.float32, name=name)
                for w, name in zip(initial(), ("kernel", "bias"), strict=True)
            ]
            self.optimizer = optimizer()
            self.outer = wrap(self.optimizer)
            if build:
                self.outer.build(self.variables)
        self.step = self._step if run_eagerly else tf.function(self._step)

    def _step(self, x, y):
        parts = self.optimizer.sub_batches

        def replica_step(x, y):
            for part, (own_x, own_y) in enumerate(
                zip(tf.split(x, parts), tf.split(y, parts), strict=True)
            ):
                with self.optimizer.extrapolated(self.variables, part):
                    with tf.GradientTape() as tape:
                        kernel, bias = self.variables
                        loss = tf.reduce_mean((own_x @ kernel + bias - own_y) ** 2)
                        loss /= self.replicas
                        if self.outer is not self.optimizer:
                            loss = self.outer.get_scaled_loss(loss)
                    gradients = tape.gradient(loss, self.variables)
                    if self.outer is not self.optimizer:
                        gradients = self.outer.get_unscaled_gradients(gradients)
                    self.outer.apply_gradients(zip(gradients, self.variables, strict=True))

        self.strategy.run(replica_step, args=(x, y))

    def assert_replicas_identical(self):
        for variable in [*self.variables, *self.outer.variables]:
            copies = self.strategy.experimental_local_results(variable)
            for copy in copies[1:]:
                np.testing.assert_array_equal(copies[0].numpy(), copy.numpy())


# -- one algorithm, two frameworks -----------------------------------------------------------------

VARIANTS = {
    "defaults": {"extrapolation_rate": None},
    "lars": {"trust_coefficient": 0.02, "learning_rate": 1.0, "weight_decay": 0.1},
    "stochastic noise": {"noise": "stochastic_noise"},
    "gaussian": {"noise": "gaussian", "noise_seed": 3},
    "shared uniform": {"noise": "uniform", "noise_seed": 3, "shared_noise": True},
}


@pytest.mark.parametrize(
    ("variant", "replicas", "sub_batches"),
    [
        *(("defaults", replicas, 1) for replicas in (1, 2, 4)),
        ("defaults", 2, 2),
        *((variant, 2, 1) for variant in VARIANTS if variant != "defaults"),
    ],
)
@pytest.mark.quick(sub_batches=2)
@pytest.mark.quick(variant=("stochastic noise", "gaussian"))
def test_equals_the_keras_3_class_on_least_squares(variant, replicas, sub_batches):
    """Every replica has other examples, and so another point after the first update."""
    arguments = {**ARGUMENTS, **VARIANTS[variant], "sub_batches": sub_batches}
    data = batches(6, ROWS * replicas * sub_batches)
    ours = TfKerasLoop(lambda: ExtrapSGD(**arguments), replicas).run(data)
    theirs = Loop(lambda: tf_lbopt.ExtrapSGD(**arguments), replicas).run(data)
    assert_close(ours.weights(), theirs.weights(), rtol=0, atol=0)
    ours.assert_replicas_identical()
    without = TfKerasLoop(lambda: ExtrapSGD(**{**arguments, "extrapolation_rate": 0.0}), replicas)
    assert np.abs(without.run(data).weights()[0] - ours.weights()[0]).max() > 1e-4


@pytest.mark.parametrize(("wrapper", "replicas"), [*((w, 2) for w in WRAPPERS), ("dynamic", 1)])
@pytest.mark.quick(wrapper="dynamic")
def test_equals_the_reference(wrapper, replicas):
    data = batches(6, ROWS * replicas)
    loop = TfKerasLoop(lambda: ExtrapSGD(**ARGUMENTS), replicas, WRAPPERS[wrapper], build=False)
    loop.run(data)
    assert_close(loop.weights(), reference(data, replicas, **ARGUMENTS)[-1][0])
    assert loop.optimizer.iterations.numpy() == 6


@pytest.mark.parametrize("framework", ["tf_keras", "keras", "callable"])
def test_schedules_of_the_extrapolation_rate(framework):
    schedule = {
        "tf_keras": tf_keras.optimizers.schedules.PolynomialDecay(0.3, 5, 0.1),
        "keras": keras.optimizers.schedules.PolynomialDecay(0.3, 5, 0.1),
        "callable": lambda: 0.2,
    }[framework]
    data = batches(6, ROWS)
    loop = TfKerasLoop(lambda: ExtrapSGD(0.05, extrapolation_rate=schedule)).run(data)
    rate = (lambda t: 0.2) if framework == "callable" else (lambda t: 0.3 - 0.2 * min(t, 5) / 5)
    expected = reference(data, 1, learning_rate=0.05, extrapolation_rate=rate)
    assert_close(loop.weights(), expected[-1][0])


# -- overflow --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["plain", "dynamic"])
@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.quick(replicas=1, run_eagerly=True)
@pytest.mark.quick(wrapper="dynamic", replicas=4)
def test_an_overflow_on_one_replica_changes_nothing(wrapper, replicas, run_eagerly):
    if run_eagerly and replicas == 1:
        pytest.skip("the harder one of both is tested")
    data = batches(4, ROWS * replicas)
    bad = [a.copy() for a in data]
    bad[1][2, -1, 0] = np.inf  # on the last replica
    loop = TfKerasLoop(lambda: ExtrapSGD(**ARGUMENTS), replicas, WRAPPERS[wrapper], run_eagerly)
    loop.run(bad)
    without = [np.delete(a, 2, axis=0) for a in data]
    assert_close(loop.weights(), reference(without, replicas, **ARGUMENTS)[-1][0])
    assert loop.optimizer.skipped_updates.numpy() == 1
    assert loop.optimizer.iterations.numpy() == 3
    if wrapper == "dynamic":
        assert loop.outer.loss_scale.numpy() == 32.0
    loop.assert_replicas_identical()


# -- configuration and state -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        tf_keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5),
        keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5),
        0.1,
        None,
    ],
    ids=["tf_keras", "keras", "number", "none"],
)
def test_configuration_round_trip(schedule):
    optimizer = ExtrapSGD(
        0.1,
        extrapolation_rate=schedule,
        noise="uniform",
        shared_noise=True,
        noise_seed=5,
        sub_batches=3,
        trust_coefficient=0.01,
        nesterov=False,
    )
    for wrap in WRAPPERS.values():
        outer = wrap(ExtrapSGD.from_config(optimizer.get_config()))
        serialized = tf_keras.optimizers.serialize(outer)
        again = tf_keras.optimizers.deserialize(json.loads(json.dumps(serialized)))
        assert type(again) is type(outer)
        assert again.get_config() == outer.get_config()
        inner = getattr(again, "inner_optimizer", again)
        assert inner.sub_batches == 3
        if callable(inner.extrapolation_rate):
            assert float(inner.extrapolation_rate(10)) == pytest.approx(0.05)


@pytest.mark.parametrize("wrapper", ["plain", "dynamic"])
@pytest.mark.parametrize(("replicas", "sub_batches"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("build", [False, True], ids=["restored before build", "after it"])
@pytest.mark.quick(wrapper="dynamic", replicas=2, build=False)
@pytest.mark.quick(wrapper="plain", replicas=1, build=True)
def test_a_checkpoint_has_every_replicas_past_gradients(
    wrapper, replicas, sub_batches, build, tmp_path
):
    def make():
        return ExtrapSGD(sub_batches=sub_batches, noise="stochastic_noise", **ARGUMENTS)

    if (replicas, sub_batches) != (2, 2) and (wrapper != "plain" or not build):
        pytest.skip("the hardest of the three is tested in all ways")
    data = batches(6, ROWS * replicas * sub_batches)
    one = TfKerasLoop(make, replicas, WRAPPERS[wrapper]).run(data, 0, 3)
    path = tf.train.Checkpoint(variables=one.variables, optimizer=one.outer).save(
        str(tmp_path / "checkpoint")
    )
    other = TfKerasLoop(make, replicas, WRAPPERS[wrapper], build=build)
    tf.train.Checkpoint(variables=other.variables, optimizer=other.outer).restore(path)
    forgetful = TfKerasLoop(make, replicas, WRAPPERS[wrapper])
    for variable, value in zip(forgetful.variables, one.variables, strict=True):
        variable.assign(value)
    for loop in (one, other, forgetful):
        loop.run(data, 3)
    assert_close(one.weights(), other.weights(), rtol=0, atol=0)
    assert np.abs(one.weights()[0] - forgetful.weights()[0]).max() > 1e-3
    shapes = [shape for _, shape in tf.train.list_variables(path)]
    assert shapes.count([5, 3]) == 2  # the weights and the velocity


def test_on_another_number_of_replicas_past_gradients_are_lost_with_a_warning(tmp_path, caplog):
    data = batches(4, ROWS * 4)
    four = TfKerasLoop(lambda: ExtrapSGD(**ARGUMENTS), 4).run(data, 0, 3)
    two = TfKerasLoop(lambda: ExtrapSGD(**ARGUMENTS), 2)
    path = tf.train.Checkpoint(variables=four.variables, optimizer=four.optimizer).save(
        str(tmp_path / "checkpoint")
    )
    tf.train.Checkpoint(variables=two.variables, optimizer=two.optimizer).restore(path)
    assert "past gradients of 4 replicas" in caplog.text
    two.run(data, 3)
    x, v = reference([a[:3] for a in data], 4, **ARGUMENTS)[-1]
    point = [w + 0.9 * u for w, u in zip(x, v, strict=True)]
    mean = gradient(point, data[0][3], data[1][3])
    expected = [w + 0.9 * u - 0.05 * g for w, u, g in zip(x, v, mean, strict=True)]
    assert_close(two.weights(), expected)


# -- compile and fit -------------------------------------------------------------------------------


def model_of(optimizer, replicas=1, model_class=tf_keras.Model, **compile_arguments):
    with strategy_of(replicas).scope():
        inputs = tf_keras.Input([5])
        # float32 whatever the policy, as losses want it
        outputs = tf_keras.layers.Dense(3, name="linear")(inputs)
        model = model_class(inputs, outputs)
        model.set_weights(initial())
        model.compile(optimizer=optimizer(), loss="mse", **compile_arguments)
    return model


def fit(model, data, **kwargs):
    dataset = tf.data.Dataset.from_tensor_slices(tuple(data))
    return model.fit(dataset, verbose=0, shuffle=False, **kwargs)


@pytest.mark.parametrize(("replicas", "sub_batches"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.quick(replicas=2)
def test_fit_equals_the_reference_after_every_update(replicas, sub_batches):
    points = replicas * sub_batches
    data = batches(5, ROWS * points)
    model = model_of(lambda: ExtrapSGD(sub_batches=sub_batches, **ARGUMENTS), replicas)
    seen = []
    note = tf_keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(model.get_weights())
    )
    held_out = tf.data.Dataset.from_tensor_slices(data)
    history = fit(model, data, callbacks=[note], validation_data=held_out).history
    expected = reference(data, points, **ARGUMENTS)
    assert len(seen) == 5
    for got, (x, _) in zip(seen, expected, strict=True):
        assert_close(got, x)
    kernel, bias = expected[-1][0]
    loss = np.mean((data[0] @ kernel + bias - data[1]) ** 2)
    assert history["val_loss"][0] == pytest.approx(loss, rel=1e-4)
    assert_close([model.predict(data[0][0], verbose=0)], [data[0][0] @ kernel + bias], rtol=1e-4)


@pytest.mark.parametrize(
    ("replicas", "compile_arguments"),
    [
        (1, {"run_eagerly": True}),
        (2, {"run_eagerly": True}),
        (1, {"jit_compile": True}),
        (2, {"steps_per_execution": 2}),
    ],
    ids=str,
)
def test_ways_to_compile(replicas, compile_arguments):
    data = batches(4, ROWS * replicas)
    model = model_of(lambda: ExtrapSGD(**ARGUMENTS), replicas, **compile_arguments)
    fit(model, data)
    assert_close(model.get_weights(), reference(data, replicas, **ARGUMENTS)[-1][0])


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(replicas=2)
def test_a_model_that_is_built_by_its_first_batch(replicas):
    class Linear(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.linear = tf_keras.layers.Dense(3)

        def call(self, x):
            return self.linear(x)

    data = batches(4, ROWS * replicas)
    results = []
    for built in (False, True):
        tf_keras.utils.set_random_seed(0)
        with strategy_of(replicas).scope():
            model = Linear()
            if built:
                model.build((None, 5))
            model.compile(optimizer=ExtrapSGD(**ARGUMENTS), loss="mse")
        fit(model, data)
        results.append(model.get_weights())
    assert_close(*results, rtol=0, atol=0)


def test_train_on_batch_and_a_second_compile():
    data = batches(4, ROWS)
    model = model_of(lambda: ExtrapSGD(**ARGUMENTS))
    for x, y in zip(*data, strict=True):
        model.train_on_batch(x, y)
    expected = reference(data, 1, **ARGUMENTS)[-1][0]
    assert_close(model.get_weights(), expected)
    # Another optimizer finds nothing of it in the model.
    model.compile(tf_keras.optimizers.SGD(0.05), loss="mse")
    x, y = (a[0] for a in data)
    model.train_on_batch(x, y)
    steps = [0.05 * g for g in gradient(expected, x, y)]
    assert_close(model.get_weights(), [w - s for w, s in zip(expected, steps, strict=True)])


class Failing(tf_keras.Model):
    """Fails in mid-step, after the weights were moved, from the third step on."""

    def train_step(self, data):
        self.calls.assign_add(1)
        with tf.control_dependencies([tf.debugging.assert_less(self.calls, 3, "third step")]):
            data = tf.nest.map_structure(tf.identity, data)
        return super().train_step(data)


@pytest.mark.parametrize(("replicas", "run_eagerly"), [(1, False), (2, False), (2, True)])
@pytest.mark.quick(run_eagerly=False)
def test_an_error_in_mid_step_leaves_the_weights(replicas, run_eagerly):
    data = batches(4, ROWS * replicas)
    strategy = strategy_of(replicas)
    with strategy.scope():
        Failing.calls = tf.Variable(
            0,
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            synchronization=tf.VariableSynchronization.ON_READ,
        )
    model = model_of(lambda: ExtrapSGD(**ARGUMENTS), replicas, Failing, run_eagerly=run_eagerly)
    with pytest.raises(tf.errors.InvalidArgumentError):
        fit(model, data)
    expected = reference(data, replicas, **ARGUMENTS)
    assert_close(model.get_weights(), expected[1][0])
    for variable in model.trainable_variables:
        copies = strategy.experimental_local_results(variable)
        for copy in copies:
            np.testing.assert_array_equal(copy.numpy(), copies[0].numpy())
    for local in strategy.experimental_local_results(Failing.calls):
        local.assign(-100)
    fit(model, [a[2:] for a in data])
    assert_close(model.get_weights(), expected[-1][0])


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(replicas=2)
def test_mixed_precision(replicas):
    """`compile` adds the wrapper; an overflow on the last replica alone halves its scale."""
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    data = batches(5, ROWS * replicas)
    exact = reference([np.delete(a, 2, axis=0) for a in data], replicas, **ARGUMENTS)[-1][0]
    data[1][2, -ROWS:] = 6e4
    model = model_of(lambda: dynamic(ExtrapSGD(**ARGUMENTS), 256.0), replicas)
    fit(model, data)
    assert_close(model.get_weights(), exact, rtol=3e-2, atol=1e-2)
    assert model.optimizer.inner_optimizer.skipped_updates.numpy() == 1
    assert model.optimizer.iterations.numpy() == 4
    assert model.optimizer.loss_scale.numpy() == 128.0


def test_fit_knows_the_filters_by_their_layers():
    seen = []

    class Model(tf_keras.Sequential):
        def train_step(self, data):
            seen.append([w.numpy() for w in self.trainable_variables])
            return super().train_step(data)

    model = Model(
        [
            tf_keras.layers.Embedding(7, 4, input_length=9, name="table"),
            tf_keras.layers.Reshape((6, 6, 1)),
            tf_keras.layers.DepthwiseConv2D(3, use_bias=False, depth_multiplier=2, name="spatial"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(2, use_bias=False),
        ]
    )
    start = model.get_weights()
    optimizer = ExtrapSGD(0.0, extrapolation_rate=1.0, noise="gaussian")
    model.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
    model.fit(np.ones((4, 9), "int32"), np.ones((4, 2)), batch_size=4, verbose=0)
    for before, moved, axes in zip(start, seen[0], [(1,), (0, 1), (0,)], strict=True):
        np.testing.assert_allclose(
            np.linalg.norm(moved - before, axis=axes),
            np.linalg.norm(before, axis=axes),
            rtol=1e-4,
        )
    for before, after in zip(start, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


# -- errors ----------------------------------------------------------------------------------------


def test_gradients_from_outside_are_refused():
    variable = tf.Variable(np.ones(2, "float32"))
    optimizer = ExtrapSGD(0.1)
    with pytest.raises(ValueError, match=r"with optimizer\.extrapolated"):
        optimizer.apply_gradients([(tf.ones(2), variable)])
    with pytest.raises(ValueError, match=r"with optimizer\.extrapolated"):
        optimizer.minimize(lambda: tf.reduce_sum(variable**2), [variable])
    with optimizer.extrapolated([variable]):
        optimizer.minimize(lambda: tf.reduce_sum(variable**2), [variable])
    np.testing.assert_allclose(variable.numpy(), [0.8, 0.8])
    model = model_of(lambda: ExtrapSGD(0.1), model_class=Unhooked)
    with pytest.raises(ValueError, match=r"with optimizer\.extrapolated"):
        fit(model, batches(1, ROWS))


class Unhooked(tf_keras.Model):
    """Makes its training function all by itself, so that no step is extrapolated."""

    def make_train_function(self, force=False):
        self.train_function = lambda iterator: self.train_step(next(iterator))
        return self.train_function


@pytest.mark.parametrize("make", [ExtrapSGD, tf_lbopt.ExtrapSGD], ids=["tf_keras", "keras"])
def test_an_update_that_may_not_be_made_is_refused(make):
    """Else the weights would stay away, or the second call of the function would undo itself."""
    module = tf if make is ExtrapSGD else keras
    variable = module.Variable(np.ones(2, "float32"))
    optimizer = make(0.1)
    optimizer.build([variable])

    @tf.function
    def inner():
        optimizer.apply_gradients([(tf.ones(2), variable)])

    @tf.function
    def conditional(flag):
        with optimizer.extrapolated([variable]):
            if flag:
                optimizer.apply_gradients([(tf.ones(2), variable)])

    with pytest.raises(ValueError, match="block itself"), optimizer.extrapolated([variable]):
        inner()
    with pytest.raises(ValueError, match="block itself"):
        conditional(tf.constant(False))
    np.testing.assert_array_equal(variable.numpy(), [1.0, 1.0])


def test_a_batch_that_does_not_divide_is_refused():
    model = model_of(lambda: ExtrapSGD(0.1, sub_batches=3))
    with pytest.raises(ValueError, match=r"sub_batches=3(.|\n)*Received: 4"):
        fit(model, batches(2, 4))
