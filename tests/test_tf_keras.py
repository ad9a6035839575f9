"""The tf_keras classes: the same updates as the Keras 3 classes, wherever gradients come from."""

import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from conftest import strategy_of
from harness import (
    KINDS,
    THREE_SHAPES,
    Run,
    assert_replicas_identical,
    assert_states_equal,
    initial_weights,
    needs_sub_batches,
    sub_batch_gradients,
    taking_gradients,
)
from harness_tf_keras import CASES, KERAS_CASES, KIND_CASES, NAMES, TfKerasRun, dynamic, fixed

import tf_lbopt
import tf_lbopt.tf_keras
from benchmarks.references import reference

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
SPLITS = [(1, 1), (2, 2), (4, 1), (1, 4)]
over_cases = pytest.mark.parametrize("case", CASES, ids=repr)
over_kinds = pytest.mark.parametrize("case", KIND_CASES, ids=repr)


@pytest.fixture(autouse=True)
def _fresh_keras_state():
    yield
    tf_keras.mixed_precision.set_global_policy("float32")


def assert_close(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE))


def named(name):
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_fit_without_an_update_is_warned_of(replicas):
    with strategy_of(replicas).scope():
        model = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=[2])])
        model.compile(tf_lbopt.tf_keras.SNGM(0.1, gradient_accumulation_steps=2), "mse")
    x, y = np.ones([4, 2], "float32"), np.ones([4, 1], "float32")
    with pytest.warns(UserWarning, match="before an update was due"):
        model.fit(x, y, batch_size=4, verbose=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before an update was due")
        model.fit(x, y, batch_size=4, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 1


# -- one algorithm, two frameworks -----------------------------------------------------------------


def test_every_class_is_there():
    assert {case.cls.__name__ for case in CASES} <= set(tf_lbopt.tf_keras.__all__)
    for case in CASES:
        assert issubclass(case.cls, tf_keras.optimizers.Optimizer)


@over_cases
def test_names_arguments_and_documentation(case):
    theirs = KERAS_CASES[case.name].cls
    assert case.cls.__name__ == theirs.__name__
    here, there = (list(inspect.signature(cls).parameters.values()) for cls in (case.cls, theirs))
    own = [parameter for parameter in there if parameter.kind is not parameter.KEYWORD_ONLY]
    assert here[: len(own)] == own
    names = {parameter.name for parameter in here}
    assert names ^ {p.name for p in there} == {"loss_scale_factor", "mesh"}
    assert (case.cls.slots, case.cls.statistics) == (theirs.slots, theirs.statistics)
    text = inspect.getdoc(case.cls)
    assert text.splitlines()[0] == inspect.getdoc(theirs).splitlines()[0]
    assert "loss_scale_factor" not in text
    assert "jit_compile: " in text
    assert "{" not in text.split("Args:")[1].split("Example")[0]
    assert ">>> w = tf.Variable(" in text


@over_cases
@pytest.mark.parametrize(("replicas", "micro_steps"), SPLITS)
@pytest.mark.quick(case=KINDS, replicas=2)
@pytest.mark.quick(case="lamb", replicas=1)
def test_equals_the_keras_3_class_to_the_last_bit(case, replicas, micro_steps):
    """Weights and everything that is kept for them, over several updates."""
    extra = {"clipnorm": 0.3, "use_ema": True} if micro_steps > 1 else {}
    shapes = [(6, 5), (5,)]
    gradients = sub_batch_gradients(4, sub_batches=replicas * micro_steps, shapes=shapes)
    run = {"weights": initial_weights(shapes), **extra}
    ours = TfKerasRun(case, replicas, micro_steps, **run).updates(gradients)
    theirs = Run(KERAS_CASES[case.name], replicas, micro_steps, **run).updates(gradients)
    for a, b in zip(ours.weights(), theirs.weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, slots in theirs.inner.trained.slots.items():
        for a, b in zip(ours.inner.trained.slots[name], slots, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
    if extra:
        averages = zip(
            ours.inner._model_variables_moving_average,
            theirs.inner._model_variables_moving_average,
            strict=True,
        )
        for a, b in averages:
            np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert ours.optimizer.iterations.numpy() == 4
    assert_replicas_identical(ours)


@over_kinds
@pytest.mark.quick(case="vr_lamb")
def test_equals_the_reference(case):
    gradients = sub_batch_gradients(5, sub_batches=4)
    run = TfKerasRun(case, 2, 2, build=False).updates(gradients)
    expected = reference(case.name, initial_weights(), gradients, **case.arguments)
    assert_close(run.weights(), expected)
    assert all(
        np.abs(a - b).max() > 1e-3 for a, b in zip(run.weights(), initial_weights(), strict=True)
    )


@over_kinds
@pytest.mark.quick(case="lamb")
def test_clips_the_mean_gradient(case):
    gradients = sub_batch_gradients(4, sub_batches=2)
    run = TfKerasRun(case, 2, global_clipnorm=0.5).updates(gradients)

    def clip(layers):
        norm = np.sqrt(sum(np.sum(g**2) for g in layers))
        return [g * min(1.0, 0.5 / norm) for g in layers]

    expected = reference(case.name, initial_weights(), gradients, clip=clip, **case.arguments)
    assert_close(run.weights(), expected)
    unclipped = reference(case.name, initial_weights(), gradients, **case.arguments)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(expected, unclipped, strict=True))


@pytest.mark.parametrize(
    ("case", "framework"),
    [
        *((case, "tf_keras") for case in KIND_CASES),
        (named("lamb"), "keras"),
        (named("lamb"), "callable"),
    ],
    ids=str,
)
@pytest.mark.quick(case="lamb", framework=("tf_keras", "callable"))
def test_schedules_count_updates(case, framework):
    if framework == "callable":
        schedule = expected_rate = lambda *step: 0.03
    elif framework == "keras":
        schedule = tf_lbopt.schedules.Warmup(
            keras.optimizers.schedules.PolynomialDecay(0.1, 6, 0.0), 2
        )
        expected_rate = lambda t: 0.1 * t / 2 if t < 2 else 0.1 * (1 - (t - 2) / 6)  # noqa: E731
    else:
        schedule = tf_keras.optimizers.schedules.PolynomialDecay(0.1, 5, 0.0)
        expected_rate = lambda t: 0.1 * (1 - t / 5)  # noqa: E731
    gradients = sub_batch_gradients(4, sub_batches=4)
    run = TfKerasRun(case, 2, 2, learning_rate=schedule).updates(gradients)
    arguments = {**case.arguments, "learning_rate": expected_rate}
    expected = reference(case.name, initial_weights(), gradients, **arguments)
    assert_close(run.weights(), expected)
    np.testing.assert_allclose(run.optimizer.learning_rate.numpy(), expected_rate(3), rtol=1e-6)


@over_kinds
@pytest.mark.quick(case="lamb")
def test_an_assigned_learning_rate_without_retracing(case):
    gradients = sub_batch_gradients(4, sub_batches=4)
    run = TfKerasRun(case, 2, 2, learning_rate=0.1).updates(gradients[:2])
    run.optimizer.learning_rate = 0.02
    run.updates(gradients[2:])
    assert run.traces == 2  # once for each replica
    expected = reference(
        case.name,
        initial_weights(),
        gradients,
        **{**case.arguments, "learning_rate": lambda t: 0.1 if t < 2 else 0.02},
    )
    assert_close(run.weights(), expected)


# -- gradients of other kinds ----------------------------------------------------------------------


def _slices(rng, rows, size, width):
    indices = rng.integers(0, rows, size=size).astype("int64")
    values = rng.normal(size=(size, width)).astype("float32")
    return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([rows, width]))


@over_kinds
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 2), (2, 2)])
@pytest.mark.quick(case="vr_lamb", replicas=2)
def test_sparse_equals_dense(case, replicas, micro_steps):
    """With repeated indices in one replica and between replicas."""
    rng = np.random.default_rng(3)
    weights = initial_weights([(6, 3), (4,)])
    sparse = [
        [
            [_slices(rng, 6, 8, 3), tf.constant(rng.normal(size=4), tf.float32)]
            for _ in range(replicas * micro_steps)
        ]
        for _ in range(3)
    ]
    dense = [[[tf.convert_to_tensor(g).numpy() for g in ls] for ls in u] for u in sparse]
    one = TfKerasRun(case, replicas, micro_steps, weights=weights).updates(sparse)
    expected = reference(case.name, weights, dense, **case.arguments)
    for a, b in zip(one.weights(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert np.abs(one.weights()[0] - weights[0]).max() > 1e-3


class MissingRun(TfKerasRun):
    """Variable 1 has no gradient."""

    def _apply(self, gradients):
        super()._apply([gradients[0], None, gradients[2]])


@over_kinds
@pytest.mark.parametrize("wrap", [lambda o: o, dynamic], ids=["plain", "loss scale"])
@pytest.mark.quick(case="vr_lamb", wrap="dynamic")
@pytest.mark.quick(case="lamb", wrap="<lambda>")
def test_missing_gradients_leave_the_variable_alone(case, wrap):
    first, other, last = initial_weights(THREE_SHAPES)
    gradients = sub_batch_gradients(3, 4, THREE_SHAPES)
    run = MissingRun(case, 2, 2, [first, other, last], wrap=wrap)
    if wrap is dynamic:  # tf_keras's wrapper takes it out, and logs it where logging is on
        run.updates(gradients)
    else:
        with pytest.warns(UserWarning, match="layer_1"):
            run.updates(gradients)
    np.testing.assert_array_equal(run.weights()[1], other)
    expected = reference(
        case.name,
        [first, last],
        [[[g, h] for g, _, h in update] for update in gradients],
        **case.arguments,
    )
    assert_close([run.weights()[0], run.weights()[2]], expected)


def test_no_gradient_at_all():
    variable = tf.Variable([1.0, 2.0])
    optimizer = tf_lbopt.tf_keras.LARS(0.1)
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply_gradients([(None, variable)])
    assert optimizer.apply_gradients([]).numpy() == 0


def test_unknown_variables_and_the_wrong_context_say_so():
    optimizer = tf_lbopt.tf_keras.LARS(0.1)
    optimizer.build([tf.Variable([1.0, 2.0])])
    with pytest.raises(ValueError, match="Unknown variable: other"):
        optimizer.apply_gradients([(tf.ones(2), tf.Variable([1.0, 2.0], name="other"))])
    twice = tf.Variable([1.0, 2.0], name="twice")
    with pytest.raises(ValueError, match="Received: twice more than once"):
        tf_lbopt.tf_keras.LARS(0.1).apply_gradients([(tf.ones(2), twice)] * 2)
    with strategy_of(2).scope():
        variable = tf.Variable([1.0, 2.0], name="mirrored")
        inside = tf_lbopt.tf_keras.LARS(0.1)
        with pytest.raises(ValueError, match="replica context"):
            inside.apply_gradients([(tf.ones(2), variable)])
    with pytest.raises(ValueError, match=r"strategy\.scope\(\).*Received: the variable mirrored"):
        tf_lbopt.tf_keras.LARS(0.1).build([variable])


# -- gradients that are summed already -------------------------------------------------------------

SUMMED = [{"skip_gradients_aggregation": True}, {"experimental_aggregate_gradients": False}]


class SummedRun(TfKerasRun):
    """Sums the gradients over the replicas itself."""

    def _apply(self, gradients):
        context = tf.distribute.get_replica_context()
        super()._apply([context.all_reduce(tf.distribute.ReduceOp.SUM, g) for g in gradients])


@over_kinds
@pytest.mark.parametrize(
    ("replicas", "micro_steps", "options"),
    [(2, 1, SUMMED[0]), (2, 2, SUMMED[1]), (1, 2, SUMMED[0])],
)
@pytest.mark.parametrize("wrap", [lambda o: o, dynamic], ids=["plain", "loss scale"])
@pytest.mark.quick(replicas=2, micro_steps=2)
def test_summed_gradients_are_taken_or_refused(case, options, replicas, micro_steps, wrap):
    gradients = sub_batch_gradients(3, sub_batches=replicas * micro_steps)
    run = SummedRun(case, replicas, micro_steps, wrap=wrap)
    run.options = options
    if case.cls.statistics and replicas > 1:
        with pytest.raises(ValueError, match=r"(?s)single sub-batches.*Received: skip_gradients"):
            run.updates(gradients)
        return
    if wrap is dynamic and hasattr(case.cls, "extrapolated"):  # the wrapper may leave the call out
        with pytest.raises(ValueError, match="condition or loop inside the block"):
            run.updates(gradients)
        return
    run.updates(gradients)
    expected = reference(case.name, initial_weights(), gradients, **case.arguments)
    assert_close(run.weights(), expected)
    assert_replicas_identical(run)


def test_aggregate_gradients_of_an_optimizer_without_wrapper_are_sums():
    strategy = strategy_of(2)
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])
        optimizer = tf_lbopt.tf_keras.SNGM(0.5, momentum=0.0)

    @tf.function
    def step():
        def replica_step():
            context = tf.distribute.get_replica_context()
            own = tf.cast(context.replica_id_in_sync_group, tf.float32) * tf.constant([0.0, 4.0])
            ((total, _),) = optimizer.aggregate_gradients([(own, variable)])
            optimizer.apply_gradients([(total, variable)], skip_gradients_aggregation=True)
            return total

        return strategy.run(replica_step)

    for total in strategy.experimental_local_results(step()):
        np.testing.assert_array_equal(total, [0.0, 4.0])
    np.testing.assert_allclose(variable.numpy(), [1.0, 1.5])


