"""Every layer with a rule, against gradients of one example at a time."""

import keras
import pytest
import tensorflow as tf
from harness import graph_nodes
from helpers_per_example import BATCH, assert_exact, integers, normal, perturbed, sequential

from tf_lbopt.per_example import PerExampleTape
from tf_lbopt.per_example.contributions import squares_and_sum

L = keras.layers

CASES = {
    "dense": (lambda: [L.Dense(5, activation="tanh"), L.Dense(3, use_bias=False)], (4,)),
    "dense softmax": (lambda: [L.Dense(5, activation="softmax")], (4,)),
    "dense on positions": (lambda: [L.Dense(5, activation="relu")], (6, 4)),
    "dense on few positions": (lambda: [L.Dense(30)], (2, 40)),
    "dense on a grid": (lambda: [L.Dense(5)], (3, 2, 4)),
    "einsum to heads": (
        lambda: [L.EinsumDense("abc,cde->abde", (3, 2, 3), bias_axes="de")],
        (3, 4),
    ),
    "einsum from heads": (
        lambda: [L.EinsumDense("abcd,cde->abe", (3, 5), bias_axes="e", activation="gelu")],
        (3, 2, 4),
    ),
    "einsum with ellipsis": (lambda: [L.EinsumDense("...x,xy->...y", 5)], (2, 3, 4)),
    "einsum of blocks": (lambda: [L.EinsumDense("abc,bcd->abd", (3, 5), bias_axes="bd")], (3, 4)),
    "einsum with transposes": (
        lambda: [L.EinsumDense("abcd,dec->aeb", (5, 3), bias_axes="b")],
        (3, 2, 4),
    ),
    "einsum that sums an axis": (lambda: [L.EinsumDense("abc,cd->ad", 5, bias_axes="d")], (3, 4)),
    "conv1d valid": (lambda: [L.Conv1D(5, 3, strides=2, activation="relu")], (9, 3)),
    "conv1d same": (lambda: [L.Conv1D(5, 4, strides=3, padding="same")], (10, 3)),
    "conv1d causal": (lambda: [L.Conv1D(5, 3, padding="causal", dilation_rate=2)], (9, 3)),
    "conv1d causal strides": (lambda: [L.Conv1D(5, 3, padding="causal", strides=2)], (9, 3)),
    "conv1d channels first": (
        lambda: [L.Conv1D(4, 2, data_format="channels_first", padding="same")],
        (4, 5),
    ),
    "conv2d valid": (lambda: [L.Conv2D(5, (3, 2), activation="sigmoid")], (7, 6, 3)),
    "conv2d same, no bias": (
        lambda: [L.Conv2D(5, (4, 3), padding="same", use_bias=False)],
        (6, 7, 3),
    ),
    "conv2d strides": (lambda: [L.Conv2D(5, 3, strides=(2, 1))], (8, 7, 3)),
    "conv2d strides same": (lambda: [L.Conv2D(5, 3, strides=(2, 3), padding="same")], (8, 7, 3)),
    "conv2d strides beyond the kernel": (
        lambda: [L.Conv2D(5, 1, strides=2, padding="same")],
        (8, 7, 3),
    ),
    "conv2d dilation": (lambda: [L.Conv2D(5, 3, dilation_rate=2)], (8, 7, 3)),
    "conv2d dilation same": (
        lambda: [L.Conv2D(5, (3, 2), dilation_rate=(1, 3), padding="same")],
        (8, 7, 3),
    ),
    "conv2d groups": (lambda: [L.Conv2D(6, 3, groups=2, activation="relu")], (6, 5, 4)),
    "conv2d groups, dilation, same": (
        lambda: [L.Conv2D(4, 3, groups=2, dilation_rate=2, padding="same")],
        (6, 5, 4),
    ),
    "conv2d pointwise": (lambda: [L.Conv2D(5, 1)], (4, 3, 4)),
    "conv2d few positions": (lambda: [L.Conv2D(40, 3)], (4, 3, 16)),
    "conv3d": (lambda: [L.Conv3D(3, 2, strides=2, padding="same")], (5, 4, 3, 2)),
    "depthwise": (lambda: [L.DepthwiseConv2D(3, activation="relu")], (6, 5, 4)),
    "depthwise same, strides, multiplier": (
        lambda: [L.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)],
        (6, 5, 4),
    ),
    "depthwise dilation": (
        lambda: [L.DepthwiseConv2D(2, dilation_rate=2, use_bias=False)],
        (6, 5, 4),
    ),
    "depthwise 1d": (lambda: [L.DepthwiseConv1D(3, padding="same", depth_multiplier=2)], (7, 3)),
    "prelu": (lambda: [L.PReLU("uniform"), L.PReLU("uniform", shared_axes=[1, 3])], (5, 4, 3)),
    "layer norm": (lambda: [L.LayerNormalization()], (3, 4)),
    "layer norm over two axes": (lambda: [L.LayerNormalization(axis=[1, 3])], (3, 4, 2)),
    "layer norm without scale": (lambda: [L.LayerNormalization(scale=False)], (4,)),
    "group norm": (lambda: [L.GroupNormalization(2)], (3, 3, 4)),
    "instance norm, no shift": (lambda: [L.GroupNormalization(-1, center=False)], (3, 3, 4)),
    "group norm on another axis": (lambda: [L.GroupNormalization(2, axis=1)], (4, 3, 3)),
    "rms norm": (lambda: [L.RMSNormalization()], (3, 4)),
    "batch norm": (lambda: [L.BatchNormalization()], (3, 3, 4)),
    "batch norm on vectors": (lambda: [L.BatchNormalization(scale=False)], (4,)),
    "batch norm on another axis": (lambda: [L.BatchNormalization(axis=1, center=False)], (4, 3, 2)),
}


