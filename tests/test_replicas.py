"""What holds on every replica: equal bits, sparse as dense, one packed reduction, no retracing."""

import contextlib
import json
import pathlib
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from forked_python import python
from harness import (
    CASES,
    KINDS,
    THREE_SHAPES,
    Run,
    assert_replicas_identical,
    clipped,
    graph_nodes,
    initial_weights,
    sub_batch_gradients,
)

import tf_lbopt
from benchmarks.references import reference


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(2, 2), (4, 1), (8, 1)])
@pytest.mark.quick(case=KINDS, replicas=2)
def test_replicas_stay_bit_identical(case, replicas, micro_steps):
    shapes = [(130, 140), (7,)]  # one beyond the size where norms take the other branch
    gradients = sub_batch_gradients(4, sub_batches=replicas * micro_steps, shapes=shapes)
    run = Run(case, replicas, micro_steps, weights=initial_weights(shapes), use_ema=True)
    for sub_batches in gradients:
        run.update(sub_batches)
        assert_replicas_identical(run)


def _slices(rng, rows, size, width):
    indices = rng.integers(0, rows, size=size).astype("int64")
    values = rng.normal(size=(size, width)).astype("float32")
    return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([rows, width]))


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 1), (1, 3), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("extra", [{}, {"clipnorm": 0.5}, {"clipvalue": 0.1}], ids=str)
@pytest.mark.quick(case=("vr_lamb", "clars"), replicas=2, micro_steps=2, extra={})
@pytest.mark.quick(case="lamb", micro_steps=3, extra={})
@pytest.mark.quick(case="lamb", replicas=2, micro_steps=1, extra={"clipnorm": 0.5})
def test_sparse_equals_dense(case, replicas, micro_steps, extra):
    """Over five updates, with repeated indices in one replica and between replicas."""
    if extra and (replicas, micro_steps) not in [(2, 1), (4, 1)]:
        pytest.skip("clipping is one code path for all splits")
    rng = np.random.default_rng(3)
    weights = initial_weights([(6, 3), (4,)])
    sparse, dense = [], []
    for _ in range(5):
        update = [
            [_slices(rng, 6, 8, 3), tf.constant(rng.normal(size=4), tf.float32)]
            for _ in range(replicas * micro_steps)
        ]
        sparse.append(update)
        dense.append([[tf.convert_to_tensor(g).numpy() for g in layers] for layers in update])
    one = Run(case, replicas, micro_steps, weights=weights, **extra).updates(sparse)
    expected = reference(
        case.name,
        weights,
        dense,
        clip=lambda layers: clipped(layers, **extra),
        **case.arguments,
    )
    for a, b in zip(one.weights(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert np.abs(one.weights()[0] - weights[0]).max() > 1e-3


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(case=("lamb", "vr_lamb", "clars"), replicas=1)
def test_dense_gradients_after_sparse_ones_in_an_update(case, replicas, graph_optimizer):
    """A table that is looked up in one training step, and multiplied by in another."""
    rng = np.random.default_rng(3)
    weights = initial_weights([(6, 3)])
    sparse, dense = [], []
    for _ in range(2):
        steps = [
            [_slices(rng, 6, 2, 3) for _ in range(replicas)],
            [tf.constant(rng.normal(size=(6, 3)), tf.float32) for _ in range(replicas)],
            [_slices(rng, 6, 2, 3) for _ in range(replicas)],
        ]
        sparse.append([[gradient] for step in steps for gradient in step])
        dense.append([[tf.convert_to_tensor(g).numpy()] for step in steps for g in step])
    one = Run(case, replicas, 3, weights=weights).updates(sparse)
    other = Run(case, replicas, 3, weights=weights).updates(dense)
    np.testing.assert_allclose(one.weights()[0], other.weights()[0], rtol=2e-5, atol=1e-6)
    assert np.abs(one.weights()[0] - weights[0]).max() > 1e-3


class MissingRun(Run):
    """Variable 1 has no gradient."""

    def _apply(self, gradients):
        self.optimizer.apply([gradients[0], None, gradients[2]], self.variables)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 1), (2, 2)])
@pytest.mark.quick(case=("vr_lamb", "clars"), replicas=2)
def test_missing_gradients_leave_the_variable_alone(case, replicas, micro_steps):
    first, other, last = initial_weights(THREE_SHAPES)
    gradients = sub_batch_gradients(3, replicas * micro_steps, THREE_SHAPES)
    run = MissingRun(case, replicas, micro_steps, [first, other, last])
    with pytest.warns(UserWarning, match="layer_1"):
        run.updates(gradients)
    np.testing.assert_array_equal(run.weights()[1], other)
    of_two = [[[g, h] for g, _, h in update] for update in gradients]
    without = Run(case, replicas, micro_steps, [first, last]).updates(of_two)
    for got, want in zip([run.weights()[0], run.weights()[2]], without.weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 1), (2, 2)])
