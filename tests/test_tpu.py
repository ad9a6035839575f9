"""Under TPUStrategy: everything traces, and a replica computes what it should.

Traced by the real `tf.distribute.TPUStrategy`, on devices that do not exist; run by threads, whose
sums stand for the TPU's. Nothing here is evidence about a TPU itself.
"""

import collections
import threading

import harness_tf_keras
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from harness import (
    CASES,
    Case,
    Run,
    assert_replicas_identical,
    assert_states_equal,
    clipped,
    graph_nodes,
    initial_weights,
    sub_batch_gradients,
)
from harness_recipes import SMALL_RESNET
from harness_tpu import TPURun, emulated, recipe_step, tpu_strategy_of, traced_by
from tensorflow.core.framework import types_pb2
from test_bert import SMALL as SMALL_BERT
from test_reference import CLIPS, assert_close

import tf_lbopt
import tf_lbopt.tf_keras
from benchmarks.references import reference
from official_recipes.bert import train as bert
from official_recipes.resnet50 import train as resnet50

LONG = pytest.mark.long
BY_NAME = {case.name: case for case in CASES}
KINDS = [BY_NAME[name] for name in ("lamb", "vr_lamb", "clars", "extrap_adam")]
LAMB, VR_LAMB, _, EXTRAP_ADAM = KINDS
TF_KERAS_VR_LAMB = next(case for case in harness_tf_keras.CASES if case.name == "vr_lamb")


class TPUTfKerasRun(TPURun, harness_tf_keras.TfKerasRun):
    """The same with tf_keras."""


def _sums(graph):
    """How many sums over the replicas a step has; it must have nothing that TPUs are bad at."""
    nodes = graph_nodes(graph)
    # XLA emulates divisions of 64-bit integers, and looks for repeated indices in a loop.
    of_int64 = [n.op for n in nodes if n.attr["T"].type == types_pb2.DT_INT64]
    assert not {"FloorMod", "FloorDiv", "Mod", "Div", "TruncateDiv"} & set(of_int64)
    assert not any(node.op.startswith("Unique") for node in nodes)
    return collections.Counter(node.op for node in nodes)["CrossReplicaSum"]


def _gradients(micro_steps, sparse):
    gradients = sub_batch_gradients(3, 2 * micro_steps)
    if sparse:
        for sub_batch in (layers for update in gradients for layers in update):
            rows = [0, 3, 3, 1] if sub_batch is gradients[0][0] else [5, 1, 3, 5]
            values = tf.constant(sub_batch[0][: len(rows)])
            sub_batch[0] = tf.IndexedSlices(values, tf.constant(rows), tf.constant([6, 5]))
    return gradients


def _reference(case, gradients, **arguments):
    dense = [[[np.array(tf.convert_to_tensor(g)) for g in s] for s in u] for u in gradients]
    return reference(case.name, initial_weights(), dense, **case.arguments, **arguments)


RUNS = [
    (run, case)
    for run, cases in ((TPURun, CASES), (TPUTfKerasRun, harness_tf_keras.CASES))
    for case in cases
]
ONE_OF_EACH = [(run, case) for run, case in RUNS if case in [*KINDS, TF_KERAS_VR_LAMB]]
OTHERS = [pair for pair in RUNS if pair not in ONE_OF_EACH]


def _name(value):
    return getattr(value, "name", None) or value.__name__


@pytest.mark.long
@pytest.mark.parametrize(("run", "case"), OTHERS, ids=_name)
def test_traces(run, case):
    for micro_steps in (1, 2):
        for sparse in (False, True):
            of_replica = _gradients(micro_steps, sparse)[0][0]
            function = run(case, 2, micro_steps)._step.get_concrete_function(of_replica)
            assert _sums(function) == _expected_sums(case)


def _expected_sums(case):
    # Two gradients; their deviations and a count for the variance, norms and a count for CLARS.
    return {"vr": 5, "clars": 4}.get(case.name.split("_")[0], 2)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize(
    ("run", "case"),
    [*ONE_OF_EACH, *(pytest.param(*pair, marks=LONG) for pair in OTHERS)],
    ids=_name,
)
@pytest.mark.quick(micro_steps=2, sparse=True)
@pytest.mark.quick(case="lamb", micro_steps=1, sparse=False)
def test_values(run, case, micro_steps, sparse):
    gradients = _gradients(micro_steps, sparse)
    run = run(case, 2, micro_steps).updates(gradients)
    assert_replicas_identical(run)
    assert_close(run.weights(), _reference(case, gradients))
    assert _sums(run.graph) == _expected_sums(case)


