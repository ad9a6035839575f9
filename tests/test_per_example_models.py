"""Whole models in all modes: the paper's, residual, attention, shared layers, normalization."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from helpers_per_example import (
    BATCH,
    as_array,
    assert_exact,
    assert_gradients,
    assert_norms,
    integers,
    mean_gradients,
    normal,
    norms_of,
    one_at_a_time,
    perturbed,
    sequential,
    values,
)

from tf_lbopt.per_example import PerExampleTape, example_losses, per_example_gradient_norms

L = keras.layers
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fcn():
    hidden = [L.Dense(32, activation="sigmoid") for _ in range(4)]
    return sequential(L.Flatten(), *hidden, L.Dense(10), inputs=(28, 28, 1))


def cnn():
    convolutions = [
        L.Conv2D(channels, 5, strides=2, padding="same", activation="sigmoid")
        for channels in (4, 6, 8)
    ]
    return sequential(
        *convolutions,
        L.Flatten(),
        L.Dense(16, activation="sigmoid"),
        L.Dense(10),
        inputs=(28, 28, 1),
    )


def resnet(inputs=(8, 8, 3)):
    def normalized(x, channels, strides=1):
        x = L.Conv2D(channels, 3, strides, padding="same", use_bias=False)(x)
        return L.BatchNormalization()(x)

    images = keras.Input(inputs)
    x = keras.ops.relu(normalized(images, 4))
    for channels, strides in ((4, 1), (8, 2)):
        shortcut = x if strides == 1 else L.Conv2D(channels, 1, strides)(x)
        y = keras.ops.relu(normalized(x, channels, strides))
        x = keras.ops.relu(normalized(y, channels) + shortcut)
    return perturbed(keras.Model(images, L.Dense(10)(L.GlobalAveragePooling2D()(x))))


def transformer(dropout=0.0):
    tokens = keras.Input((6,), dtype="int32")
    positions = keras.ops.zeros_like(tokens) + keras.ops.arange(6)
    x = L.Embedding(10, 8)(tokens) + L.Embedding(6, 8)(positions)
    x = L.Dropout(dropout, seed=1)(L.LayerNormalization()(x))
    for _ in range(2):
        x = L.LayerNormalization()(x + L.MultiHeadAttention(2, 4, dropout=dropout)(x, x))
        y = L.Dense(8)(L.Dense(16, activation="gelu")(x))
        x = L.LayerNormalization()(x + L.Dropout(dropout, seed=2)(y))
    return perturbed(keras.Model(tokens, L.Dense(10)(x)))


def batch_for(model, batch=BATCH):
    """Inputs and integer labels."""
    shape = model.input_shape[1:]
    x = normal(batch, *shape) if len(shape) > 1 else integers(batch, *shape, below=10)
    return x, integers(batch, *model.output_shape[1:-1], below=10, seed=2)


MODELS = {"fcn": fcn, "cnn": cnn, "resnet": resnet, "transformer": transformer}


@pytest.fixture
def no_general_way(caplog):
    yield
    assert not [r for r in caplog.records if r.name.startswith("tf_lbopt.per_example")]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.quick(graph=True)
@pytest.mark.quick(name="cnn")
def test_model(name, graph, no_general_way):
    model = MODELS[name]()
    assert_exact(model, *batch_for(model), SPARSE, graph=graph)


@pytest.mark.parametrize("name", ["fcn", "cnn"])
def test_compiled_by_xla(name, no_general_way):
    model = MODELS[name]()
    x, y = batch_for(model)
    compiled = tf.function(per_example_gradient_norms, autograph=False, jit_compile=True)
    norms, gradients = compiled(model, x, y, SPARSE)
    assert_norms(norms, norms_of(one_at_a_time(model, x, y, SPARSE)))
    assert_gradients(gradients, mean_gradients(model, x, y, SPARSE))


class Subclassed(keras.Model):
    """With a nested functional model, two inputs, two outputs and a layer called three times."""

    def __init__(self):
        super().__init__()
        inputs = keras.Input((4,))
        self.inner = keras.Model(inputs, L.Dense(4, activation="tanh")(inputs))
        self.shared = L.Dense(4, activation="relu")
        self.convolution = L.Conv1D(2, 2)
        self.head = L.Dense(3)
        self({"a": tf.zeros([1, 4]), "b": tf.zeros([1, 4])})
        perturbed(self)

    def call(self, inputs):
        a, b = self.inner(inputs["a"]), self.shared(inputs["b"])
        x = self.shared(self.shared(a) + b)
        return self.head(x), self.convolution(keras.ops.stack([a, b, x], axis=1))


def two_losses(y, outputs):
    return tf.reduce_sum((y - outputs[0]) ** 2, -1) + 0.1 * tf.reduce_sum(outputs[1] ** 2, [1, 2])


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_subclassed_model_with_a_shared_layer(graph, no_general_way):
    x = {"a": normal(BATCH, 4), "b": normal(BATCH, 4, seed=1)}
    y = normal(BATCH, 3, seed=2)
    assert_exact(Subclassed(), x, y, two_losses, graph=graph)


def called_twice(layer, second, inputs, dtype="float32"):
    """A model that calls a layer twice, the second time on something else."""
    x = keras.Input(inputs, dtype=dtype)
    return perturbed(keras.Model(x, [layer(x), layer(second(x))]))


@pytest.mark.parametrize(
    ("layer", "second", "inputs"),
    [
        (lambda: L.Dense(4, activation="tanh"), lambda x: 2.0 - x, (4,)),
        (lambda: L.Dense(5), lambda x: x[:, :2], (3, 4)),
        (lambda: L.Conv2D(5, 2), lambda x: x[:, 1:], (4, 4, 3)),
        (lambda: L.DepthwiseConv2D(2), lambda x: x[:, 1:], (4, 4, 3)),
        (lambda: L.LayerNormalization(), lambda x: 2.0 * x[:, 1:], (4, 3)),
        (lambda: L.Conv2D(9, 2), lambda x: x[:, 1:], (3, 2, 16)),  # in Gram form
    ],
)
def test_layer_called_twice(layer, second, inputs, no_general_way):
    model = called_twice(layer(), second, inputs)
    norms = assert_exact(model, normal(BATCH, *inputs), tf.zeros([BATCH]), _to_number)
    assert all(np.all(own > 0) for own in norms)


def _to_number(y, outputs):
    """Some function of all outputs, per example."""
    flat = [tf.reshape(t, [t.shape[0], -1]) for t in outputs]
    x = tf.concat(flat, axis=1)
    return tf.reduce_sum(tf.sin(x) * tf.range(x.shape[1], dtype=x.dtype), axis=1) - y


def test_embedding_called_twice(no_general_way):
    model = called_twice(L.Embedding(6, 3), lambda x: keras.ops.maximum(x - 1, 0), (5,), "int32")
    assert_exact(model, integers(BATCH, 5, below=6), tf.zeros([BATCH]), _to_number)


def test_norm_of_a_shared_layer_is_that_of_the_sum():
    """Not the sum of the norms: here the two uses cancel."""
    layer = L.Dense(3, use_bias=False)
    x = keras.Input((4,))
    model = keras.Model(x, layer(x) - layer(x) + 0.5 * layer(x))
    x = normal(BATCH, 4)
    loss = lambda y, z: tf.reduce_sum(y * z, -1)  # noqa: E731
    y = normal(BATCH, 3, seed=2)
    (norms,), _ = per_example_gradient_norms(model, x, y, loss)
    expected = 0.5 * tf.norm(x, axis=1) * tf.norm(y, axis=1)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


# -- batch normalization in training form ----------------------------------------------------------


def contributions(model, x, y, loss):
    """By definition: the gradient with respect to each example's own copy of the variables."""
    variables = model.trainable_variables
    copies = [tf.repeat(variable.value[None], len(x), axis=0) for variable in variables]
    place = {id(variable): i for i, variable in enumerate(variables)}
    with tf.GradientTape() as tape:
        tape.watch(copies)
        losses = example_losses(loss, y, _by_hand(model, x, lambda v: copies[place[id(v)]]))
        total = tf.reduce_sum(losses)
    return [own.numpy().astype("float64") for own in tape.gradient(total, copies)]


