"""A number of micro-steps that changes between updates, and the callbacks that change it."""

import functools
import math
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import (
    CASES,
    Run,
    assert_replicas_identical,
    assert_states_equal,
    initial_weights,
    sub_batch_gradients,
)
from harness_state import by_checkpoint, by_own_variables
from harness_tf_keras import CASES as TF_KERAS_CASES
from harness_tf_keras import TfKerasRun, dynamic

import tf_lbopt
import tf_lbopt.tf_keras
from benchmarks.references import reference
from tf_lbopt.callbacks import BatchSizeSchedule, BatchSizeWarmup
from tf_lbopt.optimizers import saved_state

SHAPES = [(6, 5), (5,)]
KINDS = {case.name: case for case in CASES if case.name in ("lamb", "vr_lamb", "clars")}
# Sub-batches of all replicas together, for one update after the other.
SIZES = [2, 2, 6, 4, 8, 2]

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 8")


def gradients_of(sizes, **arguments):
    gradients = sub_batch_gradients(len(sizes), max(sizes), SHAPES, **arguments)
    return [update[:size] for update, size in zip(gradients, sizes, strict=True)]


class Growing:
    """Mix-in for a `Run` whose updates have as many micro-steps as they are given sub-batches."""

    def __init__(self, make, replicas=1, steps=2, **arguments):
        if steps == 1:
            arguments["gradient_accumulation_steps"] = 1
        weights = arguments.pop("weights", initial_weights(SHAPES))
        super().__init__(make, replicas, steps, weights, **arguments)
        self.inner.let_batch_grow()

    def update(self, sub_batches):
        self.micro_steps = len(sub_batches) // self.replicas
        self.inner.accumulation_steps = self.micro_steps
        return super().update(sub_batches)


class GrowingRun(Growing, Run):
    pass


class TfKerasGrowingRun(Growing, TfKerasRun):
    pass


def start_of(replicas):
    return 2 // replicas  # a variance needs two sub-batches