def test_other_strategies_stay_as_they_are():
    gradients = _gradients(1, sparse=False)
    TPURun(LAMB, 2).updates(gradients)
    assert not tf.distribute.has_strategy()
    assert_close(Run(LAMB, 2).updates(gradients).weights(), _reference(LAMB, gradients))


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.quick(clip=CLIPS[-1])
def test_clipping(clip):
    gradients = _gradients(1, sparse=False)
    run = TPURun(VR_LAMB, 2, **clip).updates(gradients)
    assert_close(
        run.weights(), _reference(VR_LAMB, gradients, clip=lambda layers: clipped(layers, **clip))
    )


WRAPPED = {
    "ours": (Case("sngm", tf_lbopt.SNGM, {"learning_rate": 0.1}), 1, lambda o: o),
    "scaled": (VR_LAMB, 1, lambda o: tf_lbopt.LossScaleOptimizer(o, initial_scale=1.0)),
    "scaled, accumulation": (VR_LAMB, 2, lambda o: tf_lbopt.LossScaleOptimizer(o, 1.0)),
    "scaled, extrapolated": (EXTRAP_ADAM, 1, lambda o: tf_lbopt.LossScaleOptimizer(o, 1.0)),
    "scaled, stock": (
        Case("adam", keras.optimizers.Adam, {"learning_rate": 0.1}),
        1,
        lambda o: tf_lbopt.LossScaleOptimizer(o, initial_scale=1.0),
    ),
}


@pytest.mark.parametrize("key", WRAPPED)
def test_overflow_on_one_replica(key):
    case, micro_steps, wrap = WRAPPED[key]
    run = TPURun(case, 2, micro_steps, wrap=wrap)
    gradients = _gradients(micro_steps, sparse=False)
    run.update(gradients[0])
    assert_replicas_identical(run)
    if case in KINDS:
        assert_close(run.weights(), _reference(case, gradients[:1]))
    before = run.state()
    gradients[1][-1][0][0, 0] = np.inf
    run.update(gradients[1])
    assert_replicas_identical(run)
    assert_states_equal(before, run.state())
    assert run.optimizer.skipped_updates.numpy() == 1
    if hasattr(run.optimizer, "dynamic_scale"):
        assert run.optimizer.dynamic_scale.numpy() == 0.5


def test_loss_scaling_of_tf_keras_is_refused():
    with tpu_strategy_of(2).scope(), pytest.raises(ValueError, match="TPUStrategy"):
        harness_tf_keras.dynamic(tf_lbopt.tf_keras.LAMB(0.1))


@pytest.mark.parametrize(
    ("wrapper", "name"), [(tf_lbopt.VarianceReduced, "vr_sgd"), (tf_lbopt.Accumulated, "sgd")]
)
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.quick(name="vr_sgd")
@pytest.mark.quick(micro_steps=2)
def test_around_a_stock_optimizer(micro_steps, wrapper, name):
    def around(**kwargs):
        return wrapper(keras.optimizers.SGD(0.1), **kwargs)

    gradients = _gradients(micro_steps, sparse=False)
    run = TPURun(around, 2, micro_steps).updates(gradients)
    case = Case(name, getattr(tf_lbopt, name.replace("_", "").upper()), {"learning_rate": 0.1})
    assert_close(run.weights(), _reference(case, gradients))


def test_average_of_the_weights():
    gradients = _gradients(1, sparse=False)
    arguments = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    run = TPURun(LAMB, 2, **arguments)
    first = run.update(gradients[0]).weights()
    run.update(gradients[1])
    assert _sums(run.graph) == 2
    assert_replicas_identical(run)
    second = _reference(LAMB, gradients[:2])
    assert_close(run.weights(), [(a + b) / 2 for a, b in zip(first, second, strict=True)])


# -- what differs from replica to replica ----------------------------------------------------------


class _Unpacked(TPURun):
    packed = False


@pytest.mark.parametrize(("case", "micro_steps"), [(VR_LAMB, 2), (EXTRAP_ADAM, 1)], ids=str)
@pytest.mark.quick(case="vr_lamb")
def test_state_of_the_replicas_is_saved(case, micro_steps, tmp_path):
    gradients = _gradients(micro_steps, sparse=False)

    def begin():
        run = _Unpacked(case, 2, micro_steps)
        saved = tf.train.Checkpoint(variables=run.variables, optimizer=run.optimizer)
        return run, saved

    run, saved = begin()
    run.update(gradients[0])
    rest = gradients[1] + gradients[2]
    run.micro_step(rest[:2])  # the first half of an update where there are micro-steps
    path = saved.write(str(tmp_path / "state"))
    other, to_be_restored = begin()
    to_be_restored.read(path).assert_existing_objects_matched()
    for each in (run, other):
        each.micro_step(rest[2:4])
    assert_replicas_identical(other)
    assert_states_equal(run.state(), other.state())
    assert_close(run.weights(), _reference(case, gradients[: 4 - micro_steps]))


