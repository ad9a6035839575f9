"""A non-finite value anywhere discards the whole update everywhere, and nothing else changes."""

import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from harness import (
    CASES,
    KINDS,
    Run,
    assert_replicas_identical,
    assert_states_equal,
    graph_nodes,
    sub_batch_gradients,
    taking_gradients,
)

import tf_lbopt
from tf_lbopt.rules.writer import Writer

pytestmark = pytest.mark.usefixtures("graph_optimizer")


def poisoned(sub_batches, index, value, layer=1):
    copies = [[g.copy() for g in layers] for layers in sub_batches]
    copies[index][layer].flat[1] = value
    return copies


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(
    ("replicas", "micro_steps", "where", "value"),
    [
        (1, 1, 0, np.nan),
        (1, 4, 0, np.inf),
        (1, 4, 3, np.nan),
        (4, 1, 0, np.inf),
        (4, 1, 3, np.nan),
        (2, 2, 1, -np.inf),  # replica 1, micro-step 0
        (2, 2, 2, np.nan),  # replica 0, micro-step 1
    ],
)
@pytest.mark.quick(case=KINDS, replicas=2, where=2)
@pytest.mark.quick(case="lamb", replicas=1, where=0)
@pytest.mark.quick(case="lamb", replicas=4, where=3)
def test_skips_the_whole_update(case, replicas, micro_steps, where, value):
    good = sub_batch_gradients(3, sub_batches=replicas * micro_steps)
    run = Run(case, replicas, micro_steps, use_ema=True).update(good[0])
    before = run.state()
    run.update(poisoned(good[1], where, value))
    assert_states_equal(before, run.state())
    assert run.optimizer.skipped_updates.numpy() == 1
    assert run.optimizer.iterations.numpy() == 1
    assert_replicas_identical(run)

    run.update(good[2])
    state = run.state()
    never_poisoned = run.restart().updates([good[0], good[2]])
    assert_states_equal(never_poisoned.state(), state)


def compiled(step):
    return tf.function(step, jit_compile=True)


def around_adam(learning_rate=0.01, **kwargs):
    return tf_lbopt.VarianceReduced(keras.optimizers.Adam(learning_rate), **kwargs)


