"""CLARS(norm_estimator="per_example") through `fit`, against the NumPy reference."""

import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from forked_python import python

import tf_lbopt
from benchmarks.references import clars
from tf_lbopt import _compat

ARGUMENTS = {"learning_rate": 0.5, "trust_coefficient": 0.05, "weight_decay": 0.01}


def initial():
    rng = np.random.default_rng(1)
    return [rng.normal(size=(4, 3)), rng.normal(size=(3,))]


def batches(count=5, rows=8):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(count, rows, 4)), rng.normal(size=(count, rows, 3))
    return x.astype("float32"), y.astype("float32"), rng.uniform(0.5, 2, (count, rows))


def reference(data, micro_steps=1, weighted=False, subset=None, replicas=1, total=False):
    """Weights of a linear model with a squared error, each example's gradient by itself."""
    weights = [w.astype("float32").astype(float) for w in initial()]
    x, y, sample_weight = (a.astype(float) for a in data)
    velocity = [np.zeros_like(w) for w in weights]
    for start in range(0, len(x), micro_steps):
        means, norms = [], []
        for i in range(start, start + micro_steps):
            kernel, bias = weights
            factor = 2 * (x[i] @ kernel + bias - y[i]) / 3
            if weighted:
                factor = factor * sample_weight[i][:, None]
            if total:
                factor = factor * 3 * len(factor)
            gradients = [np.einsum("bi,bo->bio", x[i], factor), factor]
            means.append([g.mean(axis=0) for g in gradients])
            chosen = np.concatenate(
                [part[:subset] for part in np.split(np.arange(len(factor)), replicas)]
            )
            norms.append([np.mean([np.linalg.norm(g[j]) for j in chosen]) for g in gradients])
        mean = [np.mean(g, axis=0) for g in zip(*means, strict=True)]
        n = np.mean(norms, axis=0)
        for j in range(2):
            g = mean[j] + ARGUMENTS["weight_decay"] * weights[j]
            rate = (
                ARGUMENTS["learning_rate"]
                * ARGUMENTS["trust_coefficient"]
                * np.linalg.norm(weights[j])
                / n[j]
            )
            velocity[j] = 0.9 * velocity[j] - rate * g
            weights[j] = weights[j] + 0.9 * velocity[j] - rate * g
    return weights


def linear(replicas=1, loss="mse", wrap=lambda o: o, dtype=None, subset=None, **kwargs):
    with strategy_of(replicas).scope():
        inputs = keras.Input([4])
        model = tf_lbopt.PerExampleNormsModel(inputs, keras.layers.Dense(3, dtype=dtype)(inputs))
        model.norms_subset_size = subset
        model.set_weights(initial())
        optimizer = tf_lbopt.CLARS(norm_estimator="per_example", **ARGUMENTS, **kwargs)
        model.compile(optimizer=wrap(optimizer), loss=loss)
    return model


def fit(model, data, weighted=False):
    arrays = tuple(a.astype("float32") for a in (data if weighted else data[:2]))
    return model.fit(tf.data.Dataset.from_tensor_slices(arrays), verbose=0, shuffle=False)


def assert_close(got, expected, rtol=2e-5, atol=2e-6):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.quick(replicas=2, weighted=True)
def test_fit_equals_the_reference(replicas, weighted):
    data = batches()
    model = linear(replicas)
    fit(model, data, weighted)
    expected = reference(data, weighted=weighted)
    assert_close(model.get_weights(), expected)
    by_sub_batch = clars(
        initial(), _means(data), [[np.linalg.norm(g) for g in m] for m in _means(data)], **ARGUMENTS
    )
    assert np.abs(by_sub_batch[0] - expected[0]).max() > 1e-3


def _means(data):
    x, y, _ = data
    factors = [2 * (a @ initial()[0] + initial()[1] - b) / 3 for a, b in zip(x, y, strict=True)]
    return [[a.T @ f / len(f), f.mean(axis=0)] for a, f in zip(x, factors, strict=True)]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.quick(replicas=2, dynamic=(None, True))
def test_accumulation_and_a_loss_scale(replicas, dynamic):
    data = batches(6)
    kwargs = {"gradient_accumulation_steps": 3}
    if dynamic:
        kwargs["wrap"] = lambda o: tf_lbopt.LossScaleOptimizer(o, initial_scale=128.0)
    elif dynamic is False:
        kwargs["loss_scale_factor"] = 128.0
    model = linear(replicas, **kwargs)
    fit(model, data)
    assert_close(model.get_weights(), reference(data, micro_steps=3))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(replicas=2)
