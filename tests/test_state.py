"""Configuration and saved state: a loaded optimizer goes on in lockstep, bit for bit."""

import functools
import gc
import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from harness import CASES, KINDS, Run, assert_states_equal, initial_weights, sub_batch_gradients
from harness_state import (
    assert_checkpoint_without_accumulation_begins,
    by_assignment,
    by_checkpoint,
    by_loading,
    by_own_variables,
    by_restoring,
    by_set_weights,
    checkpoint_of,
)

import tf_lbopt

pytestmark = pytest.mark.usefixtures("determinism")
(SNGM,) = [case for case in CASES if case.name == "sngm"]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_config_round_trip(case):
    optimizer = case(
        weight_decay=0.25,
        clipnorm=2.0,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=7,
        gradient_accumulation_steps=3,
        loss_scale_factor=4.0,
        exclude_from_weight_decay=["bias$"],
        name="mine",
    )
    config = optimizer.get_config()
    restored = case.cls.from_config(json.loads(json.dumps(config)))
    assert restored.get_config() == config
    assert config["gradient_accumulation_steps"] == 3
    assert config["exclude_from_weight_decay"] == ["bias$"]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_serialization_with_a_schedule(case):
    schedule = tf_lbopt.schedules.Warmup(keras.optimizers.schedules.CosineDecay(0.3, 10), 2)
    for wrap in (lambda o: o, lambda o: tf_lbopt.LossScaleOptimizer(o, 4.0, 7)):
        optimizer = wrap(case(learning_rate=schedule))
        text = json.dumps(keras.saving.serialize_keras_object(optimizer))
        restored = keras.saving.deserialize_keras_object(json.loads(text))
        assert type(restored) is type(optimizer)
        assert restored.get_config() == optimizer.get_config()


def _lockstep(case, replicas, micro_steps, save_after, save, tmp_path, wrap=lambda o: o):
    """Runs 6 updates (and some micro-steps), saves, loads into fresh objects, runs 6 more."""
    total = sub_batch_gradients(8, sub_batches=replicas * micro_steps)
    micro_batches = [
        update[m * replicas : (m + 1) * replicas]
        for i in range(12)
        for update in [total[i % len(total)]]
        for m in range(micro_steps)
    ]
    arguments = {"use_ema": True, "wrap": wrap}
    original = Run(case, replicas, micro_steps, **arguments)
    for batch in micro_batches[:save_after]:
        original.micro_step([[tf.constant(g) for g in layers] for layers in batch])
    load = save(original, tmp_path)
    fresh = Run(case, replicas, micro_steps, weights=initial_weights(seed=99), **arguments)
    load(fresh)
    assert_states_equal(original.state(), fresh.state())
    for batch in micro_batches[save_after:]:
        for run in (original, fresh):
            run.micro_step([[tf.constant(g) for g in layers] for layers in batch])
    assert_states_equal(original.state(), fresh.state())
    assert original.optimizer.iterations.numpy() == 12


SAVERS = [by_checkpoint, by_own_variables]


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("save", SAVERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("replicas", "micro_steps", "save_after"), [(1, 1, 6), (2, 1, 6), (1, 3, 20), (2, 2, 13)]
)
@pytest.mark.quick(
    case=("vr_lamb", "clars", "extrap_sgd"), replicas=2, micro_steps=2, save="by_checkpoint"
)
@pytest.mark.quick(case="lamb", replicas=1, micro_steps=3)
def test_lockstep_after_loading(case, save, replicas, micro_steps, save_after, tmp_path):
    """The last two save in mid-accumulation, where replicas have different sums."""
    _lockstep(case, replicas, micro_steps, save_after, save, tmp_path)


@pytest.mark.parametrize("save", SAVERS, ids=lambda f: f.__name__)
@pytest.mark.quick(save="by_checkpoint")
def test_lockstep_under_loss_scaling(save, tmp_path):
    _lockstep(
        SNGM,
        2,
        2,
        13,
        save,
        tmp_path,
        wrap=lambda o: tf_lbopt.LossScaleOptimizer(o, initial_scale=2.0),
    )


