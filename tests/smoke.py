"""One program that uses every part of the installed package; run in each cell of `make matrix`.

    python tests/smoke.py [--json=FILE]

It needs nothing but the package and what that requires. Prints a line for each check, and ends
with exit code 1 if one failed. Values are compared, so that a version that computes something else
is noticed, and not only one that raises.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tf_lbopt

REPLICAS = 2
X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 1)).astype("float32")
PACKAGES = ("tensorflow", "keras", "numpy", "tf_keras", "tf-models-official")
# Plain, mean norm, variance, own gradient: what differs is how gradients reach the rule.
KINDS = ("lars", "clars", "vr_lamb", "extrap_sgd")
CHECKS: dict[str, Callable[[], None]] = {}

# What an optimizer of the table needs besides a rate to make visible steps here.
_LAYERWISE = {"lars": 1.0, "vr_lars": 1.0, "clars": 1.0, "lamb": 0.01, "vr_lamb": 0.01}
ARGUMENTS = {
    name: {"learning_rate": rate, "weight_decay": 0.01} for name, rate in _LAYERWISE.items()
}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Decorator: one of the checks, in this order."""
    CHECKS[function.__name__] = function
    return function


def model_of(layers: list[Any] | None = None, dtype: str = "float32") -> keras.Model:
    """A small model, always with the same weights."""
    keras.utils.set_random_seed(0)
    layers = layers or [keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)]
    for layer in layers:
        layer.dtype_policy = keras.dtype_policies.DTypePolicy(dtype)
    return keras.Sequential([keras.Input([4]), *layers])


@contextlib.contextmanager
def strategy_scope(replicas: int) -> Iterator[None]:
    """Under the process's one strategy, or on one device."""
    if replicas == 1:
        yield
        return
    with STRATEGY.scope():
        yield


def fitted(
    make: Callable[[], Any], replicas: int = 1, epochs: int = 2, batch: int = 32, **compiled: Any
) -> keras.Model:
    """A model after a few updates by `fit`."""
    with strategy_scope(replicas):
        model = model_of()
        model.compile(make(), loss="mse", **compiled)
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(batch, drop_remainder=True)
    model.fit(dataset, epochs=epochs, verbose=0)
    return model


def weights_of(model: Any) -> np.ndarray:
    """All weights, in a row."""
    return np.concatenate([w.ravel() for w in model.get_weights()])


def updates(model: Any) -> int:
    """How many its optimizer has made."""
    return int(model.optimizer.iterations.numpy())


def assert_trained(model: Any) -> None:
    """Weights are finite, and not those that a model begins with."""
    after, before = weights_of(model), weights_of(model_of())
    assert np.all(np.isfinite(after)), after
    assert np.any(after != before)