def test_mixed_precision_as_keras_wraps_it(replicas):
    data = batches()
    model = linear(
        replicas, dtype="mixed_float16", wrap=lambda o: keras.optimizers.LossScaleOptimizer(o, 64.0)
    )
    fit(model, data)
    assert_close(model.get_weights(), reference(data), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("replicas", [1, 2])
def test_subset(replicas):
    data = batches()
    model = linear(replicas, subset=2)
    fit(model, data)
    assert_close(model.get_weights(), reference(data, subset=2, replicas=replicas))


def test_a_replica_without_examples():
    x, y = (a[0] for a in batches(1, 14)[:2])
    model = linear(4)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    weights, means, norms = initial(), [], []
    for batch in (range(0, 8, 2), range(8, 14, 2)):  # of the last batch three replicas have a part
        of_replicas = []
        for part in (slice(start, start + 2) for start in batch):
            factor = 2 * (x[part] @ weights[0] + weights[1] - y[part]) / 3
            of_replicas.append([np.einsum("bi,bo->bio", x[part], factor), factor])
        of_layers = list(zip(*of_replicas, strict=True))
        means.append([sum(g.mean(axis=0) for g in parts) / 4 for parts in of_layers])
        norms.append([np.mean([np.linalg.norm(g) for g in np.concatenate(p)]) for p in of_layers])
        weights = clars(initial(), means, norms, **ARGUMENTS)
    assert_close(model.get_weights(), weights)
    assert model.optimizer.skipped_updates.numpy() == 0


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_loss_that_is_a_sum(replicas):
    x, y, weights = batches()
    model = linear(replicas, loss=keras.losses.MeanSquaredError(reduction="sum"))
    fit(model, (x, y, weights), weighted=True)
    # One example's loss is a mean over three outputs, that of the batch a sum over eight examples;
    # up to Keras 3.7 each replica's is taken for a mean over the replicas.
    factor = 8 if _compat.fit_divides_by_replicas() else 8 / replicas
    expected = reference((x, y, factor * weights), weighted=True)
    assert_close(model.get_weights(), expected)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size"])
def test_a_mask_weighs_by_the_reduction(reduction, jit_compile):
    """Without layer adaptation the step is that of SGD, whatever the norms are."""
    x, y = np.array([[1, 2, 0, 0], [3, 0, 0, 0]]), np.zeros((2, 4, 2), "float32")
    weights = []
    for norms in ("sub_batch", "per_example"):
        inputs = keras.Input([4], dtype="int32")
        hidden = keras.layers.Embedding(5, 3, mask_zero=True, embeddings_initializer="ones")(inputs)
        outputs = keras.layers.Dense(2, kernel_initializer="ones")(hidden)
        model = tf_lbopt.PerExampleNormsModel(inputs, outputs)
        optimizer = tf_lbopt.CLARS(
            0.001, norm_estimator=norms, exclude_from_layer_adaptation=[".*"]
        )
        loss = keras.losses.MeanSquaredError(reduction=reduction)
        model.compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile)
        model.fit(x, y, batch_size=2, verbose=0)
        assert optimizer.skipped_updates.numpy() == 0
        weights.append(model.get_weights())
    assert np.abs(weights[0][1] - 1).max() > 1e-3
    assert_close(*weights)


class Net(tf_lbopt.PerExampleNormsModel):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(8, activation="relu")
        self.out = keras.layers.Dense(3, kernel_regularizer="l2")

    def call(self, x, training=False):
        return self.out(self.hidden(x))


class Stack(tf_lbopt.PerExampleNormsModel, keras.Sequential):
    pass


@pytest.mark.parametrize("make", [Net, lambda: Stack([keras.Input([4]), keras.layers.Dense(3)])])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.quick(replicas=2)
def test_kinds_of_models_learn(make, replicas):
    x, y, _ = batches(1, 256)
    with strategy_of(replicas).scope():
        model = make()
        optimizer = tf_lbopt.CLARS(0.5, trust_coefficient=0.05, norm_estimator="per_example")
        model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    history = model.fit(x[0], y[0], batch_size=16, epochs=3, verbose=0).history
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    assert history["mae"][-1] < history["mae"][0]