def _by_hand(model, x, copy_of):
    """What a Sequential model computes if every example has a copy of each variable."""
    for layer in model.layers:
        if isinstance(layer, L.Conv2D):
            rows = zip(tf.unstack(x), tf.unstack(copy_of(layer.kernel)), strict=True)
            x = tf.stack(
                [tf.nn.conv2d(row[None], kernel, layer.strides, "SAME")[0] for row, kernel in rows]
            )
        elif isinstance(layer, L.Dense):
            x = tf.einsum("bi,bio->bo", x, copy_of(layer.kernel)) + copy_of(layer.bias)
        elif isinstance(layer, L.BatchNormalization):
            mean, variance = tf.nn.moments(x, list(range(x.shape.rank - 1)))
            x = (x - mean) / tf.sqrt(variance + layer.epsilon)
            shape = [x.shape[0], *[1] * (x.shape.rank - 2), x.shape[-1]]
            x = x * tf.reshape(copy_of(layer.gamma), shape) + tf.reshape(copy_of(layer.beta), shape)
        else:
            x = layer(x)
    return x


def normalized_net(*more):
    return sequential(
        L.Conv2D(4, 3, padding="same", use_bias=False),
        L.BatchNormalization(),
        L.ReLU(),
        L.Conv2D(5, 3, strides=2, padding="same", use_bias=False),
        L.BatchNormalization(),
        L.ReLU(),
        *(layer() for layer in more),
        L.GlobalAveragePooling2D(),
        L.Dense(6),
        L.BatchNormalization(),
        L.Dense(10),
        inputs=(6, 6, 3),
    )


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_batch_normalization_in_training_form(graph, no_general_way):
    model = normalized_net()
    model.layers[4].gamma.assign(tf.constant([0.0, 1.0, 0.0, 2.0, -1.0]))
    x, y = batch_for(model)
    before = [v.numpy() for v in model.non_trainable_variables]
    expected = contributions(model, x, y, SPARSE)
    function = per_example_gradient_norms
    if graph:
        function = tf.function(function, autograph=False)
    norms, gradients = function(model, x, y, SPARSE, training=True)
    assert_norms(norms, norms_of(expected))
    after = [v.numpy() for v in model.non_trainable_variables]
    # They add up to the gradient of the batch.
    for own, rows in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(own, rows.mean(axis=0), rtol=1e-4, atol=1e-6)
    # They are something else than the gradients of the examples' losses.
    alone = norms_of(whole_batch_gradients(model, x, y, SPARSE))
    assert max(np.max(np.abs(a / b - 1)) for a, b in zip(norms, alone, strict=True)) > 0.1
    # The statistics moved as in one call.
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        variable.assign(value)
    model(x, training=True)
    for variable, value in zip(model.non_trainable_variables, after, strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-5, atol=1e-6)


