"""FreezeLayers in `fit`."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of

import tf_lbopt
from tf_lbopt.callbacks import FreezeLayers

BATCH = 4
BATCHES = 4


def data(batches=BATCHES):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * batches, 3)).astype("float32")
    return x, np.sin(x).sum(axis=1, keepdims=True)


def small_model():
    """Initial weights that are the same every time, wherever the model is made."""
    initializer = functools.partial(keras.initializers.RandomNormal, stddev=0.5)
    return keras.Sequential(
        [
            keras.Input([3]),
            keras.layers.Dense(
                4, activation="tanh", kernel_initializer=initializer(seed=1), name="body"
            ),
            keras.layers.Dense(1, kernel_initializer=initializer(seed=2), name="fc"),
        ]
    )


def nested_model():
    backbone = keras.Sequential(
        [
            keras.Input([3]),
            keras.layers.Dense(4, activation="tanh", name="low"),
            keras.layers.Dense(4, activation="tanh", name="high"),
        ],
        name="backbone",
    )
    inputs = keras.Input([3])
    return keras.Model(inputs, keras.layers.Dense(1, name="fc")(backbone(inputs)))


class Block(keras.layers.Layer):
    """A layer made of layers, which is no model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(4, name="inner")

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, inputs):
        return self.inner(inputs)


