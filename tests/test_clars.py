"""What sets CLARS apart: N from sub-batches or examples, its bounds and its guards."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from harness import ARGUMENTS, CASES, SPLITS, Run, graph_nodes, initial_weights, sub_batch_gradients

import tf_lbopt
from benchmarks.references import clars, mean_gradients, reference

(CASE,) = [case for case in CASES if case.name == "clars"]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def assert_close(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE))


def test_cancelling_sub_batches_get_a_smaller_step_than_lars_gives_them():
    w, u, v = (np.array(x, "float32") for x in ([3.0, 4.0], [1.0, 10.0], [1.0, -10.0]))
    arguments = {"learning_rate": 1.0, "trust_coefficient": 0.1, "momentum": 0.0}
    run = Run(tf_lbopt.CLARS, 2, weights=[w], **arguments)
    run.update([[u], [v]])
    norm = np.sqrt(101.0)
    assert_close(run.weights(), [w - 0.1 * 5 / norm * np.array([1.0, 0.0])])
    lars = Run(tf_lbopt.LARS, 2, weights=[w], **arguments)
    assert_close(lars.update([[u], [v]]).weights(), [w - 0.1 * 5 * np.array([1.0, 0.0])])


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_single_sub_batch_is_lars(dtype, nesterov):
    gradients = sub_batch_gradients(5, sub_batches=1)
    arguments = {"learning_rate": 0.5, "momentum": 0.8, "nesterov": nesterov, "dtype": dtype}
    ours = Run(tf_lbopt.CLARS, trust_coefficient=0.1, **arguments).updates(gradients)
    lars = Run(tf_lbopt.LARS, trust_coefficient=0.1, **arguments)
    assert_close(ours.weights(), lars.updates(gradients).weights(), rtol=1e-6)


def test_a_layer_without_ratio_has_1_and_the_bound_applies_to_it():
    weights = [np.zeros((2,), "float32"), np.ones((2,), "float32"), np.ones((3,), "float32")]
    gradients = [[[np.ones(2), np.ones(2), np.zeros(3)] for _ in range(2)]]
    gradients = [[[g.astype("float32") for g in layers] for layers in u] for u in gradients]
    expected = {None: 0.5, 0.1: 0.05}
    for bound, step in expected.items():
        run = Run(
            tf_lbopt.CLARS,
            2,
            weights=weights,
            learning_rate=0.5,
            trust_coefficient=1.0,
            momentum=0.0,
            max_trust_ratio=bound,
            exclude_from_layer_adaptation=["layer_1"],
        ).updates(gradients)
        first, excluded, without_gradient = run.weights()
        np.testing.assert_allclose(first, -step * np.ones(2), rtol=1e-6)
        np.testing.assert_allclose(excluded, 0.5 * np.ones(2), rtol=1e-6)
        np.testing.assert_array_equal(without_gradient, np.ones(3))


@pytest.mark.parametrize(("replicas", "micro_steps"), [(4, 1), (2, 2), (1, 4)])
def test_an_empty_sub_batch_is_no_part_of_the_mean_norm(replicas, micro_steps):
    gradients = sub_batch_gradients(4, 4)
    for update, empty in zip(gradients, [[1], [0, 3], [0, 1, 2], [0, 1, 2, 3]], strict=True):
        for d in empty:
            update[d] = [np.zeros_like(g) for g in update[d]]
    run = Run(CASE, replicas, micro_steps).updates(gradients)
    expected = reference("clars", initial_weights(), gradients, **CASE.arguments)
    assert_close(run.weights(), expected)
    counted = [
        [np.mean([np.linalg.norm(g) for g in layer]) for layer in zip(*update, strict=True)]
        for update in gradients
    ]
    other = clars(initial_weights(), mean_gradients(gradients), counted, **CASE.arguments)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(expected, other, strict=True))


def test_weights_loaded_after_build():
    """The paper's v_0 = w_0 must be the weights that training starts from."""
    gradients = sub_batch_gradients(4, sub_batches=2)
    run = Run(CASE, 2, weights=[np.zeros_like(w) for w in initial_weights()])
    for variable, value in zip(run.variables, initial_weights(), strict=True):
        variable.assign(value)
    run.updates(gradients)
    assert_close(run.weights(), reference("clars", initial_weights(), gradients, **CASE.arguments))


# -- norms by example ------------------------------------------------------------------------------

EXAMPLES = 3


class GivingRun(Run):
    """Gives the optimizer the norms of its examples: other ones on every replica and micro-step."""

    def __init__(self, *args, scale=1.0, as_means=False, **kwargs):
        self.scale, self.as_means = scale, as_means
        super().__init__(tf_lbopt.CLARS, *args, norm_estimator="per_example", **kwargs)

    def _step_python(self, values):
        def replica_step(local):
            gradients, norms = local[: len(self.variables)], local[len(self.variables) :]
            gradients = [g / self.replicas for g in gradients]
            if hasattr(self.optimizer, "inner_optimizer"):
                gradients = [self.optimizer.scale_loss(g) for g in gradients]
            elif self.inner.loss_scale_factor:
                gradients = [g * self.inner.loss_scale_factor for g in gradients]
            if self.as_means:
                norms = [tf.reduce_mean(n) for n in norms]
            with self.inner.example_norms(norms, self.variables):
                self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))

        self.strategy.run(replica_step, args=(values,))