@pytest.mark.parametrize("make", [*CASES, around_adam], ids=lambda make: getattr(make, "name", ""))
@pytest.mark.quick(make=("vr_lamb", "extrap_sgd", around_adam))
def test_compiled_by_xla_nothing_of_a_bad_update_is_written(make):
    """There the guard is no condition: all is written, as it was where the update is bad."""
    good = sub_batch_gradients(3, sub_batches=2)
    run = Run(make, 1, 2, function=compiled, use_ema=True, ema_overwrite_frequency=2)
    run.variables[0].constraint = keras.constraints.MaxNorm(0.5)
    run.update(good[0])
    before = run.state()
    assert np.linalg.norm(run.weights()[0], axis=0).max() < 0.501
    run.update(poisoned(good[1], 1, np.nan))
    assert_states_equal(before, run.state())
    assert run.optimizer.skipped_updates.numpy() == 1
    run.update(good[2])
    assert run.optimizer.iterations.numpy() == 2
    state = run.state()
    never_poisoned = run.restart().updates([good[0], good[2]])
    assert_states_equal(never_poisoned.state(), state)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: tf_lbopt.SGD(0.1, momentum=0.9, weight_decay=0.1),
        lambda: tf_lbopt.SNGM(0.1, weight_decay=0.1),
        lambda: tf_lbopt.LARS(0.1, weight_decay=0.1, trust_ratio_denominator="sum_of_norms"),
        lambda: tf_lbopt.CLARS(0.1, weight_decay=0.1, max_trust_ratio=1.0),
        lambda: tf_lbopt.AdamW(0.1, global_clipnorm=1.0),
        lambda: tf_lbopt.LAMB(0.1, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=3),
        lambda: tf_lbopt.LANS(0.1, weight_decay=0.1),
    ],
    ids=["sgd", "sngm", "lars", "clars", "adamw", "lamb", "lans"],
)
def test_a_compiled_update_has_no_conditions(optimizer):
    variables = [keras.Variable(np.ones(shape, "float32")) for shape in ([300, 300], [5], [])]
    gradients = [tf.ones(v.shape) for v in variables]
    optimizer = optimizer()
    optimizer.build(variables)
    conditions = []
    for jit_compile in (False, True):
        step = tf.function(
            lambda: optimizer.apply(gradients, variables), jit_compile=jit_compile, autograph=False
        )
        nodes = graph_nodes(step.get_concrete_function())
        conditions.append(sum(node.op in ("If", "StatelessIf", "Case", "While") for node in nodes))
    assert conditions[0] > 0
    assert conditions[1] == 0


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(
    ("replicas", "micro_steps", "where"), [(1, 1, 0), (1, 2, 0), (4, 1, 3), (2, 2, 1), (2, 2, 2)]
)
@pytest.mark.quick(case="vr_lamb", replicas=2, where=1)
@pytest.mark.quick(case="lamb", micro_steps=2, replicas=1)
def test_loss_scale_halves_wherever_it_overflows(case, replicas, micro_steps, where):
    def wrap(optimizer):
        return tf_lbopt.LossScaleOptimizer(optimizer, initial_scale=64.0, dynamic_growth_steps=2)

    good = sub_batch_gradients(4, sub_batches=replicas * micro_steps)

    def scaled(update, scale):
        return [[g * np.float32(scale) for g in layers] for layers in update]

    run = Run(case, replicas, micro_steps, wrap=wrap)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*fewer than 8")
        run.update(scaled(good[0], 64))
    before = run.state()
    run.update(scaled(poisoned(good[1], where, np.inf), 64))
    assert_states_equal(before, run.state())
    assert run.optimizer.dynamic_scale.numpy() == 32.0
    assert run.optimizer.skipped_updates.numpy() == 1
    assert run.optimizer.iterations.numpy() == 1
    assert_replicas_identical(run)

    run.update(scaled(good[2], 32))
    assert run.optimizer.dynamic_scale.numpy() == 32.0
    run.update(scaled(good[3], 32))
    assert run.optimizer.dynamic_scale.numpy() == 64.0  # two finite updates in a row
    unscaled = Run(case, replicas, micro_steps).updates([good[0], good[2], good[3]])
    for a, b in zip(run.weights(), unscaled.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("replicas", [1, 4])
def test_loss_scale_around_a_stock_optimizer(replicas):
    def make(**kwargs):
        return keras.optimizers.SGD(0.1, momentum=0.9, **kwargs)

    def wrap(optimizer):
        return tf_lbopt.LossScaleOptimizer(optimizer, initial_scale=8.0)

    good = sub_batch_gradients(3, sub_batches=replicas)
    scaled = [[[g * np.float32(8) for g in layers] for layers in update] for update in good]
    run = Run(make, replicas, wrap=wrap).update(scaled[0])
    before = run.state()
    run.update(poisoned(scaled[1], replicas - 1, np.nan))
    assert_states_equal(before, run.state())
    assert run.optimizer.dynamic_scale.numpy() == 4.0
    assert run.optimizer.skipped_updates.numpy() == 1
    assert_replicas_identical(run)
    run.update([[g * np.float32(0.5) for g in layers] for layers in scaled[2]])
    plain = Run(make, replicas).updates([good[0], good[2]])
    for a, b in zip(run.weights(), plain.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_loss_scale_leaves_what_overwrites_a_variable():
    """The gradient of a float8 scale is its next value, and not the loss's."""
    weight, scale = keras.Variable([1.0]), keras.Variable([1.0])
    scale.overwrite_with_gradient = True
    optimizer = tf_lbopt.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=8.0)
    optimizer.apply([tf.constant([8.0]), tf.constant([3.0])], [weight, scale])
    assert (weight.numpy(), scale.numpy()) == (0.5, 3.0)


@pytest.mark.parametrize(
    "case", [case for case in CASES if not hasattr(case.cls, "extrapolated")], ids=repr
)
@pytest.mark.parametrize(("micro_steps", "where"), [(1, 1), (1, 0), (2, 1), (2, 2)])
@pytest.mark.quick(case="vr_lamb", micro_steps=2, where=2)
def test_under_the_wrapper_that_keras_adds(case, micro_steps, where):
    """Weights, slots and iterations are safe; its scale may not be, and a warning says so."""
    good = sub_batch_gradients(2, sub_batches=2 * micro_steps)
    scaled = [[[g * np.float32(16) for g in layers] for layers in update] for update in good]
    run = Run(
        case,
        2,
        micro_steps,
        wrap=lambda o: keras.optimizers.LossScaleOptimizer(o, initial_scale=16.0),
    )
    with pytest.warns(UserWarning, match=r"tf_lbopt\.LossScaleOptimizer"):
        run.update(scaled[0])
    plain = Run(case, 2, micro_steps).update(good[0])
    for a, b in zip(run.weights(), plain.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    before = run.state()
    run.update(poisoned(scaled[1], where, np.inf))
    after = run.state()
    # It looks at replica 0 only. What it sees there never reaches the optimizer inside: that
    # micro-step does not count, the ones before it wait for the next.
    pending = {key for key in after if "pending_micro_steps" in key and where == 2}
    assert [after.pop(key) for key in pending] == [1] * len(pending)
    assert_states_equal({key: before[key] for key in after}, after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned of once
        run.update(scaled[0])


def test_loss_scale_unbuilt_custom_loop_uses_the_current_scale():
    """The first trace happens before `build`; the scale must not be frozen in it."""
    optimizer = tf_lbopt.LossScaleOptimizer(
        tf_lbopt.SNGM(0.1), initial_scale=4.0, dynamic_growth_steps=1
    )
    variable = keras.Variable([1.0, 2.0])
    scales = []

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable.value**2)
            scaled = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(scaled, [variable.value]), [variable])
        return scaled / loss

    for _ in range(3):
        scales.append(float(step()))
    assert scales == [4.0, 8.0, 16.0]


def test_loss_scale_stays_a_number():
    optimizer = tf_lbopt.LossScaleOptimizer(
        tf_lbopt.SNGM(0.1), initial_scale=2.0**39, dynamic_growth_steps=1
    )
    variable = keras.Variable([1.0, 2.0])
    for _ in range(4):
        optimizer.apply([tf.constant([1.0, 1.0])], [variable])
    assert optimizer.dynamic_scale.numpy() == 2.0**40
    optimizer.dynamic_scale.assign(2.0**-39)
    for _ in range(4):
        optimizer.apply([tf.constant([np.nan, 1.0])], [variable])
    assert optimizer.dynamic_scale.numpy() == 2.0**-40


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**15, 2.0**40])
@pytest.mark.parametrize("difference", [3e-4, 1.0])
def test_vrgd_does_not_depend_on_the_scale(scale, difference):
    weights = []
    for units in (1.0, scale):
        variable = keras.Variable([0.0, 0.0])
        optimizer = tf_lbopt.VRSGD(1.0, gradient_accumulation_steps=2)
        if units != 1:
            optimizer = tf_lbopt.LossScaleOptimizer(optimizer, initial_scale=units)
        for gradient in ([1.0, 0.0], [1.0 + difference, 0.0]):
            optimizer.apply([tf.constant(gradient) * units], [variable])
        weights.append(variable.numpy())
    assert weights[0][0] < -0.9 * (1 + difference / 2)
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-6)