@pytest.mark.quick(case="vr_lamb", replicas=2)
def test_no_retracing(case, replicas, micro_steps):
    run = Run(case, replicas, micro_steps, learning_rate=0.1)
    run.updates(sub_batch_gradients(2, sub_batches=replicas * micro_steps))
    traces = run.traces
    run.optimizer.learning_rate = 0.05
    run.updates(sub_batch_gradients(3, sub_batches=replicas * micro_steps))
    assert run.traces == traces


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.quick(case=KINDS, micro_steps=2)
@pytest.mark.quick(case="vr_lamb")
def test_one_packed_reduction_per_update(case, micro_steps):
    function = Run(case, 2, micro_steps).traced(sub_batch_gradients(1, sub_batches=2)[0])
    reductions = 2 if "variance" in case.cls.statistics else 1
    found = [n for n in graph_nodes(function) if n.op.startswith("CollectiveReduce")]
    assert len(found) == 2 * reductions  # on two replicas


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.quick(case="vr_lamb", micro_steps=2)
def test_unbuilt_in_a_replica_context(case, micro_steps):
    """A custom loop that never calls `build`: the variables are made in the first trace."""
    gradients = sub_batch_gradients(3, sub_batches=2 * micro_steps)
    late = Run(case, 2, micro_steps, build=False).updates(gradients)
    early = Run(case, 2, micro_steps).updates(gradients)
    for a, b in zip(late.weights(), early.weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (late.traces, early.traces) == (2, 2)  # once for each replica


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("sngm", "vr_lamb", "clars")], ids=repr
)
@pytest.mark.quick(case="vr_lamb")
def test_a_layer_that_is_trained_later(case):
    """Its accumulators are made in the second trace, where a function may have no new variables."""
    gradients = sub_batch_gradients(4, sub_batches=4)
    fewer = [[layers[:1] for layers in update] for update in gradients[:2]]

    def train(function):
        run = Run(case, 2, 2, function=function)
        run._apply = lambda local: run.optimizer.apply(local, run.variables[: len(local)])
        run.updates(fewer)
        np.testing.assert_array_equal(run.weights()[1], initial_weights()[1])
        return run.updates(gradients[2:])

    traced, eager = train(tf.function), train(lambda f: f)
    assert traced.traces == 2 * 2
    assert np.abs(traced.weights()[1] - initial_weights()[1]).max() > 1e-4
    for got, want in zip(traced.weights(), eager.weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case="vr_lamb")