def optimizers(*names: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every optimizer of the table, or those of these names, with arguments."""
    for info in tf_lbopt.list_optimizers():
        if names and info.name not in names:
            continue
        arguments = ARGUMENTS.get(info.name, {"learning_rate": 0.05})
        yield (
            info.name,
            lambda info=info, arguments=arguments, **more: info.cls(**{**arguments, **more}),
        )


@check
def one_device_equals_two_replicas() -> None:
    """Every optimizer: 1 × 4 sub-batches and 2 × 2 give the same weights."""
    for name, make in optimizers():
        if name.startswith("extrap"):  # a replica has one past gradient: no such invariance
            assert_trained(fitted(lambda make=make: make(gradient_accumulation_steps=2), 2))
            continue
        one = fitted(lambda make=make: make(gradient_accumulation_steps=4), 1, batch=8)
        two = fitted(lambda make=make: make(gradient_accumulation_steps=2), 2, batch=16)
        assert_trained(one)
        assert updates(one) == updates(two) == 2, name
        # Sub-batches hold other examples: the mean is the same, statistics of them are not.
        # `fit` of Keras 3.7 takes the sum over replicas, which is warned of.
        if not one.optimizer.statistics and not keras.__version__.startswith("3.7."):
            np.testing.assert_allclose(weights_of(one), weights_of(two), rtol=0, atol=2e-6)


@check
def equals_keras() -> None:
    """LAMB without decay is Keras's Lamb; VRGD with γ = 1 is its base."""
    ours = fitted(lambda: tf_lbopt.LAMB(0.01, epsilon=1e-7))
    stock = fitted(lambda: keras.optimizers.Lamb(0.01, epsilon=1e-7))
    np.testing.assert_allclose(weights_of(ours), weights_of(stock), rtol=0, atol=1e-6)
    arguments = {"gradient_accumulation_steps": 2}
    reduced = fitted(lambda: tf_lbopt.VRLARS(1.0, gamma=1.0, **arguments), batch=16)
    base = fitted(lambda: tf_lbopt.LARS(1.0, **arguments), batch=16)
    np.testing.assert_array_equal(weights_of(reduced), weights_of(base))


@check
def compiled_by_xla() -> None:
    """`fit(jit_compile=True)` gives what it gives without."""
    for name, make in optimizers(*KINDS):
        more = {} if name.startswith("extrap") else {"gradient_accumulation_steps": 2}
        runs = [
            fitted(lambda make=make, more=more: make(**more), batch=16, jit_compile=compiled)
            for compiled in (True, False)
        ]
        np.testing.assert_allclose(*map(weights_of, runs), rtol=0, atol=1e-5, err_msg=name)


@check
def resumes_from_a_keras_file() -> None:
    """Saved in mid-accumulation, loaded, and on in lockstep."""
    for _, make in optimizers(*KINDS):
        model = fitted(lambda make=make: make(gradient_accumulation_steps=3), batch=8, epochs=1)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            model.save(path)
            loaded = keras.saving.load_model(path)
        assert_lockstep(model, loaded)


@check
def resumes_from_a_checkpoint() -> None:
    """The same by `tf.train.Checkpoint`, under two replicas."""
    for _, make in optimizers(*KINDS):

        def new(make: Callable[..., Any] = make) -> keras.Model:
            return fitted(lambda: make(gradient_accumulation_steps=3), 2, epochs=1, batch=8)

        model, other = new(), new()
        other.set_weights([0 * weight for weight in other.get_weights()])
        with tempfile.TemporaryDirectory() as folder:
            path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(
                os.path.join(folder, "checkpoint")
            )
            tf.train.Checkpoint(model=other, optimizer=other.optimizer).read(path)
        assert_lockstep(model, other)


def assert_lockstep(model: keras.Model, other: keras.Model) -> None:
    """Both are the same now, and after further steps on the same data."""
    np.testing.assert_array_equal(weights_of(model), weights_of(other))
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    for one in (model, other):
        one.fit(dataset, epochs=1, verbose=0)
    assert updates(model) == updates(other)
    np.testing.assert_array_equal(weights_of(model), weights_of(other))


@check
def loss_scaling_in_float16() -> None:
    """An overflow on any replica halves the scale and changes nothing else."""
    for inner in (lambda: tf_lbopt.LARS(1.0), lambda: keras.optimizers.SGD(0.01)):
        with strategy_scope(2):
            layers = [keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)]
            model = model_of(layers, "mixed_float16")
            optimizer = tf_lbopt.LossScaleOptimizer(inner(), initial_scale=2.0**10)
            model.compile(optimizer, loss="mse")
        dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)
        model.fit(dataset, epochs=2, verbose=0)
        assert updates(model) == 2
        before = weights_of(model)
        bad = Y.copy()
        bad[-1] = np.inf  # the second replica's
        model.fit(tf.data.Dataset.from_tensor_slices((X, bad)).batch(32), verbose=0)
        assert optimizer.dynamic_scale.numpy() == 2.0**9
        assert optimizer.skipped_updates.numpy() == 1
        np.testing.assert_array_equal(before, weights_of(model))


@check
def wrappers() -> None:
    """VarianceReduced and Accumulated around stock ones, PostLocalSGD and ExtrapSGD, by `fit`."""
    arguments = {"gradient_accumulation_steps": 4}
    accumulated = fitted(lambda: tf_lbopt.Accumulated(keras.optimizers.Adam(0.05), 4), 2)
    own = fitted(lambda: tf_lbopt.Adam(0.05, **arguments), 2)
    np.testing.assert_allclose(weights_of(accumulated), weights_of(own), rtol=0, atol=1e-6)
    reduced = fitted(
        lambda: tf_lbopt.VarianceReduced(keras.optimizers.Adam(0.05), beta_3=0.9, **arguments), 2
    )
    own = fitted(lambda: tf_lbopt.VRAdam(0.05, **arguments), 2)
    np.testing.assert_allclose(weights_of(reduced), weights_of(own), rtol=0, atol=1e-6)
    local = fitted(
        lambda: tf_lbopt.PostLocalSGD(keras.optimizers.SGD(0.05, momentum=0.9), 1, 2), 2, epochs=5
    )
    assert_trained(local)
    assert updates(local) == 5
    assert_trained(fitted(lambda: tf_lbopt.ExtrapSGD(0.05, extrapolation_rate=0.05), 2, epochs=3))
    nesterov = fitted(lambda: tf_lbopt.ExtrapSGD(0.05, momentum=0.0, extrapolation_rate=0.0), 2)
    sgd = fitted(lambda: keras.optimizers.SGD(0.05), 2)
    np.testing.assert_allclose(weights_of(nesterov), weights_of(sgd), rtol=0, atol=1e-6)


