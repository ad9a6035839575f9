"""SkippedUpdates in `fit`."""

import keras
import numpy as np
import pytest
from harness import KINDS

import tf_lbopt
from tf_lbopt.callbacks import SkippedUpdates

BATCH = 4
BATCHES = 6


def data(bad_batches=()):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * BATCHES, 2)).astype("float32")
    for batch in bad_batches:
        x[batch * BATCH + 1, 0] = np.nan
    return x, x.sum(axis=1, keepdims=True)


def train(optimizer, bad_batches=(), epochs=1, callback=None, **compile_arguments):
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(optimizer=optimizer, loss="mse", **{"jit_compile": False, **compile_arguments})
    before = model.get_weights()
    history = model.fit(
        *data(bad_batches), batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0,
        callbacks=[SkippedUpdates() if callback is None else callback],
    )  # fmt: skip
    unchanged = [np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    return model, history.history, unchanged


OPTIMIZERS = {
    **{
        info.name: lambda info=info: info.cls(learning_rate=0.01)
        for info in tf_lbopt.list_optimizers()
        if not info.needs_sub_batches  # the others skip groups of batches
    },
    "loss scale around sngm": lambda: tf_lbopt.LossScaleOptimizer(tf_lbopt.SNGM(0.01)),
    "loss scale around stock": lambda: tf_lbopt.LossScaleOptimizer(keras.optimizers.SGD(0.01)),
    "Keras's loss scale around sngm": lambda: keras.optimizers.LossScaleOptimizer(
        tf_lbopt.SNGM(0.01)
    ),
}
over_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


@over_optimizers
@pytest.mark.quick(name=(*KINDS, *(name for name in OPTIMIZERS if "loss scale" in name)))
def test_some_bad_batches(name):
    optimizer = OPTIMIZERS[name]()
    model, history, unchanged = train(optimizer, bad_batches=(1, 4), epochs=2)
    assert history["skipped_updates"] == [2, 4]
    assert int(optimizer.iterations.numpy()) == 2 * (BATCHES - 2)
    assert unchanged == [False, False]
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    assert not model.stop_training


@over_optimizers
@pytest.mark.quick(name=("lamb", "extrap_sgd", "loss scale around stock"))
@pytest.mark.quick(name="Keras's loss scale around sngm")
def test_only_bad_batches(name, caplog):
    optimizer = OPTIMIZERS[name]()
    with caplog.at_level("ERROR", logger="tf_lbopt"):
        model, history, unchanged = train(
            optimizer, range(BATCHES), epochs=2, callback=SkippedUpdates(max_consecutive=3)
        )
    assert model.stop_training
    assert unchanged == [True, True]
    assert int(optimizer.iterations.numpy()) == 0
    assert history["skipped_updates"] == [3]
    assert "the last 3 updates were all skipped" in caplog.text


@over_optimizers
@pytest.mark.quick(name=("clars", "loss scale around stock", "Keras's loss scale around sngm"))
def test_no_bad_batch(name):
    optimizer = OPTIMIZERS[name]()
    model, history, _ = train(optimizer, epochs=2, callback=SkippedUpdates(max_consecutive=1))
    assert history["skipped_updates"] == [0, 0]
    assert not model.stop_training
    assert int(optimizer.iterations.numpy()) == 2 * BATCHES


def test_skips_without_an_update_in_between_are_counted_across_epochs():
    # Bad: the last two of one epoch and the first of the next.
    optimizer = tf_lbopt.SNGM(0.01)
    _, history, _ = train(
        optimizer, (0, 4, 5), epochs=3, callback=SkippedUpdates(max_consecutive=3)
    )
    assert history["skipped_updates"] == [3, 4]
    assert int(optimizer.iterations.numpy()) == 3


def test_an_update_in_between_starts_the_count_anew():
    optimizer = tf_lbopt.SNGM(0.01)
    model, history, _ = train(
        optimizer, (0, 1, 3, 4), epochs=2, callback=SkippedUpdates(max_consecutive=3)
    )
    assert history["skipped_updates"] == [4, 8]
    assert not model.stop_training


def test_never_stopping():
    model, history, unchanged = train(
        tf_lbopt.SNGM(0.01), range(BATCHES), epochs=10, callback=SkippedUpdates(None)
    )
    assert history["skipped_updates"] == [BATCHES * epoch for epoch in range(1, 11)]
    assert unchanged == [True, True]
    assert not model.stop_training


def test_fifty_by_default():
    _, history, _ = train(tf_lbopt.SNGM(0.01), range(BATCHES), epochs=20)
    assert history["skipped_updates"][-1] == 50


def test_several_batches_per_execution():
    optimizer = tf_lbopt.SNGM(0.01)
    model, history, _ = train(
        optimizer, range(BATCHES), epochs=2, steps_per_execution=2,
        callback=SkippedUpdates(max_consecutive=3),
    )  # fmt: skip
    assert model.stop_training
    assert history["skipped_updates"] == [4]


def test_compiled():
    optimizer = tf_lbopt.SNGM(0.01)
    model, history, _ = train(optimizer, (1, 4), jit_compile=True)
    assert history["skipped_updates"] == [2]
    assert int(optimizer.iterations.numpy()) == BATCHES - 2
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


def test_updates_made_before_training_begins_do_not_count_as_skips_in_a_row():
    optimizer = tf_lbopt.SNGM(0.01)
    callback = SkippedUpdates(max_consecutive=3)
    model, _, _ = train(optimizer, (4, 5), callback=callback)
    history = model.fit(*data((0,)), batch_size=BATCH, shuffle=False, verbose=0,
                        callbacks=[callback]).history  # fmt: skip
    assert not model.stop_training
    assert history["skipped_updates"] == [3]


def test_under_accumulation_groups_of_batches_count():
    optimizer = tf_lbopt.SNGM(0.01, gradient_accumulation_steps=2)
    _, history, _ = train(optimizer, (1, 4, 5))  # batches 0+1, 2+3, 4+5
    assert history["skipped_updates"] == [2]
    assert int(optimizer.iterations.numpy()) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.01),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01)),
    ],
    ids=["SGD", "LossScaleOptimizer"],
)
def test_stock_optimizers_do_not_count(make):
    optimizer = make()
    expected = (
        f"SkippedUpdates needs an optimizer of tf_lbopt.*Received: {type(optimizer).__name__}"
    )
    with pytest.raises(ValueError, match=expected):
        train(optimizer)


