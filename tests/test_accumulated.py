"""`Accumulated` around what Keras ships and what this package has."""

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
from benchmarks.references import mean_gradients

# The first has sparse gradients.
SHAPES = [(40, 5), (6, 5), (5,)]


def gradients_with_a_table(updates, sub_batches):
    """``[update][sub-batch][layer]``, of the first layer as `tf.IndexedSlices` and as arrays."""
    rng = np.random.default_rng(3)
    sparse = sub_batch_gradients(updates, sub_batches, SHAPES)
    dense = [[list(layers) for layers in update] for update in sparse]
    for update, update_dense in zip(sparse, dense, strict=True):
        for layers, layers_dense in zip(update, update_dense, strict=True):
            indices = rng.integers(0, 40, size=6)
            indices[1] = indices[0]
            values = rng.normal(size=(6, 5)).astype("float32")
            table = np.zeros(SHAPES[0])
            np.add.at(table, indices, values)
            layers[0] = tf.IndexedSlices(
                tf.constant(values), tf.constant(indices), tf.constant(SHAPES[0])
            )
            layers_dense[0] = table
    return sparse, dense


def run_of(name, replicas, micro_steps, **arguments):
    return Run(
        lambda **k: tf_lbopt.Accumulated(stock(name), **k),
        replicas,
        micro_steps,
        weights=initial_weights(SHAPES),
        **arguments,
    )


def stock_run(name, means, **arguments):
    """The stock optimizer on one device, given these gradients."""
    single = [[[g.astype("float32") for g in layers]] for layers in means]
    weights = initial_weights(SHAPES)
    return Run(lambda: stock(name, **arguments), weights=weights).updates(single)


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 4), (2, 2), (2, 1), (1, 1)])
@pytest.mark.quick(name=("AdamW", "Muon", "Adafactor", "Lion"), replicas=2, micro_steps=2)
@pytest.mark.quick(name="Nadam", replicas=1, micro_steps=4)
def test_equals_one_stock_update_on_the_mean_gradient(name, replicas, micro_steps):
    """Dense gradients, and those of a table of which indices are repeated."""
    gradients, dense = gradients_with_a_table(3, replicas * micro_steps)
    run = run_of(name, replicas, micro_steps).updates(gradients)
    assert run.optimizer.iterations.numpy() == 3
    assert run.optimizer.inner_optimizer.iterations.numpy() == 3
    assert run.optimizer.skipped_updates.numpy() == 0
    assert_replicas_identical(run)
    plain = stock_run(name, mean_gradients(dense))
    assert_close(run.weights(), plain.weights())
    for got, start in zip(run.weights(), initial_weights(SHAPES), strict=True):
        assert np.abs(got - start).max() > 1e-6


@pytest.mark.parametrize("name", ["AdamW", "Lion", "SGD"])
@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", "clipvalue"])
@pytest.mark.quick(name="SGD", clip="global_clipnorm")
def test_clips_after_the_reduction(name, clip):
    """As the stock optimizer clips the mean gradient on one device; before, it is another one."""
    gradients = sub_batch_gradients(3, 4, SHAPES)
    run = run_of(name, 2, 2, **{clip: 0.3}).updates(gradients)
    plain = stock_run(name, mean_gradients(gradients), **{clip: 0.3})
    assert_close(run.weights(), plain.weights())
    without = stock_run(name, mean_gradients(gradients))
    assert np.abs(run.weights()[0] - without.weights()[0]).max() > 1e-3


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.quick(name=("AdamW", "Muon"))
def test_a_nan_on_one_replica_in_one_micro_step_discards_the_update(name):
    gradients, _ = gradients_with_a_table(3, 4)
    run = run_of(name, 2, 2).update(gradients[0])
    before = run.state()
    poisoned = [list(layers) for layers in gradients[1]]
    poisoned[1][1] = np.full_like(poisoned[1][1], np.nan)
    run.update(poisoned)
    assert_states_equal(before, run.state())
    assert run.optimizer.skipped_updates.numpy() == 1
    run.update(gradients[2])
    state = run.state()
    never = run.restart().updates([gradients[0], gradients[2]])
    assert_states_equal(never.state(), state)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.quick(name="AdamW")