def test_squared_norms_of_sub_batches():
    run = TPURun(lambda **k: tf_lbopt.SGD(0.1, **k), 2, 2)
    run.inner.watch_squared_norms(2)
    gradients = _gradients(2, sparse=False)
    run.updates(gradients)
    written, rows = run.inner.squared_norms_since(1)
    assert written == 3
    squares = np.square([[np.linalg.norm(g) for g in layers] for layers in gradients[2]])
    np.testing.assert_allclose(rows[1][: len(squares[0])], squares.mean(0), rtol=1e-5)
    assert rows[1][-2] == 4


def test_an_error_beside_the_weights_is_recovered_from():
    run = TPURun(EXTRAP_ADAM, 2).update(_gradients(1, sparse=False)[0])
    before = run.state()
    # A TPU's replicas are one program: none is put back before all have moved.
    moved = threading.Barrier(2, timeout=60)

    def fail():
        with run.inner.extrapolated(run.variables):
            moved.wait()
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        emulated(run.strategy, fail, [[], []])
    assert_replicas_identical(run)
    assert_states_equal(before, run.state())


# -- training functions ----------------------------------------------------------------------------


def _model(framework, base=None):
    inputs = framework.Input([3])
    x = framework.layers.BatchNormalization()(framework.layers.Dense(4)(inputs))
    return (base or framework.Model)(inputs, framework.layers.Dense(1, name="top")(x))


def _post_local(inner, start):
    return lambda: tf_lbopt.PostLocalSGD(inner(), start=start, period=2)


def _sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def _extrap_sgd():
    return tf_lbopt.ExtrapSGD(0.1)


def _per_example(**kwargs):
    return lambda: tf_lbopt.CLARS(0.1, norm_estimator="per_example", **kwargs)


def _vr_lamb():
    return tf_lbopt.VRLAMB(0.1, gradient_accumulation_steps=2)


def _accumulating_sgd():
    return tf_lbopt.SGD(0.1, gradient_accumulation_steps=2)


# The last is the number of sums: of six gradients (four with a frozen layer), of as many deviations
# and a count for the variance, of norms and a count for CLARS, of squared norms for the noise
# scale; of two averages of tf_keras's BatchNormalization. A local step has none.
FITS = {
    "accumulation": (keras, _vr_lamb, {}, 13),
    "several steps": (keras, _vr_lamb, {"compile": {"steps_per_execution": 2}}, 13),
    "extrapolation": (keras, _extrap_sgd, {}, 6),
    "parts": (keras, lambda: tf_lbopt.ExtrapAdam(0.1, sub_batches=2), {}, 6),
    "mixed precision": (keras, lambda: tf_lbopt.LossScaleOptimizer(_vr_lamb()), {}, 13),
    "per-example norms": (
        keras, _per_example(gradient_accumulation_steps=2),
        {"base": tf_lbopt.PerExampleNormsModel}, 8,
    ),
    "signal to noise": (
        keras, _vr_lamb, {"callback": lambda: tf_lbopt.callbacks.GradientSignalToNoise(2)}, 13
    ),
    "noise scale": (
        keras, _accumulating_sgd, {"callback": lambda: tf_lbopt.callbacks.GradientNoiseScale(2)}, 7
    ),
    "frozen layers": (
        keras, _vr_lamb, {"callback": lambda: tf_lbopt.callbacks.FreezeLayers("top", 1)}, 9
    ),
    "before local steps": (keras, _post_local(_sgd, 1), {}, 6),
    "before local steps, extrapolated": (keras, _post_local(_extrap_sgd, 1), {}, 6),
    "tf_keras accumulation": (
        tf_keras, lambda: tf_lbopt.tf_keras.VRLAMB(0.1, gradient_accumulation_steps=2), {}, 15
    ),
    "tf_keras extrapolation": (tf_keras, lambda: tf_lbopt.tf_keras.ExtrapSGD(0.1), {}, 8),
    "local step": (keras, _post_local(_sgd, 0), {}, 0),
    "local step, extrapolated": (keras, _post_local(_extrap_sgd, 0), {}, 0),
}  # fmt: skip
QUICK_FITS = (
    "accumulation",
    "extrapolation",
    "mixed precision",
    "per-example norms",
    "frozen layers",
    "before local steps",
    "tf_keras accumulation",
    "local step",
)