@check
def norms_of_single_examples() -> None:
    """Those of every kind of layer against one example at a time; and CLARS by `fit`."""
    layers = [
        keras.layers.Reshape([4, 1]),
        keras.layers.Conv1D(3, 2, activation="relu"),
        keras.layers.LayerNormalization(),
        keras.layers.Flatten(),
        keras.layers.Dense(1),
    ]
    model = model_of(layers)
    loss = keras.losses.MeanSquaredError()
    norms, _ = tf_lbopt.per_example_gradient_norms(model, X[:4], Y[:4], loss=loss)
    for index in range(4):
        with tf.GradientTape() as tape:
            value = loss(Y[index : index + 1], model(X[index : index + 1], training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        alone = [float(tf.norm(gradient)) for gradient in gradients]
        np.testing.assert_allclose([float(norm[index]) for norm in norms], alone, rtol=1e-4)
    inputs = keras.Input([4])
    model = tf_lbopt.PerExampleNormsModel(inputs, keras.layers.Dense(1)(inputs))
    model.compile(tf_lbopt.CLARS(1.0, norm_estimator="per_example"), loss="mse")
    model.fit(X, Y, verbose=0)
    assert updates(model) == 1


@check
def callbacks_and_schedules() -> None:
    """They are told of updates, under Keras's own trainer."""
    decay = keras.optimizers.schedules.PolynomialDecay(1.0, 8, end_learning_rate=0.0)
    schedule = tf_lbopt.schedules.Warmup(decay, steps=2)
    model = model_of()
    model.compile(tf_lbopt.VRLARS(schedule, gradient_accumulation_steps=2), loss="mse")
    ours = tf_lbopt.callbacks
    callbacks = [
        ours.SkippedUpdates(),
        ours.GradientSignalToNoise(),
        ours.FreezeLayers(model.layers[:1], 1),
    ]
    history = model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    assert updates(model) == 4
    assert np.all(np.isfinite(history.history["loss"]))


@check
def tf_keras_optimizers() -> None:
    """The tf_keras classes equal those of Keras 3."""
    import tf_keras

    import tf_lbopt.tf_keras as legacy

    for name, make in optimizers():
        cls = getattr(legacy, type(make()).__name__, None)
        if cls is None or name.startswith("extrap"):
            continue
        arguments = ARGUMENTS.get(name, {"learning_rate": 0.05})
        model = tf_keras.Sequential(
            [tf_keras.layers.Dense(3, "tanh", input_shape=(4,)), tf_keras.layers.Dense(1)]
        )
        model.set_weights(model_of().get_weights())
        model.compile(cls(**arguments, gradient_accumulation_steps=2), loss="mse")
        model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        other = fitted(lambda make=make: make(gradient_accumulation_steps=2), batch=16)
        np.testing.assert_allclose(
            weights_of(model), weights_of(other), rtol=0, atol=2e-6, err_msg=name
        )


@check
def tf_models() -> None:
    """The optimizers are registered with tf-models."""
    from official.core import exp_factory
    from official.vision import configs  # noqa: F401

    import tf_lbopt.tfm  # noqa: F401

    config = exp_factory.get_exp_config("resnet_imagenet")
    config.override({"trainer": {"optimizer_config": {"optimizer": {"type": "vr_lars"}}}})
    assert config.trainer.optimizer_config.optimizer.type == "vr_lars"


_NEEDS = {"tf_keras_optimizers": "tf_keras", "tf_models": "official"}


def main() -> int:
    """Runs all checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--only", help="run checks whose names contain this")
    arguments = parser.parse_args()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    versions["tensorflow"] = tf.__version__
    versions["tf_lbopt"] = tf_lbopt.__version__
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    results: dict[str, str] = {}
    for name, function in CHECKS.items():
        if arguments.only and arguments.only not in name:
            continue
        missing = name in _NEEDS and importlib.util.find_spec(_NEEDS[name]) is None
        start = time.monotonic()
        if missing:
            results[name] = "not installed"
        else:
            try:
                function()
                results[name] = "ok"
            except Exception:
                traceback.print_exc()
                results[name] = "failed"
            keras.backend.clear_session()
        print(f"{name:35} {results[name]:14} {time.monotonic() - start:5.1f} s", flush=True)
    if arguments.json:
        text = json.dumps({"versions": versions, "results": results}, indent=1)
        pathlib.Path(arguments.json).write_text(text + "\n")
    return int("failed" in results.values())


if __name__ == "__main__":
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 3
    )
    STRATEGY = tf.distribute.MirroredStrategy([f"CPU:{1 + i}" for i in range(REPLICAS)])
    sys.exit(main())
