"""Through `compile` and `fit`, as people use it; and the properties every optimizer has."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from harness import CASES, KINDS, Run, needs_sub_batches, taking_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

import tf_lbopt
from benchmarks.references import sngm
from tf_lbopt import tf_keras as legacy

RATES = {
    "sngm": 0.05,
    "lars": 0.05,
    "clars": 0.05,
    "extrap_sgd": 0.05,
    "extrap_adam": 0.02,
    "lamb": 0.02,
    "lans": 0.02,
    "sgd": 0.05,
    "adam": 0.02,
    "adamw": 0.02,
    "vr_sgd": 0.2,
    "vr_momentum": 0.05,
    "vr_adam": 0.02,
    "vr_lars": 0.05,
    "vr_lamb": 0.02,
    "vr_lans": 0.02,
}
EXTRA = {
    "clars": {"trust_coefficient": 0.1},
    "lars": {"trust_coefficient": 0.1},
    "vr_lars": {"trust_coefficient": 0.1},
}


def optimizer_for(case, **kwargs):
    return case.cls(**{"learning_rate": RATES[case.name], **EXTRA.get(case.name, {}), **kwargs})


def _data(rows=64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 5)).astype("float32")
    return x, (x @ rng.normal(size=(5, 1)) + 0.5).astype("float32")


def _model(normalized=False):
    layers = [keras.Input([5]), keras.layers.Dense(16, activation="tanh")]
    if normalized:
        layers.append(keras.layers.BatchNormalization())
    return keras.Sequential([*layers, keras.layers.Dense(1)])


def _linear_model():
    """With half as many variables, where it does not matter what is learned."""
    return keras.Sequential([keras.Input([5]), keras.layers.Dense(1)])


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("micro_steps", [None, 2])
@pytest.mark.quick(case=("vr_lamb", "extrap_sgd"), micro_steps=2)
def test_fit_learns_on_two_replicas(case, micro_steps):
    x, y = _data(256)
    with strategy_of(2).scope():
        model = _model()
        model.compile(
            optimizer=optimizer_for(case, gradient_accumulation_steps=micro_steps), loss="mse"
        )
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0).history["loss"]
    assert history[-1] < 0.6 * history[0]
    assert model.optimizer.iterations.numpy() == 3 * (8 if micro_steps else 16)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case="vr_lamb")
def test_replicas_and_micro_steps_are_the_same_through_fit(case):
    """2 × 4, 4 × 2 and 8 × 1 (for one optimizer) train the same model."""
    if hasattr(case.cls, "extrapolated"):
        pytest.skip("takes its gradients at as many points as there are replicas")
    x, y = _data(128)
    splits = [(1, 8), (2, 4), (4, 2), (8, 1)] if case.name == "sngm" else [(1, 4), (2, 2)]
    results = []
    for replicas, micro_steps in splits:
        keras.utils.set_random_seed(3)
        with strategy_of(replicas).scope():
            model = _linear_model()
            steps = micro_steps if micro_steps > 1 else None
            model.compile(
                optimizer=optimizer_for(case, gradient_accumulation_steps=steps, clipnorm=1.0),
                loss="mse",
            )
        batch = 32 // micro_steps
        model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
        assert model.optimizer.iterations.numpy() == 8
        results.append(model.get_weights())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def _around_sgd(wrap, *args):
    return lambda rate: wrap(keras.optimizers.SGD(rate), *args)


@pytest.mark.parametrize(
    "make",
    [
        tf_lbopt.LARS,
        legacy.LARS,
        tf_lbopt.ExtrapSGD,
        _around_sgd(tf_lbopt.LossScaleOptimizer),
        _around_sgd(tf_lbopt.VarianceReduced),
        _around_sgd(tf_lbopt.Accumulated),
        _around_sgd(tf_lbopt.PostLocalSGD, 1, 1),
    ],
    ids=[
        "LARS",
        "tf_keras",
        "ExtrapSGD",
        "loss scale",
        "variance reduced",
        "accumulated",
        "post-local",
    ],
)
@pytest.mark.parametrize("rate", [lambda: 0.1, tf_lbopt.schedules.Warmup(0.1, 5)])
def test_a_rate_that_is_a_function_can_not_be_reduced(make, rate):
    """As Keras says of a schedule; under a callable it has an AttributeError."""
    optimizer = make(rate)
    with pytest.raises(TypeError, match=r"(?s)This .* was created with a `LearningRateSchedule`"):
        optimizer.learning_rate = 0.05
    if make is tf_lbopt.LARS:
        optimizer.learning_rate = lambda: 0.25
        assert float(optimizer.learning_rate) == 0.25


def test_reduce_lr_on_plateau_through_wrappers():
    x, y = _data()
    for wrap in (lambda o: o, tf_lbopt.LossScaleOptimizer):
        with strategy_of(2).scope():
            model = _linear_model()
            model.compile(optimizer=wrap(tf_lbopt.SNGM(1e-9)), loss="mse")
        reduce = keras.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=1, min_delta=10.0
        )
        history = model.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=[reduce])
        assert history.history["learning_rate"][-1] < 1e-9
        np.testing.assert_allclose(
            model.optimizer.learning_rate.numpy(), history.history["learning_rate"][-1] / 2
        )


@pytest.mark.parametrize(
    "rate",
    [0.1, tf_lbopt.schedules.Warmup(0.1, 0), lambda: 0.1],
    ids=["float", "schedule", "callable"],
)
def test_kinds_of_learning_rates(rate):
    run = Run(tf_lbopt.SNGM, learning_rate=rate, momentum=0.0)
    before = run.weights()
    run.update([[np.ones_like(w) for w in before]])
    moved = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(before, run.weights(), strict=True)))
    np.testing.assert_allclose(moved, 0.1, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case="vr_lamb")
def test_short_last_batch_leaves_replicas_empty(case):
    """65 rows at 8 on 2 replicas: the last batch has 1 and one replica gets none."""
    x, y = _data(65)
    with strategy_of(2).scope():
        model = _model()
        model.compile(optimizer=optimizer_for(case), loss="mse")
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert model.optimizer.skipped_updates.numpy() == 0
    assert model.optimizer.iterations.numpy() == 27


def test_short_last_batch_with_batch_normalization_is_skipped():
    """The empty replica's BatchNormalization yields NaN; stock optimizers write it."""
    x, y = _data(70)
    with strategy_of(4).scope():
        model = _model(normalized=True)
        model.compile(optimizer=tf_lbopt.SNGM(0.05), loss="mse")
    model.fit(
        x, y, batch_size=16, epochs=2, verbose=0, callbacks=[tf_lbopt.callbacks.SkippedUpdates()]
    )
    assert all(np.isfinite(v.numpy()).all() for v in model.trainable_variables)
    assert model.optimizer.skipped_updates.numpy() == 2
    assert model.optimizer.iterations.numpy() == 8


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case="vr_lamb")
def test_mixed_bfloat16(case):
    keras.config.set_dtype_policy("mixed_bfloat16")
    x, y = _data(256)
    with strategy_of(2).scope():
        model = _model()
        model.compile(optimizer=optimizer_for(case), loss="mse")
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    assert all(v.dtype == "float32" for v in model.trainable_variables)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("micro_steps", [None, 2])
@pytest.mark.quick(case=KINDS, micro_steps=2)
def test_jit_compiled_fit_on_one_device(case, micro_steps):
    if micro_steps is None and needs_sub_batches(case):
        pytest.skip("needs at least two sub-batches")
    x, y = _data()
    losses = []
    for jit_compile in (True, False):
        keras.utils.set_random_seed(3)
        model = _linear_model()
        model.compile(
            optimizer=optimizer_for(case, gradient_accumulation_steps=micro_steps),
            loss="mse",
            jit_compile=jit_compile,
        )
        losses.append(model.fit(x, y, batch_size=16, epochs=3, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case="vr_lamb")
def test_embedding_model_through_fit(case):
    """Sparse gradients from `fit`, on two replicas with accumulation."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, size=(256, 6))
    y = (tokens < 10).mean(axis=1, keepdims=True).astype("float32")
    with strategy_of(2).scope():
        model = keras.Sequential(
            [
                keras.Input([6], dtype="int32"),
                keras.layers.Embedding(20, 4),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(
            optimizer=optimizer_for(case, gradient_accumulation_steps=2, clipnorm=1.0),
            loss="mse",
        )
    history = model.fit(tokens, y, batch_size=16, epochs=2, verbose=0).history["loss"]
    assert history[-1] < history[0]


def _minimize(case, loss, start, updates, rate):
    variable = keras.Variable(np.asarray(start, "float32"))
    schedule = keras.optimizers.schedules.PolynomialDecay(rate, updates, 0.0)
    micro_steps = 2 if needs_sub_batches(case) else None
    optimizer = optimizer_for(case, learning_rate=schedule, gradient_accumulation_steps=micro_steps)

    @tf.function
    def step():
        with taking_gradients(optimizer, [variable]):
            with tf.GradientTape() as tape:
                value = loss(variable.value)
            optimizer.apply([tape.gradient(value, variable.value)], [variable])
        return value

    for _ in range(updates * (micro_steps or 1)):
        value = step()
    return float(value)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case=("sngm", "lamb", "vr_lamb", "clars"))
def test_converges_on_a_parabola(case):
    target = tf.constant([1.0, -2.0, 3.0])
    rate = {"lars": 0.5, "vr_lars": 0.5, "clars": 0.5}.get(case.name, 0.1)

    def loss(w):
        return tf.reduce_sum((w - target) ** 2)

    assert _minimize(case, loss, [5.0, 5.0, 5.0], 500, rate) < 1e-3


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case="lamb")
def test_converges_on_rosenbrock(case):
    rates = {"sngm": 0.01, "sgd": 2e-3, "vr_sgd": 2e-3, "vr_momentum": 5e-4, "extrap_sgd": 5e-4}
    rate = rates.get(case.name, 0.05)

    def loss(w):
        return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2

    # Without momentum the valley is long.
    updates = 6000 if case.name in ("sgd", "vr_sgd", "extrap_adam") else 3000
    assert _minimize(case, loss, [-1.0, 1.5], updates, rate) < 1e-2


@settings(max_examples=25, deadline=None)
@given(
    momentum=st.floats(0.0, 0.99),
    scales=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e8, 1e30]), min_size=5, max_size=12),
    seed=st.integers(0, 1000),
)
def test_lemma_2_of_sngm(momentum, scales, seed):
    """‖u‖ ≤ 1/(1 − β), whatever the gradients are."""
    rng = np.random.default_rng(seed)
    variables = [keras.Variable(np.zeros(s, "float32")) for s in ((3, 2), (4,))]
    optimizer = tf_lbopt.SNGM(0.1, momentum=momentum)
    optimizer.build(variables)
    for scale in scales:
        gradients = [scale * rng.normal(size=v.shape) for v in variables]
        optimizer.apply([tf.constant(g, tf.float32) for g in gradients], variables)
        slots = [v.numpy() for v in optimizer.variables if v.path.endswith("momentum")]
        assert len(slots) == (2 if momentum else 0)
        norm = np.sqrt(sum(np.sum(np.square(u.astype("float64"))) for u in slots))
        assert norm <= 1 / (1 - momentum) * (1 + 1e-5)
        assert all(np.isfinite(v.numpy()).all() for v in variables)


@settings(max_examples=20, deadline=None)
@given(exponents=st.lists(st.integers(-30, 30), min_size=4, max_size=8))
def test_sngm_does_not_see_the_scale_of_a_gradient(exponents):
    """Without decay, multiplying each gradient by a power of two changes no step."""
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=(4, 3)), rng.normal(size=(3,))] for _ in exponents]
    weights = [np.zeros((4, 3), "float32"), np.zeros(3, "float32")]
    runs = []
    for scales in ([1.0] * len(exponents), [2.0**e for e in exponents]):
        run = Run(tf_lbopt.SNGM, weights=weights, learning_rate=0.1, function=lambda f: f)
        run.updates(
            [
                [[(s * g).astype("float32") for g in layers]]
                for s, layers in zip(scales, gradients, strict=True)
            ]
        )
        runs.append(run.weights())
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(runs[0], sngm(weights, gradients, 0.1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.quick(replicas=1)
@pytest.mark.quick(grows=False)
def test_micro_batches_are_carried_over_the_end_of_a_dataset_of_unknown_size(
    replicas, grows, graph_optimizer
):
    """There a training step begins without a batch, and must have written nothing when it ends."""
    x = np.random.default_rng(0).normal(size=(44, 3)).astype("float32")
    weights = []
    for known in (True, False):
        with strategy_of(replicas).scope():
            model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
            model.set_weights([np.float32([[1.0], [2.0], [3.0]]), np.float32([4.0])])
            optimizer = tf_lbopt.LAMB(0.05, gradient_accumulation_steps=1 if grows else 3)
            if grows:
                optimizer.accumulation_steps = 3
            model.compile(optimizer, "mse", jit_compile=False)
        data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(4)
        if not known:
            data = data.filter(lambda *batch: True)
        model.fit(data, epochs=4, verbose=0)  # of 11 micro-steps each
        assert int(optimizer.iterations.numpy()) == 14
        assert optimizer.pending_micro_steps == 2
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)
