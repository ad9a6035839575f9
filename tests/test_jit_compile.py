"""`jit_compile`: the update after the reductions, compiled by XLA to one program for each."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import (
    CASES,
    KINDS,
    Run,
    assert_replicas_identical,
    graph_nodes,
    sub_batch_gradients,
)
from harness_tf_keras import CASES as TF_KERAS_CASES
from harness_tf_keras import TfKerasRun

import tf_lbopt

SPLITS = [(1, 1), (1, 2), (2, 1), (2, 2)]
WRITES = ("ResourceApply", "AssignVariableOp", "AssignAdd", "ResourceScatter")


def around_adam(**kwargs):
    return tf_lbopt.VarianceReduced(keras.optimizers.Adam(0.01), **kwargs)


def poisoned(sub_batches, value=np.nan):
    """With a value that is not finite in the last sub-batch."""
    *first, last = sub_batches
    return [*first, [*last[:-1], np.full_like(last[-1], value)]]


def programs(function):
    """What XLA compiles of a concrete function, and which variables are written outside of that."""
    definition = function.graph.as_graph_def()
    bodies = {body.signature.name: body.node_def for body in definition.library.function}

    def walk(nodes):
        for node in nodes:
            if node.attr["_XlaMustCompile"].b:
                yield "program"
                continue
            yield node.op
            for attribute in node.attr.values():
                for called in (attribute.func, *attribute.list.func):
                    yield from walk(bodies.get(called.name, ()))

    operations = list(walk(definition.node))
    return operations.count("program"), [op for op in operations if op.startswith(WRITES)]


@pytest.mark.parametrize("run_class", [Run, TfKerasRun], ids=["keras", "tf_keras"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
@pytest.mark.parametrize(("replicas", "micro_steps"), SPLITS)
@pytest.mark.quick(name=KINDS, run_class=Run, replicas=2, micro_steps=2)
@pytest.mark.quick(name="vr_lamb", run_class=TfKerasRun, replicas=2, micro_steps=2)
def test_equals_the_update_that_is_not_compiled(name, replicas, micro_steps, run_class):
    cases = CASES if run_class is Run else TF_KERAS_CASES
    (case,) = [case for case in cases if case.name == name]
    gradients = list(sub_batch_gradients(3, sub_batches=replicas * micro_steps))
    gradients.insert(1, poisoned(gradients[1]))
    runs = [
        run_class(case, replicas, micro_steps, jit_compile=compiled).updates(gradients)
        for compiled in (True, False)
    ]
    for one, other in zip(*(run.weights() for run in runs), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert [run.inner.skipped_updates.numpy() for run in runs] == [1, 1]
    assert [run.inner.iterations.numpy() for run in runs] == [3, 3]
    assert_replicas_identical(runs[0])


@pytest.mark.parametrize("make", [*CASES, around_adam], ids=lambda make: getattr(make, "name", ""))
@pytest.mark.quick(make="vr_lamb")
def test_one_program_for_each_replica_writes_all(make):
    gradients = sub_batch_gradients(1, sub_batches=2)[0]
    found = {}
    for compiled in (True, False, "auto"):
        run = Run(make, 2, jit_compile=compiled).update(gradients)
        found[compiled] = programs(run.traced(gradients))
    assert found[True][0] == 2
    if not hasattr(run.inner, "extrapolated"):  # which moves the weights before
        assert found[True][1] == []
    assert found[False][0] == 0
    assert found[False][1] != []
    assert found["auto"] == found[False]  # on a CPU


def as_on_a_gpu(run):
    """Where "auto" compiles."""
    optimizer = run.inner
    optimizer.trained = dataclasses.replace(optimizer.trained, on_gpu=True)
    return run


def with_an_embedding(seed, sub_batches, updates, poisoned_at=None):
    """Gradients of a table, of two layers and of a second table; rows are repeated."""
    rng = np.random.default_rng(seed)
    size = (3,), (5, 2)

    def slices():
        rows = tf.constant(rng.integers(0, 6, 8), tf.int64)
        return tf.IndexedSlices(
            tf.constant(rng.normal(size=(8, 3)), tf.float32), rows, tf.constant([6, 3], tf.int64)
        )

    made = []
    for _ in range(updates):
        of_layers = [
            [rng.normal(size=s).astype("float32") for s in size] for _ in range(sub_batches)
        ]
        made.append([[slices(), *layers, slices()] for layers in of_layers])
    if poisoned_at == "dense":
        made[1][-1][2] = np.full_like(made[1][-1][2], np.nan)
    if poisoned_at == "sparse":
        old = made[1][-1][0]
        made[1][-1][0] = tf.IndexedSlices(old.values * np.nan, old.indices, old.dense_shape)
    return made


@pytest.mark.parametrize(
    "extra",
    [{}, {"clipnorm": 0.5}, {"clipvalue": 0.1}, {"global_clipnorm": 0.5}, {"use_ema": True}],
    ids=str,
)
@pytest.mark.parametrize("run_class", [Run, TfKerasRun], ids=["keras", "tf_keras"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
@pytest.mark.parametrize(("replicas", "micro_steps"), SPLITS)
@pytest.mark.parametrize("poisoned_at", ["dense", "sparse"])
@pytest.mark.quick(
    name="vr_lamb", run_class=Run, replicas=2, micro_steps=2, extra={}, poisoned_at="sparse"
)
@pytest.mark.quick(
    name="extrap_sgd", run_class=Run, replicas=2, micro_steps=1, extra={}, poisoned_at="sparse"
)
@pytest.mark.quick(
    name="lamb",
    run_class=Run,
    replicas=1,
    micro_steps=2,
    extra={"global_clipnorm": 0.5},
    poisoned_at="dense",
)
@pytest.mark.quick(
    name="vr_lamb", run_class=TfKerasRun, replicas=1, micro_steps=2, extra={}, poisoned_at="dense"
)
def test_dense_layers_are_compiled_beside_sparse_gradients(
    name, replicas, micro_steps, run_class, extra, poisoned_at
):
    cases = CASES if run_class is Run else TF_KERAS_CASES
    (case,) = [case for case in cases if case.name == name]
    weights = [np.random.default_rng(0).normal(size=s) for s in [(6, 3), (3,), (5, 2), (6, 3)]]
    gradients = with_an_embedding(3, replicas * micro_steps, 4, poisoned_at)

    def run(compiled):
        made = run_class(
            case, replicas, micro_steps, weights=weights, jit_compile=compiled, **extra
        )
        return as_on_a_gpu(made).updates(gradients)

    compiled, graph = run("auto"), run(False)
    for one, other in zip(compiled.copies(), graph.copies(), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert compiled.inner.skipped_updates.numpy() == 1
    assert compiled.inner.iterations.numpy() == 3
    assert_replicas_identical(compiled)
    made, _ = programs(compiled.traced(gradients[0][:replicas]))
    # One for the norms of the dense gradients, and one for their variables' update.
    assert made == (2 * replicas if compiled.inner.rule().separable else 0)


@pytest.mark.parametrize("compiled", [True, "auto"])
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.quick(micro_steps=2, compiled=True)
@pytest.mark.quick(micro_steps=1, compiled="auto")
def test_a_sparse_gradient_stays_sparse_unless_asked_for(compiled, micro_steps):
    weights = np.ones([50, 3], "float32")

    def run(compiled):
        made = as_on_a_gpu(
            Run(tf_lbopt.LARS, 2, micro_steps, [weights], learning_rate=0.1, jit_compile=compiled)
        )
        rows = [tf.constant([[1.0, 2, 3], [4, 5, 6], [r, 0, 1]]) for r in range(2 * micro_steps)]
        slices = [
            [tf.IndexedSlices(values, tf.constant([7, 3, 7]), tf.constant([50, 3]))]
            for values in rows
        ]
        programs_made, _ = programs(made.traced(slices[:2]))
        return programs_made, made.update(slices).update(slices).weights()[0]

    _, expected = run(False)
    programs_made, found = run(compiled)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert programs_made == (2 if compiled is True else 0)
    # The same optimizer's dense updates are compiled in both cases.
    dense = Run(tf_lbopt.LARS, 2, micro_steps, [weights], learning_rate=0.1, jit_compile=compiled)
    assert programs(as_on_a_gpu(dense).traced([[weights]] * 2))[0] == 2


@pytest.mark.parametrize("name", ["vr_sgd", "vr_lamb"])
@pytest.mark.parametrize(("replicas", "micro_steps"), SPLITS[1:])
@pytest.mark.quick(name="vr_lamb", replicas=1, micro_steps=2)
def test_variances_of_a_sparse_gradient_become_dense_with_it(name, replicas, micro_steps):
    (case,) = [case for case in CASES if case.name == name]
    weights = [np.random.default_rng(0).normal(size=s) for s in [(6, 3), (3,), (5, 2), (6, 3)]]
    gradients = with_an_embedding(3, replicas * micro_steps, 3)
    compiled, graph = (
        Run(case, replicas, micro_steps, weights=weights, jit_compile=jit).updates(gradients)
        for jit in (True, False)
    )
    for one, other in zip(compiled.weights(), graph.weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert compiled.inner.iterations.numpy() == 3


def test_loss_scale_halves_and_nothing_is_written_after_an_overflow():
    good = sub_batch_gradients(2, sub_batches=2)
    scaled = [[[8.0 * g for g in layers] for layers in update] for update in good]
    run = Run(
        tf_lbopt.VRLAMB,
        2,
        wrap=lambda optimizer: tf_lbopt.LossScaleOptimizer(optimizer, initial_scale=8.0),
        learning_rate=0.1,
        jit_compile=True,
    ).update(scaled[0])
    before = run.weights()
    run.update(poisoned(scaled[1], np.inf))
    assert run.optimizer.dynamic_scale.numpy() == 4.0
    assert run.optimizer.skipped_updates.numpy() == 1
    for one, other in zip(before, run.weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_in_fit_and_in_a_step_that_runs_eagerly_or_is_compiled_as_a_whole():
    x = np.random.default_rng(0).normal(size=[32, 4]).astype("float32")
    y = x.sum(axis=1, keepdims=True)

    def fitted(compiled, **arguments):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
        optimizer = tf_lbopt.VRMomentum(0.01, gradient_accumulation_steps=2, jit_compile=compiled)
        model.compile(optimizer, "mse", **arguments)
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
        return model.get_weights()

    expected = fitted(False, jit_compile=False)
    for arguments in ({"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}):
        for one, other in zip(fitted(True, **arguments), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False, "auto"])
def test_it_is_part_of_the_configuration(compiled):
    optimizer = tf_lbopt.VRLAMB(0.1, jit_compile=compiled)
    config = optimizer.get_config()
    assert config["jit_compile"] == compiled
    assert tf_lbopt.VRLAMB.from_config(config).get_config() == config


def test_graph_nodes_sees_programs():
    """That `programs` finds what it looks for."""
    step = tf.function(lambda x: tf.function(tf.exp, jit_compile=True)(x))
    concrete = step.get_concrete_function(tf.ones([2]))
    assert programs(concrete) == (1, [])
    assert any(node.op == "Exp" for node in graph_nodes(concrete))