@pytest.mark.parametrize("key", FITS)
@pytest.mark.quick(key=QUICK_FITS)
def test_training_function_of_fit(key):
    framework, make, options, sums = FITS[key]
    strategy = tpu_strategy_of(2)
    with strategy.scope():
        model = _model(framework, options.get("base"))
        model.compile(make(), "mse", **options.get("compile", {}))
    model.make_train_function()
    if "callback" in options:
        callback = options["callback"]()
        callback.set_model(model)
        callback.on_train_begin()
        callback.on_epoch_begin(0)
    data = tf.data.Dataset.from_tensors((tf.ones([4, 3]), tf.ones([4, 1]))).repeat(2)
    assert _sums(traced_by(strategy, model.train_function, iter(data))) == sums


def test_local_steps():
    """Of w ← (1 − η c) w with another c on each replica, averaged after every second."""
    strategy = tpu_strategy_of(2)
    with strategy.scope():
        variable = keras.Variable([1.0, 2.0])
        optimizer = tf_lbopt.PostLocalSGD(keras.optimizers.SGD(0.1), start=0, period=2)
        optimizer.build([variable])

    def replica_step(factor):
        with optimizer.step(local=True):
            # A replica's share of the loss.
            optimizer.apply([tf.convert_to_tensor(variable) * factor / 2], [variable])

    factors = [[tf.constant(1.0)], [tf.constant(3.0)]]
    for period in range(2):
        for _ in range(2):
            assert optimizer.is_local
            emulated(strategy, replica_step, factors)
            np.testing.assert_allclose(variable.numpy(), np.array([1.0, 2.0]) * 0.65**period)
        # The mean of 0.9² and 0.7².
        assert _sums(traced_by(strategy, optimizer.end_update)) == 2
        emulated(strategy, lambda: optimizer._merge(optimizer._average_replicas), [[], []])
    copies = strategy.experimental_local_results(variable.value)
    for copy in copies:
        np.testing.assert_allclose(copy.numpy(), np.array([1.0, 2.0]) * 0.65**2, rtol=1e-6)


# -- recipes (DLRM's is in legacy_keras_dlrm.py) ---------------------------------------------------


def _images(params):
    return tf.zeros([4, *params.task.model.input_size]), tf.constant([0, 1, 2, 3])


def _sentences(params):
    length = params.task.train_data.seq_length
    ids = {"input_word_ids": 1, "input_mask": 1, "input_type_ids": 0}
    return {
        **{name: tf.fill([4, length], value) for name, value in ids.items()},
        "masked_lm_positions": tf.zeros([4, 5], tf.int32),
        "masked_lm_ids": tf.ones([4, 5], tf.int32),
        "masked_lm_weights": tf.ones([4, 5]),
        "next_sentence_labels": tf.zeros([4, 1], tf.int32),
    }


@pytest.mark.parametrize(
    ("program", "config", "batch", "kind", "sub_batches"),
    [
        pytest.param(resnet50, SMALL_RESNET, _images, "sngm", 1, id="resnet-sngm", marks=LONG),
        pytest.param(bert, SMALL_BERT, _sentences, "vr_lamb", 1, id="bert-vr_lamb"),
        pytest.param(resnet50, SMALL_RESNET, _images, "vr_lars", 2, id="resnet-vr", marks=LONG),
        pytest.param(resnet50, SMALL_RESNET, _images, "clars", 1, id="resnet-clars", marks=LONG),
        pytest.param(bert, SMALL_BERT, _sentences, "extrap_sgd", 2, id="bert-extrap", marks=LONG),
    ],
)
def test_steps_of_recipes(program, config, batch, kind, sub_batches, tmp_path):
    from official.core import task_factory

    from official_recipes.common import tfm_training

    program._register()
    (tmp_path / "small.yaml").write_text(config)
    options = tfm_training.Options(
        experiment=program.EXPERIMENT,
        config_file=(str(tmp_path / "small.yaml"),),
        params_override=f"trainer.optimizer_config.optimizer.type={kind}",
        mode="train",
        model_dir="unused",
        tpu=None,
        cpu_replicas=None,
        sub_batches=sub_batches,
    )
    params = tfm_training.parse_params(options)
    assert _sums(recipe_step(task_factory.get_task(params.task), params, batch(params)).graph) > 10