def test_eager(case):
    gradients = sub_batch_gradients(2, sub_batches=4)
    eager = Run(case, 2, 2, function=lambda f: f).updates(gradients)
    traced = Run(case, 2, 2).updates(gradients)
    for a, b in zip(eager.weights(), traced.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.quick(case=KINDS, micro_steps=2)
def test_jit_compiled_on_one_device(case, micro_steps):
    gradients = sub_batch_gradients(3, sub_batches=micro_steps)
    jit = Run(case, 1, micro_steps, function=lambda f: tf.function(f, jit_compile=True))
    jit.updates(gradients)
    plain = Run(case, 1, micro_steps).updates(gradients)
    for a, b in zip(jit.weights(), plain.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case=("lamb", "vr_lamb"))
def test_jit_compiled_sparse_gradients(case):
    rng = np.random.default_rng(0)
    weights = initial_weights([(6, 3), (4,)])
    gradients = [
        [[_slices(rng, 6, 8, 3), tf.constant(rng.normal(size=4), tf.float32)] for _ in range(2)]
        for _ in range(3)
    ]
    run = {"weights": weights, "micro_steps": 2}
    jit = Run(case, **run, function=lambda f: tf.function(f, jit_compile=True)).updates(gradients)
    plain = Run(case, **run).updates(gradients)
    for a, b in zip(jit.weights(), plain.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.quick(replicas=2)
def test_average_of_weights_once_per_update(replicas):
    """`use_ema` and its overwriting, by update and not by micro-step."""
    micro_steps = 4 // replicas
    gradients = sub_batch_gradients(5, sub_batches=4)
    plain = Run(tf_lbopt.SNGM, replicas, micro_steps, learning_rate=0.1)
    averaged = Run(
        tf_lbopt.SNGM, replicas, micro_steps, learning_rate=0.1, use_ema=True, ema_momentum=0.5
    )
    expected = None
    for update in gradients:
        plain.update(update)
        averaged.update(update)
        now = plain.weights()
        expected = (
            now
            if expected is None
            else [0.5 * e + 0.5 * w for e, w in zip(expected, now, strict=True)]
        )
    for a, b in zip(averaged.weights(), plain.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    averaged.optimizer.finalize_variable_values(averaged.variables)
    for a, b in zip(averaged.weights(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert_replicas_identical(averaged)

    overwriting = Run(
        tf_lbopt.SNGM,
        replicas,
        micro_steps,
        learning_rate=0.1,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=3,
    )
    overwriting.updates(gradients[:2])
    plain.restart().updates(gradients[:2])
    np.testing.assert_allclose(overwriting.weights()[0], plain.weights()[0], rtol=1e-6)
    before = overwriting.weights()
    overwriting.update(gradients[2])
    plain.update(gradients[2])
    assert np.abs(overwriting.weights()[0] - plain.weights()[0]).max() > 1e-3
    assert np.abs(overwriting.weights()[0] - before[0]).max() > 1e-3


def test_constraints_hold_on_every_replica():
    strategy = strategy_of(2)
    with strategy.scope():
        variable = keras.Variable(np.ones(4, "float32"), name="constrained")
        variable.constraint = keras.constraints.NonNeg()
        optimizer = tf_lbopt.SNGM(5.0)

    @tf.function
    def step():
        strategy.run(lambda: optimizer.apply([tf.constant([1.0, -1.0, 2.0, 0.0])], [variable]))

    step()
    for copy in strategy.experimental_local_results(variable.value):
        assert copy.numpy().min() == 0.0
        assert copy.numpy().max() > 1.0


def test_wrong_strategy_and_wrong_context_say_so():
    with strategy_of(2).scope():
        variable = keras.Variable(np.ones(4, "float32"), name="mirrored")
    with pytest.raises(ValueError, match=r"strategy\.scope\(\).*Received: the variable mirrored"):
        tf_lbopt.SNGM(0.1).build([variable])
    with strategy_of(2).scope():
        optimizer = tf_lbopt.SNGM(0.1)
        optimizer.build([variable])
        with pytest.raises(ValueError, match="replica context"):
            optimizer.apply([tf.ones([4])], [variable])


@pytest.mark.parametrize("function", [tf.function, lambda f: f], ids=["traced", "eager"])
def test_one_tensor_for_all_replicas_is_summed_too(function):
    """A captured constant is the same object on every replica."""
    strategy = strategy_of(2)
    gradient = tf.constant([0.25, 0.5])
    slices = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([1]), tf.constant([3, 2]))
    with strategy.scope():
        variables = [keras.Variable(np.zeros(2, "float32")), keras.Variable(np.zeros((3, 2)))]
        optimizer = tf_lbopt.LARS(1.0, momentum=0.0)

    @function
    def step():
        strategy.run(lambda: optimizer.apply([gradient, slices], variables))

    step()
    np.testing.assert_allclose(variables[0].numpy(), [-0.5, -1.0])
    np.testing.assert_allclose(variables[1].numpy(), [[0, 0], [-2, -2], [0, 0]])


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(
    "shape", [None, [6, 3], tf.constant([6, 3])], ids=["none", "list", "tensor"]
)
@pytest.mark.quick(case=KINDS)
def test_sparse_gradients_with_any_shape_argument(case, shape):
    weights = initial_weights([(6, 3)])
    slices = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([1, 1]), shape)
    runs = []
    for gradient in (slices, tf.scatter_nd([[1], [1]], tf.ones([2, 3]), [6, 3])):
        run = Run(case, 1, 2, weights=weights, function=lambda f: f)
        for factor in (1.0, 3.0):
            scaled = (
                tf.IndexedSlices(factor * gradient.values, gradient.indices, shape)
                if isinstance(gradient, tf.IndexedSlices)
                else factor * gradient
            )
            run.micro_step([[scaled]])
        runs.append(run.weights()[0])
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf_lbopt.LAMB(0.5),
        lambda: tf_lbopt.VRSGD(0.5),
        lambda: tf_lbopt.LossScaleOptimizer(keras.optimizers.SGD(0.5)),
    ],
)
@pytest.mark.parametrize("function", [tf.function, lambda f: f], ids=["traced", "eager"])
def test_outside_of_run_says_so(make, function):
    with strategy_of(2).scope():
        variable = keras.Variable(np.ones(4, "float32"))
        optimizer = make()
        optimizer.build([variable])
    step = function(lambda: optimizer.apply([tf.ones([4])], [variable]))
    with pytest.raises(ValueError, match=r"outside of `strategy\.run`"):
        step()


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf_lbopt.VRSGD(1.0),
        lambda: tf_lbopt.CLARS(1.0),
        lambda: tf_lbopt.ExtrapSGD(1.0),
        lambda: tf_lbopt.LARS(1.0, gradient_accumulation_steps=2),
    ],
)
def test_one_copy_for_several_replicas_is_refused(make):
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:1", "CPU:2"], "CPU:0")
    with strategy.scope(), pytest.raises(ValueError, match="Received: CentralStorageStrategy"):
        make()