def test_regularizers_and_the_tracked_loss_are_kerass_own():
    x, y, _ = batches(1, 16)
    losses = []
    for optimizer in (
        tf_lbopt.CLARS(0.0, norm_estimator="per_example"),
        keras.optimizers.SGD(0.0),
    ):
        keras.utils.set_random_seed(0)
        model = Net()
        model.compile(optimizer=optimizer, loss="mse")
        losses.append(model.fit(x[0], y[0], epochs=1, verbose=0).history["loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


OUTPUTS = {
    "one": lambda a, b: a,
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b},
}
COMPILED = {
    "names": ("list", {"loss": {"a": "mse", "b": "mae"}}, "list"),
    "names, labels too": ("list", {"loss": {"b": "mae", "a": "mse"}}, "dict"),
    "names and weights": (
        "list",
        {"loss": {"a": "mse", "b": "mae"}, "loss_weights": {"a": 0.5, "b": 2.0}},
        "dict",
    ),
    "list": ("list", {"loss": ["mse", "mae"], "loss_weights": [0.5, 2.0]}, "list"),
    "list, one left out": ("list", {"loss": [None, "mae"]}, "list"),
    "dict": (
        "dict",
        {"loss": {"a": "mse", "b": "mae"}, "loss_weights": {"a": 0.5, "b": 2.0}},
        "dict",
    ),
    "dict, one left out": ("dict", {"loss": {"a": "mse"}}, "dict"),
    "dict, a loss for all": ("dict", {"loss": "mse"}, "dict"),
    "single list": ("one", {"loss": ["mse"]}, "one"),
    "single name": ("one", {"loss": {"a": "mse"}, "loss_weights": {"a": 3.0}}, "one"),
}


def with_outputs(cls, structure):
    inputs = keras.Input([4])
    a, b = (keras.layers.Dense(units, name=name)(inputs) for name, units in (("a", 3), ("b", 1)))
    model = cls(inputs, OUTPUTS[structure](a, b))
    rng = np.random.default_rng(2)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def one_step_of_clars(stock, x, y, sample_weight):
    """Weights after a step with the norms of one example at a time, of a compiled stock model."""
    before = [v.numpy().astype(float) for v in stock.trainable_variables]

    def gradients(rows):
        own_x, own_y, own_weight = keras.tree.map_structure(
            lambda leaf: leaf if leaf is None else leaf[rows], (x, y, sample_weight)
        )
        with tf.GradientTape() as tape:
            loss = stock.compute_loss(own_x, own_y, stock(own_x), own_weight)
        return tape.gradient(loss, [v.value for v in stock.trainable_variables])

    means = gradients(slice(None))
    examples = [gradients(slice(i, i + 1)) for i in range(len(x))]
    after = []
    for w, mean, *own in zip(before, means, *examples, strict=True):
        if mean is not None:
            n = np.mean([np.linalg.norm(g.numpy().astype(float)) for g in own])
            rate = (
                ARGUMENTS["learning_rate"] * ARGUMENTS["trust_coefficient"] * np.linalg.norm(w) / n
            )
            w = w - 1.9 * rate * (mean.numpy().astype(float) + ARGUMENTS["weight_decay"] * w)
        after.append(w)
    return after


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.quick(replicas=1, weighted=True)
@pytest.mark.quick(replicas=2, weighted=True, way="names and weights")
def test_ways_to_compile(way, weighted, replicas):
    structure, compiled, labels = COMPILED[way]
    (x,), (y,), (weights,) = batches(1)
    # Keras itself fails with weights and the labels of a list of outputs by name.
    y = OUTPUTS[structure if weighted else labels](y, y[:, :1])
    sample_weight = weights.astype("float32") if weighted else None
    stock = with_outputs(keras.Model, structure)
    stock.compile(optimizer="sgd", run_eagerly=True, **compiled)
    with strategy_of(replicas).scope():
        model = with_outputs(tf_lbopt.PerExampleNormsModel, structure)
        optimizer = tf_lbopt.CLARS(norm_estimator="per_example", **ARGUMENTS)
        model.compile(optimizer=optimizer, **compiled)
    history = model.fit(x, y, sample_weight=sample_weight, batch_size=8, verbose=0).history
    assert_close(model.get_weights(), one_step_of_clars(stock, x, y, sample_weight))
    logs = stock.evaluate(x, y, sample_weight=sample_weight, verbose=0, return_dict=True)
    assert {name: v for name, (v,) in history.items()} == pytest.approx(logs, rel=1e-5)


def test_losses_of_the_examples_before_any_training():
    (x,), (y,), (weights,) = batches(1)
    model = with_outputs(tf_lbopt.PerExampleNormsModel, "list")
    model.compile("sgd", loss={"a": "mse", "b": "mae"}, loss_weights={"a": 0.5, "b": 2.0})
    a, b = (p.numpy().astype(float) for p in model(x))
    expected = weights * (0.5 * ((a - y) ** 2).mean(axis=1) + 2 * np.abs(b - y[:, :1])[:, 0])
    got = model.example_losses(x, [y, y[:, :1]], model(x), weights.astype("float32"))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_without_a_loss():
    inputs = keras.Input([4])
    outputs = keras.layers.ActivityRegularization(l2=0.1)(keras.layers.Dense(3)(inputs))
    model = tf_lbopt.PerExampleNormsModel(inputs, outputs)
    model.compile(optimizer=tf_lbopt.CLARS(0.1, norm_estimator="per_example"))
    x, _, _ = batches(1)
    with pytest.raises(ValueError, match=r"needs a `loss` in `compile`.*Received: loss=None"):
        model.fit(x[0], verbose=0)


def test_another_optimizer_gets_kerass_own_step():
    x, y, _ = batches(1, 16)
    results = []
    for cls in (tf_lbopt.PerExampleNormsModel, keras.Model):
        keras.utils.set_random_seed(0)
        inputs = keras.Input([4])
        model = cls(inputs, keras.layers.Dense(3)(inputs))
        model.compile(optimizer=tf_lbopt.CLARS(0.1), loss="mse")
        model.fit(x[0], y[0], epochs=2, shuffle=False, verbose=0)
        results.append(model.get_weights())
    assert_close(*results, rtol=0, atol=0)


class Own(tf_lbopt.PerExampleNormsModel):
    """A functional model with a constructor of its own."""

    def __init__(self, units=3, scale=1.0):
        inputs = keras.Input([4])
        super().__init__(inputs, keras.layers.Dense(units)(inputs))
        self.scale = scale


def test_functional_models_leave_their_classes_as_they_are():
    for make in (linear, lambda: Own(3, 2.0), Net, lambda: Own(2), Net, linear):
        model = make()
        assert isinstance(model, tf_lbopt.PerExampleNormsModel)
        assert model(tf.ones([2, 4])).shape[0] == 2
    assert tf_lbopt.PerExampleNormsModel.__bases__ == (keras.Model,)
    assert Own(2).scale == 1.0


def test_save_and_load(tmp_path):
    x, y, _ = batches(1, 16)
    model = linear()
    model.fit(x[0], y[0], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, tf_lbopt.PerExampleNormsModel)
    for m in (model, loaded):
        m.fit(x[0], y[0], verbose=0, shuffle=False)
    assert_close(model.get_weights(), loaded.get_weights(), rtol=1e-6, atol=1e-7)


class Units(tf_lbopt.PerExampleNormsModel):
    """A subclassed model with a constructor that takes more than Keras's."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.out = keras.layers.Dense(units)

    def call(self, x):
        return self.out(x)


@keras.saving.register_keras_serializable(package="tf_lbopt_tests")
class Saved(Units):
    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tf_lbopt_tests")
class Subset(Saved):
    """With an argument of the same name."""

    def __init__(self, units, norms_subset_size, **kwargs):
        super().__init__(units, **kwargs)
        self.norms_subset_size = norms_subset_size

    def get_config(self):
        return {**super().get_config(), "norms_subset_size": self.norms_subset_size}


@keras.saving.register_keras_serializable(package="tf_lbopt_tests")
class Layers(tf_lbopt.PerExampleNormsModel, keras.Sequential):
    pass


def saved_and_loaded(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("subset", [2, None])
@pytest.mark.parametrize("kind", ["functional", "subclassed", "argument", "sequential"])
@pytest.mark.quick(compiled=False)
@pytest.mark.quick(subset=2, kind=("functional", "subclassed", "sequential"))
def test_copies_keep_the_subset(kind, subset, compiled, tmp_path):
    (x, *_), (y, *_), _ = batches(1)
    model = {
        "functional": lambda: with_outputs(tf_lbopt.PerExampleNormsModel, "one"),
        "subclassed": lambda: Saved(3),
        "argument": lambda: Subset(3, 4),
        "sequential": lambda: Layers([keras.Input([4]), keras.layers.Dense(3)]),
    }[kind]()
    model.norms_subset_size = 5
    model.norms_subset_size = subset
    model(x)
    if compiled:
        model.compile(optimizer=tf_lbopt.CLARS(0.1, norm_estimator="per_example"), loss="mse")
        model.fit(x, y, verbose=0)
    copies = [saved_and_loaded(model, tmp_path), type(model).from_config(model.get_config())]
    if kind != "sequential":  # of which `clone_model` makes a keras.Sequential
        copies += [keras.models.clone_model(model), keras.models.clone_model(copies[0])]
    for copy in copies:
        assert isinstance(copy, tf_lbopt.PerExampleNormsModel)
        assert type(copy).__name__ == type(model).__name__
        assert copy.norms_subset_size == subset
    if compiled:
        for m in (model, copies[0]):
            m.fit(x, y, verbose=0, shuffle=False)
        assert_close(model.get_weights(), copies[0].get_weights(), rtol=1e-6, atol=1e-7)


def test_a_constructor_that_keras_can_not_call_is_refused_when_saving(tmp_path):
    model = Units(3)
    model(np.ones([2, 4]))
    with pytest.raises(NotImplementedError, match="implement `get_config"):
        model.save(tmp_path / "model.keras")


def test_the_subset_is_that_of_one_model(tmp_path):
    model, other = linear(subset=2), linear()
    other.optimizer.build(other.trainable_variables)
    assert keras.models.clone_model(model).norms_subset_size == 2
    for later in (other, linear(), saved_and_loaded(other, tmp_path)):
        assert later.norms_subset_size is None
    with pytest.raises(ValueError, match="`norms_subset_size` must be an integer >= 1"):
        model.norms_subset_size = 0


def test_a_loss_of_another_kind_is_refused():
    x, y, _ = batches(1, 16)
    model = linear(loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
    with pytest.raises(ValueError, match="Received: a loss with reduction="):
        model.fit(x[0], y[0], verbose=0)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_overridden_loss_is_noticed(jit_compile):
    class Doubled(tf_lbopt.PerExampleNormsModel):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    x, y, _ = batches(1, 16)
    inputs = keras.Input([4])
    model = Doubled(inputs, keras.layers.Dense(3)(inputs))
    optimizer = tf_lbopt.CLARS(0.1, norm_estimator="per_example")
    model.compile(optimizer=optimizer, loss="mse", jit_compile=jit_compile)
    if jit_compile:  # XLA makes no assertions
        before = model.get_weights()
        history = model.fit(x[0], y[0], batch_size=8, verbose=0).history
        assert history["loss"] == [np.inf]
        assert (optimizer.iterations.numpy(), optimizer.skipped_updates.numpy()) == (0, 2)
        assert_close(model.get_weights(), before, rtol=0, atol=0)
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match="override `example_losses`"):
        model.fit(x[0], y[0], verbose=0)


# -- without this package --------------------------------------------------------------------------


class Exported(tf_lbopt.PerExampleNormsModel):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2, activation="tanh")

    def call(self, x):
        return self.dense(x)


class ExportedStack(tf_lbopt.PerExampleNormsModel, keras.Sequential):
    pass


def exported(kind):
    if kind == "subclassed":
        return Exported()
    if kind == "sequential":
        return ExportedStack([keras.Input([3]), keras.layers.Dense(2, activation="tanh")])
    inputs = keras.Input([3])
    outputs = keras.layers.Dense(2, activation="tanh")(inputs)
    return tf_lbopt.PerExampleNormsModel(inputs, outputs)


LOADING = """
import sys
import numpy as np
x = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)
if sys.argv[1].endswith(".keras"):
    import keras
    y = keras.saving.load_model(sys.argv[1]).predict(x, verbose=0)
else:
    import tensorflow as tf
    loaded = tf.saved_model.load(sys.argv[1])
    y = loaded.serve(x).numpy()
assert not any(name.startswith("tf_lbopt") for name in sys.modules)
np.save(sys.argv[1] + ".npy", y)
"""


@pytest.mark.parametrize("kind", ["functional", "sequential", "subclassed"])
@pytest.mark.quick(kind="subclassed")
def test_plain_model_for_inference(kind, tmp_path):
    """As the docstring says; loaded where nobody imports this package."""
    model = exported(kind)
    model.compile(tf_lbopt.CLARS(0.1, norm_estimator="per_example"), "mse")
    model.fit(np.ones((8, 3), "float32"), np.ones((8, 2), "float32"), verbose=0)
    x = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)
    if kind == "subclassed":
        path = str(tmp_path / "folder")
        model.export(path, verbose=False)
    else:
        path = str(tmp_path / "plain.keras")
        keras.Model(model.inputs, model.outputs).save(path)
    subprocess.run([*python(), "-c", LOADING, path], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(path + ".npy"), model(x), rtol=1e-5)
