"""What has no rule, rules of one's own, and the ways to get it wrong."""

import logging
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
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

from tf_lbopt.per_example import (
    OuterProducts,
    PerExampleTape,
    per_example_gradient_norms,
    register_layer,
    registry,
    tape,
)

L = keras.layers
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
MODES = pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])


@pytest.fixture(autouse=True)
def nothing_logged_before(monkeypatch):
    monkeypatch.setattr(tape, "_logged", set())


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "tf_lbopt.per_example"]


class Scale(L.Layer):
    def build(self, shape):
        self.factors = self.add_weight(shape=shape[-1:], initializer="ones", name="factors")

    def call(self, inputs):
        return inputs * self.factors


class Head(L.Layer):
    """Turns hidden states into probabilities of tokens by the table of an embedding."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def call(self, inputs):
        table = keras.ops.transpose(self.embedding.embeddings)
        return keras.ops.softmax(keras.ops.matmul(inputs, table))


def with_head():
    tokens = keras.Input((5,), dtype="int32")
    embedding = L.Embedding(7, 4)
    x = L.Dense(4, activation="tanh")(embedding(tokens))
    return perturbed(keras.Model(tokens, Head(embedding)(x)))


class Language(keras.Model):
    """Reads the table of its embedding in its own call, between two uses of a dense layer."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = L.Embedding(7, 4)
        self.shared = L.Dense(4, activation="tanh")
        self.dropout = L.Dropout(dropout, seed=1)
        self.gain = self.add_weight(shape=(4,), initializer="ones", name="gain")
        self(tf.zeros([1, 5], tf.int32))
        perturbed(self)

    def call(self, tokens, training=None):
        x = self.dropout(self.shared(self.embedding(tokens)), training=training)
        x = self.shared(x) * self.gain
        return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))


SEQUENCES = {
    "lstm": lambda: [L.LSTM(3)],
    "bidirectional gru": lambda: [L.Bidirectional(L.GRU(3))],
    "unrolled": lambda: [L.SimpleRNN(3, unroll=True)],
    "separable": lambda: [L.SeparableConv1D(4, 3), L.GlobalAveragePooling1D()],
    "transposed": lambda: [L.Conv1DTranspose(4, 3, strides=2), L.GlobalAveragePooling1D()],
    "time distributed": lambda: [L.TimeDistributed(L.Dense(3)), L.Flatten()],
    "spectral": lambda: [L.Flatten(), L.SpectralNormalization(L.Dense(3))],
}


@MODES
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.quick(name=("unrolled", "separable", "transposed", "time distributed", "spectral"))
@pytest.mark.quick(name="lstm", graph=True)
@pytest.mark.quick(name="bidirectional gru", graph=False)
def test_layers_without_a_rule(name, graph, caplog):
    model = sequential(L.Dense(4), *SEQUENCES[name](), L.Dense(3), inputs=(5, 4))
    assert_exact(model, normal(BATCH, 5, 4), normal(BATCH, 3, seed=2), graph=graph)
    assert len(lines(caplog)) == (name != "spectral")


def test_one_log_line_once(caplog):
    mixed = L.SeparableConv1D(3, 3, name="mixed")
    model = sequential(Scale(name="mine"), L.Dense(4), mixed, inputs=(5, 4))
    x, y = normal(BATCH, 5, 4), normal(BATCH, 3, 3, seed=2)
    function = tf.function(per_example_gradient_norms, autograph=False)
    for _ in range(2):
        function(model, x, y, "mse")
        function(model, x[:2], y[:2], "mse")
    (line,) = lines(caplog)
    assert line.startswith(
        "No rule covers the per-example gradients of mine (Scale), mixed (SeparableConv1D)"
    )
    assert caplog.records[0].levelno == logging.WARNING


class Several(Scale):
    """Returns several things, one of them without a gradient and one that nothing uses."""

    def call(self, inputs):
        scaled = inputs * self.factors
        return {"scaled": scaled, "both": (inputs + self.factors, scaled), "rank": 2}


@MODES
def test_layer_with_several_outputs(graph, caplog):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.several = Several()
            self(tf.zeros([1, 4]))
            perturbed(self)

        def call(self, inputs):
            outputs = self.several(inputs)
            return outputs["scaled"] * tf.sin(outputs["both"][0])

    assert_exact(Model(), normal(BATCH, 4), normal(BATCH, 4, seed=2), graph=graph)
    assert "(Several)" in lines(caplog)[0]