def test_resumes_in_mid_accumulation(name, tmp_path):
    """Bit for bit, on two replicas, from a checkpoint."""
    gradients, _ = gradients_with_a_table(3, 4)

    def begun():
        run = run_of(name, 2, 2)
        return run, tf.train.Checkpoint(
            variables=[v.value for v in run.variables], optimizer=run.optimizer
        )

    original, saved = begun()
    original.update(gradients[0])
    original.micro_step(gradients[1][:2])
    path = saved.save(str(tmp_path / "checkpoint"))
    fresh, loaded = begun()
    fresh.update(gradients[2])
    loaded.restore(path).assert_consumed()
    for run in (original, fresh):
        run.micro_step(gradients[1][2:])
        run.update(gradients[2])
        assert run.optimizer.iterations.numpy() == 3
    assert_states_equal(original.state(), fresh.state())


@pytest.mark.parametrize("name", ["Adam", "Muon"])
@pytest.mark.quick(name="Muon" if "Muon" in STOCK else "Adam")
def test_keras_file_in_mid_accumulation(name, tmp_path):
    """Through `fit` under MirroredStrategy, where a stock optimizer can not accumulate at all."""
    if name not in STOCK:
        pytest.skip(f"Keras {keras.__version__} has no optimizer {name}")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, size=(56, 3)), rng.normal(size=(56, 1))
    schedule = keras.optimizers.schedules.PolynomialDecay(0.05, 4, 0.01)
    with strategy_of(2).scope():
        model = keras.Sequential(
            [
                keras.Input([3]),
                keras.layers.Embedding(20, 4),
                keras.layers.Flatten(),
                keras.layers.Dense(1, use_bias=False),
            ]
        )
        inner = stock(name, learning_rate=schedule)
        model.compile(optimizer=tf_lbopt.Accumulated(inner, 2, clipnorm=1.0), loss="mse")
    arguments = {"batch_size": 8, "verbose": 0, "shuffle": False}
    first = model.evaluate(x, y, batch_size=8, verbose=0)
    model.fit(x, y, **arguments)  # seven micro-steps
    assert model.optimizer.iterations.numpy() == inner.iterations.numpy() == 3
    np.testing.assert_allclose(inner.learning_rate.numpy(), 0.02, rtol=1e-6)
    model.save(tmp_path / "model.keras")
    with strategy_of(2).scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        one.fit(x, y, **arguments)
        assert one.optimizer.iterations.numpy() == 7
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.evaluate(x, y, batch_size=8, verbose=0) < first


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.quick(name="Muon" if "Muon" in STOCK else "Adam")
def test_compiled_by_xla(name):
    """Each replica's update as one program, and the step of one replica as a whole."""
    gradients = sub_batch_gradients(3, 4, SHAPES)
    plain = stock_run(name, mean_gradients([gradients[0], gradients[2]]))
    gradients[1][3][-1][:] = np.inf
    compiled = run_of(name, 2, 2, jit_compile=True).updates(gradients)
    whole = run_of(name, 1, 4, function=lambda f: tf.function(f, jit_compile=True))
    for run in (compiled, whole.updates(gradients)):
        assert run.optimizer.skipped_updates.numpy() == 1
        assert run.optimizer.iterations.numpy() == 2
        assert_close(run.weights(), plain.weights())


def test_around_an_optimizer_of_this_package():
    def lamb(**kwargs):
        return tf_lbopt.LAMB(0.05, weight_decay=0.01, **kwargs)

    gradients = sub_batch_gradients(3, sub_batches=2)
    own = Run(lamb, 1, 2).updates(gradients)
    around = Run(lambda **k: tf_lbopt.Accumulated(lamb(), **k), 1, 2).updates(gradients)
    for one, other in zip(around.weights(), own.weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("inner", [keras.optimizers.SGD, tf_lbopt.SGD], ids=["stock", "own"])
@pytest.mark.parametrize("wrap", [tf_lbopt.Accumulated, tf_lbopt.VarianceReduced])
@pytest.mark.filterwarnings("ignore:.*sub-batches")
def test_iterations_that_are_set_move_the_schedule(wrap, inner):
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 10, 0.0)
    optimizer = wrap(inner(schedule), gradient_accumulation_steps=2)
    variable = keras.Variable([0.0])
    optimizer.build([variable])
    optimizer.iterations.assign(5)
    for _ in range(2):
        optimizer.apply([tf.ones([1])], [variable])
    assert variable.numpy() == pytest.approx([-0.5])
    assert optimizer.iterations.numpy() == optimizer.inner_optimizer.iterations.numpy() == 6