def test_restore_before_build(tmp_path):
    """`restore` on a fresh optimizer whose variables do not exist yet."""
    gradients = sub_batch_gradients(2, sub_batches=4)
    original = Run(SNGM, 2, 2).update(gradients[0])
    original.micro_step([[tf.constant(g) for g in layers] for layers in gradients[1][:2]])
    path = checkpoint_of(original).save(str(tmp_path / "checkpoint"))
    fresh = Run(SNGM, 2, 2, weights=initial_weights(seed=99), build=False)
    checkpoint_of(fresh).restore(path)
    for run in (original, fresh):
        run.micro_step([[tf.constant(g) for g in layers] for layers in gradients[1][2:]])
    assert_states_equal(original.state(), fresh.state())


def _without_pending(state):
    return {key: value for key, value in state.items() if "pending" not in key}


@pytest.mark.parametrize("save", SAVERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("others", [1, 4])
@pytest.mark.quick(save="by_own_variables", others=1)
def test_other_number_of_replicas_starts_the_accumulators_empty(save, others, tmp_path, caplog):
    gradients = sub_batch_gradients(3, sub_batches=4)
    original = Run(SNGM, 2, 2).update(gradients[0])
    updated = _without_pending(original.state())
    original.micro_step([[tf.constant(g) for g in layers] for layers in gradients[1][:2]])
    load = save(original, tmp_path)
    fresh = Run(SNGM, others, 2, weights=initial_weights(seed=99))
    # Something is in the accumulators before; none of it may stay.
    fresh.micro_step([[tf.constant(g) for g in layers] for layers in gradients[2][:others]])
    with caplog.at_level("WARNING"):
        load(fresh)
    assert "on 2 replicas" in caplog.text
    assert "start empty" in caplog.text
    assert_states_equal(updated, _without_pending(fresh.state()))
    another = sub_batch_gradients(1, sub_batches=2 * others, seed=7)[0]
    fresh.update(another)
    reference = Run(SNGM, others, 2)
    for v, w in zip(
        [*reference.variables, *reference.inner.variables],
        [*original.variables, *original.inner.variables],
        strict=True,
    ):
        v.assign(w.numpy())
    assert_states_equal(reference.update(another).state(), fresh.state())


def test_between_updates_nothing_is_stored_for_the_accumulators(caplog):
    run = Run(SNGM, 2, 2).update(sub_batch_gradients(1, sub_batches=4)[0])
    store = {}
    run.optimizer.save_own_variables(store)
    assert not any(key.startswith("accumulation") for key in store)
    other = Run(SNGM, 4, 2)
    with caplog.at_level("WARNING"):
        other.optimizer.load_own_variables(store)
    # TensorFlow may warn of the traces that this process's tests have made.
    assert not [record for record in caplog.records if record.name.startswith("tf_lbopt")]
    assert other.optimizer.iterations.numpy() == 1


# -- the state is set in mid-accumulation ----------------------------------------------------------


WAYS = [by_set_weights, by_assignment, by_loading, by_restoring]
KIND_CASES = [case for case in CASES if case.name in KINDS]


def assert_pending_micro_steps_are_gone(run, remember, folder, gradients, made=1):
    """After some micro-steps of an update the state is set back, and all of it made anew."""
    run.update(gradients[0])
    set_back, weights = remember(run, folder), run.weights()
    spoilt = [[tf.constant(g) for g in layers] for layers in gradients[1]]
    for m in range(made):
        run.micro_step(spoilt[m * run.replicas : (m + 1) * run.replicas])
    set_back()
    state = run.state()
    run.update(gradients[2])
    after = run.state()
    for variable, weight in zip(run.variables, weights, strict=True):
        variable.assign(weight)
    set_back()
    assert_states_equal(state, run.state())
    assert_states_equal(after, run.update(gradients[2]).state())
    return after


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", KIND_CASES, ids=repr)
@pytest.mark.quick(case="vr_lamb", way="by_restoring")
@pytest.mark.quick(case="lamb", way=("by_set_weights", "by_loading", "by_assignment"))
def test_pending_micro_steps_do_not_survive(case, way, tmp_path):
    replicas = 2 if case.name == "vr_lamb" else 1
    gradients = sub_batch_gradients(3, sub_batches=3 * replicas)
    run = Run(case, replicas, 3)
    never = run.updates([gradients[0], gradients[2]]).state()
    run.restart()
    after = assert_pending_micro_steps_are_gone(run, way, tmp_path, gradients, made=2)
    assert_states_equal(never, after)


def _lossy(optimizer):
    return tf_lbopt.LossScaleOptimizer(optimizer, initial_scale=2.0)


@pytest.mark.parametrize(
    "way", [by_set_weights, by_loading, by_restoring], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    ("make", "wrap"),
    [
        (SNGM, _lossy),
        (lambda **kwargs: tf_lbopt.VarianceReduced(keras.optimizers.Adam(0.1), **kwargs), None),
        (lambda **kwargs: tf_lbopt.VarianceReduced(tf_lbopt.SNGM(0.1), **kwargs), _lossy),
    ],
    ids=["loss scale", "variance reduced", "both"],
)
@pytest.mark.quick(way="by_restoring")
@pytest.mark.quick(way="by_set_weights", wrap="_lossy")
@pytest.mark.quick(way="by_loading", wrap=None)
def test_pending_micro_steps_do_not_survive_in_wrappers(make, wrap, way, tmp_path):
    gradients = sub_batch_gradients(3, sub_batches=2)
    run = Run(make, 1, 2, **({} if wrap is None else {"wrap": wrap}))
    assert_pending_micro_steps_are_gone(run, way, tmp_path, gradients)


def test_the_first_micro_step_overwrites_sparse_and_missing_gradients():
    """Of a table by rows, and of a variable that had a gradient only before."""
    table, other = (keras.Variable(np.zeros([4, 2], "float32")) for _ in range(2))
    optimizer = tf_lbopt.SNGM(1.0, momentum=0.0, gradient_accumulation_steps=2)
    optimizer.build([table, other])
    empty = [v.numpy() for v in optimizer.variables]
    rows = tf.IndexedSlices(tf.ones([2, 2]), tf.constant([1, 1]), tf.constant([4, 2]))

    @tf.function
    def step(row, both):
        gradient = tf.IndexedSlices(rows.values, tf.fill([2], row), rows.dense_shape)
        if both:
            optimizer.apply([gradient, tf.ones([4, 2])], [table, other])
        else:
            optimizer.apply([gradient], [table])

    step(tf.constant(3), True)
    optimizer.set_weights(empty)
    for _ in range(2):
        step(tf.constant(1), False)
    np.testing.assert_allclose(table.numpy()[3], 0.0)
    np.testing.assert_allclose(table.numpy()[1], -np.sqrt(0.5), rtol=1e-6)
    np.testing.assert_array_equal(other.numpy(), 0.0)


def test_a_count_that_belongs_to_other_accumulators():
    """Set in mid-accumulation from another optimizer: what it had pending did not come along."""
    gradients = sub_batch_gradients(3, sub_batches=3)
    one, other = Run(SNGM, 1, 3), Run(SNGM, 1, 3)
    never = one.updates([gradients[0], gradients[2]]).state()
    one.restart().update(gradients[0]).micro_step([[tf.constant(g) for g in gradients[1][0]]])
    other.optimizer.set_weights([v.numpy() for v in one.optimizer.variables])
    for variable, weight in zip(other.variables, one.weights(), strict=True):
        variable.assign(weight)
    other.update(gradients[2])
    assert_states_equal(never, other.state())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda optimizer: optimizer,
        tf_lbopt.LossScaleOptimizer,
    ],
    ids=["plain", "loss_scale"],
)
def test_set_weights_at_the_same_place_drops_what_is_pending(wrap):
    """Where as many updates and micro-steps were made as before, too."""
    optimizer = wrap(tf_lbopt.SNGM(0.1, gradient_accumulation_steps=3))
    w = keras.Variable([0.0])
    optimizer.apply([tf.constant([500.0])], [w])
    optimizer.set_weights([v.numpy() for v in optimizer.variables])
    for _ in range(3):
        optimizer.apply([tf.constant([-1.0])], [w])
    np.testing.assert_allclose(w.numpy(), [0.1])