def whole_batch_gradients(model, x, y, loss, training=True):
    """``[variable][example]`` gradients of each loss out of one forward pass of the whole batch."""
    with tf.GradientTape(persistent=True) as tape:
        losses = tf.unstack(example_losses(loss, y, model(x, training=training)))
    variables = model.trainable_variables
    rows = [tape.gradient(one, values(variables)) for one in losses]
    return [
        np.stack([as_array(row[i], variable) for row in rows])
        for i, variable in enumerate(variables)
    ]


def restore(model, state):
    for variable, value in zip(model.non_trainable_variables, state, strict=True):
        variable.assign(value)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.quick(graph=True)
def test_dropout_has_the_mask_of_the_forward_pass(graph, no_general_way):
    model = transformer(dropout=0.3)
    x, y = batch_for(model)
    state = [v.numpy() for v in model.non_trainable_variables]
    expected = whole_batch_gradients(model, x, y, SPARSE)
    restore(model, state)
    function = per_example_gradient_norms
    if graph:
        function = tf.function(function, autograph=False)
    norms, gradients = function(model, x, y, SPARSE, training=True)
    assert_norms(norms, norms_of(expected))
    restore(model, state)
    assert_gradients(gradients, mean_gradients(model, x, y, SPARSE, training=True))


# -- arguments that change what is computed --------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("micro_batch_size", [None, 2, 3, 9])
@pytest.mark.quick(graph=True)
@pytest.mark.quick(micro_batch_size=2)
def test_micro_batches_and_subsets(micro_batch_size, graph, no_general_way):
    model = sequential(
        L.Embedding(10, 6),
        L.Conv1D(4, 3, activation="relu"),
        L.LayerNormalization(),
        L.Flatten(),
        L.Dense(3),
        inputs=(6,),
        dtype="int32",
    )
    x, y = integers(5, 6, below=10), integers(5, below=3)
    expected = norms_of(one_at_a_time(model, x, y, SPARSE))
    gradients = [tf.convert_to_tensor(g) for g in mean_gradients(model, x, y, SPARSE)]
    for subset_size in (None, 4) if graph else (None, 1, 2, 4, 5, 8):
        function = per_example_gradient_norms
        if graph:
            function = tf.function(function, autograph=False)
        norms, received = function(
            model, x, y, SPARSE, micro_batch_size=micro_batch_size, subset_size=subset_size
        )
        assert isinstance(received[0], tf.IndexedSlices)
        assert_norms(norms, [rows[:subset_size] for rows in expected])
        assert_gradients([tf.convert_to_tensor(g) for g in received], gradients)