def assert_close(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.quick(replicas=1, compiled=True, name="vr_lamb")
@pytest.mark.quick(replicas=2, compiled=False)
def test_equals_the_reference_at_every_number(name, replicas, compiled):
    """One trace for each replica, whatever the number."""
    gradients = gradients_of(SIZES)
    run = GrowingRun(KINDS[name], replicas, start_of(replicas), jit_compile=compiled)
    run.updates(gradients)
    expected = reference(name, initial_weights(SHAPES), gradients, **KINDS[name].arguments)
    assert_close(run.weights(), expected)
    assert run.traces == replicas
    assert run.optimizer.iterations.numpy() == len(SIZES)
    assert run.optimizer.skipped_updates.numpy() == 0
    assert_replicas_identical(run)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.quick(name="vr_lamb")
def test_a_step_that_is_compiled_as_a_whole(name):
    gradients = gradients_of(SIZES)
    run = GrowingRun(KINDS[name], function=functools.partial(tf.function, jit_compile=True))
    expected = reference(name, initial_weights(SHAPES), gradients, **KINDS[name].arguments)
    assert_close(run.updates(gradients).weights(), expected)
    assert run.traces == 1


def test_sparse_gradients_loss_scale_and_a_sub_batch_that_is_not_finite():
    """As dense ones without a scale, but for the update that is discarded."""
    gradients = gradients_of([2, 4, 2, 6])

    def sparse(layers):
        rows = [5, 0, 0, 1, 2, 3, 4]  # one repeated: in halves
        halves = layers[0][rows] * np.array([1, 0.5, 0.5, 1, 1, 1, 1], "float32")[:, None]
        return [tf.IndexedSlices(tf.constant(halves), tf.constant(rows), tf.constant([6, 5]))]

    make = functools.partial(tf_lbopt.VRAdam, 0.01, epsilon=1e-3)
    run = GrowingRun(
        make, weights=initial_weights(SHAPES)[:1],
        wrap=lambda optimizer: tf_lbopt.LossScaleOptimizer(optimizer, initial_scale=8.0),
    )  # fmt: skip
    for update in gradients:
        run.update([sparse([8.0 * layers[0]]) for layers in update])
    expected = reference(
        "vr_adam", initial_weights(SHAPES)[:1],
        [[layers[:1] for layers in update] for update in gradients], learning_rate=0.01,
        epsilon=1e-3,
    )  # fmt: skip
    assert_close(run.weights(), expected)
    bad = gradients_of([4])[0]
    bad[2][0][0, 0] = math.nan
    run.update([sparse(layers) for layers in bad])
    assert_close(run.weights(), expected)
    assert run.optimizer.skipped_updates.numpy() == 1
    assert run.optimizer.dynamic_scale.numpy() == 4.0
    run.optimizer.accumulation_steps = 3
    assert run.optimizer.accumulation_steps == run.inner.accumulation_steps == 3


def test_around_a_stock_optimizer():
    gradients = gradients_of(SIZES)

    def around(**arguments):
        return tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1), **arguments)

    around.statistics = tf_lbopt.VarianceReduced.statistics
    run = GrowingRun(around).updates(gradients)
    assert_close(
        run.weights(),
        reference("vr_sgd", initial_weights(SHAPES), gradients, learning_rate=0.1),
    )


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, dynamic], ids=["alone", "scaled"])
@pytest.mark.quick(wrap="dynamic")
def test_tf_keras_equals_keras(wrap):
    gradients = gradients_of(SIZES)
    tf_keras_case = next(case for case in TF_KERAS_CASES if case.name == "vr_lamb")
    expected = GrowingRun(KINDS["vr_lamb"]).updates(gradients).weights()
    run = TfKerasGrowingRun(tf_keras_case, wrap=wrap).updates(gradients)
    for one, other in zip(run.weights(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_in_force_from_the_next_update_on():
    first, second = gradients_of([3, 2])
    expected = [
        GrowingRun(tf_lbopt.SNGM, steps=3, learning_rate=0.1).updates(updates).weights()
        for updates in ([first], [first, second])
    ]
    run = GrowingRun(tf_lbopt.SNGM, steps=3, learning_rate=0.1)
    assert (run.inner.accumulation_steps, run.inner.gradient_accumulation_steps) == (3, 3)
    for number, layers in enumerate(first):
        run.micro_step([[tf.constant(gradient) for gradient in layers]])
        if number == 1:
            run.inner.accumulation_steps = 2
            assert (run.inner.accumulation_steps, run.inner.pending_micro_steps) == (2, 2)
    assert_close(run.weights(), expected[0])
    run.update(second)
    assert_close(run.weights(), expected[1])
    assert (run.inner.accumulation_steps, run.inner.gradient_accumulation_steps) == (2, 3)


def test_set_before_it_is_built():
    gradients = gradients_of([3])
    run = GrowingRun(tf_lbopt.SNGM, learning_rate=0.1, build=False).updates(gradients)
    assert run.optimizer.iterations.numpy() == 1
    assert run.inner.accumulation_steps == 3


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [by_checkpoint, by_own_variables], ids=lambda f: f.__name__)
@pytest.mark.parametrize("micro_steps", [0, 3])
@pytest.mark.quick(save="by_checkpoint", micro_steps=3)
def test_resumes_in_lockstep(save, micro_steps, tmp_path):
    """Also where another number was assigned in mid-accumulation, which is not in force yet."""
    case = KINDS["vr_lamb"]
    one, two, three = gradients_of([4, 8, 4])
    original = GrowingRun(case, 2, 1).update(one)
    original.inner.accumulation_steps = 4

    def micro_step(run, number):
        pair = two[2 * number : 2 * number + 2]
        run.micro_step([[tf.constant(gradient) for gradient in layers] for layers in pair])

    for number in range(micro_steps):
        micro_step(original, number)
    if micro_steps:
        original.inner.accumulation_steps = 2
    load = save(original, tmp_path)
    fresh = GrowingRun(case, 2, 1, weights=initial_weights(SHAPES, seed=99))
    load(fresh)
    assert fresh.inner.accumulation_steps == original.inner.accumulation_steps
    for run in (original, fresh):
        for number in range(micro_steps, 4):
            micro_step(run, number)
        assert run.optimizer.iterations.numpy() == 2
        run.update(three)
    assert_states_equal(original.state(), fresh.state())


@pytest.mark.parametrize("save", [by_checkpoint, by_own_variables], ids=lambda f: f.__name__)
def test_state_without_a_number_puts_the_argument_in_force(save, tmp_path, monkeypatch):
    """Of a former version, or where none was assigned."""
    make = functools.partial(tf_lbopt.SNGM, 0.1)
    former = GrowingRun(make, steps=2)
    for version in ("former", "present"):
        if version == "former":
            monkeypatch.setattr(saved_state, "_STEPS", "what is not read")
        load = save(former, tmp_path)
        monkeypatch.undo()
        run = GrowingRun(make, steps=3)
        run.inner.accumulation_steps = 5
        load(run)
        assert run.inner.accumulation_steps == 3


def test_a_number_that_was_assigned_is_in_force_whatever_the_argument():
    store = {}
    original = tf_lbopt.SNGM(0.1, gradient_accumulation_steps=1)
    original.build([keras.Variable([1.0])])
    original.accumulation_steps = 4
    original.save_own_variables(store)
    others = [{"gradient_accumulation_steps": 2}, {}]
    for arguments, expected in zip(others, [4, 1], strict=True):
        other = tf_lbopt.SNGM(0.1, **arguments)
        other.build([keras.Variable([1.0])])
        other.load_own_variables(store)
        assert other.accumulation_steps == expected


def test_without_accumulation_nothing_is_added():
    optimizer = tf_lbopt.SNGM(0.1)
    optimizer.build([keras.Variable([1.0])])
    assert [v.name for v in optimizer.variables][-1] != "pending_micro_steps"
    assert (optimizer.accumulation_steps, optimizer.pending_micro_steps) == (1, 0)


# -- what is refused -------------------------------------------------------------------------------


def built(make, *arguments, **options):
    optimizer = make(*arguments, **options)
    optimizer.build([keras.Variable([1.0, 2.0])])
    return optimizer


def assign(optimizer, steps):
    optimizer.accumulation_steps = steps


@pytest.mark.parametrize(
    ("make", "steps", "error", "match"),
    [
        (lambda: built(tf_lbopt.LAMB, gradient_accumulation_steps=2), 0, ValueError, ">= 1"),
        (lambda: built(tf_lbopt.LAMB, gradient_accumulation_steps=2), 2.0, TypeError, "integer"),
        (lambda: built(tf_lbopt.LAMB), 2, ValueError, "gradient_accumulation_steps=None"),
        (lambda: built(tf_lbopt.VRSGD, 0.1, gradient_accumulation_steps=2), 1, ValueError,
         "accumulation_steps=1"),
        (lambda: built(tf_lbopt.ExtrapSGD, 0.1, gradient_accumulation_steps=2), 4, ValueError,
         "not extrapolated"),
        (lambda: tf_lbopt.PostLocalSGD(keras.optimizers.SGD(0.1), start=1, period=2), 2, ValueError,
         "no PostLocalSGD"),
        (lambda: tf_lbopt.LossScaleOptimizer(keras.optimizers.SGD(0.1)), 2, ValueError,
         "around a SGD"),
    ],
)  # fmt: skip
def test_refused(make, steps, error, match):
    with pytest.raises(error, match=match):
        assign(make(), steps)


def test_steps_that_are_unrolled():
    optimizer = built(tf_lbopt.SNGM, 0.1, gradient_accumulation_steps=2)
    store = {}
    optimizer.accumulation_steps = 3
    optimizer.save_own_variables(store)
    with pytest.raises(ValueError, match="accumulation_steps=3"), optimizer.micro_step(0):
        pass
    optimizer.accumulation_steps = 2
    with optimizer.micro_step(0):
        pass
    for change in (lambda: assign(optimizer, 3), lambda: optimizer.load_own_variables(store)):
        with pytest.raises(ValueError, match=r"it is 2, a constant.*`micro_step`.*Received.*=3"):
            change()
        assert optimizer.accumulation_steps == 2
    one = built(tf_lbopt.SNGM, 0.1, gradient_accumulation_steps=1)
    with one.micro_step(0):
        one.apply([tf.ones([2])])
    assert one.iterations.numpy() == 1


def test_steps_that_were_traced_with_a_constant():
    gradients = gradients_of([2, 3])
    run = Run(tf_lbopt.SNGM, 1, 2, initial_weights(SHAPES), learning_rate=0.1).update(gradients[0])
    with pytest.raises(ValueError, match=r"traced in which it is 2.*let_batch_grow"):
        assign(run.inner, 3)
    assign(run.inner, 2)
    assert run.inner.let_batch_grow()
    assert not run.inner.let_batch_grow()
    eager = built(tf_lbopt.SNGM, 0.1, gradient_accumulation_steps=2)
    for steps in (2, 3):
        for _ in range(steps):
            eager.apply([tf.ones([2])])
        assign(eager, 3)
    assert eager.iterations.numpy() == 2
    with pytest.raises(ValueError, match="Received: gradient_accumulation_steps=None"):
        built(tf_lbopt.SNGM, 0.1).let_batch_grow()


def test_a_schedule_after_fit_without_one():
    """The training step is traced anew."""
    model = model_with(momentum(gradient_accumulation_steps=2))
    fit(model, 2)
    before = CountedDense.traces
    fit(model, 8, BatchSizeSchedule({0: 2, 2: 4}), first=2)
    assert CountedDense.traces == before + 1
    assert_close(model.get_weights(), by_hand([2, 2, 4], [0.01] * 3))


def test_in_a_function_that_is_traced():
    optimizer = built(tf_lbopt.SNGM, 0.1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="by Python"):
        tf.function(lambda: assign(optimizer, 3), autograph=False)()


@pytest.mark.filterwarnings("default")
def test_too_few_for_a_variance_are_warned_of():
    optimizer = built(tf_lbopt.VRSGD, 0.1, gradient_accumulation_steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign(optimizer, 16)
    with pytest.warns(UserWarning, match="7 sub-batches"):
        assign(optimizer, 7)


# -- callbacks -------------------------------------------------------------------------------------

BATCH = 4


class CountedDense(keras.layers.Dense):
    """Counts its traces."""

    traces = 0

    def call(self, x):
        type(self).traces += 1
        return super().call(x)


def data(batches):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(BATCH * batches, 3)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def model_with(optimizer, **arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input([3]), CountedDense(1)])
    model.compile(optimizer, "mse", **{"jit_compile": False, **arguments})
    return model


def fit(model, batches, *callbacks, first=0, **arguments):
    x, y = (array[BATCH * first :] for array in data(batches))
    return model.fit(
        x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks, **arguments
    ).history


def momentum(**arguments):
    return tf_lbopt.SGD(**{"learning_rate": 0.01, "momentum": 0.9, **arguments})


def by_hand(sizes, rates):
    """Training without accumulation, on batches of so many micro-batches."""
    model = model_with(momentum())
    x, y = data(sum(sizes))
    start = 0
    for size, rate in zip(sizes, rates, strict=True):
        model.optimizer.learning_rate = rate
        end = start + BATCH * size
        model.train_on_batch(x[start:end], y[start:end])
        start = end
    return model.get_weights()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("rule", "rates"),
    [
        (None, [0.01] * 5),
        ("linear", [0.01, 0.01, 0.02, 0.04, 0.04]),
        ("sqrt", [0.01, 0.01, 0.01 * 2**0.5, 0.02, 0.02]),
    ],
)
@pytest.mark.quick(compiled=False, rule=(None, "sqrt"))
@pytest.mark.quick(compiled=True, rule="linear")
def test_schedule_in_fit(compiled, rule, rates):
    model = model_with(momentum(gradient_accumulation_steps=1), jit_compile=compiled)
    before = CountedDense.traces
    history = fit(model, 12, BatchSizeSchedule({2: 2, 3: 4}, rule))
    assert CountedDense.traces == before + 1
    assert history["accumulation_steps"] == [4]
    assert_close(model.get_weights(), by_hand([1, 1, 2, 4, 4], rates))
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(rates[-1])