class Weights(keras.callbacks.Callback):
    """Keeps all weights as they are at first and after every epoch."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_train_begin(self, logs=None):
        self.epochs = [self.model.get_weights()]

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self.model.get_weights())


def changes(weights):
    """For each epoch, for each weight, whether it changed a single bit."""
    return [
        [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        for before, after in zip(weights.epochs, weights.epochs[1:], strict=False)
    ]


def compiled(optimizer, model=None, **arguments):
    model = small_model() if model is None else model
    model.compile(optimizer=optimizer, loss="mse", **{"jit_compile": False, **arguments})
    return model


def fit(model, *callbacks, epochs=3, batches=BATCHES, **arguments):
    return model.fit(
        *data(batches), batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0,
        callbacks=list(callbacks), **arguments,
    )  # fmt: skip


OPTIMIZERS = {
    "sngm": lambda **kw: tf_lbopt.SNGM(0.1, weight_decay=0.01, **kw),
    "lars": lambda **kw: tf_lbopt.LARS(0.5, trust_coefficient=0.1, weight_decay=0.01, **kw),
    "lamb": lambda **kw: tf_lbopt.LAMB(0.05, weight_decay=0.01, **kw),
    "vr_adam": lambda **kw: tf_lbopt.VRAdam(0.05, **{"gradient_accumulation_steps": 2, **kw}),
    "vr around sgd": lambda **kw: tf_lbopt.VarianceReduced(
        keras.optimizers.SGD(0.05, momentum=0.9), **{"gradient_accumulation_steps": 2, **kw}
    ),
    "keras sgd": lambda **kw: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.01, **kw),
    "keras adam": lambda **kw: keras.optimizers.Adam(0.05, global_clipnorm=1.0, **kw),
    "loss scale": lambda **kw: tf_lbopt.LossScaleOptimizer(tf_lbopt.SNGM(0.1, **kw)),
    "loss scale around stock": lambda **kw: tf_lbopt.LossScaleOptimizer(
        keras.optimizers.SGD(0.05, momentum=0.9, **kw)
    ),
    "Keras's loss scale": lambda **kw: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.05, momentum=0.9, **kw)
    ),
}
ON_TWO_REPLICAS = ("sngm", "vr_adam", "keras sgd", "loss scale")


def over(names):
    """Runs a test with each optimizer on one device, and with some on two replicas."""
    cases = [(name, 1) for name in names] + [(name, 2) for name in names if name in ON_TWO_REPLICAS]
    return pytest.mark.parametrize(("name", "replicas"), cases)


# -- what changes, and when ------------------------------------------------------------------------


@over(OPTIMIZERS)
@pytest.mark.quick(name="loss scale", replicas=2)
@pytest.mark.quick(name=("lamb", "vr around sgd"), replicas=1)
def test_frozen_weights_keep_every_bit(name, replicas):
    with strategy_of(replicas).scope():
        optimizer = OPTIMIZERS[name]()
        model = compiled(optimizer)
    weights = Weights()
    fit(model, FreezeLayers("fc", epochs=2), weights, epochs=3)
    body, fc = [True, True], [False, False]
    assert changes(weights) == [body + fc, body + fc, [True] * 4]
    accumulation = getattr(optimizer, "gradient_accumulation_steps", None)
    per_update = accumulation if isinstance(optimizer, tf_lbopt.VarianceReduced) else None
    per_update = per_update or (2 if name == "vr_adam" else 1)
    assert int(optimizer.iterations.numpy()) == 3 * BATCHES // per_update
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("arguments", [{"jit_compile": True}, {"run_eagerly": True},
                                       {"steps_per_execution": 2}], ids=str)  # fmt: skip
def test_however_the_step_is_run(arguments):
    weights = Weights()
    fit(compiled(tf_lbopt.SNGM(0.1), **arguments), FreezeLayers("fc", 1), weights, epochs=2)
    assert changes(weights) == [[True, True, False, False], [True] * 4]


def trainer_by_hand(replicas, optimizer_name):
    """The same training in a custom loop: gradients for some of the variables, then for all.

    A function that begins anew at each call and returns the weights and the optimizer's variables.
    """
    strategy = strategy_of(replicas)
    with strategy.scope():
        model = small_model()
        optimizer = OPTIMIZERS[optimizer_name]()
        optimizer.build(model.trainable_variables)
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(BATCH)

    def step_of(variables):
        def on_replica(x, y):
            with tf.GradientTape() as tape:
                error = tf.reduce_mean(tf.square(model(x, training=True) - y))
                loss = optimizer.scale_loss(error / replicas)
            optimizer.apply(tape.gradient(loss, variables), variables)

        return tf.function(lambda batch: strategy.run(on_replica, args=batch))

    body = model.get_layer("body").trainable_variables
    some, everything = step_of(body), step_of(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    first = [v.numpy() for v in variables]

    def train(frozen_epochs, epochs):
        for variable, value in zip(variables, first, strict=True):
            variable.assign(value)
        for epoch in range(epochs):
            for batch in strategy.experimental_distribute_dataset(batches):
                (some if epoch < frozen_epochs else everything)(batch)
        return model.get_weights(), [v.numpy() for v in optimizer.variables]

    return train


@over(["sngm", "lamb", "vr_adam", "keras sgd", "keras adam"])
@pytest.mark.quick(name="vr_adam", replicas=2)
def test_equals_a_custom_loop(name, replicas):
    with strategy_of(replicas).scope():
        optimizer = OPTIMIZERS[name]()
        model = compiled(optimizer)
    fit(model, FreezeLayers("fc", epochs=1), epochs=2)
    train = trainer_by_hand(replicas, name)
    expected, of_optimizer = train(frozen_epochs=1, epochs=2)
    for got, want in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    for got, want in zip(optimizer.variables, of_optimizer, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-7)
    other, _ = train(frozen_epochs=0, epochs=2)
    assert not np.allclose(other[0], expected[0], rtol=1e-3)


def test_optimizer_knows_all_variables_from_the_start():
    class Built(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.variables = [v.path for v in self.model.optimizer.variables]

    built = Built()
    model = compiled(keras.optimizers.SGD(0.1, momentum=0.9))
    assert not model.optimizer.built
    fit(model, FreezeLayers("fc", epochs=1), built, epochs=1)
    assert sum("momentum" in path for path in built.variables) == 4


@pytest.mark.parametrize(
    ("initial_epoch", "frozen"), [(0, [True, True, False, False]), (1, [True, False, False]),
                                  (2, [False, False]), (3, [False])],
)  # fmt: skip
def test_epochs_count_from_the_initial_one(initial_epoch, frozen):
    weights = Weights()
    fit(compiled(tf_lbopt.SNGM(0.1)), FreezeLayers("fc", epochs=2), weights, epochs=4,
        initial_epoch=initial_epoch)  # fmt: skip
    assert [not any(changed[2:]) for changed in changes(weights)] == frozen
    assert all(all(changed[:2]) for changed in changes(weights))


def test_the_step_is_traced_anew_only_where_it_changes():
    class Functions(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_epoch_end(self, epoch, logs=None):
            self.seen.append(self.model.train_function)

    functions = Functions()
    fit(compiled(tf_lbopt.SNGM(0.1)), FreezeLayers("fc", 2), functions, epochs=5)
    seen = functions.seen
    assert seen[0] is seen[1]
    assert seen[1] is not seen[2]
    assert seen[2] is seen[3] is seen[4]


def test_resuming_from_a_backup(tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("crash")

    def callbacks(*more):
        return (FreezeLayers("fc", 3), keras.callbacks.BackupAndRestore(tmp_path / "backup"), *more)

    whole = compiled(tf_lbopt.SNGM(0.1))
    fit(whole, FreezeLayers("fc", 3), epochs=5)
    with pytest.raises(RuntimeError, match="crash"):
        fit(compiled(tf_lbopt.SNGM(0.1)), *callbacks(Crash()), epochs=5)
    resumed, weights = compiled(tf_lbopt.SNGM(0.1)), Weights()
    fit(resumed, *callbacks(weights), epochs=5)
    assert len(weights.epochs) == 1 + 3
    for got, want in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(resumed.optimizer.iterations.numpy()) == 5 * BATCHES


def test_batch_normalization_runs_in_inference_mode_while_frozen():
    model = keras.Sequential(
        [keras.Input([3]), keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(1)]
    )
    weights = Weights()
    fit(compiled(tf_lbopt.SNGM(0.1), model), FreezeLayers("norm", 1), weights, epochs=2)
    # gamma, beta, moving mean, moving variance, kernel, bias
    assert changes(weights) == [[False] * 4 + [True, True], [True] * 6]


@pytest.mark.parametrize("optimizer", [tf_lbopt.SNGM, keras.optimizers.SGD])
def test_averaged_weights(optimizer):
    """The averages that end `fit` go to the variables that they belong to."""
    model = compiled(optimizer(0.05, use_ema=True, ema_momentum=0.5))
    before = model.get_weights()
    fit(model, FreezeLayers("body", epochs=2), epochs=2)
    after = model.get_weights()
    for a, b in zip(before[:2], after[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    averages = model.optimizer._model_variables_moving_average
    for average, weight in zip(averages, after, strict=True):
        np.testing.assert_array_equal(average.numpy(), weight)
    assert not np.array_equal(before[2], after[2])


# -- gradient accumulation -------------------------------------------------------------------------


def mean_gradient(model, batches, variables):
    x, y = data(6)
    rows = np.concatenate([np.arange(BATCH * b, BATCH * (b + 1)) for b in batches])
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x[rows], training=True) - y[rows]))
    return tape.gradient(loss, variables)


@pytest.mark.parametrize(
    ("make", "replicas"),
    [
        pytest.param(
            lambda **kw: tf_lbopt.LARS(0.5, trust_coefficient=0.1, **kw), 1, marks=pytest.mark.long
        ),
        (lambda **kw: tf_lbopt.LossScaleOptimizer(tf_lbopt.SNGM(0.1, **kw)), 2),
        # Keras's own accumulation does not work on several replicas.
        pytest.param(
            lambda **kw: keras.optimizers.SGD(0.1, momentum=0.9, **kw), 1, marks=pytest.mark.long
        ),
        (lambda **kw: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1, **kw)), 1),
    ],
    ids=["LARS", "LossScaleOptimizer", "Keras's SGD", "Keras's LossScaleOptimizer"],
)
def test_layers_do_not_join_in_within_an_update(make, replicas):
    """3 batches per epoch, 2 per update: epoch 1 begins in the middle of the second update."""
    fc = []

    class Batches(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            fc.append(self.model.get_layer("fc").kernel.numpy())

    with strategy_of(replicas).scope():
        model = compiled(make(gradient_accumulation_steps=2))
    dataset = tf.data.Dataset.from_tensor_slices(data(6)).batch(BATCH)
    model.fit(dataset.repeat(), shuffle=False, steps_per_epoch=3, epochs=2, verbose=0,
              callbacks=[FreezeLayers("fc", epochs=1), Batches()])  # fmt: skip

    reference = small_model()
    plain = make()
    plain.build(reference.trainable_variables)
    for batches, layers in (((0, 1), ["body"]), ((2, 3), ["body"]), ((4, 5), ["body", "fc"])):
        variables = [v for layer in layers for v in reference.get_layer(layer).trainable_variables]
        gradients = mean_gradient(reference, batches, variables)
        plain.apply([plain.scale_loss(g) for g in gradients], variables)
    for got, want in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    for kernel in fc[1:5]:
        np.testing.assert_array_equal(kernel, fc[0])
    assert not np.array_equal(fc[4], fc[5])


def test_no_update_between_two_executions(caplog):
    model = compiled(tf_lbopt.SNGM(0.1, gradient_accumulation_steps=2), steps_per_execution=2)
    weights = Weights()
    with caplog.at_level("WARNING", logger="tf_lbopt"):
        fit(model, FreezeLayers("fc", epochs=1), weights, batches=3, epochs=2)  # 2 + 1 batches
    assert "stayed frozen beyond epoch 1" in caplog.text
    assert changes(weights)[1] == [True, True, False, False]


# -- which layers ----------------------------------------------------------------------------------


def unchanged_after_training(model, layers):
    weights = Weights()
    fit(compiled(tf_lbopt.SNGM(0.1), model), FreezeLayers(layers, 1), weights, epochs=2)
    first, second = changes(weights)
    assert all(second)
    paths = [v.path for v in model.weights]
    return {path for path, changed in zip(paths, first, strict=True) if not changed}


@pytest.mark.parametrize(
    ("layers", "frozen"),
    [
        ("^fc$", ["fc/"]),
        ("high", ["backbone/high/"]),
        ("^backbone/low", ["backbone/low/"]),
        ("^low$", ["backbone/low/"]),  # the layer's own name
        ("backbone", ["backbone/"]),
        (["fc", "low"], ["fc/", "backbone/low/"]),
        (("backbone", "low"), ["backbone/"]),
        ("fc|low", ["fc/", "backbone/low/"]),
    ],
    ids=str,
)
@pytest.mark.quick(layers=("^backbone/low", "^low$", ("backbone", "low"), "fc|low"))
def test_regular_expressions(layers, frozen):
    model = nested_model()
    expected = {v.path for v in model.weights if v.path.startswith(tuple(frozen))}
    assert expected
    assert unchanged_after_training(model, layers) == expected


@pytest.mark.parametrize("as_list", [True, False])
def test_layer_objects(as_list):
    model = nested_model()
    high = model.get_layer("backbone").get_layer("high")
    frozen = unchanged_after_training(model, ["fc", high] if as_list else high)
    expected = {v.path for v in high.weights}
    if as_list:
        expected |= {v.path for v in model.get_layer("fc").weights}
    assert frozen == expected


def test_layers_inside_a_layer_that_is_no_model():
    model = keras.Sequential([keras.Input([3]), Block(name="block"), keras.layers.Dense(1)])
    inner = {v.path for v in model.get_layer("block").inner.weights}
    assert unchanged_after_training(model, "inner") == inner


# -- flags -----------------------------------------------------------------------------------------


def flags(model):
    layers = list(model._flatten_layers())
    return [x.trainable for x in (*layers, *(v for layer in layers for v in layer.weights))]


class Trainable(keras.callbacks.Callback):
    """Keeps the flag of a layer within and at the end of epochs."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.within, self.between = layer, [], []

    def on_train_batch_end(self, batch, logs=None):
        if batch == BATCHES - 1:
            self.within.append(self.layer.trainable)

    def on_epoch_end(self, epoch, logs=None):
        self.between.append(self.layer.trainable)