# -- the guard -------------------------------------------------------------------------------------


def poisoned(sub_batches, index, value, layer=1):
    copies = [[g.copy() for g in layers] for layers in sub_batches]
    copies[index][layer].flat[1] = value
    return copies


WRAPPERS = {"plain": lambda o: o, "dynamic": dynamic, "fixed": fixed}


@over_kinds
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("replicas", "micro_steps", "where", "value"),
    [
        (1, 1, 0, np.nan),
        (1, 3, 0, np.inf),
        (2, 1, 1, np.nan),
        (2, 2, 1, -np.inf),  # replica 1, micro-step 0
    ],
)
@pytest.mark.quick(replicas=2, micro_steps=2, wrapper="dynamic")
@pytest.mark.quick(case="vr_lamb", wrapper="plain", replicas=2, micro_steps=2)
@pytest.mark.quick(case="lamb", wrapper="plain", replicas=2, micro_steps=1)
@pytest.mark.quick(case="lamb", wrapper="fixed", replicas=2, micro_steps=2)
def test_skips_the_whole_update(case, wrapper, replicas, micro_steps, where, value):
    if wrapper == "fixed" and (replicas, micro_steps) != (2, 2):
        pytest.skip("a fixed scale does not look at the gradients")
    wrap = WRAPPERS[wrapper]
    good = sub_batch_gradients(3, sub_batches=replicas * micro_steps)
    run = TfKerasRun(case, replicas, micro_steps, wrap=wrap).update(good[0])
    before = run.state()
    run.update(poisoned(good[1], where, value))
    assert_states_equal(before, run.state())
    assert run.inner.skipped_updates.numpy() == 1
    assert run.optimizer.iterations.numpy() == 1
    assert_replicas_identical(run)
    if wrapper == "dynamic":
        assert run.optimizer.loss_scale.numpy() == 32.0
    run.update(good[2])
    finite = [good[0], good[2]]
    assert_close(run.weights(), reference(case.name, initial_weights(), finite, **case.arguments))
    assert run.optimizer.iterations.numpy() == 2