@pytest.fixture
def no_general_way(caplog):
    """Fails a test in which something had no rule."""
    yield
    assert not [r for r in caplog.records if r.name.startswith("tf_lbopt.per_example")]


def skip_without_channels_first():
    """TensorFlow has it on a CPU by oneDNN alone, which it uses by itself only with AVX-512."""
    try:
        tf.nn.conv2d(tf.zeros([1, 1, 2, 2]), tf.zeros([1, 1, 1, 1]), 1, "SAME", data_format="NCHW")
    except tf.errors.UnimplementedError as error:
        pytest.skip(f"no convolution with channels first without oneDNN: {error.message}")


@pytest.mark.parametrize("name", CASES)
def test_layer(name, no_general_way):
    if "channels first" in name:
        skip_without_channels_first()
    layers, inputs = CASES[name]
    model = sequential(*layers(), inputs=inputs)
    for variable in model.non_trainable_variables:  # the statistics of batch normalization
        if "moving" in variable.name:
            variable.assign(variable + 0.3)
    x = 2.0 * normal(BATCH, *inputs) + 0.5
    # For an ellipsis of several axes Keras's own output_shape has them in the wrong order.
    assert_exact(model, x, normal(*model(x).shape, seed=2))


def test_convolution_that_keras_compiles(no_general_way):
    model = sequential(L.Conv2D(6, 3, groups=2), inputs=(6, 5, 4))
    assert_exact(model, normal(BATCH, 6, 5, 4), normal(BATCH, 4, 3, 6, seed=2), graph=True)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4)])
def test_embedding(shape, dtype, no_general_way):
    model = sequential(L.Embedding(5, 3), inputs=shape, dtype=dtype)
    x = integers(BATCH, *shape, below=5) if shape else tf.constant([0, 4, 4, 2])
    if dtype == "int32":
        # The last row by either of its numbers, by both within an example.
        x = tf.tensor_scatter_nd_update(
            tf.where(x == 4, tf.constant(-1, x.dtype), x), [[0]], 4 * tf.ones_like(x[:1])
        )
        if shape == (7,):
            x = tf.tensor_scatter_nd_update(x, [[0, 2], [0, 5]], tf.constant([-1, -1], x.dtype))
    assert_exact(model, tf.cast(x, dtype), normal(BATCH, *shape, 3, seed=2))


def test_embedding_looks_up_few_rows_of_a_large_table():
    """Neither norms nor gradients make anything of the size of the table."""
    rows = 1_000_000
    model = keras.Sequential([keras.Input((6,), dtype="int32"), L.Embedding(rows, 16), L.Dense(2)])
    traced = tf.function(lambda x, y: _norms(model, x, y), autograph=False).get_concrete_function(
        tf.TensorSpec([BATCH, 6], tf.int32), tf.TensorSpec([BATCH, 6, 2])
    )
    nodes = graph_nodes(traced, add_shapes=True)
    large = {
        node.op
        for node in nodes
        for shape in node.attr["_output_shapes"].list.shape
        if any(dimension.size >= rows for dimension in shape.dim)
    }
    # These pass on the variable's own buffer.
    assert large <= {"ReadVariableOp", "StopGradient", "Identity"}
    assert "ReadVariableOp" in large