def test_subset_of_a_batch_of_unknown_size(no_general_way):
    model = sequential(L.Dense(4), L.LayerNormalization(), L.Dense(3), inputs=(4,))
    specs = [tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int64)]
    function = tf.function(
        lambda x, y: per_example_gradient_norms(model, x, y, SPARSE, subset_size=3),
        autograph=False,
        input_signature=specs,
    )
    for batch in (5, 2):
        x, y = normal(batch, 4), integers(batch, below=3)
        norms, gradients = function(x, y)
        assert_norms(norms, [rows[:3] for rows in norms_of(one_at_a_time(model, x, y, SPARSE))])
        assert_gradients(gradients, mean_gradients(model, x, y, SPARSE))


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1), (BATCH, 6)], ids=str)
def test_sample_weights(shape, no_general_way):
    model = transformer()
    weight = tf.abs(normal(*shape, seed=3)) * tf.reshape(
        [1.0, 0.0, 2.0, 1.0], [BATCH, 1][: len(shape)]
    )
    if shape == (BATCH,):
        model = sequential(L.Dense(10), inputs=(4,))
        x, y = normal(BATCH, 4), integers(BATCH, below=10)
    else:
        x, y = batch_for(model)
    norms = assert_exact(model, x, y, SPARSE, sample_weight=weight)
    assert all(own[1] == 0 for own in norms)