def test_schedule_with_steps_per_execution_and_loss_scale():
    """It is looked at between executions, and the rate changes between updates only."""
    optimizer = tf_lbopt.LossScaleOptimizer(momentum(gradient_accumulation_steps=2))
    model = model_with(optimizer, steps_per_execution=3)
    fit(model, 12, BatchSizeSchedule({1: 3}, "linear"))
    # After three micro-steps an update was due, but another one was under way.
    assert_close(model.get_weights(), by_hand([2, 2, 2, 3, 3], [0.01] * 3 + [0.015] * 2))


@pytest.mark.parametrize("how", ["model", "weights"])
def test_schedule_resumes_in_fit(how, tmp_path):
    """Bit for bit, in mid-accumulation and after a change of the rate."""
    schedule = functools.partial(BatchSizeSchedule, {2: 2, 3: 4}, "sqrt")
    whole = model_with(momentum(gradient_accumulation_steps=1))
    fit(whole, 12, schedule())
    first = model_with(momentum(gradient_accumulation_steps=1))
    fit(first, 6, schedule())
    assert first.optimizer.pending_micro_steps == 2
    if how == "model":
        first.save(tmp_path / "a.keras")
        custom = {"CountedDense": CountedDense}
        second = keras.models.load_model(tmp_path / "a.keras", custom_objects=custom)
    else:
        first.save_weights(tmp_path / "a.weights.h5")
        second = model_with(momentum(gradient_accumulation_steps=1))
        second.optimizer.build(second.trainable_variables)
        second.load_weights(tmp_path / "a.weights.h5")
    assert second.optimizer.accumulation_steps == 4
    fit(second, 12, schedule(), first=6)
    for one, other in zip(
        [*whole.get_weights(), *(v.numpy() for v in whole.optimizer.variables)],
        [*second.get_weights(), *(v.numpy() for v in second.optimizer.variables)],
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_warmup_doubles_where_the_noise_scale_allows_it():
    measured = types.SimpleNamespace(noise_scale=None, examples_per_update=None)
    steps = []

    class Measure(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.pending_micro_steps == 0:
                updates = int(self.model.optimizer.iterations.numpy())
                in_force = self.model.optimizer.accumulation_steps
                steps.append(in_force)
                measured.examples_per_update = BATCH * in_force
                measured.noise_scale = {2: None, 4: math.nan, 6: 7.9, 8: 8.0}.get(updates, 1e3)

    model = model_with(momentum(gradient_accumulation_steps=1))
    warmup = BatchSizeWarmup(measured, max_steps=3, every=2, learning_rate_rule="linear")
    fit(model, 20, Measure(), warmup)
    assert steps == [1] * 8 + [2, 2] + [3, 3]
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.03)
    assert [warmup.wanted(updates, 8) for updates in (100, 101)] == [8, 8]  # never fewer


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: momentum(), "gradient_accumulation_steps=None"),
        (lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "Received: SGD"),
        (lambda: momentum(gradient_accumulation_steps=1,
                          learning_rate=keras.optimizers.schedules.CosineDecay(0.1, 9)),
         "`learning_rate_rule` must be None"),
    ],
)  # fmt: skip
def test_optimizers_that_callbacks_refuse(make, match):
    model = model_with(make())
    with pytest.raises(ValueError, match=match):
        fit(model, 2, BatchSizeSchedule({0: 2}, "linear"))