def with_norms(updates, sub_batches, seed=5):
    """Gradients with norms of their examples behind them, and the mean norms."""
    rng = np.random.default_rng(seed)
    values, means = [], []
    for update in sub_batch_gradients(updates, sub_batches):
        norms = [
            [rng.uniform(1, 20, size=EXAMPLES).astype("float32") for _ in layers]
            for layers in update
        ]
        values.append([[*g, *n] for g, n in zip(update, norms, strict=True)])
        means.append(np.mean([[np.mean(n) for n in layers] for layers in norms], axis=0))
    return values, means


def expected_by_example(values, means, **changes):
    gradients = [[layers[: len(initial_weights())] for layers in update] for update in values]
    arguments = {**ARGUMENTS["clars"], **changes}
    return clars(initial_weights(), mean_gradients(gradients), means, **arguments)


@pytest.mark.parametrize(("replicas", "micro_steps"), SPLITS)
@pytest.mark.parametrize("as_means", [False, True], ids=["vectors", "means"])
@pytest.mark.quick(replicas=2)
def test_norms_by_example(replicas, micro_steps, as_means):
    values, means = with_norms(4, replicas * micro_steps)
    run = GivingRun(replicas, micro_steps, as_means=as_means, **ARGUMENTS["clars"])
    assert_close(run.updates(values).weights(), expected_by_example(values, means))


@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.quick(dynamic=True)
@pytest.mark.quick(replicas=1)
def test_norms_by_example_of_a_scaled_loss(replicas, micro_steps, dynamic):
    values, means = with_norms(4, replicas * micro_steps)
    if dynamic:
        extra = {"wrap": lambda o: tf_lbopt.LossScaleOptimizer(o, initial_scale=64.0)}
    else:
        extra = {"loss_scale_factor": 64.0}
    run = GivingRun(replicas, micro_steps, **ARGUMENTS["clars"], **extra)
    assert_close(run.updates(values).weights(), expected_by_example(values, means))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_skips_the_update(bad):
    values, _ = with_norms(1, 2)
    values[0][1][2][0] = bad
    run = GivingRun(2, **ARGUMENTS["clars"])
    run.updates(values)
    assert run.inner.skipped_updates.numpy() == 1
    assert_close(run.weights(), initial_weights(), rtol=0, atol=0)


def test_by_example_without_norms_says_what_to_do():
    run = Run(tf_lbopt.CLARS, learning_rate=0.1, norm_estimator="per_example")
    with pytest.raises(ValueError, match=r"PerExampleNormsModel(.|\n)*sub_batch"):
        run.updates(sub_batch_gradients(1, 1))


def test_fit_without_norms_says_what_to_do():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile(optimizer=tf_lbopt.CLARS(0.1, norm_estimator="per_example"), loss="mse")
    with pytest.raises(ValueError, match="PerExampleNormsModel"):
        model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)


def test_norms_belong_to_one_optimizer_and_one_call():
    values, _ = with_norms(1, 1)
    run, other = (GivingRun(**ARGUMENTS["clars"], function=lambda f: f) for _ in range(2))
    gradients = [tf.constant(g) for g in values[0][0][:2]]
    norms = [tf.constant(n) for n in values[0][0][2:]]
    with (
        run.inner.example_norms(norms, run.variables),
        pytest.raises(ValueError, match="needs the norms"),
    ):
        other.optimizer.apply(gradients, other.variables)
    with pytest.raises(ValueError, match="needs the norms"):
        run.optimizer.apply(gradients, run.variables)


def test_wrong_norms_are_refused():
    values, _ = with_norms(1, 1)
    run = GivingRun(**ARGUMENTS["clars"], function=lambda f: f)
    norms = [tf.constant(n) for n in values[0][0][2:]]
    with (
        pytest.raises(ValueError, match="1 norms for 2 variables"),
        run.inner.example_norms(norms[:1], run.variables),
    ):
        pass
    with (
        run.inner.example_norms(norms[:1], run.variables[:1]),
        pytest.raises(ValueError, match="none for layer_1"),
    ):
        run.optimizer.apply([tf.constant(g) for g in values[0][0][:2]], run.variables)
    by_sub_batch = Run(tf_lbopt.CLARS, learning_rate=0.1)
    with (
        pytest.raises(ValueError, match="norm_estimator='sub_batch'"),
        by_sub_batch.inner.example_norms(norms, by_sub_batch.variables),
    ):
        pass


def test_one_reduction_carries_gradients_and_norms():
    strategy = strategy_of(4)
    with strategy.scope():
        variables = [keras.Variable(w) for w in initial_weights()]
        optimizer = tf_lbopt.CLARS(0.1)
        optimizer.build(variables)

    @tf.function
    def step():
        strategy.run(lambda: optimizer.apply([v * 1.0 for v in variables], variables))

    nodes = graph_nodes(step.get_concrete_function())
    assert sum(n.op.startswith("CollectiveReduce") for n in nodes) == 4


def test_a_configuration_of_version_0_2_loads():
    """Where `trust_coefficient` was `eta`."""
    config = tf_lbopt.CLARS(0.1, trust_coefficient=0.3).get_config()
    config["eta"] = config.pop("trust_coefficient")
    assert tf_lbopt.CLARS.from_config(config).trust_coefficient == 0.3