@pytest.mark.parametrize(
    ("case", "wrapper", "replicas", "micro_steps"),
    [
        *((case, "dynamic", 2, 2) for case in CASES),
        *((case, "dynamic", 1, 2) for case in KIND_CASES),
        *((case, "fixed", 2, 1) for case in KIND_CASES),
    ],
    ids=str,
)
@pytest.mark.quick(case="clars", replicas=2, micro_steps=2)
@pytest.mark.quick(case="vr_lamb")
def test_statistics_are_used_under_a_loss_scale(case, wrapper, replicas, micro_steps):
    """Weights equal those of the rule on sub-batches, not those of its base on their mean."""
    gradients = sub_batch_gradients(4, sub_batches=replicas * micro_steps)
    run = TfKerasRun(case, replicas, micro_steps, wrap=WRAPPERS[wrapper], build=False)
    run.updates(gradients)
    expected = reference(case.name, initial_weights(), gradients, **case.arguments)
    assert_close(run.weights(), expected)
    assert run.optimizer.iterations.numpy() == 4
    if case.cls.statistics and not hasattr(case.cls, "extrapolated"):
        means = [[np.mean(layer, axis=0) for layer in zip(*u, strict=True)] for u in gradients]
        without = reference(case.name, initial_weights(), [[m] for m in means], **case.arguments)
        assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(expected, without, strict=True))