def test_flags_within_and_between_epochs():
    model = compiled(tf_lbopt.SNGM(0.1))
    seen = Trainable(model.get_layer("fc"))
    fit(model, FreezeLayers("fc", epochs=2), seen, epochs=3)
    assert seen.within == [False, False, True]
    assert seen.between == [True, True, True]


@pytest.mark.parametrize("epochs", [1, 3], ids=["ends frozen", "ends unfrozen"])
def test_what_was_frozen_inside_stays_so(epochs):
    model = nested_model()
    backbone = model.get_layer("backbone")
    backbone.get_layer("low").trainable = False
    backbone.get_layer("high").bias.trainable = False
    compiled(tf_lbopt.SNGM(0.1), model)
    before, weights = flags(model), Weights()
    fit(model, FreezeLayers("^backbone$", epochs=2), weights, epochs=epochs)
    assert flags(model) == before
    fc = [True, True]
    expected = [[False] * 4 + fc] * 2 + [[False, False, True, False, *fc]]
    assert changes(weights) == expected[:epochs]


def test_flags_of_a_layer_that_is_in_two_others():
    shared = keras.layers.Dense(3, name="shared")
    one = keras.Sequential([keras.Input([3]), shared], name="one")
    two = keras.Sequential([keras.Input([3]), shared, keras.layers.Dense(3)], name="two")
    inputs = keras.Input([3])
    model = keras.Model(inputs, keras.layers.Dense(1, name="fc")(two(one(inputs))))
    shared.trainable = False
    compiled(tf_lbopt.SNGM(0.1), model)
    before = flags(model)
    fit(model, FreezeLayers(["^one$", "^two$"], epochs=5), epochs=1)
    assert flags(model) == before
    assert not shared.trainable


