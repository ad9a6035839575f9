"""The reference for per-example gradients: one example at a time, on a plain tape."""

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt.per_example import example_losses, per_example_gradient_norms

BATCH = 4


def normal(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def integers(*shape, below, seed=0):
    return tf.constant(np.random.default_rng(seed).integers(0, below, size=shape))


def sequential(*layers, inputs, dtype="float32"):
    """A built model with weights that are neither zeros nor ones."""
    model = keras.Sequential([keras.Input(inputs, dtype=dtype), *layers])
    return perturbed(model)


def perturbed(model, seed=1):
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.2 * rng.normal(size=variable.shape))
    return model


def values(variables):
    return [variable.value for variable in variables]


def as_array(gradient, like):
    if gradient is None:
        return np.zeros(like.shape)
    return tf.convert_to_tensor(gradient).numpy().astype("float64")


def one_at_a_time(model, x, y, loss, sample_weight=None, training=False):
    """``[variable][example]`` gradients, each from a batch of one."""
    batch = keras.tree.flatten(x)[0].shape[0]
    gradients = [[] for _ in model.trainable_variables]
    for i in range(batch):
        one_x, one_y, one_weight = keras.tree.map_structure(
            lambda t, i=i: None if t is None else t[i : i + 1], (x, y, sample_weight)
        )
        with tf.GradientTape() as tape:
            losses = example_losses(loss, one_y, model(one_x, training=training), one_weight)
        own = tape.gradient(losses, values(model.trainable_variables))
        for rows, gradient, variable in zip(gradients, own, model.trainable_variables, strict=True):
            rows.append(as_array(gradient, variable))
    return [np.stack(rows) for rows in gradients]


def norms_of(gradients):
    return [np.sqrt((rows**2).reshape(len(rows), -1).sum(1)) for rows in gradients]


def assert_norms(received, expected, rtol=1e-4):
    """Relative to each norm, or to a millionth of the largest: some are 0 but for rounding."""
    assert len(received) == len(expected)
    floor = 1e-6 * max(np.max(rows) for rows in expected)
    assert floor > 0
    for index, (own, rows) in enumerate(zip(received, expected, strict=True)):
        np.testing.assert_allclose(own.numpy(), rows, rtol=rtol, atol=floor, err_msg=str(index))


def assert_gradients(received, expected, rtol=1e-4):
    """Of the same kinds, dense, sparse or `None`, and equal relative to their greatest element."""
    assert len(received) == len(expected)
    everything = [tf.convert_to_tensor(g).numpy() for g in expected if g is not None]
    floor = 1e-6 * max(np.abs(g).max() for g in everything)
    for own, other in zip(received, expected, strict=True):
        assert (own is None) == (other is None)
        if other is None:
            continue
        assert isinstance(own, tf.IndexedSlices) == isinstance(other, tf.IndexedSlices)
        assert own.dtype == other.dtype
        own, other = (tf.convert_to_tensor(g).numpy() for g in (own, other))
        np.testing.assert_allclose(own, other, rtol=0, atol=rtol * np.abs(other).max() + floor)


def mean_gradients(model, x, y, loss, sample_weight=None, training=False):
    with tf.GradientTape() as tape:
        losses = example_losses(loss, y, model(x, training=training), sample_weight)
        mean = tf.reduce_mean(losses)
    return tape.gradient(mean, values(model.trainable_variables))


def assert_exact(model, x, y, loss="mse", *, rtol=1e-4, graph=False, training=False, **kwargs):
    """Norms and gradients of a call against the reference; returns the norms."""
    weight = kwargs.get("sample_weight")
    expected = norms_of(one_at_a_time(model, x, y, loss, weight, training))
    function = per_example_gradient_norms
    if graph:
        function = tf.function(function, autograph=False)
    norms, gradients = function(model, x, y, loss, training=training, **kwargs)
    assert_norms(norms, expected, rtol)
    assert_gradients(gradients, mean_gradients(model, x, y, loss, weight, training), rtol)
    return norms