def test_parameter_servers_are_refused_where_replicas_have_state():
    # ParameterServerStrategy counts its workers as one replica.
    program = pathlib.Path(__file__).with_name("parameter_server_run.py")
    result = subprocess.run([*python(), str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    said = json.loads(result.stdout.splitlines()[-1])
    assert len(said) == 12
    for name, error in said.items():
        if "mean gradient" in name:
            assert error is None
        else:
            assert "Received: ParameterServerStrategy" in error, name


def test_one_copy_for_several_replicas_is_enough_for_the_mean_gradient():
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:1", "CPU:2"], "CPU:0")
    with strategy.scope():
        variable = keras.Variable([1.0])
        optimizer = tf_lbopt.LARS(1.0, momentum=0.0, exclude_from_layer_adaptation=[".*"])
        optimizer.build([variable])

    def on_replica():
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        optimizer.apply([tf.where(number == 0, [1.0], [100.0]) / 2], [variable])

    tf.function(lambda: strategy.run(on_replica))()
    np.testing.assert_allclose(variable.numpy(), [-49.5])


@pytest.mark.parametrize("function", [tf.function, lambda f: f], ids=["traced", "eager"])
@pytest.mark.parametrize("make", [tf_lbopt.LARS, tf_lbopt.VRSGD])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(make="LARS", replicas=2, function=tf.function)
@pytest.mark.quick(make="VRSGD", replicas=1)
def test_a_gradient_that_is_missing_in_mid_update_is_told(make, replicas, function):
    strategy = strategy_of(replicas)
    with strategy.scope():
        trunk, one, other = (keras.Variable(np.ones(2), name=n) for n in ("trunk", "one", "other"))
        optimizer = make(0.1, gradient_accumulation_steps=3)
        optimizer.build([trunk, one, other])

    def step_of(*variables):
        pairs = [(tf.constant([1.0, 2.0]), variable) for variable in variables]
        return function(lambda: strategy.run(lambda: optimizer.apply_gradients(pairs)))

    first, second, both = step_of(trunk, one), step_of(trunk, other), step_of(trunk, one, other)
    for _ in range(3):  # no gradient in the whole update is as good as ever
        first()
    first()
    both()  # a first gradient in mid-update, too
    both()
    assert optimizer.iterations.numpy() == 2
    first()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Received: none for one"):
        second()


@pytest.mark.parametrize("make", [tf_lbopt.LARS, tf_lbopt.VRSGD])
def test_a_gradient_that_is_missing_in_mid_update_discards_a_compiled_one(make):
    one, other = (keras.Variable(np.ones(2), name=n) for n in ("one", "other"))
    optimizer = make(0.1, gradient_accumulation_steps=2)
    optimizer.build([one, other])

    def step_of(*variables):
        pairs = [(tf.constant([1.0, 2.0]), variable) for variable in variables]
        return tf.function(lambda: optimizer.apply_gradients(pairs), jit_compile=True)

    both, first = step_of(one, other), step_of(one)
    both()
    first()
    assert (optimizer.iterations.numpy(), optimizer.skipped_updates.numpy()) == (0, 1)
    np.testing.assert_array_equal([one.numpy(), other.numpy()], np.ones([2, 2]))
    first()
    both()  # nothing is left of the update before
    assert (optimizer.iterations.numpy(), optimizer.skipped_updates.numpy()) == (1, 1)
    assert (one.numpy() < 1).all()


def test_a_layer_that_is_frozen_in_mid_update():
    one, other = (keras.Variable(np.ones(2), name=n) for n in ("one", "other"))
    optimizer = tf_lbopt.VRSGD(0.1, gradient_accumulation_steps=2)
    optimizer.apply([tf.constant([1.0, 2.0])] * 2, [one, other])
    other.trainable = False
    optimizer.apply([tf.constant([1.0, 3.0])], [one])
    assert optimizer.iterations.numpy() == 1
    np.testing.assert_array_equal(other.numpy(), np.ones(2))


@pytest.mark.parametrize("name", ["SNGM", "LARS", "LAMB", "CLARS"])
def test_a_gradient_that_is_zero_when_compiled(name):
    weights = []
    for jit_compile in (False, True):
        moved, still = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 1.0])
        optimizer = getattr(tf_lbopt, name)(0.1)
        optimizer.build([moved, still])

        step = tf.function(
            lambda gradient, optimizer=optimizer: optimizer.apply([gradient, tf.zeros([2])]),
            jit_compile=jit_compile,
        )
        for _ in range(2):
            step(tf.constant([3.0, 4.0]))
        assert (optimizer.iterations.numpy(), optimizer.skipped_updates.numpy()) == (2, 0)
        weights.append([moved.numpy(), still.numpy()])
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-6)
    assert weights[0][0][0] < 1.0