def groups(first, second, function):
    """A MultiOptimizer: one optimizer for the first layer, one for the second."""
    if function:
        return keras.optimizers.MultiOptimizer(lambda v: first if "first" in v.path else second)
    optimizers = keras.optimizers.OptimizerMap(first, {".*second/.*": second})
    return keras.optimizers.MultiOptimizer(optimizers)


def two_layers():
    layers = [keras.layers.Dense(4, name="first"), keras.layers.Dense(1, name="second")]
    return keras.Sequential([keras.Input([3]), *layers])


@pytest.mark.parametrize("function", [False, True])
def test_several_optimizers(function, caplog):
    """The first group's gradients are NaN, as its weights are of no use to the second."""
    first, second = tf_lbopt.SNGM(0.1), tf_lbopt.LARS(0.1)
    model = two_layers()
    model.compile(groups(first, second, function), "mse")
    x, y = np.full((16, 3), 1e30, "float32"), np.ones((16, 1), "float32")
    model.get_layer("first").set_weights([np.zeros((3, 4)), np.zeros(4)])
    model.get_layer("second").set_weights([np.full((4, 1), 1e20), np.zeros(1)])
    history = model.fit(
        x, y, batch_size=2, epochs=2, verbose=0, callbacks=[SkippedUpdates(max_consecutive=3)]
    )
    assert history.history["skipped_updates"] == [3]
    assert (int(first.skipped_updates.numpy()), int(first.iterations.numpy())) == (3, 0)
    assert (int(second.skipped_updates.numpy()), int(second.iterations.numpy())) == (0, 3)
    assert "last 3 updates" in caplog.text
    np.testing.assert_array_equal(model.get_layer("first").get_weights()[0], np.zeros((3, 4)))


def test_several_stock_optimizers_do_not_count():
    model = two_layers()
    stock = [keras.optimizers.SGD(), keras.optimizers.Adam()]
    model.compile(groups(*stock, function=True), "mse")
    with pytest.raises(ValueError, match="Received: MultiOptimizer"):
        model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0, callbacks=[SkippedUpdates()])


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: tf_lbopt.ExtrapSGD(0.1),
        lambda: tf_lbopt.ExtrapAdam(0.1),
        lambda: tf_lbopt.PostLocalSGD(keras.optimizers.SGD(0.1), start=1, period=1),
    ],
)
def test_several_optimizers_one_of_which_changes_steps(make, function):
    optimizer = make()
    name = type(optimizer).__name__
    with pytest.raises(ValueError, match=f"^{name} can not be .*Received: MultiOptimizer"):
        groups(keras.optimizers.SGD(0.1), optimizer, function).build(
            two_layers().trainable_variables
        )