def test_compiled_by_xla():
    model = sequential(L.Dense(3), Scale(), L.Dense(2), inputs=(4,))
    x, y = normal(BATCH, 4), normal(BATCH, 2, seed=2)
    compiled = tf.function(per_example_gradient_norms, autograph=False, jit_compile=True)
    norms, _ = compiled(model, x, y, "mse", subset_size=3)
    assert_norms(norms, [rows[:3] for rows in norms_of(one_at_a_time(model, x, y, "mse"))])


@MODES
def test_sparse_inputs(graph):
    """The rule of a dense layer is for dense ones."""
    inputs = keras.Input([6], sparse=True)
    model = perturbed(keras.Model(inputs, L.Dense(3)(inputs)))
    dense = tf.nn.relu(normal(BATCH, 6))

    def norms(x):
        with PerExampleTape(model.trainable_variables) as tape:
            losses = tf.reduce_sum(model(x) ** 2, axis=-1)
        return tape.gradient(losses)[1]

    sparse = tf.sparse.from_dense(dense)
    of_kernel, of_bias = (tf.function(norms, autograph=False) if graph else norms)(sparse)
    expected = np.linalg.norm(2 * (dense @ model.weights[0] + model.weights[1]), axis=1)
    np.testing.assert_allclose(of_bias, expected, rtol=1e-5)
    expected *= np.linalg.norm(dense, axis=1)
    np.testing.assert_allclose(of_kernel, expected, rtol=1e-5)
    with pytest.raises(TypeError, match=r"`x` must be dense tensors.*Received: a SparseTensor"):
        per_example_gradient_norms(model, sparse, normal(BATCH, 3), "mse")


@MODES
@pytest.mark.parametrize("make", [with_head, Language])
def test_tied_weights(make, graph, caplog):
    model = make()
    x, y = integers(BATCH, 5, below=7), integers(BATCH, 5, below=7, seed=2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=make is Language)
    assert_exact(model, x, y, loss, graph=graph)
    assert len(lines(caplog)) == 1


def whole_batch(model, x, y, loss):
    """Each loss's gradient out of one forward pass; the state is put back."""
    state = [v.numpy() for v in model.non_trainable_variables]
    with tf.GradientTape(persistent=True) as plain:
        predictions = model(x, training=True)
        losses = tf.unstack(tf.reduce_mean(loss(y, predictions), axis=1))
    rows = [plain.gradient(one, values(model.trainable_variables)) for one in losses]
    for variable, value in zip(model.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return [
        np.stack([as_array(row[i], variable) for row in rows])
        for i, variable in enumerate(model.trainable_variables)
    ]


def sparse_loss(y, logits):
    # Keras makes labels floats.
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int32), logits)


@MODES
def test_call_that_can_not_be_repeated(graph, caplog):
    """The model reads variables in its own call and drops out: only whole backward passes do."""
    model = Language(dropout=0.4)
    x, y = integers(BATCH, 5, below=7), integers(BATCH, 5, below=7, seed=2)
    expected = whole_batch(model, x, y, sparse_loss)
    function = per_example_gradient_norms
    if graph:
        function = tf.function(function, autograph=False)
    for subset_size in (None, 3):
        state = [v.numpy() for v in model.non_trainable_variables]
        norms, _ = function(model, x, y, sparse_loss, subset_size=subset_size)
        for variable, value in zip(model.non_trainable_variables, state, strict=True):
            variable.assign(value)
        assert_norms(norms, [rows[:subset_size] for rows in norms_of(expected)])


@MODES
@pytest.mark.quick(graph=False)
def test_recurrent_dropout(graph):
    model = sequential(
        L.GRU(3, dropout=0.3, recurrent_dropout=0.2, seed=1, return_sequences=True), inputs=(4, 3)
    )
    x, y = normal(BATCH, 4, 3), integers(BATCH, 4, below=3)
    expected = whole_batch(model, x, y, sparse_loss)
    function = per_example_gradient_norms
    if graph:
        function = tf.function(function, autograph=False)
    norms, _ = function(model, x, y, sparse_loss)
    assert_norms(norms, norms_of(expected))


class Flattened(L.Layer):
    """Hands its dense layer all positions as if they were examples."""

    def __init__(self):
        super().__init__()
        self.dense = L.Dense(3)

    def build(self, shape):
        self.dense.build((None, shape[-1]))

    def call(self, inputs):
        flat = self.dense(keras.ops.reshape(inputs, (-1, inputs.shape[-1])))
        return keras.ops.reshape(flat, (-1, *inputs.shape[1:-1], 3))