def test_training_again_after_an_early_end():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    model = compiled(tf_lbopt.SNGM(0.1))
    weights = Weights()
    fit(model, FreezeLayers("fc", epochs=2), Stop(), weights)
    assert changes(weights) == [[True, True, False, False]]
    assert all(flags(model))
    fit(model, weights, epochs=1)
    assert changes(weights) == [[True] * 4]


class Crash(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise RuntimeError("crash")


def test_unfreezing_after_an_error():
    model = compiled(tf_lbopt.SNGM(0.1))
    freeze, weights = FreezeLayers("fc", epochs=2), Weights()
    with pytest.raises(RuntimeError, match="crash"):
        fit(model, freeze, Crash())
    assert not model.get_layer("fc").trainable
    freeze.unfreeze()
    assert all(flags(model))
    fit(model, weights, epochs=1)
    assert changes(weights) == [[True] * 4]


def test_the_callback_after_an_error():
    model = compiled(tf_lbopt.SNGM(0.1))
    freeze, weights = FreezeLayers("fc", epochs=2), Weights()
    with pytest.raises(RuntimeError, match="crash"):
        fit(model, freeze, Crash())
    fit(model, freeze, weights)
    assert changes(weights) == [[True, True, False, False]] * 2 + [[True] * 4]
    assert all(flags(model))


def test_the_callback_for_another_model():
    freeze = FreezeLayers("fc", epochs=1)
    for _ in range(2):
        weights = Weights()
        fit(compiled(tf_lbopt.SNGM(0.1)), freeze, weights, epochs=2)
        assert changes(weights) == [[True, True, False, False], [True] * 4]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "epochs", "error", "message"),
    [
        ("fc", 0, ValueError, r"`epochs` must be an integer >= 1\. Received: epochs=0"),
        ("fc", -2, ValueError, r"`epochs`.*Received: epochs=-2"),
        ("fc", 1.0, TypeError, r"`epochs`.*Received: epochs=1\.0 \(of type float\)"),
        ("fc", True, TypeError, r"`epochs`.*Received: epochs=True"),
        ("fc", None, TypeError, r"`epochs`.*Received: epochs=None"),
        (None, 1, TypeError, r"`layers` must be a regular expression.*Received: layers=None"),
        (3, 1, TypeError, r"`layers`.*Received: layers=3 \(of type int\)"),
        (b"fc", 1, TypeError, r"`layers`.*Received: layers=b'fc'"),
        ([], 1, ValueError, r"`layers`.*Received: layers=\[\]"),
        (["fc", 3], 1, TypeError, r"`layers`.*Received an entry of type int: 3"),
        ("(", 1, ValueError, r"`layers`.*Received: '\(', which is no regular expression"),
        (["fc", "[a-"], 1, ValueError, r"`layers`.*Received: '\[a-', which is no regular"),
    ],
)
def test_bad_arguments(layers, epochs, error, message):
    with pytest.raises(error, match=message):
        FreezeLayers(layers, epochs)