MEASURED = types.SimpleNamespace(noise_scale=1.0, examples_per_update=1)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: BatchSizeSchedule([1, 2]), TypeError, "`schedule` must be a dictionary"),
        (lambda: BatchSizeSchedule({}), ValueError, "`schedule` must have an entry"),
        (lambda: BatchSizeSchedule({-1: 2}), ValueError, r"key of schedule.*>= 0.*-1"),
        (lambda: BatchSizeSchedule({1: 0}), ValueError, r"`schedule\[1\]`.*>= 1.*=0"),
        (lambda: BatchSizeSchedule({1: 2}, "cubic"), ValueError, "`learning_rate_rule`.*'cubic'"),
        (lambda: BatchSizeWarmup(3.0, 8), TypeError, "`noise_scale` must be a callback.*3.0"),
        (lambda: BatchSizeWarmup(MEASURED, 0), ValueError, "`max_steps`.*>= 1"),
        (lambda: BatchSizeWarmup(MEASURED, 8, every=0), ValueError, "`every`.*>= 1"),
        (lambda: BatchSizeWarmup(MEASURED, 8, fraction=0.0), ValueError, "`fraction`.*> 0"),
        (lambda: BatchSizeWarmup(MEASURED, 8, learning_rate_rule=1), TypeError,
         "`learning_rate_rule`"),
    ],
)  # fmt: skip
def test_arguments_that_callbacks_refuse(make, error, match):
    with pytest.raises(error, match=match):
        make()