@pytest.mark.parametrize("make", [SNGM, lambda **more: tf_lbopt.VRLAMB(0.01, **more)])
def test_an_error_in_a_micro_step_leaves_nothing_of_it(make):
    """On one replica of two, after the other has added its gradient."""
    run = Run(make, 2, 2)
    gradients = sub_batch_gradients(3, sub_batches=4)
    expected = run.updates([gradients[0], gradients[2]]).state()
    run.restart().update(gradients[0])

    @tf.function
    def failing(fails):
        def replica_step():
            context = tf.distribute.get_replica_context()
            bad = tf.equal(context.replica_id_in_sync_group, 1) & fails
            # Neither early nor an operation that others are made to wait for.
            late = tf.fill([1000, 1000], tf.where(bad, 1e-3, 0.0))
            for _ in range(4):
                late = late @ tf.ones([1000, 1000])
            index = tf.cast(tf.reduce_max(late) > 0, tf.int32)
            one = tf.gather([1.0], index)
            run.optimizer.apply([tf.ones_like(v) * one for v in run.variables], run.variables)

        run.strategy.run(replica_step)

    with pytest.raises(tf.errors.InvalidArgumentError, match="indices = 1"):
        failing(tf.constant(True))
    run.update(gradients[2])
    assert_states_equal(expected, run.state())