@pytest.mark.parametrize(
    "loss",
    [
        "mse",
        "crossentropy-like",
        keras.losses.MeanAbsoluteError(reduction=None),
        keras.losses.MeanAbsoluteError(reduction="sum"),
        keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        keras.losses.huber,
        lambda y, z: (y - z) ** 4,
        lambda y, z: tf.reduce_sum(tf.abs(y - z), axis=[1, 2]),
    ],
    ids=["name", "name of another", "none", "sum", "weighted mean", "function", "lambda", "vector"],
)
def test_losses(loss, no_general_way):
    loss = "log_cosh" if loss == "crossentropy-like" else loss
    model = sequential(L.Dense(3, activation="tanh"), inputs=(5, 4))
    x, y = normal(BATCH, 5, 4), normal(BATCH, 5, 3, seed=2)
    losses = example_losses(loss, y, model(x))
    assert losses.shape == (BATCH,)
    function = keras.losses.get(loss)
    if isinstance(function, keras.losses.Loss):
        function = function.call
    np.testing.assert_allclose(
        losses, tf.reduce_mean(tf.reshape(function(y, model(x)), [BATCH, -1]), 1), rtol=1e-5
    )
    assert_exact(model, x, y, loss)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mean_of_the_losses_is_that_of_keras(reduction, weighted):
    x = tf.constant([[1, 2, 3, 0], [4, 0, 0, 0]])
    predictions = L.Dense(3)(L.Embedding(5, 2, mask_zero=True)(x))
    y = tf.constant([[0, 1, 2, 0], [1, 1, 1, 1]])
    weight = tf.constant([2.0, 0.5]) if weighted else None
    weight = weight if weight is None else weight[:, None]
    loss = keras.losses.SparseCategoricalCrossentropy(True, reduction=reduction)
    losses = example_losses(loss, y, predictions, weight)
    np.testing.assert_allclose(tf.reduce_mean(losses), loss(y, predictions, weight), rtol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.quick(policy=("mixed_float16", "mixed_bfloat16"))
def test_dtype_policies(policy, no_general_way):
    keras.config.set_dtype_policy(policy)
    model = sequential(
        L.Conv2D(4, 3, padding="same", activation="relu"),
        L.BatchNormalization(),
        L.Conv2D(6, 2, groups=2),
        L.LayerNormalization(),
        L.Flatten(),
        L.Dense(3, dtype="float64" if policy == "float64" else "float32"),
        inputs=(6, 6, 2),
    )
    x, y = normal(BATCH, 6, 6, 2), integers(BATCH, below=3)
    # Both sides round in half precision, at other places.
    rtol = {"mixed_float16": 4e-3, "mixed_bfloat16": 3e-2, "float64": 1e-6}[policy]
    norms = assert_exact(model, x, y, SPARSE, rtol=rtol)
    wide = tf.float64 if policy == "float64" else tf.float32
    assert {own.dtype for own in norms} == {wide}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_embedding(policy, no_general_way):
    keras.config.set_dtype_policy(policy)
    model = sequential(L.Embedding(5, 4), L.Dense(3, dtype="float32"), inputs=(6,), dtype="int32")
    x, y = integers(BATCH, 6, below=5), integers(BATCH, 6, below=3)
    assert_exact(model, x, y, SPARSE, rtol=4e-3 if policy == "mixed_float16" else 3e-2)


# -- strategies and Keras's own training step ------------------------------------------------------


@pytest.mark.parametrize(
    "layers", [[], [lambda: L.Conv2DTranspose(4, 2)]], ids=["rules", "the general way too"]
)
def test_replicas(layers):
    strategy = strategy_of(2)
    with strategy.scope():
        model = normalized_net(*layers)
    x, y = batch_for(model, 8)
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    local = [
        strategy.experimental_distribute_values_from_function(
            lambda context, k=k: halves[context.replica_id_in_sync_group][k]
        )
        for k in range(2)
    ]

    @tf.function(autograph=False)
    def step(x, y):
        return strategy.run(
            lambda x, y: per_example_gradient_norms(model, x, y, SPARSE, training=False), (x, y)
        )

    norms, gradients = step(*local)
    for replica, (own_x, own_y) in enumerate(halves):
        assert_norms(
            [strategy.experimental_local_results(own)[replica] for own in norms],
            norms_of(one_at_a_time(model, own_x, own_y, SPARSE)),
        )
        assert_gradients(
            [strategy.experimental_local_results(own)[replica] for own in gradients],
            mean_gradients(model, own_x, own_y, SPARSE),
        )


def regularized(training_form):
    tokens = keras.Input((6,), dtype="int32")
    x = L.Embedding(10, 8, embeddings_regularizer="l2")(tokens)
    x = L.Conv1D(6, 3, kernel_regularizer="l1", activity_regularizer="l2")(x)
    x = L.BatchNormalization()(x, training=training_form)
    x = L.ActivityRegularization(0.1)(L.Dropout(0.2, seed=1)(x))
    return perturbed(keras.Model(tokens, L.Dense(10)(L.Flatten()(x))))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_training_step_on_the_tape_is_that_of_keras(scale):
    """With regularizers of weights and activities, dropout and a loss scale."""
    model = regularized(training_form=True)
    x, y = batch_for(model)
    start = [v.numpy() for v in model.variables]
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss=SPARSE)
    model.train_on_batch(x, y)
    expected = [a - v.numpy() for a, v in zip(start, model.variables, strict=True)]
    expected = [
        difference for difference, v in zip(expected, model.variables, strict=True) if v.trainable
    ]
    for variable, value in zip(model.variables, start, strict=True):
        variable.assign(value)

    @tf.function(autograph=False)
    def step(x, y, extra):
        with PerExampleTape(model.trainable_variables) as tape:
            losses = scale / BATCH * example_losses(SPARSE, y, model(x, training=True))
            extra = scale * tf.add_n(model.losses) if extra else None
        return tape.gradient(losses, extra)

    gradients, norms = step(x, y, extra=True)
    for gradient, difference in zip(gradients, expected, strict=True):
        own = tf.convert_to_tensor(gradient) / scale
        np.testing.assert_allclose(own, difference, rtol=1e-4, atol=2e-6)
    # The regularizers are not in the norms.
    for variable, value in zip(model.variables, start, strict=True):
        variable.assign(value)
    without, same = step(x, y, extra=False)
    assert any(
        np.abs(tf.convert_to_tensor(a) - tf.convert_to_tensor(b)).max() > 0.01 * scale
        for a, b in zip(gradients, without, strict=True)
    )
    assert_norms(same, [own.numpy() for own in norms], rtol=1e-5)
