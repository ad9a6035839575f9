"""The gradient noise scale: estimators, the squared norms that updates keep, the callback."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from harness import SHAPES, SPLITS, Run, graph_nodes, sub_batch_gradients

import tf_lbopt
from tf_lbopt.callbacks import GradientNoiseScale
from tf_lbopt.rules.noise_scale import RunningNoiseScale, unbiased_estimates


def linear_model(rng, updates, sub_batches, b, weights=(0.0, 0.0, 0.0), noise=1.5):
    """Gradients of ½ (x·w − x·w* − ε)², x normal: [update][sub-batch] means over b examples.

    With d = w − w*: G = d, and tr Σ = (n + 1) ‖d‖² + n var(ε), from E[x xᵀ d dᵀ x xᵀ] =
    2 d dᵀ + ‖d‖² I.
    """
    best = np.array([1.0, -2.0, 0.5])
    d = np.asarray(weights) - best
    x = rng.normal(size=(updates, sub_batches, b, 3))
    errors = x @ d - noise * rng.normal(size=x.shape[:-1])
    gradients = (errors[..., None] * x).mean(axis=2)
    trace = 4 * d @ d + 3 * noise**2
    return gradients, trace, d @ d


def estimated(gradients, b):
    """[update] estimates of tr Σ and of ‖G‖²."""
    mean_of_squares = (gradients**2).sum(-1).mean(1)
    square_of_mean = (gradients.mean(1) ** 2).sum(-1)
    variance, signal = unbiased_estimates(mean_of_squares, square_of_mean, gradients.shape[1])
    return b * variance, signal


# -- the estimators --------------------------------------------------------------------------------


@pytest.mark.parametrize(("sub_batches", "b"), [(2, 4), (8, 1), (8, 4)])
def test_estimates_are_unbiased_over_200_seeds(sub_batches, b):
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        gradients, trace, signal = linear_model(rng, 20, sub_batches, b)
        found.append([each.mean() for each in estimated(gradients, b)])
    means, errors = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(200)
    assert (np.abs(means - [trace, signal]) < 3.5 * errors).all()
    assert (errors < 0.03 * np.array([trace, signal])).all()
    # A ratio of two random numbers is not the ratio of their means; here it is not far.
    ratios = [x / y for x, y in found]
    assert np.median(ratios) == pytest.approx(trace / signal, rel=0.05)


def test_estimates_equal_brute_force_over_single_examples():
    """Of all ways to draw sub-batches, the mean is the expectation itself."""
    examples = np.random.default_rng(0).normal(size=(4, 3)) + 1.0
    mean = examples.mean(0)
    pairs = examples[np.indices([4, 4]).reshape(2, -1).T]  # k = 2 of b = 1, drawn independently
    x, y = estimated(pairs, 1)
    np.testing.assert_allclose(x.mean(), np.sum((examples - mean) ** 2) / 4)
    np.testing.assert_allclose(y.mean(), mean @ mean)


@pytest.mark.parametrize(("updates", "decay"), [(100, 0.95), (40, 0.99)])
def test_the_standard_error_covers(updates, decay):
    within = []
    for seed in range(300):
        gradients, trace, signal = linear_model(np.random.default_rng(seed), updates, 8, 4)
        running = RunningNoiseScale(decay)
        for x, y in zip(*estimated(gradients, 4), strict=True):
            running.add([x], [y])
        distance = abs(running.ratio()[0] - trace / signal)
        within.append(distance / running.standard_error()[0])
    within = np.array(within)
    assert 0.60 < np.mean(within < 1) < 0.76  # 68 %
    assert 0.90 < np.mean(within < 1.96) < 0.98  # 95 %


def test_running_ratio_is_that_of_weighted_means():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(1, 2, (30, 2)), rng.uniform(1, 2, (30, 2))
    running = RunningNoiseScale(0.9)
    for pair in zip(x, y, strict=True):
        running.add(*pair)
    weights = 0.9 ** np.arange(29, -1, -1)[:, None]
    ratios = (weights * x).sum(0) / (weights * y).sum(0)
    np.testing.assert_allclose(running.ratio(), ratios)
    total, squared = weights.sum(), (weights**2).sum()
    variance = (weights * (x - ratios * y) ** 2).sum(0) / total / (1 - squared / total**2)
    expected = np.sqrt(squared * variance) / (weights * y).sum(0)
    np.testing.assert_allclose(running.standard_error(), expected)


def test_running_ratio_without_a_denominator():
    running = RunningNoiseScale(0.9)
    assert np.isnan(running.ratio()).all()
    assert np.isnan(running.standard_error()).all()
    running.add([1.0, 0.0, 2.0], [-1.0, 0.0, 1.0])
    np.testing.assert_array_equal(running.ratio(), [np.inf, np.nan, 2.0])
    np.testing.assert_array_equal(running.standard_error(), [np.inf, np.nan, np.nan])


# -- what updates keep -----------------------------------------------------------------------------


def kept(run, since=0):
    return run.inner.squared_norms_since(since)[1]


def expected_rows(gradients):
    rows = []
    for update in gradients:
        live = [layers for layers in update if any(np.any(g) for g in layers)]
        live = [[np.asarray(g, np.float64) for g in layers] for layers in live]
        squares = np.mean([[np.sum(g**2) for g in layers] for layers in live], axis=0)
        means = [np.mean(of_layer, axis=0) for of_layer in zip(*live, strict=True)]
        rows.append([*squares, *[np.sum(g**2) for g in means], len(live), 0.0])
    return np.array(rows)


def watched(make, replicas, micro_steps, rows=8, **kwargs):
    run = Run(make, replicas, micro_steps, **kwargs)
    run.inner.watch_squared_norms(rows)
    return run


MAKERS = {
    "sgd": lambda **k: tf_lbopt.SGD(0.1, **k),
    "vr_lamb": lambda **k: tf_lbopt.VRLAMB(0.1, **k),
    "clars": lambda **k: tf_lbopt.CLARS(0.1, **k),
    "around": lambda **k: tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1), **k),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("replicas", "micro_steps"), SPLITS)
@pytest.mark.quick(name="sgd", replicas=(1, 4))
@pytest.mark.quick(name=("vr_lamb", "clars"), replicas=1)
def test_rows_on_every_split(name, replicas, micro_steps):
    gradients = sub_batch_gradients(3)
    gradients[1][5] = [np.zeros_like(g) for g in gradients[1][5]]  # an empty sub-batch
    run = watched(MAKERS[name], replicas, micro_steps, global_clipnorm=0.1, loss_scale_factor=8.0)
    scaled = [[[8.0 * g for g in layers] for layers in update] for update in gradients]
    run.updates(scaled)
    np.testing.assert_allclose(kept(run), expected_rows(gradients), rtol=1e-5)
    assert run.traces == replicas


def test_rows_of_the_last_updates():
    gradients = sub_batch_gradients(7, 2)
    run = watched(MAKERS["sgd"], 2, 1, rows=3).updates(gradients[:2])
    np.testing.assert_allclose(kept(run), expected_rows(gradients[:2]), rtol=1e-5)
    run.updates(gradients[2:4])
    np.testing.assert_allclose(kept(run, 2), expected_rows(gradients[2:4]), rtol=1e-5)
    run.updates(gradients[4:])
    assert run.inner.squared_norms_since(2)[0] == 7
    np.testing.assert_allclose(kept(run, 2), expected_rows(gradients[4:]), rtol=1e-5)
    assert len(kept(run, 7)) == 0


@pytest.mark.parametrize(("replicas", "micro_steps"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
@pytest.mark.quick(bad=np.inf, replicas=2)
@pytest.mark.quick(bad=1e25, replicas=1)
def test_an_update_that_is_discarded_does_not_enter(replicas, micro_steps, bad):
    gradients = sub_batch_gradients(3, 2)
    gradients[1][1][1][0] = bad  # of the last, the square overflows
    run = watched(MAKERS["sgd"], replicas, micro_steps).updates(gradients)
    wanted = expected_rows([gradients[0], gradients[2]])
    np.testing.assert_allclose(kept(run), wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_squares_are_of_float32_or_wider(dtype):
    gradients = [[[100.0 * g for g in layers] for layers in u] for u in sub_batch_gradients(2, 2)]
    run = watched(MAKERS["sgd"], 1, 2, dtype=dtype)
    as_given = [[[tf.cast(g, dtype) for g in layers] for layers in update] for update in gradients]
    run.updates(as_given)
    wanted = [[[tf.cast(g, "float64").numpy() for g in s] for s in u] for u in as_given]
    rtol = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(kept(run), expected_rows(wanted), rtol=rtol)


@pytest.mark.parametrize(("replicas", "micro_steps"), [(2, 1), (1, 2)])
def test_sparse_gradients_are_as_dense_ones(replicas, micro_steps):
    rng = np.random.default_rng(0)
    weights = [np.ones([6, 2], np.float32), np.ones([3], np.float32)]
    run = watched(MAKERS["sgd"], replicas, micro_steps, weights=weights)
    sparse, as_dense = [], []
    for _ in range(2):
        rows, other = rng.normal(size=(4, 2)).astype("float32"), rng.normal(size=3)
        indices = np.array([1, 4, 1, 0])  # 1 comes twice
        full = np.zeros([6, 2])
        np.add.at(full, indices, rows)
        other = other.astype("float32")
        sparse.append(
            [tf.IndexedSlices(tf.constant(rows), tf.constant(indices), tf.constant([6, 2])), other]
        )
        as_dense.append([full, other])
    run.update(sparse)
    np.testing.assert_allclose(kept(run), expected_rows([as_dense]), rtol=1e-5)


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_missing_gradients_have_zeros(micro_steps):
    gradients = sub_batch_gradients(1, 2 * micro_steps)
    run = Run(MAKERS["sgd"], 2, micro_steps)
    run.inner.watch_squared_norms(4)
    run._apply = lambda given: run.optimizer.apply([None, *given[1:]], run.variables)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        run.updates(gradients)
    row = expected_rows([[[np.zeros(SHAPES[0]), *layers[1:]] for layers in gradients[0]]])
    np.testing.assert_allclose(kept(run), row, rtol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_one_program_by_xla_keeps_the_same(replicas):
    gradients = sub_batch_gradients(2, 4)
    run = watched(MAKERS["sgd"], replicas, 4 // replicas, jit_compile=True).updates(gradients)
    np.testing.assert_allclose(kept(run), expected_rows(gradients), rtol=1e-5)


def test_update_that_began_before_does_not_enter():
    gradients = sub_batch_gradients(3, 2)
    run = Run(MAKERS["sgd"], 1, 2)
    run.micro_step([[tf.constant(g) for g in gradients[0][0]]])
    run.inner.watch_squared_norms(4)
    run._step = tf.function(run._step_python)
    run.micro_step([[tf.constant(g) for g in gradients[0][1]]])
    assert len(kept(run)) == 0
    run.updates(gradients[1:])
    np.testing.assert_allclose(kept(run), expected_rows(gradients[1:]), rtol=1e-5)


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.quick(micro_steps=1)
def test_the_reductions_stay_as_many_and_nothing_is_kept_unasked(micro_steps):
    def reductions(run):
        gradients = sub_batch_gradients(1, 2)[0]
        nodes = graph_nodes(run.traced(gradients))
        return len(nodes), sum(node.op.startswith("CollectiveReduce") for node in nodes)

    run = Run(MAKERS["sgd"], 2, micro_steps)
    nodes, count = reductions(run)
    run.inner.watch_squared_norms(4)
    run._step = tf.function(run._step_python)
    with_rows, of_watched = reductions(run)
    assert of_watched == count
    assert with_rows > nodes
    run.inner.unwatch_squared_norms()
    run._step = tf.function(run._step_python)
    assert reductions(run) == (nodes, count)


# -- the callback ----------------------------------------------------------------------------------


def linear_data(rows, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    y = x @ np.array([[1.0], [-2.0], [0.5], [1.0]]) + rng.normal(size=(rows, 1))
    return x.astype("float32"), y.astype("float32")


def linear(optimizer, base=keras.Model, **compiled):
    inputs = keras.Input([4])
    model = base(inputs, keras.layers.Dense(1, use_bias=False, name="top")(inputs))
    model.get_layer("top").set_weights([np.zeros([4, 1])])
    model.compile(optimizer=optimizer, loss="mse", **compiled)
    return model


def scales(history):
    return [history[key][-1] for key in ("noise_scale", "noise_scale_standard_error")]


@pytest.mark.parametrize(("replicas", "micro_steps"), [(8, 1), (4, 2), (1, 8)])
@pytest.mark.quick(replicas=(1, 4))
def test_closed_form_through_fit_on_every_split(replicas, micro_steps):
    # At a rate of 0 the weights stay: G = −2 d, tr Σ = 4 ((n + 1) ‖d‖² + n).
    x, y = linear_data(32 * 40)
    with strategy_of(replicas).scope():
        steps = micro_steps if micro_steps > 1 else None
        model = linear(tf_lbopt.SGD(0.0, gradient_accumulation_steps=steps))
    callback = GradientNoiseScale(every=7, ema=0.99)
    assert callback.noise_scale is callback.examples_per_update is None
    history = model.fit(
        x, y, batch_size=32 // micro_steps, shuffle=False, verbose=0, callbacks=[callback]
    ).history
    assert history["examples_per_update"] == [callback.examples_per_update] == [32.0]
    assert scales(history) == [callback.noise_scale, callback.noise_scale_standard_error]
    scale, error = scales(history)
    assert scale == pytest.approx((5 * 6.25 + 4) / 6.25, abs=2 * error)
    assert error < 0.2 * scale
    # On every split the same sub-batches, where micro-steps are taken apart as replicas are.
    gradients = -2 * (y * x).reshape(40, 8, 4, 4).mean(axis=2)
    running = RunningNoiseScale(0.99)
    for variance, signal in zip(*estimated(gradients.astype(float), 4), strict=True):
        running.add([variance], [signal])
    assert scale == pytest.approx(running.ratio()[0], rel=1e-4)
    assert error == pytest.approx(running.standard_error()[0], rel=1e-4)


@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("clars", [False, True])
@pytest.mark.quick(clars=False)
def test_single_examples_by_brute_force(replicas, micro_steps, clars):
    x, y = linear_data(8 * 5)
    steps = micro_steps if micro_steps > 1 else None
    make = tf_lbopt.SGD
    if clars:
        make = lambda *args, **kwargs: tf_lbopt.CLARS(  # noqa: E731
            *args, norm_estimator="per_example", **kwargs
        )
    with strategy_of(replicas).scope():
        model = linear(make(0.0, gradient_accumulation_steps=steps), tf_lbopt.PerExampleNormsModel)
    history = model.fit(
        x, y, batch_size=8 // micro_steps, shuffle=False, verbose=0,
        callbacks=[GradientNoiseScale(per_layer=True)],
    ).history  # fmt: skip
    running = RunningNoiseScale(0.95)
    gradients = -2 * (y * x).reshape(5, 8, 4).astype(float)
    for variance, signal in zip(*estimated(gradients, 1), strict=True):
        running.add([variance], [signal])
    scale, error = scales(history)
    assert scale == pytest.approx(running.ratio()[0], rel=1e-4)
    assert error == pytest.approx(running.standard_error()[0], rel=1e-4)
    assert history["noise_scale/top/kernel"] == history["noise_scale"]
    assert history["examples_per_update"] == [8.0]


def test_looks_traces_and_leaves_nothing(tmp_path):
    x, y = linear_data(64)
    traces = []
    model = linear(
        tf_lbopt.LossScaleOptimizer(tf_lbopt.SGD(0.01, gradient_accumulation_steps=2)),
        steps_per_execution=2,
    )
    step = type(model).train_step

    def own_step(data):
        traces.append(1)
        return step(model, data)

    model.train_step = own_step
    callback = GradientNoiseScale(every=3, log_dir=str(tmp_path))
    history = model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[callback]).history
    assert sorted(history) == [
        "examples_per_update", "loss", "noise_scale", "noise_scale_standard_error",
    ]  # fmt: skip
    assert np.isfinite(history["noise_scale"]).all()
    assert history["examples_per_update"] == [8.0] * 3
    assert len(traces) == 1
    events = [
        (event.step, value.tag)
        for file in tmp_path.iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    ]
    # A look every 3 updates, or when an epoch of 8 ends, from which they are counted anew.
    assert sorted(n for n, tag in events if tag == "noise_scale") == [3, 6, 11, 14, 19, 22]
    assert model.train_step is own_step
    assert not model.optimizer.inner_optimizer.wants_norms_of_examples
    again = model.fit(x, y, batch_size=4, verbose=0).history
    assert sorted(again) == ["loss"]


def test_goes_on_after_an_error_in_fit():
    x, y = linear_data(32)
    model = linear(tf_lbopt.SGD(0.01, gradient_accumulation_steps=2))
    callbacks = [GradientNoiseScale(every=1)]

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[*callbacks, Stop()])
    history = model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks).history
    assert history["examples_per_update"] == [8.0]
    assert "train_step" not in vars(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "`every` must be an integer >= 1"),
        ({"ema": 1.0}, r"`ema` must be a real number in \[0, 1\)"),
        ({"per_layer": 1}, "`per_layer` must be True or False"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        GradientNoiseScale(**arguments)


def test_a_batch_grows_by_it():
    x, y = linear_data(256)
    model = linear(tf_lbopt.SGD(1e-4, gradient_accumulation_steps=2), keras.Model)
    scale = GradientNoiseScale(every=1)
    warmup = tf_lbopt.callbacks.BatchSizeWarmup(scale, 8, every=4, fraction=1e6)
    history = model.fit(x, y, batch_size=2, shuffle=False, verbose=0, callbacks=[scale, warmup])
    assert history.history["accumulation_steps"] == [8]
    assert history.history["examples_per_update"] == [16.0]
    # 4 updates of 2 batches, 4 of 4, the others of 8.
    assert int(model.optimizer.iterations.numpy()) == 4 + 4 + (128 - 8 - 16) // 8


@pytest.mark.parametrize(
    ("make", "base", "message"),
    [
        (lambda: keras.optimizers.SGD(0.1), keras.Model, "one of tf_lbopt. Received: SGD"),
        (lambda: tf_lbopt.SGD(0.1), keras.Model, "2 sub-batches or more.*Received: 1 replica"),
        (
            lambda: tf_lbopt.PostLocalSGD(tf_lbopt.SGD(0.1), 1, 2),
            keras.Model,
            "sums gradients.*Received: PostLocalSGD",
        ),
        (
            lambda: tf_lbopt.Adasum(tf_lbopt.SGD(0.1)),
            keras.Model,
            "takes the mean over the replicas. Received: Adasum",
        ),
    ],
)
def test_refuses_what_it_can_not_measure(make, base, message):
    x, y = linear_data(8)
    with pytest.raises(ValueError, match=message):
        linear(make(), base).fit(x, y, verbose=0, callbacks=[GradientNoiseScale()])


def test_refuses_regularizers_with_single_examples():
    x, y = linear_data(8)
    inputs = keras.Input([4])
    top = keras.layers.Dense(1, kernel_regularizer="l2")
    model = tf_lbopt.PerExampleNormsModel(inputs, top(inputs))
    model.compile(optimizer=tf_lbopt.SGD(0.1), loss="mse")
    with pytest.raises(ValueError, match=r"no regularizers.*Received"):
        model.fit(x, y, verbose=0, callbacks=[GradientNoiseScale()])