def _norms(model, x, y):
    with PerExampleTape(model.trainable_variables) as tape:
        losses = tf.reduce_mean(tf.square(model(x) - y), axis=[1, 2])
    gradients, norms = tape.gradient(losses)
    assert isinstance(gradients[0], tf.IndexedSlices)
    return norms, gradients[0].values, gradients[1:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False, "value_dim": 3},
        {"output_shape": 5, "attention_axes": 1},
        {"use_gate": True},
    ],
    ids=str,
)
def test_multi_head_attention(options, no_general_way):
    inputs = keras.Input((5, 4))
    other = L.Dense(6)(inputs)
    outputs = L.MultiHeadAttention(2, 3, **options)(inputs, other, use_causal_mask=True)
    model = perturbed(keras.Model(inputs, outputs))
    assert_exact(model, normal(BATCH, 5, 4), normal(BATCH, *model.output_shape[1:], seed=2))


def test_attention_with_masks_and_grouped_queries(no_general_way):
    inputs = keras.Input((5,), dtype="int32")
    x = L.Embedding(7, 8, mask_zero=True)(inputs)
    x = L.LayerNormalization()(x + L.GroupQueryAttention(4, 4, 2)(x, x))
    model = perturbed(keras.Model(inputs, L.MultiHeadAttention(2, 3)(x, x)))
    x = tf.constant([[1, 2, 3, 0, 0], [4, 4, 0, 0, 0], [5, 6, 5, 1, 2], [1, 0, 0, 0, 0]])
    # A mask of the predictions would weigh the losses by the valid positions of the whole batch.
    assert_exact(
        model, x, normal(BATCH, 5, 8, seed=2), lambda y, z: tf.reduce_mean((y - z) ** 2, [1, 2])
    )


def test_activation_with_weights():
    """The activation's own variable has no rule; the layer's do, before the activation."""
    model = sequential(L.Dense(5, activation=L.PReLU()), L.Dense(2), inputs=(4,))
    model(normal(BATCH, 4))  # builds the activation
    assert len(model.trainable_variables) == 5
    assert_exact(model, normal(BATCH, 4), normal(BATCH, 2, seed=2))


def test_layer_with_low_rank_adapters():
    model = sequential(L.Dense(5), L.Embedding(5, 3, lora_rank=2), inputs=(4,))
    model.layers[0].enable_lora(2)
    perturbed(model)
    x = normal(BATCH, 4)
    assert len(model.trainable_variables) == 5
    assert_exact(model, x, normal(BATCH, 5, 3, seed=2), lambda y, z: tf.reduce_sum(y * z, [1, 2]))


@pytest.mark.parametrize("budget", [1, 700])
@pytest.mark.parametrize("batch", [5, None])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_parts_of_the_batch(budget, batch, jit_compile, monkeypatch, no_general_way):
    """The batch in parts of one, or of some with a rest, in the while loop of a graph."""
    monkeypatch.setattr(f"{squares_and_sum.__module__}.BUDGET", budget)
    model = sequential(
        L.Conv2D(4, 3, padding="same"), L.Reshape((20, 4)), L.Dense(3), inputs=(5, 4, 3)
    )
    x, y = normal(5, 5, 4, 3), normal(5, 20, 3, seed=2)

    @tf.function(
        autograph=False,
        jit_compile=jit_compile,
        input_signature=[tf.TensorSpec((batch, 5, 4, 3)), tf.TensorSpec((batch, 20, 3))],
    )
    def function(x, y):
        with PerExampleTape(model.trainable_variables) as tape:
            losses = tf.reduce_mean((model(x) - y) ** 2, [1, 2])
        return tape.gradient(losses)

    gradients, norms = function(x, y)
    expected = assert_exact(model, x, y)
    for own, other in zip(norms, expected, strict=True):
        tf.debugging.assert_near(own, other, rtol=1e-4, atol=1e-6)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum((model(x) - y) ** 2) / 60
    for own, other in zip(gradients, tape.gradient(loss, model.trainable_variables), strict=True):
        tf.debugging.assert_near(own, other, rtol=1e-4, atol=1e-5)