class TimeMajor(Flattened):
    def call(self, inputs):
        return keras.ops.swapaxes(self.dense(keras.ops.swapaxes(inputs, 0, 1)), 0, 1)


@MODES
@pytest.mark.parametrize("layer", [Flattened, TimeMajor])
def test_batch_is_not_the_first_axis(layer, graph, caplog):
    """Seen by the static shapes."""
    model = sequential(layer(), inputs=(5, 4))
    assert_exact(model, normal(BATCH, 5, 4), normal(BATCH, 5, 3, seed=2), graph=graph)
    assert "kernel in dense" in lines(caplog)[0]


class Positions(L.Layer):
    """Adds what it looks up for every position, the same for all examples."""

    def __init__(self):
        super().__init__()
        self.table, self.dense = L.Embedding(BATCH, 4), L.Dense(4)
        self.table.build()
        self.dense.build((None, 4))
        self.scale = Scale()
        self.scale.build((None, 4))

    def call(self, inputs):
        positions = self.table(keras.ops.arange(inputs.shape[1]))
        return inputs + self.scale(self.dense(positions))


@MODES
@pytest.mark.parametrize("layer", [Positions, TimeMajor])
def test_another_axis_is_as_long_as_the_batch(layer, graph, caplog):
    """Then sizes do not tell one from the other."""
    model = sequential(layer(), L.Dense(3), inputs=(BATCH, 4))
    x, y = normal(BATCH, BATCH, 4), normal(BATCH, BATCH, 3, seed=2)
    assert_exact(model, x, y, graph=graph)
    (line,) = lines(caplog)
    assert "kernel in dense" in line
    assert ("(Scale)" in line) == (layer is Positions)
    # The model's dense layer has its batch first.
    assert model.layers[1].kernel.path not in line


@pytest.mark.parametrize("jit_compile", [False, True])
def test_batch_is_not_the_first_axis_at_run_time(jit_compile):
    """Without static shapes it is an error, not a wrong number."""
    model = sequential(Flattened(), inputs=(5, 4))
    specs = [tf.TensorSpec((None, 5, 4)), tf.TensorSpec((None, 5, 3))]
    function = tf.function(
        lambda x, y: per_example_gradient_norms(model, x, y, "mse"),
        autograph=False,
        jit_compile=jit_compile,
        input_signature=specs,
    )
    # XLA makes no assertions: it must not be able to compile this.
    message = "one_row_an_example" if jit_compile else "one row per example"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        function(normal(BATCH, 5, 4), normal(BATCH, 5, 3))