def _model(optimizer):
    model = keras.Sequential(
        [
            keras.Input([5]),
            keras.layers.Dense(4, activation="tanh", use_bias=False),
            keras.layers.Dense(1, use_bias=False),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    return model


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(case="vr_lamb", replicas=2)
def test_keras_file_in_mid_accumulation(case, replicas, tmp_path):
    """`model.save` after 5 batches with 2 micro-steps per update; the file goes on where it was."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype("float32")
    y = rng.normal(size=(40, 1)).astype("float32")
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    with strategy_of(replicas).scope():
        model = _model(case(gradient_accumulation_steps=2))
    model.fit(x, y, **fit)
    assert model.optimizer.iterations.numpy() == 2
    model.save(tmp_path / "model.keras")
    with strategy_of(replicas).scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is case.cls
    for one in (model, loaded):
        one.fit(x, y, **fit)
        assert one.optimizer.iterations.numpy() == 5
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def _fitted(optimizer, replicas, batches, x, y):
    with strategy_of(replicas).scope():
        model = _model(optimizer())
    model.fit(x[: 8 * batches], y[: 8 * batches], batch_size=8, shuffle=False, verbose=0)
    return model


SHARDED = {
    **{case.name: functools.partial(case, gradient_accumulation_steps=2) for case in KIND_CASES},
    "sub-batches": lambda: tf_lbopt.ExtrapSGD(0.1, sub_batches=2, gradient_accumulation_steps=2),
    "variance reduced": lambda: tf_lbopt.VarianceReduced(
        keras.optimizers.Adam(0.1), gradient_accumulation_steps=2
    ),
    "loss scale": lambda: _lossy(SNGM(gradient_accumulation_steps=2)),
    "post-local": lambda: tf_lbopt.PostLocalSGD(
        keras.optimizers.SGD(0.1, momentum=0.9), start=1, period=3
    ),
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.quick(name="vr_lamb")
def test_shards_in_mid_accumulation(name, tmp_path):
    """Shards as large as the largest array: what belongs to one optimizer is in several."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(40, n)).astype("float32") for n in (5, 1))
    original = _fitted(SHARDED[name], 2, 5, x, y)
    file = tmp_path / "weights.weights.json"
    original.save_weights(file, max_shard_size=160 / 1024**3)
    assert len(list(tmp_path.glob("*.h5"))) > 3
    loaded = _fitted(SHARDED[name], 2, 2, x, y)
    loaded.load_weights(file)
    for one in (original, loaded):
        one.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(original.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(original.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


# -- the state of another optimizer ----------------------------------------------------------------

OTHERS = {
    "Lamb": (lambda: keras.optimizers.Lamb(0.1), lambda: tf_lbopt.LAMB(0.1)),
    "as many variables": (lambda: tf_lbopt.LARS(0.1), lambda: tf_lbopt.SNGM(0.1)),
    "LAMB": (lambda: tf_lbopt.LAMB(0.1), lambda: tf_lbopt.VRLAMB(0.1)),
    "more variables": (lambda: tf_lbopt.SNGM(0.1, use_ema=True), lambda: tf_lbopt.SNGM(0.1)),
    "inside": (
        lambda: tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1, momentum=0.9)),
        lambda: tf_lbopt.VarianceReduced(keras.optimizers.Adagrad(0.1)),
    ),
    "Lamb inside": (
        lambda: _lossy(keras.optimizers.Lamb(0.1)),
        lambda: _lossy(tf_lbopt.LAMB(0.1)),
    ),
    "LAMB inside": (
        lambda: _lossy(tf_lbopt.LAMB(0.1)),
        lambda: _lossy(keras.optimizers.Lamb(0.1)),
    ),
    "stock ones inside": (
        lambda: _lossy(keras.optimizers.Adam(0.1)),
        lambda: _lossy(keras.optimizers.Adagrad(0.1)),
    ),
    "more variables inside": (
        lambda: _post_local(keras.optimizers.SGD(0.1, momentum=0.9)),
        lambda: _post_local(keras.optimizers.SGD(0.1)),
    ),
    "other shapes inside": (
        lambda: tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1, momentum=0.9)),
        lambda: tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1, momentum=0.9)),
    ),
}
# Of these the class says nothing.
SAME_CLASS = ("more variables", "more variables inside", "other shapes inside")