def test_loss_scale_grows():
    run = TfKerasRun(named("vr_lamb"), 2, wrap=lambda o: dynamic(o, growth=2))
    run.updates(sub_batch_gradients(4, sub_batches=2))
    assert run.optimizer.loss_scale.numpy() == 256.0


@pytest.mark.parametrize("wrap", [lambda o: o, dynamic, fixed], ids=list(WRAPPERS))
def test_clars_with_norms_by_example(wrap):
    """Norms given to `example_norms` reach the update of the same replica."""
    arguments = {**named("clars").arguments, "norm_estimator": "per_example"}
    strategy = strategy_of(2)
    with strategy.scope():
        variable = tf.Variable([3.0, 4.0])
        inner = tf_lbopt.tf_keras.CLARS(**{**arguments, "weight_decay": None})
        optimizer = wrap(inner)

    @tf.function
    def step():
        def replica_step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            norms = tf.constant([2.0, 4.0]) + 4.0 * tf.cast(replica, tf.float32)
            with inner.example_norms([norms], [variable]):
                optimizer.apply_gradients([(tf.constant([0.0, 0.5]), variable)])

        strategy.run(replica_step)

    step()
    rho = arguments["trust_coefficient"] * 5 / 5  # the mean of 2, 4, 6, 8
    expected = 4 - (1 + 0.9) * arguments["learning_rate"] * rho
    np.testing.assert_allclose(variable.numpy(), [3.0, expected], rtol=1e-6)