def _mixed_float16_model():
    return keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)]
    )


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("micro_steps", [None, 2])
@pytest.mark.quick(replicas=2, micro_steps=2)
def test_fit_in_mixed_float16(replicas, micro_steps):
    """Through `fit`: half of the rows of one batch overflow float16 on the last replica only."""
    keras.config.set_dtype_policy("mixed_float16")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    x[24:32] = 6e4  # the second half of batch 1, all of which the last replica gets
    with strategy_of(replicas).scope():
        model = _mixed_float16_model()
        optimizer = tf_lbopt.LossScaleOptimizer(
            tf_lbopt.SNGM(0.05, gradient_accumulation_steps=micro_steps), initial_scale=2.0**10
        )
        model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    history = model.fit(
        x,
        y,
        batch_size=16,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[tf_lbopt.callbacks.SkippedUpdates()],
    )
    assert model.optimizer is optimizer
    assert history.history["skipped_updates"] == [1, 2, 3]
    assert optimizer.dynamic_scale.numpy() == 2.0**10 / 8
    assert optimizer.iterations.numpy() == 3 * (1 if micro_steps else 3)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_float16_wrapper_of_compile_is_reported_once():
    keras.config.set_dtype_policy("mixed_float16")
    x = np.full((16, 6), 0.01, "float32")
    with strategy_of(2).scope():
        model = _mixed_float16_model()
        model.compile(optimizer=tf_lbopt.LAMB(0.01), loss="mse", jit_compile=False)
    with pytest.warns(UserWarning, match=r"tf_lbopt\.LossScaleOptimizer"):
        model.fit(x, x[:, :1], batch_size=8, verbose=0)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.optimizer.inner_optimizer.iterations.numpy() == 2