def refused(model, layers, message):
    before, were = model.get_weights(), flags(model)
    with pytest.raises(ValueError, match=message):
        fit(model, FreezeLayers(layers, epochs=1))
    assert flags(model) == were
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_model_that_is_not_built():
    model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1, name="fc")])
    compiled(tf_lbopt.SNGM(0.1), model)
    with pytest.raises(ValueError, match=rf"keras\.Input.*Received the model '{model.name}'"):
        fit(model, FreezeLayers("fc", 1))


def test_no_layer_fits():
    model = compiled(tf_lbopt.SNGM(0.1), nested_model())
    refused(
        model,
        ["fc", "^classifier$", "head"],
        r"found no layer for '\^classifier\$', 'head' in the model.*layers with weights are: "
        r".*backbone/low.*fc",
    )


def test_layer_of_another_model():
    stranger = small_model().get_layer("fc")
    refused(compiled(tf_lbopt.SNGM(0.1)), stranger, r"found no layer for the layer sequential.*/fc")


def test_layer_that_is_frozen_already():
    model = small_model()
    model.get_layer("fc").trainable = False
    compiled(tf_lbopt.SNGM(0.1), model)
    refused(model, "fc", r"Set `layer.trainable = True` and compile.*trainable=False: .*/fc")


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf_lbopt.SNGM(0.1),
        lambda: keras.optimizers.SGD(0.1),
        lambda: tf_lbopt.LossScaleOptimizer(tf_lbopt.SNGM(0.1)),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    ],
    ids=["SNGM", "SGD", "LossScaleOptimizer", "Keras's LossScaleOptimizer"],
)
def test_variables_that_the_optimizer_does_not_know(make):
    model = small_model()
    model.get_layer("fc").trainable = False
    optimizer = make()
    optimizer.build(model.trainable_variables)
    model.get_layer("fc").trainable = True
    compiled(optimizer, model)
    refused(
        model,
        "fc",
        rf"new optimizer.*Received {type(optimizer).__name__}, built without: .*/fc/kernel, ",
    )


def test_nothing_to_freeze():
    model = keras.Sequential(
        [keras.Input([3]), keras.layers.Dropout(0.5, name="drop"), keras.layers.Dense(1)]
    )
    refused(compiled(tf_lbopt.SNGM(0.1), model), "drop", "nothing to freeze.*drop")


def test_nothing_left_to_train():
    refused(compiled(tf_lbopt.SNGM(0.1)), ["fc", "body"], "must leave something to train.*body")