# -- arguments -------------------------------------------------------------------------------------


@over_cases
def test_a_single_sub_batch_is_refused_by_those_that_need_two(case):
    optimizer = case()
    if needs_sub_batches(case):
        with pytest.raises(ValueError, match="gradient_accumulation_steps"):
            optimizer.apply_gradients([(tf.ones(2), tf.Variable([1.0, 2.0]))])
    else:
        variable = tf.Variable([1.0, 2.0])
        with taking_gradients(optimizer, [variable]):
            optimizer.apply_gradients([(tf.ones(2), variable)])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"jit_compile": "yes"}, ValueError, "`jit_compile` must be True, False or 'auto'"),
        ({"mesh": object()}, ValueError, "DTensor"),
        ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "At most one"),
        ({"clipnorm": -1.0}, ValueError, "clipnorm"),
        ({"gradient_accumulation_steps": 0}, ValueError, "gradient_accumulation_steps"),
        ({"use_ema": 1}, TypeError, "use_ema"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate"),
        ({"loss_scale_factor": 2.0}, TypeError, "loss_scale_factor"),
        ({"exclude_from_weight_decay": ["("]}, ValueError, "regular expression"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        tf_lbopt.tf_keras.LAMB(**arguments)


EXCLUSIONS = {
    "regex": lambda v: {"exclude_from_weight_decay": ["dense/bias$", "gam+a"]},
    "variables": lambda v: {"exclude_from_weight_decay": v[1:]},
    "var_list": lambda v: {"var_list": v[1:]},
    "var_names": lambda v: {"var_names": ["^dense/bias", "gamma$"]},
}


@over_kinds
@pytest.mark.parametrize("way", EXCLUSIONS)
@pytest.mark.parametrize("copied", [False, True])
def test_exclusions(case, way, copied):
    names = ["dense/kernel", "dense/bias", "norm/gamma"]
    weights = initial_weights(THREE_SHAPES)
    gradients = sub_batch_gradients(3, 2, THREE_SHAPES)
    variables = [tf.Variable(w, name=name) for w, name in zip(weights, names, strict=True)]
    extra = {"exclude_from_layer_adaptation": []} if case.name in KEPT_APART else {}
    given = EXCLUSIONS[way](variables)
    lists = {key: given.pop(key) for key in ("var_list", "var_names") if key in given}
    optimizer = case(gradient_accumulation_steps=2, **given, **extra)
    if lists:
        optimizer.exclude_from_weight_decay(**lists)
    if copied:
        optimizer = case.cls.from_config(optimizer.get_config())
    for update in gradients:
        for layers in update:
            with taking_gradients(optimizer, variables):
                optimizer.apply_gradients(zip(map(tf.constant, layers), variables, strict=True))
    adapts = {"adapts": [True] * 3} if extra and case.name != "extrap_sgd" else {}
    expected = reference(
        case.name,
        weights,
        gradients,
        **case.arguments,
        decays=[True, False, False],
        **adapts,
    )
    assert_close([v.numpy() for v in variables], expected)
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


KEPT_APART = [
    name
    for name in NAMES
    if "exclude_from_layer_adaptation" in inspect.signature(KERAS_CASES[name].cls).parameters
]