def test_two_strategies_are_noticed():
    with strategy_of(2).scope():
        inside = tf_lbopt.LARS(1.0)
    with pytest.raises(ValueError, match=r"same strategy as LossScaleOptimizer.*a LARS"):
        tf_lbopt.LossScaleOptimizer(inside)
    outside = keras.optimizers.SGD(1.0)
    with strategy_of(2).scope(), pytest.raises(ValueError, match=r"same strategy.*a SGD"):
        tf_lbopt.LossScaleOptimizer(outside)


def test_several_optimizers_are_no_loss_scaling():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    with strategy_of(2).scope(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        optimizers = keras.optimizers.OptimizerMap(
            tf_lbopt.SNGM(0.1), {".*bias": tf_lbopt.LAMB(0.1)}
        )
        model.compile(keras.optimizers.MultiOptimizer(optimizers), "mse")
        before = model.get_weights()
        model.fit(x, x[:, :1], batch_size=8, verbose=0)
    for weight, old in zip(model.get_weights(), before, strict=True):
        assert np.all(weight != old)


def test_loss_scale_around_several_optimizers():
    """Each has a learning rate of its own."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    rate = tf.Variable(0.1)

    def fitted(scaled):
        keras.utils.set_random_seed(0)
        with strategy_of(2).scope():
            model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
            several = keras.optimizers.MultiOptimizer(
                keras.optimizers.OptimizerMap(
                    tf_lbopt.SNGM(0.1), {".*bias": keras.optimizers.SGD(lambda: rate)}
                )
            )
            model.compile(tf_lbopt.LossScaleOptimizer(several) if scaled else several, "mse")
        model.fit(x, x[:, :1], batch_size=8, epochs=2, verbose=0)
        return model

    unscaled, model = fitted(False), fitted(True)
    assert model.optimizer.skipped_updates.numpy() == 0
    before = model.get_weights()
    for one, other in zip(before, unscaled.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    rate.assign(np.nan)
    model.fit(x, x[:, :1], batch_size=8, epochs=2, verbose=0)
    assert model.optimizer.skipped_updates.numpy() == 2
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# -- finite, and too large -------------------------------------------------------------------------

ONES = np.ones(4, "float32")
SECOND_MOMENTS = {
    "lamb": lambda: tf_lbopt.LAMB(0.1),
    "extrap_adam": lambda: tf_lbopt.ExtrapAdam(0.1),
    "vr_adam": lambda: tf_lbopt.VRAdam(0.1, gradient_accumulation_steps=2),
    "vr_lamb": lambda: tf_lbopt.VRLAMB(0.1, gradient_accumulation_steps=2),
    "vr_sgd": lambda: tf_lbopt.VRSGD(1e-20, gradient_accumulation_steps=2),
    "around_adam": lambda: tf_lbopt.VarianceReduced(
        keras.optimizers.Adam(0.1), gradient_accumulation_steps=2
    ),
}


def update_eagerly(optimizer, variables, gradients):
    for _ in range(optimizer.gradient_accumulation_steps or 1):
        with (
            optimizer.step(variables, local=False)
            if isinstance(optimizer, tf_lbopt.PostLocalSGD)
            else taking_gradients(optimizer, variables)
        ):
            optimizer.apply([tf.constant(g) for g in gradients], variables)


def after(optimizer, steps, weights=ONES, dtype="float32"):
    """Weights, iterations and skipped updates after gradients times these factors."""
    variable = keras.Variable(weights, dtype=dtype)
    for factor in steps:
        update_eagerly(optimizer, [variable], [np.ones_like(weights) * np.float32(factor)])
    everything = [tf.convert_to_tensor(v) for v in (variable, *optimizer.variables)]
    assert all(np.isfinite(tf.cast(v, tf.float64)).all() for v in everything)
    counts = int(optimizer.iterations.numpy()), int(optimizer.skipped_updates.numpy())
    return tf.cast(everything[0], tf.float64).numpy(), *counts


@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_squares_that_overflow_discard_the_update(name):
    make = SECOND_MOMENTS[name]
    weights, updates, skipped = after(make(), [1, 1e20, 1])
    assert (updates, skipped) == (2, 1)
    np.testing.assert_array_equal(weights, after(make(), [1, 1])[0])
    assert after(make(), [1, 1e18, 1])[1:] == (3, 0)  # and others do not


FORGETFUL = {
    "lamb": lambda: tf_lbopt.LAMB(0.1, beta_1=0.95, beta_2=0.9, epsilon=1e-15),
    "lamb without epsilon": lambda: tf_lbopt.LAMB(0.1, beta_1=0.95, beta_2=0.9, epsilon=0.0),
    "lamb without memory": lambda: tf_lbopt.LAMB(0.1, beta_1=0.0, beta_2=0.0, epsilon=1e-15),
    "extrap_adam": lambda: tf_lbopt.ExtrapAdam(0.1, beta_1=0.9, beta_2=0.0, epsilon=1e-32),
}


@pytest.mark.parametrize("size", [4, 1 << 14])
@pytest.mark.parametrize("name", FORGETFUL)
def test_a_first_moment_that_outlives_the_second_discards_nothing(name, size):
    weights, *counts = after(FORGETFUL[name](), [1, 1e15, 0, 1], np.ones(size, "float32"))
    assert counts == [4, 0]
    assert np.all(weights != 1)


def test_an_epsilon_that_vanishes_in_the_kernel():
    weights, *counts = after(tf_lbopt.LAMB(0.1, epsilon=1e-38), [0], np.ones(1 << 14, "float32"))
    assert counts == [1, 0]
    np.testing.assert_array_equal(weights, 1.0)


def test_squares_that_vanish_leave_epsilon_alone():
    optimizer = tf_lbopt.ExtrapAdam(5e29, epsilon=1e-30, extrapolation_rate=0.0)
    assert after(optimizer, [3e-19])[1:] == (0, 1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: tf_lbopt.VarianceReduced(inner, gradient_accumulation_steps=2),
        lambda inner: tf_lbopt.PostLocalSGD(inner, start=9, period=1),
        lambda inner: tf_lbopt.LossScaleOptimizer(inner, initial_scale=1.0),
    ],
    ids=["variance_reduced", "post_local_sgd", "loss_scale"],
)
def test_around_a_stock_optimizer(wrap):
    """Its squares are checked, in float16 one by one; its steps are not."""
    layer = np.ones(16, "float16")
    assert after(wrap(keras.optimizers.SGD(0.01)), [100], layer, "float16")[1:] == (1, 0)
    assert after(wrap(keras.optimizers.SGD(0.01)), [300], layer, "float16")[1:] == (0, 1)
    assert after(wrap(keras.optimizers.SGD(0.01)), [1e20])[1:] == (0, 1)

    variable, optimizer = keras.Variable(ONES), wrap(keras.optimizers.SGD(1e38))
    update_eagerly(optimizer, [variable], [10 * ONES])
    assert np.all(np.isinf(variable.numpy()))
    assert (optimizer.iterations.numpy(), optimizer.skipped_updates.numpy()) == (1, 0)


def test_squares_are_taken_of_what_the_rule_gets():
    clipped = tf_lbopt.LAMB(0.1, clipnorm=1.0)
    assert after(clipped, [1, 1e20, 1])[1:] == (3, 0)
    # VRGD takes them before.
    clipped = tf_lbopt.VRSGD(0.1, clipnorm=1.0, gradient_accumulation_steps=2)
    assert after(clipped, [1, 1e20, 1])[1:] == (2, 1)


@pytest.mark.parametrize("scale", [8.0, 64.0])
@pytest.mark.parametrize("inner", [tf_lbopt.LAMB, keras.optimizers.Adam])
def test_other_reasons_leave_the_loss_scale(inner, scale):
    optimizer = tf_lbopt.LossScaleOptimizer(inner(0.1), initial_scale=scale)
    variable = keras.Variable(ONES)
    for factor in (scale, 1e21, np.inf, 1.0):
        optimizer.apply([tf.constant(ONES * np.float32(factor))], [variable])
    assert optimizer.dynamic_scale.numpy() == scale / 2
    assert optimizer.skipped_updates.numpy() == 2
    assert optimizer.iterations.numpy() == 2
    assert np.all(np.isfinite(variable.numpy()))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rate_that_is_nan_is_discarded_around_a_stock_optimizer(replicas):
    with strategy_of(replicas).scope():
        inner = keras.optimizers.SGD(keras.optimizers.schedules.PolynomialDecay(float("nan"), 9))
        optimizer = tf_lbopt.LossScaleOptimizer(inner, initial_scale=4.0)
        variable = keras.Variable(ONES)
    step = tf.function(lambda: optimizer.apply([tf.constant(ONES)], [variable]))
    strategy_of(replicas).run(step)
    np.testing.assert_array_equal(variable.numpy(), ONES)
    assert optimizer.skipped_updates.numpy() == 1
    assert optimizer.dynamic_scale.numpy() == 4.0


LAYERWISE = {
    "sngm": lambda rate, **kwargs: tf_lbopt.SNGM(rate, **kwargs),
    "lars": lambda rate, **kwargs: tf_lbopt.LARS(rate, **kwargs),
    "lamb": lambda rate, **kwargs: tf_lbopt.LAMB(rate, **kwargs),
    "clars": lambda rate, **kwargs: tf_lbopt.CLARS(rate, **kwargs),
    "extrap_sgd": lambda rate, **kwargs: tf_lbopt.ExtrapSGD(rate, **kwargs),
    "extrap_adam": lambda rate, **kwargs: tf_lbopt.ExtrapAdam(rate, **kwargs),
}


def test_sngm_steps_along_the_largest_gradients():
    for size in (1e-30, 1.0, 1e34, 9e37):
        weights, updates, skipped = after(tf_lbopt.SNGM(0.1), [size])
        assert (updates, skipped) == (1, 0)
        np.testing.assert_allclose(weights, 0.95, rtol=1e-6)


@pytest.mark.parametrize("name", ["lars", "clars"])
def test_a_rate_that_is_lost_is_counted(name):
    weights, updates, skipped = after(LAYERWISE[name](0.1), [1e30])
    assert (updates, skipped) == (1, 0)
    assert np.all(weights < 1)
    weights, updates, skipped = after(LAYERWISE[name](0.1), [8e37])
    assert (updates, skipped) == (0, 1)
    assert np.all(weights == 1)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("name", ["sngm", "lars", "lamb", "extrap_sgd", "around_sgd"])
def test_a_clipped_gradient_that_is_lost_is_counted(name, clip):
    """Of a norm of 1.8e38 that is clipped to 1 nothing is left."""

    def make():
        if name != "around_sgd":
            return LAYERWISE[name](0.1, **{clip: 1.0})
        sgd = keras.optimizers.SGD(0.1)
        return tf_lbopt.VarianceReduced(sgd, gradient_accumulation_steps=2, **{clip: 1.0})

    weights, *counts = after(make(), [9e37])
    assert counts == [0, 1]
    assert np.all(weights == 1)
    if name != "around_sgd":  # which squares what is not clipped yet
        weights, *counts = after(make(), [1e37])
        assert counts == [1, 0]
        assert np.all(weights < 1)


@pytest.mark.parametrize("name", LAYERWISE)
@pytest.mark.parametrize("rate", [np.nan, -1.0, np.inf, 3e38])
def test_rates_that_are_none_discard_the_update(name, rate):
    rates = iter([0.1, rate, 0.1, 0.1, 0.1])
    optimizer = LAYERWISE[name](lambda: tf.constant(next(rates), tf.float32))
    if hasattr(optimizer, "extrapolated"):
        optimizer.extrapolation_rate = 0.0
    weights, updates, skipped = after(optimizer, [1, 1, 1])
    assert (updates, skipped) == (2, 1)
    assert np.all(np.abs(weights) < 2)


@pytest.mark.parametrize("name", LAYERWISE)
def test_decay_that_makes_weights_grow_ends_before_infinity(name):
    arguments = {"trust_coefficient": 3.0} if name == "clars" else {}
    arguments |= {"trust_coefficient": 10.0} if name == "lars" else {}
    optimizer = LAYERWISE[name](10.0, weight_decay=5.0, **arguments)
    weights, updates, skipped = after(optimizer, [0.0] * 50, weights=ONES * 1e20)
    assert updates + skipped == 50
    assert (skipped > 0) == (name != "sngm")
    assert np.all(np.abs(weights) > 1e19)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: tf_lbopt.LAMB(0.9, **kwargs),
        lambda **kwargs: tf_lbopt.LARS(0.9, trust_ratio_denominator="sum_of_norms", **kwargs),
        lambda **kwargs: tf_lbopt.CLARS(0.9, **kwargs),
    ],
    ids=["lamb", "lars", "clars"],
)
def test_decay_at_the_rate_of_an_excluded_layer(make):
    optimizer = make(
        weight_decay=1.0, default_trust_ratio=1e5, exclude_from_layer_adaptation=[".*"]
    )
    weights, updates, skipped = after(optimizer, [0.0] * 8, weights=ONES * 1e20)
    assert updates > 0
    assert skipped > 0
    assert np.all(np.abs(weights) > 1e19)


@pytest.mark.parametrize("function", ["eager", "graph", "compiled"])
def test_an_element_that_overflows_keeps_its_value(function):
    variable = keras.Variable(np.float32([60000.0, 1.0]), dtype="float16")
    optimizer = tf_lbopt.SNGM(1e4, momentum=0.5)
    optimizer.build([variable])

    def step(gradient):
        optimizer.apply([gradient], [variable])

    if function != "eager":
        step = tf.function(step, jit_compile=function == "compiled", autograph=False)
    step(tf.constant([-1.0, 1.0]))
    np.testing.assert_allclose(variable.numpy(), [60000.0, 1 - 1e4 * 0.5**0.5], rtol=1e-3)
    assert (optimizer.iterations.numpy(), optimizer.skipped_updates.numpy()) == (1, 1)
    step(tf.constant([1.0, -1.0]))
    assert (optimizer.iterations.numpy(), optimizer.skipped_updates.numpy()) == (2, 1)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("dtype", "kept"), [("float16", True), ("bfloat16", False)])
def test_only_float16_keeps_what_overflows(dtype, kept, sparse):
    """In bfloat16 nothing does that `tf_lbopt.rules.bounds` lets through."""
    large = float(tf.as_dtype(dtype).max)
    variable = tf.Variable(tf.constant([[large], [large]], dtype))
    direction = tf.constant([[0.0], [large]])
    if sparse:
        direction = tf.IndexedSlices(direction, tf.constant([0, 1]), tf.constant([2, 1]))
    writer = Writer()
    writer.subtract(variable, direction, tf.constant(-0.5))
    assert bool(writer.complete()) is not kept
    expected = large if kept else np.inf
    np.testing.assert_array_equal(tf.cast(variable, tf.float64), [[large], [expected]])


def test_a_sparse_row_that_overflows_keeps_its_value():
    variable = keras.Variable(np.full([3, 2], 60000.0, "float16"), dtype="float16")
    optimizer = tf_lbopt.ExtrapSGD(1.0, momentum=0.0, noise="gaussian", extrapolation_rate=0.0)
    with optimizer.extrapolated([variable]):
        rows = tf.constant([[1e4, -1e4]], tf.float16)
        optimizer.apply([tf.IndexedSlices(rows, [1], dense_shape=[3, 2])], [variable])
    expected = np.full([3, 2], 60000.0)
    expected[1, 0] = 50000.0
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-3)
    assert optimizer.skipped_updates.numpy() == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["lamb", "lars", "vr_lamb"])
@pytest.mark.quick(name=("lars", "vr_lamb"))
def test_too_large_steps_in_graphs_and_on_replicas(name, compiled):
    (case,) = [case for case in CASES if case.name == name]
    good = sub_batch_gradients(2, sub_batches=2)
    too_large = [[g * np.float32(1e37) for g in layers] for layers in good[1]]
    function = functools.partial(tf.function, jit_compile=True) if compiled else tf.function
    replicas = 1 if compiled else 2
    run = Run(case, replicas, 2 // replicas, function=function).update(good[0])
    before = run.state()
    run.update(too_large)
    assert_states_equal(before, run.state())
    assert run.optimizer.skipped_updates.numpy() == 1
    assert_replicas_identical(run)
    run.update(good[1])
    assert run.optimizer.iterations.numpy() == 2


def test_norms_whose_sum_overflows_discard_the_update():
    """The gradients of two replicas cancel each other, so that their mean is finite."""
    long = np.full([4], 3e38, np.float32)
    run = Run(tf_lbopt.CLARS, 2, weights=[np.ones([4], np.float32)], learning_rate=0.1)
    before = run.state()
    run.update([[long], [-long]])
    assert run.optimizer.skipped_updates.numpy() == 1
    assert_states_equal(run.state(), before)