def test_accumulation_by_rows_can_not_be_compiled_later():
    table = keras.Variable(np.ones((6, 2)))
    optimizer = tf_lbopt.VRSGD(0.1, gradient_accumulation_steps=2)
    optimizer.build([table])

    def step(rows):
        optimizer.apply([tf.IndexedSlices(rows, tf.constant([0, 1]), tf.constant([6, 2]))], [table])

    step(tf.ones([2, 2]))
    with pytest.raises(ValueError, match="jit_compile=True"):
        tf.function(step, jit_compile=True)(tf.ones([2, 2]))


def test_averages_of_the_layers_that_are_not_frozen():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    model = keras.Sequential([keras.Input([3])])
    for name in "abc":
        model.add(keras.layers.Dense(3, use_bias=False, name=name))
    optimizer = tf_lbopt.LAMB(0.01, use_ema=True, ema_momentum=0.9)
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(x, x, batch_size=4, epochs=2, verbose=0)
    model.layers[0].trainable = False
    frozen = model.get_weights()[0]
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(x, x, batch_size=4, verbose=0)
    averages = [v.numpy() for v in optimizer._model_variables_moving_average]
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), frozen)
    for layer, average in zip(model.layers[1:], averages[1:], strict=True):
        np.testing.assert_array_equal(layer.kernel.numpy(), average)


@pytest.mark.parametrize("name", ["LARS", "CLARS", "VRLARS", "LAMB", "VRLAMB", "SNGM"])
@pytest.mark.parametrize("magnitude", [1e-30, 2e-38, 1e-44])
def test_gradients_next_to_nothing(name, magnitude):
    variable = keras.Variable(np.full(3, 10.0, np.float32))
    accumulation = {"gradient_accumulation_steps": 2} if name.startswith("VR") else {}
    optimizer = getattr(tf_lbopt, name)(0.1, **accumulation)
    for gradient in ([1.0, -1.0, 0.0], [3.0, -1.0, 0.0])[: 2 if accumulation else 1]:
        optimizer.apply([tf.constant(magnitude, tf.float32) * gradient], [variable])
    assert optimizer.iterations.numpy() == 1
    first, second, third = variable.numpy()
    assert third == 10.0
    assert 0 <= 10.0 - first < 2.0
    assert 0 <= second - 10.0 < 2.0


@pytest.mark.parametrize("size", [3, 1 << 15])
@pytest.mark.parametrize("name", ["LAMB", "VRLAMB", "VRAdam", "ExtrapAdam"])
def test_epsilon_of_zero_and_no_gradient(name, size):
    variable = keras.Variable(np.ones(size, np.float32))
    accumulation = {"gradient_accumulation_steps": 2} if name.startswith("VR") else {}
    optimizer = getattr(tf_lbopt, name)(0.1, epsilon=0.0, **accumulation)
    optimizer.build([variable])
    gradient = np.zeros(size, np.float32)
    gradient[1:] = 1.0
    for step in range(accumulation.get("gradient_accumulation_steps", 1)):
        extrapolated = getattr(optimizer, "extrapolated", lambda _: contextlib.nullcontext())
        with extrapolated([variable]):
            optimizer.apply([tf.constant(gradient * (1 + step))], [variable])
    assert optimizer.iterations.numpy() == 1
    assert variable.numpy()[0] == 1.0
    assert (variable.numpy()[1:] < 1.0).all()
    assert np.isfinite(variable.numpy()).all()