def test_loss_scaling_around_it():
    """An overflow in one micro-step halves the scale once, and the update is discarded."""
    gradients = sub_batch_gradients(2, sub_batches=2)
    run = Run(
        lambda **k: tf_lbopt.Accumulated(stock("AdamW"), **k),
        1,
        2,
        wrap=lambda inner: tf_lbopt.LossScaleOptimizer(inner, initial_scale=8.0),
    )
    scaled = [[[8.0 * g for g in layers] for layers in update] for update in gradients]
    run.update(scaled[0])
    before = run.state()
    bad = [scaled[1][0], [np.full_like(g, np.inf) for g in scaled[1][1]]]
    run.update(bad)
    assert run.optimizer.dynamic_scale.numpy() == 4.0
    assert_states_equal(before, run.state())
    plain = Run(lambda **k: tf_lbopt.Accumulated(stock("AdamW"), **k), 1, 2).update(gradients[0])
    assert_close(run.weights(), plain.weights())


def test_configuration():
    optimizer = tf_lbopt.Accumulated(stock("Lion"), 3, global_clipnorm=2.0, name="mine")
    text = json.dumps(keras.saving.serialize_keras_object(optimizer))
    restored = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(restored) is tf_lbopt.Accumulated
    assert type(restored.inner_optimizer) is keras.optimizers.Lion
    assert restored.get_config() == json.loads(text)["config"] == optimizer.get_config()
    assert restored.gradient_accumulation_steps == 3
    with pytest.raises(AttributeError, match=r"constructor.*Received: Accumulated\."):
        restored.gradient_accumulation_steps = 4


@pytest.mark.parametrize(
    ("inner", "arguments", "message"),
    [
        (lambda: tf_lbopt.LossScaleOptimizer(stock("SGD")), {}, "LossScaleOptimizer around Accumu"),
        (lambda: keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(stock("SGD"))), {},
         "several"),
        (lambda: tf_lbopt.CLARS(0.1), {}, "sub-batches"),
        (lambda: tf_lbopt.VarianceReduced(stock("SGD")), {}, "sub-batches"),
        (lambda: tf_lbopt.PostLocalSGD(stock("SGD"), 1, 1), {}, "sub-batches"),
        (lambda: tf_lbopt.Accumulated(stock("SGD")), {}, "around another.*Accumulated around SGD"),
        (lambda: stock("SGD", gradient_accumulation_steps=2), {}, "`gradient_accumulation_steps`"),
        (lambda: stock("AdamW", clipnorm=1.0), {}, "`clipnorm` must be given to Accumulated"),
        (lambda: stock("Lion", use_ema=True), {}, "`use_ema`"),
        (lambda: stock("Lion", loss_scale_factor=2.0), {}, "`loss_scale_factor`"),
        (lambda: stock("SGD"), {"weight_decay": 0.1}, "`weight_decay`.*on the `inner_optimizer`"),
        (lambda: stock("SGD"), {"learning_rate": 0.1}, "`learning_rate`.*on the `inner_opti"),
        (lambda: stock("SGD"), {"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps`"),
    ],
)  # fmt: skip
def test_refusals(inner, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        tf_lbopt.Accumulated(inner(), **arguments)
    assert "Received" in str(error.value)


def test_variance_reduced_is_not_around_it():
    """Its update counts would not reach the innermost optimizer."""
    with pytest.raises(ValueError, match=r"around another.*Accumulated around Adam"):
        tf_lbopt.VarianceReduced(tf_lbopt.Accumulated(stock("Adam")))


@pytest.mark.parametrize(
    ("inner", "arguments", "message"),
    [
        (lambda: "adamw", {}, "`inner_optimizer` must be .*Received: inner_optimizer='adamw'"),
        (lambda: stock("SGD"), {"gradient_accumulation_steps": 2.5}, "`gradient_accumulation_st"),
        (lambda: stock("SGD"), {"steps": 2}, "no argument `steps`"),
    ],
)
def test_wrong_types(inner, arguments, message):
    with pytest.raises(TypeError, match=message):
        tf_lbopt.Accumulated(inner(), **arguments)


def test_two_strategies_are_noticed():
    outside = stock("SGD")
    with strategy_of(2).scope(), pytest.raises(ValueError, match=r"same strategy.*a SGD"):
        tf_lbopt.Accumulated(outside, 2)