class Unseen(L.Layer):
    """Reads its variables in places that are hard to see into."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def build(self, shape):
        self.factors = self.add_weight(shape=shape[-1:], initializer="ones", name="factors")
        self.compiled = tf.function(lambda x: x * self.factors, autograph=False)

    def call(self, inputs):
        match self.way:
            case "variable":
                return inputs * self.factors._value
            case "function":
                return self.compiled(inputs)
            case "recomputed":
                return tf.recompute_grad(lambda x: x * tf.convert_to_tensor(self.factors))(inputs)
            case "loop":
                return tf.while_loop(
                    lambda i, x: i < 2, lambda i, x: (i + 1, x * self.factors), (0, inputs)
                )[1]
            case "branch":
                return tf.cond(
                    tf.reduce_sum(inputs) > 0, lambda: inputs * self.factors, lambda: inputs
                )
            case "mapped":
                return tf.vectorized_map(lambda row: row * self.factors, inputs)
        raise ValueError(self.way)


WAYS = ["variable", "function", "recomputed", "loop", "branch", "mapped"]


@MODES
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.quick(graph=True)
def test_hidden_reads(way, graph, caplog):
    model = sequential(L.Dense(3), Unseen(way), L.Dense(2), inputs=(4,))
    # All rows take the same branch.
    x, y = tf.abs(normal(BATCH, 4)), normal(BATCH, 2, seed=2)
    model.layers[0].kernel.assign(tf.abs(model.layers[0].kernel))
    model.layers[0].bias.assign(tf.abs(model.layers[0].bias))
    assert_exact(model, x, y, graph=graph)
    assert len(lines(caplog)) == 1
    # Nothing of the pass is kept: the layer computes what its variables say.
    before = model(x)
    model.layers[1].factors.assign(2.0 * model.layers[1].factors)
    assert np.abs(model(x) - before).max() > 1e-3


def test_rematerialized_layer(caplog):
    with keras.RematScope(mode="full"):
        layer = L.Dense(3, activation="tanh")
    model = sequential(layer, L.Dense(2), inputs=(4,))
    assert_exact(model, normal(BATCH, 4), normal(BATCH, 2, seed=2))


def test_loss_that_reads_a_variable(caplog):
    model = sequential(L.Dense(3), inputs=(4,))
    kernel = model.layers[0].kernel

    def loss(y, predictions):
        return tf.reduce_sum((y - predictions) ** 2, -1) + tf.reduce_sum(
            kernel * tf.reduce_sum(predictions, -1)[:, None, None], [1, 2]
        )

    assert_exact(model, normal(BATCH, 4), normal(BATCH, 3, seed=2), loss)
    assert "kernel (read outside its layer)" in lines(caplog)[0]


class Noise(Scale):
    """Draws random numbers that nobody can draw again, but notes them."""

    def build(self, shape):
        super().build(shape)
        self.drawn = self.add_weight(shape=(BATCH, shape[-1]), trainable=False, name="drawn")
        self.again = False

    def call(self, inputs):
        if not self.again:
            self.drawn.assign(tf.random.uniform(tf.shape(inputs)))
        return inputs * self.factors * self.drawn


@MODES
def test_layer_with_random_numbers_of_its_own(graph):
    model = sequential(L.Dense(3), Noise(), L.Dense(2), inputs=(4,))
    x, y = normal(BATCH, 4), normal(BATCH, 2, seed=2)
    function = per_example_gradient_norms
    if graph:
        function = tf.function(function, autograph=False)
    for subset_size in (None, 2):
        norms, _ = function(model, x, y, "mse", subset_size=subset_size)
        model.layers[1].again = True
        expected = whole_batch(model, x, y, lambda y, z: (y - z) ** 2)
        model.layers[1].again = False
        assert_norms(norms, [rows[:subset_size] for rows in norms_of(expected)])


class Centered(Scale):
    """Couples the examples: takes the mean of the batch from each of them."""

    def call(self, inputs):
        outputs = inputs * self.factors
        return outputs - keras.ops.mean(outputs, axis=0)


@MODES
def test_layer_that_couples_the_examples(graph):
    """An example contributes by way of its own row of what the layer returns."""
    model = sequential(Centered(), inputs=(4,))
    x, y = normal(BATCH, 4), normal(BATCH, 4, seed=2)
    (factors,) = (v.numpy() for v in model.trainable_variables)
    centered = x.numpy() - x.numpy().mean(axis=0)
    expected = 2 / 4 * (centered * factors - y.numpy()) * centered
    function = per_example_gradient_norms
    if graph:
        function = tf.function(function, autograph=False)
    for subset_size in (None, 2):
        norms, gradients = function(model, x, y, "mse", subset_size=subset_size)
        assert_norms(norms, [norms_of([expected])[0][:subset_size]])
        np.testing.assert_allclose(gradients[0], expected.mean(axis=0), rtol=1e-5)


def test_variable_that_the_loss_does_not_depend_on():
    inputs = keras.Input((4,))
    unused = L.Dense(3)
    unused.build((None, 4))

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = L.Dense(2), unused
            self(tf.zeros([1, 4]))

        def call(self, inputs):
            self.unused(inputs)
            return self.used(inputs)

    del inputs
    model = Model()
    norms, gradients = per_example_gradient_norms(model, normal(4, 4), normal(4, 2), "mse")
    assert [gradient is None for gradient in gradients] == [False, False, True, True]
    for own in norms[2:]:
        np.testing.assert_array_equal(own, np.zeros(4))


def test_frozen_layers():
    model = sequential(
        L.Dense(5, activation="relu"), L.BatchNormalization(), L.Dense(2), inputs=(4,)
    )
    model.layers[0].trainable = False
    x, y = normal(BATCH, 4), normal(BATCH, 2, seed=2)
    assert len(assert_exact(model, x, y)) == 4


def test_other_threads_and_later_calls_see_nothing():
    model = sequential(L.Dense(3), inputs=(4,))
    x = normal(BATCH, 4)
    original, value = keras.Operation.__call__, keras.Variable.value
    seen = []
    with PerExampleTape(model.trainable_variables) as recording:
        with tf.GradientTape() as plain:
            thread = threading.Thread(target=lambda: seen.append(model(x)))
            thread.start()
            thread.join()
        assert not recording._recording.uses
        losses = tf.reduce_sum(model(x), axis=1)
    assert seen[0].shape == (BATCH, 3)
    del plain
    assert keras.Operation.__call__ is original
    assert keras.Variable.value is value
    recording.gradient(losses)
    with tf.GradientTape() as plain:
        loss = tf.reduce_sum(model(x))
    assert plain.gradient(loss, model.layers[0].kernel) is not None


def test_layer_within_a_keras_loop():
    """`keras.ops.while_loop` and a layer in its body."""

    class Repeated(L.Layer):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(4, activation="tanh")

        def build(self, shape):
            self.dense.build(shape)

        def call(self, inputs):
            return keras.ops.while_loop(
                lambda i, x: i < 3, lambda i, x: (i + 1, self.dense(x)), (0, inputs)
            )[1]

    model = sequential(Repeated(), inputs=(4,))
    for graph in (False, True):
        assert_exact(model, normal(BATCH, 4), normal(BATCH, 4, seed=2), graph=graph)


# -- rules of one's own ----------------------------------------------------------------------------


@pytest.fixture
def registrations(monkeypatch):
    monkeypatch.setattr(registry, "_registrations", dict(registry._registrations))


def test_register_layer(registrations, caplog):
    calls = []

    @register_layer(Scale)
    def scale(call):
        calls.append(call)
        return [(call.layer.factors, tf.reduce_sum(call.inputs * call.output_gradient, axis=1))]

    layer = Scale()
    model = sequential(layer, L.Dense(3), inputs=(5, 4))
    assert_exact(model, normal(BATCH, 5, 4), normal(BATCH, 5, 3, seed=2))
    assert not lines(caplog)
    (call,) = calls
    assert call.layer is layer
    assert call.output_gradient.shape == call.output.shape == (BATCH, 5, 4)


def test_registered_layer_is_summed_over_its_uses(registrations):
    @register_layer(Scale)
    def scale(call):
        return [(call.layer.factors, call.inputs * call.output_gradient)]

    layer = Scale()
    inputs = keras.Input((4,))
    model = perturbed(keras.Model(inputs, layer(L.Dense(4)(layer(inputs)))))
    assert_exact(model, normal(BATCH, 4), normal(BATCH, 4, seed=2))


def test_register_layer_with_products_and_activation(registrations, caplog):
    class Mine(L.Layer):
        def __init__(self):
            super().__init__()
            self.squash = keras.activations.tanh

        def build(self, shape):
            self.matrix = self.add_weight(shape=(shape[-1], 3), name="matrix")

        def call(self, inputs):
            return self.squash(keras.ops.matmul(inputs, self.matrix))

    @register_layer(Mine, activation="squash")
    def mine(call):
        product = OuterProducts(
            (call.inputs, call.output_gradient),
            lambda left, right: (left[:, None], right[:, None]),
            lambda products: products[:, 0],
            groups=1,
            positions=5,
            rows=4,
            columns=3,
        )
        return [(call.layer.matrix, product)]

    layer = Mine()
    inputs = keras.Input((5, 4))
    model = perturbed(keras.Model(inputs, layer(inputs) + layer(inputs**2)))
    for graph in (False, True):
        assert_exact(model, normal(BATCH, 5, 4), normal(BATCH, 5, 3, seed=2), graph=graph)
    assert not lines(caplog)


def test_rule_that_declines_or_forgets(registrations, caplog):
    class Affine(Scale):
        def build(self, shape):
            super().build(shape)
            self.shift = self.add_weight(shape=shape[-1:], name="shift")

        def call(self, inputs):
            return inputs * self.factors + self.shift

    register_layer(Scale)(lambda call: NotImplemented)
    register_layer(Affine)(lambda call: [(call.layer.shift, call.output_gradient)])
    model = sequential(Scale(), Affine(), L.Dense(2), inputs=(4,))
    assert_exact(model, normal(BATCH, 4), normal(BATCH, 2, seed=2))
    (line,) = lines(caplog)
    assert line.count("factors in") == 2
    assert "shift" not in line


def test_subclass_of_a_registered_layer_has_no_rule(caplog):
    class Doubled(L.Dense):
        def call(self, inputs):
            return 2.0 * super().call(inputs)

    model = sequential(Doubled(3, activation="tanh"), inputs=(4,))
    assert_exact(model, normal(BATCH, 4), normal(BATCH, 3, seed=2))
    assert "(Doubled)" in lines(caplog)[0]


def test_rule_of_the_wrong_shape(registrations):
    register_layer(Scale)(lambda call: [(call.layer.factors, call.output_gradient)])
    model = sequential(Scale(), inputs=(5, 4))
    with pytest.raises(ValueError, match=r"The rule for Scale must return, .* \[4, 4\]. Received"):
        per_example_gradient_norms(model, normal(BATCH, 5, 4), normal(BATCH, 5, 4), "mse")


# -- bad arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": L.Dense(3)}, TypeError, "`model` must be a keras.Model"),
        ({"model": keras.Sequential([L.Dense(3)])}, ValueError, "`model` must be built"),
        ({"training": 1}, TypeError, "`training` must be True or False"),
        ({"micro_batch_size": 0}, ValueError, "`micro_batch_size` must be an integer >= 1 or None"),
        ({"micro_batch_size": 2.0}, TypeError, "`micro_batch_size` must be an integer >= 1"),
        ({"subset_size": -1}, ValueError, "`subset_size` must be an integer >= 1 or None"),
        ({"y": tf.zeros([3, 2])}, ValueError, "same batch size. Received: x with 4, y with 3"),
        ({"sample_weight": tf.zeros([5])}, ValueError, "sample_weight with 5"),
        ({"x": tf.constant(1.0)}, ValueError, "`x` must have the batch as its first axis"),
        (
            {"loss": lambda y, z: tf.reduce_mean((y - z) ** 2)},
            ValueError,
            "`loss` must return one value per example",
        ),
    ],
    ids=lambda value: value.split(".")[0] if isinstance(value, str) else "",
)
def test_bad_arguments(changed, error, message):
    arguments = {
        "model": sequential(L.Dense(2), inputs=(4,)),
        "x": normal(BATCH, 4),
        "y": normal(BATCH, 2),
        "loss": "mse",
    }
    with pytest.raises(error, match=message):
        per_example_gradient_norms(**{**arguments, **changed})


def test_micro_batches_of_an_unknown_number():
    model = sequential(L.Dense(2), inputs=(4,))

    @tf.function(autograph=False, input_signature=[tf.TensorSpec((None, 4))])
    def function(x):
        return per_example_gradient_norms(model, x, x[:, :2], "mse", micro_batch_size=2)

    with pytest.raises(ValueError, match="`micro_batch_size` needs a batch size that is known"):
        function(normal(BATCH, 4))


def test_bad_use_of_the_tape():
    model = sequential(L.Dense(2), inputs=(4,))
    with pytest.raises(TypeError, match="`variables` must be Keras variables"):
        PerExampleTape([tf.Variable(1.0)])
    with pytest.raises(ValueError, match="`subset_size` must be an integer >= 1"):
        PerExampleTape([], subset_size=0)
    unused = PerExampleTape(model.trainable_variables)
    with pytest.raises(RuntimeError, match="inside `with tape:`"):
        unused.gradient(tf.zeros([4]))
    with PerExampleTape(model.trainable_variables) as recording:
        losses = tf.reduce_sum(model(normal(BATCH, 4)), axis=1)
    with pytest.raises(ValueError, match="`losses` must be a tensor with one loss per example"):
        recording.gradient(tf.reduce_sum(losses))
    with pytest.raises(ValueError, match="`extra_loss` must be a scalar"):
        recording.gradient(losses, losses)
    with pytest.raises(RuntimeError, match="entered once"), recording:
        pass


def test_bad_registration():
    with pytest.raises(TypeError, match="`layer_class` must be a subclass"):
        register_layer(L.Dense(2))
    with pytest.raises(TypeError, match="`activation` must be the name of an attribute"):
        register_layer(Scale, activation=keras.activations.relu)


def test_example_of_a_training_step():
    """Norms and gradients of one tape agree with those of the function."""
    model = sequential(L.Dense(3, activation="relu"), L.Dense(2), inputs=(4,))
    x, y = normal(BATCH, 4), integers(BATCH, below=2)
    with PerExampleTape(model.trainable_variables, subset_size=3) as recording:
        losses = sparse_loss(y, model(x)) / BATCH
    gradients, norms = recording.gradient(losses)
    expected = norms_of(one_at_a_time(model, x, y, SPARSE))
    assert_norms([BATCH * own for own in norms], [rows[:3] for rows in expected])
    assert_gradients(gradients, mean_gradients(model, x, y, SPARSE))