def _post_local(optimizer):
    return tf_lbopt.PostLocalSGD(optimizer, start=1, period=3)


def _saved(name):
    return _built(OTHERS[name][0], 3 if name == "other shapes inside" else 2)


def _built(make, size=2):
    optimizer = make()
    optimizer.build([keras.Variable(np.zeros([size], "float32"), name="w")])
    optimizer.iterations.assign(7)
    return optimizer


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_optimizer_is_refused(name):
    store = {}
    _saved(name).save_own_variables(store)
    other = _built(OTHERS[name][1])
    other.iterations.assign(3)
    before = [v.numpy() for v in other.variables]
    message = r"nothing of it was loaded.*Expected: .* variables of"
    warns = name.startswith("more variables")  # of the same class: as Keras does
    with (
        pytest.warns(UserWarning, match=message)
        if warns
        else pytest.raises(ValueError, match=message)
    ):
        other.load_own_variables(store)
    for value, variable in zip(before, other.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_checkpoint_of_another_optimizer_is_refused(name, built, tmp_path):
    """Before anything is restored, a variable beside the optimizer included."""
    make_other = OTHERS[name][1]
    if not built and name in SAME_CLASS:
        pytest.skip("TensorFlow compares these when they are made")
    path = tf.train.Checkpoint(beside=tf.Variable(1.0), optimizer=_saved(name)).save(
        str(tmp_path / "checkpoint")
    )
    other, beside = _built(make_other) if built else make_other(), tf.Variable(0.0)
    other.iterations.assign(3)
    before = [v.numpy() for v in other.variables]
    with pytest.raises(ValueError, match=r"nothing of it was loaded.*Expected: .*Received: "):
        tf.train.Checkpoint(beside=beside, optimizer=other).restore(path)
    for value, variable in zip([0.0, *before], [beside, *other.variables], strict=True):
        np.testing.assert_array_equal(value, variable.numpy())


def test_checkpoint_of_an_optimizer_that_was_not_built_yet(tmp_path):
    original = SNGM()
    original.iterations.assign(7)
    path = tf.train.Checkpoint(optimizer=original).save(str(tmp_path / "checkpoint"))
    built = _built(SNGM)
    built.iterations.assign(3)
    tf.train.Checkpoint(optimizer=built).restore(path).expect_partial()
    assert built.iterations.numpy() == 7


def test_a_checkpoint_without_accumulation_begins_an_update(tmp_path):
    assert_checkpoint_without_accumulation_begins(Run, SNGM, tmp_path)


def test_a_saved_model_has_the_state_and_no_warning(tmp_path, caplog):
    """Under `variables/` it is a checkpoint like others."""
    x, y = np.ones([24, 5], "float32"), np.ones([24, 1], "float32")
    make = SHARDED["loss scale"]
    model, other = (_fitted(make, 1, batches, x, y) for batches in (3, 1))
    gc.collect()  # What earlier tests have not restored whole warns when it goes.
    caplog.clear()
    tf.get_logger().addHandler(caplog.handler)
    try:
        tf.saved_model.save(model, str(tmp_path))
        tf.saved_model.load(str(tmp_path))
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert not caplog.messages
    tf.train.Checkpoint(other).restore(str(tmp_path / "variables" / "variables"))
    assert other.optimizer.iterations.numpy() == model.optimizer.iterations.numpy() == 1
    stock = _fitted(lambda: _lossy(keras.optimizers.Lamb(0.1)), 1, 1, x, y)
    with pytest.raises(ValueError, match="nothing of it was loaded"):
        tf.train.Checkpoint(stock).restore(str(tmp_path / "variables" / "variables"))


def test_state_for_other_shapes_is_refused():
    store = {}
    _built(SNGM, 3).save_own_variables(store)
    other = _built(SNGM, 2)
    other.iterations.assign(3)
    with pytest.raises(ValueError, match=r"Expected: .*\(2,\).*Received: .*\(3,\)"):
        other.load_own_variables(store)
    assert other.iterations.numpy() == 3


@pytest.mark.parametrize(
    ("make", "received"), [(lambda: keras.optimizers.Lamb(0.1), "lamb"), (SNGM, "SNGM")]
)
def test_a_file_with_another_optimizer(make, received, tmp_path):
    """Its weights can be had without its optimizer's state."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(16, n)).astype("float32") for n in (5, 1))
    original = _fitted(make, 1, 2, x, y)
    original.save_weights(tmp_path / "own.weights.h5")
    model = _fitted(lambda: tf_lbopt.LAMB(0.1), 1, 1, x, y)
    state = [v.numpy() for v in model.optimizer.variables]
    with pytest.raises(ValueError, match=f"Expected: LAMB, .*Received: {received}"):
        model.load_weights(tmp_path / "own.weights.h5")
    with pytest.warns(UserWarning, match="nothing of it was loaded"):
        model.load_weights(tmp_path / "own.weights.h5", skip_mismatch=True)
    for value, variable in zip(state, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())
    for a, b in zip(original.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "wrap",
    [_lossy, tf_lbopt.VarianceReduced, _post_local],
    ids=["loss scale", "variance reduced", "post-local"],
)
def test_a_file_with_another_stock_optimizer_inside(wrap, tmp_path):
    """Which Keras would load for this one: it has as many variables."""

    def model_of(inner):
        model = _model(wrap(inner))
        model.optimizer.build(model.trainable_variables)
        return model

    original = model_of(keras.optimizers.Adam(0.1))
    for number, variable in enumerate(original.optimizer.variables):
        if tf.as_dtype(variable.dtype).is_floating:
            variable.assign(variable + float(number))
    file = tmp_path / "own.weights.h5"
    original.save_weights(file)
    model, same = model_of(keras.optimizers.Lamb(0.1)), model_of(keras.optimizers.Adam(0.1))
    state = [v.numpy() for v in model.optimizer.variables]
    with pytest.raises(ValueError, match="nothing of it was loaded"):
        model.load_weights(file)
    same.load_weights(file)
    for one, expected in (
        (model, state),
        (same, [v.numpy() for v in original.optimizer.variables]),
    ):
        for variable, value in zip(one.optimizer.variables, expected, strict=True):
            np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("way", ["model", "weights"])
def test_a_fit_without_an_update_is_warned_of_after_loading(way, tmp_path):
    """However many updates were made before."""
    x, y = np.ones([16, 5], "float32"), np.ones([16, 1], "float32")
    make = functools.partial(SNGM, gradient_accumulation_steps=2)
    model = _fitted(make, 1, 2, x, y)
    if way == "model":
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        model.save_weights(tmp_path / "own.weights.h5")
        loaded = _model(make())
        loaded.fit(np.tile(x, [2, 1]), np.tile(y, [2, 1]), batch_size=8, verbose=0)
        loaded.load_weights(tmp_path / "own.weights.h5")
    assert loaded.optimizer.iterations.numpy() == 1
    with pytest.warns(UserWarning, match="before an update was due"):
        loaded.fit(x[:8], y[:8], batch_size=8, verbose=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before an update was due")
        loaded.fit(x[:8], y[:8], batch_size=8, verbose=0)
    assert loaded.optimizer.iterations.numpy() == 2


def test_a_model_that_was_not_trained_yet(tmp_path):
    """In its file the optimizer has no slots, in the loaded model it has."""
    model = _model(SNGM())
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="nothing of it was loaded"):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.iterations.numpy() == 0


@pytest.mark.parametrize("save", SAVERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.quick(save="by_checkpoint")
def test_training_goes_on_with_other_micro_steps(save, before, after, tmp_path, caplog):
    """What is pending is lost, the slots are not."""
    gradients = sub_batch_gradients(3, sub_batches=3)
    original = Run(SNGM, 1, before).update(gradients[0])
    updated = _without_pending(original.state())
    if before > 1:
        original.micro_step([[tf.constant(g) for g in gradients[1][0]]])
    load = save(original, tmp_path)
    fresh = Run(SNGM, 1, after, weights=initial_weights(seed=99))
    try:
        load(fresh)
    except AssertionError:  # of `assert_consumed`: one has accumulators and the other has none
        assert save is by_checkpoint
        assert 1 in (before, after)
    assert_states_equal(updated, _without_pending(fresh.state()))
    reference = Run(SNGM, 1, after, weights=original.weights())
    for v, w in zip(reference.inner.variables, original.inner.variables, strict=False):
        if "pending" not in w.path:
            v.assign(w.numpy())
    assert_states_equal(reference.update(gradients[2]).state(), fresh.update(gradients[2]).state())
